# One step of an optimizer, as a transaction: all of it, or nothing.
#
#   collect   takes the groups, parameters, gradients and state once, and holds every object until the step is over;
#             computes the numbers of the rule. Python code of the user's may run here, raise, or change anything.
#   look      reads the fields of all arrays anew and checks them, where they lie and what they share, without a line of
#             Python. What needs Python (a copy of a gradient, an error) ends the look; afterwards it begins again.
#   norm      of all gradients, where the step is asked to clip it, or to look for NaN and inf.
#   arm       puts first states into optimizer.state.
#   sweep     the kernels, without the GIL, and what rides along: averages, zeros for the gradients.
#   commit    stores that cannot fail: step counts.
#
# From the last look to the end of commit no bytecode runs, so no signal and no exception can come between. A workspace
# keeps nothing of the user's between steps; what it remembers are numbers, and plans made whole and put in place whole.

cimport cython
from cpython.dict cimport (
    PyDict_Copy, PyDict_DelItem, PyDict_GetItemRef, PyDict_GetItemWithError, PyDict_Next, PyDict_SetItem,
)
from cpython.float cimport PyFloat_FromDouble
from cpython.list cimport PyList_SetItem
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.object cimport PyObject, PyObject_SetAttr
from cpython.ref cimport Py_INCREF, Py_XDECREF, Py_XINCREF
from libc.math cimport fabs, isfinite
from libc.stdlib cimport qsort
from libc.string cimport memcmp, memcpy, memset

from pyopt._asked cimport FILL, KEEP, RAISE, SKIP, Asked, Average
from pyopt._engine cimport (
    AVERAGES, BFLOAT16, CHANCE_BFLOAT16, CHANCE_FLOAT16, FLOAT16, KAHAN_BFLOAT16, KAHAN_FLOAT16, ROW_COST, SIGNED_CODES,
    SPLIT, STATES, SUMS, UNSIGNED_CODES, Averaged, Numbers, Outcome, Rule, Stored, Work, cost_of,
    number_blocks, sweep,
)
from pyopt._lock cimport Lock
from pyopt._norms cimport power_sums
from pyopt._plans cimport Plan, is_as_seen, new_plan
from pyopt._rows cimport make_room, release, sort_rows
from pyopt._storage cimport GROUP as CODE_GROUP
from pyopt._storage cimport key_of_block, mixed
from pyopt._views cimport (
    OF_BFLOAT16, OF_FLOAT32, OF_FLOAT64, OF_INT16, OF_UINT8, OTHER, View, end_of, is_dense, is_short, same_order,
    same_shape,
)

from pyopt import checks, storage
from pyopt._isa import kernels
from pyopt._norms import clip_factor, norm_of
from pyopt.parameter import check_state_is_dict, label


cdef extern from *:
    """
    #include <float.h>
    """
    const double FLT_MAX

cdef Rule AVERAGE = kernels.average
cdef Rule EXCHANGE = kernels.exchange
cdef Rule NOTHING = kernels.nothing
cdef long long MOST_STEPS = checks.MOST_STEPS
cdef list NO_AVERAGES = []


cdef class Swapped:
    """A `with` block in which an average and the parameters have changed places: whole, whatever interrupts it."""
    cdef Average average
    cdef Workspace workspace
    cdef object optimizer

    def __init__(self, Average average, Workspace workspace, optimizer):
        self.average, self.workspace, self.optimizer = average, workspace, optimizer

    def __enter__(self):
        with self.workspace:
            for average in [self.average, *self.optimizer._averages]:
                if (<Average?>average).is_swapped:
                    raise RuntimeError("an average has changed places with the parameters already (swapped())")
            self.workspace.exchange(self.optimizer, self.average)

    def __exit__(self, *_):
        self.workspace.exchange(self.optimizer, self.average)


