"""Any fitted classifier as a function of tensors, without gradients."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import FixedThresholdClassifier, TunedThresholdClassifierCV
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from skjacobian._table import Table
from skjacobian.differentiable._leaves import compared_leaves
from skjacobian.differentiable._meta_classifiers import rule_of
from skjacobian.differentiable._registry import TensorFunction
from skjacobian.leaves import Leaves

# What may tell how near a classifier is to another class; the last only which it predicts.
METHODS = ("predict_proba", "decision_function", "predict")

# What predicts by a threshold of its own.
THRESHOLDS = FixedThresholdClassifier | TunedThresholdClassifierCV

# How scikit-learn refuses to predict, or (CategoricalNB) does not look.
REFUSALS = (ValueError, OverflowError, IndexError)


class BlackBox:
    """A function of tensors without gradients.

    Parameters
    ----------
    scores : callable
        Maps tensors of shape (n_samples, *features) to scores (n_samples, n_classes).
    n_classes : int
    find_leaves : callable
        Returns the leaves of trees whose values add up to the scores, as far as the order of
        classes goes, or None. Asked once, and only if an attack looks for them.
    """

    def __init__(
        self, scores: TensorFunction, n_classes: int, find_leaves: Callable[[], Leaves | None]
    ) -> None:
        self.scores, self.n_classes, self.find_leaves = scores, n_classes, find_leaves

    @cached_property
    def leaves(self) -> Leaves | None:
        """The leaves of trees, if they are known."""
        return self.find_leaves()

    def __call__(self, X: Tensor) -> Tensor:
        """Return the scores, NaN where the classifier refuses to predict."""
        return answers_or_nan(self.scores, X, self.n_classes)

    def changed(self, change: TensorFunction) -> "BlackBox":
        """Return the same with scores changed in a way that keeps their order."""
        return BlackBox(lambda X: change(self.scores(X)), self.n_classes, lambda: self.leaves)


def black_box(estimator: Any, table: Table, method: str | None = None) -> BlackBox:
    """Return what a fitted classifier says of tensors, as scores without gradients.

    Probabilities, the decision function, or rows of 0 and 1 for the predicted class; columns
    in the order of `classes_`.

    Parameters
    ----------
    estimator : fitted classifier
    table : Table
        The samples; those asked about get their container, columns and types.
    method : {"predict_proba", "decision_function", "predict"}, optional
        Which of these; None is the first that the classifier has.

    Returns
    -------
    BlackBox
        Maps tensors of shape (n_samples, *features) to tensors (n_samples, n_classes), NaN
        where the classifier refuses to predict. It knows the leaves of trees, but not for
        `method="predict"`: of a `predict` that its scores do not follow they say nothing.

    Examples
    --------
    >>> import torch
    >>> from skjacobian._table import Table
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.tree import DecisionTreeClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> scores = black_box(DecisionTreeClassifier(random_state=0).fit(X, y), Table(X))
    >>> scores(torch.from_numpy(X[:1]))
    tensor([[1., 0., 0.]], dtype=torch.float64)
    """
    check_is_fitted(estimator)

    def scores(samples: Tensor) -> Tensor:
        values = table.decode(samples.detach().cpu().numpy())
        columns = np.ascontiguousarray(_class_scores(estimator, values, said_by))
        return first_of_equals(torch.from_numpy(columns).to(samples))

    said_by = method or methods_of(estimator)[0]
    find_leaves = partial(_leaves, estimator, table, said_by)
    return BlackBox(scores, len(estimator.classes_), find_leaves)


def _leaves(estimator: Any, table: Table, said_by: str) -> Leaves | None:
    """Return the leaves of a classifier whose decisions, or else probabilities, add up trees."""
    if said_by == "predict" or isinstance(_last(estimator), THRESHOLDS):
        return None
    method = "decision_function" if hasattr(estimator, "decision_function") else "predict_proba"
    return compared_leaves(estimator, black_box(estimator, table, method), table)


def first_of_equals(scores: Tensor) -> Tensor:
    """Let the first of several largest scores win by more than rounding, as in `predict`.

    Votes of trees and neighbours are often equal. An attack that took them for undecided would
    search beyond where it has won.

    Examples
    --------
    >>> import torch
    >>> first_of_equals(torch.tensor([[0.25, 0.375, 0.375]])).argmax(1)
    tensor([1])
    """
    largest, first = scores.max(1, keepdim=True)
    tied = ((scores == largest).sum(1, keepdim=True) > 1) & largest.isfinite()
    limits = torch.finfo(scores.dtype)
    ahead = torch.where(tied, largest + 64 * limits.eps * largest.abs() + limits.tiny, largest)
    return scores.scatter(1, first, ahead)


def answers_or_nan(ask: TensorFunction, samples: Tensor, n_classes: int) -> Tensor:
    """Return what a function says of samples, NaN for those at which it refuses to answer."""
    try:
        return ask(samples)
    except REFUSALS:
        if len(samples) == 1:
            return samples.new_full((1, n_classes), torch.nan)
        halves = torch.split(samples, -(-len(samples) // 2))
        return torch.cat([answers_or_nan(ask, half, n_classes) for half in halves])


def methods_of(estimator: Any) -> list[str]:
    """Return the methods that a classifier has of those that tell its class."""
    return [method for method in METHODS if hasattr(estimator, method)]


def _class_scores(estimator: Any, X: Any, method: str) -> np.ndarray:
    """Return one column for each class."""
    if method != "predict" and isinstance(_last(estimator), THRESHOLDS):
        return _above_threshold(estimator, X)
    if method == "predict_proba":
        return np.asarray(estimator.predict_proba(X))
    if method == "decision_function":
        decision = np.asarray(estimator.decision_function(X))
        if decision.ndim == 1:
            return np.stack([0 * decision, decision], axis=1)
        if decision.shape[1] == len(estimator.classes_) and not _scores_pairs(estimator):
            return decision
    return (np.asarray(estimator.predict(X))[:, None] == estimator.classes_).astype(float)


def _last(estimator: Any) -> Any:
    """Return what decides in searches and pipelines."""
    if isinstance(estimator, BaseSearchCV) and hasattr(estimator, "best_estimator_"):
        return _last(estimator.best_estimator_)
    return _last(estimator.steps[-1][1]) if isinstance(estimator, Pipeline) else estimator


def _above_threshold(classifier: Any, X: Any) -> np.ndarray:
    """Return 0 for the negative class, and how far the score is above the threshold."""
    if isinstance(classifier, BaseSearchCV):
        return _above_threshold(classifier.best_estimator_, X)
    if isinstance(classifier, Pipeline):
        for _, step in classifier.steps[:-1]:
            X = step.transform(X) if hasattr(step, "transform") else X
        return _above_threshold(classifier.steps[-1][1], X)
    rule = rule_of(classifier)
    if rule.on_proba:
        score = classifier.estimator_.predict_proba(X)[:, rule.positive]
    else:
        sign = 1 if rule.positive == 1 else -1
        score = sign * classifier.estimator_.decision_function(X)
    margin = score - rule.threshold
    # A score at the threshold is positive, while of equal scores the first class wins.
    columns = [np.zeros_like(margin), margin + (margin == 0) * np.finfo(float).tiny]
    return np.stack(columns if rule.positive == 1 else columns[::-1], axis=1)


def _scores_pairs(estimator: Any) -> bool:
    """Tell whether a decision function has a column for each of three pairs of three classes."""
    if len(estimator.classes_) != 3 or not hasattr(estimator, "get_params"):
        return False
    params = estimator.get_params().items()
    return any(k.endswith("decision_function_shape") and v == "ovo" for k, v in params)
