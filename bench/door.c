/* Seconds per step of Adam in float32: through the door, and as embedders write it themselves. For bars_door.py. */

#include <math.h>
#include <pyopt.h>
#include <stdlib.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The plain loop, compiled as the user's program is. */
static void own_adam(float *p, const float *g, float *m, float *v, long n, float lr, float beta1, float beta2, float eps,
                     float correction1, float correction2) {
    for (long i = 0; i < n; i++) {
        m[i] = beta1 * m[i] + (1 - beta1) * g[i];
        v[i] = beta2 * v[i] + (1 - beta2) * g[i] * g[i];
        p[i] -= lr * (m[i] * correction1) / (sqrtf(v[i] * correction2) + eps);
    }
}

/* `count` tensors of `size` elements each; out: seconds per step through the door, then of the own loop. */
int measure(const pyopt_functions *pyopt, long count, long size, int threads, int steps, double *out) {
    float *memory = (float *)aligned_alloc(64, sizeof(float) * 4 * (size_t)(count * size));
    float *p = memory, *g = p + count * size, *m = g + count * size, *v = m + count * size;
    pyopt_row *rows = (pyopt_row *)malloc(sizeof(pyopt_row) * (size_t)count);
    double options[PYOPT_MOST_OPTIONS], begin;
    pyopt_slot slot = PYOPT_SLOT;
    pyopt_plan *plan;
    char message[200];
    int adam = pyopt->find_rule("Adam"), k;
    for (long i = 0; i < count * size; i++) p[i] = m[i] = 0, v[i] = 1e-6f, g[i] = (float)(i % 17 - 8) / 8;
    for (long i = 0; i < count; i++) {
        rows[i] = PYOPT_ROW;
        rows[i].rule = adam;
        rows[i].n = size;
        rows[i].parameter.data = p + i * size;
        rows[i].gradient.data = g + i * size;
        rows[i].state[0].data = m + i * size;
        rows[i].state[1].data = v + i * size;
    }
    pyopt->fill_defaults(adam, options);
    slot.options = options;
    if (pyopt->create(rows, (size_t)count, 0, &plan, message, sizeof message)) return -1;
    pyopt->step(plan, &slot, 1, threads, message, sizeof message);
    begin = now();
    for (k = 0; k < steps; k++) {
        slot.step++;
        if (pyopt->step(plan, &slot, 1, threads, message, sizeof message)) return -1;
    }
    out[0] = (now() - begin) / steps;
    begin = now();
    for (k = 1; k <= steps; k++) {
        float c1 = 1 / (1 - powf(0.9f, (float)k)), c2 = 1 / (1 - powf(0.999f, (float)k));
        for (long i = 0; i < count; i++)
            own_adam(p + i * size, g + i * size, m + i * size, v + i * size, size, 1e-3f, 0.9f, 0.999f, 1e-8f, c1, c2);
    }
    out[1] = (now() - begin) / steps;
    pyopt->destroy(plan);
    free(rows);
    free(memory);
    return 0;
}