cdef class Workspace(Lock):
    """What the steps of one optimizer use again, and the lock that lets one thread at a time at it."""

    def __cinit__(self):
        self.plans = []
        self.n_known = -1
        self.gradient_factor = self.clip = 1
        self.counted, self.averages, self.weights = NO_AVERAGES, [], []

    def __reduce__(self):
        return type(self), ()  # a copy begins anew

    @property
    def last_grad_norm(self):
        with cython.critical_section(self):  # another thread's step may put another one in its place
            return self.norm

    @cython.critical_section
    cdef int note_norm(self, norm) except -1:
        self.norm = norm
        return 0

    def __dealloc__(self):
        cdef Py_ssize_t k
        for k in range(self.row_capacity):
            release(&self.rows[k].sorter)
        PyMem_Free(self.rows)
        PyMem_Free(self.work)
        PyMem_Free(self.numbers)
        PyMem_Free(self.sums)
        PyMem_Free(self.averaged_at)
        PyMem_Free(self.stored_at)
        PyMem_Free(self.written)
        PyMem_Free(self.known)
        PyMem_Free(self.ordered)

    def step(self, optimizer, list grads=None, Asked asked=None, double gradient_factor=1):
        """One step of the optimizer's rule on every parameter that has a gradient: all of it, or an error and nothing.

        grads, where given, stand for the parameters' own, in the order of the groups; each is taken times
        gradient_factor and that of `asked`.
        """
        cdef double *sums
        self.begin(False)
        try:
            self.gradient_factor = gradient_factor
            self.ask(optimizer, asked)
            if not self.gather(optimizer, grads):
                return
            if self.enter_states():
                self.look(optimizer)
            sums = self.room_for_sums()
            self.clip_gradients()
            self.prepare_clearing()
            self.announce()
            self.arm()
            with nogil:
                sweep(self.work, self.n_work, self.numbers, sums, &self.extras if self.has_extras else NULL)
            self.commit()
        finally:
            self.end()
            self.give_back()

    def step_by(self, function, optimizer, list grads=None, Asked asked=None, double gradient_factor=1):
        """One step by function(grads, gradient_factor), and what rides along; all of it where an Outcome is returned.

        It is the only one of this optimizer that runs.
        """
        cdef Outcome outcome = None
        cdef bint rides
        self.begin(False)
        try:
            self.gradient_factor = gradient_factor
            self.bare = True
            self.ask(optimizer, asked)
            rides = self.has_extras or self.needs_norm or self.clearing != KEEP or len(self.counted) > 0
            if rides:
                if not self.gather(optimizer, grads):
                    return
            outcome = function(grads, self.gradient_factor * self.clip)
            try:
                if rides:
                    self.look(optimizer)
                    self.prepare_clearing()
                    self.announce()
                if outcome is not None:
                    outcome.carry_out()
            except BaseException:
                if outcome is not None:
                    outcome.undo()
                raise
            if rides:
                if self.has_extras:
                    with nogil:
                        sweep(self.work, self.n_work, self.numbers, NULL, &self.extras)
                self.average_left()
                self.commit()
        finally:
            self.end()
            self.give_back()

    cdef bint gather(self, optimizer, list grads) except -1:
        """Collect and look, and take the norm where it is asked for; whether the step is to be made."""
        self.collect(optimizer, grads)
        self.look(optimizer)
        if self.needs_norm and not self.norm_known:
            self.take_norm()
        if self.skips:
            self.prepare_clearing()
            self.skipped_steps += 1
            self.clear_rest()
        return not self.skips

    def exchange(self, optimizer, Average average):
        """Let the parameters and an average change places."""
        cdef Py_ssize_t k
        self.begin(True)
        try:
            self.bare = self.exchanging = True
            self.ride(average, EXCHANGE)
            self.collect(optimizer, None)
            self.look(optimizer)
            self.announce()
            with nogil:
                sweep(self.work, self.n_work, self.numbers, NULL, &self.extras)
            average.is_swapped = not average.is_swapped
            for k in range(self.n_work):
                param = <object>self.rows[self.work[k].row].param
                if self.work[k].averaged[0].kept != NULL:
                    del average.aside[param]
                elif param in self.kept:
                    average.aside[param] = self.kept[param]
        finally:
            self.end()
            self.give_back()

    def follow(self, optimizer, Average average):
        """Give an average an array for each parameter that it has none of."""
        self.begin(True)
        try:
            self.bare = self.exchanging = True
            if average.n_averaged == 0 and not average.is_swapped:
                average.restore({}, average.joined_at, 0, average.steps)  # copies of the parameters as they are now
            self.ride(average, AVERAGE)
            self.collect(optimizer, None)
        finally:
            self.end()
            self.give_back()

    # --- what rides along ---------------------------------------------------------------------------------------------

    cdef int ask(self, optimizer, Asked asked) except -1:
        """Take what this step is asked for, and the averages that it updates."""
        cdef Average average
        self.note_norm(None)
        if asked is not None:
            self.gradient_factor *= asked.gradient_factor
            self.max_norm, self.needs_norm = asked.max_norm, asked.needs_norm
            self.nonfinite, self.clearing = asked.nonfinite, asked.clearing
            self.has_extras = self.clearing == FILL
        if optimizer._averages:
            self.counted = list(optimizer._averages)
            for average in self.counted:
                if average.is_swapped:
                    raise RuntimeError("step() while an average has changed places with the parameters (swapped())")
                if average.is_due(average.steps + 1):
                    self.ride(average, AVERAGE)
        return 0

    cdef int ride(self, Average average, Rule rule) except -1:
        """Run a rule on each parameter's average too."""
        self.extras.kernel = &rule.kernel
        self.weights.append(0.0 if self.exchanging else average.weight(average.n_averaged))
        self.averages.append(average)
        self.extras.averages += 1
        self.has_extras = True
        return 0

    cdef int take_averages(self, Row *row, Py_ssize_t index) except -1:
        """Hold the averages of a parameter, each with the weight of its next update."""
        cdef Average average
        cdef PyObject *found = NULL
        cdef Py_ssize_t j
        param = <object>row.param
        for j in range(len(self.averages)):
            average = self.averages[j]
            if take_next(average.by_param, &self.cursors[j], param, &found):
                array = <object>found
                let_go(&found)
            else:
                if average.n_averaged:
                    average.joined_at[param] = average.n_averaged
                array = average.by_param[param] = self.first_average(row, index)
            weight = self.weights[j]
            if average.joined_at and not self.exchanging:
                weight = average.weight(average.n_averaged - average.joined_at.get(param, 0))
            self.averaged.append((array, weight))
            if self.exchanging and self.extras.kernel == &EXCHANGE.kernel:
                self.keep_average(row, average, array)
        return 0

    cdef int keep_average(self, Row *row, Average average, array) except -1:
        """Copy an average that its parameter, in whose place it goes, would round."""
        cdef View p
        if self.kept is None:
            self.kept = {}
        if self.read_view(row.data, &p) != OTHER and is_short(&p) and <object>row.param not in average.aside:
            self.kept[<object>row.param] = self.copy_of(array)
        return 0

    cdef const char *kept_of(self, Row *row, const View *p) except? NULL:
        """Where the numbers of an average lie that comes back from the place of its parameter; NULL for there."""
        cdef View k
        if not self.exchanging or not is_short(p):
            return NULL
        kept = (<Average>self.averages[0]).aside.get(<object>row.param)
        if kept is None or self.read_view(<PyObject *>kept, &k) != OF_FLOAT32 or k.size != p.size:
            return NULL
        self.kept[<object>row.param] = kept  # it is held until the sweep is over
        return k.data

    cdef Stored *stored_of(self, Work *work) except NULL:
        """Where it is noted how the streams of the next piece of work lie in memory."""
        cdef Stored *stored
        if self.stored_capacity < self.row_capacity:  # a look does not change that
            self.stored_at = <Stored *>grown(self.stored_at, self.row_capacity * sizeof(Stored))
            self.stored_capacity = self.row_capacity
        stored = &self.stored_at[self.n_work]
        if work.stored == NULL:
            memset(stored, 0, sizeof(Stored))
            work.stored = stored
        return stored

    cdef bint note_aside(self, Row *row, Py_ssize_t index, Work *work, const View *p) except -1:
        """Note what is kept beside a parameter and its state; False where it does not go with them."""
        cdef Plan plan = self.new_plans[row.group]
        cdef Stored *stored
        cdef View a
        cdef int j
        cdef bint is_bfloat16 = p.element == OF_BFLOAT16
        if plan.chance and is_short(p):
            stored = self.stored_of(work)
            stored.codec[0] = CHANCE_BFLOAT16 if is_bfloat16 else CHANCE_FLOAT16
            stored.key = key_of_block((<tuple>self.roundings[row.group])[2], row.place)
        if row.aside[0] != NULL:
            stored = self.stored_of(work)
            stored.codec[0] = (SPLIT if plan.storage["master"] == "split" else
                               KAHAN_BFLOAT16 if is_bfloat16 else KAHAN_FLOAT16)
            if (self.read_view(row.aside[0], &a) != (OF_INT16 if stored.codec[0] == SPLIT else p.element)
                    or stored.codec[0] == SPLIT and not is_bfloat16 or not same_shape(p, &a) or not same_order(p, &a)):
                return False
            stored.aside[0] = a.data
            self.add_written(index, a.data, end_of(&a))
        for j in range(STATES):
            if row.aside[1 + j] == NULL:
                continue
            stored = self.stored_of(work)
            if (self.read_view(row.state[j], &a) != OF_UINT8 or not same_shape(p, &a) or not same_order(p, &a)
                    or p.element == OF_FLOAT64):
                return False
            work.stream[2 + j] = a.data
            self.add_written(index, a.data, end_of(&a))
            if (self.read_view(row.aside[1 + j], &a) != OF_FLOAT32 or not is_dense(&a)
                    or a.size != (p.size + CODE_GROUP - 1) // CODE_GROUP):
                return False
            stored.codec[2 + j] = UNSIGNED_CODES if plan.names[j] in plan.unsigned else SIGNED_CODES
            stored.aside[2 + j] = a.data
            self.add_written(index, a.data, end_of(&a))
        return True

    cdef int note_element(self, Work *work, int stream, const View *v) except -1:
        """Note the type of a stream that is of a short one."""
        self.stored_of(work).codec[stream] = BFLOAT16 if v.element == OF_BFLOAT16 else FLOAT16
        return 0

    cdef Averaged *averages_of(self, Py_ssize_t work) except NULL:
        """Where the averages of a tensor are noted."""
        cdef Py_ssize_t n = self.row_capacity * AVERAGES
        if n > self.average_capacity:
            self.averaged_at = <Averaged *>grown(self.averaged_at, n * sizeof(Averaged))
            self.average_capacity = n
        return &self.averaged_at[work * AVERAGES]

    def gradient_sums(self, double power, double scale):
        """Per gradient the sum of (|x| * scale)**power, in the parameters' order."""
        cdef list swept = power_sums(self.work, self.n_work, power, scale), found = []
        cdef Py_ssize_t k
        for k in range(self.n_rows):
            if self.rows[k].work >= 0:
                found.append(swept[self.rows[k].work])
            elif self.rows[k].grad != NULL:
                found.append(self.left_sum(&self.rows[k], power, scale))
        return found

    cdef int take_norm(self) except -1:
        """The norm of all gradients, and what follows from it."""
        cdef double norm_of_all = norm_of(self.gradient_sums, 2) * fabs(self.gradient_factor)
        cdef Py_ssize_t k
        self.norm_known = True
        self.note_norm(norm_of_all)
        if not isfinite(norm_of_all):
            if self.nonfinite == RAISE:
                for k in range(self.n_rows):
                    if self.rows[k].grad != NULL and not self.has_finite_gradient(&self.rows[k]):
                        raise ValueError(f"{self.label_of(k)}: its gradient has NaN or inf")
                raise ValueError(f"the norm of all gradients is {norm_of_all}, must be finite")
            self.skips = self.nonfinite == SKIP
        if self.max_norm > 0:
            self.clip = clip_factor(self.max_norm, norm_of_all)
        return 0

    cdef object label_of(self, Py_ssize_t index):
        """How messages call a parameter: by its name in the group, where it has none of its own."""
        cdef Py_ssize_t first = index
        while first > 0 and self.rows[first - 1].group == self.rows[index].group:
            first -= 1
        names = self.groups[self.rows[index].group].get("param_names")
        if isinstance(names, (list, tuple)) and index - first < len(names):
            return f"parameter {names[index - first]!r}"
        return label(index, <object>self.rows[index].param)

    cdef int clip_gradients(self) noexcept:
        """Fold what clips the norm into the numbers of all rules, whose first is the gradient's factor."""
        cdef Py_ssize_t i
        if self.clip != 1:
            for i in range(len(self.new_counts)):
                self.numbers[i].value[0] *= self.clip
        return 0

    cdef int prepare_clearing(self) except -1:
        """Note the gradients that the sweep does not clear: to be filled in place, or dropped."""
        cdef Py_ssize_t k
        cdef Row *row
        if self.clearing == KEEP:
            return 0
        self.fills, self.drops = [], []
        for k in range(self.n_rows):
            row = &self.rows[k]
            if row.grad == NULL or row.work >= 0 and self.work[row.work].clears and not self.skips:
                continue
            if (self.clearing == FILL or row.n_flat) and not row.keeps_gradient:
                self.fills.append(self.gradients[k])
            else:
                self.drops.append(<object>row.param)
        return 0

    cdef int clear_rest(self) noexcept:
        """Clear the gradients that the sweep has not cleared: no Python code, but of a parameter's own class."""
        if self.clearing == KEEP:
            return 0
        try:
            self.fill(self.fills)
            for param in self.drops:
                PyObject_SetAttr(param, "grad", None)
        except BaseException:  # the step is done
            pass
        return 0

    # --- collect ------------------------------------------------------------------------------------------------------

    cdef int collect(self, optimizer, list grads) except -1:
        """Take all that the step will use: Python code may run here, nothing has been looked at yet."""
        cdef Py_ssize_t g, i, n, k = 0, place = 0, step, last_step
        cdef list params
        cdef Plan plan
        cdef Row *row
        cdef PyObject *found = NULL
        cdef tuple before = None, last_before = None
        states = optimizer.state
        if not isinstance(states, dict):
            raise TypeError(f"state of the optimizer is a {type(states).__name__}, must be a dict")
        self.states = states
        self.counts_steps = optimizer.counts_steps
        self.count_names = ("step", *optimizer.number_states) if self.counts_steps else ()
        self.n_counts = len(self.count_names)
        self.shared_numbers = optimizer.shared_numbers
        self.needs_rows = optimizer.needs_rows
        self.bare_rows = self.bare and not self.exchanging and optimizer.takes_rows({})
        self.cursor = 0
        memset(self.cursors, 0, sizeof(self.cursors))
        self.groups = list(optimizer.param_groups)
        self.new_plans, self.new_counts, self.slot_errors = [], [], []
        self.averaged, self.gradients, self.roundings = [], [], []
        if self.bare or self.averages:
            self.reserve(1)
            self.add_idle_slot()
        n = len(self.groups)
        for g in range(n):
            group = self.groups[g]
            plan = None if self.bare else self.plan_of(optimizer, g, group)
            self.new_plans.append(plan)
            self.roundings.append(None)
            if plan is not None and plan.chance:
                step = storage.rounding_step(group)
                self.roundings[g] = group, step + 1, key_of_block(mixed(plan.storage["seed"]), step)
            if self.bare and not isinstance(group, dict):
                raise TypeError(f"param group {g} is a {type(group).__name__}, must be a dict")
            if not PyDict_GetItemRef(group, "params", &found):
                raise TypeError(f"'params' of param group {g} is missing, must be a list of parameters")
            given = <object>found
            let_go(&found)
            if not isinstance(given, (list, tuple)):
                kind = type(given).__name__
                raise TypeError(f"'params' of param group {g} is a {kind}, must be a list of parameters")
            params = self.units(list(given), g, plan)
            if grads is not None and len(grads) < k + len(params):
                raise ValueError(f"grads has {len(grads)} items, must have more: one per parameter")
            self.reserve(k + len(params))
            last_step = -1
            for i in range(len(params)):
                row = &self.rows[k]
                memset(row, 0, <char *>&row.known_free - <char *>row)
                row.group = g
                self.n_rows = k + 1
                hold(&row.param, params[i])
                self.take(row, k)
                row.place = place
                place += max(row.n_flat, 1)
                grad = None if self.exchanging else params[i].grad if grads is None else grads[k]
                if self.clearing != KEEP:
                    self.gradients.append(grad)
                if grad is not None:
                    hold(&row.grad, grad)
                    row.route = KERNEL if self.bare or plan.names is not None else LEFT
                    row.beside = self.bare
                    self.take_gradient(row, k)
                    if row.route == KERNEL and not row.beside and (
                            not plan.takes_rows if row.values != NULL else self.needs_rows):
                        self.refuse_gradient(row, k, optimizer)
                elif self.averages:
                    row.route = KERNEL
                    row.beside = True
                    if plan is not None and plan.master_name is not None:
                        if self.take_entry(row) and isinstance(<object>row.entry, dict):
                            self.take_aside(row, plan, row.entry, k)
                if self.averages:
                    self.take_averages(row, k)
                if row.route == KERNEL and not row.beside:
                    step = self.take_state(row, plan, optimizer, k)
                if row.route == KERNEL and not row.beside:
                    if self.n_counts > 1:
                        before = self.read_counts(row, k)
                    if step != last_step or before != last_before:
                        self.add_slot(plan, optimizer, step, before)
                        last_step, last_before = step, before
                    elif plan.rule.kernel.finish != NULL:
                        self.repeat_slot()
                    row.slot = len(self.new_counts) - 1
                k += 1
        if grads is not None and len(grads) != k:
            raise ValueError(f"grads has {len(grads)} items, must have {k}: one per parameter")
        return 0

    cdef Plan plan_of(self, optimizer, Py_ssize_t g, group):
        """The plan of a group: the one of the last step, or a new one where the group has changed."""
        if g < len(self.plans) and is_as_seen(group, (<Plan>self.plans[g]).seen):
            return self.plans[g]
        self.unsteady = True
        return new_plan(optimizer, g, group, self.counts_steps)

    cdef Py_ssize_t take_state(self, Row *row, Plan plan, optimizer, Py_ssize_t index) except -1:
        """Take the state of a row, or a new one; the number of its step, 1 or 2 where steps are not counted."""
        cdef PyObject *source
        cdef int j
        cdef bint has_master = plan.master_name is not None and self.has_master(row, plan)
        first_name = plan.master_name if plan.stateless and has_master else plan.first_name
        if self.take_entry(row):
            if not isinstance(<object>row.entry, dict):
                check_state_is_dict(label(index, <object>row.param), <object>row.entry)
            self.check_entry(row, index)
        if first_name is None:
            return 2
        if row.entry == NULL or not self.holds(row.entry, first_name):
            if row.entry != NULL:
                for name in (*self.count_names, *plan.names):
                    if name is not None and self.holds(row.entry, name):
                        self.lacks(row, index, first_name)
                        return 2
            hold(&row.made, self.make_state(row, index, plan, optimizer))
            self.unsteady = True
        source = row.made if row.made != NULL else row.entry
        for j in range(self.n_counts):
            name = self.count_names[j]
            if not PyDict_GetItemRef(<object>source, name, &row.count[j]):
                self.lacks(row, index, name)
                return 2
        for j in range(STATES):
            if plan.name[j] == NULL:
                continue
            if not PyDict_GetItemRef(<object>source, <object>plan.name[j], &row.state[j]):
                self.lacks(row, index, <object>plan.name[j])
                return 2
        if plan.storage is not None:
            self.take_aside(row, plan, source, index)
        self.take_arrays(row, index)
        if self.counts_steps and row.route == KERNEL:
            return min(self.read_step(row, index) + 1, MOST_STEPS)
        return 1 if row.made != NULL and row.values == NULL else 2  # each row has a first step of its own

    cdef int take_aside(self, Row *row, Plan plan, PyObject *source, Py_ssize_t index) except -1:
        """Take what the state keeps beside the parameter, and beside each array."""
        row.has_aside = True
        cdef int j
        if plan.master_name is not None and self.has_master(row, plan):
            if not PyDict_GetItemRef(<object>source, plan.master_name, &row.aside[0]):
                return self.lacks(row, index, plan.master_name)
        for j in range(len(plan.aside_names or ())):
            if row.state[j] != NULL:  # there is none where there are too few elements
                PyDict_GetItemRef(<object>source, plan.aside_names[j], &row.aside[1 + j])
        return 0

    cdef bint take_entry(self, Row *row) except -1:
        """Take the entry of optimizer.state; whether there is one."""
        return take_next(self.states, &self.cursor, <object>row.param, &row.entry)

    cdef object last_copy(self, Py_ssize_t index):
        """The private copy of a row's gradient from the last step, None if there was none."""
        return None if self.copies is None else self.copies.get(index)

    cdef int use_copy(self, Row *row, Py_ssize_t index, copy) except -1:
        """Step with a private copy in the place of the gradient, and keep it for the next step."""
        if self.new_copies is None:
            self.new_copies = {}
        self.new_copies[index] = copy
        hold(&row.grad, copy)
        row.must_copy, row.has_copy = False, True
        return 0

    cdef int add_slot(self, Plan plan, optimizer, Py_ssize_t step, tuple before) except -1:
        """The numbers of a step of one group, for the parameters at the same count."""
        cdef Py_ssize_t position = 0
        cdef PyObject *key
        cdef PyObject *value
        cdef double x
        cdef object too_large = plan.too_large
        cdef dict options = plan.options, scalars
        counts = (step,)
        if before is not None:
            numbers = optimizer.next_numbers(options, step, dict(zip(self.count_names[1:], before)))
            counts = (step, *[float(numbers[name]) for name in self.count_names[1:]])
            options = {**options, **numbers}
        scalars = optimizer.scalars(options, step)
        if self.gradient_factor != 1:
            scalars = {**scalars, "gradient_factor": scalars["gradient_factor"] * self.gradient_factor}
        while PyDict_Next(scalars, &position, &key, &value):
            x = <object>value
            if not plan.finite:  # torch takes inf and NaN in a group, and they show in the result
                break
            if not isfinite(x):
                raise ValueError(f"{<object>key} == {x} in step {step}, must be finite: {options}")
            if fabs(x) > FLT_MAX and too_large is None and <object>key not in self.shared_numbers:  # these stay double
                too_large = f"{<object>key} == {x} in step {step}, must be at most 3.4e38 in float32: {options}"
        self.numbers[len(self.new_counts)].kernel = &plan.rule.kernel
        if plan.rule.kernel.finish != NULL:  # its numbers can be options as they are
            scalars = {**options, **scalars}
        plan.rule.pack(scalars, self.numbers[len(self.new_counts)].value)
        self.slot_errors.append(too_large)
        self.new_counts.append(counts)
        return 0

    cdef int add_idle_slot(self) except -1:
        """The first slot, of parameters that no rule steps."""
        self.numbers[0].kernel = &NOTHING.kernel
        self.slot_errors.append(None)
        self.new_counts.append(())
        return 0

    cdef int repeat_slot(self) except -1:
        """The last numbers once more, for one more tensor that makes its own of them."""
        cdef Py_ssize_t n = len(self.new_counts)
        self.numbers[n] = self.numbers[n - 1]
        self.slot_errors.append(self.slot_errors[n - 1])
        self.new_counts.append(self.new_counts[n - 1])
        return 0

    # --- look ---------------------------------------------------------------------------------------------------------

    cdef int look(self, optimizer) except -1:
        """Look at all arrays until nothing is left to do for them in Python."""
        cdef int _i
        for _i in range(1000):
            self.again = False
            self.look_once()
            if not self.settle(optimizer) and not self.again:
                if not self.bare:
                    self.plans = self.new_plans
                self.copies = self.new_copies
                return 0
        raise RuntimeError("parameters, gradients or state change while the step looks at them")

    cdef int look_once(self) except -1:
        """Read the fields of all arrays, fill the work; `again` where Python code has run or must run."""
        cdef Py_ssize_t k, cost = 0
        cdef Row *row
        cdef Work *w
        self.n_work = self.n_written = 0
        for k in range(self.n_rows):
            row = &self.rows[k]
            w = &self.work[self.n_work]
            w.clears, w.touched, w.stored, w.max_row_norm = False, NULL, NULL, 0
            row.work = -1
            if not self.look_at(row, k, w):
                continue
            w.row, row.work = k, self.n_work
            w.start = cost
            w.slot = row.slot
            if not w.is_double and self.slot_errors[row.slot] is not None:
                raise ValueError(f"{label(row.place, <object>row.param)} is float32: {self.slot_errors[row.slot]}")
            cost += cost_of(w) + ROW_COST
            self.n_work += 1
        if self.again:
            return 0
        self.order_written()
        if self.again:
            return 0
        for k in range(self.n_rows):
            row = &self.rows[k]
            if row.read.begin < row.read.end and not (
                    row.free_version == self.version and row.known_free.begin <= row.read.begin
                    and row.read.end <= row.known_free.end):
                self.find_tangles(row, k)
        return 0

    cdef bint add_written(self, Py_ssize_t row, char *begin, char *end, bint is_gradient=False) except -1:
        """Note what will be written, or must not be."""
        cdef Py_ssize_t n = self.n_written
        if begin >= end:
            return False
        if n == self.range_capacity:
            n = 2 * n + 64
            self.written = <Written *>grown(self.written, n * sizeof(Written))
            self.known = <Written *>grown(self.known, n * sizeof(Written))
            self.ordered = <Written *>grown(self.ordered, n * sizeof(Written))
            self.range_capacity = n
        self.written[self.n_written].range.begin = begin
        self.written[self.n_written].range.end = end
        self.written[self.n_written].row = row
        self.written[self.n_written].reach = NULL
        self.written[self.n_written].is_gradient = is_gradient
        self.n_written += 1
        return True

    cdef Py_ssize_t look_at_rows(self, Row *row, Work *w, const View *p, const void *indices, int itemsize,
                                 Py_ssize_t n, bint *ascending) except -2:
        """Sort n indices of rows into the work; the place of the first that is not of the table p, -1 for none."""
        cdef Py_ssize_t rows = p.shape[0], wrong
        make_room(&row.sorter, n)
        wrong = sort_rows(&row.sorter, &row.touched, indices, itemsize, n, rows, ascending)
        row.touched.width = p.size // rows if rows else 0
        if row.touched.width == 0:
            row.touched.count = 0
        w.touched = &row.touched
        return wrong

    cdef bint steps_by_row(self, Row *row):
        """Whether the rule of a row of the step goes row by row over the table that the parameter then is."""
        return not row.beside and (<Plan>self.new_plans[row.group]).rule.kernel.finish_row32 != NULL

    cdef double max_row_norm(self, const Row *row):
        """What the norm of each row is kept to of the table that the parameter then is; 0 for no bound."""
        return 0 if row.beside or row.route != KERNEL else (<Plan>self.new_plans[row.group]).max_row_norm

    cdef bint has_codes(self, const Work *work) noexcept:
        """Whether a state is in 8 bits, whose scales are those of 256 elements, not of rows."""
        cdef int j
        for j in range(2, 2 + STATES):
            if work.stored != NULL and work.stored.codec[j] in (SIGNED_CODES, UNSIGNED_CODES):
                return True
        return False

    cdef int take_all_rows(self, Row *row, Work *w, const View *p) except -1:
        """Have all rows of the table p stepped."""
        row.touched.row = row.touched.first = row.touched.place = NULL
        row.touched.count = p.shape[0] if p.ndim else 1
        row.touched.width = p.size // row.touched.count if row.touched.count else 0
        if row.touched.width == 0:
            row.touched.count = 0
        w.touched = &row.touched
        return 0

    cdef int order_written(self) except -1:
        """Put in ascending order what is written, where it is not what it was; find what shares memory."""
        cdef Py_ssize_t i, furthest = 0
        cdef size_t size = self.n_written * sizeof(Written)
        cdef bint shared = False
        if self.n_written == 0:  # there may be no memory for any
            self.n_known = 0
            return 0
        if self.n_written == self.n_known and memcmp(self.written, self.known, size) == 0:
            return 0
        self.n_known = -1
        self.version += 1
        memcpy(self.ordered, self.written, size)
        qsort(self.ordered, self.n_written, sizeof(Written), ascending)
        for i in range(self.n_written):
            if i > 0 and self.ordered[i].range.begin < self.ordered[furthest].range.end:
                shared = True
                if not (self.keep_gradient(&self.ordered[furthest]) | self.keep_gradient(&self.ordered[i])):
                    self.overlap(self.ordered[furthest].row, self.ordered[i].row)
            if self.ordered[i].range.end > self.ordered[furthest].range.end:
                furthest = i
            self.ordered[i].reach = self.ordered[furthest].range.end
        if not shared:
            memcpy(self.known, self.written, size)
            self.n_known = self.n_written
        return 0

    cdef bint keep_gradient(self, const Written *written) noexcept:
        """Whether this is a gradient; it is then not cleared by the sweep, for it shares memory with other things."""
        if written.is_gradient:
            self.rows[written.row].keeps_gradient = True
            self.again = True
        return written.is_gradient

    cdef int find_tangles(self, Row *row, Py_ssize_t index) except -1:
        """Find all rows that write where the gradient of this one lies."""
        cdef Py_ssize_t low = 0, high = self.n_written, k
        cdef char *begin = row.read.begin
        cdef char *end = row.read.end
        while low < high:  # the first that begins at or behind the end of the gradient
            k = (low + high) // 2
            if self.ordered[k].range.begin < end:
                low = k + 1
            else:
                high = k
        if low == 0 or self.ordered[low - 1].reach <= begin:
            row.free_version = self.version
            row.known_free.begin = self.ordered[low - 1].reach if low > 0 else NULL
            row.known_free.end = self.ordered[low].range.begin if low < self.n_written else <char *>~<size_t>0
            return 0
        k = low - 1
        while k >= 0 and self.ordered[k].reach > begin:
            if self.ordered[k].range.end > begin:
                self.tangle(index, self.ordered[k].row)
            k -= 1
        return 0

    # --- arm and commit -----------------------------------------------------------------------------------------------

    cdef double *room_for_sums(self) except? NULL:
        """Where the sweep puts the sums of blocks; NULL where no rule needs any."""
        cdef Py_ssize_t k
        for k in range(self.n_work):
            if self.numbers[self.work[k].slot].kernel.finish != NULL:
                break
        else:
            return NULL
        return self.reserve_sums(number_blocks(self.work, self.n_work))

    cdef double *reserve_sums(self, Py_ssize_t blocks) except NULL:
        """Room for the sums of so many blocks."""
        if self.sums == NULL or blocks > self.sums_capacity:
            self.sums = <double *>grown(self.sums, (blocks + 1) * SUMS * sizeof(double))
            self.sums_capacity = blocks
        return self.sums

    cdef bint enter_states(self) except -1:
        """Give rows without one an empty entry in optimizer.state, which is no state; whether Python may have run."""
        cdef Py_ssize_t k
        cdef bint entered = False
        for k in range(self.n_rows):
            row = &self.rows[k]
            if row.route == KERNEL and row.made != NULL and row.entry == NULL:
                entry = {}
                PyDict_SetItem(self.states, <object>row.param, entry)
                hold(&row.entry, entry)
                entered = self.unsteady = True
        return entered

    cdef int arm(self) except -1:
        """Put first states into their entries, as they will be: who looks at them meanwhile finds nothing else."""
        cdef Py_ssize_t k, position
        cdef PyObject *key
        cdef PyObject *value
        cdef Row *row
        self.armed = True
        for k in range(self.n_rows):
            row = &self.rows[k]
            if row.route == KERNEL and row.made != NULL:
                if self.counts_steps:
                    self.make_counts(row)
                position = 0
                while PyDict_Next(<object>row.made, &position, &key, &value):
                    PyDict_SetItem(<object>row.entry, <object>key, <object>value)
        if self.shared_numbers and self.n_work:
            self.spares = [PyFloat_FromDouble(0) for _ in self.shared_numbers]
            for group, plan in zip(self.groups, self.new_plans):
                for name in self.shared_numbers:
                    PyDict_SetItem(group, name, (<Plan>plan).options[name])
        return 0

    cdef int disarm(self) noexcept:
        """Take first states out again."""
        cdef Py_ssize_t k, position
        cdef PyObject *key
        cdef PyObject *value
        cdef Row *row
        for k in range(self.n_rows):
            row = &self.rows[k]
            if row.route == KERNEL and row.made != NULL and row.entry != NULL:
                position, entry = 0, <object>row.entry
                while PyDict_Next(<object>row.made, &position, &key, &value):
                    try:
                        with cython.critical_section(entry):
                            if PyDict_GetItemWithError(entry, <object>key) == value:
                                PyDict_DelItem(entry, <object>key)
                    except BaseException:  # a key with a hash of its own
                        pass
        self.armed = False
        return 0

    cdef int commit(self) noexcept:
        """Store the counts: no Python code, nothing that can fail."""
        cdef Py_ssize_t k
        cdef Average average
        self.armed = False
        for rounding in self.roundings:
            if rounding is not None:
                PyDict_SetItem(<object>(<tuple>rounding)[0], "rounding_step", <object>(<tuple>rounding)[1])
        if self.counts_steps:
            for k in range(self.n_rows):
                if self.rows[k].route == KERNEL and not self.rows[k].beside:
                    self.store_counts(&self.rows[k])
        if self.shared_numbers and self.n_work:
            self.store_shared_numbers()
        for average in self.counted:
            average.steps += 1
        for average in self.averages:
            average.n_averaged += 1
        self.clear_rest()
        return 0

    cdef int store_shared_numbers(self) noexcept:
        """Store in all groups what the rule has made of joint sums: the numbers behind the gradient's factor."""
        cdef Py_ssize_t i, g, w = 0
        while w < self.n_work - 1 and self.rows[self.work[w].row].beside:
            w += 1
        if self.rows[self.work[w].row].beside:
            return 0
        for i in range(len(self.shared_numbers)):
            Py_INCREF(None)
            PyList_SetItem(self.spares, i, None)  # its memory is that of the new one, which cannot fail so
            value = PyFloat_FromDouble(self.numbers[self.work[w].slot].value[1 + i])
            for g in range(len(self.groups)):
                PyDict_SetItem(self.groups[g], self.shared_numbers[i], value)
        return 0

    cdef int end(self) noexcept:
        """Let go of all that the step has held."""
        cdef Py_ssize_t k, n
        cdef Row *row
        if self.armed:
            self.disarm()
        n, self.n_rows = self.n_rows, 0
        for k in range(n):
            row = &self.rows[k]
            let_go(&row.param)
            let_go(&row.data)
            let_go(&row.grad)
            let_go(&row.indices)
            let_go(&row.values)
            let_go(&row.entry)
            let_go(&row.made)
            for j in range(STATES):
                let_go(&row.state[j])
            if row.has_aside:
                for j in range(1 + STATES):
                    let_go(&row.aside[j])
            for j in range(COUNTS):
                let_go(&row.count[j])
        self.groups = self.new_plans = self.new_counts = self.slot_errors = self.new_copies = None
        self.states = self.averaged = self.gradients = self.fills = self.drops = None
        self.shared_numbers = self.roundings = self.kept = None
        self.counted = NO_AVERAGES
        if self.averages or self.weights:
            self.averages, self.weights = [], []
        self.extras.averages = self.clearing = self.nonfinite = 0
        self.max_norm, self.clip = 0, 1
        self.has_extras = self.needs_norm = self.norm_known = self.skips = self.bare = self.exchanging = False
        self.unsteady = False
        return Lock.end(self)

    cdef int reserve(self, Py_ssize_t n) except -1:
        """Make room for n rows."""
        if n > self.row_capacity:
            n = max(n, 2 * self.row_capacity)
            self.rows = <Row *>grown(self.rows, n * sizeof(Row))
            memset(&self.rows[self.row_capacity], 0, (n - self.row_capacity) * sizeof(Row))
            self.work = <Work *>grown(self.work, n * sizeof(Work))
            self.numbers = <Numbers *>grown(self.numbers, (n + 1) * sizeof(Numbers))
            self.row_capacity = n
        return 0

    # --- what a kind of arrays answers --------------------------------------------------------------------------------

    cdef list units(self, list params, Py_ssize_t g, Plan plan):
        """What is stepped as one parameter each, of the parameters of a group."""
        return params

    cdef int take(self, Row *row, Py_ssize_t index) except -1:
        """Check what kind of object a parameter is, and take the array behind it."""
        raise NotImplementedError

    cdef bint has_master(self, Row *row, Plan plan) except -1:
        """Whether the parameter is of a type that needs one."""
        cdef View p
        return self.read_view(row.data, &p) != OTHER and is_short(&p) and (
            plan.storage["master"] != "split" or p.element == OF_BFLOAT16)

    cdef int read_view(self, PyObject *array, View *v) except -1:
        """What an array of any kind is: the type of its elements, OTHER where it cannot be written to as it lies."""
        raise NotImplementedError

    cdef int take_gradient(self, Row *row, Py_ssize_t index) except -1:
        """Check what kind of object a gradient is, or make one of the right kind."""
        raise NotImplementedError

    cdef int refuse_gradient(self, Row *row, Py_ssize_t index, optimizer) except -1:
        """A gradient is row-sparse where the optimizer takes none, or not where it must be: raise, or leave the row."""
        raise NotImplementedError

    cdef int check_entry(self, Row *row, Py_ssize_t index) except -1:
        """Raise where an entry of the state cannot be used safely."""
        return 0

    cdef bint holds(self, PyObject *entry, name) except -1:
        """Whether an entry of the state holds something under this name."""
        raise NotImplementedError

    cdef int lacks(self, Row *row, Py_ssize_t index, name) except -1:
        """The state of a row has no such array: raise, or leave the row."""
        raise NotImplementedError

    cdef Py_ssize_t read_step(self, Row *row, Py_ssize_t index) except -2:
        """How many steps the parameter has made."""
        raise NotImplementedError

    cdef dict make_state(self, Row *row, Py_ssize_t index, Plan plan, optimizer):
        """The state of a parameter before its first step."""
        made = optimizer.new_state(<object>row.param, plan.options)
        if not isinstance(made, dict):
            raise TypeError(f"new_state returned a {type(made).__name__}, must return a dict")
        return PyDict_Copy(made)

    cdef int take_arrays(self, Row *row, Py_ssize_t index) except -1:
        """Take the arrays behind the state."""
        return 0

    cdef tuple read_counts(self, Row *row, Py_ssize_t index):
        """The other numbers that are kept for the parameter, as Python floats."""
        raise NotImplementedError

    cdef bint look_at(self, Row *row, Py_ssize_t index, Work *work) except -1:
        """Look at the arrays of a row and note what is written; whether there is work: its size and streams then."""
        raise NotImplementedError

    cdef object first_average(self, Row *row, Py_ssize_t index):
        """A copy of a parameter, where its average begins."""
        raise NotImplementedError

    cdef object copy_of(self, average):
        """A copy of an average, in its memory order."""
        raise NotImplementedError

    cdef double left_sum(self, Row *row, double power, double scale) except? -1:
        """The sum of (|x| * scale)**power of a gradient that is not stepped by the kernels."""
        raise NotImplementedError

    cdef bint has_finite_gradient(self, Row *row) except -1:
        """Whether a gradient has neither NaN nor inf."""
        raise NotImplementedError

    cdef int fill(self, list grads) except -1:
        """Fill gradients with zeros."""
        raise NotImplementedError

    cdef bint overlap(self, Py_ssize_t first, Py_ssize_t second) except -1:
        """Two rows, or one with itself, would write to the same memory: raise, or leave them and return True."""
        raise NotImplementedError

    cdef int tangle(self, Py_ssize_t reader, Py_ssize_t writer) except -1:
        """The gradient of one row lies where another writes."""
        raise NotImplementedError

    cdef bint settle(self, optimizer) except -1:
        """Do what must be done in Python; whether there was something."""
        raise NotImplementedError

    cdef int average_left(self) except -1:
        """Move the averages of rows that are left to others, or let them change places."""
        return 0

    cdef int announce(self) except -1:
        """Tell others that the arrays will be written to; without Python code."""
        return 0

    cdef int make_counts(self, Row *row) except -1:
        """Put the new counts into a first state, where they are Python numbers."""
        return 0

    cdef int store_counts(self, Row *row) noexcept:
        """Store the new counts of a row."""
        return 0


cdef bint take_next(items, Py_ssize_t *cursor, param, PyObject **place) except -1:
    """Hold what a dict has for a parameter; whether it has it. Without a hash where it stands in their order."""
    cdef Py_ssize_t next = cursor[0]
    cdef PyObject *key
    cdef PyObject *value
    with cython.critical_section(items):
        if PyDict_Next(items, &next, &key, &value):
            if key == <PyObject *>param:
                cursor[0] = next
                Py_XINCREF(value)
                place[0] = value
                return True
        elif cursor[0] == 0:
            return False
    return PyDict_GetItemRef(items, param, place)


cdef void hold(PyObject **place, value) noexcept:
    cdef PyObject *before = place[0]
    Py_INCREF(value)
    place[0] = <PyObject *>value
    Py_XDECREF(before)


cdef void let_go(PyObject **place) noexcept:
    cdef PyObject *value = place[0]
    place[0] = NULL  # first: what follows can run a destructor
    Py_XDECREF(value)


cdef int ascending(const void *a, const void *b) noexcept nogil:
    cdef const Range *x = &(<const Written *>a).range
    cdef const Range *y = &(<const Written *>b).range
    if x.begin != y.begin:
        return -1 if x.begin < y.begin else 1
    return (x.end > y.end) - (x.end < y.end)


cdef void *grown(void *block, size_t size) except NULL:
    block = PyMem_Realloc(block, size)
    if block == NULL:
        raise MemoryError(f"no {size} bytes for the workspace of a step")
    return block
