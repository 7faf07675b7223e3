# What of the C library's mathematics differs between systems: pyopt/_libm.h.

cdef extern from "_libm.h" nogil:
    double exp "libm_exp"(double x)
    double log "libm_log"(double x)
    double pow "libm_pow"(double x, double y)
