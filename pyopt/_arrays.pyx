# Steps on NumPy arrays. What a step needs to know of an array is read from its own fields, in every step: whatever was
# set in place since, shape, strides, dtype, flags or memory, is followed or refused.

from cpython.dict cimport PyDict_Clear, PyDict_GetItemWithError, PyDict_Next, PyDict_SetItem, PyDict_Update
from cpython.object cimport PyObject
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from pyopt._engine cimport STATES, Work
from pyopt._numpy_arrays cimport (
    NPY_ARRAY_ALIGNED, NPY_ARRAY_WRITEABLE, NPY_DOUBLE, NPY_FLOAT, PyArray_DATA, PyArray_DIMS, PyArray_FLAGS,
    PyArray_ISNOTSWAPPED, PyArray_NDIM, PyArray_STRIDES, PyArray_TYPE, PyArrayObject,
)
from pyopt._step cimport IDLE, MOST_STEPS, Plan, Row, View, Workspace, end_of, hold, is_dense, same_order, same_shape

from copy import deepcopy

import numpy as np
from numpy import ndarray
from numpy.ma import MaskedArray

from pyopt.checks import count as check_count
from pyopt.parameter import Parameter, check_data, check_gradient, check_no_overlap, check_state, label

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object, int *) except? -1

cdef object array_type = ndarray
cdef object masked_type = MaskedArray
cdef object parameter_type = Parameter


cdef bint is_array(PyObject *value) noexcept:
    return (type(<object>value) is array_type
            or isinstance(<object>value, array_type) and not isinstance(<object>value, masked_type))


cdef int view(PyObject *value, View *v) noexcept:
    """Read the fields of an array; its type of elements, -1 for one in the other byte order."""
    cdef PyArrayObject *array = <PyArrayObject *>value
    cdef int kind = PyArray_TYPE(array), i
    v.data = <char *>PyArray_DATA(array)
    v.shape = <const int64_t *>PyArray_DIMS(array)
    v.strides = <const int64_t *>PyArray_STRIDES(array)
    v.ndim = PyArray_NDIM(array)
    v.itemsize = 8 if kind == NPY_DOUBLE else 4
    v.unit = 1
    v.size = 1
    for i in range(v.ndim):
        v.size *= v.shape[i]
    return kind if PyArray_ISNOTSWAPPED(array) else -1


cdef bint is_writable(PyObject *value) noexcept:
    cdef int needed = NPY_ARRAY_WRITEABLE | NPY_ARRAY_ALIGNED
    return PyArray_FLAGS(<PyArrayObject *>value) & needed == needed


cdef void extent(const View *v, char **begin, char **end) noexcept:
    """From the first to behind the last byte of an array of any strides."""
    cdef int i
    begin[0] = end[0] = v.data
    if v.size == 0:
        return
    for i in range(v.ndim):
        if v.strides[i] < 0:
            begin[0] += v.strides[i] * (v.shape[i] - 1)
        else:
            end[0] += v.strides[i] * (v.shape[i] - 1)
    end[0] += v.itemsize


cdef class Kept:
    """A parameter and its state as they are now, to be put back without Python code."""
    cdef dict entry, before
    cdef list arrays, copies, sizes

    def __init__(self, data, entry):
        self.arrays, self.copies = [data], [data.copy("K")]
        self.entry, self.before = entry, {}
        for name, value in entry.items():
            if isinstance(value, ndarray) and not value.dtype.hasobject and value.flags.forc:
                self.arrays.append(value)
                self.copies.append(value.copy("K"))
                self.before[name] = value
            else:
                self.before[name] = deepcopy(value)
        self.sizes = [copy.nbytes for copy in self.copies]

    cdef int put_back(self) except -1:
        cdef View now, copy
        cdef Py_ssize_t i
        for i in range(len(self.arrays)):
            view(<PyObject *>self.arrays[i], &now)
            view(<PyObject *>self.copies[i], &copy)
            if now.size == copy.size:  # not resized meanwhile
                memcpy(now.data, copy.data, self.sizes[i])
        PyDict_Clear(self.entry)
        PyDict_Update(self.entry, self.before)
        return 0


