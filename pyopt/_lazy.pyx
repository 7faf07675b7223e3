# What the step of tables that are brought up to date late needs of the compiled core: the touched rows with their sums,
# a rule on some rows at once, and rows to be written when all is known.

from libc.string cimport memcpy, memset

from pyopt._engine cimport BFLOAT16, BLOCK, FLOAT16, Numbers, Rule, Work, sum_values, sweep
from pyopt._matrix cimport Writes
from pyopt._numpy_arrays cimport NPY_DOUBLE, PyArray_DATA, PyArray_TYPE, PyArrayObject
from pyopt._rows cimport Rows, Touched, refuse_rows

import numpy as np


cdef void *data_of(array):
    return PyArray_DATA(<PyArrayObject *>array)


def touched_rows(what, grad, indices, values):
    """The rows that a gradient touches; indices and values as checked, `what` begins the messages."""
    cdef Rows rows = Rows()
    cdef Py_ssize_t n = len(indices), wrong
    cdef bint ascending
    wrong = rows.sort(data_of(indices), indices.itemsize, n, grad.shape[0], values.size // n if n else 0, &ascending)
    refuse_rows(what, grad, wrong, ascending)
    return rows


def coalesce(what, grad, indices, values):
    """The rows that a gradient touches, ascending, and the sum of each one's values; indices and values as checked."""
    return summed(touched_rows(what, grad, indices, values), values)


def summed(Rows rows, values):
    """Which rows those are, and the sum of each one's values."""
    cdef Work w
    cdef const Touched *touched = &rows.touched
    cdef double room[BLOCK]
    cdef Py_ssize_t k, column, n, size = values.itemsize
    cdef char *out
    memset(&w, 0, sizeof(w))
    found, sums = np.empty(touched.count, np.int64), np.empty((touched.count, *values.shape[1:]), values.dtype)
    w.touched, w.is_double = touched, PyArray_TYPE(<PyArrayObject *>values) == NPY_DOUBLE
    w.stream[1] = data_of(values)
    out = <char *>data_of(sums)
    memcpy(data_of(found), touched.row, touched.count * sizeof(touched.row[0]))
    for k in range(touched.count):
        column = 0
        while column < touched.width:
            n = min(<Py_ssize_t>BLOCK, touched.width - column)
            memcpy(out, sum_values(&w, NULL, k, column, n, room), n * size)
            out += n * size
            column += n
    return found, sums


def widened(Rule rule, array):
    """The numbers of an array of a short type, in C order, as float32."""
    wide = np.empty(array.shape, np.float32)
    rule.kernel.codecs[FLOAT16 if array.dtype == np.float16 else BFLOAT16].load(
        <float *>data_of(wide), data_of(array), NULL, array.size)
    return wide


def narrowed(Rule rule, numbers, dtype):
    """Numbers of float32, in C order, rounded to a short type as a step rounds them."""
    short = np.empty(numbers.shape, dtype)
    rule.kernel.codecs[FLOAT16 if short.dtype == np.float16 else BFLOAT16].store(
        <const float *>data_of(numbers), data_of(short), NULL, numbers.size, 0, 0)
    return short


def step_rows(Rule rule, dict scalars, Py_ssize_t begin, Py_ssize_t end, p, g, *states, double max_row_norm=0):
    """A rule on the rows from begin to end of arrays, in C order; the gradient's begin at its own first.

    max_row_norm: what the rows are kept to, 0 for no bound.
    """
    cdef Work w
    cdef Touched touched
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
    memset(&touched, 0, sizeof(touched))
    if max_row_norm > 0 and width > 0:
        touched.count, touched.width = end - begin, width
        w.touched, w.max_row_norm = &touched, max_row_norm
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
