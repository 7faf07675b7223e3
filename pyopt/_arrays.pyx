# Steps on NumPy arrays. What a step needs to know of an array is read from its own fields, in every step: whatever was
# set in place since, shape, strides, dtype, flags or memory, is followed or refused.

cimport cython
from cpython.dict cimport PyDict_Clear, PyDict_Contains, PyDict_Next, PyDict_SetItem, PyDict_Update
from cpython.object cimport PyObject
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from pyopt._asked cimport FILL
from pyopt._engine cimport STATES, Averaged, Outcome, Rule, Work
from pyopt._norms cimport Batch
from pyopt._numpy_arrays cimport (
    NPY_ARRAY_ALIGNED, NPY_ARRAY_WRITEABLE, NPY_DOUBLE, NPY_FLOAT, NPY_HALF, NPY_INT, NPY_LONG, NPY_LONGLONG, NPY_SHORT,
    NPY_UBYTE, PyArray_DATA, PyArray_DIMS, PyArray_FLAGS, PyArray_NDIM, PyArray_STRIDES, PyArray_TYPE, PyArrayObject,
    is_native,
)
from pyopt._plans cimport Plan
from pyopt._rows cimport refuse_rows
from pyopt._step cimport IDLE, KERNEL, MOST_STEPS, Row, Workspace, hold
from pyopt._views cimport (
    OF_BFLOAT16, OF_FLOAT16, OF_FLOAT32, OF_FLOAT64, OF_INT16, OF_UINT8, OTHER, View, end_of, go_together, is_dense,
    is_in_c_order, is_of_rows, is_short, same_order, same_shape,
)

from copy import deepcopy
import sys

import numpy as np
from numpy import ndarray
from numpy.ma import MaskedArray

from pyopt._lazy import touched_rows
from pyopt.checks import count as check_count
from pyopt.parameter import (
    Parameter, average_type, check_average, check_c_order, check_codes, check_data, check_gradient, check_master,
    check_no_overlap, check_state, check_state_values, is_short as is_short_type, label, overlaps_itself,
)
from pyopt.sparse import RowSparse, check_rows

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object, int *) except? -1

cdef object array_type = ndarray
cdef object masked_type = MaskedArray
cdef object parameter_type = Parameter
cdef object rows_type = RowSparse
cdef object fill_array = ndarray.fill


cdef bint is_array(PyObject *value) noexcept:
    return (type(<object>value) is array_type
            or isinstance(<object>value, array_type) and not isinstance(<object>value, masked_type))


cdef dict modules = sys.modules
cdef int bfloat16_type = -1  # that of ml_dtypes, which NumPy numbers when it is imported


cdef int find_bfloat16() except -1:
    """Take the number of bfloat16 where there is one."""
    global bfloat16_type
    if bfloat16_type < 0 and PyDict_Contains(modules, "ml_dtypes"):
        kind = getattr(modules.get("ml_dtypes"), "bfloat16", None)  # not yet while another thread imports it
        if kind is not None:
            bfloat16_type = np.dtype(kind).num
    return 0


cdef int element_of(int kind) noexcept:
    if kind == NPY_FLOAT:
        return OF_FLOAT32
    if kind == NPY_DOUBLE:
        return OF_FLOAT64
    if kind == NPY_HALF:
        return OF_FLOAT16
    if kind == bfloat16_type:
        return OF_BFLOAT16
    return OF_INT16 if kind == NPY_SHORT else OF_UINT8 if kind == NPY_UBYTE else OTHER


cdef int view(PyObject *value, View *v) noexcept:
    """Read the fields of an array; its type of elements, OTHER for one in the other byte order."""
    cdef PyArrayObject *array = <PyArrayObject *>value
    cdef int i
    v.element = element_of(PyArray_TYPE(array)) if is_native(array) else OTHER
    v.data = <char *>PyArray_DATA(array)
    v.shape = <const int64_t *>PyArray_DIMS(array)
    v.strides = <const int64_t *>PyArray_STRIDES(array)
    v.ndim = PyArray_NDIM(array)
    v.itemsize = 4 if v.element == OF_FLOAT32 else 8 if v.element == OF_FLOAT64 else 1 if v.element == OF_UINT8 else 2
    v.unit = 1
    v.size = 1
    for i in range(v.ndim):
        v.size *= v.shape[i]
    return v.element


cdef bint is_writable(PyObject *value) noexcept:
    cdef int needed = NPY_ARRAY_WRITEABLE | NPY_ARRAY_ALIGNED
    return PyArray_FLAGS(<PyArrayObject *>value) & needed == needed


