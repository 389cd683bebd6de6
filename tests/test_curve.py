"""Distances and curves are those of the closed form, and judged by the estimator itself."""

import inspect
import itertools
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import brentq
from sklearn.datasets import load_breast_cancer, load_iris, load_wine, make_moons
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from torch import nn
from torch.nn import functional as F

from skjacobian import (
    FeatureConstraints,
    JacobianRegularizedClassifier,
    RobustScorer,
    adversarial_distances,
    evaluate_robustness,
    robustness_curve,
)
from skjacobian.attacks import FMN
from skjacobian.attacks._closest import OVERSHOOT
from skjacobian.curve import curve_of_distances
from skjacobian.differentiable import as_torch
from skjacobian.exceptions import AttackWarning
from tests.leaf_boxes import distance_to_leaves
from tests.opaque import Decisions, Opaque
from tests.slow import others_slow

X, y = (array[50:] for array in load_iris(return_X_y=True))
NAMES = np.array(["", "versicolor", "virginica"])[y]
W, B = np.array([-0.3, -0.5, 0.6, 0.8]), -1.2
DUAL_ORDER = {"linf": 1, "l2": 2, "l1": np.inf}

# FMN aims beyond the boundary by a ten-thousandth, and does not stop before it.
NEAR = {"rtol": 5e-4, "atol": 1e-6}

every_norm = pytest.mark.parametrize("norm", DUAL_ORDER)
both_functions = pytest.mark.parametrize("function", [adversarial_distances, robustness_curve])


class LinearNet(nn.Module):
    def __init__(self, n_features, n_classes):
        super().__init__()
        self.linear = nn.Linear(n_features, n_classes)

    def forward(self, X):
        return self.linear(X)


def linear(cls=JacobianRegularizedClassifier, **params):
    return cls(LinearNet, **{"max_epochs": 20, "lr": 0.03, "random_state": 0, **params})


def with_plane(X, y, w=W, b=B, cls=JacobianRegularizedClassifier, **params):
    """A classifier that puts the second class where x @ w + b > 0."""
    model = linear(cls, max_epochs=1, **params).fit(X, y)
    layer = model.module_.linear
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.stack([np.zeros_like(w), w])))
        layer.bias.copy_(torch.tensor([0.0, b]))
    return model


def margins(model, X, y):
    """Signed margins and the plane of a linear model in raw units, by scikit-learn alone."""
    bias = model.decision_function(np.zeros((1, X.shape[1])))[0]
    w = model.decision_function(np.eye(X.shape[1])) - bias
    sign = np.where(y == model.classes_[1], 1, -1)
    return sign * (X @ w + bias), w, sign


def closed_form(model, X, y, norm, scale=1.0):
    """The distance of each sample from the plane; 0 beyond it."""
    margin, w, _ = margins(model, X, y)
    return np.maximum(margin, 0) / np.linalg.norm(w * scale, DUAL_ORDER[norm])


def assert_near(found, distances):
    """Assert that no distance found is below the true one, and none far above."""
    distances = np.asarray(distances)
    assert (found >= distances * (1 - 1e-6)).all()
    np.testing.assert_allclose(found, distances, **NEAR)


@pytest.fixture(scope="module")
def network():
    """A network behind a scaler that is right about most, but not all."""
    model = JacobianRegularizedClassifier(
        module__hidden_units=(16,), max_epochs=10, lr=0.02, random_state=0
    )
    return make_pipeline(StandardScaler(), model).fit(X, y)


# --- distances ----------------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize(
    ("dtype", "scale"), [("float32", None), ("float64", [1.0, 0.1, 3.0, 10.0])]
)
def test_the_distance_from_a_plane_is_the_closed_form(norm, dtype, scale):
    model = with_plane(X.astype(dtype), y, dtype=dtype)
    distances = closed_form(model, X, y, norm, 1.0 if scale is None else scale)
    found = adversarial_distances(model, X.astype(dtype), y, norm=norm, feature_scale=scale)
    assert 0 < (distances == 0).sum() < len(X) / 2
    np.testing.assert_allclose(found, distances, rtol=5e-4, atol=2e-5)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found == 0, model.predict(X.astype(dtype)) != y)


