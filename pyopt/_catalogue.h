/* The rules that the C door offers: options with their defaults and bounds, in the order of the optimizer's signature,
 * states in that of the rule's streams, kept numbers. Python's declarations (pyopt/optimizers) say the same;
 * tests/test_door.py holds both together. What is computed of the options stands in pyopt/_numbers.pxd. */

#include "pyopt.h"

enum { /* what an option may be */
    ANY,
    NON_NEGATIVE,
    POSITIVE,
    BETA,         /* >= 0 and < 1 */
    BETA_OR_NONE,
    FRACTION,     /* >= 0 and <= 1 */
    INNER,        /* > 0 and < 1 */
    GROWTH,       /* > 1 */
    COUNT,        /* an integer >= 0 */
    WARMUP,       /* > 0, or none */
    FLAG
};

enum {
    ADABELIEF, ADADELTA, ADAGRAD, ADAM, ADAMW, ADAMW_SCHEDULE_FREE, ADAMAX, ADAN, ADEMAMIX, ADOPT, ASGD, FTRL, LAMB, LARS,
    LION, NADAM, PRODIGY, RADAM, RMSPROP, RPROP, SGD, SGD_SCHEDULE_FREE, RULES
};

#define NONE (0.0 / 0.0)
#define BETAS(first, second) {"betas[0]", first, BETA}, {"betas[1]", second, BETA}
#define BETAS3(first, second, third) BETAS(first, second), {"betas[2]", third, BETA}
#define LR(usual) {"lr", usual, NON_NEGATIVE}
#define EPS(usual) {"eps", usual, NON_NEGATIVE}
#define WEIGHT_DECAY(usual) {"weight_decay", usual, NON_NEGATIVE}
#define DECOUPLED(usual) {"decoupled_weight_decay", usual, FLAG}
#define MAXIMIZE {"maximize", 0, FLAG}
#define COUNT_OF(array) ((int32_t)(sizeof(array) / sizeof((array)[0])))
#define ALWAYS(name) {name, -1, -1}

static const pyopt_option adabelief_options[] = {
    LR(1e-3), BETAS(0.9, 0.999), EPS(1e-16), WEIGHT_DECAY(0), MAXIMIZE, DECOUPLED(1)};
static const pyopt_state adabelief_states[] = {ALWAYS("exp_avg"), ALWAYS("exp_avg_var")};

static const pyopt_option adadelta_options[] = {LR(1), {"rho", 0.9, FRACTION}, EPS(1e-6), WEIGHT_DECAY(0), MAXIMIZE};
static const pyopt_state adadelta_states[] = {ALWAYS("square_avg"), ALWAYS("acc_delta")};

static const pyopt_option adagrad_options[] = {
    LR(1e-2), {"lr_decay", 0, NON_NEGATIVE}, WEIGHT_DECAY(0), {"initial_accumulator_value", 0, NON_NEGATIVE}, EPS(1e-10),
    MAXIMIZE};
static const pyopt_state adagrad_states[] = {{"sum", -1, 3}};

#define ADAM_OPTIONS(decay) \
    LR(1e-3), BETAS(0.9, 0.999), EPS(1e-8), WEIGHT_DECAY(decay), {"amsgrad", 0, FLAG}, MAXIMIZE, \
    {"update_clip", 0, FLAG}, {"cautious", 0, FLAG}
static const pyopt_option adam_options[] = {ADAM_OPTIONS(0), DECOUPLED(0)};
static const pyopt_option adamw_options[] = {ADAM_OPTIONS(1e-2)};
static const pyopt_state adam_states[] = {ALWAYS("exp_avg"), ALWAYS("exp_avg_sq"), {"max_exp_avg_sq", 5, -1}};

#define SCHEDULE_FREE \
    {"warmup_steps", 0, COUNT}, {"r", 0, NON_NEGATIVE}, {"weight_lr_power", 2, NON_NEGATIVE}, MAXIMIZE
static const pyopt_kept schedule_free_kept[] = {{"lr_max", -1, 0}, {"weight_sum", -1, 0}};
static const pyopt_option adamw_schedule_free_options[] = {
    LR(2.5e-3), {"betas[0]", 0.9, INNER}, {"betas[1]", 0.999, BETA}, EPS(1e-8), WEIGHT_DECAY(0), SCHEDULE_FREE};
static const pyopt_state adamw_schedule_free_states[] = {ALWAYS("z"), ALWAYS("exp_avg_sq")};

static const pyopt_option adamax_options[] = {LR(2e-3), BETAS(0.9, 0.999), EPS(1e-8), WEIGHT_DECAY(0), MAXIMIZE};
static const pyopt_state adamax_states[] = {ALWAYS("exp_avg"), ALWAYS("exp_inf")};

static const pyopt_option adan_options[] = {LR(1e-3), BETAS3(0.98, 0.92, 0.99), EPS(1e-8), WEIGHT_DECAY(0.02), MAXIMIZE};
static const pyopt_state adan_states[] = {
    ALWAYS("exp_avg"), ALWAYS("exp_avg_diff"), ALWAYS("exp_avg_sq"), ALWAYS("pre_grad")};

