# Steps that need numbers of a whole matrix first (norms, means of rows, orthogonalization): they are computed aside,
# by passes that write nothing of the user's, and then written at once.

from cpython.dict cimport PyDict_Clear, PyDict_Update
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from libc.string cimport memcpy, memset

from pyopt._engine cimport ROW_COST, Numbers, Rule, Work, run_pieces, sweep
from pyopt._numpy_arrays cimport NPY_DOUBLE, PyArray_DATA, PyArray_TYPE, PyArrayObject

import numpy as np

cdef extern from *:
    """
    #include <float.h>
    """
    const double FLT_MAX


cdef class Pass:
    @staticmethod
    cdef Pass make(Tile32 tile32, Tile64 tile64):
        cdef Pass made = Pass.__new__(Pass)
        made.tile32, made.tile64 = tile32, tile64
        return made


cdef struct Job:
    Matrices matrices
    Tile32 tile32
    Tile64 tile64


cdef void run_tile(const void *job, Py_ssize_t index) noexcept nogil:
    cdef const Job *j = <const Job *>job
    if j.matrices.is_double:
        j.tile64(<double *>j.matrices.p, <const double *>j.matrices.g, &j.matrices, index)
    else:
        j.tile32(<float *>j.matrices.p, <const float *>j.matrices.g, &j.matrices, index)


cdef void run_pass(const Matrices *matrices, Tile32 tile32, Tile64 tile64) noexcept nogil:
    cdef Job job
    cdef Py_ssize_t size = matrices.count * matrices.rows * matrices.columns
    job.matrices = matrices[0]
    job.tile32, job.tile64 = tile32, tile64
    run_pieces(run_tile, &job, matrices.count * matrices.row_tiles * matrices.column_tiles, size)


cdef void *data_of(array):
    return PyArray_DATA(<PyArrayObject *>array)


cdef class MatrixJob:
    """Passes over an array and its gradient as equal matrices.

    Args:
        p, g: arrays of one type, dense, in C order, of shape (count, rows, columns); not checked here.
    """
    cdef Matrices matrices
    cdef readonly object p, g, row_sums, column_sums, sums, row_factors, column_factors

    def __init__(self, p, g):
        cdef Matrices *job = &self.matrices
        self.p, self.g = p, g
        job.count, job.rows, job.columns = p.shape
        job.row_tiles = (job.rows + TILE_ROWS - 1) // TILE_ROWS
        job.column_tiles = (job.columns + TILE_COLUMNS - 1) // TILE_COLUMNS
        job.is_double = PyArray_TYPE(<PyArrayObject *>p) == NPY_DOUBLE
        job.p, job.g = data_of(p), data_of(g)
        self.sums = np.empty((job.count, job.row_tiles, job.column_tiles))
        job.sums = <double *>data_of(self.sums)

    def squares(self, Pass squares):
        """The sums of g**2 along rows [count, rows] and columns [count, columns], and the one of p**2."""
        cdef Matrices *job = &self.matrices
        row_sums = np.empty((job.count, job.rows, job.column_tiles))
        column_sums = np.empty((job.count, job.row_tiles, job.columns))
        job.row_sums, job.column_sums = <double *>data_of(row_sums), <double *>data_of(column_sums)
        with nogil:
            run_pass(job, squares.tile32, squares.tile64)
        return row_sums.sum(2), column_sums.sum(1), float(self.sums.sum())

    def total(self, Pass each):
        """The sum of what a pass leaves in `sums`."""
        with nogil:
            run_pass(&self.matrices, each.tile32, each.tile64)
        return float(self.sums.sum())

    def set_factors(self, row_factors, column_factors, double most):
        """What g is multiplied with: a factor per row and one per column, their product at most `most`."""
        self.row_factors = np.ascontiguousarray(row_factors, self.p.dtype)
        self.column_factors = np.ascontiguousarray(column_factors, self.p.dtype)
        self.matrices.row_factors = data_of(self.row_factors)
        self.matrices.column_factors = data_of(self.column_factors)
        self.matrices.most = most


cdef int fill_work(Work *w, Numbers *numbers, Rule rule, dict scalars, p, g) except -1:
    w.is_double = PyArray_TYPE(<PyArrayObject *>p) == NPY_DOUBLE
    numbers.kernel = &rule.kernel
    w.size = p.size
    w.stream[0], w.stream[1] = data_of(p), data_of(g)
    return rule.pack(scalars, numbers.value)