@every_norm
@pytest.mark.parametrize(
    ("scaler", "scale"),
    [
        (StandardScaler(), None),
        (MinMaxScaler((-1, 1)), "std"),
        (PCA(3, whiten=True), "range"),
        (make_pipeline(StandardScaler()), "std"),
    ],
    ids=["StandardScaler", "MinMaxScaler", "PCA", "nested"],
)
def test_behind_a_scaler_the_distance_is_in_raw_units(norm, scale, scaler):
    model = make_pipeline(scaler, linear()).fit(X, y)
    unit = {"std": X.std(0), "range": np.ptp(X, axis=0), None: 1.0}[scale]
    found = adversarial_distances(model, X, y, norm=norm, feature_scale=scale)
    assert_near(found, closed_form(model, X, y, norm, unit))


def test_inside_bounds_a_linf_distance_is_the_root_of_the_worst_margin():
    model = make_pipeline(MinMaxScaler(), linear()).fit(X, y)
    margin, w, sign = margins(model, X, y)
    low, high = X.min(0), X.max(0)
    room = np.where(np.outer(sign, w) > 0, X - low, high - X)

    def distance(i):
        if margin[i] <= 0:
            return 0.0
        worst = [margin[i] - np.minimum(room[i], eps) @ np.abs(w) for eps in (0, 10)]
        if worst[1] > 0:
            return np.inf
        return brentq(lambda eps: margin[i] - np.minimum(room[i], eps) @ np.abs(w), 0, 10)

    found = adversarial_distances(model, X, y, bounds=(low, high), n_steps=40)
    assert_near(found, [distance(i) for i in range(len(X))])
    assert (found > adversarial_distances(model, X, y)).any()


@pytest.mark.parametrize(
    ("norm", "mutable", "container"),
    [
        ("linf", [0, 3], np.asarray),
        ("l2", [True, False, False, True], np.asarray),
        ("l1", ["a", "d"], lambda X: pd.DataFrame(X, columns=list("abcd"))),
    ],
    ids=["indices", "mask", "names"],
)
def test_only_mutable_features_change(norm, mutable, container):
    values = container(X)
    model = make_pipeline(StandardScaler(), linear()).fit(values, y)
    plain = make_pipeline(StandardScaler(), linear()).fit(X, y)
    found = adversarial_distances(model, values, y, norm=norm, mutable=mutable)
    assert_near(found, closed_form(plain, X, y, norm, np.array([1, 0, 0, 1])))


def test_a_sample_out_of_reach_is_infinitely_far():
    model = with_plane(X, y, w=np.array([0.0, 0.0, 1.0, 0.0]), b=-4.9)
    distances = closed_form(model, X, y, "linf")
    capped = adversarial_distances(model, X, y, eps=0.3)
    np.testing.assert_array_equal(np.isinf(capped), distances > 0.3)
    assert_near(capped[distances <= 0.3], distances[distances <= 0.3])
    blind = adversarial_distances(model, X, y, mutable=[0])
    np.testing.assert_array_equal(blind, np.where(distances > 0, np.inf, 0))


def test_without_gradients_the_distance_is_infinite_and_that_is_warned_of():
    model = with_plane(X, y, w=np.zeros(4), b=1.0)
    with pytest.warns(AttackWarning, match="gradient was zero at the first step of 50 of 50"):
        distances = adversarial_distances(model, X, y)
    np.testing.assert_array_equal(distances, np.where(y == model.classes_[1], np.inf, 0))


@pytest.mark.parametrize("labels", [y, NAMES, pd.Series(NAMES), [*NAMES]])
def test_labels_come_in_any_container(labels):
    model = with_plane(X, np.asarray(labels))
    found = adversarial_distances(model, X, labels)
    np.testing.assert_array_equal(found, adversarial_distances(with_plane(X, y), X, y))


