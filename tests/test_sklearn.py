"""pyopt.sklearn: scikit-learn's own checks and results, and what any optimizer of pyopt as a solver must keep."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
from sklearn import neural_network as theirs
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import pyopt
from pyopt import sklearn as ours

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
SOLVERS = ["adam", "sgd", "lbfgs", pyopt.AdamW, partial(pyopt.SGD, momentum=0.9), pyopt.AdamWScheduleFree]
digits = load_digits(return_X_y=True)
X, Y = digits[0] / 16, digits[1]
diabetes = load_diabetes(return_X_y=True)


@parametrize_with_checks(
    [
        ours.MLPClassifier(solver=pyopt.AdamW, max_iter=100),
        ours.MLPClassifier(solver=pyopt.AdamWScheduleFree, max_iter=100),
        ours.MLPRegressor(solver="adam", max_iter=100),
        ours.MLPRegressor(solver=partial(pyopt.SGD, momentum=0.9), max_iter=100),
    ]
)
def test_estimator(estimator: Any, check: Any) -> None:
    check(estimator)


def coefficients(network: Any) -> list[Any]:
    return [*network.coefs_, *network.intercepts_]


def distance(one: Any, other: Any) -> float:
    return max(float(abs(a - b).max()) for a, b in zip(coefficients(one), coefficients(other), strict=True))


SAME = [
    {"solver": "adam"},
    {"solver": "adam", "epsilon": 1e-3, "beta_1": 0.5, "early_stopping": True},
    {"solver": "sgd", "learning_rate_init": 0.1},
    {"solver": "sgd", "learning_rate_init": 0.1, "nesterovs_momentum": False},
    {"solver": "sgd", "learning_rate_init": 0.1, "momentum": 0},
    {"solver": "sgd", "learning_rate_init": 0.1, "learning_rate": "invscaling"},
    {"solver": "sgd", "learning_rate_init": 0.5, "learning_rate": "adaptive", "n_iter_no_change": 1, "tol": 0.1},
    {"solver": "lbfgs"},
]


@pytest.mark.parametrize("options", SAME, ids=lambda options: "-".join(map(str, options.values())))
def test_scikit_learns_result(options: dict[str, Any]) -> None:
    """Weights, losses and probabilities after 10 epochs are scikit-learn's up to rounding."""
    options = {"random_state": 0, "max_iter": 10, "hidden_layer_sizes": (20, 10), **options}
    networks = [module.MLPClassifier(**options).fit(X, Y) for module in (ours, theirs)]
    assert distance(*networks) < 1e-12
    assert networks[0].n_iter_ == networks[1].n_iter_
    if options["solver"] != "lbfgs":
        assert np.allclose(networks[0].loss_curve_, networks[1].loss_curve_, rtol=1e-12, atol=0)
    assert abs(networks[0].predict_proba(X) - networks[1].predict_proba(X)).max() < 1e-12


def test_regression_is_scikit_learns() -> None:
    target = (diabetes[1] - diabetes[1].mean()) / diabetes[1].std()
    networks = [m.MLPRegressor(random_state=0, max_iter=10).fit(diabetes[0], target) for m in (ours, theirs)]
    assert distance(*networks) < 1e-12


def test_sparse_float32_and_weights() -> None:
    """X in any form that scikit-learn takes; float32 stays float32, also where y and the weights are float64."""
    from scipy.sparse import csr_array

    weights = np.linspace(0.5, 1.5, len(X))
    for x in (X.astype(np.float32), csr_array(X)):
        networks = [
            m.MLPRegressor(hidden_layer_sizes=(9,), random_state=0, max_iter=5).fit(x, Y / 10, sample_weight=weights)
            for m in (ours, theirs)
        ]
        assert {c.dtype for c in coefficients(networks[0])} == {x.dtype}
        assert distance(*networks) < (1e-4 if x.dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "lbfgs"], ids=str)
def test_partial_fit_goes_on_after_a_pickle(solver: Any) -> None:
    """The same bits as without one, optimizer state included; and as what a clone makes of the same data."""

    def network() -> Any:
        return ours.MLPClassifier((9,), solver=solver, random_state=0, learning_rate_init=0.01)

    one = network()
    for _ in range(6):
        one.partial_fit(X, Y, classes=range(10))
    other = clone(network())
    for _ in range(3):
        other.partial_fit(X, Y, classes=range(10))
    other = pickle.loads(pickle.dumps(other))
    for _ in range(3):
        other.partial_fit(X, Y)
    assert distance(one, other) == 0
    assert other.solver == solver or isinstance(solver, partial)


def test_warm_start() -> None:
    """fit goes on from the weights, with a new optimizer, as scikit-learn's does."""
    networks = [m.MLPClassifier((9,), random_state=0, max_iter=3, warm_start=True) for m in (ours, theirs)]
    for _ in range(2):
        for network in networks:
            network.fit(X, Y)
    assert distance(*networks) < 1e-12
    assert networks[0]._optimizer.optimizer.state[networks[0]._optimizer.parameters[0]]["step"] == 3 * 9