cdef class Writes(Outcome):
    """What a step writes, collected by methods that can fail and change nothing, and written by one that cannot.

    Arrays are dense and writable, those of one call of one type, shape and memory order: not checked here.
    """

    def __cinit__(self):
        self.held, self.entries, self.copies, self.matrices = [], [], [], []

    def __dealloc__(self):
        PyMem_Free(self.work)
        PyMem_Free(self.numbers)

    def add_rule(self, Rule rule, dict scalars, p, g, *states):
        """A rule of the kernels on an array, its gradient and the streams of its state."""
        cdef Py_ssize_t k = self.n_work
        cdef Work *w
        cdef int j
        if k == self.capacity:
            self.reserve(max(16, 2 * k))
        w = &self.work[k]
        memset(w, 0, sizeof(Work))
        fill_work(w, &self.numbers[k], rule, scalars, p, g)
        w.slot, w.start = k, self.cost
        for j in range(len(states)):
            w.stream[2 + j] = NULL if states[j] is None else data_of(states[j])
        self.held.append((rule, p, g, states))
        self.cost += w.size + ROW_COST
        self.n_work = k + 1

    def add_update(self, Pass update, MatrixJob job, double step_size, double decay_factor):
        """A pass over matrices that writes to p."""
        job.matrices.step_size, job.matrices.decay_factor = step_size, decay_factor
        self.matrices.append((update, job))

    def add_copy(self, array, numbers):
        """New numbers for an array: `numbers` lies in memory as the array does."""
        self.copies.append((array, numbers))

    def add_entry(self, dict entry, dict items):
        """New items of an entry of the state."""
        self.entries.append((entry, items, dict(entry)))

    cdef int reserve(self, Py_ssize_t n) except -1:
        cdef void *block = PyMem_Realloc(self.work, n * sizeof(Work))
        if block == NULL:
            raise MemoryError("no memory for the table of parameters")
        self.work = <Work *>block
        block = PyMem_Realloc(self.numbers, n * sizeof(Numbers))
        if block == NULL:
            raise MemoryError("no memory for the table of parameters")
        self.numbers = <Numbers *>block
        self.capacity = n
        return 0

    cdef int write(self) except -1:
        """Write all of it: no bytecode runs, so that no signal comes between; if memory fails, nothing has changed."""
        cdef Py_ssize_t k
        cdef MatrixJob job
        cdef Pass each
        try:
            for k in range(len(self.entries)):
                PyDict_Update(self.entries[k][0], self.entries[k][1])
        except BaseException:
            for k in range(len(self.entries)):
                PyDict_Clear(self.entries[k][0])
                PyDict_Update(self.entries[k][0], self.entries[k][2])
            raise
        for k in range(len(self.copies)):
            memcpy(data_of(self.copies[k][0]), data_of(self.copies[k][1]), self.copies[k][1].nbytes)
        for k in range(len(self.matrices)):
            each, job = self.matrices[k]
            with nogil:
                run_pass(&job.matrices, each.tile32, each.tile64)
        if self.n_work:
            with nogil:
                sweep(self.work, self.n_work, self.numbers, NULL, NULL)
        return 0

    cdef int carry_out(self) except -1:
        return self.write()

    def apply(self):
        """`write`, for who is in no step."""
        self.write()


def check_scalars(dtype, dict scalars):
    """Raise for numbers of a rule that an element type cannot hold."""
    for name, value in scalars.items():
        if not np.isfinite(value):
            raise ValueError(f"{name} == {value}, must be finite: an option is too large")
        if dtype == np.float32 and abs(value) > FLT_MAX:
            raise ValueError(f"{name} == {value}, must be at most 3.4e38 in float32: an option is too large")


def apply_rule(Rule rule, dict scalars, p, g):
    """A rule without state on an array at once."""
    cdef Work w
    cdef Numbers numbers
    memset(&w, 0, sizeof(w))
    fill_work(&w, &numbers, rule, scalars, p, g)
    with nogil:
        sweep(&w, 1, &numbers, NULL, NULL)


def dot(Pass product, x, y):
    """The sum of x * y in double, of arrays of one type and size, in C order."""
    cdef Matrices job
    cdef Py_ssize_t i
    cdef double total = 0
    memset(&job, 0, sizeof(job))
    job.count = job.rows = job.row_tiles = 1
    job.columns = x.size
    job.column_tiles = (job.columns + TILE_COLUMNS - 1) // TILE_COLUMNS
    job.is_double = PyArray_TYPE(<PyArrayObject *>x) == NPY_DOUBLE
    job.p, job.g = data_of(x), data_of(y)
    job.sums = <double *>PyMem_Malloc(job.column_tiles * sizeof(double))
    if job.sums == NULL:
        raise MemoryError("no memory for the sums of a product")
    with nogil:
        run_pass(&job, product.tile32, product.tile64)
        for i in range(job.column_tiles):
            total += job.sums[i]
    PyMem_Free(job.sums)
    return total
