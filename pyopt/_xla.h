/* A step inside XLA: the handler that XLA's typed foreign functions call, over the C door.
 *
 * The structs are those of XLA's plain C interface (xla/ffi/api/c_api.h, version 0.1 and later), as far as they are
 * needed; they only grow at their ends, and say their size. So nothing of JAX's is needed to build this.
 *
 *   arguments   parameters, then each state in turn, gradients, each of n tensors; the learning rate; the step's number
 *   results     parameters and states again: in the memory of the arguments
 *   attributes  rule: the optimizer's name; options: all of it, float64; present: the numbers of its states, int64;
 *               flat, int64: nothing; or, where each state is one tensor, its element that belongs to the first
 *               parameter's first, behind whose the others' follow
 *
 * The learning rate is a float32 or float64, or the two halves of a float64, the lower first, as uint32: JAX has no
 * float64 by default. The work runs on XLA's threads: this one takes chunks, and those that have nothing else to do. */

#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pyopt.h"

enum { XLA_S32 = 4, XLA_S64 = 5, XLA_U32 = 8, XLA_F32 = 11, XLA_F64 = 12 };
enum { XLA_ARRAY = 1, XLA_STRING = 4, XLA_METADATA = 1, XLA_EXECUTE = 3, XLA_INVALID_ARGUMENT = 3 };

typedef struct Extension {
    size_t size;
    int type;
    struct Extension *next;
} Extension;

typedef struct {
    size_t size;
    Extension *extension;
    int major, minor;
} Version;

typedef struct {
    size_t size;
    Version version;
    uint32_t traits;
} Metadata;

typedef struct {
    Extension base;
    Metadata *metadata;
} MetadataExtension;

typedef struct {
    size_t size;
    Extension *extension;
    int dtype;
    void *data;
    int64_t rank;
    int64_t *dims;
} Buffer;

typedef struct {
    size_t size;
    Extension *extension;
    int64_t count;
    int *types;
    void **items;
} Buffers;

typedef struct {
    const char *data;
    size_t length;
} Text;

typedef struct {
    int dtype;
    size_t count;
    void *data;
} Array;

typedef struct {
    size_t size;
    Extension *extension;
    int64_t count;
    int *types;
    Text **names;
    void **items;
} Attributes;

typedef struct {
    size_t size;
    Extension *extension;
    const char *message;
    int code;
} ErrorArguments;

typedef struct {
    size_t size;
    Extension *extension;
    void *context;
    void (*task)(void *);
    void *data;
} ScheduleArguments;

typedef struct {
    size_t size;
    Extension *extension;
    void *context;
    int64_t *count;
} ThreadsArguments;

typedef struct {
    size_t size;
    Extension *extension;
    Version version;
    const void *internal;
    void *(*make_error)(ErrorArguments *);
    void (*read_error)(void *);
    void (*destroy_error)(void *);
    void *unused[8]; /* of streams, types, states, memory */
    void *(*schedule)(ScheduleArguments *);
    void *(*count_threads)(ThreadsArguments *);
} Api;

typedef struct {
    size_t size;
    Extension *extension;
    const Api *api;
    void *context;
    int stage;
    Buffers arguments, results;
    Attributes attributes;
} CallFrame;

typedef struct { /* what destroy_error takes */
    size_t size;
    Extension *extension;
    void *error;
} ErrorHolder;

/* --- chunks on XLA's threads ---------------------------------------------------------------------------------------- */

typedef struct {
    void (*work)(pyopt_plan *, int64_t, int64_t);
    pyopt_plan *plan;
    int64_t chunks, grain, next, done; /* next and done under the lock */
    int holders;
    pthread_mutex_t lock;
    pthread_cond_t finished;
} Team;

static void take_chunks(Team *team) {
    pthread_mutex_lock(&team->lock);
    while (team->next < team->chunks) {
        int64_t first = team->next, last = first + team->grain < team->chunks ? first + team->grain : team->chunks;
        team->next = last;
        pthread_mutex_unlock(&team->lock);
        team->work(team->plan, first, last);
        pthread_mutex_lock(&team->lock);
        team->done += last - first;
    }
    if (team->done == team->chunks) pthread_cond_signal(&team->finished);
    pthread_mutex_unlock(&team->lock);
}

static void leave(Team *team) {
    int left;
    pthread_mutex_lock(&team->lock);
    left = --team->holders;
    pthread_mutex_unlock(&team->lock);
    if (left) return;
    pthread_cond_destroy(&team->finished);
    pthread_mutex_destroy(&team->lock);
    free(team);
}

/* May begin long after the step is over: it finds no chunk then. */
static void help(void *data) {
    take_chunks((Team *)data);
    leave((Team *)data);
}

static int64_t count_threads(const CallFrame *frame) {
    int64_t count = 1;
    ThreadsArguments ask = {sizeof ask, NULL, frame->context, &count};
    ErrorHolder held = {sizeof held, NULL, NULL};
    if (frame->api->size < sizeof(Api)) return 1;
    held.error = frame->api->count_threads(&ask);
    if (held.error == NULL) return count;
    frame->api->destroy_error(&held);
    return 1;
}

