"""The generalization gap, clean and under attack."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import clone
from sklearn.metrics import check_scoring

from skjacobian.intervals import wilson_interval
from skjacobian.metrics import RobustScorer


class Gap(NamedTuple):
    """A score on training and on test data, and their difference with its interval.

    Attributes
    ----------
    train, test : float
    gap : float
        `train` minus `test`.
    low, high : float
        Confidence interval of the gap for the choice of the samples, as if those of both
        scores were drawn: right for small random parts of the data, too wide where the training
        score is that of all samples trained on. nan where the score is no share of samples.
    """

    train: float
    test: float
    gap: float
    low: float
    high: float


def generalization_gap(
    estimator: Any,
    X_train: Any,
    y_train: Any,
    X_test: Any,
    y_test: Any,
    scoring: Any = "accuracy",
    *,
    confidence: float = 0.95,
) -> dict[str, Gap]:
    """Return by how much a fitted classifier scores better on training than on test data.

    Parameters
    ----------
    estimator : fitted classifier
    X_train : array-like of shape (n_train, *features)
        What it was trained on, or a random part of it.
    y_train : array-like of shape (n_train,)
    X_test : array-like of shape (n_test, *features)
    y_test : array-like of shape (n_test,)
    scoring : str, callable or RobustScorer, default="accuracy"
        A `RobustScorer` gives the standard and the robust gap from one run of its attack.
    confidence : float, default=0.95
        Of the intervals, which accuracies get: those of "accuracy" and of a `RobustScorer`
        with ``average="mean"``.

    Returns
    -------
    dict of Gap
        By the name of the score: "accuracy" and "robust_accuracy_eps0.1" for a
        `RobustScorer`, the name of the scorer or "score" for others.

    Raises
    ------
    ValueError
        If `confidence` is not between 0 and 1. What the scorer raises comes through.

    See Also
    --------
    surrogate_gap : The adversarial loss against the Jacobian norms that bound it.

    Notes
    -----
    The interval is Newcombe's for the difference of two proportions, from two Wilson intervals
    (R. G. Newcombe, Statistics in Medicine 17 (1998), 873-890, method 10). It speaks of the
    samples alone: another run of training gives another model and another gap.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.model_selection import train_test_split
    >>> from skjacobian import JacobianRegularizedClassifier, RobustScorer, generalization_gap
    >>> X, y = load_iris(return_X_y=True)
    >>> X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
    >>> model = JacobianRegularizedClassifier(random_state=0).fit(X_train, y_train)
    >>> scorer = RobustScorer(norm="linf", eps=0.2)  # centimetres
    >>> gaps = generalization_gap(model, X_train, y_train, X_test, y_test, scorer)
    >>> sorted(gaps)
    ['accuracy', 'robust_accuracy_eps0.2']
    >>> gap = gaps["accuracy"]
    >>> gap.low <= gap.gap <= gap.high
    True
    """
    wilson_interval(0, 1, confidence)  # raises before the scorer is run
    train = _scores(estimator, X_train, y_train, scoring)
    test = _scores(estimator, X_test, y_test, scoring)
    counted = _counts_samples(scoring)
    gaps = {}
    for name, score in train.items():
        low = high = math.nan
        if counted:
            low, high = difference_interval(
                score, len(y_train), test[name], len(y_test), confidence=confidence
            )
        gaps[name] = Gap(score, test[name], score - test[name], low, high)
    return gaps


def _scores(estimator: Any, X: Any, y: Any, scorer: Any) -> dict[str, float]:
    """Return the scores by name; those of a `RobustScorer` with the clean accuracy."""
    if isinstance(scorer, RobustScorer) and np.ndim(scorer.eps) == 0:
        scorer = clone(scorer).set_params(eps=[scorer.eps])
    value = check_scoring(estimator, scorer)(estimator, X, y)
    if isinstance(value, Mapping):
        return {name: float(score) for name, score in value.items()}
    return {scorer if isinstance(scorer, str) else "score": float(value)}


def _counts_samples(scorer: Any) -> bool:
    """Tell whether a score is a share of samples."""
    if isinstance(scorer, RobustScorer):
        return scorer.average == "mean"
    return isinstance(scorer, str) and scorer == "accuracy"


def difference_interval(
    accuracy_1: float, n_1: int, accuracy_2: float, n_2: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Return Newcombe's interval of the difference of two accuracies on separate samples.

    Parameters
    ----------
    accuracy_1, accuracy_2 : float
        Shares of samples.
    n_1, n_2 : int
        Of how many.
    confidence : float, default=0.95

    Returns
    -------
    low, high : float
        Of accuracy_1 - accuracy_2.

    References
    ----------
    R. G. Newcombe, Interval estimation for the difference between independent proportions,
    Statistics in Medicine 17 (1998), 873-890, method 10.

    Examples
    --------
    >>> low, high = difference_interval(56 / 70, 70, 48 / 80, 80)  # his table II (a)
    >>> print(f"{low:.4f} to {high:.4f}")
    0.0524 to 0.3339
    """
    low_1, high_1 = wilson_interval(accuracy_1 * n_1, n_1, confidence)
    low_2, high_2 = wilson_interval(accuracy_2 * n_2, n_2, confidence)
    difference = accuracy_1 - accuracy_2
    low = difference - math.hypot(accuracy_1 - low_1, high_2 - accuracy_2)
    high = difference + math.hypot(high_1 - accuracy_1, accuracy_2 - low_2)
    return low, high
