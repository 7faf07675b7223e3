/* The C door in bad hands: every call gives a status and a message that names the thing, its value and what was
 * expected, and nothing has changed. The exit status is 0, or the first line that is wrong is printed. Linked with
 * -Wl,--wrap=malloc,--wrap=calloc,--wrap=free: here memory runs out when it is told to. */

#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <pyopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define N 50000 /* so many that three threads share them */
#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "line %d: %s; the message is \"%s\"\n", __LINE__, #condition, message); \
            exit(1); \
        } \
    } while (0)
#define REFUSES(call, expected) \
    do { \
        memset(message, 'x', sizeof message); \
        CHECK((call) == PYOPT_INVALID); \
        CHECK(strstr(message, expected) == message); \
        check_unchanged(); \
    } while (0)

static const pyopt_functions *pyopt;
static char message[300];
static float p[N], g[N], m[N], v[N], before[3][N];
static double options[PYOPT_MOST_OPTIONS], kept[PYOPT_MOST_KEPT], kept_before[PYOPT_MOST_KEPT];
static pyopt_row row;
static pyopt_slot slot;

/* --- memory that runs out ----------------------------------------------------------------------------------------- */

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void __real_free(void *block);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void __wrap_free(void *block);

static long left = -1, live = 0; /* how many more blocks there are, -1 for all; how many are in use */

static int runs_out(void) {
    if (left == 0) return 1;
    left -= left > 0;
    return 0;
}

void *__wrap_malloc(size_t size) {
    void *block = runs_out() ? NULL : __real_malloc(size);
    live += block != NULL;
    return block;
}

void *__wrap_calloc(size_t count, size_t size) {
    void *block = runs_out() ? NULL : __real_calloc(count, size);
    live += block != NULL;
    return block;
}

void __wrap_free(void *block) {
    live -= block != NULL;
    __real_free(block);
}

/* --- one row of Adam that is right -------------------------------------------------------------------------------- */

static void begin(const char *rule) {
    int i;
    row = PYOPT_ROW;
    slot = PYOPT_SLOT;
    row.rule = pyopt->find_rule(rule);
    row.n = N;
    row.parameter.data = p;
    row.gradient.data = g;
    row.state[0].data = m;
    row.state[1].data = v;
    if (pyopt->rule(row.rule)->n_states == 1) row.state[1].data = NULL;
    for (i = 0; i < N; i++) p[i] = (float)sin(i), g[i] = (float)cos(i), m[i] = v[i] = 0;
    pyopt->fill_defaults(row.rule, options);
    pyopt->fill_kept(row.rule, options, kept);
    slot.options = options;
    slot.kept = kept;
}

static void remember(void) {
    memcpy(before[0], p, sizeof p);
    memcpy(before[1], m, sizeof m);
    memcpy(before[2], v, sizeof v);
    memcpy(kept_before, kept, sizeof kept);
}

static void check_unchanged(void) {
    CHECK(memcmp(before[0], p, sizeof p) == 0 && memcmp(before[1], m, sizeof m) == 0);
    CHECK(memcmp(before[2], v, sizeof v) == 0 && memcmp(kept_before, kept, sizeof kept) == 0);
}

static pyopt_plan *make(void) {
    pyopt_plan *plan = NULL;
    CHECK(pyopt->create(&row, 1, 0, &plan, message, sizeof message) == PYOPT_OK && plan != NULL);
    return plan;
}

/* `create` refuses the row as it now is, and leaves the place of the plan alone. */
static void refuses_row(const char *expected) {
    pyopt_plan *plan = (pyopt_plan *)message;
    REFUSES(pyopt->create(&row, 1, 0, &plan, message, sizeof message), expected);
    CHECK(plan == (pyopt_plan *)message);
}

/* --- the query ---------------------------------------------------------------------------------------------------- */

