# What one step does to one element: one function per update rule, in the paper's symbols (p parameter, g gradient,
# m and v first and second moment). No loops, no threads, no Python. In order of increasing complexity.
#
# The numbers of a rule come in double, one struct for both element types; `<floating>` rounds each of them once, and
# the compiler moves that out of the loop, as it does every condition on the struct (one loop per combination).
# Every operation is a single IEEE one, in the order of torch.optim, but that a division by a number of the step is a
# multiplication by its reciprocal, taken in double: see docs/same_bits.md.

from libc.math cimport fabs, fabsf, sqrt, sqrtf

ctypedef fused floating:
    float
    double


# --- shared pieces ----------------------------------------------------------------------------------------------------

cdef inline floating root(floating x) noexcept nogil:
    if floating is float:
        return sqrtf(x)
    else:
        return sqrt(x)


cdef inline floating magnitude(floating x) noexcept nogil:
    if floating is float:
        return fabsf(x)
    else:
        return fabs(x)


cdef inline floating sign(floating x) noexcept nogil:
    """1, -1 or 0; NaN of NaN, which must not vanish."""
    return 1 if x > 0 else (-1 if x < 0 else x - x)


cdef inline floating larger(floating a, floating b) noexcept nogil:
    """The larger of two; NaN if either is."""
    cdef floating c = a if a >= b else b
    return c if a == a else a


cdef inline floating lerp(floating a, floating b, double weight) noexcept nogil:
    """a moved towards b; measured from the nearer end, so that weight 1 gives b exactly."""
    cdef floating w = <floating>weight
    cdef floating rest = <floating>(1 - w)  # by itself: a literal in an expression turns the whole of it to double
    if w < 0.5:
        return a + w * (b - a)
    return b - rest * (b - a)


cdef inline floating mean_square(floating v, floating g, double beta, double weight) noexcept nogil:
    """The moving mean of squares after one more g; weight = 1 - beta."""
    return v * <floating>beta + <floating>weight * g * g


cdef inline floating l2(floating g, floating p, double weight_decay) noexcept nogil:
    """The gradient with that of the penalty weight_decay / 2 * p**2; none at 0, so that 0 * inf does not appear."""
    if weight_decay != 0:
        return g + <floating>weight_decay * p
    return g


# --- the rules --------------------------------------------------------------------------------------------------------
# gradient_factor, the first number of each, is -1 to maximize, times 1 / loss scale, times what clips the norm.
# decay_factor is 1 - lr * weight_decay where the decay is decoupled, else 1. weight = 1 - beta, by the beta's number.

ctypedef struct SGD:
    double gradient_factor, lr, momentum, one_minus_dampening, weight_decay
    bint nesterov, first

