"""An evaluation finds the planted failures, and keeps to the closed form where all is sound."""

import math
import re
import time
import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_iris, make_blobs
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.linear_model import LinearRegression
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from skjacobian import (
    FeatureConstraints,
    JacobianRegularizedClassifier,
    RobustScorer,
    evaluate_robustness,
)
from skjacobian._checks import holds_more_often
from skjacobian.attacks import FGSM, PGD, RayS, Square
from skjacobian.attacks.cascade import PLANS
from skjacobian.differentiable import as_torch
from skjacobian.exceptions import AttackWarning, NotDifferentiableError
from tests.opaque import Opaque

pytestmark = pytest.mark.usefixtures("short_stages")

X, y = (array[::2] for array in load_iris(return_X_y=True))
NAMES = np.array(["setosa", "versicolor", "virginica"])[y]
COLUMNS = ["sepal length", "sepal width", "petal length", "petal width"]
NORMS = ["linf", "l2", "l1"]
EPS = {"linf": 0.2, "l2": 0.4, "l1": 0.4}
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
DUAL_ORDER = {"linf": 1, "l2": 2, "l1": np.inf}
every_norm = pytest.mark.parametrize("norm", NORMS)


class Net(ClassifierMixin, BaseEstimator):
    """A module as a classifier."""

    def __init__(self, module=None, classes=(0, 1, 2)):
        self.module = module
        self.classes = classes
        self.classes_ = np.array(classes)

    def logits(self, X):
        with torch.no_grad():
            return self.module(torch.as_tensor(np.array(X))).numpy()

    def fit(self, X, y):
        return self

    def predict(self, X):
        return self.classes_[self.logits(X).argmax(1)]


@as_torch.register
def _(model: Net):
    return model.module


class Around(nn.Module):
    """A network with something before and after it."""

    def __init__(self, net, before=lambda X: X, after=lambda logits: logits):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, X):
        return self.after(self.net(self.before(X)))


class DecidesOnly(ClassifierMixin, BaseEstimator):
    """A classifier with predict and nothing else."""

    def fit(self, X, y):
        self.neighbors_ = KNeighborsClassifier(3).fit(X, y)
        self.classes_ = self.neighbors_.classes_
        return self

    def predict(self, X):
        return self.neighbors_.predict(X)


def trained(values=X, labels=y):
    model = JacobianRegularizedClassifier(
        module__hidden_units=(16,), max_epochs=20, lr=0.02, random_state=0
    )
    return model.fit(values, labels)


@pytest.fixture(scope="module")
def model():
    """A network that is right about most, but not all, and not robust."""
    return trained()


@pytest.fixture(scope="module")
def net(model):
    return model.module_