def test_a_label_that_the_estimator_has_not_seen_is_at_distance_0(network):
    unseen = y.copy()
    unseen[::3] = 17
    expected = adversarial_distances(network, X, y)
    expected[::3] = 0
    # To the last digit but one: in a batch of another size products are rounded otherwise.
    np.testing.assert_allclose(adversarial_distances(network, X, unseen), expected, rtol=1e-12)


@every_norm
def test_the_batch_size_does_not_matter(network, norm):
    whole = adversarial_distances(network, X, y, norm=norm, batch_size=1000, n_steps=6)
    parts = adversarial_distances(network, X, y, norm=norm, batch_size=17, n_steps=6)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_more_restarts_and_equal_seeds(network):
    once = adversarial_distances(network, X, y)
    several = adversarial_distances(network, X, y, n_restarts=4)
    # What is nearer by less than this share is not kept, and later searches begin there.
    assert (several <= (1 + OVERSHOOT) * once).all()
    np.testing.assert_array_equal(several, adversarial_distances(network, X, y, n_restarts=4))


def test_progress_is_printed_on_request(network, capsys):
    adversarial_distances(network, X, y)
    assert capsys.readouterr().out == ""
    adversarial_distances(network, X, y, batch_size=60, verbose=True)
    assert capsys.readouterr().out.count("[FMN, linf eps=inf]") == 2


class Rounding(JacobianRegularizedClassifier):
    """Whose predict is right for longer than its torch view."""

    def predict(self, X):
        return super().predict(np.round(X))


@as_torch.register
def _(classifier: Rounding):
    return classifier.module_


def test_where_predict_withstands_what_fools_the_view_predict_decides():
    X, y = np.array([[0.0], [1.0]] * 4), np.array([0, 1] * 4)
    # The view changes sides at 0.3, predict at 0.5: from 0 the crossing is not seen by predict.
    model = with_plane(X, y, w=np.array([1.0]), b=-0.3, cls=Rounding)
    with pytest.warns(AttackWarning, match="fooled by 4 perturbed samples of 8 .*predict decides"):
        distances = adversarial_distances(model, X, y, eps=0.45)
    assert np.isinf(distances).all()
    with pytest.warns(AttackWarning, match="fooled by 4 perturbed samples of 8 .*predict decides"):
        distances = adversarial_distances(model, X, y)
    # Here by the view, there by a look on the way to the other samples.
    assert_near(distances[y == 1], [0.7] * 4)
    np.testing.assert_allclose(distances[y == 0], [0.5] * 4, rtol=1e-3)


@pytest.mark.filterwarnings("error:The torch view:skjacobian.exceptions.AttackWarning")
@every_norm
def test_where_rounding_parts_predict_from_the_view_the_distance_is_that_of_predict(norm):
    # In float32, terms of a thousand that cancel leave predict behind the boundary of the view by
    # more than the step across it: 3 in 10 of these were infinitely far.
    rng = np.random.default_rng(0)
    table = rng.normal(size=(120, 8))
    table[:, 1:] = 20 + 0.01 * table[:, 1:]
    table = table.astype("float32")
    w = np.append(0.3, rng.normal(scale=80, size=7)).astype("float32")
    model = LogisticRegression().fit(table, rng.integers(0, 2, 120))
    model.coef_, model.intercept_ = w[None], -(table @ w).mean(keepdims=True)
    score = table.astype(float) @ w.astype(float) + float(model.intercept_[0])
    # None of the other class, on the way to which a boundary is found as well.
    chosen = (score < -0.1) & (model.predict(table) == 0)
    labels = np.zeros(chosen.sum(), dtype=int)
    found = adversarial_distances(model, table[chosen], labels, norm=norm, mutable=[0])
    is_found = np.isfinite(found)
    assert is_found.mean() > 0.95
    np.testing.assert_allclose(found[is_found], (-score[chosen] / w[0])[is_found], rtol=0.02)


