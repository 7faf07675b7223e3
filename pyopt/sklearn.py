"""scikit-learn's multi-layer perceptrons, trained by any optimizer of pyopt. Needs scikit-learn: pyopt[sklearn]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import sklearn.neural_network
from sklearn.neural_network._stochastic_optimizers import SGDOptimizer

import pyopt
from pyopt.optimizer import Group, Optimizer
from pyopt.optimizers.schedule_free import TrainEval
from pyopt.parameter import Parameter

Arrays = list[np.ndarray[Any, Any]]


class _Adam(pyopt.Adam):
    """Adam with eps where scikit-learn has it: beside the root before its bias is corrected."""

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        numbers = super().scalars(group, step)
        correction = numbers["inverse_sqrt_bias_correction2"]
        return {**numbers, "step_size": numbers["step_size"] / correction, "inverse_sqrt_bias_correction2": 1.0}


class _Solver(SGDOptimizer):
    """What scikit-learn's loop calls: its schedules of the learning rate and its rule to stop, our step.

    `is_velocity` says that the momentum holds the learning rates of its time, as scikit-learn's "sgd" has it.
    """

    def __init__(self, network: Any, parameters: list[Parameter], optimizer: Optimizer, is_velocity: bool) -> None:
        super().__init__((), network.learning_rate_init, network.learning_rate, power_t=network.power_t)
        self.parameters, self.optimizer, self.is_velocity = parameters, optimizer, is_velocity
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.last_rate = self.learning_rate

    def update_params(self, params: Arrays, grads: Arrays) -> None:
        """One step: scikit-learn's arrays are written in place."""
        if self.learning_rate != self.last_rate:
            self._take_rate()
        for p, array, grad in zip(self.parameters, params, grads, strict=True):
            if p.data is not array:  # the arrays that early stopping has kept
                p.data = array
            p.grad = np.asarray(grad, array.dtype)  # float64 where X is float32 and y is not
        self.optimizer.step(zero_grad="set_to_none")

    def _take_rate(self) -> None:
        """Give the groups the rate that scikit-learn's schedule has set, in the proportions that they began with."""
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * (self.learning_rate / self.learning_rate_init)
        if self.is_velocity:
            for entry in self.optimizer.state.values():
                entry["momentum_buffer"] *= self.last_rate / self.learning_rate
        self.last_rate = self.learning_rate

    def train(self, mode: bool) -> None:
        """Schedule-free optimizers: put in place what is trained, or the average."""
        if isinstance(self.optimizer, TrainEval):
            (self.optimizer.train if mode else self.optimizer.eval)()


class _Network:
    """What both perceptrons have: a solver that may be any optimizer."""

    solver: Any
    _optimizer: Any

    def _make_solver(self: Any) -> _Solver:
        names = ("coefs_", "intercepts_")
        params = [Parameter(array, name=f"{n}[{i}]") for n in names for i, array in enumerate(getattr(self, n))]
        lr, solver = float(self.learning_rate_init), self.solver
        if solver == "adam":
            optimizer: Any = _Adam(params, lr=lr, betas=(self.beta_1, self.beta_2), eps=float(self.epsilon))
        elif solver == "sgd":
            nesterov = bool(self.nesterovs_momentum and self.momentum > 0)
            optimizer = pyopt.SGD(params, lr=lr, momentum=float(self.momentum), nesterov=nesterov)
        else:
            if isinstance(solver, partial) and "lr" in solver.keywords:
                raise ValueError(
                    f"solver has lr == {solver.keywords['lr']!r}, must leave it to learning_rate_init == {lr!r}"
                )
            optimizer = solver(params, lr=lr)
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, pyopt.LBFGS):
            raise TypeError(
                f"solver made a {type(optimizer).__name__}, must make an optimizer of pyopt, on arrays, that steps "
                "with one gradient (scikit-learn's own 'lbfgs' is there for the other kind)"
            )
        if {id(p) for group in optimizer.param_groups for p in group["params"]} != {id(p) for p in params}:
            raise ValueError("solver made an optimizer of other parameters than it was given, must take all of them")
        return _Solver(self, params, optimizer, is_velocity=solver == "sgd" and self.momentum > 0)

    @contextmanager
    def _called(self, name: str) -> Iterator[None]:
        """A block in which the solver goes by a name to scikit-learn's loop, which asks whether it knows that."""
        solver, self.solver = self.solver, name
        try:
            yield
        finally:
            self.solver = solver

    def _fit(self, *args: Any, **kwargs: Any) -> Any:
        if self.solver == "lbfgs":
            return super()._fit(*args, **kwargs)  # type: ignore[misc]
        self._given = self.solver
        try:
            with self._called("adam"):  # any stochastic one: it is ours that runs
                result = super()._fit(*args, **kwargs)  # type: ignore[misc]
        finally:
            del self._given
        return result

    def _fit_stochastic(self, *args: Any) -> None:
        *_, incremental = args
        with self._called(self._given):
            if not incremental or not hasattr(self, "_optimizer"):
                self._optimizer = self._make_solver()
        with self._called("pyopt"):  # of which scikit-learn makes no optimizer of its own
            self._optimizer.train(True)
            try:
                super()._fit_stochastic(*args)  # type: ignore[misc]
            finally:
                self._optimizer.train(False)

    def _update_no_improvement_count(self, *args: Any) -> None:
        self._optimizer.train(False)  # the score that decides is that of the result
        super()._update_no_improvement_count(*args)  # type: ignore[misc]
        self._optimizer.train(True)

    def _check_solver(self) -> bool:
        return callable(self.solver) or super()._check_solver()  # type: ignore[misc]


