/* What a caller in C sees of the door, in C99 and in C++: check_door returns NULL or the line that is wrong. */

#include <math.h>
#include <pthread.h>
#include <pyopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

#define N 50001
#define TEXT(x) #x
#define LINE(x) TEXT(x)
#define CHECK(condition) \
    do { \
        if (!(condition)) return "line " LINE(__LINE__) ": " #condition; \
    } while (0)

#ifdef __cplusplus
extern "C"
#endif
const char *check_door(const pyopt_functions *pyopt);

static float p[3][N], g[N], m[3][N], v[3][N];

static pyopt_row row_of(int rule, int copy) {
    pyopt_row row = PYOPT_ROW;
    row.rule = rule;
    row.n = N;
    row.parameter.data = p[copy];
    row.gradient.data = g;
    row.state[0].data = m[copy];
    row.state[1].data = v[copy];
    return row;
}

/* Adam in three ways: in one thread, in several of ours, and in ranges of chunks from the last to the first. */
static const char *check_adam(const pyopt_functions *pyopt) {
    double options[PYOPT_MOST_OPTIONS];
    char message[200] = "";
    pyopt_plan *plans[3];
    pyopt_slot slot = PYOPT_SLOT;
    pyopt_row row;
    int adam = pyopt->find_rule("Adam"), copy, i;
    int64_t chunk;
    CHECK(adam >= 0);
    pyopt->fill_defaults(adam, options);
    options[pyopt->find_option(adam, "lr")] = 0.125;
    slot.options = options;
    for (copy = 0; copy < 3; copy++) {
        for (i = 0; i < N; i++) p[copy][i] = (float)sin(0.1 * i);
        memset(m[copy], 0, sizeof m[copy]);
        memset(v[copy], 0, sizeof v[copy]);
        row = row_of(adam, copy);
        CHECK(pyopt->create(&row, 1, 0, &plans[copy], message, sizeof message) == PYOPT_OK);
    }
    for (slot.step = 1; slot.step <= 10; slot.step++) {
        for (i = 0; i < N; i++) g[i] = (float)cos(0.3 * i + (double)slot.step);
        CHECK(pyopt->step(plans[0], &slot, 1, 1, message, sizeof message) == PYOPT_OK);
        CHECK(pyopt->step(plans[1], &slot, 1, 3, message, sizeof message) == PYOPT_OK);
        CHECK(pyopt->prepare(plans[2], &slot, 1, message, sizeof message) == PYOPT_OK);
        CHECK(!pyopt->has_sums(plans[2]));
        for (chunk = pyopt->chunks(plans[2]); chunk-- > 0;) pyopt->run(plans[2], chunk, chunk + 1);
        pyopt->run(plans[2], -5, 0); /* nothing */
        pyopt->run(plans[2], pyopt->chunks(plans[2]), 1000);
    }
    for (copy = 1; copy < 3; copy++) {
        CHECK(memcmp(p[0], p[copy], sizeof p[0]) == 0);
        CHECK(memcmp(m[0], m[copy], sizeof m[0]) == 0 && memcmp(v[0], v[copy], sizeof v[0]) == 0);
    }
    /* The first step is lr in the direction of the gradient's sign, near enough; ten are no more than ten of them. */
    for (i = 0; i < N; i++) CHECK(fabs(p[0][i] - (float)sin(0.1 * i)) <= 1.5);

    options[0] = -1;
    memcpy(p[1], p[0], sizeof p[0]);
    CHECK(pyopt->step(plans[0], &slot, 1, 1, message, sizeof message) == PYOPT_INVALID);
    CHECK(strcmp(message, "slot 0: lr == -1, must be >= 0") == 0);
    CHECK(memcmp(p[0], p[1], sizeof p[0]) == 0);
    for (copy = 0; copy < 3; copy++) pyopt->destroy(plans[copy]);
    return NULL;
}

