# What a step needs to know of an array, of whichever kind it is.

from libc.stdint cimport int64_t


cdef enum:  # the type of the elements
    OTHER
    OF_FLOAT32
    OF_FLOAT64
    OF_BFLOAT16
    OF_FLOAT16
    OF_INT16
    OF_UINT8


cdef struct View:  # what a step needs to know of an array
    char *data
    const int64_t *shape
    const int64_t *strides  # in units of `unit` bytes
    int ndim
    int element
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
    """Whether two arrays of one shape lay their elements out alike; a length of 1 has no stride."""
    cdef int64_t of_a = 1, of_b = 1
    cdef int i
    if a.size == 0:
        return True
    if a.itemsize != b.itemsize:
        of_a, of_b = b.itemsize // b.unit, a.itemsize // a.unit
    for i in range(a.ndim):
        if a.strides[i] * of_a != b.strides[i] * of_b and a.shape[i] > 1:
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


cdef inline bint is_short(const View *v) noexcept nogil:
    return v.element == OF_BFLOAT16 or v.element == OF_FLOAT16


cdef inline bint go_together(const View *p, const View *other) noexcept nogil:
    """Whether a rule can step a parameter of one type with a gradient or a state of another."""
    if p.element == OF_FLOAT64 or other.element == OF_FLOAT64:
        return p.element == other.element
    return (p.element == OF_FLOAT32 or is_short(p)) and (other.element == OF_FLOAT32 or is_short(other))


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
