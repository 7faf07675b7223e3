# What the kernels and the engine share: the shape of a span, and the rule that a span belongs to.

# One rule over n elements: parameter, gradient and up to three state streams (NULL where the options need none), of
# one element type. `restrict` on parameters: with more than five streams GCC gives up on run-time alias checks.
ctypedef void (*Span32)(float *restrict, const float *restrict, float *restrict, float *restrict, float *restrict,
                        Py_ssize_t, const void *) noexcept nogil
ctypedef void (*Span64)(double *restrict, const double *restrict, double *restrict, double *restrict,
                        double *restrict, Py_ssize_t, const void *) noexcept nogil

# Writes a dict of numbers into the C struct of a rule (at most SCALARS doubles); Cython checks names and types.
ctypedef int (*Pack)(dict, void *) except -1

cdef enum:
    STATES = 3
    SCALARS = 16


cdef class Rule:
    cdef Span32 span32
    cdef Span64 span64
    cdef Pack pack

    @staticmethod
    cdef Rule make(Span32 span32, Span64 span64, Pack pack)