static void check_query(void) {
    double values[PYOPT_MOST_OPTIONS] = {7}, numbers[PYOPT_MOST_KEPT] = {7};
    int rules = pyopt->count_rules(), asgd = pyopt->find_rule("ASGD"), rprop = pyopt->find_rule("Rprop"), i;
    const int wrong[] = {-1, rules, 1 << 30, -(1 << 30)};
    CHECK(pyopt->find_rule(NULL) == -1 && pyopt->find_rule("") == -1 && pyopt->find_option(asgd, NULL) == -1);
    for (i = 0; i < 4; i++) {
        CHECK(pyopt->rule(wrong[i]) == NULL && pyopt->find_option(wrong[i], "lr") == -1);
        pyopt->fill_defaults(wrong[i], values);
        pyopt->fill_kept(wrong[i], values, numbers);
        CHECK(values[0] == 7 && numbers[0] == 7 && pyopt->initial_state(wrong[i], 0, values) == 0);
        CHECK(pyopt->initial_state(rprop, i == 0 ? -1 : 4 + i, values) == 0);
    }
    pyopt->fill_defaults(asgd, NULL);
    pyopt->fill_kept(asgd, NULL, NULL);
    pyopt->fill_kept(asgd, NULL, numbers); /* by the defaults */
    CHECK(numbers[0] == 0.01 && numbers[1] == 1 && pyopt->initial_state(rprop, 1, NULL) == 0.01);
}

/* --- create ------------------------------------------------------------------------------------------------------- */

static void check_create(void) {
    pyopt_plan *plan = NULL;
    pyopt_row rows[3];
    const pyopt_row *displaced;
    char bytes[sizeof(pyopt_row) + 8];
    const size_t sizes[] = {0, 1, 119, 121, 4104, (size_t)-1, (size_t)-8};
    const int64_t lengths[] = {-1, INT64_MIN, ((int64_t)1 << 56) + 1, INT64_MAX};
    const char *const aliases[] = {"row 0: its exp_avg overlaps the parameter of row 0, must have memory of its own",
                                   "row 0: its parameter overlaps the exp_avg of row 0, must have memory of its own"};
    char expected[200];
    size_t i;
    begin("Adam");
    remember();
    REFUSES(pyopt->create(NULL, 1, 0, &plan, message, sizeof message), "rows is NULL, must be an address");
    REFUSES(pyopt->create(&row, 1, 0, NULL, message, sizeof message), "plan is NULL, must be an address");
    REFUSES(pyopt->create(&row, (size_t)-1, 0, &plan, message, sizeof message),
            "count == 18446744073709551615 rows, must be <= 2**56");
    REFUSES(pyopt->create(&row, 1, 2, &plan, message, sizeof message), "flags == 2, must be 0 or PYOPT_UNCHECKED, 1");
    memcpy(bytes + 4, &row, sizeof row);
    displaced = (const pyopt_row *)(const void *)(bytes + 4);
    REFUSES(pyopt->create(displaced, 1, 0, &plan, message, sizeof message), "rows is at 0x");
    for (i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        row.size = sizes[i];
        snprintf(expected, sizeof expected, "row 0: size == %zu, must be sizeof(pyopt_row), %zu", sizes[i], sizeof row);
        refuses_row(expected);
    }
    row.size = sizeof row;
    rows[0] = rows[1] = rows[2] = row;
    rows[2].size += 8;
    REFUSES(pyopt->create(rows, 3, PYOPT_UNCHECKED, &plan, message, sizeof message), "row 2: size == ");
    for (i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        row.n = lengths[i];
        snprintf(expected, sizeof expected, "row 0: n == %lld, must be >= 0 and <= 2**56", (long long)lengths[i]);
        refuses_row(expected);
    }
    row.n = (int64_t)1 << 55;
    rows[0] = rows[1] = rows[2] = row;
    REFUSES(pyopt->create(rows, 3, PYOPT_UNCHECKED, &plan, message, sizeof message),
            "row 2: n == 36028797018963968 with 72057594037927936 in the rows before it, must be <= 2**56 together");
    CHECK(pyopt->create(rows, 2, PYOPT_UNCHECKED, &plan, message, sizeof message) == PYOPT_OK);
    CHECK(pyopt->chunks(plan) == ((int64_t)1 << 42) + 1); /* counted, never run */
    pyopt->destroy(plan);

    begin("Adam");
    row.rule = -1;
    refuses_row("row 0: rule == -1, must be one that find_rule returned");
    row.rule = INT32_MAX;
    refuses_row("row 0: rule == 2147483647, must be one that find_rule returned");
    begin("Adam");
    row.slot = INT32_MIN;
    refuses_row("row 0: slot == -2147483648, must be >= 0");
    row.slot = INT32_MAX;
    refuses_row("slot == 2147483647 of a row, must be below the number of rows, 1");
    begin("Adam");
    row.parameter.dtype = INT32_MAX;
    refuses_row("row 0: dtype == 2147483647 of its parameter, must be one of PYOPT_FLOAT32 (0), PYOPT_FLOAT64 (1), ");
    row.parameter.dtype = PYOPT_FLOAT64;
    refuses_row("row 0: dtype == 0 of its gradient, must be one of PYOPT_FLOAT64 (1)");
    begin("Adam");
    row.parameter.data = NULL;
    refuses_row("row 0: its parameter is NULL, must be an address");
    begin("Adam");
    row.gradient.data = NULL;
    refuses_row("row 0: its gradient is NULL, must be an address");
    begin("Adam");
    row.state[0].data = (char *)m + 2;
    refuses_row("row 0: its exp_avg is at 0x");
    CHECK(strstr(message, "must be aligned to 4 bytes"));
    begin("Adam");
    row.state[3].data = m;
    refuses_row("row 0: it has state 3, but Adam has 3");
    for (i = 0; i < 2; i++) { /* aliases: everything that is written, from before and from behind */
        begin("Adam");
        if (i == 0) row.n = N - 1, row.state[0].data = p + 1;
        else row.n = N - 1, row.state[0].data = p, row.parameter.data = p + 1;
        refuses_row(aliases[i]);
    }
    begin("Adam");
    row.state[1].data = m;
    refuses_row("row 0: its exp_avg");
    begin("Adam");
    row.gradient.data = p;
    refuses_row("row 0: its ");

    begin("Adam"); /* nothing to step */
    row.n = 0;
    row.parameter.data = row.gradient.data = row.state[0].data = row.state[1].data = NULL;
    for (i = 0; i < PYOPT_SIGNED_8BIT; i++) {
        row.parameter.dtype = (int32_t)i;
        plan = make();
        CHECK(pyopt->step(plan, &slot, 1, 3, message, sizeof message) == PYOPT_OK);
        pyopt->destroy(plan);
    }
    CHECK(pyopt->create(NULL, 0, 0, &plan, message, sizeof message) == PYOPT_OK && pyopt->chunks(plan) == 0);
    CHECK(pyopt->step(plan, NULL, 0, 3, message, sizeof message) == PYOPT_OK);
    pyopt->destroy(plan);
}

