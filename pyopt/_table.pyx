# What a step works on: the table of the buffers of an optimizer, kept from step to step.
#
# - Parameters and state are exported once and held; gradients are looked at in every step and let go at its end, so
#   that no gradient is kept alive. Whatever the user may have changed is noticed by the identity of the objects.
# - Everything is checked before anything changes: `collect` may raise, the sweep cannot, `commit` writes the counts.

from cpython.buffer cimport PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.dict cimport PyDict_GetItemWithError, PyDict_Next
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.object cimport PyObject

from pyopt._engine cimport ROW_COST, STATES, Numbers, Rule, Work, sweep

import numpy as np
from numpy import ndarray

from pyopt.checks import count as check_count
from pyopt.checks import plain
from pyopt.parameter import Parameter, check_gradient, check_no_overlap, check_state, label


# --- views ------------------------------------------------------------------------------------------------------------

cdef bint same_shape(const View *a, const View *b) noexcept:
    cdef int i
    if a.ndim != b.ndim:
        return False
    for i in range(a.ndim):
        if a.shape[i] != b.shape[i]:
            return False
    return True


cdef bint same_order(const View *a, const View *b) noexcept:
    """Whether two arrays of one shape and type lay their elements out alike; a length of 1 has no stride."""
    cdef int i
    for i in range(a.ndim):
        if a.strides[i] != b.strides[i] and a.shape[i] > 1:
            return False
    return True


cdef char *end_of(const View *view) noexcept:
    """Behind the last element of a dense array."""
    return view.data + view.size * view.itemsize


cdef void take_view(View *view, const Py_buffer *buffer) noexcept:
    view.data = <char *>buffer.buf
    view.shape = <const int64_t *>buffer.shape
    view.strides = <const int64_t *>buffer.strides
    view.ndim = buffer.ndim
    view.itemsize = <int>buffer.itemsize
    view.size = buffer.len // buffer.itemsize


cdef class Export:
    """The buffer of an array, held for as long as this object lives."""
    cdef Py_buffer buffer

    def __cinit__(self, array):
        PyObject_GetBuffer(array, &self.buffer, PyBUF_STRIDES | PyBUF_WRITABLE)

    def __dealloc__(self):
        PyBuffer_Release(&self.buffer)


# --- rows -------------------------------------------------------------------------------------------------------------

cdef class Row:
    """One parameter of a table: its views, and the objects that they were taken from."""

    cdef bint bind(self, param, Py_ssize_t index) except -1:
        """Bring the view of the parameter up to date; whether it lies elsewhere now."""
        raise NotImplementedError

    cdef Py_ssize_t find_state(self, Table table, optimizer, group) except -1:
        """Find or make the state; the number of the step to come, 1 or 2 where the optimizer does not count."""
        cdef PyObject *found = table.state_of(self.param)
        self.fresh = found == NULL or not <object>found
        if self.fresh:
            self.state = {} if table.stateless else optimizer.new_state(self.param, group)
        elif isinstance(<object>found, dict):
            self.state = <object>found
        else:
            what = type(<object>found).__name__
            raise TypeError(f"{label(self.index, self.param)}: its state is a {what}, must be a dict")
        if table.counts_steps:
            return self.next_step()
        return 1 if self.fresh else 2

    cdef Py_ssize_t next_step(self) except -1:
        """The number of the step to come, from the state."""
        raise NotImplementedError

    cdef bint bind_state(self, Table table, tuple names) except -1:
        """Bring the views of the state up to date; whether an array of it lies elsewhere now."""
        raise NotImplementedError

    cdef void *take_gradient(self, Table table) except? NULL:
        """The elements of the gradient in the memory order of the parameter."""
        raise NotImplementedError

    cdef int commit(self, Table table, optimizer) except -1:
        """After the sweep: write the step count, and give new state its place."""
        raise NotImplementedError

    cdef int list_ranges(self, list ranges) except -1:
        """Append (begin, end, label, index) of all that a step writes."""
        cdef int j
        what = label(self.index, self.param)
        ranges.append((<size_t>self.p.data, <size_t>end_of(&self.p), what, self.index))
        for j in range(STATES):
            if self.names is not None and self.names[j] is not None:
                what_state = f"{what}: state {self.names[j]!r}"
                ranges.append((<size_t>self.s[j].data, <size_t>end_of(&self.s[j]), what_state, self.index))
        return 0