@pytest.mark.filterwarnings("ignore::skjacobian.exceptions.AttackWarning")  # zero gradients
@every_norm
@pytest.mark.parametrize("name", ["wine", "breast cancer"])
def test_no_distance_is_greater_than_that_to_a_sample_that_is_predicted_otherwise(name, norm):
    data = {"wine": load_wine, "breast cancer": load_breast_cancer}[name]
    X, y = (values[:120] for values in data(return_X_y=True))
    X = X / X.std(0)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    length = np.linalg.norm(X[:, None] - X, order, axis=2)
    for classifier in (SVC(gamma=1), GaussianNB()):
        classifier.fit(X, y)
        predicted = classifier.predict(X)
        nearest = np.where(predicted != y[:, None], length, np.inf).min(1)
        distances = adversarial_distances(classifier, X, y, norm=norm)
        assert (distances <= nearest * (1 + 1e-6)).all()
        # What is between is nearer still, and does fool.
        assert np.median(distances[predicted == y] / nearest[predicted == y]) < 0.9


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@every_norm
def test_of_few_features_a_search_four_times_as_long_finds_hardly_more(norm):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((350, 10))
    f = np.sin(2 * X[:, 0]) + X[:, 1] * X[:, 2] + np.cos(2 * X[:, 4]) * X[:, 5]
    y = np.digitize(f, np.quantile(f, [0.3, 0.7]))
    model = MLPClassifier((32, 32), max_iter=300, random_state=0).fit(X[:200], y[:200])
    X, y = X[200:], y[200:]
    distances = adversarial_distances(model, X, y, norm=norm)
    longer = adversarial_distances(model, X, y, norm=norm, n_restarts=8, n_steps=28, random_state=1)
    assert (distances > 1.05 * longer).mean() <= 0.02


@pytest.mark.usefixtures("short_stages")
@pytest.mark.parametrize(
    ("norm", "gamma"), others_slow(itertools.product(["l2", "l1"], [1, 5]), [("l2", 1)])
)
def test_over_categories_kernel_machines_are_hardly_farther_than_by_brute_force(norm, gamma):
    rng = np.random.default_rng(0)
    n, order, unit = 180, int(norm[1]), np.array([0.2, 1.5, 2.0, 2.0, 2.0])
    a, k, c = rng.random(n), rng.integers(0, 6, n), rng.integers(0, 3, n)
    X = np.column_stack([a, k, np.eye(3)[c]])
    y = np.sin(6 * a + c) + 0.35 * (k - 2.5) * (c - 1) + 0.3 * rng.standard_normal(n) > 0
    model = SVC(gamma=gamma, C=10).fit(X[:120], y[:120])
    X, y = X[120:], y[120:]
    fine = np.linspace(0, 1, 401)
    everywhere = np.array([[a, k, *row] for a in fine for k in range(6) for row in np.eye(3)])
    wrong = model.predict(everywhere) != y[:, None]
    length = np.linalg.norm((everywhere - X[:, None]) / unit, ord=order, axis=2)
    by_force = np.where(wrong, length, np.inf).min(1)
    by_force[model.predict(X) != y] = 0
    threat = {
        "norm": norm,
        "feature_scale": unit,
        "constraints": FeatureConstraints(
            integer=[1], one_hot=[[2, 3, 4]], bounds={0: (0, 1), 1: (0, 5)}
        ),
    }
    distances = adversarial_distances(model, X, y, **threat)
    a_grid = 0.5 * (fine[1] - fine[0]) / unit[0]
    assert (distances > by_force - 2 * a_grid - 1e-3).all()
    assert (distances > 1.02 * by_force + a_grid).mean() <= 0.02
    eps = np.median(by_force[by_force > 0]) + 2 * a_grid
    strong = RobustScorer(eps=eps, attack="strong", **threat)(model, X, y)
    assert strong <= (by_force > eps - 2 * a_grid).mean()