/* --- a step ------------------------------------------------------------------------------------------------------- */

static int both(pyopt_plan *plan, const pyopt_slot *slots, size_t count) {
    char other[sizeof message];
    int status = pyopt->step(plan, slots, count, 3, message, sizeof message);
    memset(other, 'x', sizeof other);
    CHECK(pyopt->prepare(plan, slots, count, other, sizeof other) == status && strcmp(message, other) == 0);
    return status;
}

static void check_step(void) {
    pyopt_plan *plan;
    char bytes[sizeof(pyopt_slot) + 8], short_message[3] = "xx";
    double misplaced[PYOPT_MOST_OPTIONS + 1], nan = 0.0 / 0.0, inf = 1.0 / 0.0;
    const double wrong[] = {0.0 / 0.0, 1.0 / 0.0, -1.0 / 0.0, -1, -5e-324, 1e300};
    const size_t sizes[] = {0, 1, 39, 41, 4104, (size_t)-1};
    const int64_t steps[] = {0, -1, INT64_MIN, ((int64_t)1 << 52) + 1, ((int64_t)1 << 53) + 1, INT64_MAX};
    char expected[200];
    size_t i;
    int j;
    begin("Adam");
    plan = make();
    CHECK(pyopt->step(plan, &slot, 1, 1, message, sizeof message) == PYOPT_OK);
    remember();
    REFUSES(both(NULL, &slot, 1), "plan is NULL, must be an address");
    REFUSES(both(plan, NULL, 1), "slots is NULL, must be an address");
    REFUSES(both(plan, &slot, 0), "count == 0 slots, must be 1: the rows have slots up to 0");
    memcpy(bytes + 4, &slot, sizeof slot);
    REFUSES(both(plan, (const pyopt_slot *)(const void *)(bytes + 4), 1), "slots is at 0x");
    REFUSES(pyopt->step(plan, &slot, 1, 0, message, sizeof message), "threads == 0, must be >= 1");
    REFUSES(pyopt->step(plan, &slot, 1, -3, message, sizeof message), "threads == -3, must be >= 1");
    for (i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        slot.size = sizes[i];
        snprintf(expected, sizeof expected, "slot 0: size == %zu, must be sizeof(pyopt_slot), %zu", sizes[i],
                 sizeof slot);
        REFUSES(both(plan, &slot, 1), expected);
    }
    slot.size = sizeof slot;
    for (i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        slot.step = steps[i];
        snprintf(expected, sizeof expected, "slot 0: step == %lld, must be >= 1 and <= 2**52", (long long)steps[i]);
        REFUSES(both(plan, &slot, 1), expected);
    }
    slot.step = 2;
    slot.gradient_factor = nan;
    REFUSES(both(plan, &slot, 1), "slot 0: gradient_factor == ");
    slot.gradient_factor = -inf;
    REFUSES(both(plan, &slot, 1), "slot 0: gradient_factor == -inf, must be finite");
    slot.gradient_factor = 1;
    slot.options = NULL;
    REFUSES(both(plan, &slot, 1), "slot 0: its options is NULL, must be an address");
    memcpy((char *)misplaced + 4, options, sizeof options);
    slot.options = (const double *)(const void *)((char *)misplaced + 4);
    REFUSES(both(plan, &slot, 1), "slot 0: its options is at 0x");
    slot.options = options;
    for (j = 0; j < pyopt->rule(row.rule)->n_options; j++) { /* of each option what no option may be */
        double right = options[j];
        for (i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
            options[j] = wrong[i];
            snprintf(expected, sizeof expected, "slot 0: %s == ", pyopt->rule(row.rule)->options[j].name);
            REFUSES(both(plan, &slot, 1), expected);
        }
        options[j] = right;
    }
    for (i = 0; i < 3; i++) { /* messages without room, and of one byte */
        memcpy(short_message, "xx", 3);
        CHECK(pyopt->step(plan, &slot, 1, 0, i == 2 ? NULL : short_message, i) == PYOPT_INVALID);
        CHECK(strcmp(short_message, i == 1 ? "" : "xx") == 0 && short_message[1] == 'x');
        memcpy(short_message, "xx", 3);
        CHECK(pyopt->prepare(plan, NULL, 1, i == 2 ? NULL : short_message, i) == PYOPT_INVALID);
        CHECK(strcmp(short_message, i == 1 ? "" : "xx") == 0 && short_message[1] == 'x');
    }
    check_unchanged();
    pyopt->destroy(plan);

    begin("NAdam");
    plan = make();
    remember();
    slot.kept = NULL;
    REFUSES(both(plan, &slot, 1), "slot 0: its kept is NULL, must be an address");
    slot.kept = (double *)(void *)((char *)misplaced + 4);
    REFUSES(both(plan, &slot, 1), "slot 0: its kept is at 0x");
    pyopt->destroy(plan);
}