cdef int width_of_index(PyObject *value) noexcept:
    """Bytes of an element of an array of int32 or int64, 0 for another one."""
    cdef PyArrayObject *array = <PyArrayObject *>value
    cdef int kind = PyArray_TYPE(array), size = 0
    if kind == NPY_INT:
        size = sizeof(int)
    elif kind == NPY_LONG:
        size = sizeof(long)
    elif kind == NPY_LONGLONG:
        size = sizeof(long long)
    if (size != 4 and size != 8) or not is_native(array) or not PyArray_FLAGS(array) & NPY_ARRAY_ALIGNED:
        return 0
    return size


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


cdef bint same_order_as(array, data) noexcept:
    cdef View a, d
    view(<PyObject *>array, &a)
    view(<PyObject *>data, &d)
    return same_order(&a, &d)


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


cdef class Updated(Outcome):
    """What an optimizer's own `update` has changed."""
    cdef list kept

    cdef int undo(self) except -1:
        cdef Kept each
        for each in self.kept:
            each.put_back()
        return 0


def update_all(optimizer, grads, factor):
    """Call `update` for every parameter that has a gradient; what it has changed is put back if it raises."""
    cdef Updated updated = Updated()
    cdef Kept kept
    updated.kept = []
    rows = optimizer._rows_to_update(grads, factor)
    try:
        for _group, p, _grad in rows:
            updated.kept.append(Kept(p.data, optimizer.state.setdefault(p, {})))
        for (group, p, grad), kept in zip(rows, updated.kept):
            optimizer.update(p.data, grad, kept.entry, group)
    except BaseException:
        updated.undo()
        raise
    return updated


