# Tensors as rows of the table.
#
# A tensor can change under the same object (p.data = x, p.set_()), so every one is looked at in every step: through the
# DLPack C exchange API (torch >= 2.10), which takes nanoseconds, or data_ptr() and its kin. A row says in `reason` why
# it must be left to torch; nothing that is looked at is kept beyond the step.

from cpython.bytes cimport PyBytes_AsString
from cpython.dict cimport PyDict_GetItemWithError
from cpython.exc cimport PyErr_Clear
from cpython.object cimport PyObject, PyObject_CallFunctionObjArgs
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyopt._engine cimport STATES
from pyopt._table cimport Row, Table, View, end_of, same_order, same_shape
from pyopt.parameter import label

from struct import pack

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter


# The part of DLPack (https://dmlc.github.io/dlpack) that is used; its ABI is stable within a major version.
cdef struct DLTensor:
    void *data
    int32_t device_type
    int32_t device_id
    int32_t ndim
    uint8_t type_code
    uint8_t type_bits
    uint16_t type_lanes
    int64_t *shape
    int64_t *strides
    uint64_t byte_offset


cdef struct DLPackExchangeAPI:
    uint32_t major
    uint32_t minor
    void *previous
    void *managed_tensor_allocator
    void *managed_tensor_from_py_object_no_sync
    void *managed_tensor_to_py_object_no_sync
    int (*dltensor_from_py_object_no_sync)(void *, DLTensor *) noexcept
    void *current_work_stream


def increment_one_by_one(tensors):
    for tensor in tensors:
        increment_version(tensor)


cdef object increment_versions = increment_version
try:
    increment_version([])
except RuntimeError:  # torch 2.4 takes a single tensor
    increment_versions = increment_one_by_one


cdef object tensor_type = Tensor
cdef object parameter_type = Parameter
cdef object is_neg = Tensor.is_neg


cdef bint not_negated(tensor) except -1:
    """Whether the memory holds the numbers, not their negatives as in x.conj().imag."""
    return PyObject_CallFunctionObjArgs(is_neg, <PyObject *>tensor, NULL) is False


cdef enum:
    CPU = 1  # kDLCPU
    FLOAT = 2  # kDLFloat

cdef double MOST_STEPS = 2.0 ** 53  # beyond, a double does not count


cdef DLPackExchangeAPI *exchange = NULL


def use_exchange_api(bint use):
    """Look at tensors through torch's DLPack exchange API, or through data_ptr(); returns whether the API is used."""
    global exchange
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None) if use else None
    exchange = NULL
    if capsule is not None:
        exchange = <DLPackExchangeAPI *>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
        if exchange.major != 1 or exchange.dltensor_from_py_object_no_sync == NULL:
            exchange = NULL
    return exchange != NULL


use_exchange_api(True)


cdef bint is_dense(const View *v) noexcept:
    """Whether the elements lie side by side, in any order of the axes."""
    cdef int64_t expected = 1
    cdef int i, _i, j
    for i in range(v.ndim - 1, -1, -1):
        if v.shape[i] != 1 and v.strides[i] != expected:
            break
        expected *= v.shape[i]
    else:
        return True
    if v.size == 0:
        return True
    # Each axis must continue where those of smaller strides end.
    expected = 1
    for _i in range(v.ndim):
        for j in range(v.ndim):
            if v.shape[j] > 1 and v.strides[j] == expected:
                expected *= v.shape[j]
                break
        else:
            break
    return expected == v.size


