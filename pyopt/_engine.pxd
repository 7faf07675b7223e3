# What kernels, table and engine share: the shape of a span, the rule it belongs to, and a step's work.

# One rule over n elements: parameter, gradient and up to four state streams (NULL where the options need none), of
# one element type. `restrict` on parameters: with more than five streams GCC gives up on run-time alias checks.
ctypedef void (*Span32)(float *restrict, const float *restrict, float *restrict, float *restrict, float *restrict,
                        float *restrict, Py_ssize_t, const void *) noexcept nogil
ctypedef void (*Span64)(double *restrict, const double *restrict, double *restrict, double *restrict,
                        double *restrict, double *restrict, Py_ssize_t, const void *) noexcept nogil

# Writes a dict of numbers into the C struct of a rule (at most SCALARS doubles); Cython checks names and types.
ctypedef int (*Pack)(dict, void *) except -1

cdef enum:
    STATES = 4
    SCALARS = 16
    ROW_COST = 64  # what a tensor costs beyond its elements, in elements


cdef struct Work:  # one tensor of one step
    Py_ssize_t start  # the cost of all tensors before it, in elements
    Py_ssize_t size
    Py_ssize_t slot  # which of the step's sets of numbers
    bint is_double
    Span32 span32
    Span64 span64
    void *stream[2 + STATES]


cdef struct Numbers:
    double value[SCALARS]


cdef void sweep(const Work *work, Py_ssize_t count, const Numbers *numbers) noexcept nogil

# A piece of work of another kind than a span, by its number.
ctypedef void (*Piece)(const void *job, Py_ssize_t index) noexcept nogil

cdef void run_pieces(Piece piece, const void *job, Py_ssize_t count, Py_ssize_t cost) noexcept nogil


cdef class Rule:
    cdef readonly str name
    cdef readonly tuple states
    cdef Span32 span32
    cdef Span64 span64
    cdef Pack pack

    @staticmethod
    cdef Rule make(str name, tuple states, Span32 span32, Span64 span64, Pack pack)