def update_all(optimizer, grads):
    cdef Kept kept
    cdef list all_kept = []
    rows = optimizer._rows_to_update(grads)
    try:
        for _group, p, _grad in rows:
            all_kept.append(Kept(p.data, optimizer.state.setdefault(p, {})))
        for (group, p, grad), kept in zip(rows, all_kept):
            optimizer.update(p.data, grad, kept.entry, group)
    except BaseException:
        for kept in all_kept:
            kept.put_back()
        raise


cdef class ArrayWorkspace(Workspace):
    """The steps of one optimizer of Parameters."""

    def step_by_update(self, optimizer, list grads):
        """The step of an optimizer whose rule is its method `update`; what it has changed is put back if it raises."""
        self.step_by(update_all, optimizer, grads)

    cdef int take(self, Row *row, Py_ssize_t index) except -1:
        param = <object>row.param
        if type(param) is not parameter_type and not isinstance(param, parameter_type):
            raise TypeError(f"'params' of a param group holds a {type(param).__name__}, must be a list of Parameters")
        hold(&row.data, param._data)
        return 0

    cdef int take_gradient(self, Row *row, Py_ssize_t index) except -1:
        if type(<object>row.grad) is not array_type:
            hold(&row.grad, check_gradient(label(index, <object>row.param), <object>row.data, <object>row.grad))
        return 0

    cdef int check_entry(self, Row *row, Py_ssize_t index) except -1:
        """Raise where a key is of a subclass of str: to look up a name or store a count would run code of its class."""
        cdef Py_ssize_t position = 0
        cdef PyObject *key
        cdef PyObject *value
        while PyDict_Next(<object>row.entry, &position, &key, &value):
            if type(<object>key) is not str and isinstance(<object>key, str):
                what = label(index, <object>row.param)
                raise TypeError(f"{what}: state has a key of {type(<object>key)}, must be of str")
        return 0

    cdef bint holds(self, PyObject *entry, name) except -1:
        return PyDict_GetItemWithError(<object>entry, name) != NULL

    cdef dict make_state(self, Row *row, Py_ssize_t index, Plan plan, optimizer):
        check_data(label(index, <object>row.param), <object>row.data)  # no state for what cannot be stepped
        return Workspace.make_state(self, row, index, plan, optimizer)

    cdef int lacks(self, Row *row, Py_ssize_t index, name) except -1:
        what = label(index, <object>row.param)
        raise KeyError(f"{what}: state has no {name!r}, only {sorted(map(str, <object>row.entry))}")

    cdef Py_ssize_t read_step(self, Row *row, Py_ssize_t index) except -2:
        cdef int overflow = 0
        cdef long long steps = -1
        step = <object>row.count[0]
        if type(step) is int:
            steps = PyLong_AsLongLongAndOverflow(step, &overflow)
        if overflow or not 0 <= steps <= MOST_STEPS:
            check_count(f"{label(index, <object>row.param)}: state 'step'", step)
            steps = step
        return steps

    cdef tuple read_counts(self, Row *row, Py_ssize_t index):
        cdef int j
        return tuple([float(<object>row.count[j]) for j in range(1, self.n_counts)])

    cdef bint look_at(self, Row *row, Py_ssize_t index, Work *w) except -1:
        cdef View p, s, g
        cdef char *begin
        cdef char *end
        cdef int kind, j
        if not is_array(row.data):
            self.refuse(row, index)
        kind = view(row.data, &p)
        if row.route == IDLE:
            extent(&p, &begin, &end)
            self.add_written(index, begin, end)
            return False
        if kind != NPY_FLOAT and kind != NPY_DOUBLE or not is_writable(row.data) or not is_dense(&p):
            self.refuse(row, index)
        w.size = p.size
        w.is_double = kind == NPY_DOUBLE
        w.stream[0] = p.data
        self.add_written(index, p.data, end_of(&p))
        for j in range(STATES):
            if row.state[j] == NULL:
                w.stream[2 + j] = NULL
                continue
            if (not is_array(row.state[j]) or view(row.state[j], &s) != kind or not is_writable(row.state[j])
                    or not same_shape(&p, &s) or not same_order(&p, &s)):
                self.refuse(row, index)
            w.stream[2 + j] = s.data
            self.add_written(index, s.data, end_of(&s))
        if not is_array(row.grad) or view(row.grad, &g) != kind or not same_shape(&p, &g):
            self.refuse(row, index)
        w.stream[1] = g.data
        row.read.begin = row.read.end = NULL
        if row.has_copy:
            return True
        if not same_order(&p, &g) or <size_t>g.data % g.itemsize:
            row.must_copy = self.again = True
        else:
            row.read.begin = g.data
            row.read.end = end_of(&g)
        return True

    cdef int refuse(self, Row *row, Py_ssize_t index) except -1:
        """Raise for what look_at has found."""
        cdef tuple names = (<Plan>self.new_plans[row.group]).names or ()
        data = <object>row.data
        what = label(index, <object>row.param)
        check_data(what, data)
        for j in range(len(names)):
            if row.state[j] != NULL:
                check_state(what, names[j], {names[j]: <object>row.state[j]}, data)
        if row.grad != NULL:
            check_gradient(what, data, <object>row.grad)
        raise RuntimeError(f"{what} is changed by another thread while the step looks at it")

    cdef bint overlap(self, Py_ssize_t first, Py_ssize_t second) except -1:
        cdef Py_ssize_t i, j
        cdef Row *row
        ranges = []
        for i in range(self.n_written):
            row = &self.rows[self.written[i].row]
            what = label(self.written[i].row, <object>row.param)
            for j, name in enumerate((<Plan>self.new_plans[row.group]).names or ()):
                if row.state[j] != NULL and PyArray_DATA(<PyArrayObject *>row.state[j]) == self.written[i].range.begin:
                    if PyArray_DATA(<PyArrayObject *>row.data) != self.written[i].range.begin or i > 0 and (
                            self.written[i - 1].row == self.written[i].row):
                        what = f"{label(self.written[i].row, <object>row.param)}: state {name!r}"
            begin, end = <size_t>self.written[i].range.begin, <size_t>self.written[i].range.end
            ranges.append((begin, end, what, self.written[i].row))
        check_no_overlap(ranges)
        raise RuntimeError("parameters are changed by another thread while the step looks at them")

    cdef int tangle(self, Py_ssize_t reader, Py_ssize_t writer) except -1:
        """The sweep, which has no order, must not read there."""
        self.rows[reader].must_copy = self.again = True
        return 0

    cdef bint settle(self, optimizer) except -1:
        """Copy gradients into the memory order of their parameters, and apart from what is written."""
        cdef Py_ssize_t k
        cdef Row *row
        cdef bint found = False
        for k in range(self.n_rows):
            row = &self.rows[k]
            if not row.must_copy:
                continue
            data = <object>row.data
            grad = check_gradient(label(k, <object>row.param), data, <object>row.grad)
            copy = self.last_copy(k)
            if copy is None or copy.shape != data.shape or copy.dtype != data.dtype or copy.strides != data.strides:
                copy = np.empty_like(data, subok=False)
            np.copyto(copy, grad)
            self.use_copy(row, k, copy)
            found = True
        return found

    cdef int make_counts(self, Row *row) except -1:
        return self.write_counts(row, row.made)

    cdef int store_counts(self, Row *row) noexcept:
        if row.made == NULL:
            self.write_counts(row, row.entry)
        return 0

    cdef int write_counts(self, Row *row, PyObject *entry) except -1:
        cdef tuple counts = <tuple>self.new_counts[row.slot]
        cdef Py_ssize_t j
        for j in range(len(counts)):
            PyDict_SetItem(<object>entry, <object>self.count_names[j], <object>counts[j])
        return 0