cdef class TensorRow(Row):
    """A parameter tensor."""
    cdef list layouts  # shapes and strides behind the views, where they do not come from the exchange API
    cdef char *begin[2 + STATES]  # where parameter, step count and state lay at the last step, by place
    cdef char *end[2 + STATES]
    cdef View step
    cdef bint covered  # whether the parameter is of the kind that the kernels step
    cdef object copy  # a gradient in the parameter's memory order, where its own is another
    cdef bint shared  # with another parameter's or state's memory

    def __cinit__(self):
        self.layouts = [None] * (3 + STATES)

    cdef bint look(self, tensor, View *view, int place) except -1:
        """Fill a view; whether it is a CPU tensor of float32 or float64."""
        cdef DLTensor t
        cdef int axis
        if exchange != NULL:
            if exchange.dltensor_from_py_object_no_sync(<void *>tensor, &t):
                PyErr_Clear()  # sparse, meta and other tensors without memory
                return False
            if t.device_type != CPU or t.type_code != FLOAT or t.type_lanes != 1 or t.type_bits not in (32, 64):
                return False
            view.data = <char *>t.data + t.byte_offset
            view.shape, view.strides, view.ndim = t.shape, t.strides, t.ndim
            view.itemsize = t.type_bits // 8
        else:
            if tensor.layout is not torch.strided or tensor.device.type != "cpu":
                return False
            if tensor.dtype is not torch.float32 and tensor.dtype is not torch.float64:
                return False
            view.ndim = tensor.dim()
            layout = pack(f"{2 * view.ndim}q", *tensor.size(), *tensor.stride())
            self.layouts[place] = layout
            view.data = <char *><size_t>tensor.data_ptr()
            view.shape = <const int64_t *>PyBytes_AsString(layout)
            view.strides = view.shape + view.ndim
            view.itemsize = tensor.element_size()
        view.size = 1
        for axis in range(view.ndim):
            view.size *= view.shape[axis]
        return view.data != NULL or view.size == 0  # gradients that are known to be zero have no memory

    cdef bint moved(self, int place, const View *view) noexcept:
        """Whether what a step writes lies elsewhere than at the last step."""
        return self.lies(place, view.data, end_of(view))

    cdef bint lies(self, int place, char *begin, char *end) noexcept:
        cdef bint moved = begin != self.begin[place] or end != self.end[place]
        self.begin[place] = begin
        self.end[place] = end
        return moved

    cdef bint bind(self, param, Py_ssize_t index) except -1:
        cdef bint moved
        if param is not self.param:
            self.param, self.index, self.copy = param, index, None
            self.shared = False
        self.reason = self.names = None
        self.covered = False
        if type(param) is not parameter_type and type(param) is not tensor_type:
            self.reason = f"it is a {type(param).__name__}, not a plain tensor"
        elif not self.look(param, &self.p, 0):
            self.reason = f"it is a {describe(param)} tensor; pyopt steps dense float32 and float64 on the CPU"
        elif not is_dense(&self.p):
            self.reason = f"its elements do not lie side by side: shape {tuple(param.shape)}, strides {param.stride()}"
        if self.reason is not None:
            begin, end = extent(param)
            return self.lies(0, <char *><size_t>begin, <char *><size_t>end)
        self.covered = True
        moved = self.moved(0, &self.p)
        if not not_negated(param) or moved and param.is_inference():
            self.reason = "it is an inference tensor" if param.is_inference() else "its negative bit is set"
            self.end[0] = NULL
        elif self.shared:
            self.reason = "it shares memory with another parameter"
        return moved

    cdef int leave(self, str reason) except -1:
        """Leave this step to torch."""
        self.reason = reason
        self.active = False
        self.names = None
        return 0

    cdef Py_ssize_t next_step(self) except -1:
        cdef PyObject *step = PyDict_GetItemWithError(self.state, "step")
        if step == NULL or type(<object>step) is not tensor_type or not self.look(<object>step, &self.step, 1):
            self.leave("its state 'step' is no float tensor on the CPU")
            return 1
        if self.step.size != 1:
            self.leave("its state 'step' has more than one element")
            return 1
        cdef double count = self.count()
        if not (0 <= count < MOST_STEPS and count == <Py_ssize_t>count):
            self.leave(f"its state 'step' is {count}")
            return 1
        return <Py_ssize_t>count + 1

    cdef double count(self) noexcept:
        return (<double *>self.step.data)[0] if self.step.itemsize == 8 else (<float *>self.step.data)[0]

    cdef bint bind_state(self, Table table, tuple names) except -1:
        cdef PyObject *array
        cdef bint moved = False
        cdef int j
        if not self.active:
            return False
        self.names = names
        if table.counts_steps:
            moved = self.follow(1, "step", &self.step)
        for j in range(STATES):
            self.s[j].data = NULL
            if names[j] is None:
                continue
            array = PyDict_GetItemWithError(self.state, names[j])
            if (array == NULL or type(<object>array) is not tensor_type
                    or not self.look(<object>array, &self.s[j], 2 + j) or self.s[j].itemsize != self.p.itemsize
                    or not same_shape(&self.p, &self.s[j]) or not same_order(&self.p, &self.s[j])):
                self.leave(f"its state {names[j]!r} is of another dtype, shape or memory order")
                return True
            moved |= self.follow(2 + j, names[j], &self.s[j])
            if not self.active:
                return True
        return moved

    cdef bint follow(self, int place, name, const View *view) except -1:
        """Note where a state tensor lies; whether that is elsewhere now, where its negative bit may be set."""
        if not self.moved(place, view):
            return False
        if not not_negated(self.state[name]):
            self.end[place] = NULL
            self.leave(f"its state {name!r} has its negative bit set")
        return True

    cdef void *take_gradient(self, Table table) except? NULL:
        cdef View g
        cdef bint in_order
        grad = self.grad  # held until the end of the step, whatever becomes of param.grad meanwhile
        if type(grad) is not tensor_type:
            self.leave(f"its gradient is a {type(grad).__name__}, not a plain tensor")
            return NULL
        if not self.look(grad, &g, 2 + STATES) or g.itemsize != self.p.itemsize:
            self.leave(f"its gradient is a {describe(grad)} tensor")
            return NULL
        if not same_shape(&self.p, &g):
            self.leave(f"its gradient has shape {tuple(grad.shape)}")
            return NULL
        in_order = same_order(&self.p, &g)
        if table.will_be_written(self, g.data, g.size * g.itemsize if in_order else reach(&g)):
            (<TensorTable>table).tangled = True
            return g.data
        if in_order and <size_t>g.data % g.itemsize == 0 and not_negated(grad):
            return g.data
        with torch.inference_mode(False), torch.no_grad():
            if self.copy is None or self.copy.stride() != self.param.stride() or self.copy.dtype != self.param.dtype:
                self.copy = torch.empty_like(self.param)
            self.copy.copy_(grad)
        return <void *><size_t>self.copy.data_ptr()

    cdef int commit(self, Table table, optimizer) except -1:
        if table.counts_steps:
            if self.step.itemsize == 8:
                (<double *>self.step.data)[0] += 1
            else:
                (<float *>self.step.data)[0] += 1
        if self.fresh and self.state:
            optimizer.state[self.param].update(self.state)
        return 0

    cdef int list_ranges(self, list ranges) except -1:
        """Where the row is torch's, its parameter all the same: a covered one may share its memory."""
        what = label(self.index, self.param)
        if self.covered:
            Row.list_ranges(self, ranges)
            if self.names is not None and self.step.data != NULL:
                ranges.append((<size_t>self.begin[1], <size_t>self.end[1], f"{what}: state 'step'", self.index))
        else:
            ranges.append((<size_t>self.begin[0], <size_t>self.end[0], what, self.index))
        return 0