/* All chunks of a plan. Nobody waits for a thread that has not begun: XLA's may all be in steps like this one. */
static void run_everywhere(const CallFrame *frame, const pyopt_functions *pyopt, pyopt_plan *plan,
                           void (*work)(pyopt_plan *, int64_t, int64_t)) {
    int64_t chunks = pyopt->chunks(plan), threads = chunks < 4 ? 1 : count_threads(frame), i;
    Team *team = threads > 1 ? (Team *)calloc(1, sizeof(Team)) : NULL;
    if (team == NULL) {
        work(plan, 0, chunks);
        return;
    }
    team->work = work, team->plan = plan, team->chunks = chunks;
    team->grain = chunks / (4 * threads) > 1 ? chunks / (4 * threads) : 1;
    team->holders = 1;
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->finished, NULL);
    for (i = 1; i < threads && i < chunks; i++) {
        ScheduleArguments task = {sizeof task, NULL, frame->context, help, team};
        ErrorHolder held = {sizeof held, NULL, NULL};
        pthread_mutex_lock(&team->lock);
        team->holders++;
        pthread_mutex_unlock(&team->lock);
        held.error = frame->api->schedule(&task);
        if (held.error != NULL) { /* there is no pool */
            frame->api->destroy_error(&held);
            leave(team);
            break;
        }
    }
    take_chunks(team);
    pthread_mutex_lock(&team->lock);
    while (team->done < team->chunks) pthread_cond_wait(&team->finished, &team->lock);
    pthread_mutex_unlock(&team->lock);
    leave(team);
}

/* --- the handler ---------------------------------------------------------------------------------------------------- */

static const pyopt_functions *xla_door; /* set when the module is imported */

static void *xla_error(const CallFrame *frame, const char *message) {
    ErrorArguments error = {sizeof error, NULL, message, XLA_INVALID_ARGUMENT};
    return frame->api->make_error(&error);
}

static const void *find_attribute(const CallFrame *frame, const char *name, int type) {
    int64_t i;
    for (i = 0; i < frame->attributes.count; i++) {
        const Text *own = frame->attributes.names[i];
        if (own->length == strlen(name) && memcmp(own->data, name, own->length) == 0)
            return frame->attributes.types[i] == type ? frame->attributes.items[i] : NULL;
    }
    return NULL;
}

static int64_t elements(const Buffer *buffer) {
    int64_t n = 1, i;
    for (i = 0; i < buffer->rank; i++) n *= buffer->dims[i];
    return n;
}

static bool read_rate(const Buffer *buffer, double *lr) {
    if (buffer->dtype == XLA_F32) *lr = *(const float *)buffer->data;
    else if (buffer->dtype == XLA_F64) *lr = *(const double *)buffer->data;
    else if (buffer->dtype == XLA_U32 && elements(buffer) == 2) memcpy(lr, buffer->data, sizeof *lr);
    else return false;
    return true;
}

static bool read_step(const Buffer *buffer, int64_t *step) {
    if (buffer->dtype == XLA_S32) *step = *(const int32_t *)buffer->data;
    else if (buffer->dtype == XLA_S64) *step = *(const int64_t *)buffer->data;
    else return false;
    return true;
}

static const Buffer *argument(const CallFrame *frame, int64_t place) {
    return (const Buffer *)frame->arguments.items[place];
}

static int64_t size_of(const Buffer *buffer) {
    return buffer->dtype == XLA_F64 ? 8 : 4;
}

/* Begin the results as the arguments are, where they have memory of their own. */
static void begin_results(const CallFrame *frame) {
    int64_t i;
    for (i = 0; i < frame->results.count; i++) {
        const Buffer *from = argument(frame, i), *to = (const Buffer *)frame->results.items[i];
        size_t bytes = (size_t)(elements(to) * size_of(to));
        if (from->data != to->data && bytes > 0) memcpy(to->data, from->data, bytes);
    }
}

/* The stream in a result, from an element on. */
static pyopt_stream written(const CallFrame *frame, int64_t place, int64_t begin) {
    const Buffer *to = (const Buffer *)frame->results.items[place];
    pyopt_stream stream = {(char *)to->data + begin * size_of(to), to->dtype == XLA_F64 ? PYOPT_FLOAT64 : PYOPT_FLOAT32};
    return stream;
}

/* Whether the states, the gradients and the parameters go together. */
static bool matches(const CallFrame *frame, int64_t n, int64_t states, const int64_t *flat) {
    int64_t i, all = 0, of_state = flat != NULL ? 1 : n;
    for (i = 0; i < n; i++) {
        const Buffer *p = argument(frame, i);
        if ((p->dtype != XLA_F32 && p->dtype != XLA_F64) || (flat != NULL && p->dtype != argument(frame, 0)->dtype))
            return false;
        all += elements(p);
    }
    for (i = n; i < 2 * n + states * of_state; i++) {
        const Buffer *own = argument(frame, i);
        const Buffer *p = argument(frame, i < n + states * of_state ? (i - n) % of_state : i - n - states * of_state);
        bool is_flat = flat != NULL && i < n + states;
        if (own->dtype != p->dtype) return false;
        if (is_flat ? *flat < 0 || all > elements(own) - *flat : elements(own) != elements(p)) return false;
    }
    return true;
}