/* --- chunks ------------------------------------------------------------------------------------------------------- */

static void check_chunks(void) {
    const int64_t far[] = {INT64_MIN, -1, 0, 4, 5, INT64_MAX}; /* there are 4 */
    pyopt_plan *plan;
    size_t i, j;
    pyopt->run(NULL, 0, 1);
    pyopt->sum(NULL, 0, 1);
    pyopt->combine(NULL, NULL);
    pyopt->destroy(NULL);
    CHECK(pyopt->chunks(NULL) == 0 && pyopt->has_sums(NULL) == 0);
    begin("LAMB");
    plan = make();
    remember();
    CHECK(pyopt->chunks(plan) == 4);
    pyopt->run(plan, 0, 4); /* nothing has been prepared */
    pyopt->sum(plan, 0, 4);
    pyopt->combine(plan, NULL);
    check_unchanged();
    CHECK(pyopt->prepare(plan, &slot, 1, message, sizeof message) == PYOPT_OK && pyopt->has_sums(plan));
    for (i = 0; i < 6; i++) {
        for (j = 0; j < 6; j++) { /* backward, and beyond the ends */
            if (far[i] < 4 && far[j] > 0 && far[i] < far[j]) continue;
            pyopt->sum(plan, far[i], far[j]);
            pyopt->run(plan, far[i], far[j]);
        }
    }
    check_unchanged();
    pyopt->sum(plan, INT64_MIN, INT64_MAX); /* cut to what there is */
    pyopt->combine(plan, NULL);
    pyopt->run(plan, INT64_MIN, INT64_MAX);
    remember();
    pyopt->destroy(plan);
    begin("LAMB");
    plan = make();
    CHECK(pyopt->step(plan, &slot, 1, 1, message, sizeof message) == PYOPT_OK);
    check_unchanged();
    pyopt->destroy(plan);

    begin("SGD"); /* twice is two steps */
    plan = make();
    CHECK(pyopt->prepare(plan, &slot, 1, message, sizeof message) == PYOPT_OK);
    pyopt->run(plan, 0, 4);
    pyopt->run(plan, 0, 4);
    remember();
    begin("SGD");
    for (i = 0; i < 2; i++) CHECK(pyopt->step(plan, &slot, 1, 1, message, sizeof message) == PYOPT_OK);
    check_unchanged();
    pyopt->destroy(plan);
}