@pytest.mark.filterwarnings("ignore::skjacobian.exceptions.AttackWarning")
def test_the_way_to_other_samples_keeps_to_the_threat_model():
    # Far from all samples this machine says 1, its intercept; there is no gradient.
    X = pd.DataFrame({"a": [0, 6, 12, 18], "b": [0.0, 6.0, 12.0, 18.0]})
    y = np.array([0, 1, 1, 1])
    model = SVC(gamma=20).fit(X, y)
    assert (model.predict(X) == y).all()
    whole = adversarial_distances(model, X, y, mutable=["a"])
    assert whole[0] == 1.0  # a whole number
    assert adversarial_distances(model, X, y, mutable=["b"])[0] < 1.0
    assert np.isinf(adversarial_distances(model, X, y, mutable=["b"], eps=0.05)[0])


# --- curves -------------------------------------------------------------------------------


def radii_between(distances):
    """Radii in the widest gaps between the distances, where rounding cannot decide."""
    ordered = np.unique(distances[distances > 0])
    widest = np.sort(np.argsort(np.diff(ordered) / ordered[1:])[-6:])
    return (ordered[widest] + ordered[widest + 1]) / 2


@every_norm
@pytest.mark.parametrize("scale", [None, "std"])
def test_the_curve_of_a_linear_model_is_the_closed_form_and_that_of_the_scorer(norm, scale):
    model = make_pipeline(StandardScaler(), linear()).fit(X, y)
    unit = 1.0 if scale is None else X.std(0)
    distances = closed_form(model, X, y, norm, unit)
    radii = radii_between(distances)
    eps, accuracy = robustness_curve(model, X, y, norm=norm, eps=radii, feature_scale=scale)
    np.testing.assert_array_equal(eps, radii)
    np.testing.assert_allclose(accuracy, [(distances > r).mean() for r in radii], atol=1e-12)
    scores = RobustScorer(norm=norm, eps=[*radii], feature_scale=scale)(model, X, y)
    np.testing.assert_allclose(accuracy, [*scores.values()][1:], atol=1e-12)


@every_norm
def test_the_curve_starts_at_the_accuracy_and_falls_to_the_end(network, norm):
    eps, accuracy = robustness_curve(network, X, y, norm=norm)
    assert eps[0] == 0
    assert accuracy[0] == network.score(X, y)
    assert (np.diff(eps) > 0).all()
    assert (np.diff(accuracy) < 0).all()
    assert accuracy[-1] == 0


def test_given_radii_read_the_whole_curve(network):
    radii = np.array([0.0, 0.1, 0.3, 1.0, 50.0])
    eps, accuracy = robustness_curve(network, X, y)
    at = np.searchsorted(eps, radii, side="right") - 1
    _, chosen = robustness_curve(network, X, y, eps=radii)
    np.testing.assert_array_equal(chosen, accuracy[at])
    for r, value in zip(radii, chosen, strict=True):
        np.testing.assert_array_equal(robustness_curve(network, X, y, eps=r)[1], [value])


def test_the_curve_is_that_of_the_distances(network):
    options = {"norm": "l2", "n_steps": 5, "n_restarts": 2, "bounds": (0, 9), "mutable": [0, 2]}
    options |= {"feature_scale": "std", "random_state": 3, "batch_size": 30}
    distances = adversarial_distances(network, X, y, **options)
    curve = robustness_curve(network, X, y, **options)
    np.testing.assert_array_equal(curve, curve_of_distances(distances))


def test_curves_of_distances_are_shares_counted_one_by_one():
    rng = np.random.default_rng(0)
    distances = rng.choice([0.0, 0.5, 1.0, 1.5, np.inf], 40)
    radii = [0.0, 0.25, 0.5, 1.0, 1.25, 1.5, 9.0]
    weight = rng.uniform(size=40)
    _, accuracy = curve_of_distances(distances, eps=radii)
    np.testing.assert_array_equal(accuracy, [(distances > r).mean() for r in radii])
    _, weighted = curve_of_distances(distances, eps=radii, sample_weight=weight)
    expected = [np.average(distances > r, weights=weight) for r in radii]
    np.testing.assert_allclose(weighted, expected, rtol=1e-12)
    np.testing.assert_array_equal(curve_of_distances(distances)[0], [0, 0.5, 1, 1.5])


