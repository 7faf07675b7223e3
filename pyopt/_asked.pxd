# What a step may be asked for beside its rule.

cdef enum:  # what a norm that is not finite does
    APPLY
    RAISE
    SKIP


cdef enum:  # what becomes of the gradients
    KEEP
    FILL  # zeros, in place
    DROP  # None


cdef class Asked:
    cdef double max_norm, gradient_factor
    cdef int nonfinite, clearing
    cdef bint needs_norm


cdef class Average:
    cdef dict by_param, joined_at, aside
    cdef public long long n_averaged, steps
    cdef public bint is_swapped
