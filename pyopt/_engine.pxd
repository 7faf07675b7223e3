# What kernels, table and engine share: the shape of a span, the rule it belongs to, and a step's work.

from libc.stdint cimport uint64_t

from pyopt._rows cimport Touched

# One rule over n elements: parameter, gradient and up to four state streams (NULL where the options need none), of
# one element type. `restrict` on parameters: with more than five streams GCC gives up on run-time alias checks.
ctypedef void (*Span32)(float *restrict, const float *restrict, float *restrict, float *restrict, float *restrict,
                        float *restrict, Py_ssize_t, const void *) noexcept nogil
ctypedef void (*Span64)(double *restrict, const double *restrict, double *restrict, double *restrict,
                        double *restrict, double *restrict, Py_ssize_t, const void *) noexcept nogil

# What a rule that needs sums over whole tensors does first, over n elements, at most BLOCK: it may update state, and
# sums up SUMS quantities of each element in double.
ctypedef void (*Reduce32)(float *restrict, const float *restrict, float *restrict, float *restrict, float *restrict,
                          float *restrict, Py_ssize_t, const void *, double *) noexcept nogil
ctypedef void (*Reduce64)(double *restrict, const double *restrict, double *restrict, double *restrict,
                          double *restrict, double *restrict, Py_ssize_t, const void *, double *) noexcept nogil

# Makes of the sums over a tensor, and its size, the numbers of its step.
ctypedef void (*Finish)(void *, const double *, Py_ssize_t) noexcept nogil

# As that, of a rule that steps row by row: of the sums over a row, its size and the row's own number, which it updates.
ctypedef void (*FinishRow32)(void *, const double *, Py_ssize_t, float *) noexcept nogil
ctypedef void (*FinishRow64)(void *, const double *, Py_ssize_t, double *) noexcept nogil

# Writes a dict of numbers into the C struct of a rule (at most SCALARS doubles); Cython checks names and types.
ctypedef int (*Pack)(dict, void *) except -1

cdef enum:
    STATES = 4
    SCALARS = 16
    ROW_COST = 64  # what a tensor costs beyond its elements, in elements
    BLOCK = 1024  # elements that are summed together, counted from the start of the tensor
    SUMS = 2  # quantities that a rule sums
    TOUCH_COST = 64  # what a row of a table costs beyond its elements, in elements: it lies alone in memory
    AVERAGES = 4  # of each parameter, at most


cdef enum:  # how the elements of a stream lie in memory: each has its Codec
    PLAIN  # as rules compute: float32, or float64
    BFLOAT16
    FLOAT16
    SPLIT  # bfloat16, and beside it the lower half of a float32
    KAHAN_BFLOAT16  # and beside it what rounding has taken
    KAHAN_FLOAT16
    CHANCE_BFLOAT16  # rounded by chance
    CHANCE_FLOAT16
    SIGNED_CODES  # 8 bits, and beside them a scale for 256
    UNSIGNED_CODES
    CODECS


cdef struct Codec:
    # n elements into float32, and back; they, and what lies beside. A store has a key and the place of its first
    # element, counted from the start of the tensor: what chance depends on. NULL for PLAIN.
    void (*load)(float *restrict, const void *, const void *, Py_ssize_t) noexcept nogil
    void (*store)(const float *restrict, void *, void *, Py_ssize_t, uint64_t, Py_ssize_t) noexcept nogil
    int size  # of an element, in bytes
    int aside  # bytes beside for each `group` elements
    int group


# A rule over n elements some of whose streams are of bfloat16, loaded and stored in registers; the last argument is the
# lower halves of the parameter, NULL for none.
ctypedef void (*Direct)(void *, const void *, void *, void *, void *, void *, Py_ssize_t, const void *,
                        void *) noexcept nogil

cdef enum:  # which streams those are
    ALL
    PARAMETER  # and gradient
    STATE
    DIRECTS