/* --- anything at all ---------------------------------------------------------------------------------------------- */

static uint64_t seed = 1;

static int draw(int n) { /* xorshift */
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (int)(seed % (uint64_t)n);
}

/* Memory of its own for each place of each row, at times none, or displaced, or that of another. */
static void *draw_place(int k, int place) {
    static double memory[3][11][500];
    if (draw(12) == 0) return draw(3) ? NULL : (char *)memory[k][place] + draw(8);
    return memory[draw(40) ? k : draw(3)][draw(40) ? place : draw(11)];
}

/* Rows and slots of random fields, most of them right: what is accepted runs, whatever it is; all else is refused. */
static void check_anything(void) {
    const int64_t lengths[] = {0, 1, 255, 256, 257, 500, -1, INT64_MAX};
    const size_t row_sizes[] = {sizeof(pyopt_row), offsetof(pyopt_row, beside), sizeof(pyopt_row) - 8, 8};
    const size_t slot_sizes[] = {sizeof(pyopt_slot), offsetof(pyopt_slot, seed), sizeof(pyopt_slot) - 8, 8};
    double all_options[3][PYOPT_MOST_OPTIONS], all_kept[3][PYOPT_MOST_KEPT];
    pyopt_row rows[3];
    pyopt_slot slots[3];
    pyopt_plan *plan;
    long made = 0, stepped = 0;
    int round, k, j, status;
    for (round = 0; round < 20000; round++) {
        int count = 1 + draw(3), rule = draw(pyopt->count_rules()), floats = draw(4) ? 2 : draw(2);
        size_t row_size = row_sizes[draw(30) ? 0 : draw(4)], slot_size = slot_sizes[draw(30) ? 0 : draw(4)];
        for (k = 0; k < count; k++) {
            pyopt_row one = PYOPT_ROW;
            one.size = row_size;
            one.n = lengths[draw(draw(20) ? 6 : 8)];
            one.rule = draw(60) ? rule : draw(40) - 5;
            one.slot = draw(10) ? 0 : draw(4) - 1;
            one.parameter.data = draw_place(k, 0);
            one.gradient.data = draw_place(k, 1);
            one.parameter.dtype = floats < 2 ? floats : draw(10);
            one.gradient.dtype = floats < 2 ? floats : draw(3) + (draw(3) > 0);
            one.beside[0] = one.parameter.dtype >= 4 && one.parameter.dtype < 7 ? draw_place(k, 2) : NULL;
            for (j = 0; j < PYOPT_STATES; j++) {
                if (j < pyopt->rule(rule)->n_states) one.state[j].data = draw_place(k, 3 + j);
                one.state[j].dtype = floats < 2 ? floats : draw(8) ? 2 + draw(2) : 9 + draw(2);
                if (one.state[j].dtype >= 9) one.beside[1 + j] = draw_place(k, 7 + j);
            }
            one.place = draw(20) ? -1 : draw(5) - 3;
            memcpy((char *)rows + (size_t)k * row_size, &one, row_size);
        }
        status = pyopt->create(rows, (size_t)count, 0, &plan, message, sizeof message);
        CHECK(status == PYOPT_OK || (status == PYOPT_INVALID && strlen(message) > 10));
        if (status != PYOPT_OK) continue;
        made++;
        for (k = 0; k < 3; k++) {
            pyopt_slot one = PYOPT_SLOT;
            one.size = slot_size;
            one.step = 1 + draw(3);
            one.rounding_step = draw(20) ? -1 : draw(4) - 2;
            pyopt->fill_defaults(rule, all_options[k]);
            pyopt->fill_kept(rule, NULL, all_kept[k]);
            if (draw(3) == 0) all_options[k][draw(pyopt->rule(rule)->n_options)] = draw(4) / 2.0;
            one.options = all_options[k];
            one.kept = all_kept[k];
            memcpy((char *)slots + (size_t)k * slot_size, &one, slot_size);
        }
        status = pyopt->step(plan, slots, 3, 1, message, sizeof message);
        CHECK(status == PYOPT_OK || (status == PYOPT_INVALID && strlen(message) > 10));
        stepped += status == PYOPT_OK;
        pyopt->destroy(plan);
    }
    CHECK(made > 1000 && stepped > 500);
}

