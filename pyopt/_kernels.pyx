# HOW a rule runs over a stretch of memory: per rule one span (a plain loop), its packer, and the Rule that joins them
# and names the state behind its streams. Cutting into parts, threads and buffers are the engine's. Every condition of a
# rule is constant over a span, so the compiler makes one vectorised loop per combination of options;
# tests/test_object_code.py holds it to that.

from libc.string cimport memset

from pyopt cimport _rules as rules
from pyopt._engine cimport BLOCK, Rule
from pyopt._matrix cimport LANES, Matrices, Pass, Tile, tile_at
from pyopt._rules cimport floating


cdef void sgd_span(floating *restrict p, const floating *restrict g, floating *restrict b, floating *restrict _1,
                   floating *restrict _2, floating *restrict _3, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.SGD h = (<const rules.SGD *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.sgd(p[i], g[i], &b[i], &h)


cdef int pack_sgd(dict scalars, void *out) except -1:
    (<rules.SGD *>out)[0] = scalars
    return 0


sgd = Rule.make("sgd", ("momentum_buffer",), sgd_span[float], sgd_span[double], pack_sgd)


cdef void lion_span(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict _1,
                    floating *restrict _2, floating *restrict _3, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.Lion h = (<const rules.Lion *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.lion(p[i], g[i], &m[i], &h)


cdef int pack_lion(dict scalars, void *out) except -1:
    (<rules.Lion *>out)[0] = scalars
    return 0


lion = Rule.make("lion", ("exp_avg",), lion_span[float], lion_span[double], pack_lion)


cdef void adagrad_span(floating *restrict p, const floating *restrict g, floating *restrict s, floating *restrict _1,
                       floating *restrict _2, floating *restrict _3, Py_ssize_t n,
                       const void *scalars) noexcept nogil:
    cdef rules.Adagrad h = (<const rules.Adagrad *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.adagrad(p[i], g[i], &s[i], &h)


cdef int pack_adagrad(dict scalars, void *out) except -1:
    (<rules.Adagrad *>out)[0] = scalars
    return 0


adagrad = Rule.make("adagrad", ("sum",), adagrad_span[float], adagrad_span[double], pack_adagrad)


cdef void asgd_span(floating *restrict p, const floating *restrict g, floating *restrict ax, floating *restrict _1,
                    floating *restrict _2, floating *restrict _3, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.ASGD h = (<const rules.ASGD *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.asgd(p[i], g[i], &ax[i], &h)


cdef int pack_asgd(dict scalars, void *out) except -1:
    (<rules.ASGD *>out)[0] = scalars
    return 0


asgd = Rule.make("asgd", ("ax",), asgd_span[float], asgd_span[double], pack_asgd)


cdef void rprop_span(floating *restrict p, const floating *restrict g, floating *restrict previous,
                     floating *restrict step_size, floating *restrict _1, floating *restrict _2, Py_ssize_t n,
                     const void *scalars) noexcept nogil:
    cdef rules.Rprop h = (<const rules.Rprop *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.rprop(p[i], g[i], &previous[i], &step_size[i], &h)


cdef int pack_rprop(dict scalars, void *out) except -1:
    (<rules.Rprop *>out)[0] = scalars
    return 0


rprop = Rule.make("rprop", ("prev", "step_size"), rprop_span[float], rprop_span[double], pack_rprop)


cdef void adadelta_span(floating *restrict p, const floating *restrict g, floating *restrict s, floating *restrict a,
                        floating *restrict _1, floating *restrict _2, Py_ssize_t n,
                        const void *scalars) noexcept nogil:
    cdef rules.Adadelta h = (<const rules.Adadelta *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.adadelta(p[i], g[i], &s[i], &a[i], &h)


cdef int pack_adadelta(dict scalars, void *out) except -1:
    (<rules.Adadelta *>out)[0] = scalars
    return 0


adadelta = Rule.make("adadelta", ("square_avg", "acc_delta"),
                     adadelta_span[float], adadelta_span[double], pack_adadelta)


cdef void rmsprop_span(floating *restrict p, const floating *restrict g, floating *restrict s, floating *restrict b,
                       floating *restrict a, floating *restrict _1, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.RMSprop h = (<const rules.RMSprop *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.rmsprop(p[i], g[i], &s[i], &b[i], &a[i], &h)


cdef int pack_rmsprop(dict scalars, void *out) except -1:
    (<rules.RMSprop *>out)[0] = scalars
    return 0


rmsprop = Rule.make("rmsprop", ("square_avg", "momentum_buffer", "grad_avg"),
                    rmsprop_span[float], rmsprop_span[double], pack_rmsprop)


cdef void adamax_span(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict u,
                      floating *restrict _1, floating *restrict _2, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.Adamax h = (<const rules.Adamax *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.adamax(p[i], g[i], &m[i], &u[i], &h)


cdef int pack_adamax(dict scalars, void *out) except -1:
    (<rules.Adamax *>out)[0] = scalars
    return 0


adamax = Rule.make("adamax", ("exp_avg", "exp_inf"), adamax_span[float], adamax_span[double], pack_adamax)


cdef void adam_span(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict v,
                    floating *restrict v_max, floating *restrict _1, Py_ssize_t n,
                    const void *scalars) noexcept nogil:
    cdef rules.Adam h = (<const rules.Adam *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.adam(p[i], g[i], &m[i], &v[i], &v_max[i], &h)


cdef int pack_adam(dict scalars, void *out) except -1:
    (<rules.Adam *>out)[0] = scalars
    return 0


adam = Rule.make("adam", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), adam_span[float], adam_span[double], pack_adam)


cdef void adabelief_span(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict s,
                         floating *restrict _1, floating *restrict _2, Py_ssize_t n,
                         const void *scalars) noexcept nogil:
    cdef rules.AdaBelief h = (<const rules.AdaBelief *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.adabelief(p[i], g[i], &m[i], &s[i], &h)


cdef int pack_adabelief(dict scalars, void *out) except -1:
    (<rules.AdaBelief *>out)[0] = scalars
    return 0


adabelief = Rule.make("adabelief", ("exp_avg", "exp_avg_var"),
                      adabelief_span[float], adabelief_span[double], pack_adabelief)


cdef void radam_span(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict v,
                     floating *restrict _1, floating *restrict _2, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.RAdam h = (<const rules.RAdam *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.radam(p[i], g[i], &m[i], &v[i], &h)


cdef int pack_radam(dict scalars, void *out) except -1:
    (<rules.RAdam *>out)[0] = scalars
    return 0


radam = Rule.make("radam", ("exp_avg", "exp_avg_sq"), radam_span[float], radam_span[double], pack_radam)


cdef void nadam_span(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict v,
                     floating *restrict _1, floating *restrict _2, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.NAdam h = (<const rules.NAdam *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.nadam(p[i], g[i], &m[i], &v[i], &h)


cdef int pack_nadam(dict scalars, void *out) except -1:
    (<rules.NAdam *>out)[0] = scalars
    return 0


nadam = Rule.make("nadam", ("exp_avg", "exp_avg_sq"), nadam_span[float], nadam_span[double], pack_nadam)


cdef void adopt_span(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict v,
                     floating *restrict _1, floating *restrict _2, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.ADOPT h = (<const rules.ADOPT *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.adopt(p[i], g[i], &m[i], &v[i], &h)


cdef int pack_adopt(dict scalars, void *out) except -1:
    (<rules.ADOPT *>out)[0] = scalars
    return 0


adopt = Rule.make("adopt", ("exp_avg", "exp_avg_sq"), adopt_span[float], adopt_span[double], pack_adopt)


cdef void ademamix_span(floating *restrict p, const floating *restrict g, floating *restrict m1,
                        floating *restrict m2, floating *restrict v, floating *restrict _1, Py_ssize_t n,
                        const void *scalars) noexcept nogil:
    cdef rules.AdEMAMix h = (<const rules.AdEMAMix *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.ademamix(p[i], g[i], &m1[i], &m2[i], &v[i], &h)


cdef int pack_ademamix(dict scalars, void *out) except -1:
    (<rules.AdEMAMix *>out)[0] = scalars
    return 0


ademamix = Rule.make("ademamix", ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"),
                     ademamix_span[float], ademamix_span[double], pack_ademamix)


cdef void adan_span(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict u,
                    floating *restrict n, floating *restrict previous, Py_ssize_t n_elements,
                    const void *scalars) noexcept nogil:
    cdef rules.Adan h = (<const rules.Adan *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n_elements):
        p[i] = rules.adan(p[i], g[i], &m[i], &u[i], &n[i], &previous[i], &h)


cdef int pack_adan(dict scalars, void *out) except -1:
    (<rules.Adan *>out)[0] = scalars
    return 0


adan = Rule.make("adan", ("exp_avg", "exp_avg_diff", "exp_avg_sq", "pre_grad"),
                 adan_span[float], adan_span[double], pack_adan)


cdef void ftrl_span(floating *restrict p, const floating *restrict g, floating *restrict z, floating *restrict n,
                    floating *restrict _1, floating *restrict _2, Py_ssize_t n_elements,
                    const void *scalars) noexcept nogil:
    cdef rules.FTRL h = (<const rules.FTRL *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n_elements):
        p[i] = rules.ftrl(p[i], g[i], &z[i], &n[i], &h)


cdef int pack_ftrl(dict scalars, void *out) except -1:
    (<rules.FTRL *>out)[0] = scalars
    return 0


ftrl = Rule.make("ftrl", ("z", "n"), ftrl_span[float], ftrl_span[double], pack_ftrl)


cdef void sgd_schedule_free_span(floating *restrict p, const floating *restrict g, floating *restrict z,
                                 floating *restrict _1, floating *restrict _2, floating *restrict _3, Py_ssize_t n,
                                 const void *scalars) noexcept nogil:
    cdef rules.SGDScheduleFree h = (<const rules.SGDScheduleFree *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.sgd_schedule_free(p[i], g[i], &z[i], &h)


cdef int pack_sgd_schedule_free(dict scalars, void *out) except -1:
    (<rules.SGDScheduleFree *>out)[0] = scalars
    return 0


sgd_schedule_free = Rule.make("sgd_schedule_free", ("z",),
                              sgd_schedule_free_span[float], sgd_schedule_free_span[double], pack_sgd_schedule_free)


cdef void adamw_schedule_free_span(floating *restrict p, const floating *restrict g, floating *restrict z,
                                   floating *restrict v, floating *restrict _1, floating *restrict _2, Py_ssize_t n,
                                   const void *scalars) noexcept nogil:
    cdef rules.AdamWScheduleFree h = (<const rules.AdamWScheduleFree *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.adamw_schedule_free(p[i], g[i], &z[i], &v[i], &h)


cdef int pack_adamw_schedule_free(dict scalars, void *out) except -1:
    (<rules.AdamWScheduleFree *>out)[0] = scalars
    return 0


adamw_schedule_free = Rule.make("adamw_schedule_free", ("z", "exp_avg_sq"), adamw_schedule_free_span[float],
                                adamw_schedule_free_span[double], pack_adamw_schedule_free)


# --- rules that need sums over whole tensors --------------------------------------------------------------------------
# In blocks of BLOCK elements: the terms of each element in double, then their sum. No vector's width is in its order.

cdef double folded(double *x, Py_ssize_t n) noexcept nogil:
    """The sum of n terms: those behind the largest power of 2 below n onto the first, until one is left."""
    cdef Py_ssize_t half = 1
    if n & (n - 1):
        while 2 * half < n:
            half *= 2
        fold(x, x + half, n - half)
        n = half
    while n >= 8:
        n //= 8
        fold_thrice(x, x + n, n)
    while n > 1:
        n //= 2
        fold(x, x + n, n)
    return x[0] if n > 0 else 0


cdef void fold(double *restrict x, const double *restrict y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        x[i] = x[i] + y[i]


cdef void fold_thrice(double *restrict x, const double *restrict y, Py_ssize_t n) noexcept nogil:
    """8 * n terms at once, with each loaded once."""
    cdef Py_ssize_t i
    for i in range(n):
        x[i] = (((x[i] + y[i + 3 * n]) + (y[i + n] + y[i + 5 * n]))
                + ((y[i] + y[i + 4 * n]) + (y[i + 2 * n] + y[i + 6 * n])))


cdef void adam_scaled_sums(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict v,
                           floating *restrict v_max, floating *restrict _1, Py_ssize_t n, const void *scalars,
                           double *sums) noexcept nogil:
    cdef rules.AdamScaled h = (<const rules.AdamScaled *>scalars)[0]
    cdef double x[BLOCK]
    cdef double y[BLOCK]
    cdef Py_ssize_t i
    for i in range(n):
        rules.adam_scaled_terms(p[i], g[i], &m[i], &v[i], &v_max[i], &x[i], &y[i], &h)
    sums[0] = folded(x, n)
    sums[1] = folded(y, n)


cdef void adam_scaled_span(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict v,
                           floating *restrict v_max, floating *restrict _1, Py_ssize_t n,
                           const void *scalars) noexcept nogil:
    cdef rules.AdamScaled h = (<const rules.AdamScaled *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.adam_scaled(p[i], g[i], &m[i], &v[i], &v_max[i], &h)


cdef void finish_adam_scaled(void *scalars, const double *sums, Py_ssize_t size) noexcept nogil:
    rules.adam_scaled_finish(<rules.AdamScaled *>scalars, sums, size)


cdef int pack_adam_scaled(dict scalars, void *out) except -1:
    (<rules.AdamScaled *>out)[0] = {**scalars, "mask_factor": 1}
    return 0


adam_scaled = Rule.make("adam_scaled", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
                        adam_scaled_span[float], adam_scaled_span[double], pack_adam_scaled)\
    .after_sums(adam_scaled_sums[float], adam_scaled_sums[double], finish_adam_scaled)
(<Rule>adam).summing = adam_scaled


cdef void lars_sums(floating *restrict p, const floating *restrict g, floating *restrict b, floating *restrict _1,
                    floating *restrict _2, floating *restrict _3, Py_ssize_t n, const void *scalars,
                    double *sums) noexcept nogil:
    cdef rules.LARS h = (<const rules.LARS *>scalars)[0]
    cdef double x[BLOCK]
    cdef double y[BLOCK]
    cdef Py_ssize_t i
    for i in range(n):
        rules.lars_terms(p[i], g[i], &x[i], &y[i], &h)
    sums[0] = folded(x, n)
    sums[1] = folded(y, n)


cdef void lars_span(floating *restrict p, const floating *restrict g, floating *restrict b, floating *restrict _1,
                    floating *restrict _2, floating *restrict _3, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.LARS h = (<const rules.LARS *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.lars(p[i], g[i], &b[i], &h)


cdef void finish_lars(void *scalars, const double *sums, Py_ssize_t size) noexcept nogil:
    rules.lars_finish(<rules.LARS *>scalars, sums, size)


cdef int pack_lars(dict scalars, void *out) except -1:
    (<rules.LARS *>out)[0] = scalars
    return 0


lars = Rule.make("lars", ("momentum_buffer",),
                 lars_span[float], lars_span[double], pack_lars)\
    .after_sums(lars_sums[float], lars_sums[double], finish_lars)


cdef void lamb_sums(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict v,
                    floating *restrict _1, floating *restrict _2, Py_ssize_t n, const void *scalars,
                    double *sums) noexcept nogil:
    cdef rules.LAMB h = (<const rules.LAMB *>scalars)[0]
    cdef double x[BLOCK]
    cdef double y[BLOCK]
    cdef Py_ssize_t i
    for i in range(n):
        rules.lamb_terms(p[i], g[i], &m[i], &v[i], &x[i], &y[i], &h)
    sums[0] = folded(x, n)
    sums[1] = folded(y, n)


cdef void lamb_span(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict v,
                    floating *restrict _1, floating *restrict _2, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.LAMB h = (<const rules.LAMB *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.lamb(p[i], m[i], v[i], &h)


cdef void finish_lamb(void *scalars, const double *sums, Py_ssize_t size) noexcept nogil:
    rules.lamb_finish(<rules.LAMB *>scalars, sums, size)


cdef int pack_lamb(dict scalars, void *out) except -1:
    (<rules.LAMB *>out)[0] = scalars
    return 0


lamb = Rule.make("lamb", ("exp_avg", "exp_avg_sq"),
                 lamb_span[float], lamb_span[double], pack_lamb)\
    .after_sums(lamb_sums[float], lamb_sums[double], finish_lamb)


cdef void prodigy_sums(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict v,
                       floating *restrict s, floating *restrict p0, Py_ssize_t n, const void *scalars,
                       double *sums) noexcept nogil:
    cdef rules.Prodigy h = (<const rules.Prodigy *>scalars)[0]
    cdef double x[BLOCK]
    cdef double y[BLOCK]
    cdef Py_ssize_t i
    for i in range(n):
        rules.prodigy_terms(p[i], g[i], &m[i], &v[i], &s[i], &p0[i], &x[i], &y[i], &h)
    sums[0] = h.numerator_weight * folded(x, n)
    sums[1] = folded(y, n)


cdef void prodigy_span(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict v,
                       floating *restrict s, floating *restrict p0, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.Prodigy h = (<const rules.Prodigy *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.prodigy(p[i], m[i], v[i], &h)


cdef void finish_prodigy(void *scalars, const double *sums, Py_ssize_t size) noexcept nogil:
    rules.prodigy_finish(<rules.Prodigy *>scalars, sums, size)


cdef int pack_prodigy(dict scalars, void *out) except -1:
    (<rules.Prodigy *>out)[0] = scalars
    return 0


prodigy = Rule.make("prodigy", ("exp_avg", "exp_avg_sq", "s", "p0"),
                    prodigy_span[float], prodigy_span[double], pack_prodigy)\
    .after_sums(prodigy_sums[float], prodigy_sums[double], finish_prodigy, joint=True)


# --- no optimizers ----------------------------------------------------------------------------------------------------

cdef void interpolation_span(floating *restrict p, const floating *restrict z, floating *restrict _1,
                             floating *restrict _2, floating *restrict _3, floating *restrict _4, Py_ssize_t n,
                             const void *scalars) noexcept nogil:
    cdef rules.Interpolation h = (<const rules.Interpolation *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.interpolation(p[i], z[i], &h)


cdef int pack_interpolation(dict scalars, void *out) except -1:
    (<rules.Interpolation *>out)[0] = scalars
    return 0


interpolation = Rule.make("interpolation", (),
                          interpolation_span[float], interpolation_span[double], pack_interpolation)


cdef void muon_span(floating *restrict p, const floating *restrict g, floating *restrict m, floating *restrict u,
                    floating *restrict _1, floating *restrict _2, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.Muon h = (<const rules.Muon *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.muon(p[i], g[i], &m[i], u[i], &h)


cdef int pack_muon(dict scalars, void *out) except -1:
    (<rules.Muon *>out)[0] = scalars
    return 0


muon = Rule.make("muon", ("momentum_buffer", "direction"), muon_span[float], muon_span[double], pack_muon)


cdef void adafactor_span(floating *restrict p, const floating *restrict g, floating *restrict v, floating *restrict _1,
                         floating *restrict _2, floating *restrict _3, Py_ssize_t n,
                         const void *scalars) noexcept nogil:
    cdef rules.Adafactor h = (<const rules.Adafactor *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.adafactor(p[i], g[i], &v[i], &h)


cdef int pack_adafactor(dict scalars, void *out) except -1:
    (<rules.Adafactor *>out)[0] = scalars
    return 0


adafactor = Rule.make("adafactor", ("variance",), adafactor_span[float], adafactor_span[double], pack_adafactor)


# --- passes over matrices: the tiles of pyopt/_matrix.pxd -------------------------------------------------------------
# Sums are taken in double, LANES side by side along a row and each lane in order, so that they depend on the shape
# alone. A lane comes back after LANES elements, so that its loop is an elementwise one, for the compiler to vectorise.

cdef double total(double *lanes) noexcept nogil:
    """The sum of lanes, by halves."""
    cdef Py_ssize_t half = LANES // 2, i
    while half > 0:
        for i in range(half):
            lanes[i] += lanes[half + i]
        half = half // 2
    return lanes[0]


cdef void squares_lanes(const floating *restrict p, const floating *restrict g, double *restrict columns,
                        double *restrict row, double *restrict own, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef double x, y
    for i in range(n):
        x = g[i]
        y = p[i]
        x = x * x
        columns[i] += x
        row[i] += x
        own[i] += y * y


cdef void squares_tile(floating *p, const floating *g, const Matrices *job, Py_ssize_t index) noexcept nogil:
    """Sums of g**2 along the rows and the columns of a tile, and of p**2."""
    cdef Tile t = tile_at(job, index)
    cdef double *columns = job.column_sums + (t.matrix * job.row_tiles + t.row_tile) * job.columns
    cdef double row[LANES]
    cdef double own[LANES]
    cdef Py_ssize_t i, j, at
    memset(&columns[t.first_column], 0, (t.end_column - t.first_column) * sizeof(double))
    memset(own, 0, sizeof(own))
    for i in range(t.first_row, t.end_row):
        at = (t.matrix * job.rows + i) * job.columns
        memset(row, 0, sizeof(row))
        j = t.first_column
        while j + LANES <= t.end_column:
            squares_lanes(p + at + j, g + at + j, columns + j, row, own, LANES)
            j += LANES
        squares_lanes(p + at + j, g + at + j, columns + j, row, own, t.end_column - j)
        job.row_sums[(t.matrix * job.rows + i) * job.column_tiles + t.column_tile] = total(row)
    job.sums[index] = total(own)


cdef void update_lanes(const floating *restrict g, const floating *restrict b, double *restrict own, floating a,
                       floating most, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef double u
    for i in range(n):
        u = rules.factored(g[i], a, b[i], most)
        own[i] += u * u


cdef void update_squares_tile(floating *_1, const floating *g, const Matrices *job, Py_ssize_t index) noexcept nogil:
    """The sum of the squares of the updates of a tile."""
    cdef Tile t = tile_at(job, index)
    cdef const floating *a = <const floating *>job.row_factors + t.matrix * job.rows
    cdef const floating *b = <const floating *>job.column_factors + t.matrix * job.columns
    cdef floating most = <floating>job.most
    cdef double own[LANES]
    cdef Py_ssize_t i, j, at
    memset(own, 0, sizeof(own))
    for i in range(t.first_row, t.end_row):
        at = (t.matrix * job.rows + i) * job.columns
        j = t.first_column
        while j + LANES <= t.end_column:
            update_lanes(g + at + j, b + j, own, a[i], most, LANES)
            j += LANES
        update_lanes(g + at + j, b + j, own, a[i], most, t.end_column - j)
    job.sums[index] = total(own)


cdef void update_row(floating *restrict p, const floating *restrict g, const floating *restrict b, floating a,
                     floating most, floating decay_factor, floating step_size, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = p[i] * decay_factor - step_size * rules.factored(g[i], a, b[i], most)


cdef void update_tile(floating *p, const floating *g, const Matrices *job, Py_ssize_t index) noexcept nogil:
    """The step of a tile."""
    cdef Tile t = tile_at(job, index)
    cdef const floating *a = <const floating *>job.row_factors + t.matrix * job.rows
    cdef const floating *b = <const floating *>job.column_factors + t.matrix * job.columns + t.first_column
    cdef Py_ssize_t i, at
    for i in range(t.first_row, t.end_row):
        at = (t.matrix * job.rows + i) * job.columns + t.first_column
        update_row(p + at, g + at, b, a[i], <floating>job.most, <floating>job.decay_factor, <floating>job.step_size,
                   t.end_column - t.first_column)


cdef void product_lanes(const floating *restrict x, const floating *restrict y, double *restrict own,
                        Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        own[i] += <double>x[i] * <double>y[i]


cdef void product_tile(floating *x, const floating *y, const Matrices *job, Py_ssize_t index) noexcept nogil:
    """The sum of x * y, of a single row."""
    cdef Tile t = tile_at(job, index)
    cdef double own[LANES]
    cdef Py_ssize_t j = t.first_column
    memset(own, 0, sizeof(own))
    while j + LANES <= t.end_column:
        product_lanes(x + j, y + j, own, LANES)
        j += LANES
    product_lanes(x + j, y + j, own, t.end_column - j)
    job.sums[index] = total(own)


squares = Pass.make(squares_tile[float], squares_tile[double])
update_squares = Pass.make(update_squares_tile[float], update_squares_tile[double])
update = Pass.make(update_tile[float], update_tile[double])
product = Pass.make(product_tile[float], product_tile[double])


cdef void roof_span(floating *restrict p, const floating *restrict g, floating *restrict s, floating *restrict t,
                    floating *restrict u, floating *restrict v, Py_ssize_t n, const void *scalars) noexcept nogil:
    cdef rules.Roof h = (<const rules.Roof *>scalars)[0]
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = rules.roof(p[i], g[i], &s[i], &t[i], &u[i], &v[i], &h)


cdef int pack_roof(dict scalars, void *out) except -1:
    (<rules.Roof *>out)[0] = scalars
    return 0


roof = Rule.make("roof", ("s", "t", "u", "v"), roof_span[float], roof_span[double], pack_roof)
