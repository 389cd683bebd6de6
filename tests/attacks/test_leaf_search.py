"""The search among leaves, against leaf boxes and brute force."""

import itertools
import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier

from skjacobian import RobustScorer, adversarial_distances, evaluate_robustness
from skjacobian._under_attack import UnderAttack
from skjacobian.attacks import LeafSearch, RayS, Square
from skjacobian.attacks._reach import Reach
from skjacobian.attacks.cascade import PLANS
from skjacobian.attacks.leaf_search import _sets
from skjacobian.constraints import FeatureConstraints
from skjacobian.differentiable import BlackBox
from skjacobian.exceptions import AttackWarning
from skjacobian.leaves import Leaves
from tests.leaf_boxes import distance_to_leaves, known
from tests.slow import others_slow

NORMS = ["linf", "l2", "l1"]
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
DATA = {"breast cancer": load_breast_cancer, "wine": load_wine}

every_norm = pytest.mark.parametrize("norm", NORMS)


def scaled(name):
    X, y = DATA[name](return_X_y=True)
    return StandardScaler().fit_transform(X).astype(np.float32).astype(float), y


def fooled(classifier, X, y, **threat):
    """Whom the search fools, and with what."""
    subject = UnderAttack(classifier, X, y, needs="labels")
    threat = {"bounds": None, "mutable": None, "constraints": None, "feature_scale": None} | threat
    attack = subject.arm(LeafSearch(minimal=threat.pop("minimal", False)), **threat)
    found = subject.perturb(attack, np.arange(len(y))).found
    return found.fooled.numpy(), found.X_adv.numpy(), attack, subject


# --- one tree: exact ---------------------------------------------------------------------


@pytest.mark.parametrize("data", DATA)
@every_norm
def test_it_is_exact_on_single_trees(norm, data):
    X, y = scaled(data)
    unit = np.linspace(0.5, 2, X.shape[1])
    tree = DecisionTreeClassifier(random_state=0).fit(X[::2], y[::2])
    X, y = X[1::4], tree.predict(X[1::4])
    distance = distance_to_leaves(tree, X, y, norm, unit)
    far = distance > 1e-3  # where a thousandth is more than what trees round
    X, y, distance = X[far], y[far], distance[far]
    for share, is_fooled in ((1.001, True), (0.999, False)):
        eps = torch.from_numpy(share * distance)
        attack = LeafSearch(norm=norm, eps=eps, feature_scale=unit)
        subject = UnderAttack(tree, X, y, needs="labels")
        found = attack.search(subject.logits_view, subject.X_tensor, torch.from_numpy(y))
        assert (found.fooled.numpy() == is_fooled).all()


@pytest.mark.parametrize("data", DATA)
@every_norm
def test_the_nearest_point_of_single_trees_is_exact(norm, data):
    X, y = scaled(data)
    tree = DecisionTreeClassifier(random_state=0).fit(X[::2], y[::2])
    X, y = X[1::8], tree.predict(X[1::8])
    found = adversarial_distances(tree, X, y, norm=norm, n_queries=1)
    exact = distance_to_leaves(tree, X, y, norm)
    np.testing.assert_allclose(found, exact, rtol=1e-2, atol=1e-6)


@every_norm
def test_it_is_exact_on_a_tree_behind_imputers_scalers_and_encoders(norm):
    rng = np.random.default_rng(0)
    X = pd.DataFrame(
        {
            "kind": rng.choice(["a", "b", "c"], 400),
            "size": np.where(rng.random(400) < 0.1, np.nan, rng.normal(5, 2, 400)),
            "width": rng.normal(size=400),
        }
    )
    y = X["size"].fillna(5) + X.width * (X.kind == "b") - (X.kind == "c") > 5
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    transformer = make_column_transformer((OneHotEncoder(), ["kind"]), (numbers, [1, 2]))
    tree = DecisionTreeClassifier(max_depth=7, random_state=0)
    pipeline = make_pipeline(transformer, tree).fit(X[::2], y[::2])
    X = X[1::8]
    # In the units of the scaler; what is encoded or missing cannot change.
    Z, label = transformer.transform(X), pipeline.predict(X)
    unit = np.where(np.isnan(X["size"]).to_numpy()[:, None], [0, 0, 0, 0, 1], [0, 0, 0, 1, 1])
    exact = [
        distance_to_leaves(tree, Z[[i]], label[[i]], norm, np.maximum(unit[i], 1e-99))[0]
        for i in range(len(Z))
    ]
    within = np.array(exact) < 1e3
    scale = transformer.named_transformers_["pipeline"][-1].scale_
    threat = {"norm": norm, "feature_scale": np.append(1.0, scale), "mutable": ["size", "width"]}
    found = adversarial_distances(pipeline, X, label, n_queries=1, **threat)
    np.testing.assert_allclose(found[within], np.array(exact)[within], rtol=1e-2, atol=1e-6)
    assert np.isinf(found[~within]).all()
    assert 0.5 < within.mean() < 1


