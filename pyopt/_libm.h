/* pow, exp and log of the C library that Python itself is linked to: a number that Python computes and one that C
 * computes must have the same bits. */

#include <math.h>

#if defined(_WIN32)

/* MinGW has functions of its own under these names; Python has those of the UCRT. */
#ifndef NOMINMAX
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#endif
#include <windows.h>

static inline FARPROC of_ucrt(const char *name) {
    HMODULE ucrt = LoadLibraryW(L"ucrtbase.dll");
    return ucrt != NULL ? GetProcAddress(ucrt, name) : NULL;
}

#define PYOPT_LIBM(name, parameters, arguments) \
    static inline double libm_##name parameters { \
        static double(*function) parameters; \
        if (function == NULL) { \
            FARPROC found = of_ucrt(#name); \
            function = found != NULL ? (double(*) parameters)(void (*)(void))found : name; \
        } \
        return function arguments; \
    }

PYOPT_LIBM(exp, (double x), (x))
PYOPT_LIBM(log, (double x), (x))
PYOPT_LIBM(pow, (double x, double y), (x, y))

#else

#define libm_exp exp
#define libm_log log
#define libm_pow pow

#endif
