# The numbers of a rule as they follow from its options and the count of the step, in double, for the C door: what
# `scalars` and `next_numbers` of the optimizer are in Python, in the same operations in the same order. Both give the
# same bits: tests/test_door.py. The options come in the order of the catalogue: pyopt/_catalogue.h.

from libc.math cimport isnan, sqrt

from pyopt cimport _rules as rules
from pyopt._libm cimport exp, log, pow


cdef inline double smaller(double a, double b) noexcept nogil:
    return a if a < b else b


cdef inline double greater(double a, double b) noexcept nogil:
    return a if a > b else b


cdef inline double sign_of(double maximize) noexcept nogil:
    return -1 if maximize != 0 else 1


cdef inline double penalty(double weight_decay, double decoupled) noexcept nogil:
    return 0 if decoupled != 0 else weight_decay


cdef inline double shrinkage(double lr, double weight_decay, double decoupled) noexcept nogil:
    return 1 - lr * weight_decay if decoupled != 0 else 1


cdef struct AdaBelief:
    double lr, beta1, beta2, eps, weight_decay, maximize, decoupled

cdef inline void adabelief(const AdaBelief *o, double t, rules.AdaBelief *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.step_size = o.lr / (1 - pow(o.beta1, t))
    h.weight1, h.beta2, h.weight2 = 1 - o.beta1, o.beta2, 1 - o.beta2
    h.inverse_sqrt_bias_correction2 = 1 / sqrt(1 - pow(o.beta2, t))
    h.eps = o.eps
    h.weight_decay = penalty(o.weight_decay, o.decoupled)
    h.decay_factor = shrinkage(o.lr, o.weight_decay, o.decoupled)


cdef struct Adadelta:
    double lr, rho, eps, weight_decay, maximize

cdef inline void adadelta(const Adadelta *o, double t, rules.Adadelta *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.lr, h.rho, h.weight, h.eps, h.weight_decay = o.lr, o.rho, 1 - o.rho, o.eps, o.weight_decay


cdef struct Adagrad:
    double lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize

cdef inline void adagrad(const Adagrad *o, double t, rules.Adagrad *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.lr, h.weight_decay, h.eps = o.lr / (1 + (t - 1) * o.lr_decay), o.weight_decay, o.eps


cdef struct Adam:
    double lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, update_clip, cautious, decoupled

cdef inline void adam(const Adam *o, double t, double decoupled, rules.Adam *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.step_size = o.lr / (1 - pow(o.beta1, t))
    h.weight1, h.beta2, h.weight2 = 1 - o.beta1, o.beta2, 1 - o.beta2
    h.inverse_sqrt_bias_correction2 = 1 / sqrt(1 - pow(o.beta2, t))
    h.eps = o.eps
    h.weight_decay = penalty(o.weight_decay, decoupled)
    h.decay_factor = shrinkage(o.lr, o.weight_decay, decoupled)
    h.amsgrad = o.amsgrad != 0

cdef inline void adam_scaled(const Adam *o, double t, double decoupled, rules.AdamScaled *h) noexcept nogil:
    cdef rules.Adam plain
    adam(o, t, decoupled, &plain)
    h.gradient_factor, h.step_size, h.weight1 = plain.gradient_factor, plain.step_size, plain.weight1
    h.beta2, h.weight2, h.eps = plain.beta2, plain.weight2, plain.eps
    h.inverse_sqrt_bias_correction2 = plain.inverse_sqrt_bias_correction2
    h.weight_decay, h.decay_factor, h.mask_factor = plain.weight_decay, plain.decay_factor, 1
    h.amsgrad, h.update_clip, h.cautious = plain.amsgrad, o.update_clip != 0, o.cautious != 0


cdef struct Adamax:
    double lr, beta1, beta2, eps, weight_decay, maximize

cdef inline void adamax(const Adamax *o, double t, rules.Adamax *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.step_size = o.lr / (1 - pow(o.beta1, t))
    h.weight1, h.beta2, h.eps, h.weight_decay = 1 - o.beta1, o.beta2, o.eps, o.weight_decay


cdef struct Adan:
    double lr, beta1, beta2, beta3, eps, weight_decay, maximize

cdef inline void adan(const Adan *o, double t, rules.Adan *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.step_size = o.lr / (1 - pow(o.beta1, t))
    h.difference_step_size = o.lr * o.beta2 / (1 - pow(o.beta2, t))
    h.weight1, h.beta2, h.weight2, h.beta3, h.weight3 = 1 - o.beta1, o.beta2, 1 - o.beta2, o.beta3, 1 - o.beta3
    h.inverse_sqrt_bias_correction3 = 1 / sqrt(1 - pow(o.beta3, t))
    h.eps, h.decay_factor, h.first = o.eps, 1 / (1 + o.lr * o.weight_decay), t == 1


cdef struct AdEMAMix:
    double lr, beta1, beta2, beta3, alpha, beta3_warmup, alpha_warmup, eps, weight_decay, maximize

cdef inline double inverse_log(double beta) noexcept nogil:
    return 1 / log(beta) if beta != 0 else 0

cdef inline void ademamix(const AdEMAMix *o, double t, rules.AdEMAMix *h) noexcept nogil:
    cdef double alpha = o.alpha, beta3 = o.beta3, share, inverse
    if not isnan(o.alpha_warmup):
        alpha *= smaller(1, t / o.alpha_warmup)
    if not isnan(o.beta3_warmup) and t < o.beta3_warmup:
        share = t / o.beta3_warmup
        inverse = (1 - share) * inverse_log(o.beta1) + share * inverse_log(o.beta3)
        beta3 = exp(1 / inverse) if inverse != 0 else 0
    h.gradient_factor = sign_of(o.maximize)
    h.step_size, h.slow_step_size = o.lr / (1 - pow(o.beta1, t)), o.lr * alpha
    h.weight1, h.beta2, h.weight2, h.weight3 = 1 - o.beta1, o.beta2, 1 - o.beta2, 1 - beta3
    h.inverse_sqrt_bias_correction2 = 1 / sqrt(1 - pow(o.beta2, t))
    h.eps, h.decay_factor = o.eps, 1 - o.lr * o.weight_decay


cdef struct ADOPT:
    double lr, beta1, beta2, eps, weight_decay, maximize, decoupled

cdef inline void adopt(const ADOPT *o, double t, rules.ADOPT *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.lr, h.weight1, h.beta2, h.weight2, h.eps = o.lr, 1 - o.beta1, o.beta2, 1 - o.beta2, o.eps
    h.clip, h.first = pow(t - 1, 0.25), t == 1
    h.weight_decay = penalty(o.weight_decay, o.decoupled)
    h.decay_factor = shrinkage(o.lr, o.weight_decay, o.decoupled)


cdef struct ASGD:
    double lr, lambd, alpha, t0, weight_decay, maximize

cdef struct ASGDKept:
    double eta, mu

cdef inline void asgd(const ASGD *o, double t, ASGDKept *kept, rules.ASGD *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.step_size, h.weight, h.averages = kept.eta, kept.mu, kept.mu != 1
    h.weight_decay, h.decay_factor = o.weight_decay, 1 - o.lambd * kept.eta
    kept.eta = o.lr / pow(1 + o.lambd * o.lr * t, o.alpha)
    kept.mu = 1 / greater(1, t - o.t0)


cdef struct FTRL:
    double lr, l1, l2, beta, initial_accumulator_value, maximize

cdef inline void ftrl(const FTRL *o, double t, rules.FTRL *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.inverse_lr, h.l1, h.ridge = 1 / o.lr, o.l1, o.beta / o.lr + o.l2


cdef struct LAMB:
    double lr, beta1, beta2, eps, weight_decay, trust_ratio, maximize

cdef inline void lamb(const LAMB *o, double t, rules.LAMB *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.lr, h.inverse_bias_correction1 = o.lr, 1 / (1 - pow(o.beta1, t))
    h.weight1, h.beta2, h.weight2 = 1 - o.beta1, o.beta2, 1 - o.beta2
    h.inverse_sqrt_bias_correction2 = 1 / sqrt(1 - pow(o.beta2, t))
    h.eps, h.weight_decay, h.trust_ratio = o.eps, o.weight_decay, o.trust_ratio != 0


cdef struct LARS:
    double lr, momentum, weight_decay, trust_coefficient, nesterov, trust_ratio, maximize

cdef inline void lars(const LARS *o, double t, rules.LARS *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.lr, h.momentum, h.weight_decay, h.trust_coefficient = o.lr, o.momentum, o.weight_decay, o.trust_coefficient
    h.nesterov, h.trust_ratio = o.nesterov != 0, o.trust_ratio != 0


cdef struct Lion:
    double lr, beta1, beta2, weight_decay, maximize

cdef inline void lion(const Lion *o, double t, rules.Lion *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.lr, h.beta1, h.weight1, h.beta2, h.weight2 = o.lr, o.beta1, 1 - o.beta1, o.beta2, 1 - o.beta2
    h.decay_factor = 1 - o.lr * o.weight_decay


cdef struct NAdam:
    double lr, beta1, beta2, eps, weight_decay, momentum_decay, decoupled, maximize

cdef struct NAdamKept:
    double mu_product

cdef inline void nadam(const NAdam *o, double t, NAdamKept *kept, rules.NAdam *h) noexcept nogil:
    cdef double mu = o.beta1 * (1 - 0.5 * pow(0.96, t * o.momentum_decay))
    cdef double mu_next = o.beta1 * (1 - 0.5 * pow(0.96, (t + 1) * o.momentum_decay))
    kept.mu_product = kept.mu_product * mu
    h.gradient_factor = sign_of(o.maximize)
    h.gradient_step_size = o.lr * (1 - mu) / (1 - kept.mu_product)
    h.step_size = o.lr * mu_next / (1 - kept.mu_product * mu_next)
    h.weight1, h.beta2, h.weight2 = 1 - o.beta1, o.beta2, 1 - o.beta2
    h.inverse_bias_correction2, h.eps = 1 / (1 - pow(o.beta2, t)), o.eps
    h.weight_decay = penalty(o.weight_decay, o.decoupled)
    h.decay_factor = shrinkage(o.lr, o.weight_decay, o.decoupled)


cdef struct Prodigy:
    double lr, beta1, beta2, beta3, eps, weight_decay, decoupled, bias_correction, safeguard_warmup, d0, d_coef
    double maximize

cdef struct ProdigyKept:  # moves on when the sums are known
    double d, d_numerator

cdef inline void prodigy(const Prodigy *o, double t, const ProdigyKept *kept, rules.Prodigy *h) noexcept nogil:
    cdef double d = kept.d, k = d * o.lr
    if o.bias_correction != 0:
        k *= sqrt(1 - pow(o.beta2, t)) / (1 - pow(o.beta1, t))
    h.gradient_factor, h.d, h.d_numerator, h.step_size = sign_of(o.maximize), d, kept.d_numerator, k
    h.beta1, h.weight1, h.beta2, h.weight2 = o.beta1, (1 - o.beta1) * d, o.beta2, (1 - o.beta2) * d * d
    h.beta3 = sqrt(o.beta2) if isnan(o.beta3) else o.beta3
    h.weight3 = d / o.d0 * (d if o.safeguard_warmup != 0 else k)
    h.numerator_weight = d / o.d0 * k
    h.d_coef, h.eps, h.first = o.d_coef, o.eps, t == 1
    h.weight_decay = penalty(o.weight_decay, o.decoupled)
    h.decay_factor = shrinkage(k, o.weight_decay, o.decoupled)


cdef struct RAdam:
    double lr, beta1, beta2, eps, weight_decay, decoupled, maximize

cdef inline void radam(const RAdam *o, double t, rules.RAdam *h) noexcept nogil:
    cdef double bias_correction2 = 1 - pow(o.beta2, t)
    cdef double longest = 2 / (1 - o.beta2) - 1
    cdef double length = longest - 2 * t * pow(o.beta2, t) / bias_correction2
    cdef double known
    h.gradient_factor = sign_of(o.maximize)
    h.step_size = o.lr / (1 - pow(o.beta1, t))
    h.rectified = length > 5
    if h.rectified:
        known = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        h.step_size *= sqrt(bias_correction2 * known)
    h.weight1, h.beta2, h.weight2, h.eps = 1 - o.beta1, o.beta2, 1 - o.beta2, o.eps
    h.weight_decay = penalty(o.weight_decay, o.decoupled)
    h.decay_factor = shrinkage(o.lr, o.weight_decay, o.decoupled)


cdef struct RMSprop:
    double lr, alpha, eps, weight_decay, momentum, centered, maximize

cdef inline void rmsprop(const RMSprop *o, double t, rules.RMSprop *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.lr, h.alpha, h.weight, h.momentum = o.lr, o.alpha, 1 - o.alpha, o.momentum
    h.weight_decay, h.eps, h.centered = o.weight_decay, o.eps, o.centered != 0


cdef struct Rprop:
    double lr, eta_minus, eta_plus, smallest, largest, maximize

cdef inline void rprop(const Rprop *o, double t, rules.Rprop *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.eta_minus, h.eta_plus, h.smallest, h.largest = o.eta_minus, o.eta_plus, o.smallest, o.largest


cdef struct SGD:
    double lr, momentum, dampening, weight_decay, nesterov, maximize

cdef inline void sgd(const SGD *o, double t, rules.SGD *h) noexcept nogil:
    h.gradient_factor = sign_of(o.maximize)
    h.lr, h.momentum, h.one_minus_dampening, h.weight_decay = o.lr, o.momentum, 1 - o.dampening, o.weight_decay
    h.nesterov, h.first = o.nesterov != 0, t == 1


cdef struct ScheduleFreeKept:
    double lr_max, weight_sum

cdef struct Averaging:  # of this step
    double lr, c, y_step_size

cdef inline Averaging averaging(double lr, double beta, double warmup_steps, double r, double weight_lr_power, double t,
                                ScheduleFreeKept *kept) noexcept nogil:
    cdef Averaging found
    cdef double weight
    if warmup_steps != 0:
        lr *= smaller(1, t / warmup_steps)
    kept.lr_max = greater(lr, kept.lr_max)
    weight = pow(t, r) * pow(kept.lr_max, weight_lr_power)
    kept.weight_sum = kept.weight_sum + weight
    found.lr = lr
    found.c = weight / kept.weight_sum if kept.weight_sum != 0 else 0
    found.y_step_size = lr * (beta * (1 - found.c) - 1)
    return found


cdef struct SGDScheduleFree:
    double lr, momentum, weight_decay, warmup_steps, r, weight_lr_power, maximize

cdef inline void sgd_schedule_free(const SGDScheduleFree *o, double t, ScheduleFreeKept *kept,
                                   rules.SGDScheduleFree *h) noexcept nogil:
    cdef Averaging a = averaging(o.lr, o.momentum, o.warmup_steps, o.r, o.weight_lr_power, t, kept)
    h.gradient_factor = sign_of(o.maximize)
    h.lr, h.c, h.y_step_size, h.weight_decay, h.first = a.lr, a.c, a.y_step_size, o.weight_decay, t == 1


cdef struct AdamWScheduleFree:
    double lr, beta1, beta2, eps, weight_decay, warmup_steps, r, weight_lr_power, maximize

cdef inline void adamw_schedule_free(const AdamWScheduleFree *o, double t, ScheduleFreeKept *kept,
                                     rules.AdamWScheduleFree *h) noexcept nogil:
    cdef Averaging a = averaging(o.lr, o.beta1, o.warmup_steps, o.r, o.weight_lr_power, t, kept)
    h.gradient_factor = sign_of(o.maximize)
    h.lr, h.c, h.y_step_size, h.weight_decay, h.first = a.lr, a.c, a.y_step_size, o.weight_decay, t == 1
    h.beta2, h.weight2, h.inverse_bias_correction2, h.eps = o.beta2, 1 - o.beta2, 1 / (1 - pow(o.beta2, t)), o.eps
