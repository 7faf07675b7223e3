# pyopt for Cython: `cimport pyopt.api as pyopt`, with the C compiler's include path at pyopt.get_include(). What all of
# it means stands in the header. (In __init__.pxd every module of pyopt would include the header.)

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

cdef extern from "pyopt.h" nogil:
    enum:
        PYOPT_MAJOR, PYOPT_MINOR, PYOPT_STATES, PYOPT_MOST_OPTIONS, PYOPT_MOST_KEPT
        PYOPT_OK, PYOPT_INVALID, PYOPT_NO_MEMORY, PYOPT_UNCHECKED
        PYOPT_FLOAT32, PYOPT_FLOAT64, PYOPT_BFLOAT16, PYOPT_FLOAT16, PYOPT_BFLOAT16_SPLIT, PYOPT_BFLOAT16_KAHAN
        PYOPT_FLOAT16_KAHAN, PYOPT_BFLOAT16_STOCHASTIC, PYOPT_FLOAT16_STOCHASTIC, PYOPT_SIGNED_8BIT
        PYOPT_UNSIGNED_8BIT, PYOPT_DTYPES
    const char *PYOPT_CAPSULE

    ctypedef struct pyopt_option:
        const char *name
        double usual
        int32_t check

    ctypedef struct pyopt_state:
        const char *name
        int32_t needed_by, initial

    ctypedef struct pyopt_kept:
        const char *name
        int32_t initial
        double value

    ctypedef struct pyopt_rule:
        size_t size
        const char *name
        int32_t n_states, n_options, n_kept
        const pyopt_state *states
        const pyopt_option *options
        const pyopt_kept *kept
        const uint32_t *dtypes

    ctypedef struct pyopt_stream:
        void *data
        int32_t dtype

    ctypedef struct pyopt_row:
        size_t size
        int64_t n
        int32_t rule, slot
        pyopt_stream parameter, gradient
        pyopt_stream state[4]
        void *beside[5]
        int64_t place

    ctypedef struct pyopt_slot:
        size_t size
        int64_t step
        double gradient_factor
        const double *options
        double *kept
        uint64_t seed
        int64_t rounding_step

    const pyopt_row PYOPT_ROW
    const pyopt_slot PYOPT_SLOT

    ctypedef struct pyopt_plan:
        pass

    ctypedef struct pyopt_functions:
        size_t size
        int32_t major, minor
        int (*count_rules)() noexcept nogil
        const pyopt_rule *(*rule)(int rule) noexcept nogil
        int (*find_rule)(const char *name) noexcept nogil
        int (*find_option)(int rule, const char *name) noexcept nogil
        void (*fill_defaults)(int rule, double *options) noexcept nogil
        double (*initial_state)(int rule, int state, const double *options) noexcept nogil
        void (*fill_kept)(int rule, const double *options, double *kept) noexcept nogil
        int (*create)(const pyopt_row *rows, size_t count, int flags, pyopt_plan **plan, char *message,
                      size_t size) noexcept nogil
        void (*destroy)(pyopt_plan *plan) noexcept nogil
        int (*step)(pyopt_plan *plan, const pyopt_slot *slots, size_t count, int threads, char *message,
                    size_t size) noexcept nogil
        int (*prepare)(pyopt_plan *plan, const pyopt_slot *slots, size_t count, char *message,
                       size_t size) noexcept nogil
        int64_t (*chunks)(const pyopt_plan *plan) noexcept nogil
        int (*has_sums)(const pyopt_plan *plan) noexcept nogil
        void (*sum)(pyopt_plan *plan, int64_t first, int64_t last) noexcept nogil
        void (*combine)(pyopt_plan *plan, const pyopt_slot *slots) noexcept nogil
        void (*run)(pyopt_plan *plan, int64_t first, int64_t last) noexcept nogil

cdef extern from "pyopt.h":
    const pyopt_functions *pyopt_api() except NULL  # with the GIL, once
