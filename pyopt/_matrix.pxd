# Steps that need numbers of a whole matrix first: passes over tiles, and what is written when all is known.

from pyopt._engine cimport Numbers, Outcome, Work


cdef enum:
    LANES = 32  # partial sums side by side
    TILE_ROWS = 128
    TILE_COLUMNS = 2048  # whose sums, in double, stay in the first cache


cdef struct Matrices:  # equal matrices one behind the other, rows side by side
    Py_ssize_t count, rows, columns
    Py_ssize_t row_tiles, column_tiles  # of each matrix
    bint is_double
    void *p
    const void *g
    # What a pass reads and writes; the sums of each tile are its own.
    double *row_sums  # [count, rows, column_tiles]
    double *column_sums  # [count, row_tiles, columns]
    double *sums  # [count, row_tiles, column_tiles]
    const void *row_factors  # [count, rows], of the type of p
    const void *column_factors  # [count, columns]
    double most, decay_factor, step_size


cdef struct Tile:
    Py_ssize_t matrix, row_tile, column_tile, first_row, end_row, first_column, end_column


cdef inline Tile tile_at(const Matrices *job, Py_ssize_t index) noexcept nogil:
    """The tile of a number. Where the cuts fall depends on the shape alone."""
    cdef Tile t
    t.column_tile = index % job.column_tiles
    t.row_tile = index // job.column_tiles % job.row_tiles
    t.matrix = index // job.column_tiles // job.row_tiles
    t.first_row = t.row_tile * TILE_ROWS
    t.end_row = min(t.first_row + TILE_ROWS, job.rows)
    t.first_column = t.column_tile * TILE_COLUMNS
    t.end_column = min(t.first_column + TILE_COLUMNS, job.columns)
    return t


ctypedef void (*Tile32)(float *p, const float *g, const Matrices *, Py_ssize_t) noexcept nogil
ctypedef void (*Tile64)(double *p, const double *g, const Matrices *, Py_ssize_t) noexcept nogil


cdef class Pass:
    """What is done to each tile, for either element type."""
    cdef Tile32 tile32
    cdef Tile64 tile64

    @staticmethod
    cdef Pass make(Tile32 tile32, Tile64 tile64)


cdef class Writes(Outcome):
    """What a step writes, computed aside, to be written at once."""
    cdef list held  # the objects whose memory is read and written
    cdef list entries  # (entry of the state, its new items, what it was)
    cdef list copies  # (array, new numbers)
    cdef list matrices  # (Pass, job)
    cdef Work *work
    cdef Numbers *numbers
    cdef Py_ssize_t n_work, capacity, cost

    cdef int reserve(self, Py_ssize_t n) except -1
    cdef int write(self) except -1
