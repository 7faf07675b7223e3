"""The changes that tools/mutate makes, one at a time: each is a fault, and a test must notice it."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    file: str
    old: str  # stands in the file exactly once
    new: str
    breaks: str
    tests: str  # arguments of pytest: the quickest that should notice


def of(file: str, tests: str, *changes: tuple[str, str, str]) -> list[Mutation]:
    """Changes (old, new, what it breaks) of one file, noticed by the same tests."""
    return [Mutation(file, *change, tests) for change in changes]


RULES = "tests/test_rules.py"
ENGINE = "tests/test_threads.py tests/test_engine.py"
SCHEDULES = "tests/test_lr_scheduler.py tests/test_torch_lr_scheduler.py"
BAD_INPUT = "tests/test_bad_input.py tests/test_arrays.py tests/test_optimizer.py tests/test_rules.py"

MUTATIONS = [
    *of(
        "pyopt/_rules.pxd",
        RULES,
        ("if w < 0.5:", "if w <= 0.5:", "lerp at one half: other bits"),
        ("return b - rest * (b - a)", "return a + w * (b - a)", "lerp from the far end: other bits"),
        ("if weight_decay != 0:", "if True:", "no decay of an infinite parameter: 0 * inf"),
        ("return g + <floating>weight_decay * p", "return g - <floating>weight_decay * p", "sign of the penalty"),
        ("b[0] = g if h.first else b[0]", "b[0] = b[0]", "SGD: the first momentum is the gradient"),
        (
            "g + <floating>h.momentum * b[0] if h.nesterov else b[0]\n    return p - <floating>h.lr * g\n",
            "g + <floating>h.momentum * b[0] if not h.nesterov else b[0]\n    return p - <floating>h.lr * g\n",
            "SGD: nesterov",
        ),
        ("m[0] = <floating>h.beta2 * m[0]", "m[0] = <floating>h.beta1 * m[0]", "Lion: which beta keeps the momentum"),
        ("(-1 if x < 0 else x - x)", "(-1 if x < 0 else 0)", "sign: a NaN vanishes"),
        ("g / (root(s[0]) + <floating>h.eps)", "g / root(s[0] + <floating>h.eps)", "Adagrad: eps inside the root"),
        ("d = d - a[0] * a[0]", "d = d + a[0] * a[0]", "RMSprop: centered"),
        ("b[0] = b[0] * <floating>h.momentum + g / d", "b[0] = b[0] * <floating>h.momentum + g", "RMSprop: momentum"),
        (
            "root(s[0]) * <floating>h.inverse_sqrt_bias_correction2",
            "root(s[0] * <floating>h.inverse_sqrt_bias_correction2)",
            "AdaBelief: bias correction inside the root",
        ),
        ("a if a >= b else b", "a if a <= b else b", "Adam and Adamax: the lesser of two"),
        ("return c if a == a else a", "return c", "Adam and Adamax: a NaN in the larger one vanishes"),
        (
            "p * <floating>h.decay_factor - adam_update(g, m, v, v_max, h)",
            "p - adam_update(g, m, v, v_max, h)",
            "Adam: decoupled decay",
        ),
        ("if h.averages else p", "if h.averages else ax[0]", "ASGD: the average begins with the parameter"),
        ("    g = 0 if c < 0 else g\n", "", "Rprop: no step where the sign has changed"),
        ("d = <floating>h.largest if d >", "d = <floating>h.smallest if d >", "Rprop: the largest step"),
        ("root(a[0] + <floating>h.eps) /", "(root(a[0]) + <floating>h.eps) /", "Adadelta: eps inside the root"),
        ("magnitude(g) + <floating>h.eps)", "magnitude(g)) + <floating>h.eps", "Adamax: eps inside the maximum"),
        ("s[0], g - m[0], h.beta2", "s[0], g, h.beta2", "AdaBelief: the variance"),
        (
            "u = u / (root(v[0]) + <floating>h.eps)",
            "u = u / root(v[0] + <floating>h.eps)",
            "RAdam: eps behind the root",
        ),
        ("<floating>h.gradient_step_size * g + ", "", "NAdam: the gradient's share"),
        ("        v[0] = g * g\n", "        v[0] = g\n", "ADOPT: the first step's square"),
        ("c = -<floating>h.clip if c <", "c = <floating>h.clip if c <", "ADOPT: the lower clip"),
        ("m2[0] = lerp(m2[0], g, h.weight3)", "m2[0] = lerp(m2[0], g, h.weight1)", "AdEMAMix: the slow mean"),
        ("0 if h.first else g - previous[0]", "g - previous[0]", "Adan: the first gradient is no change"),
        ("return 0 if magnitude(z[0]) <= <floating>h.l1 else w", "return w", "FTRL: parameters that are exactly 0"),
        ("g = l2(g / d, p, h.weight_decay)", "g = g / d", "AdamWScheduleFree: decay"),
    ),
    *of(
        "pyopt/_kernels.pyx",
        RULES,
        (
            "adam(p[i], g[i], &s[i], &t[i], &u[i]",
            "adam(p[i], g[i], &t[i], &s[i], &u[i]",
            "Adam: the order of the streams",
        ),
        ("rmsprop(p[i], g[i], &s[i], &t[i]", "rmsprop(p[i], g[i], &t[i], &s[i]", "RMSprop: the order of the streams"),
    ),
    *of(
        "pyopt/_engine.pyx",
        ENGINE,
        ("    while part < a.parts:", "    if part < a.parts:", "a smaller team leaves parts undone"),
        ("a.cost * (part + 1) // a.parts)", "a.cost * (part + 1) // a.parts - 64)", "gaps between parts"),
        ("return w.size if i >= w.size", "return w.size - 1 if i >= w.size", "the last element of a tensor"),
        (
            "set_float_mode(float_mode(a.flush))\n    run_part",
            "set_float_mode(float_mode(0))\n    run_part",
            "denormals are never flushed",
        ),
        (
            "    run_part(a, begin, end)\n    set_float_mode(mode)\n",
            "    run_part(a, begin, end)\n",
            "the caller's floating-point mode is left changed",
        ),
        ("threads if threads > 1 and cost >=", "threads if threads > 10**9 and cost >=", "threads are never used"),
        ("cost >= least_shared(threads)", "cost > least_shared(threads)", "the least size that is shared"),
        ("    if forked or not find", "    if not find", "a forked child hangs"),
        ("limit if limit < initial_limit and", "limit if limit < 0 and", "OpenMP's limits are not obeyed"),
        ("limit < initial_limit and limit < team", "limit < team", "more threads than OpenMP's default"),
        (").owner is self:", ").owner is not None:", "a block that ends takes the last one's number away"),
        ("if block.thread == thread:", "if True:", "set_num_threads reaches another thread's block"),
        ("threads if open_blocks else base_team", "threads if False else base_team", "blocks have no effect"),
        ("        require_startable(self.threads)\n", "", "a block of too many threads is entered"),
        ("    require_startable(threads)\n    with", "    with", "set_num_threads of too many threads"),
        (
            "    if a.parts > 1 and startable(a.parts) < a.parts:\n        a.parts = 1  #",
            "    if False:\n        a.parts = 1  #",
            "libgomp ends the process at a step",
        ),
        (
            "    own_team = threads\n",
            "    own_team = max(own_team, threads)\n",
            "threads that a smaller team has ended",
        ),
        ("if (stack_size) pthread", "if (0) pthread", "OMP_STACKSIZE is not tried"),
        ("region.given = omp_get_num_threads()", "region.given = a.parts", "threads_used() tells what was asked for"),
    ),
    *of(
        "pyopt/_platform.h",
        ENGINE,
        ("number != NULL ? (int)(intptr_t)number : max_threads()", "max_threads()", "a limit from before"),
    ),
    *of(
        "pyopt/threads.py",
        ENGINE,
        ("return min(limits,", "return max(limits,", "the default is the largest limit"),
        ("max(1, int(quota))", "int(quota)", "half a CPU is no thread"),
        ("quota / period if quota > 0", "quota / period if quota > -2", "cgroup v1: -1 is no quota"),
        ("if not 1 <= n <= MOST:", "if not 0 <= n <= MOST:", "zero threads"),
        ("len(parts), -1, -1", "len(parts), 0, -1", "the quota of the cgroup's root"),
    ),
    *of(
        "pyopt/checks.py",
        BAD_INPUT,
        ("number(name, value, 0, 1)", "number(name, value, 0, 2)", "fractions up to 2"),
        ("beta, 0, below=1)", "beta, 0, 1)", "a beta of 1"),
        (
            "isinstance(value, Real) or isinstance(value, (bool, np.bool_))",
            "isinstance(value, Real)",
            "True as a number",
        ),
        ("number(name, value, 0)", "number(name, value, -1)", "negative numbers"),
        ("x < below):", "x <= below):", "a strict bound"),
        ("low <= int(value) <= MOST_STEPS:", "low <= int(value):", "the last step count"),
        ("len(value) != 2", "len(value) < 2", "three betas"),
    ),
    *of(
        "pyopt/optimizers/adam.py",
        RULES,
        ("lr / (1 - beta1**step)", "lr / (1 - beta1)", "Adam: bias correction by the step count"),
        ('"weight2": 1 - beta2', '"weight2": 1 - beta1', "Adam: weight of the square"),
        ("0 if decoupled else weight_decay", "weight_decay", "AdamW: both decays"),
        ("1 - lr * weight_decay if decoupled else 1", "1", "AdamW: no decay"),
        ('-1 if group["maximize"] else 1', "1", "Adam: maximize"),
    ),
    *of(
        "pyopt/optimizers/adamw.py",
        BAD_INPUT,
        ('if not group["decoupled_weight_decay"]:', "if False:", "AdamW without decoupled decay is accepted"),
    ),
    *of(
        "pyopt/optimizers/sgd.py",
        BAD_INPUT,
        ('"one_minus_dampening": 1 - group["dampening"]', '"one_minus_dampening": 1', "SGD: dampening"),
        ('"first": step == 1', '"first": step <= 2', "SGD: the second step"),
        (' or group["dampening"] != 0', "", "SGD: nesterov with dampening is accepted"),
    ),
    *of(
        "pyopt/optimizers/adagrad.py",
        RULES,
        ("(1 + (step - 1) * group", "(1 + step * group", "Adagrad: decay of the learning rate"),
        ('float(group["initial_accumulator_value"])', "0.0", "Adagrad: initial value"),
    ),
    *of(
        "pyopt/optimizers/rmsprop.py",
        RULES,
        ('"weight": 1 - group["alpha"]', '"weight": group["alpha"]', "RMSprop: weight"),
    ),
    *of("pyopt/optimizers/lion.py", RULES, ('1 - group["lr"] * group["weight_decay"]', "1", "Lion: decay")),
    *of(
        "pyopt/hooks.py",
        "tests/test_hooks.py",
        ("last=False", "last=True", "prepend"),
        ("hooks.pop(self.id, None)", "pass", "a removed hook runs on"),
    ),
    *of(
        "pyopt/lr_scheduler/base.py",
        SCHEDULES,
        ('if group["lr"] is not found[i] or ', "if ", "lr set by hand is overwritten"),
        ("type(lr) is not float or ", "", "lr of NumPy's types is put into groups"),
        ("        twin._go(", "        self._go(", "a state that cannot be set changes the schedule"),
        ("        current.fill_(lr)\n        return float(current)\n", "", "lr that is a tensor becomes a number"),
        ('key = "initial_lr" if "initial_lr" in group else "lr"', 'key = "lr"', "the base is the lr of the moment"),
        ("deepcopy(given[key])", "given[key]", "the schedule shares lists with the state"),
        ("        self._take_new(self.optimizer.param_groups)\n", "", "a state without the groups added last"),
    ),
    *of(
        "pyopt/lr_scheduler/base.py",
        "tests/test_lr_scheduler.py -k state_of_another",  # the others would not end
        ("            twin.check_arguments()\n", "            pass\n", "saved arguments are not checked"),
    ),
    *of(
        "pyopt/lr_scheduler/factors.py",
        SCHEDULES,
        ("if step < known or len(products)", "if len(products)", "MultiplicativeLR: back to an earlier step"),
        ("bisect_right(self.milestones, step)", "bisect_right(self.milestones, step - 1)", "decay one step late"),
        ("        self.milestones.sort()\n", "", "milestones out of order"),
    ),
    *of(
        "pyopt/lr_scheduler/cosine.py",
        SCHEDULES,
        ("while step >= begin + period", "while step > begin + period", "a restart one step late"),
        ("if not self._begin <= step <", "if not step <", "back to an earlier period"),
    ),
    *of(
        "pyopt/lr_scheduler/cycles.py",
        SCHEDULES,
        ("if end > begin else 1.0", "", "a peak at step 0 divides by zero"),
        ("if step != self._step or groups", "if groups", "the values of another step"),
    ),
    *of(
        "pyopt/lr_scheduler/composed.py",
        SCHEDULES,
        ("step - self.milestones[i - 1] if i else step", "step", "a part begins in its middle"),
        ("lrs = scheduler.values_at(step, lrs)", "lrs = scheduler.values_at(step, base_lrs)", "the last overwrites"),
        (
            "            scheduler._become(part)\n",
            "            pass\n",
            "the parts are not loaded",
        ),
        ("min(step, ends[j] - 1)", "step", "momentum runs on behind its part"),
    ),
    *of(
        "pyopt/lr_scheduler/plateau.py",
        SCHEDULES,
        ("self.num_bad_epochs > self.patience", "self.num_bad_epochs >= self.patience", "one call too early"),
        ("if lr - reduced > self.eps", "if lr > reduced", "reductions that are too small"),
    ),
    *of(
        "pyopt/decay.py",
        "tests/test_decay.py",
        ("(?![^\\\\W\\\\d_])", "", "normal is a norm"),
        ("array.ndim < min_ndim", "array.ndim <= min_ndim", "matrices are not decayed"),
        ("map(re.escape, patterns)", "patterns", "patterns are regular expressions"),
    ),
    *of(
        "pyopt/_step.pyx",
        "tests/test_faults.py tests/test_beside_step.py tests/test_interruption.py tests/test_arrays.py",
        (
            "if self.n_written == self.n_known and memcmp(self.written, self.known, size) == 0:",
            "if self.n_written == self.n_known:",
            "an overlap that comes later is not seen",
        ),
        ("row.free_version == self.version and ", "", "a gradient on memory that is written now is taken for free"),
        ("            let_go(&row.grad)\n", "", "gradients are held for ever"),
        ("        if self.armed:\n            self.disarm()\n", "", "a failed first step leaves state"),
        (
            "            if self.enter_states():\n                self.look(optimizer)",
            "            self.enter_states()",
            "no look again",
        ),
    ),
    *of(
        "pyopt/_plans.pyx",
        "tests/test_faults.py tests/test_beside_step.py",
        ("and is_constant(value) for", "for", "an option that changes inside is not seen"),
    ),
    *of(
        "pyopt/_lock.pyx",
        "tests/test_beside_step.py tests/test_engine.py::test_two_threads_on_one_optimizer_get_an_error",
        ("        if self.forks != forks:\n", "        if False:\n", "a child waits for a thread that does not exist"),
        ("if self.stepping and not wait:", "if False:", "a second thread waits instead of being told"),
    ),
    *of(
        "pyopt/_arrays.pyx",
        "tests/test_faults.py tests/test_arrays.py",
        (" or not same_order_as(copy, data):", ":", "a stale copy: the gradient is applied transposed"),
        ("NPY_ARRAY_WRITEABLE | NPY_ARRAY_ALIGNED", "NPY_ARRAY_ALIGNED", "a read-only array is written"),
        ("if overflow or not 0 <= steps <= MOST_STEPS:", "if overflow:", "a step count beyond its end"),
        (" or not same_shape(&p, &g):", ":", "a gradient of another shape"),
        (
            "            each.put_back()\n",
            "            pass\n",
            "a user's update that raises leaves half a step",
        ),
    ),
    *of(
        "pyopt/torch/_tensors.pyx",
        "tests/test_torch_faults.py tests/test_torch_numbers.py tests/test_torch_state.py tests/test_torch_training.py",
        (
            "(g.size * g.itemsize if in_order else reach(&g))",
            "g.size * g.itemsize",
            "how far a strided gradient reaches",
        ),
        ("            if not calls_false(is_neg, each[j]):", "            if False:", "a negative bit is misread"),
        (
            "                if row.state[j] != NULL:\n                    n = self.touch(n, row.state[j])",
            "                pass",
            "versions of state are not raised",
        ),
    ),
    *of(
        "pyopt/torch/_tensors.pyx",
        "tests/test_torch_mixed.py -k stays_with_the_kernels",
        (
            "                    or copy.dtype != grad.dtype):",
            "                    or False):",
            "a copy of another dtype",
        ),
    ),
    *of(
        "pyopt/torch/step.py",
        "tests/test_torch_faults.py tests/test_torch_training.py tests/test_torch_state.py",
        (" or forward_ad._current_level >= 0", "", "tangents are dropped"),
        (' and not group.get("fused")', "", "the dtype of step counts with fused and a default of float64"),
    ),
]