@pytest.mark.parametrize("weight", [-np.ones(len(X)), np.ones(3), "many"])
def test_bad_weights_are_found_before_anything_is_computed(weight):
    with pytest.raises(ValueError, match="sample_weight"):
        robustness_curve(None, X, y, sample_weight=weight)


def test_a_weight_is_a_repetition(network):
    weight = np.random.default_rng(0).integers(0, 4, size=len(X))
    eps = [0.0, 0.2, 0.5]
    repeated = robustness_curve(network, np.repeat(X, weight, 0), np.repeat(y, weight), eps=eps)
    weighted = robustness_curve(network, X, y, eps=eps, sample_weight=weight)
    np.testing.assert_allclose(weighted, repeated, rtol=1e-12)


def test_where_nothing_falls_the_curve_is_a_point():
    eps, accuracy = curve_of_distances([np.inf, 0.0, np.inf, np.inf])
    assert (eps.tolist(), accuracy.tolist()) == ([0.0], [0.75])


def test_radii_are_returned_in_order():
    eps, accuracy = curve_of_distances([0.0, 1.0, 2.0, 3.0], eps=(2.5, 0.5, 1))
    assert (eps.tolist(), accuracy.tolist()) == ([0.5, 1.0, 2.5], [0.75, 0.5, 0.25])


def test_columns_keep_their_names():
    frame = pd.DataFrame(X, columns=list("abcd"), index=np.arange(len(X))[::-1])
    named = make_pipeline(StandardScaler(), linear()).fit(frame, pd.Series(NAMES))
    plain = make_pipeline(StandardScaler(), linear()).fit(X, NAMES)
    curve = robustness_curve(named, frame, pd.Series(NAMES))
    np.testing.assert_allclose(curve, robustness_curve(plain, X, NAMES), rtol=1e-9)


# --- parameters and errors ----------------------------------------------------------------


def test_the_search_is_that_of_fmn_by_default():
    of_fmn = inspect.signature(FMN).parameters
    for function in (adversarial_distances, robustness_curve):
        own = inspect.signature(function).parameters
        for name in set(own) & set(of_fmn) - {"eps"}:
            assert own[name].default == of_fmn[name].default


@both_functions
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"norm": "linfty"}, "Got norm='linfty', but expected one of"),
        ({"n_steps": 0}, "Got n_steps=0, but expected an integer of at least 1."),
        ({"n_restarts": 1.5}, "Got n_restarts=1.5, but expected an integer of at least 1."),
        ({"batch_size": 0}, "Got batch_size=0, but expected an integer of at least 1"),
        ({"feature_scale": "sd"}, "Got feature_scale='sd', but expected one of 'std', 'range'"),
        ({"mutable": [9]}, "Got mutable=[9], but expected columns of X: indices from -4 to 3"),
        ({"bounds": (5, 0)}, "Got bounds=(5, 0), but expected None or a tuple (low, high)"),
        ({"bounds": (0, 1)}, "Got X with 100 of 100 samples outside bounds=(0.0, 1.0)"),
        ({"eps": -1.0}, "Got eps=-1.0, but expected "),
        ({"eps": np.nan}, "Got eps=nan, but expected "),
        ({"eps": "large"}, "Got eps='large', but expected "),
    ],
)
def test_errors_say_what_was_got_and_what_was_expected(function, params, message, network):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(network, X, y, **params)


