"""Robust accuracy is that of the closed form, and behaves as a scorer of scikit-learn."""

import inspect
import pickle

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.datasets import load_digits, load_iris
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    LearningCurveDisplay,
    StratifiedKFold,
    ValidationCurveDisplay,
    cross_val_score,
    cross_validate,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.tree import DecisionTreeClassifier
from skorch import NeuralNetClassifier
from torch import nn

from skjacobian import (
    AdversarialClassifier,
    JacobianRegularizedClassifier,
    RobustScorer,
    robust_accuracy_score,
)
from skjacobian.attacks import FGSM, PGD, RayS, Square
from skjacobian.averages import average_accuracy
from skjacobian.datasets import make_separated
from skjacobian.differentiable import as_torch
from skjacobian.exceptions import AttackWarning, NotDifferentiableError
from tests.opaque import Opaque
from tests.slow import others_slow

X, y = load_iris(return_X_y=True)
X, y = X[::2], y[::2]
NAMES = np.array(["setosa", "versicolor", "virginica"])[y]
BINARY_X, BINARY_Y = load_iris(return_X_y=True)
BINARY_X, BINARY_Y = BINARY_X[50:], BINARY_Y[50:]

DUAL_ORDER = {"linf": 1, "l2": 2, "l1": np.inf}
CV = StratifiedKFold(3, shuffle=True, random_state=0)


class LinearNet(nn.Module):
    def __init__(self, n_features, n_classes):
        super().__init__()
        self.linear = nn.Linear(n_features, n_classes)

    def forward(self, X):
        return self.linear(X)


def small(cls=JacobianRegularizedClassifier, **params):
    params = {"module__hidden_units": (16,), "max_epochs": 5, "lr": 0.02, **params}
    return cls(random_state=0, **params)


def linear(**params):
    return JacobianRegularizedClassifier(
        LinearNet, **{"max_epochs": 3, "lr": 0.03, "random_state": 0, **params}
    )


def with_plane(X, y, w, b=0.0, **params):
    """A classifier that puts the second class where x @ w + b > 0."""
    model = linear(max_epochs=1, **params).fit(X, y)
    layer = model.module_.linear
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.stack([np.zeros_like(w), w])))
        layer.bias.copy_(torch.tensor([0.0, b]))
    return model


def plane_of(model, n_features):
    """The plane of a linear model in the units it receives, by scikit-learn alone."""
    bias = model.decision_function(np.zeros((1, n_features)))[0]
    return model.decision_function(np.eye(n_features)) - bias, bias


def sides(model, y):
    """1 for the second class, -1 for the first."""
    return np.where(y == model.classes_[1], 1, -1)


def distances(model, X, y, norm, scale=1.0):
    """Signed distance of each sample from the plane: what an exact attack needs."""
    w, bias = plane_of(model, X.shape[1])
    return sides(model, y) * (X @ w + bias) / np.linalg.norm(w * scale, DUAL_ORDER[norm])


def radii_between(distance):
    """Radii in the widest gaps between the distances, where rounding cannot decide."""
    ordered = np.unique(distance[distance > 0])
    widest = np.argsort(np.diff(ordered) / ordered[1:])[-3:]
    return [float(ordered[i : i + 2].mean()) for i in widest]


def assert_closed_form(model, X, y, distance, **params):
    """Robust accuracy is the share of samples farther from the plane than the radius."""
    for eps in radii_between(distance):
        score = robust_accuracy_score(model, X, y, eps=eps, **params)
        assert score == pytest.approx((distance > eps).mean(), abs=1e-12)


@pytest.fixture(scope="module")
def model():
    """A network that is right about most, but not all, and not robust."""
    return make_pipeline(StandardScaler(), small(max_epochs=20)).fit(X, y)


@pytest.fixture(scope="module")
def scorer():
    return RobustScorer(norm="linf", eps=0.2, n_steps=5)


def one_by_one(scorer, model, X, y):
    """Whether each sample stands, by a call for each: a slow oracle of every mean."""
    return np.array([scorer(model, X[[i]], y[[i]]) for i in range(len(X))])


# --- closed forms -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", DUAL_ORDER)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_samples_of_one_margin_stand_below_it_and_fall_above(norm, dtype):
    X, y, w = make_separated(40, 6, margin=0.5, norm=norm, random_state=0)
    X = X.astype(dtype)
    model = with_plane(X, y, w, dtype=dtype)
    score = robust_accuracy_score(model, X, y, norm=norm, eps=[0.49, 0.51])
    assert score == {"accuracy": 1, "robust_accuracy_eps0.49": 1, "robust_accuracy_eps0.51": 0}


@pytest.mark.parametrize("norm", DUAL_ORDER)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [None, [1.0, 0.1, 3.0, 10.0]])
def test_the_robust_accuracy_of_a_plane_is_the_closed_form(norm, dtype, scale):
    values = BINARY_X.astype(dtype)
    model = with_plane(values, BINARY_Y, np.array([-0.3, -0.5, 0.6, 0.8]), -1.2, dtype=dtype)
    distance = distances(model, BINARY_X, BINARY_Y, norm, 1.0 if scale is None else scale)
    assert 0.5 < (distance > 0).mean() < 1
    assert_closed_form(model, values, BINARY_Y, distance, norm=norm, feature_scale=scale)


@pytest.mark.parametrize("norm", DUAL_ORDER)
@pytest.mark.parametrize(
    ("scaler", "scale"),
    [
        (StandardScaler(), None),
        (StandardScaler(), [1.0, 0.1, 3.0, 10.0]),
        (MinMaxScaler((-1, 1)), "std"),
        (PCA(3, whiten=True), "range"),
        (make_pipeline(StandardScaler()), "std"),
    ],
    ids=["StandardScaler", "StandardScaler, array", "MinMaxScaler", "PCA", "nested"],
)
def test_behind_a_scaler_the_closed_form_holds_in_raw_units(norm, scale, scaler):
    model = make_pipeline(scaler, linear(max_epochs=20)).fit(BINARY_X, BINARY_Y)
    units = {"std": BINARY_X.std(0), "range": np.ptp(BINARY_X, axis=0)}
    unit = units[scale] if isinstance(scale, str) else scale
    distance = distances(model, BINARY_X, BINARY_Y, norm, 1.0 if unit is None else unit)
    assert (distance > 0).mean() > 0.8
    assert_closed_form(model, BINARY_X, BINARY_Y, distance, norm=norm, feature_scale=scale)


