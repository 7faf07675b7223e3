# What one step does to one element: one function per update rule, in the paper's symbols (p parameter, g gradient,
# m and v first and second moment). No loops, no threads, no Python. In order of increasing complexity.
#
# The numbers of a rule come in double, one struct for both element types; `<floating>` rounds each of them once, and
# the compiler moves that out of the loop, as it does every condition on the struct (one loop per combination).
# Every operation is a single IEEE one, in the order of torch.optim: see the notes on bits in the README.

from libc.math cimport sqrt, sqrtf

ctypedef fused floating:
    float
    double


# --- shared pieces ----------------------------------------------------------------------------------------------------

cdef inline floating root(floating x) noexcept nogil:
    if floating is float:
        return sqrtf(x)
    else:
        return sqrt(x)


cdef inline floating lerp(floating a, floating b, double weight) noexcept nogil:
    """a moved towards b; measured from the nearer end, so that weight 1 gives b exactly."""
    cdef floating w = <floating>weight
    cdef floating rest = <floating>(1 - w)  # by itself: a literal in an expression turns the whole of it to double
    if w < 0.5:
        return a + w * (b - a)
    return b - rest * (b - a)


cdef inline floating l2(floating g, floating p, double weight_decay) noexcept nogil:
    """The gradient with that of the penalty weight_decay / 2 * p**2; none at 0, so that 0 * inf does not appear."""
    if weight_decay != 0:
        return g + <floating>weight_decay * p
    return g


# --- the rules --------------------------------------------------------------------------------------------------------
# scale is the factor of the gradient: -1 to maximize, 1 / loss scale. decay is the factor 1 - lr * weight_decay where
# the decay is decoupled, else 1.

ctypedef struct SGD:
    double lr, momentum, undamped, weight_decay, scale  # undamped = 1 - dampening
    bint nesterov, first

cdef inline floating sgd(floating p, floating g, floating* b, const SGD* h) noexcept nogil:
    g = l2(<floating>h.scale * g, p, h.weight_decay)
    if h.momentum != 0:
        b[0] = g if h.first else b[0] * <floating>h.momentum + <floating>h.undamped * g
        g = g + <floating>h.momentum * b[0] if h.nesterov else b[0]
    return p - <floating>h.lr * g


ctypedef struct Lion:
    double lr, beta1, weight1, weight2, beta2, decay, scale  # weight = 1 - beta

cdef inline floating lion(floating p, floating g, floating* m, const Lion* h) noexcept nogil:
    g = <floating>h.scale * g
    cdef floating c = <floating>h.beta1 * m[0] + <floating>h.weight1 * g
    m[0] = <floating>h.beta2 * m[0] + <floating>h.weight2 * g
    cdef floating direction = 1 if c > 0 else (-1 if c < 0 else c)  # c itself: 0, or NaN, which must not vanish
    return p * <floating>h.decay - <floating>h.lr * direction


ctypedef struct Adagrad:
    double lr, weight_decay, eps, scale

cdef inline floating adagrad(floating p, floating g, floating* s, const Adagrad* h) noexcept nogil:
    g = l2(<floating>h.scale * g, p, h.weight_decay)
    s[0] = s[0] + g * g
    return p - <floating>h.lr * g / (root(s[0]) + <floating>h.eps)


ctypedef struct RMSprop:
    double lr, alpha, weight, momentum, weight_decay, eps, scale  # weight = 1 - alpha
    bint centered

cdef inline floating rmsprop(floating p, floating g, floating* s, floating* b, floating* a,
                             const RMSprop* h) noexcept nogil:
    g = l2(<floating>h.scale * g, p, h.weight_decay)
    s[0] = s[0] * <floating>h.alpha + <floating>h.weight * g * g
    cdef floating d = s[0]
    if h.centered:
        a[0] = lerp(a[0], g, h.weight)
        d = d - a[0] * a[0]
    d = root(d) + <floating>h.eps
    if h.momentum > 0:
        b[0] = b[0] * <floating>h.momentum + g / d
        return p - <floating>h.lr * b[0]
    return p - <floating>h.lr * g / d


ctypedef struct Adam:
    double step_size, weight1, beta2, weight2, bias2, eps, weight_decay, decay, scale
    bint amsgrad  # weight = 1 - beta; step_size = lr / (1 - beta1**t); bias2 = sqrt(1 - beta2**t)

cdef inline floating adam(floating p, floating g, floating* m, floating* v, floating* v_max,
                          const Adam* h) noexcept nogil:
    g = l2(<floating>h.scale * g, p, h.weight_decay)
    m[0] = lerp(m[0], g, h.weight1)
    v[0] = v[0] * <floating>h.beta2 + <floating>h.weight2 * g * g
    cdef floating u = v[0]
    if h.amsgrad:
        u = v_max[0] if v_max[0] >= u else u  # a NaN in v shows,
        u = v_max[0] = u if v_max[0] == v_max[0] else v_max[0]  # and one in v_max
    cdef floating d = root(u) / <floating>h.bias2 + <floating>h.eps
    return p * <floating>h.decay - <floating>h.step_size * m[0] / d


# --- the roof ---------------------------------------------------------------------------------------------------------
# No optimizer: it reads and writes the streams of one with next to no arithmetic, for bench/ to measure against.

ctypedef struct Roof:
    double scale
    int states

cdef inline floating roof(floating p, floating g, floating* s, floating* t, floating* u,
                          const Roof* h) noexcept nogil:
    cdef floating d = <floating>h.scale * g
    if h.states > 0:
        s[0] = s[0] + d
    if h.states > 1:
        t[0] = t[0] + d
    if h.states > 2:
        u[0] = u[0] + d
    return p + d