@pytest.mark.parametrize("eps", [[], [0.1, -0.1], [np.inf], [None]])
def test_bad_radii_are_found_before_anything_is_computed(eps):
    message = f"Got eps={eps!r}, but expected non-negative finite numbers, at least one."
    with pytest.raises(ValueError, match=re.escape(message)):
        robustness_curve(None, None, None, eps=eps)
    with pytest.raises(ValueError, match=re.escape(message.replace("eps", "radii"))):
        adversarial_distances(None, None, None, radii=eps)


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        ("a", "Got distances that are no array of numbers: could not convert string to float"),
        ([], "Got distances of shape (0,), but expected (n_samples,)."),
        ([[1.0]], "Got distances of shape (1, 1), but expected (n_samples,)."),
        ([-1.0, np.nan, 1], "Got distances with 2 NaN or negative, but expected 0, positive"),
    ],
)
def test_bad_distances_are_rejected(distances, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        curve_of_distances(distances)


@both_functions
def test_estimators_without_fit_are_rejected(function):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        function(make_pipeline(StandardScaler(), linear()), X, y)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        function(with_plane(X, y), X, y[:-1])


def test_nothing_that_is_given_is_changed(network):
    values, labels = X.copy(), y.copy()
    state = torch.get_rng_state()
    robustness_curve(network, values, labels, n_restarts=2, random_state=None)
    np.testing.assert_array_equal(values, X)
    np.testing.assert_array_equal(labels, y)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("n", [1, 3])
def test_one_sample_that_is_right_has_a_distance(network, n):
    right = np.flatnonzero(network.predict(X) == y)
    chosen = [right[0], *np.flatnonzero(network.predict(X) != y)[: n - 1]]
    distances = adversarial_distances(network, X[chosen], y[chosen])
    assert distances.shape == (len(chosen),)
    assert distances[0] > 0
    assert (distances[1:] == 0).all()


# --- classifiers without gradients -------------------------------------------------------

by_decisions = pytest.mark.filterwarnings(
    "ignore:.* without gradients:skjacobian.exceptions.AttackWarning"
)


@by_decisions
@pytest.mark.parametrize(
    ("norm", "load"),
    others_slow([("linf", load_wine), ("l2", load_wine), ("l1", load_iris)], [("l1", load_iris)]),
)
def test_distances_to_trees_are_hardly_above_the_closed_form(norm, load):
    values, labels = load(return_X_y=True)
    values = MinMaxScaler().fit_transform(values)
    train = values[::2], labels[::2]
    tree = DecisionTreeClassifier(max_depth=5, random_state=0).fit(*train)
    values, labels = values[1::2], labels[1::2]
    exact = distance_to_leaves(tree, values, labels, norm)
    opaque = Opaque(tree).fit(*train)
    found = adversarial_distances(opaque, values, labels, norm=norm, n_queries=1000)
    assert (found[exact == 0] == 0).all()
    # Thresholds are compared in float32.
    assert (found >= exact - 1e-6).all()
    excess = found[exact > 0] / exact[exact > 0]
    assert np.median(excess) < 1.01
    assert (excess < 1.05).mean() > (0.99 if norm == "linf" else 0.6)


@by_decisions
def test_of_few_features_the_pockets_of_neighbours_are_found_between_the_corners():
    # Along corners of the box alone, 37 % of these were more than 5 % too large.
    X, labels = make_moons(150, noise=0.25, random_state=0)
    model = KNeighborsClassifier(1).fit(X, labels)
    samples = X[::4] + 0.03 * np.random.default_rng(0).normal(size=(38, 2))
    predicted = model.predict(samples)
    distances = adversarial_distances(model, samples, predicted)
    side = np.linspace(-0.95, 0.95, 51)
    box = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    is_too_large = [
        (model.predict(x + distance * box) != label).any()
        for x, label, distance in zip(samples, predicted, distances, strict=True)
    ]
    assert np.mean(is_too_large) < 0.15


@by_decisions
@pytest.mark.parametrize("norm", others_slow(["linf", "l2", "l1"], ["linf"]))
def test_distances_by_decisions_are_those_of_a_stump(norm):
    values = np.random.default_rng(0).normal(size=(60, 8))
    labels = (values[:, 3] > 0.5).astype(int)
    stump = Opaque(DecisionTreeClassifier(max_depth=1)).fit(values, labels)
    expected = np.abs(values[:, 3] - stump.classifier_.tree_.threshold[0])
    found = adversarial_distances(stump, values, labels, norm=norm, n_queries=600)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-6)
    near = adversarial_distances(stump, values, labels, norm=norm, eps=0.5, n_queries=600)
    np.testing.assert_allclose(near[expected < 0.49], expected[expected < 0.49], rtol=0.02)
    assert np.isinf(near[expected > 0.5]).all()