def test_inside_bounds_the_linf_closed_form_holds():
    model = make_pipeline(MinMaxScaler(), linear(max_epochs=20)).fit(BINARY_X, BINARY_Y)
    w, bias = plane_of(model, 4)
    low, high = bounds = BINARY_X.min(0), BINARY_X.max(0)
    sign = sides(model, BINARY_Y)
    room = np.where(np.outer(sign, w) > 0, BINARY_X - low, high - BINARY_X)
    radii = [0.2, 0.4, 0.6, 0.9, 1.2]
    worst = [sign * (BINARY_X @ w + bias) - np.minimum(room, eps) @ np.abs(w) for eps in radii]
    bounded, free = (
        robust_accuracy_score(model, BINARY_X, BINARY_Y, eps=radii, bounds=b)
        for b in (bounds, None)
    )
    wanted = [(margin > 0).mean() for margin in worst]
    assert list(bounded.values())[1:] == pytest.approx(wanted, abs=1e-12)
    assert sum(bounded.values()) > sum(free.values())


@pytest.mark.parametrize("norm", DUAL_ORDER)
@pytest.mark.parametrize("scale", ["std", "range"])
def test_a_feature_that_is_constant_in_the_data_is_held_fixed(norm, scale):
    values = np.column_stack([BINARY_X, np.full(len(BINARY_X), 2.0)])
    model = with_plane(values, BINARY_Y, np.array([-0.3, -0.5, 0.6, 0.8, 100.0]), -201.2)
    unit = values.std(0) if scale == "std" else np.ptp(values, axis=0)
    distance = distances(model, values, BINARY_Y, norm, unit)
    assert_closed_form(model, values, BINARY_Y, distance, norm=norm, feature_scale=scale)


@pytest.mark.parametrize(
    "attack", ["pgd", "fgsm", "strong", PGD(n_steps=20), PGD(loss="margin"), FGSM()]
)
def test_every_attack_finds_the_optimum_of_a_plane(attack, short_stages):
    model = linear(max_epochs=20).fit(BINARY_X, BINARY_Y)
    distance = distances(model, BINARY_X, BINARY_Y, "linf")
    assert_closed_form(model, BINARY_X, BINARY_Y, distance, attack=attack)


# --- what the figure is -------------------------------------------------------------------


@pytest.mark.parametrize("cls", [JacobianRegularizedClassifier, AdversarialClassifier])
@pytest.mark.parametrize("norm", DUAL_ORDER)
def test_without_a_perturbation_it_is_the_accuracy(cls, norm):
    model = small(cls, max_epochs=3).fit(X, y)
    assert robust_accuracy_score(model, X, y, norm=norm, eps=0) == model.score(X, y)
    scores = robust_accuracy_score(model, X, y, norm=norm, eps=[0.0])
    assert scores == {key: model.score(X, y) for key in ("accuracy", "robust_accuracy_eps0")}


@pytest.mark.parametrize("norm", DUAL_ORDER)
@pytest.mark.parametrize("attack", ["pgd", "fgsm"])
def test_it_does_not_rise_with_the_radius_and_comes_to_nothing(model, norm, attack):
    radii = [0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 20.0]
    scores = robust_accuracy_score(model, X, y, norm=norm, eps=radii, attack=attack)
    assert list(scores) == ["accuracy", *(f"robust_accuracy_eps{eps:g}" for eps in radii)]
    values = list(scores.values())
    assert values == sorted(values, reverse=True)
    assert values[0] == values[1] == model.score(X, y)
    assert len(set(values)) > 3
    assert values[-1] < 0.1


def test_keys_are_the_radii_as_they_are_typed(model):

    scores = RobustScorer(eps=np.linspace(0, 0.3, 4), n_steps=1)(model, X, y)
    names = ("0", "0.1", "0.2", "0.3")
    assert list(scores) == ["accuracy", *(f"robust_accuracy_eps{name}" for name in names)]


def test_several_radii_give_what_each_gives_or_less(model):
    radii = (0.05, 0.2, 0.4)
    together = robust_accuracy_score(model, X, y, eps=radii, n_steps=5)
    for eps in radii:
        alone = robust_accuracy_score(model, X, y, eps=eps, n_steps=5)
        assert together[f"robust_accuracy_eps{eps:g}"] <= alone
    # Nothing was kept from a smaller radius at the smallest.
    assert together["robust_accuracy_eps0.05"] == robust_accuracy_score(
        model, X, y, eps=0.05, n_steps=5
    )


@pytest.mark.parametrize("eps", [[0.4, 0.1, 0.2], (0.2, 0.1, 0.4), np.array([0.1, 0.4, 0.2])])
def test_the_order_and_the_kind_of_the_sequence_do_not_matter(model, eps):
    wanted = robust_accuracy_score(model, X, y, eps=[0.1, 0.2, 0.4], n_steps=5)
    assert robust_accuracy_score(model, X, y, eps=eps, n_steps=5) == wanted


def test_it_is_a_plain_float_or_a_dict_of_them(model):
    assert type(robust_accuracy_score(model, X, y, n_steps=2)) is float
    scores = robust_accuracy_score(model, X, y, eps=[0.1], n_steps=2)
    assert {type(value) for value in scores.values()} == {float}


def test_a_number_in_an_array_is_a_number(model, scorer):
    given = clone(scorer).set_params(eps=np.array(0.2), n_steps=np.array(5))
    assert given(model, X, y) == scorer(model, X, y)


@pytest.mark.parametrize("attack", ["pgd", PGD(n_restarts=4, n_steps=5)])
def test_more_restarts_do_not_raise_it(model, scorer, attack):
    params = {"n_restarts": 4} if attack == "pgd" else {"n_steps": 40, "attack": attack}
    several = clone(scorer).set_params(**params)
    assert several(model, X, y) <= scorer(model, X, y)


def test_the_function_is_the_scorer(model):
    parameters = inspect.signature(RobustScorer).parameters
    own = dict(inspect.signature(robust_accuracy_score).parameters)
    for name in ("estimator", "X", "y", "sample_weight"):
        del own[name]
    assert {n: p.default for n, p in own.items()} == {n: p.default for n, p in parameters.items()}
    given = {
        "norm": "l2",
        "average": "worst_class",
        "mutable": [0, 2, 3],
        "eps": [0.1, 0.3],
        "n_steps": 4,
        "step_size": 0.1,
        "n_restarts": 2,
        "feature_scale": "range",
        "bounds": (0, 9),
        "batch_size": 17,
        "random_state": 3,
    }
    weight = np.arange(len(X))
    scorer = RobustScorer(**given)
    wanted = scorer(model, X, y, sample_weight=weight)
    assert robust_accuracy_score(model, X, y, sample_weight=weight, **given) == wanted
    assert scorer.score(model, X, y, sample_weight=weight) == wanted


@pytest.fixture(scope="module")
def standing(scorer, model):
    return one_by_one(scorer, model, X, y)


# --- weights ------------------------------------------------------------------------------