/* Every rule by its query alone: memory for what it asks for, one step, everything finite. */
static const char *check_every_rule(const pyopt_functions *pyopt) {
    int rule, j, i;
    for (rule = 0; rule < pyopt->count_rules(); rule++) {
        const pyopt_rule *about = pyopt->rule(rule);
        double options[PYOPT_MOST_OPTIONS], kept[PYOPT_MOST_KEPT];
        double *state[PYOPT_STATES], parameter[100], gradient[100];
        pyopt_row row = PYOPT_ROW;
        pyopt_slot slot = PYOPT_SLOT;
        pyopt_plan *plan;
        char message[200];
        CHECK(about->n_states <= PYOPT_STATES && about->n_options <= PYOPT_MOST_OPTIONS);
        CHECK(about->n_kept <= PYOPT_MOST_KEPT && pyopt->find_rule(about->name) == rule);
        pyopt->fill_defaults(rule, options);
        pyopt->fill_kept(rule, options, kept);
        row.rule = rule;
        row.n = 100;
        row.parameter.data = parameter;
        row.gradient.data = gradient;
        row.parameter.dtype = row.gradient.dtype = PYOPT_FLOAT64;
        for (i = 0; i < 100; i++) parameter[i] = 1, gradient[i] = i - 50.5;
        for (j = 0; j < about->n_states; j++) {
            state[j] = (double *)malloc(100 * sizeof(double));
            for (i = 0; i < 100; i++) state[j][i] = pyopt->initial_state(rule, j, options);
            row.state[j].data = state[j];
            row.state[j].dtype = PYOPT_FLOAT64;
        }
        slot.options = options;
        slot.kept = kept;
        CHECK(pyopt->create(&row, 1, 0, &plan, message, sizeof message) == PYOPT_OK);
        CHECK(pyopt->step(plan, &slot, 1, 2, message, sizeof message) == PYOPT_OK);
        slot.step++;
        CHECK(pyopt->step(plan, &slot, 1, 2, message, sizeof message) == PYOPT_OK);
        for (i = 0; i < 100; i++) CHECK(isfinite(parameter[i]));
        CHECK(parameter[0] != 1);
        pyopt->destroy(plan);
        for (j = 0; j < about->n_states; j++) free(state[j]);
    }
    return NULL;
}

/* A thread that flushes denormals, as many numerical libraries' do, gets the same bits, and its mode back. */
static const char *check_mode(const pyopt_functions *pyopt) {
#ifdef __SSE2__
    float parameter[1] = {1e-40f}, gradient[1] = {3e-40f};
    double options[PYOPT_MOST_OPTIONS];
    pyopt_row row = PYOPT_ROW;
    pyopt_slot slot = PYOPT_SLOT;
    pyopt_plan *plan;
    char message[200];
    unsigned int flushing = _mm_getcsr() | 0x8040, after;
    _mm_setcsr(flushing);
    after = _mm_getcsr();
    _mm_setcsr(0x1f80);
    if ((after & 0x8040) != 0x8040) return NULL; /* under valgrind, which cannot flush */
    row.rule = pyopt->find_rule("SGD");
    row.n = 1;
    row.parameter.data = parameter;
    row.gradient.data = gradient;
    pyopt->fill_defaults(row.rule, options);
    options[0] = 1;
    slot.options = options;
    CHECK(pyopt->create(&row, 1, 0, &plan, message, sizeof message) == PYOPT_OK);
    CHECK(pyopt->prepare(plan, &slot, 1, message, sizeof message) == PYOPT_OK);
    _mm_setcsr(flushing);
    pyopt->run(plan, 0, 1);
    after = _mm_getcsr();
    _mm_setcsr(0x1f80);
    CHECK((after & 0xffc0) == (flushing & 0xffc0));
    CHECK(parameter[0] == 1e-40f - 3e-40f && parameter[0] != 0);
    pyopt->destroy(plan);
#else
    (void)pyopt;
#endif
    return NULL;
}

static void *check_adam_in_thread(void *place) {
    const void **both = (const void **)place;
    both[1] = check_adam((const pyopt_functions *)both[0]);
    return NULL;
}

/* A thread that Python has never seen, while this one may hold the GIL: neither waits for the other. */
static const char *check_foreign_thread(const pyopt_functions *pyopt) {
    const void *both[2] = {pyopt, NULL};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, check_adam_in_thread, both) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    return (const char *)both[1];
}

const char *check_door(const pyopt_functions *pyopt) {
    const char *wrong;
    CHECK(pyopt != NULL && pyopt->size >= sizeof(pyopt_functions));
    CHECK(pyopt->major == PYOPT_MAJOR && pyopt->minor >= PYOPT_MINOR);
    if ((wrong = check_adam(pyopt)) != NULL || (wrong = check_every_rule(pyopt)) != NULL) return wrong;
    if ((wrong = check_mode(pyopt)) != NULL) return wrong;
    return check_foreign_thread(pyopt);
}

#ifdef WITH_MAIN
int main(void) {
    const char *wrong = check_door(pyopt_api());
    if (wrong != NULL) fprintf(stderr, "%s\n", wrong);
    return wrong != NULL;
}
#endif
