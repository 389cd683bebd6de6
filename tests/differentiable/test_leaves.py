"""Leaves of trees against what scikit-learn's trees say."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    VotingClassifier,
)
from sklearn.feature_selection import RFE
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import FixedThresholdClassifier, GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler
from sklearn.tree import DecisionTreeClassifier, ExtraTreeClassifier

from skjacobian._table import Table
from skjacobian.differentiable import _leaves, black_box, leaves_of
from tests.leaf_boxes import assert_same, known, scores

TREES = {
    "tree": DecisionTreeClassifier(max_depth=4, random_state=0),
    "extra tree": ExtraTreeClassifier(max_depth=4, random_state=0),
    "forest": RandomForestClassifier(7, random_state=0),
    "extra trees": ExtraTreesClassifier(7, max_depth=5, random_state=0),
    "boosting": GradientBoostingClassifier(n_estimators=7, random_state=0),
    "exponential": GradientBoostingClassifier(n_estimators=7, loss="exponential", random_state=0),
    "histograms": HistGradientBoostingClassifier(max_iter=7, random_state=0),
}
SMALL = DecisionTreeClassifier(max_depth=3, random_state=0)
ENSEMBLES = {
    "bagging": BaggingClassifier(n_estimators=7, max_features=0.5, random_state=0),
    "bagging, features twice": BaggingClassifier(
        n_estimators=7, bootstrap_features=True, random_state=0
    ),
    "bagging of pipelines": BaggingClassifier(
        make_pipeline(StandardScaler(), SMALL), n_estimators=5, max_samples=0.3, random_state=0
    ),
    "votes": VotingClassifier(
        [("few", SMALL), ("many", RandomForestClassifier(5, random_state=0))],
        voting="soft",
        weights=[1, 3],
    ),
    "stumps": AdaBoostClassifier(n_estimators=12, random_state=0),
    "boosted trees": AdaBoostClassifier(SMALL, n_estimators=5, random_state=0),
}
DATA = {"2 classes": load_breast_cancer, "3 classes": load_wine}
KNOW_MISSING = ("tree", "forest", "extra trees", "histograms")

FOREST = RandomForestClassifier(5, max_depth=4, random_state=0)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", TREES)
def test_leaves_add_up_to_the_scores(name, data):
    X, y = DATA[data](return_X_y=True)
    if name == "exponential":
        X, y = X[y < 2], y[y < 2]
    classifier = TREES[name].fit(X[::2], y[::2])
    assert_same(known(classifier, X[::2]).scores(X), scores(classifier, X))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", ENSEMBLES)
def test_leaves_of_ensembles_of_known_classifiers_add_up_to_the_scores(name, data):
    X, y = DATA[data](return_X_y=True)
    classifier = ENSEMBLES[name].fit(X[::2], np.array(list("abc"))[y[::2]])
    assert_same(known(classifier, X[::2]).scores(X), scores(classifier, X))


@pytest.mark.parametrize("name", KNOW_MISSING)
def test_missing_values_go_where_the_trees_send_them(name):
    X, y = load_wine(return_X_y=True)
    X[np.random.default_rng(0).random(X.shape) < 0.2] = np.nan
    classifier = TREES[name].fit(X[::2], y[::2])
    assert_same(known(classifier, X[::2]).scores(X), scores(classifier, X))


def test_of_samples_in_float32_equal_votes_are_equal():
    X, y = load_breast_cancer(return_X_y=True)
    forest = RandomForestClassifier(2, random_state=0).fit(X[::2], y[::2])
    leaves = known(forest, X[1::2].astype(np.float32))
    votes = leaves.scores(X)
    assert (votes == 0.5).any()
    np.testing.assert_allclose(votes, forest.predict_proba(X), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "scaler",
    [StandardScaler(), MinMaxScaler((1, 3)), RobustScaler(), MaxAbsScaler(), "passthrough"],
    ids=str,
)
def test_leaves_behind_scalers_are_in_the_units_before(scaler):
    X, y = load_wine(return_X_y=True)
    pipeline = make_pipeline(scaler, StandardScaler(with_mean=False), FOREST).fit(X, y)
    leaves = known(pipeline, X)
    assert_same(leaves.scores(X), pipeline.predict_proba(X))
    assert leaves.high[np.isfinite(leaves.high)].max() > 100  # proline, in mg/l


def test_leaves_of_what_was_searched_for_or_frozen_are_those_inside():
    X, y = load_wine(return_X_y=True)
    search = GridSearchCV(FOREST, {"max_depth": [2]}, cv=2).fit(X, y)
    for classifier in (search, FrozenEstimator(search.best_estimator_)):
        assert_same(known(classifier, X).scores(X), search.predict_proba(X))


class Sharpened(RandomForestClassifier):
    def predict_proba(self, X):
        squares = super().predict_proba(X) ** 2
        return squares / squares.sum(1, keepdims=True)


@pytest.mark.parametrize(
    "classifier",
    [
        KNeighborsClassifier(),
        BaggingClassifier(HistGradientBoostingClassifier(max_iter=3), n_estimators=2),
        BaggingClassifier(LogisticRegression(max_iter=9999), n_estimators=2, random_state=0),
        VotingClassifier([("a", SMALL), ("b", GaussianNB())], voting="soft"),
        VotingClassifier([("a", SMALL), ("b", FOREST)], voting="hard"),
        AdaBoostClassifier(GaussianNB(), n_estimators=3),
        Sharpened(5, max_depth=3, random_state=0),
        make_pipeline(PCA(3), FOREST),
        make_pipeline(MinMaxScaler(clip=True), FOREST),
        make_pipeline(KNeighborsClassifier()),
        FixedThresholdClassifier(FOREST, threshold=0.7),
    ],
    ids=lambda c: type(c).__name__,
)
def test_no_leaves_are_known_of_what_does_not_add_up_trees_as_they_are(classifier):
    X, y = load_breast_cancer(return_X_y=True)
    X, y = StandardScaler().fit_transform(X)[::3], y[::3]
    assert known(classifier.fit(X, y), X) is None


def test_too_many_leaves_are_none(monkeypatch):
    X, y = load_wine(return_X_y=True)
    monkeypatch.setattr(_leaves, "MOST_NUMBERS", 100)
    assert leaves_of(FOREST.fit(X, y)) is None


def test_images_have_no_leaves():
    X, y = load_wine(return_X_y=True)
    forest = FOREST.fit(X, y)
    images = Table(X[:, None])
    assert _leaves.compared_leaves(forest, forest.predict_proba, images) is None


def test_a_sample_on_a_threshold_that_scalers_round_to_costs_no_leaves():
    rng = np.random.default_rng(10)
    X = np.round(rng.normal(size=(200, 3)), 1)
    y = X[:, 0] * X[:, 1] > 0.1
    boosting = HistGradientBoostingClassifier(max_iter=3, min_samples_leaf=2)
    pipeline = make_pipeline(MinMaxScaler(), boosting).fit(X[::2], y[::2])
    samples = X[1:40:2]  # of which one goes to the other side
    leaves = known(pipeline, samples)
    same = np.isclose(leaves.scores(samples), scores(pipeline, samples)).all(1)
    assert same.sum() == len(samples) - 1


def test_the_leaves_behind_a_selection_that_predicts_are_those_of_all_columns():
    X, y = load_wine(return_X_y=True)
    selector = RFE(TREES["forest"], n_features_to_select=3).fit(X, y)
    np.testing.assert_allclose(leaves_of(selector).scores(X), selector.predict_proba(X))


class Guarded(RandomForestClassifier):
    def predict(self, X):
        return np.where(np.asarray(X)[:, 0] > 1e3, 0, super().predict(X))


@pytest.mark.parametrize("wrap", [lambda forest: forest, make_pipeline, FrozenEstimator])
def test_of_a_tree_that_predicts_by_a_method_of_its_own_no_leaves_are_known(wrap):
    X, y = load_wine(return_X_y=True)
    for forest, is_known in ((RandomForestClassifier(3), True), (Guarded(3), False)):
        classifier = wrap(forest.fit(X, y)).fit(X, y)
        table = Table(X)
        method = black_box(classifier, table, "predict_proba")
        assert (_leaves.compared_leaves(classifier, method, table) is not None) == is_known