static void *xla_step(CallFrame *frame) {
    const pyopt_functions *pyopt = xla_door;
    const Text *name;
    const Array *options, *present, *flat;
    const Extension *extension;
    double values[PYOPT_MOST_OPTIONS];
    pyopt_slot slot = PYOPT_SLOT;
    pyopt_row *rows;
    pyopt_plan *plan;
    char message[400] = "", rule_name[64];
    int64_t states, of_state, n, begin, i, j;
    int rule, status;
    for (extension = frame->extension; extension != NULL; extension = extension->next) {
        if (extension->type == XLA_METADATA) { /* asked at registration */
            Metadata *metadata = ((const MetadataExtension *)extension)->metadata;
            metadata->version.major = 0;
            metadata->version.minor = frame->api != NULL ? frame->api->version.minor : 1;
            metadata->traits = 0;
            return NULL;
        }
    }
    if (frame->stage != XLA_EXECUTE) return NULL;
    name = (const Text *)find_attribute(frame, "rule", XLA_STRING);
    options = (const Array *)find_attribute(frame, "options", XLA_ARRAY);
    present = (const Array *)find_attribute(frame, "present", XLA_ARRAY);
    flat = (const Array *)find_attribute(frame, "flat", XLA_ARRAY);
    if (name == NULL || name->length >= sizeof rule_name || options == NULL || options->dtype != XLA_F64
        || present == NULL || present->dtype != XLA_S64 || flat == NULL || flat->dtype != XLA_S64)
        return xla_error(frame, "pyopt: the attributes must be rule, options in float64, present and flat in int64");
    memcpy(rule_name, name->data, name->length);
    rule_name[name->length] = 0;
    rule = pyopt->find_rule(rule_name);
    if (rule < 0 || options->count != (size_t)pyopt->rule(rule)->n_options || present->count > PYOPT_STATES)
        return xla_error(frame, "pyopt: no such rule, or another number of options or states than it has");
    states = (int64_t)present->count;
    n = flat->count ? frame->results.count - states : frame->results.count / (1 + states);
    of_state = flat->count ? 1 : n;
    if (n < 0 || frame->results.count != n + states * of_state || frame->arguments.count != frame->results.count + n + 2)
        return xla_error(frame, "pyopt: arguments and results do not match: parameters, states, gradients, lr, step");
    memcpy(values, options->data, options->count * sizeof(double));
    slot.options = values;
    if (!read_rate(argument(frame, frame->results.count + n), &values[0])
        || !read_step(argument(frame, frame->results.count + n + 1), &slot.step))
        return xla_error(frame, "pyopt: lr must be float32 or float64, or one in two uint32; step int32 or int64");
    if (!matches(frame, n, states, flat->count ? (const int64_t *)flat->data : NULL))
        return xla_error(frame, "pyopt: parameters must be float32 or float64, gradients and states like them");
    rows = (pyopt_row *)malloc(((size_t)n + 1) * sizeof(pyopt_row));
    if (rows == NULL) return xla_error(frame, "pyopt: no memory for a plan");
    begin_results(frame);
    begin = flat->count ? *(const int64_t *)flat->data : 0;
    for (i = 0; i < n; i++) {
        rows[i] = PYOPT_ROW;
        rows[i].rule = rule;
        rows[i].n = elements(argument(frame, i));
        rows[i].parameter = written(frame, i, 0);
        rows[i].gradient.data = argument(frame, frame->results.count + i)->data;
        rows[i].gradient.dtype = rows[i].parameter.dtype;
        for (j = 0; j < states; j++) {
            int64_t state = ((const int64_t *)present->data)[j];
            if (state < 0 || state >= PYOPT_STATES) continue;
            rows[i].state[state] = written(frame, n + j * of_state + (flat->count ? 0 : i), begin);
        }
        if (flat->count) begin += rows[i].n;
    }
    status = pyopt->create(rows, (size_t)n, PYOPT_UNCHECKED, &plan, message, sizeof message); /* XLA keeps them apart */
    free(rows);
    if (status != PYOPT_OK) return xla_error(frame, message);
    status = pyopt->prepare(plan, &slot, 1, message, sizeof message);
    if (status == PYOPT_OK) {
        if (pyopt->has_sums(plan)) {
            run_everywhere(frame, pyopt, plan, pyopt->sum);
            pyopt->combine(plan, &slot);
        }
        run_everywhere(frame, pyopt, plan, pyopt->run);
    }
    pyopt->destroy(plan);
    return status == PYOPT_OK ? NULL : xla_error(frame, message);
}