# --- small forests: brute force ----------------------------------------------------------

SMALL = {
    "forest": RandomForestClassifier(9, max_depth=4, random_state=0),
    "extra trees": ExtraTreesClassifier(9, max_depth=4, random_state=0),
    "boosting": GradientBoostingClassifier(n_estimators=6, max_depth=2, random_state=0),
    "histograms": HistGradientBoostingClassifier(max_iter=5, max_leaf_nodes=5, random_state=0),
}


@cache
def small_ensemble(name):
    """An ensemble, samples as it predicts them, and every cell between its thresholds."""
    X, y = scaled("wine")
    X = X[:, [0, 6, 12]]
    classifier = SMALL[name].fit(X[::2], y[::2])
    X, y = X[1::9], classifier.predict(X[1::9])
    leaves, sides = known(classifier, X), []
    for j in range(X.shape[1]):
        ends = np.concatenate([leaves.low[:, j], leaves.high[:, j]])
        ends = np.unique(ends.clip(-100, 100))  # far beyond all samples
        sides.append(list(itertools.pairwise(ends)))
    low, high = np.array(list(itertools.product(*sides))).transpose(2, 0, 1)
    return classifier, X, y, (low, high, classifier.predict((low + high) / 2))


def nearest_cell(cells, X, y, norm):
    """The exact distance to another class, by a look at every cell between thresholds."""
    low, high, predicted = cells
    distances = []
    for x, label in zip(X, y, strict=True):
        to_cells = np.linalg.norm(np.clip(x, low, high) - x, ORDER[norm], axis=1)
        distances.append(to_cells[predicted != label].min(initial=np.inf))
    return np.array(distances)


@pytest.mark.parametrize(
    ("name", "norm"),
    others_slow(
        itertools.product(SMALL, NORMS),
        [("forest", "l1"), ("extra trees", "l2"), ("boosting", "linf"), ("histograms", "l1")],
    ),
)
def test_on_small_ensembles_it_is_hardly_beyond_brute_force(name, norm):
    classifier, X, y, cells = small_ensemble(name)
    nearest = nearest_cell(cells, X, y, norm)
    is_fooled, X_adv, _, _ = fooled(classifier, X, y, norm=norm, eps=10.0, minimal=True)
    assert is_fooled.all()
    far = nearest > 1e-3
    ratio = np.linalg.norm(X_adv - X, ORDER[norm], axis=1)[far] / nearest[far]
    assert far.mean() > 0.8
    assert ratio.min() > 1 - 1e-4
    assert (ratio < 1.01).mean() >= 0.9
    assert ratio.mean() < 1.02


# --- one sum over intervals against states one by one ------------------------------------


@every_norm
def test_what_each_change_would_bring_is_what_it_brings(norm):
    X, y = scaled("wine")
    forest = RandomForestClassifier(20, random_state=0).fit(X, y)
    subject = UnderAttack(forest, X[::30], y[::30], needs="labels")
    ball = LeafSearch(norm=norm, eps=1.5).ball(subject.X_tensor)
    rng = np.random.default_rng(0)
    for allowed, label in zip(_sets(ball, subject.leaves), y[::30], strict=True):
        reach = Reach(subject.leaves, int(label), allowed)
        state = reach.stay.copy()
        for j in rng.choice(len(state), 3 if norm != "linf" else len(state), replace=False):
            state[j] = rng.choice(np.flatnonzero(reach.place == j))
        margins, costs = reach.margins(state), reach.costs(state)
        for value in rng.choice(len(reach.value), 30):
            changed = state.copy()
            changed[reach.place[value]] = value
            assert margins[value] == pytest.approx(reach.margin(changed), abs=1e-9)
            assert costs[value] == pytest.approx(reach.cost[changed].sum(), abs=1e-9)
            if reach.cost[changed].sum() > 1:  # where other leaves are
                continue
            point = reach.point(changed)
            says = subject.leaves.scores(point[None])[0]
            others = np.delete(says - says[label], label)
            assert reach.margin(changed) == pytest.approx(others.max(), abs=1e-8)


