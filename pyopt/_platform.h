/* What differs between systems, here and nowhere else: where OpenMP comes from, which runtimes of it the process has,
 * forks, and the CPUs that a process may use.
 *
 * OpenMP is called by its functions: Cython's `with parallel` asks Python for the GIL, which a caller of the C door may
 * not have. GOMP_parallel is what GCC makes of `#pragma omp parallel`; LLVM's libomp has it too. So any compiler will
 * do, also one without OpenMP. Which runtime it is, setup.py decides:
 *
 *   linked    libgomp, a library of its own on Linux, inside the module on Windows: direct calls
 *   loaded    (macOS; PYOPT_OPENMP_LOADED) the first that somebody else brings into the process: torch, scikit-learn.
 *             Until there is one steps run in one thread. */

#ifndef PYOPT_PLATFORM_H
#define PYOPT_PLATFORM_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1 /* dladdr, dl_iterate_phdr */
#endif
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#if defined(_WIN32)
#ifndef NOMINMAX
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#endif
#include <windows.h>
#include <psapi.h>
#else
#include <dlfcn.h>
#endif
#if defined(__APPLE__)
#include <mach-o/dyld.h>
#elif !defined(_WIN32)
#include <link.h>
#endif

/* --- the runtimes in the process ------------------------------------------------------------------------------------ */

static int is_openmp(const char *path) {
    static const char *const names[] = {"libgomp", "libomp", "libiomp", "vcomp"};
    const char *name = path, *c;
    size_t i;
    for (c = path; *c; c++)
        if (*c == '/' || *c == '\\') name = c + 1;
    for (i = 0; i < sizeof names / sizeof *names; i++)
        if (strncmp(name, names[i], strlen(names[i])) == 0) return 1;
    return 0;
}

typedef struct {
    int left; /* how many runtimes to pass over */
    char *path;
    size_t size;
} SoughtRuntime;

/* Whether this image of the process is the one that is sought. */
static int is_sought(SoughtRuntime *sought, const char *path) {
    if (path == NULL || !is_openmp(path) || sought->left-- > 0) return 0;
    snprintf(sought->path, sought->size, "%s", path);
    return 1;
}

#if defined(_WIN32)

static int module_path(HMODULE module, char *path, size_t size) {
    wchar_t wide[1024];
    DWORD length = GetModuleFileNameW(module, wide, 1024);
    return length > 0 && length < 1024 && WideCharToMultiByte(CP_UTF8, 0, wide, -1, path, (int)size, NULL, NULL) > 0;
}

static int walk_images(SoughtRuntime *sought) {
    HMODULE modules[1024];
    DWORD bytes = 0, i;
    char path[3072];
    if (!K32EnumProcessModules(GetCurrentProcess(), modules, sizeof modules, &bytes)) return 0;
    for (i = 0; i < bytes / sizeof *modules && i < 1024; i++)
        if (module_path(modules[i], path, sizeof path) && is_sought(sought, path)) return 1;
    return 0;
}

/* The file that a function is in. */
static int file_of(void (*function)(void), char *path, size_t size) {
    HMODULE module;
    DWORD flags = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
    return GetModuleHandleExW(flags, (LPCWSTR)(uintptr_t)function, &module) && module_path(module, path, size);
}

/* As many CPUs as this process may use, 0 where that is not known. */
static inline int usable_cpus(void) {
    DWORD_PTR process, machine;
    return GetProcessAffinityMask(GetCurrentProcess(), &process, &machine) ? __builtin_popcountll(process) : 0;
}

static inline void watch_forks(void (*in_child)(void)) { (void)in_child; }

#else

#if defined(__APPLE__)

static int walk_images(SoughtRuntime *sought) {
    uint32_t i;
    for (i = 0; i < _dyld_image_count(); i++)
        if (is_sought(sought, _dyld_get_image_name(i))) return 1;
    return 0;
}

/* Changes when an image is loaded. */
static inline unsigned long long image_version(void) { return _dyld_image_count(); }

#else

static int look_at_image(struct dl_phdr_info *image, size_t size, void *sought) {
    (void)size;
    return is_sought((SoughtRuntime *)sought, image->dlpi_name);
}

static int walk_images(SoughtRuntime *sought) { return dl_iterate_phdr(look_at_image, sought); }

static inline int look_at_version(struct dl_phdr_info *image, size_t size, void *version) {
    (void)size;
    *(unsigned long long *)version = image->dlpi_adds;
    return 1;
}

static inline unsigned long long image_version(void) {
    unsigned long long version = 0;
    dl_iterate_phdr(look_at_version, &version);
    return version;
}

#endif

static int file_of(void (*function)(void), char *path, size_t size) {
    Dl_info found;
    if (!dladdr((void *)function, &found) || found.dli_fname == NULL) return 0;
    snprintf(path, size, "%s", found.dli_fname);
    return 1;
}

