# What a step needs to know of an array, of whichever kind it is.

from libc.stdint cimport int64_t


cdef struct View:  # what a step needs to know of an array
    char *data
    const int64_t *shape
    const int64_t *strides  # in units of `unit` bytes
    int ndim
    int itemsize
    int unit
    Py_ssize_t size


cdef inline bint same_shape(const View *a, const View *b) noexcept nogil:
    cdef int i
    if a.ndim != b.ndim:
        return False
    for i in range(a.ndim):
        if a.shape[i] != b.shape[i]:
            return False
    return True


cdef inline bint same_order(const View *a, const View *b) noexcept nogil:
    """Whether two arrays of one shape and type lay their elements out alike; a length of 1 has no stride."""
    cdef int i
    if a.size == 0:
        return True
    for i in range(a.ndim):
        if a.strides[i] != b.strides[i] and a.shape[i] > 1:
            return False
    return True


cdef inline bint is_dense(const View *v) noexcept nogil:
    """Whether the elements lie side by side, in any order of the axes."""
    cdef int64_t expected = v.itemsize // v.unit
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
    expected = v.itemsize // v.unit
    for _i in range(v.ndim):
        for j in range(v.ndim):
            if v.shape[j] > 1 and v.strides[j] == expected:
                expected *= v.shape[j]
                break
        else:
            break
    return expected == v.size * (v.itemsize // v.unit)


cdef inline bint is_in_c_order(const View *v) noexcept nogil:
    """Whether the elements lie side by side, the last axis being the innermost."""
    cdef int64_t expected = v.itemsize // v.unit
    cdef int i
    for i in range(v.ndim - 1, -1, -1):
        if v.shape[i] != 1 and v.strides[i] != expected:
            return v.size == 0
        expected *= v.shape[i]
    return True


cdef inline bint is_of_rows(const View *p, const View *s) noexcept nogil:
    """Whether s has one element per row of p, side by side; without axes there is one row."""
    return s.ndim == min(p.ndim, 1) and is_in_c_order(s) and (p.ndim == 0 or s.shape[0] == p.shape[0])


cdef inline char *end_of(const View *v) noexcept nogil:
    """Behind the last element of a dense array."""
    return v.data + v.size * v.itemsize