# --- the threat model --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [("linf", np.float32), ("linf", np.float64), ("l2", np.float64), ("l1", np.float32)],
)
def test_nothing_leaves_the_threat_model(norm, dtype):
    rng = np.random.default_rng(0)
    X, y = scaled("wine")
    X[:, 3] = np.round(3 * X[:, 3])
    X[rng.random(X.shape) < 0.05] = np.nan
    X = X.astype(dtype)
    classifier = RandomForestClassifier(10, random_state=0).fit(X, y)
    X, y = X[::6], y[::6]
    fixed, unit = [1, 5], np.linspace(0.3, 3, X.shape[1])
    bounds = (np.nanmin(X, 0) - 0.1, np.nanmax(X, 0) + 0.1)
    constraints = FeatureConstraints(integer=[3], increasing=[6], decreasing=[9])
    n_fooled = 0
    for eps in (0.0, 0.2, 1.0, 5.0, 1e9):
        is_fooled, X_adv, attack, subject = fooled(
            classifier,
            X,
            y,
            norm=norm,
            eps=eps,
            feature_scale=unit,
            bounds=bounds,
            mutable=[j for j in range(X.shape[1]) if j not in fixed],
            constraints=constraints,
        )
        assert attack.ball(subject.X_tensor).contains(torch.from_numpy(X_adv)).all()
        assert (np.isnan(X_adv) == np.isnan(X)).all()
        np.testing.assert_array_equal(X_adv[:, fixed], X[:, fixed])
        whole = X_adv[:, 3][~np.isnan(X[:, 3])]
        np.testing.assert_array_equal(whole, np.round(whole))
        change = np.nan_to_num(X_adv - X)
        assert (change[:, 6] >= 0).all()
        assert (change[:, 9] <= 0).all()
        assert is_fooled.sum() >= n_fooled
        n_fooled = is_fooled.sum()
    assert n_fooled > 0.3 * len(y)


def test_whole_numbers_are_changed_by_whole_numbers_to_the_last_digit_of_the_radius():
    X, y = np.arange(6.0)[:, None], np.array([0, 0, 0, 1, 1, 1])
    tree = DecisionTreeClassifier().fit(X, y)
    for norm in NORMS:
        threat = {"norm": norm, "constraints": FeatureConstraints(integer=[0])}
        assert RobustScorer(eps=1, attack=LeafSearch(), **threat)(tree, X, y) == 4 / 6
        with pytest.warns(AttackWarning, match="at which no feature can change"):
            assert RobustScorer(eps=0.99, attack=LeafSearch(), **threat)(tree, X, y) == 1


def test_whole_numbers_may_stop_at_thresholds_that_are_whole():
    X, y = np.arange(0.0, 12.0, 2.0)[:, None], np.array([0, 0, 0, 1, 1, 1])
    constraints = FeatureConstraints(integer=[0])
    for scaler in ("passthrough", StandardScaler()):
        tree = make_pipeline(scaler, DecisionTreeClassifier()).fit(X, y)
        assert tree.predict([[5.0]]) == 0  # the threshold
        is_fooled = fooled(tree, X, y, norm="linf", eps=1, constraints=constraints)[0]
        np.testing.assert_array_equal(is_fooled, X[:, 0] == 6)


@every_norm
def test_what_scalers_round_in_float32_is_passed(norm):
    for seed in range(8):
        X = np.random.default_rng(seed).normal(100, 100, (100, 1)).astype(np.float32)
        y = (X[:, 0] > 0) ^ (X[:, 0] > 200)  # one of the thresholds is near 0
        pipeline = make_pipeline(StandardScaler(), DecisionTreeClassifier()).fit(X, y)
        is_fooled, *_ = fooled(pipeline, X, y, norm=norm, eps=1e3)
        assert is_fooled.all()


def test_equal_scores_that_the_model_decides_otherwise_are_passed_by():
    leaves = Leaves(
        low=np.array([[-np.inf], [0.5], [1.5]]),
        high=np.array([[0.5], [1.5], [np.inf]]),
        takes_missing=np.zeros((3, 1), dtype=bool),
        values=np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]),
        constant=np.zeros(2),
    )

    def says(X):  # by a hair the second class, where leaves add up to the same
        places = np.digitize(X[:, 0].numpy(), [0.5, 1.5])
        return torch.tensor([[0.0, 1.0], [0.5, 0.5001], [1.0, 0.0]])[places].double()

    X, y = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.long)
    model = BlackBox(says, 2, lambda: leaves)
    for minimal in (False, True):
        X_adv = LeafSearch(norm="l2", eps=3.0, minimal=minimal)(model, X, y)
        assert X_adv.item() == pytest.approx(1.5, abs=1e-3)