@by_decisions
@pytest.mark.filterwarnings(
    "ignore:.*(flags are|only searches):skjacobian.exceptions.AttackWarning"
)
@pytest.mark.parametrize(
    "model",
    [
        KNeighborsClassifier(2),
        pytest.param(RandomForestClassifier(4, random_state=0), marks=pytest.mark.slow),
        pytest.param(KNeighborsClassifier(4), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_equal_votes_are_won_by_the_class_that_predict_returns(model):
    values = np.random.default_rng(0).uniform(0, 6, size=(60, 1))
    labels = values[:, 0].astype(int) % 2
    model.fit(values, labels)
    grid = np.linspace(-1, 7, 20_001)[:, None]
    assert (model.predict_proba(grid) == 0.5).any(1).mean() > 0.02
    predicted, is_right = model.predict(grid), model.predict(values) == labels
    away = [
        np.abs(grid[predicted != label, 0] - x).min()
        for x, label in zip(values[:, 0], labels, strict=True)
    ]
    expected = np.where(is_right, away, 0.0)
    found = adversarial_distances(model, values, labels)
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=1e-3)
    report = evaluate_robustness(model, values, labels, eps=0.05, n_queries=500)
    assert report.robust_accuracy == pytest.approx((expected > 0.05).mean(), abs=0.03)
    assert "torch view" not in [flag.name for flag in report.raised]


def test_curves_by_decisions_are_said_to_be_weaker_and_begin_at_the_accuracy():
    forest = Opaque(RandomForestClassifier(10, random_state=0)).fit(X[::2], y[::2])
    message = "type Opaque without gradients, so the smallest perturbations are"
    with pytest.warns(AttackWarning, match=message):
        _, accuracy = robustness_curve(forest, X, y, n_queries=200)
    assert accuracy[0] == forest.score(X, y)
    assert accuracy[-1] == 0
    assert (np.diff(accuracy) < 0).all()


@by_decisions
@pytest.mark.parametrize("norm", others_slow(["linf", "l2", "l1"], ["l2"]))
def test_distances_by_decisions_are_those_by_gradients(norm):
    decisions = Decisions(LogisticRegression(max_iter=1000)).fit(X, y)
    expected = closed_form(decisions.classifier_, X, y, norm)
    found = adversarial_distances(decisions, X, y, norm=norm, n_queries=600)
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=1e-6)
    assert (found >= expected - 1e-6).all()


@both_functions
def test_a_number_of_queries_must_be_one(function):
    with pytest.raises(ValueError, match="Got n_queries=0, but expected"):
        function(KNeighborsClassifier().fit(X, y), X, y, n_queries=0)


@pytest.mark.parametrize("answer", [lambda z: z, lambda z: F.one_hot(z.argmax(1), 2).float()])
def test_a_module_without_gradients_is_asked_for_its_decisions(answer):
    class Detached(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, X):
            return answer(self.net(X).detach())

    plane = with_plane(X, y)
    net, labels = Detached(plane.module_), plane.classes_.searchsorted(y)
    with pytest.warns(AttackWarning, match="type Detached without gradients, so the smallest"):
        found = adversarial_distances(net, X, labels)
    np.testing.assert_allclose(found, closed_form(plane, X, y, "linf"), rtol=0.05, atol=1e-6)
