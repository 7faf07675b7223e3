/* pyopt for those who embed it: the optimizers without Python in the loop. C99 and C++.
 *
 *     const pyopt_functions *pyopt = pyopt_api();
 *     int adam = pyopt->find_rule("Adam");
 *     double options[PYOPT_MOST_OPTIONS];
 *     pyopt->fill_defaults(adam, options);
 *     options[pyopt->find_option(adam, "lr")] = 3e-4;
 *
 *     pyopt_row row = PYOPT_ROW;                     one for each tensor
 *     row.rule = adam;
 *     row.n = n;
 *     row.parameter.data = p;  row.gradient.data = g;  row.state[0].data = m;  row.state[1].data = v;
 *     pyopt_plan *plan;
 *     pyopt->create(&row, 1, 0, &plan, message, sizeof message);
 *
 *     pyopt_slot slot = PYOPT_SLOT;
 *     slot.options = options;
 *     for (slot.step = 1; ...; slot.step++) {
 *         ...                                        gradients into g
 *         pyopt->step(plan, &slot, 1, threads, message, sizeof message);
 *     }
 *     pyopt->destroy(plan);
 *
 * All buffers are the caller's; states begin with what the query says, mostly zeros. A function that can fail returns
 * PYOPT_OK or a status below 0, and writes what is wrong to `message` (NULL for none), cut to `size` bytes with its
 * final 0; nothing has changed then. No function aborts, throws, prints or touches Python: with or without the GIL,
 * from any thread. What can end the process is OpenMP's runtime, where it has no memory for the threads of a `step`: not
 * in one thread, and not in threads of the caller's.
 *
 * A plan is used by one thread at a time, but for `run` and `sum`: a `step` or `prepare` of a plan that is in one
 * returns PYOPT_INVALID. `destroy` comes when all others are done. After a fork the child may use the plans that no
 * thread was using, in one thread; a step that it asks more for runs in one.
 *
 * In threads of the caller's own, instead of `step`: `prepare` once; `sum` over all chunks and then `combine` where
 * has_sums(plan); `run` over all chunks. Ranges of chunks may be run in any order, on any threads, without a barrier
 * inside; what must lie between the three is that all chunks are done. A chunk that is run twice is stepped twice, one
 * that is left out not at all. Before the first `prepare` they do nothing, and ranges are cut to the chunks that there
 * are. The result is the same, bit for bit, for every division into ranges, every number of threads, and every
 * floating-point mode of theirs: that of the optimizer in Python. They need 64 KiB of stack.
 *
 * Rows are dense, and a step needs no more of a tensor than sums over its elements. So there is no Muon, MuonAdamW and
 * Adafactor (products and sums along the axes of matrices, in several passes), no LBFGS (which asks for the loss
 * again), and none of the optimizers for gradients of rows.
 *
 * Versions: the capsule's name holds the major one. Within it functions and fields are only ever appended; a struct
 * begins with its size, as the caller knows it. What is marked "1.1" came with that minor version.
 */

#ifndef PYOPT_H
#define PYOPT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PYOPT_MAJOR 1
#define PYOPT_MINOR 1
#define PYOPT_CAPSULE "pyopt.c_api_v1"

#define PYOPT_STATES 4        /* streams of state, at most */
#define PYOPT_MOST_OPTIONS 32 /* of one rule */
#define PYOPT_MOST_KEPT 4     /* numbers that a rule keeps from step to step */

enum { PYOPT_OK = 0, PYOPT_INVALID = -1, PYOPT_NO_MEMORY = -2 };

/* How the elements of a stream lie in memory, each stream of a row by itself. A rule computes in float32, and in
 * float64 where all streams of the row are float64: that goes with nothing else. What is stored in another type is
 * rounded once, to nearest even. What a dtype keeps beside the elements is in memory of its own: see pyopt_row. */
