# Steps on tensors.
#
# What the kernels cannot step as torch would is left to torch's own step, row by row: other kinds of tensors, and those
# that share memory, whose updates have an order.

from cpython.dict cimport PyDict_GetItemRef, PyDict_SetItem
from cpython.list cimport PyList_SetItem
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.math cimport isfinite
from libc.stdint cimport uint64_t

from pyopt._asked cimport FILL, RAISE, Average
from pyopt._engine cimport AVERAGES, BFLOAT16, PLAIN, STATES, Averaged, Rule, Work
from pyopt._norms cimport Batch, power_sums
from pyopt._plans cimport Plan
from pyopt._rows cimport Rows
from pyopt._step cimport COUNTS, IDLE, KERNEL, LEFT, MOST_STEPS, Row, Workspace, hold
from pyopt._views cimport (
    OF_BFLOAT16, OF_FLOAT16, OF_FLOAT32, OF_FLOAT64, OTHER, View, end_of, go_together, is_dense, is_in_c_order,
    is_of_rows, is_short, same_order, same_shape,
)
from pyopt.torch._flat cimport Flat, flat_state, flats, fold
from pyopt.torch._tensor_views cimport (
    calls_false, is_inference, is_neg, is_plain, parameter_type, reach, tensor_type, view_any, view_tensor,
)

import torch

from pyopt.parameter import overlaps_itself
from pyopt.torch._tensor_views import (
    as_local, describe, distributed_tensor_type, extent, is_ordinary, is_strided,
)

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object, int *) except? -1


cdef object increment_version = torch._C._increment_version  # not its wrapper in Python, which a signal could stop
cdef object is_grad_enabled = torch.is_grad_enabled
cdef object set_grad_enabled = torch._C._set_grad_enabled
cdef object sparse_layout = torch.sparse_coo
cdef object zero_all = torch._foreach_zero_
cdef double INFINITY = float("inf")
cdef bint takes_lists = True
try:
    increment_version([])
except (RuntimeError, TypeError):  # torch 2.4 takes a single tensor
    takes_lists = False


cdef uint64_t mixed(uint64_t digest, const void *pointer) noexcept:
    digest = (digest ^ <uint64_t>pointer) * <uint64_t>0x9E3779B97F4A7C15
    return digest ^ (digest >> 29)


def raise_versions(list tensors):
    """Tell autograd that tensors will be written to."""
    if takes_lists:
        increment_version(tensors)
    else:
        for tensor in tensors:
            increment_version(tensor)


def power_sum(tensor, power, scale):
    """The sum of (|x| * scale)**power over a tensor of any kind, its largest |x| for inf."""
    tensor = tensor.detach()
    if not is_strided(tensor):
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
    if hasattr(tensor, "full_tensor"):  # a DTensor: all processes compute it
        tensor = tensor.full_tensor()
    if tensor.numel() == 0:
        return 0.0
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    tensor = tensor if scale == 1 else tensor.to(dtype) * scale
    norm = float(torch.linalg.vector_norm(tensor, power, dtype=dtype))
    return norm if power == INFINITY else norm ** power


def average_by_torch(average, param, weight):
    """Move an average towards its parameter, in torch's operations."""
    with torch.no_grad():
        param = param.to(average.dtype)
        if weight == 1:
            average.copy_(param)
            return
        way = param - average
        weight = torch.tensor(weight, dtype=average.dtype).item()
        # not lerp_, which rounds once less than the kernels
        average.copy_(average + way.mul_(weight) if weight < 0.5 else param - way.mul_(1 - weight))


def exchange_by_torch(dict kept, average, param):
    """Let an average and its parameter change places; kept holds averages that the parameter's type would round."""
    with torch.no_grad():
        before = kept.pop(param, None)
        if before is None:
            before = param.clone()
            if average.dtype != param.dtype:
                kept[param] = average.clone()
        param.copy_(average)
        average.copy_(before)


cdef bint needs_whole(Rule rule) noexcept:
    """Whether a rule needs more than its own elements of a tensor."""
    return rule.kernel.finish != NULL or rule.kernel.finish_row32 != NULL


cdef bint is_elementwise(Plan plan) except -1:
    """Whether an element is stepped alike wherever it lies: 8 bits, chance and rows count from a tensor's start."""
    if plan.storage is not None and (plan.chance or plan.storage.get("state_dtype") == "8bit"
                                     or plan.storage.get("max_row_norm") is not None):
        return False
    return plan.names is not None and not needs_whole(plan.rule)


class BlockLeft(RuntimeError):
    """Of parameters that are stepped as one, some must be left to torch."""