cdef struct Kernel:  # what runs for a rule
    const Codec *codecs
    Direct direct[DIRECTS]  # NULL for none
    Span32 span32  # NULL where no rule runs
    Span64 span64
    Reduce32 reduce32  # NULL in a rule without sums, as are the next two
    Reduce64 reduce64
    Finish finish
    bint joint  # the sums go over all tensors of the step, not over each by itself
    bint writes_both  # streams 0 and 1: no rule's, that of an exchange
    bint moves_state  # it is what takes the sums that writes the state, not the span
    FinishRow32 finish_row32  # NULL but in a rule that steps row by row: its first state has one number for each
    FinishRow64 finish_row64


cdef struct Averaged:  # an average of one tensor
    void *data
    double weight  # how far it moves towards the tensor
    const char *kept  # what it holds after an exchange with a parameter whose type would round it; else NULL


cdef struct Stored:  # of one tensor some of whose streams are not PLAIN; it computes in float32
    unsigned char codec[2 + STATES]
    char *aside[2 + STATES]  # what lies beside them
    uint64_t key  # of chance


cdef struct Work:  # one tensor of one step
    Py_ssize_t start  # the cost of all tensors before it, in elements
    Py_ssize_t size
    const Touched *touched  # the rows of it that are stepped, NULL for all of it as one stretch of memory
    double max_row_norm  # what the rows that are stepped are kept to; 0 for no bound
    Py_ssize_t slot  # which of the step's sets of numbers
    Py_ssize_t row  # which of the step's parameters
    Py_ssize_t block  # the number of blocks before it, where there are sums
    bint is_double
    bint clears  # fills its gradient with zeros when it has been used
    void *stream[2 + STATES]  # parameter, gradient (of touched rows: their values), states
    const Stored *stored  # NULL where all its streams are PLAIN
    const Averaged *averaged  # the averages of the parameter, where there are extras


cdef struct Numbers:  # of one step of some tensors; of one tensor alone where its rule needs sums
    const Kernel *kernel
    double value[SCALARS]


cdef struct Extras:  # what a sweep does beside the rules
    int averages
    const Kernel *kernel  # of an average and the tensor


cdef struct Pass:  # one region: a step, or the sums before it
    const Work *work
    Py_ssize_t count
    const Numbers *numbers
    const Numbers *norm  # what sums all gradients, NULL for the sums that rules ask for
    double *sums  # SUMS for each block; NULL for a step
    const Extras *extras
    Py_ssize_t cost
    int parts
    bint flush


cdef Py_ssize_t cost_of(const Work *w) noexcept nogil
cdef Py_ssize_t blocks_of(const Work *w) noexcept nogil
cdef Py_ssize_t number_blocks(Work *work, Py_ssize_t count) noexcept nogil
cdef int threads_of(int most, Py_ssize_t cost) noexcept nogil
cdef int sweep_on(const Pass *a) noexcept nogil
cdef void run_in_mode(const Pass *a, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
cdef uint64_t enter_mode() noexcept nogil
cdef void leave_mode(uint64_t mode) noexcept nogil
cdef void finish(const Pass *a, Numbers *numbers) noexcept nogil
cdef void sweep(const Work *work, Py_ssize_t count, Numbers *numbers, double *sums,
                const Extras *extras) noexcept nogil
cdef void sum_gradients(const Work *work, Py_ssize_t count, const Numbers *norm, double *sums) noexcept nogil

# The gradient of n elements, at most BLOCK, of the k-th touched row, in the type that rules compute in; room has as
# many doubles. codecs may be NULL where nothing is stored in another.
cdef const void *sum_values(const Work *w, const Codec *codecs, Py_ssize_t k, Py_ssize_t column, Py_ssize_t n,
                            double *room) noexcept nogil

# A piece of work of another kind than a span, by its number.
ctypedef void (*Piece)(const void *job, Py_ssize_t index) noexcept nogil

cdef void run_pieces(Piece piece, const void *job, Py_ssize_t count, Py_ssize_t cost) noexcept nogil


cdef class Rule:
    cdef readonly str name
    cdef readonly tuple states
    cdef readonly Rule summing  # the rule for groups with options that need sums, None where there are none
    cdef Kernel kernel
    cdef Pack pack

    @staticmethod
    cdef Rule make(str name, tuple states, Kernel kernel, Pack pack)


cdef class Outcome:
    cdef int carry_out(self) except -1
    cdef int undo(self) except -1