/* --- modes, threads, forks, memory -------------------------------------------------------------------------------- */

/* The caller rounds upward: the numbers of a step, and all else, are as ever, and its mode is as it was. */
static void check_rounding(void) {
    const char *const rules[] = {"NAdam", "LAMB", "Prodigy"};
    pyopt_plan *plan;
    volatile double one = 1, little = 1e-20, sum, after;
    int i;
    for (i = 0; i < 6; i++) {
        begin(rules[i / 2]);
        row.state[2].data = row.state[3].data = NULL;
        if (i / 2 == 2) row.state[2].data = before[0], row.state[3].data = before[1], row.n = 1000;
        if (i / 2 == 2) memset(before[0], 0, sizeof before[0]), memset(before[1], 0, sizeof before[1]);
        plan = make();
        if (i % 2) CHECK(fesetround(FE_UPWARD) == 0);
        sum = one + little; /* under valgrind it is 1 all the same */
        for (slot.step = 1; slot.step <= 3; slot.step++)
            CHECK(pyopt->step(plan, &slot, 1, 3, message, sizeof message) == PYOPT_OK);
        after = one + little; /* fegetround would not tell: it reads the mode of the old floating-point unit */
        CHECK(fesetround(FE_TONEAREST) == 0 && after == sum);
        pyopt->destroy(plan);
        if (i % 2) CHECK(memcmp(p, before[2], sizeof p) == 0 && memcmp(kept, kept_before, sizeof kept) == 0);
        memcpy(before[2], p, sizeof p);
        memcpy(kept_before, kept, sizeof kept);
    }
}

/* A thread with the least stack that the header asks for; sanitizers want more for themselves. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { STACK = 1 << 20 };
#else
enum { STACK = 64 << 10 };
#endif

static void *step_twice(void *place) {
    int i;
    for (i = 0; i < 2; i++) CHECK(pyopt->step((pyopt_plan *)place, &slot, 1, 1, message, sizeof message) == PYOPT_OK);
    return NULL;
}

static void check_stack(void) {
    pthread_attr_t attributes;
    pthread_t thread;
    pyopt_plan *plan;
    begin("LAMB");
    row.parameter.dtype = PYOPT_BFLOAT16_STOCHASTIC;
    row.gradient.dtype = row.state[0].dtype = row.state[1].dtype = PYOPT_FLOAT16;
    plan = make();
    CHECK(pthread_attr_init(&attributes) == 0 && pthread_attr_setstacksize(&attributes, STACK) == 0);
    CHECK(pthread_create(&thread, &attributes, step_twice, plan) == 0 && pthread_join(thread, NULL) == 0);
    pyopt->destroy(plan);
}

enum { THREADS = 4, TRIES = 100 };

typedef struct {
    pyopt_plan *plan;
    int taken, refused, wrong;
} Worker;

static void *step_often(void *place) {
    Worker *own = (Worker *)place;
    char text[100];
    int i;
    for (i = 0; i < TRIES; i++) {
        int status = pyopt->step(own->plan, &slot, 1, 1, text, sizeof text);
        if (status == PYOPT_OK) own->taken++;
        else if (strcmp(text, "plan is in a step, must be used by one thread at a time") == 0) own->refused++;
        else own->wrong++;
    }
    return NULL;
}

/* Threads that step one plan at once: each step is whole, or refused. */
static void check_threads(void) {
    pthread_t threads[THREADS];
    Worker workers[THREADS];
    int taken = 0, refused = 0, i;
    begin("Adam");
    memset(workers, 0, sizeof workers);
    workers[0].plan = make();
    for (i = 0; i < THREADS; i++) {
        workers[i].plan = workers[0].plan;
        CHECK(pthread_create(&threads[i], NULL, step_often, &workers[i]) == 0);
    }
    for (i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0 && workers[i].wrong == 0);
        taken += workers[i].taken;
        refused += workers[i].refused;
    }
    CHECK(taken + refused == THREADS * TRIES && taken >= 1);
    remember();
    begin("Adam");
    for (i = 0; i < taken; i++) CHECK(pyopt->step(workers[0].plan, &slot, 1, 1, message, sizeof message) == PYOPT_OK);
    check_unchanged();
    pyopt->destroy(workers[0].plan);
}