cdef class TensorWorkspace(Workspace):
    """The steps of one torch optimizer."""
    # Of this step: per row that is left [why, its memory, whether torch has stepped it, and moved its averages].
    cdef dict left
    cdef bint dry  # only to say what would be done
    cdef bint has_int_steps  # the state counts steps in an int, not in a tensor
    # The tensors that are written. A list as long, made anew, has malloc tidy up all gradients freed since.
    cdef list touched
    cdef list layouts  # shapes and strides behind the views that do not come from the exchange API
    cdef bint apart  # flattened parameters are not stepped as one
    cdef object folding  # how parameters that lie in one block are stepped as one; None in a step without

    def __cinit__(self):
        self.touched = []

    def explain(self, optimizer):
        """Per row (group, parameter, why the next step leaves it to torch or None); nothing is changed."""
        cdef Py_ssize_t k
        self.begin(True)
        try:
            self.dry = True
            self.gradient_factor = 1
            self.collect(optimizer, None)
            self.look(optimizer)
            found = []
            for k in range(self.n_rows):
                param = <object>self.rows[k].param
                if self.rows[k].route == IDLE:
                    reason = self.why_not(&self.rows[k], param, optimizer)
                else:
                    reason = self.left[k][0] if self.rows[k].route == LEFT else None
                if self.rows[k].route == LEFT and reason is None:
                    reason = optimizer.reason((<Plan>self.new_plans[self.rows[k].group]).options)
                found.append((self.rows[k].group, param, reason))
            return found
        finally:
            self.dry = False
            self.end()
            self.give_back()

    cdef object why_not(self, Row *row, param, optimizer):
        """Why the parameter by itself would be left to torch."""
        cdef View p
        if (<Plan>self.new_plans[row.group]).names is None:
            return optimizer.reason((<Plan>self.new_plans[row.group]).options)
        if not is_plain(param):
            if type(param) is distributed_tensor_type() and as_local(param) is not None:
                return None
            return f"it is a {type(param).__name__}, not a plain tensor"
        reason = self.unfit(<PyObject *>param, &p) if is_ordinary(param) else self.kind_of(param)
        if reason is not None:
            return reason
        if param.is_neg():
            return "its negative bit is set"
        return "it is an inference tensor" if param.is_inference() else None

    def step_apart(self, *args):
        """`step` of flattened parameters one by one."""
        with self:
            self.apart = True
            try:
                self.step(*args)
            finally:
                self.apart = False

    cdef int leave(self, Row *row, Py_ssize_t index, reason) except -1:
        """Leave a row to torch: note what torch will write and read."""
        if row.n_flat:
            raise BlockLeft(f"a block of flattened parameters cannot be stepped as one: {reason}")
        param = <object>row.param
        memory = []
        self.note_memory(memory, param)
        if (row.entry != NULL or self.take_entry(row)) and isinstance(<object>row.entry, dict):
            for value in list((<object>row.entry).values()):
                self.note_memory(memory, value)
        if self.left is None:
            self.left = {}
        self.left[index] = [reason, memory, False, False]
        row.route = LEFT
        row.careful = True
        row.must_copy = row.has_copy = False
        begin, end = (0, 0) if row.grad == NULL else extent(<object>row.grad)
        row.read.begin = <char *><size_t>begin
        row.read.end = <char *><size_t>end
        self.again = True
        return 0

    cdef bint view(self, PyObject *tensor, View *v) except -1:
        return view_tensor(tensor, v, self.layouts)

    # --- collect ------------------------------------------------------------------------------------------------------

    cdef int collect(self, optimizer, list grads) except -1:
        self.layouts = []
        self.has_int_steps = optimizer.has_int_steps
        self.folding = None
        if (flats or type(optimizer.state) is flat_state) and not self.dry:
            plain = grads is None and not self.bare and not optimizer._averages and self.nonfinite != RAISE
            self.folding = fold(self, optimizer, plain and not self.apart)
        return Workspace.collect(self, optimizer, grads)

    def is_walking(self):
        """Whether a step has taken its rows; to be asked by who holds the lock."""
        return self.walking

    def can_fold(self, optimizer, Py_ssize_t g, group):
        """Whether the rule of a group steps each element by itself."""
        cdef Plan plan = self.plan_of(optimizer, g, group)
        return is_elementwise(plan) and len(optimizer.number_states) == 0

    cdef list units(self, list params, Py_ssize_t g, Plan plan):
        if self.folding is None:
            return params
        given, units = self.folding.groups[g]
        if given is None:
            return params
        if len(given) != len(params) or not is_elementwise(plan):
            raise RuntimeError(f"param group {g} changes while a step looks at it")
        for p, q in zip(given, params):
            if p is not q:
                raise RuntimeError(f"param group {g} changes while a step looks at it")
        return units

    cdef int take(self, Row *row, Py_ssize_t index) except -1:
        hold(&row.data, <object>row.param)
        flat = None if self.folding is None else self.folding.flat_of(<object>row.param)
        if flat is not None:
            row.n_flat = (<Flat>flat).count
        return 0

    cdef int read_view(self, PyObject *tensor, View *v) except -1:
        if type(<object>tensor) not in (tensor_type, parameter_type) or not view_any(tensor, v, self.layouts):
            return OTHER
        return OTHER if <size_t>v.data % v.itemsize else v.element

    cdef int take_gradient(self, Row *row, Py_ssize_t index) except -1:
        param, grad = <object>row.param, <object>row.grad
        if row.route == LEFT:
            return self.leave(row, index, None)
        if not is_plain(param):
            if type(param) is distributed_tensor_type():
                if not row.beside and needs_whole((<Plan>self.new_plans[row.group]).rule):
                    return self.leave(row, index, "it is a DTensor, and its rule needs sums over the whole of it")
                parts = as_local(param, grad)
                if parts is None:
                    return self.leave(row, index, "it is a DTensor, and its gradient is placed otherwise")
                hold(&row.data, parts[0])
                hold(&row.grad, parts[1])
                return 0
            return self.leave(row, index, f"it is a {type(param).__name__}, not a plain tensor")
        if type(grad) is not tensor_type:
            return self.leave(row, index, f"its gradient is a {type(grad).__name__}, not a plain tensor")
        if row.careful or self.needs_rows:
            if not is_ordinary(param):
                return self.leave(row, index, self.kind_of(param))
            if not is_ordinary(grad) and not self.take_rows(row):
                return self.leave(row, index, f"its gradient is a {describe(grad)} tensor")
        return 0

    cdef bint take_rows(self, Row *row) except -1:
        """Take indices and values of a gradient of rows of a table; whether it is one that the kernels can walk."""
        param, grad = <object>row.param, <object>row.grad
        if (row.beside and not self.bare_rows or self.averages or grad.layout is not sparse_layout
                or row.data != row.param or grad.shape != param.shape or grad.sparse_dim() != 1):
            return False
        grad = grad.detach()
        values, indices = grad._values().contiguous(), grad._indices()[0].contiguous()
        if not is_ordinary(values) or values.dtype is not param.dtype or values.is_neg():
            return False
        hold(&row.values, values)
        hold(&row.indices, indices)
        row.keeps_gradient = True
        return True

    cdef int refuse_gradient(self, Row *row, Py_ssize_t index, optimizer) except -1:
        moved = "" if row.values == NULL or not optimizer.core.takes_rows(optimizer, {}) else (
            ", and momentum or weight decay moves other rows too")
        return self.leave(row, index, f"its gradient is a {describe(<object>row.grad)} tensor{moved}")

    cdef int note_memory(self, list memory, tensor) except -1:
        """Append where a tensor of any kind lies."""
        cdef View v
        if type(tensor) in (tensor_type, parameter_type) and tensor.layout is torch.strided:
            if self.view(<PyObject *>tensor, &v):
                memory.append((<size_t>v.data, <size_t>v.data + reach(&v)))
                return 0
        memory.append(extent(tensor))
        return 0

    cdef object unfit(self, PyObject *tensor, View *v):
        """Look at a parameter; why the kernels cannot walk its memory, None where they can."""
        if not self.view(tensor, v):
            return self.kind_of(<object>tensor)
        if <size_t>v.data % v.itemsize:
            return "its memory is not aligned"
        if not is_dense(v):
            param = <object>tensor
            return f"its elements do not lie side by side: shape {tuple(param.shape)}, strides {param.stride()}"
        return None

    cdef object kind_of(self, param):
        return f"it is a {describe(param)} tensor; pyopt steps dense floats on the CPU"

    cdef bint holds(self, PyObject *entry, name) except -1:
        cdef PyObject *value = NULL
        PyDict_GetItemRef(<object>entry, name, &value)
        Py_XDECREF(value)
        return value != NULL and value != <PyObject *>None  # torch.optim.SGD writes None where there was no momentum

    cdef int lacks(self, Row *row, Py_ssize_t index, name) except -1:
        return self.leave(row, index, f"its state has no {name!r}")

    cdef dict make_state(self, Row *row, Py_ssize_t index, Plan plan, optimizer):
        cdef bint recording = set_recording(False)
        try:
            return Workspace.make_state(self, row, index, plan, optimizer)
        finally:
            set_recording(recording)

    cdef int take_arrays(self, Row *row, Py_ssize_t index) except -1:
        """Of a DTensor's state, the local tensors."""
        cdef int j
        if row.data == row.param:
            return 0
        for j in range(STATES):
            if row.state[j] != NULL:
                parts = as_local(<object>row.param, <object>row.state[j])
                if parts is None:
                    return self.leave(row, index, "it is a DTensor, and its state is placed otherwise")
                hold(&row.state[j], parts[1])
        if row.aside[0] != NULL:
            parts = as_local(<object>row.param, <object>row.aside[0])
            if parts is None:
                return self.leave(row, index, "it is a DTensor, and its state is placed otherwise")
            hold(&row.aside[0], parts[1])
        return 0

    cdef Py_ssize_t read_step(self, Row *row, Py_ssize_t index) except -2:
        cdef double count
        cdef int j
        for j in range(self.n_counts):
            if not self.view_count(row, j):
                self.leave(row, index, f"its state {self.count_names[j]!r} is no single float on the CPU")
                return 0
        count = read(row, 0)
        if not (0 <= count <= MOST_STEPS and count == <Py_ssize_t>count):
            self.leave(row, index, f"its state 'step' is {count}")
            return 0
        return <Py_ssize_t>count

    cdef bint view_count(self, Row *row, int j) except -1:
        cdef View c
        cdef int overflow = 0
        if self.has_int_steps and type(<object>row.count[j]) is int:
            PyLong_AsLongLongAndOverflow(<object>row.count[j], &overflow)
            row.count_at[j], row.count_size[j] = NULL, 0
            return overflow == 0
        if (type(<object>row.count[j]) is not tensor_type or not self.view(row.count[j], &c) or is_short(&c)
                or c.size != 1 or <size_t>c.data % c.itemsize):
            return False
        row.count_at[j] = c.data
        row.count_size[j] = c.itemsize
        return True

    cdef tuple read_counts(self, Row *row, Py_ssize_t index):
        cdef int j
        return tuple([read(row, j) for j in range(1, self.n_counts)])

    # --- look ---------------------------------------------------------------------------------------------------------

    cdef bint look_at(self, Row *row, Py_ssize_t index, Work *w) except -1:
        cdef View p, s, g
        cdef int j
        cdef uint64_t digest
        cdef bint in_order, fills, by_row = row.route == KERNEL and row.grad != NULL and self.steps_by_row(row)
        if row.route == IDLE:
            return False
        if row.route == LEFT:
            if not self.left[index][2]:
                for begin, end in self.left[index][1]:
                    self.add_written(index, <char *><size_t>begin, <char *><size_t>end)
            if self.clearing == FILL and row.grad != NULL:
                self.add_gradient(row, index, NULL)
            return False
        reason = None if row.grad != NULL or is_plain(<object>row.data) else "it is no plain tensor"
        reason = reason or self.unfit(row.data, &p)
        if reason is not None:
            self.leave(row, index, reason)
            return False
        digest = mixed(mixed(0, row.data), p.data)
        w.size = p.size
        w.is_double = p.element == OF_FLOAT64
        w.stream[0] = p.data
        if is_short(&p):
            self.note_element(w, 0, &p)
        self.add_written(index, p.data, end_of(&p))
        for j in range(0 if row.beside else self.n_counts):
            if self.unsteady and not self.view_count(row, j):
                self.leave(row, index, f"its state {self.count_names[j]!r} changes")
                return False
            if row.count_size[j] != 0:
                digest = mixed(mixed(digest, row.count[j]), row.count_at[j])
            self.add_written(index, row.count_at[j], row.count_at[j] + row.count_size[j])
        for j in range(STATES):
            w.stream[2 + j] = NULL
            if row.state[j] == NULL or row.aside[1 + j] != NULL:  # the latter are looked at below
                continue
            if (type(<object>row.state[j]) is not tensor_type or not self.view(row.state[j], &s)
                    or not go_together(&p, &s) or <size_t>s.data % s.itemsize
                    or not (is_of_rows(&p, &s) if by_row else same_shape(&p, &s) and same_order(&p, &s))):
                name = (<Plan>self.new_plans[row.group]).names[j]
                self.leave(row, index, f"its state {name!r} is of another dtype, shape or memory order")
                return False
            digest = mixed(mixed(digest, row.state[j]), s.data)
            w.stream[2 + j] = s.data
            if is_short(&s):
                self.note_element(w, 2 + j, &s)
            self.add_written(index, s.data, end_of(&s))
        if not self.bare and (<Plan>self.new_plans[row.group]).storage is not None:
            if not self.note_aside(row, index, w, &p):
                self.leave(row, index, "what its state keeps beside it is of another dtype, shape or memory order")
                return False
            for j in range(1 + STATES):
                if row.aside[j] != NULL:
                    digest = mixed(mixed(digest, row.aside[j]), w.stored.aside[j if j == 0 else 1 + j])
                    if j > 0:
                        digest = mixed(mixed(digest, row.state[j - 1]), w.stream[1 + j])
        if self.averages and not self.look_at_averages(row, index, &p, w, &digest):
            return False
        if not self.look_closer(row, index, digest):
            return False
        w.stream[1] = NULL
        if row.grad == NULL:
            return True
        w.max_row_norm = self.max_row_norm(row)
        if by_row or w.max_row_norm > 0:
            if not is_in_c_order(&p):
                self.leave(row, index, "its rows do not lie one behind the other")
                return False
            self.take_all_rows(row, w, &p)
        if row.values != NULL:
            return self.look_at_values(row, index, &p, w)
        if not self.view(row.grad, &g) or not go_together(&p, &g):
            if (self.bare_rows if row.beside else (<Plan>self.new_plans[row.group]).takes_rows) and self.take_rows(row):
                row.careful = self.again = self.unsteady = True
                return False
            self.leave(row, index, f"its gradient is a {describe(<object>row.grad)} tensor")
            return False
        if not same_shape(&p, &g):
            self.leave(row, index, f"its gradient has shape {tuple((<object>row.grad).shape)}")
            return False
        w.stream[1] = g.data
        if is_short(&g):
            self.note_element(w, 1, &g)
        fills = self.clearing == FILL and self.add_gradient(row, index, &g)
        if not row.has_copy:  # row.read stays where the gradient itself lies
            in_order = same_order(&p, &g)
            row.must_copy = not in_order or <size_t>g.data % g.itemsize != 0 or not calls_false(is_neg, row.grad)
            row.read.begin = g.data
            row.read.end = g.data + (g.size * g.itemsize if in_order else reach(&g))
        if fills:  # it is written too, and as such looked at for what it shares
            row.read.begin = row.read.end = NULL
            w.clears = not row.must_copy and not row.has_copy and not (<object>row.grad).requires_grad
        return True

    cdef bint look_at_values(self, Row *row, Py_ssize_t index, const View *p, Work *w) except -1:
        """Look at a gradient of rows, and at which rows of the table p it has; whether there is work."""
        cdef View g
        cdef bint ascending
        cdef Py_ssize_t wrong, n
        indices = <object>row.indices
        if self.has_codes(w):
            self.leave(row, index, "its gradient is sparse, and its state in 8 bits")
            return False
        if not is_in_c_order(p) or not self.view(row.values, &g) or g.element != p.element:
            self.leave(row, index, "its rows do not lie one behind the other")
            return False
        n = indices.numel()
        if g.size * p.shape[0] != n * p.size or <size_t>g.data % g.itemsize:
            self.leave(row, index, "its sparse gradient has values of another shape")
            return False
        wrong = self.look_at_rows(row, w, p, <const void *><size_t>indices.data_ptr(), 8, n, &ascending)
        if wrong >= 0:
            what = self.label_of(index)
            raise IndexError(f"{what}: gradient: indices[{wrong}] == {indices[wrong].item()}, must be 0 to "
                             f"{p.shape[0] - 1}")
        w.stream[1] = g.data
        if is_short(&g):
            self.note_element(w, 1, &g)
        row.read.begin, row.read.end = g.data, end_of(&g)
        return True

    cdef bint add_gradient(self, Row *row, Py_ssize_t index, const View *g) except -1:
        """Note that a gradient will be filled with zeros, where torch would too; whether it will. g: of one in view."""
        if row.keeps_gradient:
            return False
        if not row.has_copy:
            grad = <object>row.grad
            if g != NULL and is_dense(g):
                row.filled.begin, row.filled.end = g.data, end_of(g)
            else:
                begin, end = extent(grad)
                row.filled.begin, row.filled.end = <char *><size_t>begin, <char *><size_t>end
                row.keeps_gradient = not is_strided(grad) or overlaps_itself(grad.shape, grad.stride())
            if row.keeps_gradient or not calls_false(is_inference, row.grad):
                row.keeps_gradient = True
                return False
        self.add_written(index, row.filled.begin, row.filled.end, True)
        return True

    cdef bint look_at_averages(self, Row *row, Py_ssize_t index, const View *p, Work *w, uint64_t *digest) except -1:
        """Look at the averages of a parameter and note that they are written."""
        cdef Averaged *at = self.averages_of(self.n_work)
        cdef Py_ssize_t j, n = len(self.averages)
        cdef PyObject *tensor
        cdef View a
        w.averaged = at
        for j in range(n):
            average, weight = self.averaged[index * n + j]
            tensor = <PyObject *>average
            if row.data != row.param and type(<object>tensor) is not tensor_type:
                parts = as_local(<object>row.param, <object>tensor)
                if parts is None:
                    self.leave(row, index, "it is a DTensor, and its average is placed otherwise")
                    return False
                self.averaged[index * n + j] = parts[1], weight
                tensor = <PyObject *>parts[1]
            if (type(<object>tensor) is not tensor_type or not self.view(tensor, &a)
                    or a.element != (OF_FLOAT64 if p.element == OF_FLOAT64 else OF_FLOAT32)
                    or not same_shape(p, &a) or not same_order(p, &a) or <size_t>a.data % a.itemsize):
                self.leave(row, index, "its average is of another dtype, shape or memory order")
                return False
            digest[0] = mixed(mixed(digest[0], tensor), a.data)
            at[j].data, at[j].weight, at[j].kept = a.data, weight, self.kept_of(row, p)
            self.add_written(index, a.data, end_of(&a))
        return True

    cdef object first_average(self, Row *row, Py_ssize_t index):
        cdef bint recording = set_recording(False)
        param = <object>row.param
        try:
            average = torch.empty_like(param, dtype=torch.promote_types(param.dtype, torch.float32),
                                       memory_format=torch.preserve_format, requires_grad=False)
            return average.copy_(param)
        finally:
            set_recording(recording)

    cdef object copy_of(self, average):
        cdef bint recording = set_recording(False)
        try:
            return (average._local_tensor if hasattr(average, "_local_tensor") else average).clone()
        finally:
            set_recording(recording)

    def copied(self, what, like, values):
        """A copy of an average that was saved, for the place of `like`."""
        cdef bint recording = set_recording(False)
        try:
            try:
                values = torch.as_tensor(values)
            except (RuntimeError, TypeError, ValueError):
                raise TypeError(f"{what}: average is a {type(values).__name__}, must be a tensor") from None
            if values.shape != like.shape or values.dtype != like.dtype:
                raise ValueError(f"{what}: average is {values.dtype} of shape {tuple(values.shape)}, must be "
                                 f"{like.dtype} of shape {tuple(like.shape)}")
            return torch.empty_like(like, memory_format=torch.preserve_format).copy_(values)
        finally:
            set_recording(recording)

    def gradient_sums(self, double power, double scale):
        """For flattened parameters one sum each, so that a norm has the same bits."""
        cdef Batch batch
        cdef Flat flat
        cdef Work *w
        cdef Py_ssize_t i, k, n = 0
        cdef list found = []  # None for what the batch sums
        if self.folding is None:
            return Workspace.gradient_sums(self, power, scale)
        batch = Batch()
        for k in range(self.n_rows):
            if self.rows[k].work < 0:
                if self.rows[k].grad != NULL:
                    found.append(self.left_sum(&self.rows[k], power, scale))
                continue
            w = &self.work[self.rows[k].work]
            if w.touched != NULL:
                found.append(power_sums(w, 1, power, scale)[0])
                continue
            if self.rows[k].n_flat:
                flat = self.folding.flat_of(<object>self.rows[k].param)
                for i in range(flat.count):
                    batch.add(<char *>w.stream[1] + flat.starts[i] * flat.itemsize, flat.starts[i + 1] - flat.starts[i],
                              element_of_gradient(w), None)
            else:
                batch.add(<char *>w.stream[1], w.size, element_of_gradient(w), None)
            found += [None] * (batch.count - n)
            n = batch.count
        sums = iter(batch.sums(power, scale))
        return [next(sums) if x is None else x for x in found]

    cdef double left_sum(self, Row *row, double power, double scale) except? -1:
        return power_sum(<object>row.grad, power, scale)

    cdef bint has_finite_gradient(self, Row *row) except -1:
        return isfinite(<double>power_sum(<object>row.grad, INFINITY, 1))

    cdef int fill(self, list grads) except -1:
        for grad in grads:
            if grad.requires_grad:
                grad.detach_() if grad.grad_fn is not None else grad.requires_grad_(False)
        if grads:
            zero_all(grads)
        return 0

    cdef bint look_closer(self, Row *row, Py_ssize_t index, uint64_t digest) except -1:
        """Whether the memory holds the numbers themselves, not their negatives, and may be written to by us."""
        cdef PyObject *each[1 + COUNTS + STATES + 1 + STATES + AVERAGES]
        cdef int n = 1, j
        each[0] = row.data
        for j in range(0 if row.beside else self.n_counts):
            if row.count_size[j] != 0:
                each[n] = row.count[j]
                n += 1
        for j in range(STATES):
            if row.state[j] != NULL:
                each[n] = row.state[j]
                n += 1
        for j in range(1 + STATES):
            if row.aside[j] != NULL:
                each[n] = row.aside[j]
                n += 1
        for j in range(len(self.averages)):
            each[n] = <PyObject *>self.averaged[index * len(self.averages) + j][0]
            n += 1
        for j in range(n):
            what = "it" if j == 0 else "its state"
            if not calls_false(is_neg, each[j]):
                self.leave(row, index, "its negative bit is set" if j == 0 else "its state has its negative bit set")
                return False
            if digest != row.passed and not calls_false(is_inference, each[j]):
                self.leave(row, index, f"{what} is an inference tensor")
                return False
        row.passed = digest
        return True

    cdef bint overlap(self, Py_ssize_t first, Py_ssize_t second) except -1:
        self.leave_sharing(first, "it shares memory with another parameter")
        self.leave_sharing(second, "it shares memory with another parameter")
        return True

    cdef int tangle(self, Py_ssize_t reader, Py_ssize_t writer) except -1:
        self.leave_sharing(reader, "a gradient shares memory with what the step writes")
        self.leave_sharing(writer, "a gradient shares memory with what the step writes")
        return 0

    cdef int leave_sharing(self, Py_ssize_t index, reason) except -1:
        """The order of the updates matters: torch goes one by one."""
        if self.rows[index].route == KERNEL:
            self.leave(&self.rows[index], index, reason)
            self.rows[index].careful = False  # the tensor by itself is an ordinary one
        return 0

    cdef bint settle(self, optimizer) except -1:
        """Copy gradients into the memory order of their parameters; then have torch do what is left to it."""
        cdef Py_ssize_t k
        if self.again:
            self.unsteady = True
            return False
        for k in range(self.n_rows):
            if self.rows[k].route == KERNEL and self.rows[k].must_copy:
                self.copy_gradient(&self.rows[k], k)
                self.unsteady = self.again = True
        if self.left and self.shared_numbers:  # what all are summed for has no part by the kernels
            for k in range(self.n_rows):
                if not self.rows[k].beside:
                    self.leave_sharing(k, "its step follows from sums over all parameters, of which one is left to "
                                          "torch")
        if self.again or self.dry or not self.left:
            return False
        if self.needs_norm and not self.norm_known:
            self.take_norm()
        if self.skips:
            return False
        remaining = [k for k, found in sorted(self.left.items()) if not found[2]]
        if not remaining:
            return False
        self.unsteady = True
        for k in remaining:
            self.left[k][2] = True
            self.rows[k].read.begin = self.rows[k].read.end = NULL
        stepped = [(self.rows[k].group, <object>self.rows[k].param) for k in remaining if not self.rows[k].beside]
        if stepped:
            optimizer.step_by_torch(stepped, self.gradient_factor * self.clip)
        if self.exchanging or not self.bare:  # else the step is still to come
            self.average_left()
        return True

    cdef int average_left(self) except -1:
        cdef list unmoved = [k for k, found in sorted((self.left or {}).items()) if found[2] and not found[3]]
        for k in unmoved if self.averages else []:
            self.left[k][3] = True
            for each in self.averaged[k * len(self.averages):(k + 1) * len(self.averages)]:
                if self.exchanging:
                    exchange_by_torch((<Average>self.averages[0]).aside, each[0], <object>self.rows[k].param)
                else:
                    average_by_torch(each[0], <object>self.rows[k].param, each[1])
        return 0

    cdef int copy_gradient(self, Row *row, Py_ssize_t k) except -1:
        data = <object>row.data
        copy = self.last_copy(k)
        cdef bint recording = set_recording(False)
        guard = torch._C._InferenceMode(False)
        try:
            grad = <object>row.grad
            if (copy is None or copy.shape != data.shape or copy.stride() != data.stride()
                    or copy.dtype != grad.dtype):
                copy = torch.empty_like(data, memory_format=torch.preserve_format, dtype=grad.dtype)
            copy.copy_(grad)
        finally:
            guard = None
            set_recording(recording)
        return self.use_copy(row, k, copy)

    # --- arm and commit -----------------------------------------------------------------------------------------------

    cdef int announce(self) except -1:
        """Tell autograd, so that a stale graph raises, as with torch: versions of parameters and state."""
        cdef Py_ssize_t k, n = 0
        cdef int j
        cdef Row *row
        for k in range(self.n_rows):
            row = &self.rows[k]
            if row.route != KERNEL:
                continue
            if not row.beside or self.exchanging:
                n = self.touch(n, row.param)
                if row.data != row.param:
                    n = self.touch(n, row.data)
            for j in range(0 if row.beside else self.n_counts):
                if row.count_size[j] != 0:
                    n = self.touch(n, row.count[j])
            for j in range(STATES):
                if row.state[j] != NULL:
                    n = self.touch(n, row.state[j])
            if row.n_flat:
                for param in (<Flat>self.folding.flat_of(<object>row.param)).parameters():
                    n = self.touch(n, <PyObject *>param)
            for j in range(1 + STATES):
                if row.aside[j] != NULL:
                    n = self.touch(n, row.aside[j])
        for average, _ in self.averaged:
            n = self.touch(n, <PyObject *>average)
        for k in range(self.n_work):
            if self.work[k].clears:
                n = self.touch(n, self.rows[self.work[k].row].grad)
        del self.touched[n:]
        raise_versions(self.touched)
        return 0

    cdef Py_ssize_t touch(self, Py_ssize_t n, PyObject *tensor) except -1:
        if n == len(self.touched):
            self.touched.append(<object>tensor)
        else:
            Py_INCREF(<object>tensor)
            PyList_SetItem(self.touched, n, <object>tensor)  # takes the reference
        return n + 1

    cdef int make_counts(self, Row *row) except -1:
        cdef int j
        for j in range(self.n_counts):
            if row.count_size[j] == 0:
                PyDict_SetItem(<object>row.made, self.count_names[j], (<tuple>self.new_counts[row.slot])[j])
        return 0

    cdef int store_counts(self, Row *row) noexcept:
        cdef int j
        cdef double value
        for j in range(self.n_counts):
            if row.count_size[j] == 0:
                if row.made == NULL:
                    PyDict_SetItem(<object>row.entry, self.count_names[j], (<tuple>self.new_counts[row.slot])[j])
                continue
            value = (<tuple>self.new_counts[row.slot])[j]
            if row.count_size[j] == 8:
                (<double *>row.count_at[j])[0] = value
            else:
                (<float *>row.count_at[j])[0] = <float>value
        return 0

    cdef int end(self) noexcept:
        cdef Py_ssize_t k
        for k in range(len(self.touched)):
            Py_INCREF(None)
            PyList_SetItem(self.touched, k, None)
        self.left = self.layouts = self.folding = None
        self.unsteady = False
        return Workspace.end(self)


