# What the step of tables that are brought up to date late needs of the compiled core: the touched rows with their sums,
# a rule on some rows at once, and rows to be written when all is known.

from libc.string cimport memcpy, memset

from pyopt._engine cimport BLOCK, Numbers, Rule, Work, sum_values, sweep
from pyopt._matrix cimport Writes
from pyopt._numpy_arrays cimport NPY_DOUBLE, PyArray_DATA, PyArray_TYPE, PyArrayObject
from pyopt._rows cimport Sorter, Touched, make_room, release, sort_rows

import numpy as np

from pyopt.sparse import bad_index


cdef void *data_of(array):
    return PyArray_DATA(<PyArrayObject *>array)


def coalesce(what, grad, indices, values):
    """The rows that a gradient touches, ascending, and the sum of each one's values; indices and values as checked."""
    cdef Sorter sorter
    cdef Work w
    cdef Touched touched
    cdef double room[BLOCK]
    cdef Py_ssize_t k, column, n, size = values.itemsize, wrong
    cdef bint ascending
    cdef char *out
    memset(&sorter, 0, sizeof(sorter))
    memset(&touched, 0, sizeof(touched))
    memset(&w, 0, sizeof(w))
    make_room(&sorter, len(indices))
    try:
        n = len(indices)
        wrong = sort_rows(&sorter, &touched, data_of(indices), indices.itemsize, n, grad.shape[0], &ascending)
        if wrong >= 0:
            raise IndexError(bad_index(f"{what}: gradient", grad, wrong))
        if grad.is_sorted and not ascending:
            at = int(np.flatnonzero(np.diff(indices) < 0)[0]) + 1
            raise ValueError(f"{what}: gradient: indices descend at place {at}, must not with is_sorted=True")
        touched.width = values.size // len(indices) if len(indices) else 0
        rows, sums = np.empty(touched.count, np.int64), np.empty((touched.count, *values.shape[1:]), values.dtype)
        w.touched, w.is_double = &touched, PyArray_TYPE(<PyArrayObject *>values) == NPY_DOUBLE
        w.stream[1] = data_of(values)
        out = <char *>data_of(sums)
        memcpy(data_of(rows), touched.row, touched.count * sizeof(touched.row[0]))
        for k in range(touched.count):
            column = 0
            while column < touched.width:
                n = min(<Py_ssize_t>BLOCK, touched.width - column)
                memcpy(out, sum_values(&w, k, column, n, room), n * size)
                out += n * size
                column += n
        return rows, sums
    finally:
        release(&sorter)


def step_rows(Rule rule, dict scalars, Py_ssize_t begin, Py_ssize_t end, p, g, *states):
    """A rule on the rows from begin to end of arrays, in C order; the gradient's begin at its own first."""
    cdef Work w
    cdef Numbers numbers
    cdef Py_ssize_t width = p.size // len(p) if len(p) else 0
    cdef int j
    memset(&w, 0, sizeof(w))
    w.is_double = PyArray_TYPE(<PyArrayObject *>p) == NPY_DOUBLE
    w.size = (end - begin) * width
    w.stream[0] = <char *>data_of(p) + begin * width * <Py_ssize_t>p.itemsize
    w.stream[1] = data_of(g)
    for j in range(len(states)):
        w.stream[2 + j] = <char *>data_of(states[j]) + begin * width * <Py_ssize_t>p.itemsize
    numbers.kernel = &rule.kernel
    rule.pack(scalars, numbers.value)
    with nogil:
        sweep(&w, 1, &numbers, NULL, NULL)


cdef class RowWrites(Writes):
    """Writes, and rows of tables."""
    cdef list tables  # (table, rows, their new numbers)

    def __cinit__(self):
        self.tables = []

    def add_rows(self, table, rows, numbers):
        """New numbers for some rows of a table: all in C order, of one type, the rows within it: not checked here."""
        self.tables.append((table, rows, numbers))

    cdef int write(self) except -1:
        cdef Py_ssize_t k, i, n, size
        cdef const long long *row
        cdef char *to
        cdef const char *numbers
        Writes.write(self)
        for k in range(len(self.tables)):
            table, rows, values = self.tables[k]
            n = len(rows)
            if n == 0:
                continue
            size = values.nbytes // n
            to, numbers = <char *>data_of(table), <const char *>data_of(values)
            row = <const long long *>data_of(rows)
            for i in range(n):
                memcpy(to + row[i] * size, numbers + i * size, size)
        return 0