RATES = {pyopt.AdamW: 5e-3, pyopt.Lion: 2e-3, pyopt.MuonAdamW: 0.02, pyopt.SGDScheduleFree: 2.0, pyopt.Prodigy: 1.0}


@pytest.mark.parametrize(("solver", "rate"), RATES.items(), ids=[cls.__name__ for cls in RATES])
def test_any_optimizer_learns(solver: Any, rate: float) -> None:
    network = ours.MLPClassifier((32,), solver=solver, learning_rate_init=rate, max_iter=15, random_state=0)
    assert network.fit(X[:1200], Y[:1200]).score(X[1200:], Y[1200:]) > 0.8


def test_options_of_the_optimizer_and_groups() -> None:
    """The named parameters can be put into groups of any order, whose rates keep their proportions."""

    def solver(params: list[pyopt.Parameter], lr: float) -> pyopt.Optimizer:
        biases = [p for p in params if p.name.startswith("intercepts_")]  # type: ignore[union-attr]
        weights = [p for p in params if p.name.startswith("coefs_")]  # type: ignore[union-attr]
        return pyopt.AdamW([{"params": biases, "weight_decay": 0.0, "lr": 2 * lr}, {"params": weights}], lr=lr)

    network = ours.MLPClassifier((9,), solver=solver, learning_rate="invscaling", max_iter=3, random_state=0)
    network.fit(X, Y)
    groups = network._optimizer.optimizer.param_groups
    assert [p.name for p in groups[0]["params"]] == ["intercepts_[0]", "intercepts_[1]"]
    assert groups[0]["lr"] == 2 * groups[1]["lr"] == pytest.approx(2 * 1e-3 / (2 * len(X) + 1) ** 0.5)
    twin = ours.MLPClassifier((9,), solver=partial(pyopt.AdamW, weight_decay=0.0), max_iter=3, random_state=0)
    same = ours.MLPClassifier((9,), solver=partial(pyopt.Adam, amsgrad=False), max_iter=3, random_state=0)
    assert distance(twin.fit(X, Y), same.fit(X, Y)) == 0


def test_schedule_free_leaves_the_average() -> None:
    """What is scored in early stopping, and what is left in the end, is the average."""
    network = ours.MLPClassifier((9,), solver=pyopt.SGDScheduleFree, learning_rate_init=1.0, max_iter=4)
    network.set_params(random_state=0, early_stopping=True)
    scored = []
    network._score = lambda *args, **kwargs: scored.append(modes(network)) or 0.5  # type: ignore[func-returns-value]
    network.fit(X, Y)
    assert scored == [{False}] * 4
    assert modes(network) == {False}


def modes(network: Any) -> set[bool]:
    return {group["train_mode"] for group in network._optimizer.optimizer.param_groups}


def test_pipelines_and_searches() -> None:
    network = make_pipeline(StandardScaler(), ours.MLPClassifier((9,), solver=pyopt.AdamW, max_iter=3, random_state=0))
    search = GridSearchCV(network, {"mlpclassifier__solver": ["adam", pyopt.AdamW, pyopt.Lion]}, cv=2)
    search.fit(X[:300], Y[:300])
    assert search.best_params_["mlpclassifier__solver"] in ("adam", pyopt.AdamW, pyopt.Lion)


def test_convergence_is_reported() -> None:
    with pytest.warns(ConvergenceWarning, match="Maximum iterations"):
        ours.MLPClassifier((9,), solver=pyopt.AdamW, max_iter=2).fit(X, Y)


FAULTS: list[tuple[Any, type[Exception], str]] = [
    (partial(pyopt.AdamW, lr=0.1), ValueError, r"solver has lr == 0.1, must leave it to learning_rate_init == 0.001"),
    (pyopt.LBFGS, TypeError, r"solver made a LBFGS, must make an optimizer of pyopt"),
    (lambda params, lr: None, TypeError, r"solver made a NoneType"),
    (lambda params, lr: pyopt.SGD(params[:1], lr=lr), ValueError, r"must take all of them"),
    (lambda params, lr: pyopt.SGD([np.zeros(3)], lr=lr), ValueError, r"other parameters than it was given"),
    ("rmsprop", ValueError, r"The 'solver' parameter of MLPClassifier must be .*a callable"),
    (partial(pyopt.AdamW, weight_decay=-1.0), ValueError, r"weight_decay == -1.0, must be finite and >= 0"),
]


@pytest.mark.parametrize(("solver", "kind", "message"), FAULTS, ids=[message for *_, message in FAULTS])
def test_bad_solver(solver: Any, kind: type[Exception], message: str) -> None:
    """The error names it; the estimator keeps its argument and can be fitted afterwards."""
    network = ours.MLPClassifier((9,), solver=solver, max_iter=2)
    with pytest.raises(kind, match=message):
        network.fit(X, Y)
    assert network.solver is solver
    network.set_params(solver="adam").fit(X, Y)


def test_no_partial_fit_with_lbfgs() -> None:
    assert not hasattr(ours.MLPClassifier(solver="lbfgs"), "partial_fit")
    assert hasattr(ours.MLPClassifier(solver=pyopt.AdamW), "partial_fit")