cdef Py_ssize_t reach(const View *v) noexcept:
    """Bytes from the first element of a tensor to the end of its last; torch has no negative strides."""
    cdef Py_ssize_t last = 0
    cdef int axis
    if v.size == 0:
        return 0
    for axis in range(v.ndim):
        last += (v.shape[axis] - 1) * v.strides[axis]
    return (last + 1) * v.itemsize


def extent(tensor):
    """Begin and end of the memory of a tensor of any kind, (0, 0) where it has none of its own."""
    try:
        if tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.numel() and tensor.data_ptr():
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
            return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
    except (RuntimeError, ValueError):  # wrappers, uninitialized parameters
        pass
    return 0, 0


def describe(tensor):
    """dtype, layout and device, as far as they are not the usual ones."""
    words = [str(tensor.dtype).removeprefix("torch.")]
    if tensor.layout is not torch.strided:
        words.append(str(tensor.layout).removeprefix("torch.").replace("_", " "))
    if tensor.device.type != "cpu":
        words.append(tensor.device.type)
    return " ".join(words)


cdef class TensorTable(Table):
    """The tensors of one torch optimizer."""
    # The parameters of the last step: a list as long, made anew, has malloc tidy up all gradients freed since.
    cdef list written
    cdef bint tangled  # whether a gradient lies where the step will write

    def __cinit__(self):
        self.written = []

    cdef Row new_row(self):
        return TensorRow()

    cdef PyObject *state_of(self, param) except? NULL:
        cdef PyObject *found = Table.state_of(self, param)
        if found != NULL and not self.counts_steps:  # torch.optim.SGD writes None where there was no momentum
            if all(value is None for value in (<dict><object>found).values()):
                return NULL
        return found

    def step(self, optimizer, list grads=None, double factor=1):
        """One step, gradients multiplied by factor: torch's on what pyopt does not cover, then pyopt's."""
        self.gradient_factor = factor
        Table.step(self, optimizer)
        self.mark_written()

    cdef int mark_written(self) except -1:
        """Tell autograd, so that a stale graph raises, as with torch."""
        cdef Py_ssize_t n = 0
        cdef Row row
        for row in self.rows:
            if row.active:
                if n == len(self.written):
                    self.written.append(row.param)
                elif self.written[n] is not row.param:
                    self.written[n] = row.param
                n += 1
        del self.written[n:]
        increment_versions(self.written)
        return 0

    cdef int before_sweep(self, optimizer) except -1:
        cdef Row row
        if self.tangled:  # the order of the updates matters: torch goes one by one
            self.tangled = False
            self.count = 0
            for row in self.rows:
                if row.active:
                    (<TensorRow>row).leave("a gradient shares memory with what the step writes")
        if self.leaves():
            left = [(g, p) for g, p, reason in self.paths(optimizer) if reason is not None and p.grad is not None]
            if left:
                optimizer.step_by_torch(left, self.gradient_factor)
        return 0

    cdef bint leaves(self) except -1:
        cdef Row row
        if None in self.names:
            return True
        for row in self.rows:
            if row.reason is not None:
                return True
        return False

    def paths(self, optimizer):
        """As the last collect found them: per row (group, parameter, why it is left to torch or None)."""
        cdef Py_ssize_t k = 0, g
        cdef Row row
        found = []
        for g, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                row = self.rows[k]
                k += 1
                found.append((g, param, row.reason if self.names[g] is not None else optimizer.reason(group)))
        return found

    def look(self, optimizer):
        """The paths of the next step; nothing is changed."""
        try:
            self.collect(optimizer, None)
        finally:
            self.release()
        return self.paths(optimizer)

    cdef list disjoint(self, list ranges):
        """The ranges in ascending order; parameters that share memory are left to torch, which goes one by one."""
        cdef Row row
        for row in self.rows:
            (<TensorRow>row).shared = False
        ordered = sorted(r for r in ranges if r[0] < r[1])
        last = None
        for each in ordered:
            if last is not None and each[0] < last[1]:
                for k in (last[3], each[3]):
                    row = self.rows[k]
                    (<TensorRow>row).shared = True
                    if row.reason is None:
                        (<TensorRow>row).leave("it shares memory with another parameter")
            if last is None or each[1] > last[1]:
                last = each
        return ordered

    cdef int release(self) except -1:
        for k in range(len(self.rows)):
            (<Row>self.rows[k]).grad = (<Row>self.rows[k]).state = None
        self.states = None
        return 0