cdef class NumpyRow(Row):
    """A pyopt.Parameter."""
    cdef object data, dtype
    cdef Export export
    cdef list state_exports
    cdef object counted  # the "step" that commit wrote, which need not be checked again
    cdef PyObject *arrays[STATES]  # held by state_exports, kept to be compared
    cdef object copy  # a gradient in the parameter's memory order, where its own is another
    cdef Py_buffer grad_buffer  # let go at the end of the step
    cdef bint holds_grad

    def __cinit__(self):
        self.state_exports = [None] * STATES

    cdef bint bind(self, param, Py_ssize_t index) except -1:
        if param is self.param and param._data is self.data:
            return False
        if not isinstance(param, Parameter):
            raise TypeError(f"'params' of a param group holds a {type(param).__name__}, must be a list of Parameters")
        self.export = Export(param._data)
        take_view(&self.p, &self.export.buffer)
        self.param, self.index = param, index
        self.data = param._data
        self.dtype = self.data.dtype
        self.copy = self.names = None
        for j in range(STATES):
            self.arrays[j] = NULL
        return True

    cdef Py_ssize_t next_step(self) except -1:
        cdef PyObject *step = PyDict_GetItemWithError(self.state, "step")
        if step == NULL:
            raise KeyError(f"{label(self.index, self.param)}: state has no 'step', only {sorted(self.state)}")
        if type(<object>step) is not int or <object>step is not self.counted:
            check_count(f"{label(self.index, self.param)}: state 'step'", <object>step)
        return <Py_ssize_t><object>step + 1

    cdef bint bind_state(self, Table table, tuple names) except -1:
        cdef PyObject *array
        cdef Export export
        cdef bint changed = False
        cdef int j
        self.names = names
        for j in range(STATES):
            if names[j] is None:
                self.s[j].data = NULL
                self.arrays[j] = NULL
                continue
            array = PyDict_GetItemWithError(self.state, names[j])
            if array == NULL or array != self.arrays[j]:
                check_state(label(self.index, self.param), names[j], self.state, self.data)
                self.state_exports[j] = export = Export(<object>array)
                take_view(&self.s[j], &export.buffer)
                self.arrays[j] = array
                changed = True
        return changed

    cdef void *take_gradient(self, Table table) except? NULL:
        cdef View g
        grad, self.grad = self.grad, None
        if type(grad) is not ndarray or grad.dtype is not self.dtype:
            grad = check_gradient(label(self.index, self.param), self.data, grad)
        PyObject_GetBuffer(grad, &self.grad_buffer, PyBUF_STRIDES)
        self.holds_grad = True
        take_view(&g, &self.grad_buffer)
        if not same_shape(&self.p, &g):
            check_gradient(label(self.index, self.param), self.data, grad)
        if (same_order(&self.p, &g) and <size_t>g.data % g.itemsize == 0
                and not table.will_be_written(self, g.data, self.grad_buffer.len)):
            return g.data
        if self.copy is None:
            self.copy = np.empty_like(self.data)
        np.copyto(self.copy, grad)
        return (<Export>Export(self.copy)).buffer.buf  # the array outlives the step

    cdef int commit(self, Table table, optimizer) except -1:
        if table.counts_steps:
            step = table.counts[self.slot]
            self.state["step"] = step
            self.counted = step
        if self.fresh and self.state:
            optimizer.state[self.param] = self.state
        return 0


# --- the table --------------------------------------------------------------------------------------------------------