def test_it_is_the_weighted_mean_over_the_samples(model, scorer, standing):
    weight = np.random.default_rng(0).uniform(size=len(X))
    assert 0.1 < standing.mean() < 0.9
    assert scorer(model, X, y) == pytest.approx(standing.mean())
    weighted = scorer(model, X, y, sample_weight=weight)
    assert weighted == pytest.approx(np.average(standing, weights=weight))


def test_a_weight_is_a_repetition(model):
    weight = np.random.default_rng(0).integers(0, 4, size=len(X))
    repeated = np.repeat(np.arange(len(X)), weight)
    scorer = RobustScorer(eps=[0.1, 0.3], n_steps=5)
    wanted = scorer(model, X[repeated], y[repeated])
    assert scorer(model, X, y, sample_weight=weight) == pytest.approx(wanted)


# --- averages over classes ----------------------------------------------------------------


def plain_average(standing, labels, weight, average):
    """What `average` says, spelled out."""
    accuracies = []
    for label in sorted(set(labels)):
        total = right = 0.0
        for one, own, w in zip(standing, labels, weight, strict=True):
            if own == label:
                total, right = total + w, right + w * one
        if total > 0:
            accuracies.append(right / total)
    accuracies.sort()
    if average == "mean":
        return sum(w * one for w, one in zip(weight, standing, strict=True)) / sum(weight)
    if average == "worst_class":
        return accuracies[0]
    if average == "disparity":
        return np.nan if len(accuracies) == 1 else accuracies[0] - accuracies[-1]
    n_worst = -(-3 * len(accuracies) // 10)  # 30 %, rounded up
    return sum(accuracies[:n_worst]) / n_worst


AVERAGES = ["mean", "worst_class", "tail30", "disparity"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_over_classes_is_what_it_says(model, scorer, standing, average, weighted):
    weight = np.random.default_rng(1).uniform(size=len(X)) if weighted else np.ones(len(X))
    given = weight if weighted else None
    score = clone(scorer).set_params(average=average)(model, X, y, sample_weight=given)
    assert type(score) is float
    assert score == pytest.approx(plain_average(standing, y, weight, average), abs=1e-12)


@pytest.mark.parametrize("n_classes", [1, 2, 3, 4, 7, 10, 20])
@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_is_right_for_any_number_of_classes(average, n_classes):
    rng = np.random.default_rng(n_classes)
    labels = np.concatenate([np.arange(n_classes), rng.integers(n_classes, size=100)])
    right = rng.random(len(labels)) < (labels + 1) / (n_classes + 1)
    weight = rng.uniform(size=len(labels))
    wanted = plain_average(right, labels, weight, average)
    assert average_accuracy(right, labels, weight, average) == pytest.approx(
        wanted, abs=1e-12, nan_ok=True
    )


@pytest.mark.parametrize("average", AVERAGES)
def test_classes_that_do_not_occur_or_weigh_nothing_do_not_count(model, scorer, standing, average):
    scorer = clone(scorer).set_params(average=average)
    two = y != 2
    wanted = plain_average(standing[two], y[two], np.ones(two.sum()), average)
    assert scorer(model, X[two], y[two]) == pytest.approx(wanted)
    assert scorer(model, X, y, sample_weight=two.astype(float)) == pytest.approx(wanted)


def test_the_averages_are_in_order(model):
    scores = {
        average: robust_accuracy_score(model, X, y, eps=[0, 0.1, 0.2], average=average, n_steps=5)
        for average in AVERAGES
    }
    for key in scores["mean"]:
        worst, tail, disparity = (
            scores[kind][f"{kind}_{key}"] for kind in ("worst_class", "tail30", "disparity")
        )
        assert worst <= tail <= scores["mean"][key]
        assert -1 <= disparity <= 0
    by_class = [(model.predict(X) == y)[y == k].mean() for k in range(3)]
    assert scores["worst_class"]["worst_class_accuracy"] == pytest.approx(min(by_class))
    assert scores["disparity"]["disparity_accuracy"] == pytest.approx(min(by_class) - max(by_class))


def test_of_a_single_class_there_is_no_disparity(model):
    score = robust_accuracy_score(model, X[y == 1], y[y == 1], average="disparity", n_steps=2)
    assert np.isnan(score)


def test_a_search_may_choose_the_average(scorer):
    scoring = {a: clone(scorer).set_params(average=a) for a in ("mean", "worst_class")}
    search = searched(scoring=scoring, refit="worst_class")
    worst = search.cv_results_["mean_test_worst_class"]
    assert search.best_index_ == worst.argmax()
    assert (worst <= search.cv_results_["mean_test_mean"]).all()


# --- features that may change -------------------------------------------------------------


@pytest.mark.parametrize("norm", DUAL_ORDER)
@pytest.mark.parametrize("scale", [None, [1.0, 0.1, 3.0, 10.0]])
@pytest.mark.parametrize(
    "mutable",
    [[0, 3], np.array([0, -1]), [True, False, False, True], np.array([1, 0, 0, 1], bool)],
    ids=["indices", "from the end", "mask", "array"],
)
def test_only_mutable_features_count_in_the_closed_form(norm, scale, mutable):
    model = with_plane(BINARY_X, BINARY_Y, np.array([-0.3, -0.5, 0.6, 0.8]), -1.2)
    unit = np.array([1.0, 0, 0, 1.0]) * (1.0 if scale is None else scale)
    distance = distances(model, BINARY_X, BINARY_Y, norm, unit)
    params = {"norm": norm, "feature_scale": scale, "mutable": mutable}
    assert_closed_form(model, BINARY_X, BINARY_Y, distance, **params)


@pytest.mark.parametrize("names", [["petal", "sepal"], ("sepal", "petal"), "petal"])
def test_mutable_features_may_be_given_by_the_names_of_columns(scorer, names):
    columns = ["sepal", "width", "length", "petal"]
    frame = pd.DataFrame(X, columns=columns)
    model = small(max_epochs=20).fit(frame, y)
    index = [columns.index(name) for name in ([names] if isinstance(names, str) else names)]
    by_name, by_place = (clone(scorer).set_params(mutable=m) for m in (names, index))
    assert by_name(model, frame, y) == by_place(model, frame, y)
    assert by_place(model, frame, y) > scorer(model, frame, y)
    with pytest.raises(ValueError, match=r"'petl' is none \(did you mean 'petal'\?\)"):
        clone(scorer).set_params(mutable=["petl"])(model, frame, y)


# --- black boxes and the strong attack ----------------------------------------------------


@pytest.mark.parametrize("norm", others_slow(DUAL_ORDER, ["linf", "l1"]))
def test_strong_fools_whom_the_quick_attacks_fool(model, norm, short_stages):
    params = {"norm": norm, "eps": [0.1, 0.3], "bounds": (0, 8), "feature_scale": "std"}
    strong = robust_accuracy_score(model, X, y, attack="strong", **params)
    for attack in ("pgd", "fgsm", Square(n_queries=100)):
        weaker = robust_accuracy_score(model, X, y, attack=attack, **params)
        assert all(strong[key] <= weaker[key] for key in strong)


@pytest.mark.parametrize("attack", [Square(n_queries=60), RayS(n_queries=200)], ids=repr)
@pytest.mark.parametrize("data_frame", [False, True])
def test_a_stump_is_attacked_as_a_black_box(attack, data_frame):
    values = pd.DataFrame(BINARY_X, columns=list("abcd")) if data_frame else BINARY_X
    stump = DecisionTreeClassifier(max_depth=1, random_state=0).fit(values, BINARY_Y)
    feature, threshold = stump.tree_.feature[0], stump.tree_.threshold[0]
    far = np.abs(BINARY_X[:, feature] - threshold) > 0.33
    wanted = (far & (stump.predict(values) == BINARY_Y)).mean()
    assert 0.2 < wanted < 0.8
    assert robust_accuracy_score(stump, values, BINARY_Y, eps=0.33, attack=attack) == wanted


def test_strong_on_a_black_box_says_that_it_is_weaker(short_stages):
    stump = Opaque(DecisionTreeClassifier(max_depth=1, random_state=0)).fit(BINARY_X, BINARY_Y)
    square = robust_accuracy_score(
        stump, BINARY_X, BINARY_Y, eps=0.33, attack=Square(n_queries=100)
    )
    with pytest.warns(AttackWarning, match="weaker than a gradient attack"):
        score = robust_accuracy_score(stump, BINARY_X, BINARY_Y, eps=0.33, attack="strong")
    assert score == square


@pytest.mark.parametrize("attack", ["pgd", "fgsm", PGD(), FGSM()])
def test_a_gradient_attack_on_a_tree_is_rejected(attack):
    tree = DecisionTreeClassifier().fit(X, y)
    with pytest.raises(NotDifferentiableError, match="type DecisionTreeClassifier"):
        robust_accuracy_score(tree, X, y, attack=attack)


def test_a_search_over_black_boxes_may_be_scored():
    search = GridSearchCV(
        KNeighborsClassifier(),
        {"n_neighbors": [1, 9]},
        scoring=RobustScorer(attack=Square(n_queries=20), eps=0.3),
        cv=CV,
    ).fit(X, y)
    assert 0 < search.best_score_ < 1


def test_lines_are_printed_only_if_asked_for(model, scorer, capsys):
    wanted = scorer(model, X, y)
    assert capsys.readouterr().out == ""
    assert clone(scorer).set_params(verbose=True, batch_size=30)(model, X, y) == wanted
    lines = capsys.readouterr().out.splitlines()
    n_right = int((model.predict(X) == y).sum())
    assert len(lines) == -(-n_right // 30)
    assert lines[-1].startswith(f"[PGD, linf eps=0.2] {n_right} of {n_right} samples, ")


# --- inputs -------------------------------------------------------------------------------


def test_labels_may_be_strings(scorer):
    by_number, by_name = small().fit(X, y), small().fit(X, NAMES)
    assert scorer(by_name, X, NAMES) == scorer(by_number, X, y) > 0


@pytest.mark.parametrize("labels", [y, NAMES])
def test_a_label_that_the_estimator_has_not_seen_counts_as_wrong(scorer, labels):
    model = small().fit(X, labels)
    unseen = labels.astype(object if labels is NAMES else int)
    unseen[::3] = "unknown" if labels is NAMES else 17
    wanted = one_by_one(scorer, model, X, labels)
    wanted[::3] = 0
    given = unseen.astype(str) if labels is NAMES else unseen
    assert scorer(model, X, given) == pytest.approx(wanted.mean())


def test_data_frames_keep_their_names(scorer):
    frame = pd.DataFrame(X, columns=list("abcd"), index=np.arange(len(X))[::-1])
    by_name = make_pipeline(StandardScaler(), small()).fit(frame, pd.Series(NAMES))
    by_place = make_pipeline(StandardScaler(), small()).fit(X, NAMES)
    assert scorer(by_name, frame, pd.Series(NAMES)) == scorer(by_place, X, NAMES)


@pytest.mark.parametrize(
    "change",
    [
        lambda X: X.tolist(),
        np.asfortranarray,
        lambda X: np.repeat(X, 2, axis=1)[:, ::2],
        lambda X: pd.DataFrame(X).astype({0: "float32"}),
    ],
    ids=["list", "fortran", "strided", "mixed frame"],
)
def test_it_does_not_depend_on_how_the_samples_are_held(scorer, change):
    # Exact in float32 too.
    values = np.round(X * 64) / 64
    model = small().fit(values, y)
    assert scorer(model, change(values), y) == scorer(model, values, y)


def test_the_samples_are_neither_changed_nor_need_to_be_writeable(model, scorer):
    values = X.copy()
    values.flags.writeable = False
    assert scorer(model, values, y) == scorer(model, X, y)


def test_images_are_scored_in_their_shape():
    digits, labels = load_digits(n_class=3, return_X_y=True)
    digits, labels = digits[:80].reshape(-1, 1, 8, 8), labels[:80]
    model = JacobianRegularizedClassifier(
        "cnn", module__channels=(4,), module__hidden_units=(), max_epochs=5, random_state=0
    ).fit(digits, labels)
    params = {"eps": [0, 0.5, 2, 6], "n_steps": 5}
    scores = robust_accuracy_score(model, digits, labels, bounds=(0, 16), **params)
    values = list(scores.values())
    assert values == sorted(values, reverse=True)
    assert values[0] == model.score(digits, labels) > values[-1]
    # One value per feature, flat or in shape.
    for scale in (np.full(64, 2.0), np.full((1, 8, 8), 2.0)):
        scaled = robust_accuracy_score(
            model,
            digits,
            labels,
            eps=[0, 0.25, 1, 3],
            n_steps=5,
            feature_scale=scale,
            bounds=(np.zeros(64), np.full(64, 16.0)),
        )
        assert list(scaled.values()) == values


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("model_dtype", ["float32", "float64"])
def test_data_and_network_may_have_either_precision(dtype, model_dtype):
    model = make_pipeline(StandardScaler(), small(dtype=model_dtype)).fit(X, y)
    scores = robust_accuracy_score(model, X.astype(dtype), y, eps=[0.1, 0.3], n_steps=5)
    exact = robust_accuracy_score(model, X, y, eps=[0.1, 0.3], n_steps=5)
    assert scores == pytest.approx(exact, abs=1.5 / len(X))


def test_a_bare_skorch_net_is_scored():
    torch.manual_seed(0)
    values = X.astype(np.float32)
    net = NeuralNetClassifier(
        LinearNet,
        module__n_features=4,
        module__n_classes=3,
        criterion=nn.CrossEntropyLoss,
        train_split=None,
        verbose=0,
        max_epochs=10,
        lr=0.1,
    )
    net.fit(values, y)
    scores = robust_accuracy_score(net, values, y, eps=[0.1, 5.0], n_steps=5)
    assert scores["accuracy"] == net.score(values, y) > scores["robust_accuracy_eps5"]


@pytest.mark.parametrize(
    "wrap", [FrozenEstimator, lambda m: GridSearchCV(m, {}, cv=2)], ids=["frozen", "search"]
)
def test_a_wrapped_estimator_scores_as_the_estimator_itself(scorer, wrap):
    model = small().fit(X, y)
    assert scorer(wrap(model).fit(X, y), X, y) == scorer(model, X, y)


# --- independence -------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 10_000])
@pytest.mark.parametrize(
    "params",
    [{}, {"norm": "l2", "eps": 0.3}, {"n_restarts": 3, "n_steps": 3}, {"feature_scale": "std"}],
    ids=str,
)
def test_it_does_not_depend_on_the_batch_size(model, scorer, batch_size, params):
    scorer = clone(scorer).set_params(**params)
    batched = clone(scorer).set_params(batch_size=batch_size)
    assert batched(model, X[::3], y[::3]) == scorer(model, X[::3], y[::3])


@pytest.mark.parametrize(
    ("scale", "values"), [("std", X.std(0)), ("range", np.ptp(X, axis=0))], ids=["std", "range"]
)
def test_units_of_the_data_are_those_of_all_of_it(model, scale, values):
    params = {"eps": [0.1, 0.3], "n_steps": 5, "batch_size": 10}
    by_name = robust_accuracy_score(model, X, y, feature_scale=scale, **params)
    assert by_name == robust_accuracy_score(model, X, y, feature_scale=values, **params)


@pytest.mark.parametrize("seed", [0, 1, np.int64(3)])
def test_the_same_seed_gives_the_same_result(model, seed):
    def score(random_state):
        scorer = RobustScorer(eps=[0.1, 0.2, 0.3], n_steps=1, random_state=random_state)
        return scorer(model, X, y)

    assert score(seed) == score(seed)
    assert score(np.random.RandomState(seed)) == score(np.random.RandomState(seed))


def global_states():
    return str(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()  # noqa: NPY002


@pytest.mark.parametrize("random_state", [None, 0])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_global_random_states_are_left_alone(random_state, dropout):
    model = small(module__dropout=dropout).fit(X, y)
    before = global_states()
    score = robust_accuracy_score(model, X, y, n_steps=3, random_state=random_state)
    assert 0 <= score <= 1
    assert global_states() == before


class Wrapped(BaseEstimator):
    """A classifier that never touches the modes of its module."""

    def __init__(self, module=None):
        self.module = module
        self.classes_ = np.arange(2)

    def logits(self, X):
        return self.module(torch.from_numpy(X)).detach().numpy()

    def predict(self, X):
        return self.logits(X).argmax(1)

    def fit(self, X, y):
        return self


class Quantizing(Wrapped):
    """Its predict rounds the features, so that small perturbations do nothing."""

    def predict(self, X):
        return self.logits(np.round(X)).argmax(1)


class Refusing(Wrapped):
    """Its predict may not be called."""

    def predict(self, X):
        raise AssertionError("predict was called")


@as_torch.register
def _(model: Wrapped):
    return model.module


def wrapped(cls):
    linear = nn.Linear(2, 2).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        linear.bias.copy_(torch.tensor([0.0, -0.5]))
    return cls(nn.Sequential(linear, nn.Identity()))


CORNERS = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
CORNERS_Y = np.array([0, 0, 1, 1])


class Tent(nn.Module):
    """Puts the second class only where the first feature is within 0.05 of 0.2."""

    def forward(self, X):
        tent = 0.5 - 10 * (X[:, 0] - 0.2).abs()
        return torch.stack([torch.zeros_like(tent), tent], dim=1)


@pytest.mark.usefixtures("brief_stages")
@pytest.mark.filterwarnings("ignore::skjacobian.exceptions.AttackWarning")
@pytest.mark.parametrize("weight", [None, np.linspace(0, 1, len(y))], ids=["", "weighted"])
@pytest.mark.parametrize("attack", ["pgd", "fgsm", "strong", PGD(n_steps=5)], ids=str)
def test_the_report_of_a_scorer_is_of_its_figure(model, attack, weight):
    scorer = RobustScorer(norm="l2", eps=0.4, attack=attack, feature_scale="std", random_state=3)
    report = scorer.report(model, X, y, weight)
    assert report.robust_accuracy == pytest.approx(scorer(model, X, y, weight), abs=1e-12)
    assert report.accuracy == pytest.approx(model.score(X, y, weight), abs=1e-12)
    assert (report.norm, report.eps) == ("l2", 0.4)
    assert ("weak attack" in [flag.name for flag in report.raised]) == (attack != "strong")


def test_a_scorer_of_several_radii_has_a_report_for_each(model, brief_stages):
    scorer = RobustScorer(eps=[0.4, 0.1], attack="strong")
    reports, scores = scorer.report(model, X, y), scorer(model, X, y)
    assert list(reports) == ["robust_accuracy_eps0.4", "robust_accuracy_eps0.1"]
    assert {key: report.robust_accuracy for key, report in reports.items()} == {
        key: scores[key] for key in reports
    }


def test_a_report_is_refused_for_what_the_score_is_refused(model):
    scorer = RobustScorer(attack=PGD(eps=0.3))
    with pytest.raises(ValueError, match=r"threat model is not the attack's. Set RobustScorer"):
        scorer.report(model, X, y)


def test_what_fools_at_a_smaller_radius_counts_at_the_larger():
    model = Wrapped(Tent())
    params = {"X": np.zeros((3, 2)), "y": np.zeros(3, dtype=int), "attack": "fgsm"}
    # The single step of FGSM oversteps the second class.
    assert robust_accuracy_score(model, eps=0.5, **params) == 1
    scores = robust_accuracy_score(model, eps=[0.5, 0.2, 0.01], **params)
    assert scores["robust_accuracy_eps0.01"] == 1
    assert scores["robust_accuracy_eps0.2"] == scores["robust_accuracy_eps0.5"] == 0


class Remembering(Wrapped):
    """Keeps the frames that its predict is given."""

    def predict(self, X):
        self.frames = [*getattr(self, "frames", []), X]
        return super().predict(X.to_numpy(copy=True))


def test_perturbed_rows_of_a_data_frame_keep_their_place_in_the_index():
    model = wrapped(Remembering)
    frame = pd.DataFrame(CORNERS.copy(), index=list("pqrs"), columns=["u", "v"])
    frame.loc["q", "u"] = 9.0
    robust_accuracy_score(model, frame, CORNERS_Y, eps=0.1, n_steps=2)
    clean, perturbed = model.frames
    assert clean is frame
    # The second is wrong from the start.
    assert (list(perturbed.index), list(perturbed.columns)) == (["p", "r", "s"], ["u", "v"])
    assert 0 < np.abs(perturbed - frame.loc[perturbed.index]).to_numpy().max() <= 0.1


class Watching(nn.Linear):
    """Notes whether it trains and its weights are free, when it is asked for gradients."""

    def forward(self, X):
        if X.requires_grad:
            self.seen = getattr(self, "seen", set()) | {(self.training, self.weight.requires_grad)}
        return super().forward(X)


def test_a_module_is_attacked_in_eval_mode_with_its_weights_frozen():
    model = Wrapped(Watching(2, 2).double().train())
    robust_accuracy_score(model, CORNERS, model.predict(CORNERS), n_steps=2)
    assert model.module.seen == {(False, False)}
    assert (model.module.training, model.module.weight.requires_grad) == (True, True)


def test_modes_and_frozen_weights_of_a_module_are_as_before():
    model = wrapped(Wrapped)
    model.module.train()
    model.module[1].eval()
    model.module[0].bias.requires_grad_(False)
    robust_accuracy_score(model, CORNERS, CORNERS_Y, eps=0.6, n_steps=3)
    assert [part.training for part in model.module.modules()] == [True, True, False]
    assert model.module[0].weight.requires_grad
    assert not model.module[0].bias.requires_grad
    assert model.module[0].weight.grad is None


def test_scoring_under_no_grad_finds_the_same():
    model = wrapped(Wrapped)
    with torch.no_grad():
        assert robust_accuracy_score(model, CORNERS, CORNERS_Y, eps=0.6) == 0


# --- scikit-learn -------------------------------------------------------------------------

GRID = {"lam": [0.0, 0.1], "norm": ["l2", "l1"]}


def searched(**params):
    return GridSearchCV(small(max_epochs=3), GRID, cv=CV, **params).fit(X, y)


def test_a_search_may_refit_on_one_of_several_scorers(scorer):
    search = searched(scoring={"accuracy": "accuracy", "robust": scorer}, refit="robust")
    robust = search.cv_results_["mean_test_robust"]
    assert search.best_index_ == robust.argmax()
    assert search.best_score_ == robust.max()
    assert (robust <= search.cv_results_["mean_test_accuracy"]).all()
    assert 0 <= scorer(search, X, y) <= search.best_estimator_.score(X, y)


def test_a_search_takes_the_dict_of_several_radii():
    search = searched(
        scoring=RobustScorer(eps=[0.1, 0.3], n_steps=5), refit="robust_accuracy_eps0.1"
    )
    results = search.cv_results_
    assert search.best_index_ == results["mean_test_robust_accuracy_eps0.1"].argmax()
    for low, high in (
        ("accuracy", "robust_accuracy_eps0.1"),
        ("robust_accuracy_eps0.1", "robust_accuracy_eps0.3"),
    ):
        assert (results[f"mean_test_{high}"] <= results[f"mean_test_{low}"]).all()


def test_what_compares_by_one_number_takes_one_radius():
    params = {"param_grid": GRID, "cv": CV, "random_state": 0}
    one = RobustScorer(eps=0.3, n_steps=5)
    search = HalvingGridSearchCV(small(max_epochs=3), scoring=one, **params).fit(X, y)
    assert search.best_score_ == search.cv_results_["mean_test_score"][search.best_index_]
    several = RobustScorer(eps=[0.1, 0.3], n_steps=5)
    assert several(search, X, y)["robust_accuracy_eps0.3"] <= search.score(X, y)
    with pytest.raises(ValueError, match=r"scoring must return a number, got .'accuracy'"):
        cross_val_score(small(max_epochs=3), X, y, scoring=several, cv=CV, error_score="raise")


def test_cross_validation_scores_each_fold(scorer):
    pipeline = make_pipeline(StandardScaler(), small(max_epochs=3))
    manual = [
        scorer(clone(pipeline).fit(X[train], y[train]), X[test], y[test])
        for train, test in CV.split(X, y)
    ]
    np.testing.assert_array_equal(cross_val_score(pipeline, X, y, scoring=scorer, cv=CV), manual)
    several = RobustScorer(eps=[0.2, 0.4], n_steps=5)
    scores = cross_validate(pipeline, X, y, scoring=several, cv=CV, return_train_score=True)
    np.testing.assert_array_equal(scores["test_robust_accuracy_eps0.2"], manual)
    assert {"test_accuracy", "train_accuracy", "train_robust_accuracy_eps0.4"} <= set(scores)


@pytest.mark.parametrize("several", [False, True])
def test_a_search_that_is_given_weights_weights_its_scores(scorer, several):
    weight = np.random.default_rng(0).uniform(size=len(X))
    scoring = {"robust": scorer, "accuracy": "accuracy"} if several else scorer
    search = GridSearchCV(small(max_epochs=3), {"lam": [0.1]}, scoring=scoring, cv=CV, refit=False)
    results = search.fit(X, y, sample_weight=weight).cv_results_
    model = small(max_epochs=3, lam=0.1)
    for fold, (train, test) in enumerate(CV.split(X, y)):
        fitted = clone(model).fit(X[train], y[train], sample_weight=weight[train])
        score = results[f"split{fold}_test_{'robust' if several else 'score'}"][0]
        assert score == scorer(fitted, X[test], y[test], sample_weight=weight[test])


@pytest.mark.parametrize("several", [False, True])
def test_routed_weights_reach_the_scorer(scorer, several):
    weight = np.random.default_rng(0).uniform(size=len(X))
    model = small(max_epochs=3)
    with sklearn.config_context(enable_metadata_routing=True):
        routed = clone(scorer).set_score_request(sample_weight=True)
        result = cross_validate(
            model.set_fit_request(sample_weight=False),
            X,
            y,
            cv=CV,
            return_estimator=True,
            scoring={"score": routed} if several else routed,
            params={"sample_weight": weight},
        )
    for (_, test), fitted, score in zip(
        CV.split(X, y), result["estimator"], result["test_score"], strict=True
    ):
        assert score == scorer(fitted, X[test], y[test], sample_weight=weight[test])
        assert score != scorer(fitted, X[test], y[test])


def test_without_a_request_routed_weights_stay_away_from_the_scorer(scorer):
    weight = np.random.default_rng(0).uniform(size=len(X))
    with sklearn.config_context(enable_metadata_routing=True):
        model = small(max_epochs=2).set_fit_request(sample_weight=True)
        unweighted = clone(scorer).set_score_request(sample_weight=False)
        result = cross_validate(
            model,
            X,
            y,
            cv=CV,
            scoring=unweighted,
            params={"sample_weight": weight},
            return_estimator=True,
        )
    for (_, test), fitted, score in zip(
        CV.split(X, y), result["estimator"], result["test_score"], strict=True
    ):
        assert score == scorer(fitted, X[test], y[test])


SCORERS = [
    RobustScorer(),
    RobustScorer(norm="l2", eps=[0.1, 0.2], bounds=(0, 1), feature_scale="std"),
    RobustScorer(attack=PGD(n_steps=7, loss="margin"), eps=0.3),
    RobustScorer(attack="strong", average="tail30", mutable=[0, 2], verbose=True),
]


@pytest.mark.parametrize("scorer", SCORERS, ids=repr)
def test_a_scorer_clones_and_pickles_and_its_repr_makes_it_anew(scorer):
    evaluated = eval(repr(scorer))
    for other in (clone(scorer), pickle.loads(pickle.dumps(scorer)), evaluated):
        assert repr(other.get_params()) == repr(scorer.get_params())
        assert other is not scorer


def test_parameters_of_an_attack_object_can_be_set_from_outside():
    scorer = RobustScorer(attack=PGD(n_steps=5))
    assert scorer.get_params()["attack__n_steps"] == 5
    assert scorer.set_params(attack__n_steps=3, eps=0.2).attack.n_steps == 3


def test_scoring_leaves_the_attack_object_alone(model):
    attack = PGD(n_steps=3)
    before = repr(attack.get_params())
    RobustScorer(attack=attack, norm="l2", eps=[0.1, 0.2], bounds=(0, 9))(model, X, y)
    assert repr(attack.get_params()) == before


@pytest.mark.usefixtures("figures_are_closed")
@pytest.mark.parametrize(
    ("average", "name"),
    [("mean", "Robust accuracy"), ("worst_class", "Worst class robust accuracy")],
)
def test_curves_of_scikit_learn_are_labelled_by_the_scorer(average, name):
    scorer = RobustScorer(eps=0.1, n_steps=2, average=average)
    model, params = LogisticRegression(max_iter=1000), {"cv": CV, "scoring": scorer}
    drawn = LearningCurveDisplay.from_estimator(model, X, y, train_sizes=[0.5, 1.0], **params)
    assert drawn.ax_.get_ylabel() == name
    drawn = ValidationCurveDisplay.from_estimator(
        model, X, y, param_name="C", param_range=[0.1, 1], negate_score=True, **params
    )
    assert drawn.ax_.get_ylabel() == f"Negative {name.lower()}"
    assert RobustScorer.__name__ == "RobustScorer"


# --- attack objects -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "params"),
    [
        (PGD(n_steps=5, n_restarts="auto"), {"n_steps": 5}),
        (PGD(n_steps=5, step_size=0.1), {"n_steps": 5, "step_size": 0.1, "n_restarts": 1}),
        (PGD(n_steps=2, n_restarts=3), {"n_steps": 2, "n_restarts": 3}),
        (FGSM(), {"attack": "fgsm"}),
    ],
    ids=repr,
)
@pytest.mark.parametrize("norm", DUAL_ORDER)
def test_an_attack_object_does_what_its_name_and_parameters_do(model, attack, params, norm):
    threat = {"norm": norm, "eps": [0.1, 0.3], "bounds": (0, 9), "feature_scale": "std"}
    by_object = robust_accuracy_score(model, X, y, attack=attack, **threat)
    assert by_object == robust_accuracy_score(model, X, y, **params, **threat)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm", "l2"),
        ("eps", 0.3),
        ("eps", torch.tensor([0.1, 0.2])),
        ("bounds", (0, 1)),
        ("bounds", (np.zeros(4), np.full(4, 9.0))),
        ("feature_scale", "std"),
        ("feature_scale", [1.0, 2.0, 3.0, 4.0]),
        ("feature_scale", np.ones(4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [PGD, FGSM])
def test_a_threat_model_in_the_attack_object_is_a_conflict(model, cls, name, value):
    scorer = RobustScorer(attack=cls(**{name: value}))
    with pytest.raises(ValueError, match=rf"expected its {name} to be left alone.*RobustScorer"):
        scorer(model, X, y)


@pytest.mark.parametrize(("name", "value"), [("n_steps", 5), ("step_size", 0.1), ("n_restarts", 2)])
def test_the_search_of_an_attack_object_is_set_on_the_object(model, name, value):
    scorer = RobustScorer(attack=PGD(), **{name: value})
    match = rf"Got {name}={value} and attack=PGD\(\).*object: attack=PGD\({name}=\.\.\.\)"
    with pytest.raises(ValueError, match=match):
        scorer(model, X, y)


@pytest.mark.parametrize("attack", ["strong", "fgsm"])
@pytest.mark.parametrize(("name", "value"), [("n_steps", 5), ("step_size", 0.1), ("n_restarts", 2)])
def test_the_search_of_pgd_is_no_parameter_of_other_attacks(model, attack, name, value):
    scorer = RobustScorer(attack=attack, **{name: value})
    match = f"Got {name}={value} and attack='{attack}', but expected {name} to be left alone"
    with pytest.raises(ValueError, match=match):
        scorer(model, X, y)


# --- errors -------------------------------------------------------------------------------

BAD_PARAMS = [
    ({"eps": -1}, "Got eps=-1, but expected a non-negative finite number"),
    ({"eps": np.nan}, "Got eps=nan, but expected a non-negative finite number"),
    ({"eps": np.inf}, "Got eps=inf, but expected a non-negative finite number"),
    ({"eps": "0.1"}, "Got eps='0.1', but expected a non-negative"),
    ({"eps": None}, "Got eps=None, but expected a non-negative"),
    ({"eps": True}, "Got eps=True, but expected a non-negative"),
    ({"eps": []}, r"Got eps=\[\], but expected at least one radius"),
    ({"eps": [[0.1, 0.2], [0.3]]}, r"Got eps=\[0.1, 0.2\], but expected a non-negative"),
    ({"eps": [0.1, -2]}, "Got eps=-2, but expected a non-negative"),
    ({"norm": "l3"}, "Got norm='l3', but expected one of 'l2', 'linf', 'l1'"),
    ({"norm": "inf"}, "Got norm='inf', .*did you mean 'linf'"),
    ({"attack": "pdg"}, "Got attack='pdg', but expected one of 'pgd', 'fgsm'.*mean 'pgd'"),
    ({"attack": PGD}, "Got attack=.*PGD.*, but expected one of 'pgd', 'fgsm'"),
    ({"average": "worst"}, "Got average='worst', but expected one of 'mean', 'worst_class', "),
    ({"average": "worst_clas"}, r"Got average='worst_clas', .*did you mean 'worst_class'"),
    ({"average": None}, "Got average=None, but expected one of 'mean', 'worst_class', 'tail30'"),
    ({"mutable": [2]}, r"Got mutable=\[2\], but expected columns of X: .*; 2 is none"),
    ({"mutable": [True] * 3}, r"Got mutable=.*a boolean mask of shape \(2,\)"),
    ({"mutable": ["u"]}, r"Got mutable=\['u'\].*names need a DataFrame"),
    ({"attack": Square(n_queries=0)}, "Got n_queries=0, but expected an integer of at least 1"),
    ({"n_steps": 0}, "Got n_steps=0, but expected an integer of at least 1"),
    ({"n_steps": 2.5}, r"Got n_steps=2\.5, but expected an integer"),
    ({"n_restarts": 0}, "Got n_restarts=0, but expected an integer of at least 1"),
    ({"step_size": 0}, "Got step_size=0, but expected a positive finite number"),
    ({"batch_size": 0}, "Got batch_size=0, but expected an integer of at least 1"),
    ({"batch_size": "big"}, "Got batch_size='big', but expected an integer"),
    ({"bounds": (0, 1, 2)}, r"Got bounds=\(0, 1, 2\), but expected None or a tuple"),
    ({"bounds": (1, 0)}, r"Got bounds=\(1, 0\), but expected None or a tuple"),
    ({"bounds": 1}, "Got bounds=1, but expected None or a tuple"),
    ({"bounds": ([0, 0, 0], 9)}, "Got bounds with 3 values, .* each of the 2 features"),
    ({"bounds": (0.0, 0.5)}, r"3 of 4 samples outside bounds=\(0\.0, 0\.5\), by up to 0\.5"),
    ({"bounds": (0.0, "high")}, "Got bounds='high', but expected numbers"),
    ({"feature_scale": "sdt"}, "Got feature_scale='sdt', .*did you mean 'std'"),
    ({"feature_scale": 0.0}, r"Got feature_scale=0\.0, but expected positive finite numbers"),
    ({"feature_scale": [1.0, 0.0]}, r"feature_scale=\[1\.0, 0\.0\], but expected positive"),
    ({"feature_scale": [1.0, np.nan]}, r"feature_scale=.*nan.*, but expected positive"),
    ({"feature_scale": [1.0, 1.0, 1.0]}, "feature_scale with 3 values, .* of the 2 features"),
    ({"attack": PGD(n_steps=0)}, "Got n_steps=0, but expected an integer of at least 1"),
    ({"attack": FGSM(loss="marginn")}, "Got loss='marginn', .*did you mean 'margin'"),
]


@pytest.mark.parametrize(("params", "match"), BAD_PARAMS, ids=[str(p) for p, _ in BAD_PARAMS])
def test_a_bad_parameter_is_named_before_anything_is_computed(params, match):
    scorer = RobustScorer(**params)
    with pytest.raises(ValueError, match=match):
        scorer(wrapped(Refusing), CORNERS, CORNERS_Y)


@pytest.mark.parametrize(
    ("params", "match"),
    [({"feature_scale": [1.0, 0.0]}, "feature_scale"), ({"attack": PGD(n_steps=0)}, "n_steps")],
)
def test_a_bad_parameter_is_named_also_where_nothing_is_to_be_attacked(params, match):
    with pytest.raises(ValueError, match=f"Got {match}"):
        robust_accuracy_score(wrapped(Wrapped), CORNERS, CORNERS_Y, eps=0.0, **params)


@pytest.mark.parametrize(
    ("X", "y", "weight", "match"),
    [
        (CORNERS + np.inf, CORNERS_Y, None, r"Input.* contains infinity"),
        (CORNERS, CORNERS_Y[:3], None, r"inconsistent numbers of samples: \[4, 3\]"),
        (CORNERS[:0], CORNERS_Y[:0], None, r"Found array with 0 sample\(s\)"),
        (CORNERS, np.column_stack([CORNERS_Y] * 2), None, "y should be a 1d array"),
        (CORNERS, CORNERS_Y, [1.0, 2.0], r"sample_weight\.shape == \(2,\), expected \(4,\)"),
        (CORNERS, CORNERS_Y, [1.0, 2.0, 3.0, -1.0], "Negative values in .* `sample_weight`"),
        (CORNERS, CORNERS_Y, np.nan, "Got sample_weight from nan to nan, but expected finite"),
    ],
    ids=["infinity", "lengths", "empty", "2-d y", "weights", "negative", "nan"],
)
def test_bad_data_is_rejected_before_anything_is_computed(X, y, weight, match):
    with pytest.raises(ValueError, match=match):
        robust_accuracy_score(wrapped(Refusing), X, y, sample_weight=weight)


def test_an_estimator_without_a_view_is_rejected(scorer):
    model = KNeighborsClassifier().fit(X, y)
    with pytest.raises(NotDifferentiableError, match="type KNeighborsClassifier"):
        scorer(model, X, y)


def test_an_unfitted_estimator_is_rejected(scorer):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        scorer(make_pipeline(StandardScaler(), small()), X, y)


# --- suspicious evaluations ---------------------------------------------------------------


def test_a_predict_that_withstands_what_fools_the_view_is_warned_of():
    model = wrapped(Quantizing)
    model.module[0].bias.data[1] = -0.2  # The view falls 0.2 from 0; predict at 0.5.
    with pytest.warns(AttackWarning, match="fooled by 2 perturbed samples of 4 .*predict decides"):
        score = robust_accuracy_score(model, CORNERS, CORNERS_Y, eps=0.3)
    assert score == 1


@pytest.mark.parametrize("attack", [PGD(loss="cross_entropy"), "fgsm"])
def test_gradients_that_vanish_are_warned_of(attack):
    model = with_plane(BINARY_X, BINARY_Y, 1e6 * np.array([-0.3, -0.5, 0.6, 0.8]), -1.2e6)
    with pytest.warns(AttackWarning, match=r"gradient was zero at the first step of \d+ of"):
        score = robust_accuracy_score(model, BINARY_X, BINARY_Y, eps=0.3, attack=attack)
    assert score > (distances(model, BINARY_X, BINARY_Y, "linf") > 0.3).mean()


@pytest.mark.parametrize("attack", [PGD(loss="margin"), FGSM(loss="margin")], ids=repr)
def test_the_margin_loss_is_not_deceived_by_large_logits(attack):
    model = with_plane(BINARY_X, BINARY_Y, 1e6 * np.array([-0.3, -0.5, 0.6, 0.8]), -1.2e6)
    distance = distances(model, BINARY_X, BINARY_Y, "linf")
    assert_closed_form(model, BINARY_X, BINARY_Y, distance, attack=attack)