static const pyopt_option ademamix_options[] = {
    LR(1e-3), BETAS3(0.9, 0.999, 0.9999), {"alpha", 2, NON_NEGATIVE}, {"beta3_warmup", NONE, WARMUP},
    {"alpha_warmup", NONE, WARMUP}, EPS(1e-8), WEIGHT_DECAY(0), MAXIMIZE};
static const pyopt_state ademamix_states[] = {ALWAYS("exp_avg_fast"), ALWAYS("exp_avg_slow"), ALWAYS("exp_avg_sq")};

static const pyopt_option adopt_options[] = {
    LR(1e-3), BETAS(0.9, 0.9999), EPS(1e-6), WEIGHT_DECAY(0), MAXIMIZE, DECOUPLED(0)};
static const pyopt_state moments[] = {ALWAYS("exp_avg"), ALWAYS("exp_avg_sq")};

static const pyopt_option asgd_options[] = {
    LR(1e-2), {"lambd", 1e-4, NON_NEGATIVE}, {"alpha", 0.75, FRACTION}, {"t0", 1e6, NON_NEGATIVE}, WEIGHT_DECAY(0),
    MAXIMIZE};
static const pyopt_state asgd_states[] = {ALWAYS("ax")};
static const pyopt_kept asgd_kept[] = {{"eta", 0, 0}, {"mu", -1, 1}};

static const pyopt_option ftrl_options[] = {
    {"lr", 1e-3, POSITIVE}, {"l1", 0, NON_NEGATIVE}, {"l2", 0, NON_NEGATIVE}, {"beta", 0, NON_NEGATIVE},
    {"initial_accumulator_value", 0.1, NON_NEGATIVE}, MAXIMIZE};
static const pyopt_state ftrl_states[] = {ALWAYS("z"), {"n", -1, 4}};

static const pyopt_option lamb_options[] = {
    LR(1e-3), BETAS(0.9, 0.999), EPS(1e-6), WEIGHT_DECAY(0), {"trust_ratio", 1, FLAG}, MAXIMIZE};

static const pyopt_option lars_options[] = {
    LR(1), {"momentum", 0.9, NON_NEGATIVE}, WEIGHT_DECAY(0), {"trust_coefficient", 1e-3, NON_NEGATIVE},
    {"nesterov", 0, FLAG}, {"trust_ratio", 1, FLAG}, MAXIMIZE};
static const pyopt_state momentum_states[] = {{"momentum_buffer", 1, -1}};

static const pyopt_option lion_options[] = {LR(1e-4), BETAS(0.9, 0.99), WEIGHT_DECAY(0), MAXIMIZE};
static const pyopt_state lion_states[] = {ALWAYS("exp_avg")};

static const pyopt_option nadam_options[] = {
    LR(2e-3), BETAS(0.9, 0.999), EPS(1e-8), WEIGHT_DECAY(0), {"momentum_decay", 4e-3, NON_NEGATIVE}, DECOUPLED(0),
    MAXIMIZE};
static const pyopt_kept nadam_kept[] = {{"mu_product", -1, 1}};

static const pyopt_option prodigy_options[] = {
    LR(1), BETAS(0.9, 0.999), {"beta3", NONE, BETA_OR_NONE}, EPS(1e-8), WEIGHT_DECAY(0), DECOUPLED(1),
    {"bias_correction", 0, FLAG}, {"safeguard_warmup", 0, FLAG}, {"d0", 1e-6, POSITIVE}, {"d_coef", 1, POSITIVE},
    MAXIMIZE};
static const pyopt_state prodigy_states[] = {ALWAYS("exp_avg"), ALWAYS("exp_avg_sq"), ALWAYS("s"), ALWAYS("p0")};
static const pyopt_kept prodigy_kept[] = {{"d", 9, 0}, {"d_numerator", -1, 0}};

static const pyopt_option radam_options[] = {
    LR(1e-3), BETAS(0.9, 0.999), EPS(1e-8), WEIGHT_DECAY(0), DECOUPLED(0), MAXIMIZE};

static const pyopt_option rmsprop_options[] = {
    LR(1e-2), {"alpha", 0.99, FRACTION}, EPS(1e-8), WEIGHT_DECAY(0), {"momentum", 0, NON_NEGATIVE},
    {"centered", 0, FLAG}, MAXIMIZE};
static const pyopt_state rmsprop_states[] = {ALWAYS("square_avg"), {"momentum_buffer", 4, -1}, {"grad_avg", 5, -1}};

static const pyopt_option rprop_options[] = {
    LR(1e-2), {"etas[0]", 0.5, INNER}, {"etas[1]", 1.2, GROWTH}, {"step_sizes[0]", 1e-6, POSITIVE},
    {"step_sizes[1]", 50, POSITIVE}, MAXIMIZE};
