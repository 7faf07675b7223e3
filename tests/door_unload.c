/* Two copies of libpyopt in one process, each loaded, used on several threads and closed, again and again. The threads
 * that OpenMP keeps are still there then. */

#include <dlfcn.h>
#include <pyopt.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define N 50000
#define CHECK(condition) \
    do { \
        if (!(condition)) return fprintf(stderr, "line %d: %s\n", __LINE__, #condition), 1; \
    } while (0)

typedef const pyopt_functions *(*Api)(void);

static float p[2][N], g[N], m[2][N];

int main(int count, char **paths) {
    int round, copy, i, status;
    CHECK(count == 3);
    for (i = 0; i < N; i++) g[i] = (float)(i % 7 - 3);
    for (round = 0; round < 5; round++) {
        void *library[2];
        const pyopt_functions *pyopt[2];
        pyopt_plan *plan[2];
        double options[PYOPT_MOST_OPTIONS];
        char message[200] = "";
        pid_t child;
        for (copy = 0; copy < 2; copy++) {
            Api api;
            pyopt_row row = PYOPT_ROW;
            library[copy] = dlopen(paths[1 + copy], RTLD_NOW | RTLD_LOCAL);
            CHECK(library[copy] != NULL);
            *(void **)&api = dlsym(library[copy], "pyopt_api");
            CHECK(api != NULL && api() == api());
            pyopt[copy] = api();
            row.rule = pyopt[copy]->find_rule("Lion");
            row.n = N;
            row.parameter.data = p[copy];
            row.gradient.data = g;
            row.state[0].data = m[copy];
            CHECK(pyopt[copy]->create(&row, 1, 0, &plan[copy], message, sizeof message) == PYOPT_OK);
        }
        CHECK(pyopt[0] != pyopt[1]);
        for (copy = 0; copy < 2; copy++) {
            pyopt_slot slot = PYOPT_SLOT;
            pyopt[copy]->fill_defaults(pyopt[copy]->find_rule("Lion"), options);
            slot.options = options;
            CHECK(pyopt[copy]->step(plan[copy], &slot, 1, 2 + copy, message, sizeof message) == PYOPT_OK);
            pyopt[copy]->destroy(plan[copy]);
        }
        CHECK(memcmp(p[0], p[1], sizeof p[0]) == 0 && memcmp(m[0], m[1], sizeof m[0]) == 0 && p[0][0] != 0);
        for (copy = 0; copy < 2; copy++) CHECK(dlclose(library[copy]) == 0);
        usleep(10000);
        child = fork();
        if (child == 0) _exit(7);
        CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7);
    }
    return 0;
}
