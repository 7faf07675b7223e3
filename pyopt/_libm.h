/* pow, exp and log of the C library that Python itself is linked to: a number that Python computes and one that C
 * computes must have the same bits. */

#include <math.h>

#if defined(_WIN32) /* where MinGW has functions of its own under these names */
extern double (*const __imp_exp)(double);
extern double (*const __imp_log)(double);
extern double (*const __imp_pow)(double, double);
#define libm_exp __imp_exp
#define libm_log __imp_log
#define libm_pow __imp_pow
#else
#define libm_exp exp
#define libm_log log
#define libm_pow pow
#endif