static inline int usable_cpus(void) { return 0; }

static inline void watch_forks(void (*in_child)(void)) { pthread_atfork(NULL, NULL, in_child); }

#endif

/* The path of the n-th OpenMP runtime in the process, counted from 0; 0 where there are not so many. */
static inline int nth_runtime(int n, char *path, size_t size) {
    SoughtRuntime sought;
    sought.left = n, sought.path = path, sought.size = size;
    return walk_images(&sought);
}

/* --- OpenMP --------------------------------------------------------------------------------------------------------- */

static int initial_limit = 1; /* OpenMP's number of threads by its environment: what others set since or before is a limit */

static void *ask_for_threads(void *place) {
    int (*const *max_threads)(void) = (int (*const *)(void))place;
    return (void *)(intptr_t)(*max_threads)();
}

/* A new thread has OpenMP's own number, whatever was set in this one. */
static void note_initial_limit(int (*max_threads)(void)) {
    void *number = NULL;
    pthread_t thread;
    if (!pthread_create(&thread, NULL, ask_for_threads, &max_threads)) pthread_join(thread, &number);
    initial_limit = number != NULL ? (int)(intptr_t)number : max_threads();
}

#if !defined(PYOPT_OPENMP_LOADED)

void GOMP_parallel(void (*share)(void *), void *data, unsigned threads, unsigned flags);
int omp_get_max_threads(void);
int omp_get_num_threads(void);
int omp_get_thread_num(void);
int omp_get_thread_limit(void);

static void begin_openmp(void) { note_initial_limit(omp_get_max_threads); }

#define find_openmp() 1

#else

typedef struct {
    void (*parallel)(void (*share)(void *), void *data, unsigned threads, unsigned flags);
    int (*max_threads)(void), (*num_threads)(void), (*thread_num)(void), (*thread_limit)(void);
} OpenMP;

static void run_alone(void (*share)(void *), void *data, unsigned threads, unsigned flags) {
    (void)threads, (void)flags;
    share(data);
}

static int none(void) { return 0; }

static int one(void) { return 1; }

/* A region that finds another than began it is one of these, in one thread: both say so. */
static const OpenMP openmp_alone = {run_alone, one, one, none, one};
static OpenMP openmp_found;
static const OpenMP *openmp = &openmp_alone;

#define OPENMP __atomic_load_n(&openmp, __ATOMIC_ACQUIRE)
#define GOMP_parallel OPENMP->parallel
#define omp_get_max_threads OPENMP->max_threads
#define omp_get_num_threads OPENMP->num_threads
#define omp_get_thread_num OPENMP->thread_num
#define omp_get_thread_limit OPENMP->thread_limit

/* Python's extensions, and so what they bring, are loaded for themselves alone: a runtime is asked by its own handle. */
static int take_runtime(const char *path) {
    OpenMP o;
    void *library = dlopen(path, RTLD_LAZY | RTLD_LOCAL | RTLD_NOLOAD); /* kept, so that it stays */
    if (library == NULL) return 0;
    *(void **)&o.parallel = dlsym(library, "GOMP_parallel");
    *(void **)&o.max_threads = dlsym(library, "omp_get_max_threads");
    *(void **)&o.num_threads = dlsym(library, "omp_get_num_threads");
    *(void **)&o.thread_num = dlsym(library, "omp_get_thread_num");
    *(void **)&o.thread_limit = dlsym(library, "omp_get_thread_limit");
    if (!o.parallel || !o.max_threads || !o.num_threads || !o.thread_num || !o.thread_limit) {
        dlclose(library);
        return 0;
    }
    openmp_found = o;
    note_initial_limit(o.max_threads);
    __atomic_store_n(&openmp, &openmp_found, __ATOMIC_RELEASE);
    return 1;
}

/* Whether there is a runtime; it is looked for again when something has been loaded since. */
static int find_openmp(void) {
    static pthread_mutex_t looking = PTHREAD_MUTEX_INITIALIZER;
    static unsigned long long seen = 0;
    unsigned long long now;
    char path[4096];
    int n;
    if (OPENMP != &openmp_alone) return 1;
    now = image_version();
    if (now == __atomic_load_n(&seen, __ATOMIC_ACQUIRE)) return 0;
    if (pthread_mutex_trylock(&looking)) return 0; /* another thread looks, or did when this process was forked */
    for (n = 0; OPENMP == &openmp_alone && nth_runtime(n, path, sizeof path); n++) take_runtime(path);
    __atomic_store_n(&seen, now, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&looking);
    return OPENMP != &openmp_alone;
}

static void begin_openmp(void) { find_openmp(); }

#endif

/* The file whose OpenMP steps run on; 0 where there is none. */
static inline int runtime_in_use(char *path, size_t size) {
    return find_openmp() && file_of((void (*)(void))GOMP_parallel, path, size);
}

#endif
