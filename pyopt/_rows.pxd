# The rows of a table that a gradient touches: each once, in ascending order, with the places of its values.

from libc.stdint cimport int64_t


cdef struct Touched:
    Py_ssize_t count  # of the rows
    Py_ssize_t width  # elements of a row
    const int64_t *row  # which; NULL for all, each with the values of its number
    const int64_t *first  # where a row's values begin in `place`; they end where the next row's begin
    const int64_t *place  # of values, each as long as a row; those of one row in order of appearance


cdef struct Sorter:  # the memory behind one Touched, used again
    int64_t *block
    Py_ssize_t capacity


cdef class Rows:
    """The touched rows of one gradient, for as long as it is gone over; they own their memory."""
    cdef Sorter sorter
    cdef Touched touched

    cdef Py_ssize_t sort(self, const void *indices, int itemsize, Py_ssize_t n, Py_ssize_t rows, Py_ssize_t width,
                         bint *ascending) except -2


cdef int refuse_rows(what, grad, Py_ssize_t wrong, bint ascending) except -1
cdef int make_room(Sorter *sorter, Py_ssize_t n) except -1
cdef void release(Sorter *sorter) noexcept
cdef Py_ssize_t sort_rows(Sorter *sorter, Touched *touched, const void *indices, int itemsize, Py_ssize_t n,
                          Py_ssize_t rows, bint *ascending) noexcept nogil