cdef bint set_recording(bint record) except -1:
    """What torch.no_grad() does, with no line in Python that a signal could stop; returns what was set before."""
    before = is_grad_enabled()
    set_grad_enabled(record)
    return before


def unrecorded(function, *args):
    """What a function returns under torch.no_grad(), which an exception at any moment ends."""
    cdef bint recording = set_recording(False)
    try:
        return function(*args)
    finally:
        set_recording(recording)


cdef double read(Row *row, int j) noexcept:
    if row.count_size[j] == 0:
        return <double>PyLong_AsLongLongAndOverflow(<object>row.count[j], &row.count_size[j])  # which was looked at
    return (<double *>row.count_at[j])[0] if row.count_size[j] == 8 else (<float *>row.count_at[j])[0]


cdef class TensorBatch(Batch):
    """Gradients that are gone over at once: those of `places`; the others are torch's to do.

    copied: those whose numbers were copied, into the memory order of their parameters or side by side.
    rows: of each sparse one of rows its place, which rows it has, and its values.
    """
    cdef readonly list places, copied, rows

    def __init__(self, list grads, list params):
        """params: the parameters, in whose memory order sums are taken, or None."""
        cdef View g, p
        cdef PyObject *tensor
        cdef Py_ssize_t k
        cdef list layouts = []
        self.places, self.copied, self.rows = [], [], []
        for k in range(len(grads)):
            tensor = <PyObject *>grads[k]
            if not is_plain(grads[k]):
                continue
            if grads[k].layout is sparse_layout:
                self.add_rows(k, grads[k], layouts)
                continue
            if not view_tensor(tensor, &g, layouts):
                continue
            p = g
            if params[k] is not None and not (is_plain(params[k]) and view_tensor(<PyObject *>params[k], &p, layouts)
                                              and same_shape(&p, &g)):
                continue
            held = grads[k]
            if (not same_order(&p, &g) or not is_dense(&g) or <size_t>g.data % g.itemsize
                    or not calls_false(is_neg, tensor)):
                like = held if params[k] is None else params[k]
                held = torch.empty_like(like, memory_format=torch.preserve_format, dtype=held.dtype,
                                        requires_grad=False).copy_(held.detach())
                self.copied.append(grads[k])
                view_tensor(<PyObject *>held, &g, layouts)
            self.add(g.data, g.size, g.element, held)
            self.places.append(k)

    cdef int add_rows(self, Py_ssize_t k, grad, list layouts) except -1:
        """Add a gradient of rows of a table; one of another kind is left."""
        cdef View g
        cdef Rows rows = Rows()
        cdef bint ascending
        cdef Py_ssize_t n, wrong
        if grad.sparse_dim() != 1 or grad.device.type != "cpu":
            return 0
        indices, values = grad.detach()._indices()[0].contiguous(), grad.detach()._values()
        if not view_tensor(<PyObject *>values, &g, layouts) or is_short(&g):
            return 0
        n = indices.numel()
        if not is_in_c_order(&g) or <size_t>g.data % g.itemsize or not calls_false(is_neg, <PyObject *>values):
            values = torch.empty_like(values, memory_format=torch.contiguous_format).copy_(values)
            self.copied.append(grad)
            view_tensor(<PyObject *>values, &g, layouts)
        wrong = rows.sort(<const void *><size_t>indices.data_ptr(), 8, n, grad.shape[0], g.size // n if n else 0,
                          &ascending)
        if wrong >= 0:
            raise IndexError(f"gradient {k}: indices[{wrong}] == {indices[wrong].item()}, must be 0 to "
                             f"{grad.shape[0] - 1}")
        self.add(g.data, g.size, g.element, grad, rows)  # which owns the values, where they were not copied
        self.rows.append((k, rows, values))
        self.places.append(k)
        return 0

    def apply(self, Rule rule, dict scalars):
        raise_versions([held[0] if isinstance(held, tuple) else held for held in self.held])
        Batch.apply(self, rule, scalars)


cdef int element_of_gradient(const Work *w) noexcept:
    """The type of its elements (_views.pxd)."""
    if w.stored == NULL or w.stored.codec[1] == PLAIN:
        return OF_FLOAT64 if w.is_double else OF_FLOAT32
    return OF_BFLOAT16 if w.stored.codec[1] == BFLOAT16 else OF_FLOAT16
