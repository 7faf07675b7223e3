# Which rows of a table a list of indices touches: a radix sort, stable, on private copies of the indices. What memory
# is reached through them later was checked here, whatever becomes of the caller's array meanwhile.

from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memset

import numpy as np

from pyopt.sparse import bad_index

cdef enum:
    DIGIT = 11  # bits that one pass sorts by, at most


cdef int bit_length(uint64_t x) noexcept nogil:
    cdef int n = 0
    while x:
        n += 1
        x >>= 1
    return n


cdef class Rows:
    def __dealloc__(self):
        release(&self.sorter)

    @property
    def count(self):
        """How many rows there are."""
        return self.touched.count

    cdef Py_ssize_t sort(self, const void *indices, int itemsize, Py_ssize_t n, Py_ssize_t rows, Py_ssize_t width,
                         bint *ascending) except -2:
        """Sort indices of a table of so many rows; the place of the first that is not of it, -1 for none."""
        cdef Py_ssize_t wrong
        make_room(&self.sorter, n)
        wrong = sort_rows(&self.sorter, &self.touched, indices, itemsize, n, rows, ascending)
        self.touched.width = width
        if width == 0:
            self.touched.count = 0
        return wrong


cdef int refuse_rows(what, grad, Py_ssize_t wrong, bint ascending) except -1:
    """Raise for what sorting the indices of a RowSparse has found."""
    if wrong >= 0:
        raise IndexError(bad_index(what, grad, wrong))
    if grad.is_sorted and not ascending:
        at = int(np.flatnonzero(np.diff(grad.indices) < 0)[0]) + 1
        raise ValueError(f"{what}: indices descend at place {at}, must not with is_sorted=True")
    return 0


cdef int make_room(Sorter *sorter, Py_ssize_t n) except -1:
    """Make room for n indices."""
    cdef void *block
    if n > sorter.capacity or sorter.block == NULL:
        block = PyMem_Realloc(sorter.block, (4 * n + 1) * sizeof(int64_t))
        if block == NULL:
            raise MemoryError(f"no memory to sort {n} indices of rows")
        sorter.block = <int64_t *>block
        sorter.capacity = n
    return 0


cdef void release(Sorter *sorter) noexcept:
    PyMem_Free(sorter.block)
    sorter.block = NULL
    sorter.capacity = 0


cdef Py_ssize_t sort_rows(Sorter *sorter, Touched *touched, const void *indices, int itemsize, Py_ssize_t n,
                          Py_ssize_t rows, bint *ascending) noexcept nogil:
    """Sort n indices, reserved before, of a table of so many rows; the place of the first one beyond it, -1 for none.

    ascending: whether they came in order, so that there was nothing to sort.
    """
    # A key holds the row and, in its low bits, the place, which the sort does not look at.
    cdef uint64_t *keys = <uint64_t *>sorter.block
    cdef uint64_t *spare = keys + n
    cdef int64_t *row = sorter.block + 2 * n
    cdef int64_t *first = row + n
    cdef int64_t *place
    cdef int low = bit_length(n), high = bit_length(rows - 1 if rows > 0 else 0)
    cdef uint64_t mask = ((<uint64_t>1) << low) - 1, x, last = 0
    cdef Py_ssize_t i, count = 0
    ascending[0] = True
    for i in range(n):
        x = <uint64_t>((<const int64_t *>indices)[i] if itemsize == 8 else <int64_t>(<const int32_t *>indices)[i])
        if x >= <uint64_t>rows:  # a negative one is a large one here
            return i
        if x < last:
            ascending[0] = False
        last = x
        keys[i] = x << low | <uint64_t>i
    if not ascending[0]:
        keys = sort_keys(keys, spare, n, low, high)
        spare = <uint64_t *>sorter.block + n if keys == <uint64_t *>sorter.block else <uint64_t *>sorter.block
    place = <int64_t *>spare
    for i in range(n):
        x = keys[i] >> low
        place[i] = <int64_t>(keys[i] & mask)
        if count == 0 or row[count - 1] != <int64_t>x:
            row[count] = <int64_t>x
            first[count] = i
            count += 1
    first[count] = n
    touched.count, touched.row, touched.first, touched.place = count, row, first, place
    return -1


cdef uint64_t *sort_keys(uint64_t *keys, uint64_t *spare, Py_ssize_t n, int low, int high) noexcept nogil:
    """Sort by the `high` bits above the `low` ones, the lowest digit first; returns where the sorted keys are."""
    cdef Py_ssize_t counts[1 << DIGIT]
    cdef Py_ssize_t i, at, here
    # Digits of about as many values as there are keys, all equally long.
    cdef int digit = min(<int>DIGIT, max(4, bit_length(n))), passes = (high + digit - 1) // digit, _k
    cdef uint64_t mask
    digit = (high + passes - 1) // passes
    mask = ((<uint64_t>1) << digit) - 1
    for _k in range(passes):
        memset(counts, 0, (mask + 1) * sizeof(Py_ssize_t))
        for i in range(n):
            counts[keys[i] >> low & mask] += 1
        at = 0
        for i in range(<Py_ssize_t>mask + 1):
            here = counts[i]
            counts[i] = at
            at += here
        for i in range(n):
            spare[counts[keys[i] >> low & mask]] = keys[i]
            counts[keys[i] >> low & mask] += 1
        keys, spare = spare, keys
        low += digit
    return keys