def _constraints(cls: Any) -> dict[str, Any]:
    """scikit-learn's constraints of the arguments, and anything that can be called for solver."""
    return {**cls._parameter_constraints, "solver": [*cls._parameter_constraints["solver"], callable]}


class MLPClassifier(_Network, sklearn.neural_network.MLPClassifier):
    """scikit-learn's MLPClassifier, whose solver may be any optimizer of pyopt.

    Args:
        solver: "adam" and "sgd" are scikit-learn's rules and give its results up to rounding, faster; "lbfgs" is its
            own. Or what makes an optimizer of pyopt: called as solver(params, lr=learning_rate_init), with a list of
            named `pyopt.Parameter`. A class such as `pyopt.AdamW`, a `functools.partial` of one with further options,
            or a function, for groups: the names are "coefs_[0]", "intercepts_[0]" and so on.
        learning_rate: scikit-learn's schedules "invscaling" and "adaptive" work with any such optimizer too.
        momentum, nesterovs_momentum, power_t, beta_1, beta_2, epsilon: of "sgd" and "adam" alone.
        hidden_layer_sizes, activation, alpha, batch_size and all others: see scikit-learn's class. alpha is an L2
            penalty of the loss, whatever the solver; decoupled decay is an option of the optimizer.

    Raises:
        TypeError, ValueError: a solver that makes something else, or an optimizer of other parameters; LBFGS; lr in a
            partial; what scikit-learn's class and the optimizer refuse.

    Example:
        >>> from functools import partial
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> solver = partial(pyopt.AdamW, weight_decay=0.1)
        >>> MLPClassifier((16,), solver=solver, learning_rate_init=0.02, random_state=0).fit(X, y).score(X, y) > 0.95
        True

    With X of float32 all of it is float32. It fits in scikit-learn's pipelines and searches, and can be cloned and
    pickled; `partial_fit` after a pickle goes on as if there had been none. Optimizers that average as they go
    (`pyopt.AdamWScheduleFree`) are evaluated, and leave behind, the average. Source: scikit-learn 1.9,
    sklearn.neural_network; its epsilon of "adam" stands beside the root before the bias of that is corrected, which
    is kept.
    """

    _parameter_constraints = _constraints(sklearn.neural_network.MLPClassifier)


class MLPRegressor(_Network, sklearn.neural_network.MLPRegressor):
    """scikit-learn's MLPRegressor, whose solver may be any optimizer of pyopt; for the arguments see `MLPClassifier`.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> y = (y - y.mean()) / y.std()
        >>> network = MLPRegressor(solver=pyopt.AdamW, learning_rate_init=0.01, tol=0.01, random_state=0)
        >>> network.fit(X, y).score(X, y) > 0.3
        True
    """

    _parameter_constraints = _constraints(sklearn.neural_network.MLPRegressor)