cdef class Table:
    """The buffers of one optimizer."""

    def __cinit__(self):
        self.rows, self.seen, self.plain, self.names, self.counts = [], [], [], [], []
        self.gradient_factor = 1

    def __reduce__(self):
        return type(self), ()  # a copy begins anew

    def __dealloc__(self):
        PyMem_Free(self.work)
        PyMem_Free(self.numbers)
        PyMem_Free(self.ranges)

    def step(self, optimizer, list grads=None):
        """One step of the optimizer's rule on every parameter that has a gradient: all of it, or an error and nothing.

        grads, where given, stand for the parameters' own, in the order of the groups.
        """
        cdef Row row
        cdef Py_ssize_t k
        if self.busy:
            raise RuntimeError("step() of this optimizer is already running in another thread")
        self.busy = True
        try:
            self.collect(optimizer, grads)
            self.before_sweep(optimizer)
            with nogil:
                sweep(self.work, self.count, self.numbers)
            for k in range(len(self.rows)):
                row = <Row>self.rows[k]
                if row.active:
                    row.commit(self, optimizer)
        finally:
            self.release()
            self.busy = False

    cdef int before_sweep(self, optimizer) except -1:
        """What must come first because it can still fail."""
        return 0

    cdef PyObject *state_of(self, param) except? NULL:
        """The entry of optimizer.state, NULL if there is none; without a hash where they stand in the rows' order."""
        cdef Py_ssize_t next = self.cursor
        cdef PyObject *key
        cdef PyObject *value
        if PyDict_Next(self.states, &next, &key, &value) and key == <PyObject *>param:
            self.cursor = next
            return value
        return PyDict_GetItemWithError(self.states, param)

    cdef Row new_row(self):
        return NumpyRow()

    cdef int collect(self, optimizer, list grads) except -1:
        """Fill the work of this step. Every check stands here: what follows cannot fail."""
        cdef list groups = as_list(optimizer.param_groups), params
        cdef Rule rule = optimizer.rule
        cdef Py_ssize_t g, _i, step, last_step, k = 0
        cdef bint changed
        cdef tuple names
        cdef void *gradient
        cdef Row row
        self.count = self.cost = self.cursor = 0
        self.counts.clear()
        self.counts_steps = optimizer.counts_steps
        self.states = optimizer.state
        if not isinstance(self.states, dict):
            raise TypeError(f"state of the optimizer is a {type(self.states).__name__}, must be a dict")
        changed = self.bind(optimizer, groups)
        self.reserve(len(self.rows))
        for g in range(len(groups)):
            group = groups[g]
            params = as_list(group["params"])
            names = self.names[g]
            self.stateless = not self.counts_steps and names == (None,) * STATES
            last_step = -1
            for _i in range(len(params)):
                row = <Row>self.rows[k]
                row.grad = row.param.grad if grads is None else grads[k]
                k += 1
                row.active = row.grad is not None and names is not None and row.reason is None
                if not row.active:
                    continue
                step = row.find_state(self, optimizer, group)
                changed |= row.bind_state(self, names)
                if not row.active:
                    continue
                if step != last_step:
                    numbers = optimizer.scalars(self.plain[g], step)
                    numbers["gradient_factor"] *= self.gradient_factor
                    rule.pack(numbers, &self.numbers[len(self.counts)])
                    self.counts.append(step)
                    last_step = step
                row.slot = len(self.counts) - 1
        if changed:
            self.measure()
        for k in range(len(self.rows)):
            row = <Row>self.rows[k]
            if row.active:
                gradient = row.take_gradient(self)
                if row.active:
                    self.add(rule, row, gradient)
        return 0

    cdef bint bind(self, optimizer, list groups) except -1:
        """Bring groups and rows up to date with what the user may have changed; whether a parameter lies elsewhere."""
        cdef list params
        cdef Py_ssize_t g, i, k = 0
        cdef bint changed = False
        for g in range(len(groups)):
            group = groups[g]
            if g >= len(self.seen) or not same_values(group, <dict>self.seen[g]):
                optimizer.check_group(group)
                self.seen[g:g + 1] = [dict(group)]
                self.plain[g:g + 1] = [plain(group)]
                self.names[g:g + 1] = [optimizer.state_streams(<dict>self.plain[g])]
            params = as_list(group["params"])
            for i in range(len(params)):
                if k == len(self.rows):
                    self.rows.append(self.new_row())
                changed |= (<Row>self.rows[k]).bind(params[i], k)
                k += 1
        if k != len(self.rows):
            del self.rows[k:]
            changed = True
        if len(self.seen) > len(groups):
            del self.seen[len(groups):], self.plain[len(groups):], self.names[len(groups):]
        return changed

    cdef int reserve(self, Py_ssize_t n) except -1:
        """Make room for n rows."""
        if n > self.capacity:
            self.work = <Work *>grown(self.work, n * sizeof(Work))
            self.numbers = <Numbers *>grown(self.numbers, n * sizeof(Numbers))
            self.ranges = <Range *>grown(self.ranges, n * RANGES * sizeof(Range))
            self.capacity = n
        return 0

    cdef int measure(self) except -1:
        """Note where lies what the step will write."""
        cdef Row row
        cdef Py_ssize_t i
        cdef list ranges = []
        for row in self.rows:
            row.list_ranges(ranges)
        ranges = self.disjoint(ranges)
        self.n_ranges = len(ranges)
        self.version += 1
        for i in range(self.n_ranges):
            self.ranges[i].begin = <char *><size_t>ranges[i][0]
            self.ranges[i].end = <char *><size_t>ranges[i][1]
        return 0

    cdef list disjoint(self, list ranges):
        """The ranges in ascending order, no two in one place."""
        return check_no_overlap(ranges)

    cdef int add(self, Rule rule, Row row, void *gradient) except -1:
        """Add a row to the work of this step."""
        cdef Work *w = &self.work[self.count]
        cdef int j
        w.start = self.cost
        w.size = row.p.size
        w.slot = row.slot
        w.is_double = row.p.itemsize == sizeof(double)
        w.span32 = rule.span32
        w.span64 = rule.span64
        w.stream[0] = row.p.data
        w.stream[1] = gradient
        for j in range(STATES):
            w.stream[2 + j] = row.s[j].data
        self.count += 1
        self.cost += w.size + ROW_COST
        return 0

    cdef bint will_be_written(self, Row row, char *begin, Py_ssize_t length) noexcept:
        """Whether a gradient shares memory with what the step writes: the sweep, without an order, must not read it."""
        cdef Py_ssize_t low = 0, high = self.n_ranges, k
        if row.gap_version == self.version and row.gap.begin <= begin and begin + length <= row.gap.end:
            return False
        while low < high:  # the first range that ends beyond begin
            k = (low + high) // 2
            if self.ranges[k].end > begin:
                high = k
            else:
                low = k + 1
        if low < self.n_ranges and self.ranges[low].begin < begin + length:
            return True
        row.gap_version = self.version
        row.gap.begin = self.ranges[low - 1].end if low > 0 else NULL
        row.gap.end = self.ranges[low].begin if low < self.n_ranges else <char *>~<size_t>0
        return False

    cdef int release(self) except -1:
        """Let the gradients go."""
        cdef NumpyRow row
        for k in range(len(self.rows)):
            row = <NumpyRow>self.rows[k]
            row.grad = None
            if row.holds_grad:
                PyBuffer_Release(&row.grad_buffer)
                row.holds_grad = False
        return 0


cdef list as_list(values):
    return values if type(values) is list else list(values)


cdef bint same_values(group, dict seen) except -1:
    """Whether a group holds the values that were checked; one that may have changed inside counts as another."""
    cdef Py_ssize_t position = 0
    cdef PyObject *key
    cdef PyObject *value
    if not isinstance(group, dict) or len(group) != len(seen):
        return False
    while PyDict_Next(group, &position, &key, &value):
        if PyDict_GetItemWithError(seen, <object>key) != value:
            return False
        if not immutable(<object>value) and <object>key not in ("params", "param_names"):
            return False
    return True


cdef bint immutable(value) noexcept:
    cdef object kind = type(value)
    if kind is tuple:
        for item in <tuple>value:
            if not immutable(item):
                return False
        return True
    return kind is float or kind is int or kind is bool or kind is str or value is None


cdef void *grown(void *block, size_t size) except NULL:
    block = PyMem_Realloc(block, size)
    if block == NULL:
        raise MemoryError(f"no {size} bytes for the table of parameters")
    return block