static void transfer(int file, int writes) {
    char *at = writes ? (char *)p : (char *)before[0], *end = at + sizeof p;
    ssize_t done = 1;
    for (; at < end && done > 0; at += done)
        done = writes ? write(file, at, (size_t)(end - at)) : read(file, at, (size_t)(end - at));
}

/* A child steps on, whatever threads its parent had: in one, with the same bits. */
static void check_fork(void) {
    pyopt_plan *plan;
    pid_t child = -1;
    int status, ends[2];
    begin("Adam");
    plan = make();
    CHECK(pyopt->step(plan, &slot, 1, 3, message, sizeof message) == PYOPT_OK && pipe(ends) == 0);
    fflush(NULL);
    child = fork();
    CHECK(child >= 0);
    alarm(child == 0 ? 60 : 0); /* a child that waits for threads of its parent's waits for ever */
    for (slot.step = 2; slot.step <= 3; slot.step++)
        CHECK(pyopt->step(plan, &slot, 1, 3, message, sizeof message) == PYOPT_OK);
    close(ends[child != 0]);
    transfer(ends[child == 0], child == 0);
    if (child == 0) _exit(7);
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7);
    CHECK(memcmp(p, before[0], sizeof p) == 0);
    close(ends[0]);
    pyopt->destroy(plan);
}

/* Every block that a plan asks for is refused once; in several threads that is OpenMP's affair. */
static void check_memory(void) {
    pyopt_plan *plan = NULL;
    long blocks, i, before_all = live;
    int status, sums;
    for (sums = 0; sums < 2; sums++) {
        begin(sums ? "LAMB" : "Adam");
        row.parameter.dtype = row.gradient.dtype = PYOPT_BFLOAT16_STOCHASTIC;
        row.gradient.dtype = PYOPT_BFLOAT16; /* with all that a plan can have */
        remember();
        for (blocks = 0;; blocks++) {
            left = blocks;
            memset(message, 'x', sizeof message);
            status = pyopt->create(&row, 1, 0, &plan, message, sizeof message);
            left = -1;
            if (status == PYOPT_OK) break;
            CHECK(status == PYOPT_NO_MEMORY && plan == NULL && strcmp(message, "no memory for a plan") == 0);
            CHECK(live == before_all);
        }
        CHECK(blocks == 9);
        for (i = 0; sums && i < 2; i++) {
            left = i;
            status = pyopt->step(plan, &slot, 1, 1, message, sizeof message);
            left = -1;
            CHECK(status == PYOPT_NO_MEMORY && strcmp(message, "no memory for a plan") == 0);
            check_unchanged();
        }
        left = sums ? 2 : 0; /* no more than that, and none later */
        CHECK(pyopt->step(plan, &slot, 1, 1, message, sizeof message) == PYOPT_OK);
        left = 0;
        CHECK(pyopt->step(plan, &slot, 1, 1, message, sizeof message) == PYOPT_OK);
        left = -1;
        CHECK(memcmp(p, before[0], sizeof p) != 0);
        pyopt->destroy(plan);
        plan = NULL;
        CHECK(live == before_all);
    }
}

int main(void) {
    pyopt = pyopt_api();
    check_query();
    check_create();
    check_step();
    check_chunks();
    check_anything();
    check_rounding();
    check_stack();
    check_threads();
    check_fork();
    check_memory();
    return 0;
}