cdef class ArrayWorkspace(Workspace):
    """The steps of one optimizer of Parameters."""

    cdef int collect(self, optimizer, list grads) except -1:
        find_bfloat16()
        return Workspace.collect(self, optimizer, grads)

    cdef int take(self, Row *row, Py_ssize_t index) except -1:
        param = <object>row.param
        if type(param) is not parameter_type and not isinstance(param, parameter_type):
            raise TypeError(f"'params' of a param group holds a {type(param).__name__}, must be a list of Parameters")
        hold(&row.data, param._data)
        return 0

    cdef int read_view(self, PyObject *array, View *v) except -1:
        return view(array, v) if is_array(array) and is_writable(array) else OTHER

    cdef int take_gradient(self, Row *row, Py_ssize_t index) except -1:
        if type(<object>row.grad) is rows_type:
            self.take_rows(row, index)
        elif type(<object>row.grad) is not array_type:
            hold(&row.grad, check_gradient(label(index, <object>row.param), <object>row.data, <object>row.grad))
        return 0

    cdef int take_rows(self, Row *row, Py_ssize_t index) except -1:
        what = label(index, <object>row.param)
        if self.bare and not self.bare_rows:
            raise TypeError(f"{what}: gradient is row-sparse, must be an array for this optimizer")
        if self.averages:
            raise ValueError(f"{what}: gradient is row-sparse, which goes with no average: that would move all rows")
        indices, values = check_rows(what, check_data(what, <object>row.data), <object>row.grad)
        hold(&row.indices, indices)
        hold(&row.values, values)
        row.keeps_gradient = True  # it has no zeros to be filled with
        return 0

    cdef int refuse_gradient(self, Row *row, Py_ssize_t index, optimizer) except -1:
        name = type(optimizer).__name__
        if row.values != NULL:
            raise TypeError(f"{label(index, <object>row.param)}: gradient is row-sparse, which {name} does not take")
        kind = type(<object>row.grad).__name__
        raise TypeError(f"{label(index, <object>row.param)}: gradient is a {kind}, must be a RowSparse for {name}; "
                        "Adam takes arrays")

    cdef int check_entry(self, Row *row, Py_ssize_t index) except -1:
        """Raise where a key is of a subclass of str: to look up a name or store a count would run code of its class."""
        cdef Py_ssize_t position = 0
        cdef PyObject *key
        cdef PyObject *value
        kind = None
        entry = <object>row.entry
        with cython.critical_section(entry):
            while PyDict_Next(entry, &position, &key, &value):
                if type(<object>key) is not str and isinstance(<object>key, str):
                    kind = type(<object>key)
        if kind is not None:
            raise TypeError(f"{label(index, <object>row.param)}: state has a key of {kind}, must be of str")
        return 0

    cdef bint holds(self, PyObject *entry, name) except -1:
        return PyDict_Contains(<object>entry, name)

    cdef dict make_state(self, Row *row, Py_ssize_t index, Plan plan, optimizer):
        check_data(label(index, <object>row.param), <object>row.data)  # no state for what cannot be stepped
        made = Workspace.make_state(self, row, index, plan, optimizer)
        find_bfloat16()  # the first state of that type is what imports it
        return made

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
        cdef int j
        cdef bint in_order, by_row = not row.beside and row.route == KERNEL and self.steps_by_row(row)
        if not is_array(row.data):
            self.refuse(row, index)
        view(row.data, &p)
        if row.route == IDLE:
            extent(&p, &begin, &end)
            self.add_written(index, begin, end)
            return False
        if not go_together(&p, &p) or not is_dense(&p) or (
                not is_writable(row.data) and (not row.beside or self.exchanging)):
            self.refuse(row, index)
        w.size = p.size
        w.is_double = p.element == OF_FLOAT64
        w.stream[0] = p.data
        if is_short(&p):
            self.note_element(w, 0, &p)
        self.add_written(index, p.data, end_of(&p))
        for j in range(STATES):
            w.stream[2 + j] = NULL
            if row.state[j] == NULL or row.aside[1 + j] != NULL:  # the latter are looked at below
                continue
            if (not is_array(row.state[j]) or not view(row.state[j], &s) or not go_together(&p, &s)
                    or not is_writable(row.state[j])
                    or not (is_of_rows(&p, &s) if by_row else same_shape(&p, &s) and same_order(&p, &s))):
                self.refuse(row, index)
            w.stream[2 + j] = s.data
            if is_short(&s):
                self.note_element(w, 2 + j, &s)
            self.add_written(index, s.data, end_of(&s))
        if not self.bare and (<Plan>self.new_plans[row.group]).storage is not None:
            if not self.note_aside(row, index, w, &p):
                self.refuse_aside(row, index)
        if self.averages:
            self.look_at_averages(row, index, &p, w)
        w.stream[1] = NULL
        row.read.begin = row.read.end = NULL
        w.max_row_norm = self.max_row_norm(row)
        by_row = by_row or w.max_row_norm > 0
        if row.values != NULL:
            self.look_at_values(row, index, &p, w)
            return True
        if row.grad == NULL:
            return True
        if not is_array(row.grad) or not view(row.grad, &g) or not go_together(&p, &g) or not same_shape(&p, &g):
            self.refuse(row, index)
        w.stream[1] = g.data
        if is_short(&g):
            self.note_element(w, 1, &g)
        if by_row and not is_in_c_order(&p):
            self.refuse(row, index)
        if by_row:
            self.take_all_rows(row, w, &p)
        in_order = same_order(&p, &g) and <size_t>g.data % g.itemsize == 0
        if self.clearing == FILL and self.add_gradient(row, index, &g):
            w.clears = in_order and not row.has_copy
        if row.has_copy:
            return True
        if not in_order:
            row.must_copy = self.again = True
        elif not w.clears:
            row.read.begin = g.data
            row.read.end = end_of(&g)
        return True

    cdef int look_at_values(self, Row *row, Py_ssize_t index, const View *p, Work *w) except -1:
        """Look at a row-sparse gradient, and at which rows of the table p it has."""
        cdef View g, i
        cdef bint ascending
        cdef Py_ssize_t wrong, n
        cdef int itemsize = width_of_index(row.indices), axis
        if self.has_codes(w):
            what = label(index, <object>row.param)
            raise TypeError(f"{what}: gradient is row-sparse, must be an array where the state is in 8 bits")
        view(row.indices, &i)
        if (not view(row.values, &g) or not go_together(p, &g) or itemsize == 0 or g.ndim != p.ndim or g.ndim == 0
                or not is_in_c_order(p) or not is_in_c_order(&g)):
            self.refuse(row, index)
        n = g.shape[0]
        if i.ndim != 1 or i.shape[0] != n or i.strides[0] != itemsize and n > 1:
            self.refuse(row, index)
        for axis in range(1, g.ndim):
            if g.shape[axis] != p.shape[axis]:
                self.refuse(row, index)
        wrong = self.look_at_rows(row, w, p, i.data, itemsize, n, &ascending)
        if wrong >= 0 or not ascending and (<object>row.grad).is_sorted:
            refuse_rows(f"{label(index, <object>row.param)}: gradient", <object>row.grad, wrong, ascending)
        w.stream[1] = g.data
        if is_short(&g):
            self.note_element(w, 1, &g)
        row.read.begin = g.data
        row.read.end = end_of(&g)
        return 0

    cdef bint add_gradient(self, Row *row, Py_ssize_t index, const View *g) except -1:
        """Note that a gradient will be filled with zeros, where it can; whether it will."""
        if row.keeps_gradient:
            return False
        if not row.has_copy:
            extent(g, &row.filled.begin, &row.filled.end)
            if row.grad != <PyObject *>self.gradients[index] or not is_writable(row.grad):
                row.keeps_gradient = True
                return False
        self.add_written(index, row.filled.begin, row.filled.end, True)
        return True

    cdef int look_at_averages(self, Row *row, Py_ssize_t index, const View *p, Work *w) except -1:
        """Look at the averages of a parameter and note that they are written."""
        cdef Averaged *at = self.averages_of(self.n_work)
        cdef Py_ssize_t j, n = len(self.averages)
        cdef PyObject *array
        cdef View a
        cdef tuple averaged
        w.averaged = at
        for j in range(n):
            averaged = self.averaged[index * n + j]
            array = <PyObject *>averaged[0]
            if (not is_array(array) or view(array, &a) != (OF_FLOAT64 if p.element == OF_FLOAT64 else OF_FLOAT32)
                    or not is_writable(array) or not same_shape(p, &a) or not same_order(p, &a)):
                check_average(label(index, <object>row.param), <object>array, <object>row.data)
                raise RuntimeError(f"{label(index, <object>row.param)} changes while the step looks at it")
            at[j].data, at[j].weight, at[j].kept = a.data, averaged[1], self.kept_of(row, p)
            self.add_written(index, a.data, end_of(&a))
        return 0

    cdef object first_average(self, Row *row, Py_ssize_t index):
        data = check_data(label(index, <object>row.param), <object>row.data)
        average = np.empty_like(data, average_type(data.dtype), subok=False)
        np.copyto(average, data)
        return average

    cdef object copy_of(self, average):
        return average.copy("K")

    def copied(self, what, like, values):
        """A copy of an average that was saved, for the place of `like`."""
        check_state_values(what, "average", {"average": values}, like)
        copy = np.empty_like(like)
        np.copyto(copy, values)
        return copy

    cdef double left_sum(self, Row *row, double power, double scale) except? -1:
        return 0  # there is none

    cdef bint has_finite_gradient(self, Row *row) except -1:
        return np.isfinite(<object>(row.grad if row.values == NULL else row.values)).all()

    cdef int fill(self, list grads) except -1:
        for grad in grads:
            fill_array(grad, 0)
        return 0

    cdef int refuse_aside(self, Row *row, Py_ssize_t index) except -1:
        """Raise for what note_aside has found."""
        cdef Plan plan = self.new_plans[row.group]
        what = label(index, <object>row.param)
        if row.aside[0] != NULL:
            check_master(what, plan.master_name, <object>row.aside[0], <object>row.data)
        for j in range(len(plan.aside_names or ())):
            if row.aside[1 + j] != NULL:
                check_codes(what, plan.names[j], <object>row.state[j], <object>row.aside[1 + j], <object>row.data)
        raise RuntimeError(f"{what} is changed by another thread while the step looks at it")

    cdef int refuse(self, Row *row, Py_ssize_t index) except -1:
        """Raise for what look_at has found."""
        cdef tuple names = () if row.beside else (<Plan>self.new_plans[row.group]).names
        data = <object>row.data
        what = label(index, <object>row.param)
        check_data(what, data)
        if self.max_row_norm(row) > 0:
            check_c_order(what, data)
        for j in range(len(names)):
            if row.state[j] != NULL:
                check_state(what, names[j], {names[j]: <object>row.state[j]}, data, self.steps_by_row(row))
        if row.values != NULL:
            check_rows(what, data, <object>row.grad)
        elif row.grad != NULL:
            check_gradient(what, data, <object>row.grad)
        raise RuntimeError(f"{what} is changed by another thread while the step looks at it")

    cdef bint overlap(self, Py_ssize_t first, Py_ssize_t second) except -1:
        cdef Py_ssize_t i, j
        cdef Row *row
        ranges = []
        for i in range(self.n_written):
            if self.written[i].is_gradient:
                continue
            row = &self.rows[self.written[i].row]
            what = label(self.written[i].row, <object>row.param)
            for j, name in enumerate(() if self.bare else (<Plan>self.new_plans[row.group]).names or ()):
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
            found = True
            if row.values != NULL:
                hold(&row.values, (<object>row.values).copy())
                row.must_copy = False
                continue
            data = <object>row.data
            grad = check_gradient(label(k, <object>row.param), data, <object>row.grad)
            copy = self.last_copy(k)
            if copy is None or copy.shape != data.shape or copy.dtype != grad.dtype or not same_order_as(copy, data):
                copy = np.empty_like(data, grad.dtype, subok=False)
            np.copyto(copy, grad)
            self.use_copy(row, k, copy)
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