enum {
    PYOPT_FLOAT32 = 0,
    PYOPT_FLOAT64 = 1,
    /* 1.1 */
    PYOPT_BFLOAT16 = 2,
    PYOPT_FLOAT16 = 3,
    /* Parameters that keep what rounding would take from them, for steps smaller than their precision; n elements of 16
     * bits beside them, at first 0. */
    PYOPT_BFLOAT16_SPLIT = 4, /* int16: the lower half of a float32 with the bits (p << 16) + low */
    PYOPT_BFLOAT16_KAHAN = 5, /* bfloat16: what rounding has taken, which is added before the next step */
    PYOPT_FLOAT16_KAHAN = 6,  /* the same in float16 */
    /* Parameters that are rounded up or down by chance, so that the mean is right; nothing beside them. The bits follow
     * from the slot's seed and rounding_step, the row's place, and the element. */
    PYOPT_BFLOAT16_STOCHASTIC = 7,
    PYOPT_FLOAT16_STOCHASTIC = 8,
    /* States of a byte for each element, the place of a number in a map of 256 (bitsandbytes'), and beside them a
     * float32 for each 256 elements: their largest magnitude. Which of the two a state may have the query says. */
    PYOPT_SIGNED_8BIT = 9,    /* at first 127 for 0, and 0 beside */
    PYOPT_UNSIGNED_8BIT = 10, /* at first 0, and 0 beside */
    PYOPT_DTYPES = 11         /* how many there are */
};

/* --- the query ----------------------------------------------------------------------------------------------------- */

/* A hyper-parameter: as the optimizer in Python names it, a pair's as "betas[0]". A flag is 0 or 1; NaN is None. */
typedef struct pyopt_option {
    const char *name;
    double usual; /* its default */
    int32_t check;  /* the library's own */
} pyopt_option;

/* A stream of state, one element for each of the parameter. */
typedef struct pyopt_state {
    const char *name;
    int32_t needed_by; /* the option that must not be 0 for the stream to be needed; -1: always */
    int32_t initial;   /* the option that it is filled with at first; -1: 0 */
} pyopt_state;

/* A number that a rule keeps for a slot from step to step. */
typedef struct pyopt_kept {
    const char *name;
    int32_t initial; /* the option that it is at first; -1: `value` */
    double value;
} pyopt_kept;

typedef struct pyopt_rule {
    size_t size;
    const char *name; /* the optimizer's: "Adam" */
    int32_t n_states, n_options, n_kept;
    const pyopt_state *states;
    const pyopt_option *options;
    const pyopt_kept *kept;
    /* 1.1: of the parameter, the gradient and each state: the bit 1u << dtype of each that it may have. */
    const uint32_t *dtypes;
} pyopt_rule;

/* --- a step -------------------------------------------------------------------------------------------------------- */

typedef struct pyopt_stream {
    void *data;
    int32_t dtype; /* PYOPT_FLOAT32 and so on */
} pyopt_stream;

/* A tensor. The parameter and its states are written, and what lies beside them; the gradient is only read. Memory is
 * dense, in an order that is the same in all streams, aligned to its elements; what is written overlaps nothing else.
 * In C order where a state is in 8 bits, as in Python: there its groups of 256 are counted so. */
typedef struct pyopt_row {
    size_t size;
    int64_t n;    /* elements, >= 0 */
    int32_t rule; /* by find_rule */
    int32_t slot; /* whose options it takes, >= 0; rows of one slot have one rule */
    pyopt_stream parameter, gradient;
    pyopt_stream state[PYOPT_STATES]; /* in the order of the query; data == NULL where the options need none */
    /* 1.1 */
    void *beside[1 + PYOPT_STATES]; /* what the parameter's dtype, and each state's, keeps beside; NULL for nothing */
    int64_t place; /* of the parameter among all of the optimizer, for chance; -1: the row's number in the plan */
} pyopt_row;

