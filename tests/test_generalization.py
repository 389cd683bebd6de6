"""Gaps between training and test scores, with intervals."""

import math

import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from skjacobian import RobustScorer, generalization_gap
from skjacobian.generalization import difference_interval


@pytest.fixture(scope="module")
def split():
    return train_test_split(*load_iris(return_X_y=True), random_state=0)


@pytest.fixture(scope="module")
def model(split):
    X_train, _, y_train, _ = split
    return LogisticRegression(max_iter=500).fit(X_train, y_train)


def gaps_of(model, split, *args, **kwargs):
    X_train, X_test, y_train, y_test = split
    return generalization_gap(model, X_train, y_train, X_test, y_test, *args, **kwargs)


def test_the_gap_of_accuracy(model, split):
    X_train, X_test, y_train, y_test = split
    (name, gap), *rest = gaps_of(model, split).items()
    assert name == "accuracy"
    assert not rest
    assert gap.train == model.score(X_train, y_train)
    assert gap.test == model.score(X_test, y_test)
    assert gap.gap == gap.train - gap.test
    assert -1 <= gap.low < gap.gap < gap.high <= 1


@pytest.mark.parametrize("eps", [0.3, [0.1, 0.3]])
def test_a_robust_scorer_gives_the_standard_and_the_robust_gap(model, split, eps):
    scorer = RobustScorer(norm="l2", eps=eps)
    gaps = gaps_of(model, split, scoring=scorer)
    assert "accuracy" in gaps
    gap = gaps["robust_accuracy_eps0.3"]
    X_train, X_test, y_train, y_test = split
    single = RobustScorer(norm="l2", eps=0.3)
    assert gap.train == pytest.approx(single(model, X_train, y_train), abs=0.02)
    assert gap.test == pytest.approx(single(model, X_test, y_test), abs=0.03)
    assert gap.low <= gap.gap <= gap.high
    assert scorer.eps == eps


def test_a_wider_confidence_gives_a_wider_interval(model, split):
    narrow = gaps_of(model, split, confidence=0.5)["accuracy"]
    wide = gaps_of(model, split, confidence=0.99)["accuracy"]
    assert wide.low < narrow.low
    assert narrow.high < wide.high


@pytest.mark.parametrize(
    ("scorer", "name"),
    [
        ("neg_log_loss", "neg_log_loss"),
        (lambda estimator, X, y: estimator.score(X, y), "score"),
        (RobustScorer(eps=0.1, average="worst_class"), "worst_class_robust_accuracy_eps0.1"),
    ],
)
def test_scores_that_are_no_share_of_samples_have_no_interval(model, split, scorer, name):
    gap = gaps_of(model, split, scorer)[name]
    assert math.isnan(gap.low)
    assert math.isnan(gap.high)
    assert gap.gap == gap.train - gap.test


@pytest.mark.parametrize(
    ("x_1", "n_1", "x_2", "n_2", "low", "high"),
    [  # Newcombe (1998), table II, method 10
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (10, 10, 0, 20, 0.6791, 1.0000),
    ],
)
def test_the_interval_is_newcombes(x_1, n_1, x_2, n_2, low, high):
    interval = difference_interval(x_1 / n_1, n_1, x_2 / n_2, n_2)
    assert interval == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("confidence", [0, 1.5, "0.95", None])
def test_a_bad_confidence_is_found_before_anything_is_scored(confidence):
    message = f"Got confidence={confidence!r}, but expected a number between 0 and 1."
    with pytest.raises(ValueError, match=message):
        generalization_gap(None, None, None, None, None, confidence=confidence)