static const pyopt_state rprop_states[] = {ALWAYS("prev"), {"step_size", -1, 0}};

static const pyopt_option sgd_options[] = {
    LR(1e-3), {"momentum", 0, NON_NEGATIVE}, {"dampening", 0, ANY}, WEIGHT_DECAY(0), {"nesterov", 0, FLAG}, MAXIMIZE};

static const pyopt_option sgd_schedule_free_options[] = {
    LR(1), {"momentum", 0.9, INNER}, WEIGHT_DECAY(0), SCHEDULE_FREE};
static const pyopt_state sgd_schedule_free_states[] = {ALWAYS("z")};

/* Which dtypes the parameter, the gradient and each state may have. */
#define OF(dtype) (1u << PYOPT_##dtype)
#define FLOATS (OF(FLOAT32) | OF(FLOAT64) | OF(BFLOAT16) | OF(FLOAT16))
#define PARAMETER_AND_GRADIENT \
    FLOATS | OF(BFLOAT16_SPLIT) | OF(BFLOAT16_KAHAN) | OF(FLOAT16_KAHAN) | OF(BFLOAT16_STOCHASTIC) \
        | OF(FLOAT16_STOCHASTIC), FLOATS
#define SIGNED (FLOATS | OF(SIGNED_8BIT))
#define UNSIGNED (FLOATS | OF(UNSIGNED_8BIT))
static const uint32_t in_floats[] = {PARAMETER_AND_GRADIENT, FLOATS, FLOATS, FLOATS, FLOATS};
static const uint32_t adam_dtypes[] = {PARAMETER_AND_GRADIENT, SIGNED, UNSIGNED, UNSIGNED};
static const uint32_t ademamix_dtypes[] = {PARAMETER_AND_GRADIENT, SIGNED, SIGNED, UNSIGNED};
static const uint32_t momentum_dtypes[] = {PARAMETER_AND_GRADIENT, SIGNED};

typedef struct {
    pyopt_rule rule;
    const char *kernel;
    const char *summing; /* the kernel for options that need sums; NULL for none */
} Entry;

#define STORED_RULE(name, states, options, dtypes) \
    {sizeof(pyopt_rule), name, COUNT_OF(states), COUNT_OF(options), 0, states, options, NULL, dtypes}
#define RULE(name, states, options) STORED_RULE(name, states, options, in_floats)
#define KEEPING_RULE(name, states, options, kept) \
    {sizeof(pyopt_rule), name, COUNT_OF(states), COUNT_OF(options), COUNT_OF(kept), states, options, kept, in_floats}

static const Entry catalogue[RULES] = { /* in the order of their numbers above */
    {RULE("AdaBelief", adabelief_states, adabelief_options), "adabelief", NULL},
    {RULE("Adadelta", adadelta_states, adadelta_options), "adadelta", NULL},
    {RULE("Adagrad", adagrad_states, adagrad_options), "adagrad", NULL},
    {STORED_RULE("Adam", adam_states, adam_options, adam_dtypes), "adam", "adam_scaled"},
    {STORED_RULE("AdamW", adam_states, adamw_options, adam_dtypes), "adam", "adam_scaled"},
    {KEEPING_RULE("AdamWScheduleFree", adamw_schedule_free_states, adamw_schedule_free_options, schedule_free_kept),
     "adamw_schedule_free", NULL},
    {RULE("Adamax", adamax_states, adamax_options), "adamax", NULL},
    {RULE("Adan", adan_states, adan_options), "adan", NULL},
    {STORED_RULE("AdEMAMix", ademamix_states, ademamix_options, ademamix_dtypes), "ademamix", NULL},
    {RULE("ADOPT", moments, adopt_options), "adopt", NULL},
    {KEEPING_RULE("ASGD", asgd_states, asgd_options, asgd_kept), "asgd", NULL},
    {RULE("FTRL", ftrl_states, ftrl_options), "ftrl", NULL},
    {RULE("LAMB", moments, lamb_options), "lamb", NULL},
    {RULE("LARS", momentum_states, lars_options), "lars", NULL},
    {STORED_RULE("Lion", lion_states, lion_options, momentum_dtypes), "lion", NULL},
    {KEEPING_RULE("NAdam", moments, nadam_options, nadam_kept), "nadam", NULL},
    {KEEPING_RULE("Prodigy", prodigy_states, prodigy_options, prodigy_kept), "prodigy", NULL},
    {RULE("RAdam", moments, radam_options), "radam", NULL},
    {RULE("RMSprop", rmsprop_states, rmsprop_options), "rmsprop", NULL},
    {RULE("Rprop", rprop_states, rprop_options), "rprop", NULL},
    {STORED_RULE("SGD", momentum_states, sgd_options, momentum_dtypes), "sgd", NULL},
    {KEEPING_RULE("SGDScheduleFree", sgd_schedule_free_states, sgd_schedule_free_options, schedule_free_kept),
     "sgd_schedule_free", NULL},
};