cdef inline floating sgd(floating p, floating g, floating* b, const SGD* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    if h.momentum != 0:
        b[0] = g if h.first else b[0] * <floating>h.momentum + <floating>h.one_minus_dampening * g
        g = g + <floating>h.momentum * b[0] if h.nesterov else b[0]
    return p - <floating>h.lr * g


ctypedef struct Lion:
    double gradient_factor, lr, beta1, weight1, weight2, beta2, decay_factor

cdef inline floating lion(floating p, floating g, floating* m, const Lion* h) noexcept nogil:
    g = <floating>h.gradient_factor * g
    cdef floating c = <floating>h.beta1 * m[0] + <floating>h.weight1 * g
    m[0] = <floating>h.beta2 * m[0] + <floating>h.weight2 * g
    return p * <floating>h.decay_factor - <floating>h.lr * sign(c)


ctypedef struct Adagrad:
    double gradient_factor, lr, weight_decay, eps

cdef inline floating adagrad(floating p, floating g, floating* s, const Adagrad* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    s[0] = s[0] + g * g
    return p - <floating>h.lr * g / (root(s[0]) + <floating>h.eps)


ctypedef struct ASGD:
    double gradient_factor, step_size, weight, weight_decay, decay_factor  # decay_factor = 1 - lambd * eta
    bint averages  # whether the weight, mu, is not 1

cdef inline floating asgd(floating p, floating g, floating* ax, const ASGD* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    p = p * <floating>h.decay_factor - <floating>h.step_size * g
    ax[0] = ax[0] + <floating>h.weight * (p - ax[0]) if h.averages else p
    return p


ctypedef struct Rprop:
    double gradient_factor, eta_minus, eta_plus, smallest, largest

cdef inline floating rprop(floating p, floating g, floating* previous, floating* step_size,
                           const Rprop* h) noexcept nogil:
    g = <floating>h.gradient_factor * g
    cdef floating c = g * previous[0]
    cdef floating eta = <floating>h.eta_plus if c > 0 else (<floating>h.eta_minus if c < 0 else 1)
    cdef floating d = step_size[0] * eta
    d = <floating>h.smallest if d < <floating>h.smallest else d
    d = <floating>h.largest if d > <floating>h.largest else d
    g = 0 if c < 0 else g
    step_size[0] = d
    previous[0] = g
    return p - sign(g) * d


ctypedef struct Adadelta:
    double gradient_factor, lr, rho, weight, eps, weight_decay  # weight = 1 - rho

cdef inline floating adadelta(floating p, floating g, floating* s, floating* a, const Adadelta* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    s[0] = mean_square(s[0], g, h.rho, h.weight)
    cdef floating d = root(a[0] + <floating>h.eps) / root(s[0] + <floating>h.eps) * g
    a[0] = mean_square(a[0], d, h.rho, h.weight)
    return p - <floating>h.lr * d


ctypedef struct RMSprop:
    double gradient_factor, lr, alpha, weight, momentum, weight_decay, eps  # weight = 1 - alpha
    bint centered

cdef inline floating rmsprop(floating p, floating g, floating* s, floating* b, floating* a,
                             const RMSprop* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    s[0] = mean_square(s[0], g, h.alpha, h.weight)
    cdef floating d = s[0]
    if h.centered:
        a[0] = lerp(a[0], g, h.weight)
        d = d - a[0] * a[0]
    d = root(d) + <floating>h.eps
    if h.momentum > 0:
        b[0] = b[0] * <floating>h.momentum + g / d
        return p - <floating>h.lr * b[0]
    return p - <floating>h.lr * g / d


# Of the rules below, step_size = lr / (1 - beta1**t) and bias_correction = 1 - beta**t, by the number of the beta.

ctypedef struct Adamax:
    double gradient_factor, step_size, weight1, beta2, eps, weight_decay

cdef inline floating adamax(floating p, floating g, floating* m, floating* u, const Adamax* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    m[0] = lerp(m[0], g, h.weight1)
    u[0] = larger(u[0] * <floating>h.beta2, magnitude(g) + <floating>h.eps)
    return p - <floating>h.step_size * m[0] / u[0]


ctypedef struct Adam:
    double gradient_factor, step_size, weight1, beta2, weight2, inverse_sqrt_bias_correction2, eps, weight_decay
    double decay_factor
    bint amsgrad

# The rule of Adam, its step clipped by the root mean square of g / sqrt(v), or masked where it goes against g.
ctypedef struct AdamScaled:
    double gradient_factor, step_size, weight1, beta2, weight2, inverse_sqrt_bias_correction2, eps, weight_decay
    double decay_factor, mask_factor
    bint amsgrad, update_clip, cautious

ctypedef fused AnyAdam:
    Adam
    AdamScaled

cdef inline floating adam_update(floating g, floating* m, floating* v, floating* v_max,
                                 const AnyAdam* h) noexcept nogil:
    """What is taken from an element, and its new moments."""
    m[0] = lerp(m[0], g, h.weight1)
    v[0] = mean_square(v[0], g, h.beta2, h.weight2)
    cdef floating u = v[0]
    if h.amsgrad:
        u = v_max[0] = larger(v_max[0], u)
    cdef floating d = root(u) * <floating>h.inverse_sqrt_bias_correction2 + <floating>h.eps
    return <floating>h.step_size * m[0] / d

cdef inline floating adam(floating p, floating g, floating* m, floating* v, floating* v_max,
                          const Adam* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    return p * <floating>h.decay_factor - adam_update(g, m, v, v_max, h)


# Of the elements of rows that are touched; step_size = lr * sqrt(1 - beta2**t) / (1 - beta1**t).
ctypedef struct SparseAdam:
    double gradient_factor, step_size, weight1, weight2, eps

cdef inline floating sparse_adam(floating p, floating g, floating* m, floating* v, const SparseAdam* h) noexcept nogil:
    g = <floating>h.gradient_factor * g
    m[0] = m[0] + <floating>h.weight1 * (g - m[0])
    v[0] = v[0] + <floating>h.weight2 * (g * g - v[0])
    return p - <floating>h.step_size * (m[0] / (root(v[0]) + <floating>h.eps))


ctypedef struct AdaBelief:
    double gradient_factor, step_size, weight1, beta2, weight2, inverse_sqrt_bias_correction2, eps, weight_decay
    double decay_factor

cdef inline floating adabelief(floating p, floating g, floating* m, floating* s, const AdaBelief* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    m[0] = lerp(m[0], g, h.weight1)
    s[0] = mean_square(s[0], g - m[0], h.beta2, h.weight2) + <floating>h.eps
    cdef floating d = root(s[0]) * <floating>h.inverse_sqrt_bias_correction2 + <floating>h.eps
    return p * <floating>h.decay_factor - <floating>h.step_size * m[0] / d


ctypedef struct RAdam:
    double gradient_factor, step_size, weight1, beta2, weight2, eps, weight_decay, decay_factor
    bint rectified  # step_size holds the rectification too

cdef inline floating radam(floating p, floating g, floating* m, floating* v, const RAdam* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    m[0] = lerp(m[0], g, h.weight1)
    v[0] = mean_square(v[0], g, h.beta2, h.weight2)
    cdef floating u = <floating>h.step_size * m[0]
    if h.rectified:
        u = u / (root(v[0]) + <floating>h.eps)
    return p * <floating>h.decay_factor - u


ctypedef struct NAdam:
    double gradient_factor, gradient_step_size, step_size, weight1, beta2, weight2, inverse_bias_correction2, eps
    double weight_decay, decay_factor

cdef inline floating nadam(floating p, floating g, floating* m, floating* v, const NAdam* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    m[0] = lerp(m[0], g, h.weight1)
    v[0] = mean_square(v[0], g, h.beta2, h.weight2)
    cdef floating d = root(v[0] * <floating>h.inverse_bias_correction2) + <floating>h.eps
    cdef floating u = <floating>h.gradient_step_size * g + <floating>h.step_size * m[0]
    return p * <floating>h.decay_factor - u / d


ctypedef struct ADOPT:
    double gradient_factor, lr, weight1, beta2, weight2, eps, clip, weight_decay, decay_factor
    bint first

cdef inline floating adopt(floating p, floating g, floating* m, floating* v, const ADOPT* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    if h.first:
        v[0] = g * g
        return p
    cdef floating d = root(v[0])
    cdef floating c = g / (<floating>h.eps if d < <floating>h.eps else d)
    c = <floating>h.clip if c > <floating>h.clip else c
    c = -<floating>h.clip if c < -<floating>h.clip else c
    m[0] = lerp(m[0], c, h.weight1)
    v[0] = mean_square(v[0], g, h.beta2, h.weight2)
    return p * <floating>h.decay_factor - <floating>h.lr * m[0]


ctypedef struct AdEMAMix:
    double gradient_factor, step_size, slow_step_size, weight1, beta2, weight2, weight3, inverse_sqrt_bias_correction2
    double eps, decay_factor

cdef inline floating ademamix(floating p, floating g, floating* m1, floating* m2, floating* v,
                              const AdEMAMix* h) noexcept nogil:
    g = <floating>h.gradient_factor * g
    m1[0] = lerp(m1[0], g, h.weight1)
    m2[0] = lerp(m2[0], g, h.weight3)
    v[0] = mean_square(v[0], g, h.beta2, h.weight2)
    cdef floating d = root(v[0]) * <floating>h.inverse_sqrt_bias_correction2 + <floating>h.eps
    cdef floating u = <floating>h.step_size * m1[0] + <floating>h.slow_step_size * m2[0]
    return p * <floating>h.decay_factor - u / d


ctypedef struct Adan:
    double gradient_factor, step_size, difference_step_size, weight1, beta2, weight2, beta3, weight3
    double inverse_sqrt_bias_correction3, eps, decay_factor  # decay_factor = 1 / (1 + lr * weight_decay)
    bint first

cdef inline floating adan(floating p, floating g, floating* m, floating* u, floating* n, floating* previous,
                          const Adan* h) noexcept nogil:
    g = <floating>h.gradient_factor * g
    cdef floating change = 0 if h.first else g - previous[0]
    previous[0] = g
    m[0] = lerp(m[0], g, h.weight1)
    u[0] = lerp(u[0], change, h.weight2)
    n[0] = mean_square(n[0], g + <floating>h.beta2 * change, h.beta3, h.weight3)
    cdef floating d = root(n[0]) * <floating>h.inverse_sqrt_bias_correction3 + <floating>h.eps
    p = p - (<floating>h.step_size * m[0] + <floating>h.difference_step_size * u[0]) / d
    return p * <floating>h.decay_factor


ctypedef struct FTRL:
    double gradient_factor, inverse_lr, l1, ridge  # ridge = beta / lr + l2

cdef inline floating ftrl(floating p, floating g, floating* z, floating* n, const FTRL* h) noexcept nogil:
    g = <floating>h.gradient_factor * g
    cdef floating before = root(n[0])
    n[0] = n[0] + g * g
    cdef floating after = root(n[0])
    z[0] = z[0] + (g - (after - before) * <floating>h.inverse_lr * p)
    cdef floating w = (sign(z[0]) * <floating>h.l1 - z[0]) / (after * <floating>h.inverse_lr + <floating>h.ridge)
    return 0 if magnitude(z[0]) <= <floating>h.l1 else w


# Schedule-free: p is y, where the gradients are taken; the average x follows from y and z. y_step_size =
# lr * (beta * (1 - c) - 1), c the weight of this step in the average.

ctypedef struct SGDScheduleFree:
    double gradient_factor, lr, y_step_size, c, weight_decay
    bint first

cdef inline floating sgd_schedule_free(floating p, floating g, floating* z,
                                       const SGDScheduleFree* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    cdef floating from_z = p if h.first else z[0]
    z[0] = from_z - <floating>h.lr * g
    return lerp(p, from_z, h.c) + <floating>h.y_step_size * g


ctypedef struct AdamWScheduleFree:
    double gradient_factor, lr, y_step_size, c, beta2, weight2, inverse_bias_correction2, eps, weight_decay
    bint first

cdef inline floating adamw_schedule_free(floating p, floating g, floating* z, floating* v,
                                         const AdamWScheduleFree* h) noexcept nogil:
    g = <floating>h.gradient_factor * g
    v[0] = mean_square(v[0], g, h.beta2, h.weight2)
    cdef floating d = root(v[0] * <floating>h.inverse_bias_correction2) + <floating>h.eps
    g = l2(g / d, p, h.weight_decay)
    cdef floating from_z = p if h.first else z[0]
    z[0] = from_z - <floating>h.lr * g
    return lerp(p, from_z, h.c) + <floating>h.y_step_size * g


# --- rules that need sums over whole tensors --------------------------------------------------------------------------
# *_terms makes of an element what is summed, x and y, in double; where it has to make the new state for that, it writes
# it, and the rule does not. *_finish makes numbers of the two sums over a tensor; the rule follows.

# The sums of AdamScaled.
cdef inline double clip_term(floating g, floating v, const AdamScaled* h) noexcept nogil:
    g = g / larger(root(v) * <floating>h.inverse_sqrt_bias_correction2, <floating>h.eps)
    return <double>g * <double>g

# The state is not written here: the rule makes it anew, which moves less memory than to write it and read it again.
cdef inline void adam_scaled_terms(floating p, floating g, const floating* m, const floating* v, const floating* v_max,
                                   double* x, double* y, const AdamScaled* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    cdef floating u = mean_square(v[0], g, h.beta2, h.weight2)
    y[0] = 1 if lerp(m[0], g, h.weight1) * g > 0 else 0
    if h.update_clip:
        if h.amsgrad:
            x[0] = clip_term(g, larger(v_max[0], u), h)
        else:
            x[0] = clip_term(g, u, h)

cdef inline void adam_scaled_finish(AdamScaled* h, const double* sums, Py_ssize_t size) noexcept nogil:
    cdef double rms = sqrt(sums[0] / size) if h.update_clip else 0, share = sums[1] / size
    if h.update_clip and not rms <= 1:  # NaN shows
        h.step_size /= rms
        h.decay_factor = 1 - (1 - h.decay_factor) / rms
    h.mask_factor = 1 / (share if share > 1e-3 else 1e-3)

cdef inline floating adam_scaled(floating p, floating g, floating* m, floating* v, floating* v_max,
                                 const AdamScaled* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    cdef floating u = adam_update(g, m, v, v_max, h)
    if h.cautious:
        u = u * (<floating>h.mask_factor if m[0] * g > 0 else 0)
    return p * <floating>h.decay_factor - u


ctypedef struct LARS:
    double gradient_factor, lr, momentum, weight_decay, trust_coefficient
    bint nesterov, trust_ratio

cdef inline void lars_terms(floating p, floating g, double* x, double* y, const LARS* h) noexcept nogil:
    g = <floating>h.gradient_factor * g
    x[0] = <double>p * <double>p
    y[0] = <double>g * <double>g

cdef inline void lars_finish(LARS* h, const double* sums, Py_ssize_t size) noexcept nogil:
    cdef double p = sqrt(sums[0]), g = sqrt(sums[1])
    if h.trust_ratio and p != 0 and g != 0:
        h.lr *= h.trust_coefficient * p / (g + h.weight_decay * p)

cdef inline floating lars(floating p, floating g, floating* b, const LARS* h) noexcept nogil:
    g = <floating>h.lr * l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    if h.momentum != 0:
        b[0] = b[0] * <floating>h.momentum + g
        g = g + <floating>h.momentum * b[0] if h.nesterov else b[0]
    return p - g


ctypedef struct LAMB:
    double gradient_factor, lr, inverse_bias_correction1, weight1, beta2, weight2, inverse_sqrt_bias_correction2, eps
    double weight_decay
    bint trust_ratio

cdef inline floating lamb_direction(floating p, floating m, floating v, const LAMB* h) noexcept nogil:
    cdef floating d = root(v) * <floating>h.inverse_sqrt_bias_correction2 + <floating>h.eps
    return l2(<floating>h.inverse_bias_correction1 * m / d, p, h.weight_decay)

cdef inline void lamb_terms(floating p, floating g, floating* m, floating* v, double* x, double* y,
                            const LAMB* h) noexcept nogil:
    g = <floating>h.gradient_factor * g
    m[0] = lerp(m[0], g, h.weight1)
    v[0] = mean_square(v[0], g, h.beta2, h.weight2)
    cdef floating u = lamb_direction(p, m[0], v[0], h)
    x[0] = <double>p * <double>p
    y[0] = <double>u * <double>u

cdef inline void lamb_finish(LAMB* h, const double* sums, Py_ssize_t size) noexcept nogil:
    if h.trust_ratio and sums[0] != 0 and sums[1] != 0:
        h.lr *= sqrt(sums[0]) / sqrt(sums[1])

cdef inline floating lamb(floating p, floating m, floating v, const LAMB* h) noexcept nogil:
    return p - <floating>h.lr * lamb_direction(p, m, v, h)


# The first two are kept from step to step; the sums are joint, so that they stay the same for all. Until the sums are
# known d is that of the last step: all factors of g stand for it.
ctypedef struct Prodigy:
    double gradient_factor, d, d_numerator, step_size, beta1, weight1, beta2, weight2, beta3, weight3
    double numerator_weight, d_coef, eps, weight_decay, decay_factor
    bint first

cdef inline void prodigy_terms(floating p, floating g, floating* m, floating* v, floating* s, floating* p0, double* x,
                               double* y, const Prodigy* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    if h.first:
        p0[0] = p
    m[0] = m[0] * <floating>h.beta1 + <floating>h.weight1 * g
    v[0] = mean_square(v[0], g, h.beta2, h.weight2)
    s[0] = s[0] * <floating>h.beta3 + <floating>h.weight3 * g
    x[0] = <double>g * (<double>p0[0] - <double>p)
    y[0] = magnitude(s[0])

cdef inline void prodigy_finish(Prodigy* h, const double* sums, Py_ssize_t size) noexcept nogil:
    h.d_numerator = h.beta3 * h.d_numerator + sums[0]
    if sums[1] != 0:
        h.d = larger(h.d, h.d_coef * h.d_numerator / sums[1])
    h.eps *= h.d

cdef inline floating prodigy(floating p, floating m, floating v, const Prodigy* h) noexcept nogil:
    return p * <floating>h.decay_factor - <floating>h.step_size * m / (root(v) + <floating>h.eps)


# --- rules that need sums over rows -----------------------------------------------------------------------------------
# *_term makes of an element what is summed over its row, in double; *_finish makes of the sum the row's own number, its
# state, and the numbers of its step; the rule follows.

ctypedef struct RowwiseAdagrad:
    double gradient_factor, lr, eps, weight_decay, decay_factor

cdef inline double rowwise_adagrad_term(floating p, floating g, const RowwiseAdagrad* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    return <double>g * <double>g

cdef inline void rowwise_adagrad_finish(RowwiseAdagrad* h, double sum, Py_ssize_t size, floating* s) noexcept nogil:
    s[0] = <floating>(s[0] + sum / size)
    h.lr = h.lr / (sqrt(s[0]) + h.eps)

cdef inline floating rowwise_adagrad(floating p, floating g, const RowwiseAdagrad* h) noexcept nogil:
    g = l2(<floating>h.gradient_factor * g, p, h.weight_decay)
    return p * <floating>h.decay_factor - <floating>h.lr * g


# --- no optimizers ----------------------------------------------------------------------------------------------------

# The average of a parameter: the stream in the parameter's place, which comes in the gradient's. A weight of 1 copies,
# which lerp does not with an inf.
ctypedef struct Average:
    double weight

cdef inline floating average(floating a, floating p, const Average* h) noexcept nogil:
    return p if h.weight == 1 else lerp(a, p, h.weight)


ctypedef struct Scale:
    double factor

cdef inline floating scale(floating g, const Scale* h) noexcept nogil:
    return g * <floating>h.factor


ctypedef struct Clamp:
    double most

cdef inline floating clamp(floating g, const Clamp* h) noexcept nogil:
    """Between -most and most; NaN stays."""
    cdef floating most = <floating>h.most
    g = most if g > most else g
    return -most if g < -most else g


ctypedef struct Norm:
    double power, scale

# The passage between y and x: p moved along the line through z, which comes in the place of the gradient.
ctypedef struct Interpolation:
    double gradient_factor, weight

cdef inline floating interpolation(floating p, floating z, const Interpolation* h) noexcept nogil:
    return p + <floating>h.weight * (<floating>h.gradient_factor * z - p)


# --- of matrices ------------------------------------------------------------------------------------------------------
# What is left of their steps when the numbers per tensor are known: see pyopt/optimizers.

# u is the orthogonalized direction; m moves after it has been made.
ctypedef struct Muon:
    double gradient_factor, step_size, weight, decay_factor  # weight = 1 - momentum

cdef inline floating muon(floating p, floating g, floating* m, floating u, const Muon* h) noexcept nogil:
    m[0] = lerp(m[0], <floating>h.gradient_factor * g, h.weight)
    return p * <floating>h.decay_factor - <floating>h.step_size * u


# most = 1 / eps, the bound of 1 / sqrt(v); step_size holds the clipping of the update.
ctypedef struct Adafactor:
    double gradient_factor, step_size, weight, most, decay_factor  # weight = t**beta2_decay

cdef inline floating adafactor(floating p, floating g, floating* v, const Adafactor* h) noexcept nogil:
    g = <floating>h.gradient_factor * g
    v[0] = lerp(v[0], g * g, h.weight)
    cdef floating one = 1
    cdef floating inverse = one / root(v[0])
    inverse = <floating>h.most if inverse > <floating>h.most else inverse
    return p * <floating>h.decay_factor - <floating>h.step_size * (g * inverse)


# Its update where a matrix has one factor per row and one per column: a * b = 1 / sqrt(v).
cdef inline floating factored(floating g, floating a, floating b, floating most) noexcept nogil:
    cdef floating inverse = a * b
    return g * (most if inverse > most else inverse)


# The roof: it reads and writes the streams of one with next to no arithmetic, for bench/ to measure against.

ctypedef struct Roof:
    double gradient_factor
    int states

cdef inline floating roof(floating p, floating g, floating* s, floating* t, floating* u, floating* v,
                          const Roof* h) noexcept nogil:
    cdef floating d = <floating>h.gradient_factor * g
    if h.states > 0:
        s[0] = s[0] + d
    if h.states > 1:
        t[0] = t[0] + d
    if h.states > 2:
        u[0] = u[0] + d
    if h.states > 3:
        v[0] = v[0] + d
    return p + d
