# HOW a rule runs over a stretch of memory: per rule one span (a plain loop), its packer, and the Rule that joins them.
# Cutting into parts, threads and buffers are the engine's. Every condition of a rule is constant over a span, so the
# compiler makes one vectorised loop per combination of options; tests/test_object_code.py holds it to that.

from pyopt cimport _rules as rules
from pyopt._engine cimport Rule
from pyopt._rules cimport floating


cdef void sgd_span(floating *restrict p, const floating *restrict g, floating *restrict b, floating *restrict _1,
                   floating *restrict _2, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.SGD h = (<const rules.SGD *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.sgd(p[i], g[i], &b[i], &h)


cdef int pack_sgd(dict scalars, void *out) except -1:
    (<rules.SGD *>out)[0] = scalars
    return 0


sgd = Rule.make(sgd_span[float], sgd_span[double], pack_sgd)


cdef void lion_span(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict _1,
                    floating *restrict _2, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.Lion h = (<const rules.Lion *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.lion(p[i], g[i], &m[i], &h)


cdef int pack_lion(dict scalars, void *out) except -1:
    (<rules.Lion *>out)[0] = scalars
    return 0


lion = Rule.make(lion_span[float], lion_span[double], pack_lion)


cdef void adagrad_span(floating *restrict p, const floating *restrict g, floating *restrict s, floating *restrict _1,
                       floating *restrict _2, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.Adagrad h = (<const rules.Adagrad *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.adagrad(p[i], g[i], &s[i], &h)


cdef int pack_adagrad(dict scalars, void *out) except -1:
    (<rules.Adagrad *>out)[0] = scalars
    return 0


adagrad = Rule.make(adagrad_span[float], adagrad_span[double], pack_adagrad)


cdef void rmsprop_span(floating *restrict p, const floating *restrict g, floating *restrict s, floating *restrict b,
                       floating *restrict a, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.RMSprop h = (<const rules.RMSprop *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.rmsprop(p[i], g[i], &s[i], &b[i], &a[i], &h)


cdef int pack_rmsprop(dict scalars, void *out) except -1:
    (<rules.RMSprop *>out)[0] = scalars
    return 0


rmsprop = Rule.make(rmsprop_span[float], rmsprop_span[double], pack_rmsprop)


cdef void adam_span(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict v,
                    floating *restrict v_max, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.Adam h = (<const rules.Adam *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.adam(p[i], g[i], &m[i], &v[i], &v_max[i], &h)


cdef int pack_adam(dict scalars, void *out) except -1:
    (<rules.Adam *>out)[0] = scalars
    return 0


adam = Rule.make(adam_span[float], adam_span[double], pack_adam)


cdef void roof_span(floating *restrict p, const floating *restrict g, floating *restrict s, floating *restrict t,
                    floating *restrict u, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.Roof h = (<const rules.Roof *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.roof(p[i], g[i], &s[i], &t[i], &u[i], &h)


cdef int pack_roof(dict scalars, void *out) except -1:
    (<rules.Roof *>out)[0] = scalars
    return 0


roof = Rule.make(roof_span[float], roof_span[double], pack_roof)