cdef class ArrayBatch(Batch):
    """Gradients that are gone over at once.

    copied: those whose numbers were copied, into the memory order of their parameters or side by side; with the copies.
    rows: of each RowSparse its place, which rows it has, and its values.
    """
    cdef readonly list copied, rows

    def __init__(self, list grads, list owners, list names, bint writes):
        """grads: arrays, to be written to or not; owners: their Parameters, or None; names: for messages, or None."""
        cdef View g, p
        cdef PyObject *array
        cdef Py_ssize_t k
        cdef int kind
        find_bfloat16()
        self.copied, self.rows = [], []
        for k in range(len(grads)):
            if type(grads[k]) is rows_type:
                self.add_rows(k, grads[k], owners[k], names[k], writes)
                continue
            array = <PyObject *>grads[k]
            kind = view(array, &g) if is_array(array) else OTHER
            if kind == OTHER or kind == OF_INT16 or kind == OF_UINT8 or writes and not (
                    PyArray_FLAGS(<PyArrayObject *>array) & NPY_ARRAY_WRITEABLE):
                self.refuse(k, grads[k], owners[k], names[k])
            p = g
            if owners[k] is not None:
                data = owners[k]._data
                view(<PyObject *>data, &p)
                if not same_shape(&p, &g):
                    self.refuse(k, grads[k], owners[k], names[k])
            if same_order(&p, &g) and is_dense(&g) and <size_t>g.data % g.itemsize == 0:
                self.add(g.data, g.size, kind, grads[k])
                continue
            if writes and overlaps_itself(grads[k].shape, grads[k].strides, grads[k].itemsize):
                self.refuse(k, grads[k], owners[k], names[k])
            copy = np.empty_like(grads[k] if owners[k] is None else data, grads[k].dtype, subok=False)
            np.copyto(copy, grads[k])
            view(<PyObject *>copy, &g)
            self.add(g.data, g.size, kind, copy)
            self.copied.append((grads[k], copy))

    def apply(self, Rule rule, dict scalars):
        Batch.apply(self, rule, scalars)
        for grad, copy in self.copied:
            np.copyto(grad, copy)

    cdef int add_rows(self, Py_ssize_t k, grad, owner, name, bint writes) except -1:
        """Add the gradient of some rows of a table."""
        what = self.name_of(k, owner, name)
        indices, values = grad.arrays(what) if owner is None else check_rows(label(k, owner), owner._data, grad)
        if writes:
            self.check_writable(what, grad.values)
        if values.itemsize < 4:
            raise TypeError(f"{what} is {values.dtype}, must be float32 or float64")
        rows = touched_rows(what, grad, indices, values)
        self.add(<char *>PyArray_DATA(<PyArrayObject *>values), values.size,
                 OF_FLOAT64 if values.itemsize == 8 else OF_FLOAT32, (indices, values), rows)
        self.rows.append((k, rows, values))
        if not np.may_share_memory(values, grad.values):
            self.copied.append((grad.values, values))
        return 0

    cdef object name_of(self, Py_ssize_t k, owner, name):
        return f"gradient {name!r}" if name else f"gradient {k}" if owner is None else f"gradient of {label(k, owner)}"

    cdef int check_writable(self, what, array) except -1:
        if not array.flags.writeable:
            raise ValueError(f"{what} is read-only, must be writable")
        if overlaps_itself(array.shape, array.strides, array.itemsize):
            raise ValueError(f"{what} has strides {array.strides} with shape {array.shape}, must not overlap itself")
        return 0

    cdef int refuse(self, Py_ssize_t k, grad, owner, name) except -1:
        what = self.name_of(k, owner, name)
        if not is_array(<PyObject *>grad):
            raise TypeError(f"{what} is a {type(grad).__name__}, must be an array")
        if not grad.dtype.isnative or not (grad.dtype in ("float32", "float64") or is_short_type(grad.dtype)):
            raise TypeError(f"{what} is {grad.dtype}, must be float32, float64, float16 or bfloat16")
        if owner is not None:
            check_gradient(what, owner._data, grad)
        self.check_writable(what, grad)
        raise RuntimeError(f"{what} is changed by another thread while it is looked at")


def with_gradients(list items):
    """Those that have a gradient, of a list of Parameters; None where it holds anything else."""
    cdef list found = []
    for item in items:
        if type(item) is not parameter_type:
            return None
        if item.grad is not None:
            found.append(item)
    return found