def test_the_result_does_not_depend_on_the_batch():
    X, y = scaled("breast cancer")
    forest = RandomForestClassifier(10, random_state=0).fit(X[::2], y[::2])
    scorers = [
        RobustScorer(norm="l2", eps=0.5, attack=LeafSearch(), batch_size=n) for n in (1, 7, 1000)
    ]
    assert len({scorer(forest, X[1:40:2], y[1:40:2]) for scorer in scorers}) == 1


class Cautious(RandomForestClassifier):
    def predict(self, X):
        return self.classes_[(self.predict_proba(X)[:, 1] > 0.2).astype(int)]


def test_leaves_say_nothing_of_a_predict_that_does_not_follow_them():
    X, y = scaled("breast cancer")
    forest = Cautious(10, random_state=0).fit(X[::2], y[::2])
    with pytest.warns(AttackWarning, match="weak attack"):
        report = evaluate_robustness(forest, X[1:60:2], y[1:60:2], eps=0.1, n_queries=20)
    assert report.view == "black box, predict"


def test_of_one_class_there_is_nothing_to_search():
    X, y = scaled("wine")
    forest = RandomForestClassifier(2, random_state=0).fit(X, 0 * y)
    with pytest.warns(AttackWarning, match="weak attack"):
        report = evaluate_robustness(forest, X[:5], 0 * y[:5], norm="l2", n_queries=20)
    assert report.robust_accuracy == 1


# --- in scorers, reports and curves ------------------------------------------------------


def test_without_leaves_it_says_what_it_needs():
    with pytest.raises(
        TypeError, match=r"model whose leaves are not known, but expected a decision"
    ):
        LeafSearch()(lambda X: X, torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))


@pytest.mark.usefixtures("brief_stages")
@every_norm
def test_strong_searches_leaves_first_and_needs_no_warning(norm):
    X, y = scaled("wine")
    forest = RandomForestClassifier(10, random_state=0).fit(X[::2], y[::2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strong = RobustScorer(norm=norm, eps=0.3, attack="strong")(forest, X[1::10], y[1::10])
    leaves = RobustScorer(norm=norm, eps=0.3, attack=LeafSearch())(forest, X[1::10], y[1::10])
    assert strong <= leaves
    assert leaves - strong < 0.02
    report = evaluate_robustness(forest, X[1::10], y[1::10], norm=norm, eps=0.3)
    assert report.view == "leaves of trees, predict_proba"
    assert [stage.name for stage in report.stages] == [
        *("clean", "leaves", "Square, briefly", "RayS, briefly")
    ]
    assert report.robust_accuracy == strong
    assert report.raised == ()


def test_of_categories_black_boxes_search_too_and_the_report_says_so(monkeypatch):
    short = (RayS(n_queries=20), Square(n_queries=20))
    plans = zip(PLANS["scores"], short, strict=True)
    monkeypatch.setitem(PLANS, "scores", tuple(plan._replace(attack=a) for plan, a in plans))
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(size=(80, 1)), np.eye(3)[rng.integers(3, size=80)]], 1)
    y = (X[:, 0] + X[:, 1] > 0.5).astype(int)
    forest = RandomForestClassifier(5, random_state=0).fit(X, y)
    constraints = FeatureConstraints(one_hot=[[1, 2, 3]])
    with pytest.warns(AttackWarning, match="weak attack"):
        report = evaluate_robustness(forest, X, y, norm="l2", eps=1.5, constraints=constraints)
    names = [stage.name for stage in report.stages]
    assert names == ["clean", "leaves", "RayS", "Square"]


def test_a_time_limit_keeps_what_was_found_in_time():
    X, y = scaled("breast cancer")
    forest = RandomForestClassifier(100, random_state=0).fit(X[::2], y[::2])
    with pytest.warns(AttackWarning, match="weak attack"):
        report = evaluate_robustness(forest, X, y, norm="l2", eps=0.5, time_limit=0.5)
    assert report.seconds < 20
    (leaves,) = (stage for stage in report.stages if stage.name == "leaves")
    assert leaves.n_fooled > 0
    (flag,) = (flag for flag in report.raised if flag.name == "weak attack")
    assert "leaves" in flag.detail


@pytest.mark.parametrize("norm", others_slow(["linf", "l2", "l1"], ["l2"]))
def test_curves_of_forests_are_nowhere_above_the_score_among_leaves(norm):
    X, y = scaled("wine")
    forest = RandomForestClassifier(10, random_state=0).fit(X[::2], y[::2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distances = adversarial_distances(forest, X[1::10], y[1::10], norm=norm, n_queries=50)
    for eps in np.quantile(distances[distances > 0], [0.2, 0.5, 0.8]):
        robust = RobustScorer(norm=norm, eps=eps, attack=LeafSearch())(forest, X[1::10], y[1::10])
        assert (distances > eps).mean() <= robust + 0.03