/* What the rows of one slot do in one step. */
typedef struct pyopt_slot {
    size_t size;
    int64_t step;           /* the number of this step, from 1 to 2**52 */
    double gradient_factor; /* what gradients count times: 1, or 1 / n for the sums of n batches */
    const double *options;  /* in the order of the query */
    double *kept;           /* in the order of the query, written by a step; NULL for a rule that keeps none */
    /* 1.1, for rows that are rounded by chance */
    uint64_t seed;
    int64_t rounding_step; /* how often they have been before, up to 2**52; -1: step - 1 */
} pyopt_slot;

static const pyopt_row PYOPT_ROW = {sizeof(pyopt_row), 0, 0, 0, {NULL, 0}, {NULL, 0},
                                    {{NULL, 0}, {NULL, 0}, {NULL, 0}, {NULL, 0}}, {NULL, NULL, NULL, NULL, NULL}, -1};
static const pyopt_slot PYOPT_SLOT = {sizeof(pyopt_slot), 1, 1.0, NULL, NULL, 0, -1};

typedef struct pyopt_plan pyopt_plan;

enum { PYOPT_UNCHECKED = 1 }; /* for `create`: do not look for overlaps, the caller knows that there are none */

/* --- the table of functions ---------------------------------------------------------------------------------------- */

typedef struct pyopt_functions {
    size_t size;
    int32_t major, minor;

    /* How many rules there are, and what one of them is like; NULL for none. Rules are numbered from 0; by their numbers
     * within one process, by their names in between. */
    int (*count_rules)(void);
    const pyopt_rule *(*rule)(int rule);
    /* The number of a rule, of an option by name; -1 for none. */
    int (*find_rule)(const char *name);
    int (*find_option)(int rule, const char *name);
    /* Write the defaults of all options; what a state is filled with at first; what the kept numbers are at first, both
     * by the defaults where options == NULL. */
    void (*fill_defaults)(int rule, double *options);
    double (*initial_state)(int rule, int state, const double *options);
    void (*fill_kept)(int rule, const double *options, double *kept);

    /* Make a plan for `count` rows, which are copied: their streams must stay where they are as long as it is run. */
    int (*create)(const pyopt_row *rows, size_t count, int flags, pyopt_plan **plan, char *message, size_t size);
    void (*destroy)(pyopt_plan *plan);

    /* One step of all rows, on at most so many threads of OpenMP's; of which few are used where more do not pay. */
    int (*step)(pyopt_plan *plan, const pyopt_slot *slots, size_t count, int threads, char *message, size_t size);

    /* The same in the caller's threads: see above. `prepare` checks and advances the numbers that slots keep; those
     * that follow from sums `combine` writes, to where `prepare` has read them. */
    int (*prepare)(pyopt_plan *plan, const pyopt_slot *slots, size_t count, char *message, size_t size);
    int64_t (*chunks)(const pyopt_plan *plan);
    int (*has_sums)(const pyopt_plan *plan);
    void (*sum)(pyopt_plan *plan, int64_t first, int64_t last);
    void (*combine)(pyopt_plan *plan, const pyopt_slot *slots);
    void (*run)(pyopt_plan *plan, int64_t first, int64_t last);
} pyopt_functions;

#if defined(Py_PYTHON_H) && !defined(PYOPT_LIBRARY)
/* The table, by the capsule of the installed package; NULL with an ImportError set. With the GIL, once. */
static inline const pyopt_functions *pyopt_api(void) {
    const pyopt_functions *found = (const pyopt_functions *)PyCapsule_Import(PYOPT_CAPSULE, 0);
    if (found != NULL && (found->size < sizeof(pyopt_functions) || found->minor < PYOPT_MINOR)) {
        PyErr_Format(PyExc_ImportError, "this needs the C functions of pyopt in version %d.%d or later, found %d.%d",
                     PYOPT_MAJOR, PYOPT_MINOR, (int)found->major, (int)found->minor);
        return NULL;
    }
    return found;
}
#else
/* The table, in libpyopt. */
const pyopt_functions *pyopt_api(void);
#endif

#ifdef __cplusplus
}
#endif

#endif