def evaluate(estimator, X=X, y=y, eps=0.2, **params):
    """Evaluate, and assert that the raised flags are said in one warning, and nothing else is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = evaluate_robustness(estimator, X, y, eps=eps, **params)
    names = raised(report)
    assert [warning.category for warning in caught] == [AttackWarning] * bool(names)
    if names:
        flags = "1 flag is" if len(names) == 1 else f"{len(names)} flags are"
        assert str(caught[0].message).startswith(f"{flags} raised")
        assert f": {', '.join(names)}. Print" in str(caught[0].message)
        assert caught[0].filename == __file__
    return report


@cache
def evaluated(model):
    """Its report at the usual radius, which many tests look at or compare with."""
    return evaluate(model)


def raised(report):
    return [flag.name for flag in report.raised]


def detail(report, name):
    return next(flag.detail for flag in report.flags if flag.name == name)


def fooled_by(report, stage):
    return next(s.n_fooled for s in report.stages if s.name == stage)


def numbers(report):
    """All that a report says but for the times."""
    return (
        report.right.tolist(),
        report.robust.tolist(),
        [(s.name, s.robust_accuracy, s.n_fooled, s.n_queries) for s in report.stages],
        report.flags,
        np.asarray(report.X_adv).tolist(),
    )


# --- never silent -------------------------------------------------------------------------


@every_norm
def test_a_sound_model_raises_no_flag(model, norm):
    report = evaluate(model, norm=norm, eps=EPS[norm])
    assert raised(report) == []
    assert len(report.flags) == 13
    assert 0.3 < report.robust_accuracy < report.accuracy


@pytest.mark.parametrize("factor", [1e4, 1e6])
def test_huge_logits_are_said_and_change_nothing(model, net, factor):
    sound = evaluated(model)
    report = evaluate(Net(Around(net, after=lambda logits: factor * logits)))
    assert raised(report) == ["scale of the logits"]
    assert report.robust.tolist() == sound.robust.tolist()
    # What others would have got.
    with pytest.warns(AttackWarning):
        naive = evaluate_robustness(
            Net(Around(net, after=lambda logits: factor * logits)),
            X,
            y,
            eps=0.2,
            attack=PGD(loss="cross_entropy"),
        )
    assert naive.robust_accuracy > sound.robust_accuracy + 0.1


@pytest.mark.parametrize(
    "masked",
    [
        {"before": lambda X: torch.round(50 * X) / 50},
        {"after": lambda logits: torch.round(5 * logits) / 5},
    ],
    ids=["features", "logits"],
)
def test_rounding_has_no_gradient_and_square_finds_what_it_hides(model, net, masked):
    report = evaluate(Net(Around(net, **masked)))
    assert {"gradients", "black box"} <= set(raised(report))
    assert detail(report, "gradients").startswith(f"{report.right.sum()} of ")
    assert fooled_by(report, "PGD") <= 1
    assert fooled_by(report, "Square, briefly") >= 5
    assert report.robust_accuracy == pytest.approx(evaluated(model).robust_accuracy, abs=0.06)


def test_features_that_are_rounded_are_said(net):
    def rounded(x):
        return torch.cat([x[:, :3], x[:, 3:].round()], dim=1)

    report = evaluate(Net(Around(net, before=rounded)))
    assert "gradients" in raised(report)
    assert re.search(
        r"^0 of \d+ samples, \d+ depend on features without a gradient$",
        detail(report, "gradients"),
    )


def test_random_noise_is_said(net):
    source = torch.Generator().manual_seed(0)
    noise = Around(
        net, after=lambda z: z + 0.3 * torch.randn(z.shape, generator=source, dtype=z.dtype)
    )
    report = evaluate(Net(noise))
    assert "random predictions" in raised(report)


def test_workers_that_sum_in_any_order_are_not_random():
    """As a forest with n_jobs does: the last digits differ."""

    class LastDigits(nn.Module):
        n_calls = 0

        def forward(self, X):
            self.n_calls += 1
            logits = torch.stack([X[:, 0], X[:, 1]], 1) - X[:, 1:2] + 1.0
            return logits * (1 + 1e-14 * (self.n_calls % 3))

    report = evaluate(Net(LastDigits(), (0, 1)), y=Net(LastDigits(), (0, 1)).predict(X))
    assert "random predictions" not in raised(report)


def test_softmax_is_said_and_changes_nothing(model, net):
    report = evaluate(Net(Around(net, after=lambda logits: logits.softmax(1))))
    assert raised(report) == ["output"]
    assert detail(report, "output") == "the model returns probabilities"
    assert report.robust.tolist() == evaluated(model).robust.tolist()


def test_samples_outside_the_bounds_count_as_fooled(model):
    bounds = (0.2, 6.5)
    outside = ((X < 0.2) | (X > 6.5)).any(1)
    report = evaluate(model, bounds=bounds)
    assert raised(report) == ["bounds"]
    assert detail(report, "bounds") == f"{outside.sum()} of {len(X)} samples"
    assert 5 < outside.sum() < 40
    assert not report.robust[outside].any()
    np.testing.assert_array_equal(report.X_adv[outside], X[outside])
    within = evaluate(model, X[~outside], y[~outside], bounds=bounds)
    np.testing.assert_array_equal(report.robust[~outside], within.robust)
    assert report.stages[0].robust_accuracy == (report.right & ~outside).mean()


def test_bounds_in_other_units_leave_nothing(model):
    report = evaluate(model, bounds=(0, 0.01))
    assert "bounds" in raised(report)
    assert (report.robust_accuracy, report.accuracy) == (0, model.score(X, y))


@pytest.mark.parametrize(
    "classifier",
    [DecisionTreeClassifier(max_depth=3), RandomForestClassifier(5, max_depth=3)],
    ids=["tree", "forest"],
)
def test_black_boxes_are_attacked_by_their_probabilities(classifier):
    report = evaluate(Opaque(classifier.set_params(random_state=0)).fit(X, y), eps=0.3)
    assert raised(report) == ["output", "weak attack"]
    assert detail(report, "weak attack") == "without gradients, only Square, RayS was run"
    assert [stage.name for stage in report.stages] == ["clean", "Square", "RayS"]
    assert fooled_by(report, "Square") >= 5
    assert report.stages[1].n_queries <= 100


def test_a_tree_falls_exactly_where_a_threshold_is_near():
    """A stump: the distance from its one threshold is the closed form."""
    values, labels = X[y > 0], y[y > 0]
    stump = DecisionTreeClassifier(max_depth=1, random_state=0).fit(values, labels)
    feature, threshold = stump.tree_.feature[0], stump.tree_.threshold[0]
    stands = np.abs(values[:, feature] - threshold) > 0.33
    report = evaluate(stump, values, labels, eps=0.33)
    assert report.robust.tolist() == (report.right & stands).tolist()


@pytest.mark.parametrize(
    "classifier",
    [DecidesOnly(), Opaque(DecisionTreeClassifier(random_state=0))],
    ids=["predict", "pure"],
)
def test_what_only_decides_is_attacked_along_rays(classifier):
    report = evaluate(classifier.fit(X[::2], y[::2]), X[::2], y[::2], eps=0.3)
    assert {"output", "weak attack"} <= set(raised(report))
    assert detail(report, "output") == "the model returns decisions"
    assert detail(report, "weak attack") == "without gradients, only RayS, Square was run"
    assert [stage.name for stage in report.stages] == ["clean", "RayS", "Square"]
    assert fooled_by(report, "RayS") >= 2


@pytest.mark.parametrize("only_second", [0, 3, 20])
@pytest.mark.parametrize("difference", [0, 2, 3, 6, 10, 30])
def test_what_holds_more_often_is_told_by_mcnemars_test(difference, only_second):
    n_only = [only_second + difference, only_second]
    first, second = (np.repeat([i == 0, i == 1, True], [*n_only, 30]) for i in range(2))
    tail = stats.norm.cdf(-2)
    chi = difference**2 / max(sum(n_only), 1)
    assert holds_more_often(first, second) == (stats.chi2.sf(chi, 1) < 2 * tail)
    assert not holds_more_often(second, first)


def test_what_only_decides_is_attacked_inside_of_the_box():
    grid = np.stack(np.meshgrid(*2 * [np.linspace(-1.5, 1.5, 61)]), -1).reshape(-1, 2)
    inside = (abs(grid[:, 0] - 0.2) < 0.12) & (abs(grid[:, 1] - 0.7) < 0.22)
    tree = Opaque(DecisionTreeClassifier(random_state=0)).fit(grid, inside)
    X = np.random.default_rng(0).uniform(-0.02, 0.02, (10, 2))
    report = evaluate(tree, X, np.zeros(10, dtype=bool), eps=1.0)
    assert report.accuracy == 1.0  # and all reach the island of the other class, 0.4 high
    assert report.robust_accuracy == 0.0
    assert fooled_by(report, "Square") > 0


@pytest.mark.usefixtures("brief_stages")
def test_batches_of_sure_probabilities_are_not_taken_for_decisions():
    forest = Opaque(RandomForestClassifier(5, max_depth=3, random_state=0)).fit(X, y)
    assert np.isin(forest.predict_proba(X[:10]), [0, 1]).all()
    report = evaluate(forest, X[:60:2], y[:60:2], eps=0.3, batch_size=5)
    assert [stage.name for stage in report.stages] == ["clean", "Square", "RayS"]


def test_features_that_are_not_used_are_said():
    used = X * [0, 0, 1, 1]
    mask = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    blind = Net(Around(trained(used).module_, before=lambda X: X * mask))
    report = evaluate(blind, mutable=[0, 1])
    assert raised(report) == ["huge radius"]
    assert detail(report, "huge radius").startswith("1.000 of ")
    assert report.robust_accuracy == report.accuracy > 0.8
    assert "huge radius" not in raised(evaluate(blind))


@pytest.mark.parametrize("classifier", [GaussianProcessClassifier(), SVC(gamma=1)], ids=repr)
def test_a_kernel_that_vanishes_far_from_the_data_is_no_reason_to_doubt(classifier):
    points, labels = make_blobs(100, centers=3, random_state=0)
    report = evaluate(classifier.fit(points, labels), points, labels, eps=0.2)
    assert "huge radius" not in raised(report)


def test_what_works_at_a_huge_radius_goes_far_enough():
    """The diagonal of the bounds, or ten times that of the data, in the units of the norm."""
    wide = np.column_stack([X[:, 2] * 1000, X[:, 3]])
    model = Net(nn.Linear(2, 2).double(), (0, 1))
    with torch.no_grad():
        model.module.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        model.module.bias.copy_(torch.tensor([0.0, -2500.0]))
    labels = (wide[:, 0] > 2500).astype(int)
    for norm in NORMS:
        for params in ({}, {"bounds": (0, 7000)}, {"feature_scale": "std"}):
            report = evaluate(model, wide, labels, norm=norm, eps=0.01, **params)
            assert detail(report, "huge radius").startswith("0.000 of 75 samples stand at eps=")


@pytest.mark.parametrize("n_queries", [1, 3])
def test_a_budget_that_cuts_the_attack_short_is_said(model, n_queries):
    report = evaluate(model, n_queries=n_queries)
    assert raised(report) == ["weak attack"]
    assert detail(report, "weak attack") == "cut short: PGD"
    assert report.stages[-1].n_queries <= n_queries


@pytest.mark.parametrize("attack", [PGD(n_steps=10), FGSM(), Square(n_queries=40), RayS()])
def test_one_attack_alone_is_weak(model, attack):
    report = evaluate(model, attack=attack)
    name = type(attack).__name__
    assert raised(report) == ["weak attack"]
    assert detail(report, "weak attack") == f"only {name} was run"
    assert [stage.name for stage in report.stages] == ["clean", name]
    assert report.attack == name
    assert report.stages[-1].n_queries >= 1
    assert report.stages[-1].seconds > 0
    assert report.robust_accuracy >= evaluated(model).robust_accuracy


def test_one_attack_without_gradients_runs_on_a_network_without_them(model, net):
    cut = Net(Around(net, after=torch.Tensor.detach))
    report = evaluate(cut, attack=Square(n_queries=100))
    assert raised(report) == ["weak attack"]
    assert report.robust.tolist() == evaluate(model, attack=Square(n_queries=100)).robust.tolist()
    assert [stage.name for stage in evaluate(cut).stages] == ["clean", "Square", "RayS"]


def test_a_predict_that_disagrees_with_the_view_is_said(net):
    class Quantizing(Net):
        def predict(self, X):
            return super().predict(np.round(X))

    quantizing = Quantizing(net)
    labels = quantizing.predict(X)
    values = np.round(X)
    report = evaluate(quantizing, values, labels, eps=0.45)
    assert "torch view" in raised(report)
    # predict decides: nothing moves by half.
    assert report.robust.tolist() == [True] * len(X)
    stages = report.stages
    assert stages[-1].name == "judged by predict"
    assert stages[-1].n_fooled == -sum(stage.n_fooled for stage in stages[:-1]) < -5
    n_right = -stages[-1].n_fooled
    said = f"predict is right at {n_right} perturbed samples where it is not"
    assert detail(report, "torch view").startswith(said)


@every_norm
def test_a_rule_beside_the_scores_is_said_though_no_sample_breaks_it(net, norm):
    """An attack on the scores has no reason to go where the rule decides."""

    class Ruled(Net):
        def predict(self, X):
            return np.where(np.asarray(X)[:, 0] > largest + 0.05, -1, super().predict(X))

    largest = X[:, 0].max()
    ruled = Ruled(net)
    labels = ruled.predict(X)
    assert (labels >= 0).all()
    few = X[:, 0] > largest - 0.5
    report = evaluate(ruled, X[few], labels[few], norm=norm, eps=EPS[norm])
    assert "torch view" in raised(report)
    assert " random points" in detail(report, "torch view")


def test_outputs_that_saturate_are_said(net):
    saturated = Net(Around(net, after=lambda logits: logits.clamp(max=2)))
    report = evaluate(saturated, eps=0.5)
    last = report.stages[-1]
    assert last.name == "judged by predict"
    assert last.n_fooled > 0.01 * len(X)
    assert "torch view" in raised(report)
    assert f"and wrong at {last.n_fooled} where it is" in detail(report, "torch view")


def test_probabilities_are_said_though_those_attacked_are_all_0_or_1():
    class Sure(nn.Module):
        def forward(self, X):
            return (2000 * X[:, :2]).softmax(1)

    X = np.random.default_rng(0).normal(size=(100, 2))
    outputs = Sure()(torch.from_numpy(X)).numpy()
    is_unsure = ((outputs > 0) & (outputs < 1)).any(1)
    assert 5 < is_unsure.sum() < 95
    # Where the network is unsure it is wrong, so what is attacked looks like decisions.
    report = evaluate(Net(Sure(), (0, 1)), X, outputs.argmax(1) ^ is_unsure)
    assert "output" in raised(report)
    assert detail(report, "output") == "the model returns probabilities"
    assert "PGD on cross-entropy leaves" in detail(report, "scale of the logits")


@every_norm
def test_a_radius_that_makes_anything_of_anything_is_said(model, norm):
    width = np.linalg.norm(np.ptp(X, axis=0), ORDER[norm])
    assert "units" not in raised(evaluate(model, norm=norm, eps=0.99 * width))
    assert "units" in raised(evaluate(model, norm=norm, eps=1.01 * width))


def test_features_of_unequal_units_are_said_unless_they_have_a_scale(model):
    units = np.array([1.0, 1e-4, 1.0, 1e3])
    scaled = make_pipeline(StandardScaler(), model.__class__(max_epochs=10, random_state=0))
    scaled.fit(X * units, y)
    report = evaluate(scaled, X * units, eps=0.1)
    assert "units" in raised(report)
    assert detail(report, "units") == (
        "eps=0.1 lets 1 of 4 features take any value of theirs, and 1 change by less than 1 % of "
        "their range"
    )
    said = FeatureConstraints(scale=dict(enumerate(units)))
    for threat in ({"feature_scale": "std"}, {"constraints": said}, {"mutable": [0, 2, 3]}):
        assert "units" not in raised(evaluate(scaled, X * units, eps=0.1, **threat))


# --- closed forms -------------------------------------------------------------------------


def largest_gain(g, low, high, eps, norm):
    """max gᵀu over ‖u‖ <= eps and low <= u <= high, which hold 0."""
    if norm == "linf":
        return g @ np.clip(eps * np.sign(g), low, high)
    if norm == "l1":  # greedily, from the steepest feature on
        gain, left = 0.0, eps
        for j in np.argsort(-np.abs(g)):
            room = min(left, high[j] if g[j] > 0 else -low[j])
            gain, left = gain + room * abs(g[j]), left - room
        return gain
    near, far = 0.0, 1e6
    for _ in range(100):
        middle = (near + far) / 2
        inside = np.linalg.norm(np.clip(middle * g, low, high)) <= eps
        near, far = (middle, far) if inside else (near, middle)
    return g @ np.clip(near * g, low, high)


def plane(w, b):
    module = nn.Linear(4, 2).double()
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(np.stack([np.zeros_like(w), w])))
        module.bias.copy_(torch.tensor([0.0, b]))
    return Net(module, (1, 2))


@pytest.mark.parametrize(
    ("norm", "scale", "bounds", "mutable"),
    [
        pytest.param("linf", None, None, None, marks=pytest.mark.slow),
        ("linf", [1.0, 0.3, 2.0, 1.5], (0.1, 7.7), [0, 2, 3]),
        ("l2", 2.0, (0.1, 7.7), None),
        pytest.param("l2", "std", None, [0, 2, 3], marks=pytest.mark.slow),
        ("l1", "std", (0.1, 7.7), None),
        pytest.param("l1", [1.0, 0.3, 2.0, 1.5], None, [0, 3], marks=pytest.mark.slow),
    ],
)
def test_the_robust_accuracy_of_a_plane_is_the_closed_form(norm, scale, bounds, mutable):
    values, labels = X[y > 0], y[y > 0]
    w, b = np.array([-0.3, -0.5, 0.6, 0.8]), -1.2
    unit = values.std(0) if isinstance(scale, str) else np.ones(4) * (1 if scale is None else scale)
    free = np.isin(np.arange(4), range(4) if mutable is None else mutable)
    low, high = (-np.inf, np.inf) if bounds is None else bounds
    sign = np.where(labels == 2, 1, -1)
    left = sign * (values @ w + b)
    # A radius that the distance of half of those that are right exceeds.
    eps = 1.003 * np.median(left[left > 0]) / np.linalg.norm(w * unit * free, DUAL_ORDER[norm])
    for i, x in enumerate(values):
        g = -sign[i] * w * unit * free
        left[i] -= largest_gain(g, (low - x) / unit, (high - x) / unit, eps, norm)
    assert np.abs(left).min() > 1e-6  # rounding decides nowhere
    assert 15 < (left > 0).sum() < 40
    threat = {"norm": norm, "feature_scale": scale, "bounds": bounds, "mutable": mutable}
    report = evaluate(plane(w, b), values, labels, eps=eps, **threat)
    assert report.robust.tolist() == (left > 0).tolist()
    scorer = RobustScorer(attack="strong", eps=eps, **threat)
    assert scorer(plane(w, b), values, labels) == report.robust_accuracy
    assert_inside(report, values, eps=eps, norm=norm, unit=unit, free=free, bounds=(low, high))


def assert_inside(report, values, *, eps, norm, unit, free, bounds):
    delta = (np.asarray(report.X_adv) - values) / unit
    assert (np.linalg.norm(delta, ORDER[norm], axis=1) <= eps * (1 + 1e-12)).all()
    assert (delta[:, ~free] == 0).all()
    assert ((report.X_adv >= bounds[0]) & (report.X_adv <= bounds[1])).all()
    assert (delta[~report.right] == 0).all()


@pytest.mark.usefixtures("brief_stages")
@every_norm
def test_of_a_network_the_perturbations_are_inside_and_fool(model, norm):
    unit, free = X.std(0), np.array([True, False, True, True])
    params = {"feature_scale": "std", "bounds": (0, 8), "mutable": [0, 2, 3]}
    report = evaluate(model, norm=norm, **params)
    assert_inside(report, X, eps=0.2, norm=norm, unit=unit, free=free, bounds=(0, 8))
    np.testing.assert_array_equal(model.predict(report.X_adv) == y, report.robust)
    assert not report.robust[~report.right].any()
    scorer = RobustScorer(attack="strong", norm=norm, eps=0.2, **params)
    assert scorer(model, X, y) == report.robust_accuracy


def test_behind_a_scaler_the_units_are_raw():
    w, b = np.array([-0.3, -0.5, 0.6, 0.8]), -1.2
    values, labels = X[y > 0], y[y > 0]
    scaler = StandardScaler().fit(values)
    inner = plane(w * scaler.scale_, b + w @ scaler.mean_)  # the same plane, after scaling
    pipeline = make_pipeline(scaler, inner)
    wanted = np.where(labels == 2, 1, -1) * (values @ w + b) > 0.2 * np.abs(w).sum()
    report = evaluate(pipeline, values, labels)
    assert report.robust.tolist() == wanted.tolist()
    assert report.estimator_name == "Pipeline"
    assert np.abs(report.X_adv - values).max() == pytest.approx(0.2, rel=1e-12)


# --- the numbers --------------------------------------------------------------------------


def test_what_the_stages_fooled_adds_up(model):
    report = evaluated(model)
    assert report.n_samples == len(X)
    assert report.accuracy == model.score(X, y)
    n_left = len(X)
    for stage in report.stages:
        n_left -= stage.n_fooled
        assert stage.robust_accuracy == n_left / len(X)
    assert n_left == report.robust.sum() == round(report.robust_accuracy * len(X))
    names = [stage.name for stage in report.stages]
    assert names[:2] == ["clean", "PGD"]
    assert names[-3:] == ["Square", "Square, longer", "FMN"]
    assert report.seconds > sum(stage.seconds for stage in report.stages) > 0


@pytest.mark.usefixtures("brief_stages")
@pytest.mark.parametrize("attack", ["strong", "pgd"])
def test_a_weight_is_a_repetition(attack, model):
    weight = np.arange(len(X)) % 3
    options = {"attack": attack, "random_state": 0}
    weighted = evaluate(model, sample_weight=weight, **options)
    repeated = evaluate(model, np.repeat(X, weight, 0), np.repeat(y, weight), **options)
    assert weighted.accuracy == pytest.approx(repeated.accuracy)
    assert weighted.robust_accuracy == pytest.approx(repeated.robust_accuracy)
    assert [stage.robust_accuracy for stage in weighted.stages] == pytest.approx(
        [stage.robust_accuracy for stage in repeated.stages]
    )
    for label, (_, clean, robust) in repeated.class_accuracies.items():
        assert weighted.class_accuracies[label][1:] == pytest.approx((clean, robust))
    low, high = weighted.confidence_interval
    assert low < weighted.robust_accuracy < high
    assert weighted.stages[-1].robust_accuracy == weighted.robust_accuracy
    # It knows no more samples than there are, however heavy they are.
    assert high - low > np.diff(repeated.confidence_interval)


@pytest.mark.parametrize("weight", [-1.0, np.nan, [1.0, 2.0], "heavy"])
def test_bad_weights_are_rejected_before_the_attack(weight, model, capsys):
    with pytest.raises(ValueError, match="sample_weight"):
        evaluate(model, sample_weight=weight, verbose=True)
    assert capsys.readouterr().out == ""


def test_the_interval_holds_the_accuracies_that_do_not_contradict_it(model):
    report = evaluated(model)
    p, n = report.robust_accuracy, report.n_samples
    low, high = report.confidence_interval
    assert 0 < low < p < high < 1
    for end in (low, high):  # 1.96 standard errors away, by definition of Wilson's interval
        assert abs(p - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-5)


def test_each_class_has_its_accuracies(model):
    report = evaluated(model)
    for label in (0, 1, 2):
        n, clean, robust = report.class_accuracies[label]
        assert n == (y == label).sum()
        assert clean == np.mean(model.predict(X[y == label]) == label)
        assert robust == np.mean(model.predict(report.X_adv[y == label]) == label)
    assert list(report.class_accuracies) == [0, 1, 2]


def test_labels_may_be_strings(model):
    by_name = evaluate(trained(X, NAMES), X, NAMES)
    assert numbers(by_name) == numbers(evaluated(model))
    assert list(by_name.class_accuracies) == ["setosa", "versicolor", "virginica"]
    as_objects = evaluate(trained(X, NAMES), X, pd.Series(NAMES.astype(object)))
    assert numbers(as_objects) == numbers(by_name)


def test_data_frames_stay_data_frames(model):
    frame = pd.DataFrame(X, columns=COLUMNS, index=np.arange(len(X))[::-1] * 2)
    by_name = evaluate(trained(frame), frame, pd.Series(y), mutable=["petal width", "sepal length"])
    by_place = evaluate(model, mutable=[0, 3])
    by_mask = evaluate(model, mutable=[True, False, False, True])
    assert numbers(by_name) == numbers(by_place) == numbers(by_mask)
    X_adv = by_name.X_adv
    assert isinstance(X_adv, pd.DataFrame)
    pd.testing.assert_index_equal(X_adv.index, frame.index)
    assert list(X_adv.columns) == COLUMNS
    assert (X_adv[["sepal width", "petal length"]] == frame[["sepal width", "petal length"]]).all(
        axis=None
    )


@pytest.mark.usefixtures("brief_stages")
def test_trees_on_data_frames_get_data_frames():
    frame = pd.DataFrame(X, columns=COLUMNS)
    tree = DecisionTreeClassifier(max_depth=3, random_state=0)
    by_name = evaluate(tree.fit(frame, y), frame, y, mutable=["petal length"])
    by_place = evaluate(tree.fit(X, y), X, y, mutable=[2])
    assert numbers(by_name) == numbers(by_place)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_the_samples_keep_their_precision_and_are_not_changed(model, dtype):
    values = np.round(10 * X).astype(dtype)
    tenfold = Net(Around(model.module_, before=lambda X: X.double() / 10))
    before = values.copy()
    report = evaluate(tenfold, values, eps=2.0)
    np.testing.assert_array_equal(values, before)
    assert report.X_adv.dtype == ("float32" if dtype == "float32" else "float64")
    assert report.robust_accuracy == pytest.approx(evaluated(model).robust_accuracy, abs=0.03)


# --- ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "black_box"),
    [("strong", False), (PGD(), False), (Square(), False), ("strong", True), (Square(), True)],
)
def test_a_model_that_is_wrong_everywhere_is_robust_nowhere(model, black_box, attack):
    if black_box:
        model = DecisionTreeClassifier(max_depth=3, random_state=0).fit(X, y)
    wrong = (model.predict(X) + 1) % 3
    report = evaluate(model, X, wrong, attack=attack)
    assert (report.accuracy, report.robust_accuracy) == (0, 0)
    assert report.confidence_interval[0] == 0
    assert report.stages[0].n_fooled == len(X)
    np.testing.assert_array_equal(report.X_adv, X)
    assert set(raised(report)) <= {"weak attack"}
    assert "not checked" in detail(report, "huge radius")


def test_a_constant_model_is_right_everywhere_and_never_fooled():
    constant = Net(Around(nn.Identity(), after=lambda X: X[:, :3] * 0 + torch.tensor([3.0, 0, 0])))
    report = evaluate(constant, X, np.zeros(len(X), dtype=int))
    assert (report.accuracy, report.robust_accuracy) == (1, 1)
    assert report.confidence_interval[1] == 1
    assert "gradients" in raised(report)


def test_labels_that_the_classifier_never_saw_count_as_wrong(model):
    unseen = y.copy()
    unseen[::3] = 17
    report = evaluate(model, X, unseen)
    assert not report.right[::3].any()
    assert report.class_accuracies[17] == (25, 0.0, 0.0)
    known = np.arange(len(X)) % 3 > 0
    np.testing.assert_array_equal(report.robust[known], evaluated(model).robust[known])
    nothing = evaluate(model, X, np.full(len(X), 17))
    assert (nothing.accuracy, nothing.robust_accuracy) == (0, 0)


@pytest.mark.parametrize("index", [0, 60])
def test_one_sample_is_enough(model, index):
    report = evaluate(model, X[[index]], y[[index]])
    assert report.n_samples == 1
    assert report.robust_accuracy == evaluated(model).robust[index]
    assert str(report)


@every_norm
def test_without_a_perturbation_it_is_the_accuracy(model, norm):
    report = evaluate(model, eps=0, norm=norm)
    assert report.robust_accuracy == report.accuracy == model.score(X, y)
    np.testing.assert_array_equal(report.X_adv, X)
    assert raised(report) == []


@pytest.mark.usefixtures("brief_stages")
@pytest.mark.parametrize("random_state", [0, 3, "RandomState"])
def test_the_same_seed_gives_the_same_report(model, random_state):
    def seed():
        return np.random.RandomState(1) if random_state == "RandomState" else random_state

    reports = [evaluate(model, X[::2], y[::2], random_state=seed()) for _ in range(2)]
    assert numbers(reports[0]) == numbers(reports[1])


@pytest.mark.usefixtures("brief_stages")
@pytest.mark.parametrize("params", [{}, {"norm": "l2", "eps": 0.3}, {"feature_scale": "range"}])
def test_the_size_of_the_batches_does_not_matter(model, params):
    whole, batched = (evaluate(model, batch_size=size, **params) for size in ("auto", 30))
    assert batched.robust.tolist() == whole.robust.tolist()
    assert [stage.n_fooled for stage in batched.stages] == [s.n_fooled for s in whole.stages]
    assert batched.flags == whole.flags
    np.testing.assert_allclose(batched.X_adv, whole.X_adv, atol=1e-6)


@pytest.mark.usefixtures("brief_stages")
def test_nothing_is_printed_unless_asked_for(model, capsys):
    evaluate(model)
    assert capsys.readouterr().out == ""
    evaluate(model, batch_size=30, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    n_attacked = int((model.predict(X) == y).sum())
    assert all(line.startswith("[Cascade, linf eps=0.2] ") for line in lines)  # no checks
    ends = [i for i, line in enumerate(lines) if f" of {n_attacked} samples, " in line]
    assert len(ends) == math.ceil(n_attacked / 30)
    assert re.fullmatch(r".*\] PGD fooled \d+ of 30 samples, \d+\.\d s", lines[1])
    assert f"] 30 of {n_attacked} samples, " in lines[ends[0]]


def test_a_time_limit_is_kept_and_said(monkeypatch):
    last = PLANS["scores in boxes"][0]
    long = last._replace(attack=Square(n_queries=10**6))
    monkeypatch.setitem(PLANS, "scores in boxes", (long,))
    tree = Opaque(DecisionTreeClassifier(max_depth=3, random_state=0)).fit(X, y)
    start = time.perf_counter()
    report = evaluate(tree, time_limit=0.5, batch_size=20)
    assert "weak attack" in raised(report)
    assert 0.4 < report.stages[-1].seconds < 1.5
    assert time.perf_counter() - start < 10
    report_of_net = evaluate(trained(), time_limit=1e-6)
    assert detail(report_of_net, "weak attack") == "cut short: PGD"
    assert report_of_net.robust_accuracy == report_of_net.accuracy


def test_a_tree_that_is_cut_short_says_that_too():
    tree = Opaque(DecisionTreeClassifier(max_depth=3, random_state=0)).fit(X, y)
    report = evaluate(tree, n_queries=10)
    assert detail(report, "weak attack") == (
        "without gradients, only Square was run; cut short: Square"
    )


# --- errors -------------------------------------------------------------------------------

BAD_PARAMS = [
    ({"eps": -1}, "Got eps=-1, but expected a non-negative finite number"),
    ({"eps": [0.1, 0.2]}, r"Got eps=\[0.1, 0.2\], but expected a non-negative finite number"),
    ({"eps": np.nan}, "Got eps=nan, but expected a non-negative finite number"),
    ({"eps": None}, "Got eps=None, but expected a non-negative finite number"),
    ({"norm": "l3"}, "Got norm='l3', but expected one of 'l2', 'linf', 'l1'"),
    ({"norm": "inf"}, "Got norm='inf', .*did you mean 'linf'"),
    ({"attack": "stron"}, r"Got attack='stron', but expected .*did you mean 'strong'"),
    ({"attack": PGD}, "Got attack=.*PGD.*, but expected .*'strong'"),
    ({"attack": None}, "Got attack=None, but expected .*'strong'"),
    ({"attack": PGD(n_steps=0)}, "Got n_steps=0, but expected an integer of at least 1"),
    ({"attack": PGD(eps=0.3)}, r"its eps to be left alone.*evaluate_robustness\(eps=\.\.\.\)"),
    ({"attack": Square(bounds=(0, 1))}, "its bounds to be left alone"),
    ({"attack": PGD(), "n_queries": 5}, "Got n_queries=5, but expected None.*'strong'"),
    ({"attack": PGD(), "time_limit": 5}, "Got time_limit=5, but expected None.*'strong'"),
    ({"n_queries": 0}, "Got n_queries=0, but expected an integer of at least 1"),
    ({"time_limit": 0}, "Got time_limit=0, but expected a positive finite number"),
    ({"batch_size": 0}, "Got batch_size=0, but expected an integer of at least 1"),
    (
        {"batch_size": "big"},
        "Got batch_size='big', but expected an integer of at least 1 or 'auto'",
    ),
    ({"bounds": (1, 0)}, r"Got bounds=\(1, 0\), but expected None or a tuple"),
    ({"feature_scale": "sdt"}, "Got feature_scale='sdt', .*did you mean 'std'"),
    ({"mutable": [4]}, r"Got mutable=\[4\], but expected columns of X: .*; 4 is none"),
    ({"mutable": ["petal width"]}, "Got mutable=.*; names need a DataFrame"),
]


class Refusing(Net):
    def predict(self, X):
        raise AssertionError("predict was called")


@pytest.mark.parametrize(("params", "match"), BAD_PARAMS, ids=[str(p) for p, _ in BAD_PARAMS])
def test_a_bad_parameter_is_named_before_anything_is_computed(net, params, match):
    with pytest.raises(ValueError, match=match):
        evaluate_robustness(Refusing(net), X, y, **params)


@pytest.mark.parametrize(
    ("X", "y", "match"),
    [
        (X[:0], y[:0], r"Found array with 0 sample\(s\)"),
        (X[:, 0], y, "Expected 2D array, got 1D array"),
        (X + np.inf, y, r"Input.* contains infinity"),
        (X, y[:3], r"inconsistent numbers of samples: \[75, 3\]"),
        (X, np.column_stack([y, y]), "y should be a 1d array"),
    ],
    ids=["empty", "1-d", "infinity", "lengths", "2-d y"],
)
def test_bad_data_is_rejected_before_anything_is_computed(net, X, y, match):
    with pytest.raises(ValueError, match=match):
        evaluate_robustness(Refusing(net), X, y)


@pytest.mark.parametrize(
    ("estimator", "match"),
    [
        (StandardScaler(), "type StandardScaler without predict, but expected a fitted class"),
        (LinearRegression().fit(X, y), "type LinearRegression without classes_"),
        (
            MultiOutputClassifier(GaussianNB()).fit(X, y[:, None]),
            "type MultiOutputClassifier with classes for each of 1 outputs, but expected",
        ),
    ],
)
def test_what_is_no_classifier_is_rejected(estimator, match):
    with pytest.raises(TypeError, match=match):
        evaluate_robustness(estimator, X, y)


@pytest.mark.parametrize("estimator", [DecisionTreeClassifier(), JacobianRegularizedClassifier()])
def test_an_unfitted_estimator_is_rejected(estimator):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        evaluate_robustness(estimator, X, y)


def test_a_gradient_attack_on_a_tree_is_rejected():
    tree = DecisionTreeClassifier().fit(X, y)
    with pytest.raises(NotDifferentiableError, match="type DecisionTreeClassifier"):
        evaluate_robustness(tree, X, y, attack=PGD())
