"""The leaves of fitted trees and ensembles of trees of scikit-learn.

`leaves_of` is a registry by type. Teach it another library's trees with::

    @leaves_of.register(MyBoosting)
    def _(classifier):
        return Leaves(...)
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import singledispatch
from typing import Any

import numpy as np
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import Pipeline
from sklearn.tree import DecisionTreeClassifier

from skjacobian._table import Table
from skjacobian.differentiable._leaves_behind import before_steps
from skjacobian.differentiable._registry import TensorFunction
from skjacobian.exceptions import NotDifferentiableError
from skjacobian.leaves import Leaves

# Numbers of all leaves, beyond which they take too much memory.
MOST_NUMBERS = 2**23
# Of how many samples the scores are compared with those of the classifier.
N_COMPARED = 20
# The share of them that must agree: others may lie on a threshold, to which scalers round.
ENOUGH = 0.9


@singledispatch
def leaves_of(classifier: Any) -> Leaves | None:
    """Return the leaves of a fitted classifier whose scores are a sum over trees.

    The scores are its `decision_function`, of two classes the columns 0 and the decision, or
    else its `predict_proba`; up to a constant for each class.

    Returns
    -------
    Leaves or None
        None where no leaves are known.
    """
    return None


def compared_leaves(classifier: Any, scores: TensorFunction, table: Table) -> Leaves | None:
    """Return the leaves of a classifier, if these add up to its scores for the samples at hand.

    Parameters
    ----------
    classifier : fitted classifier
    scores : callable
        What the classifier says: its decisions if it has them, else its probabilities.
    table : Table
        The samples.
    """
    X = table.tensor
    if X.ndim != 2 or len(X) == 0:
        return None
    leaves = leaves_of(classifier)
    if leaves is None or len(leaves.constant) < 2 or not _bound(leaves, table):
        return None
    some = X[np.linspace(0, len(X) - 1, min(N_COMPARED, len(X))).astype(int)]
    some = some.double()  # in which votes that are equal stay equal
    n_features = X.shape[1] + leaves.encoded(some.numpy()).shape[1]
    if leaves.low.shape[1] != n_features:
        return None
    theirs, ours = scores(some).numpy(), leaves.scores(some.numpy())
    if theirs.shape != ours.shape:
        return None
    constant = np.median(theirs - ours, axis=0)
    agree = np.isclose(theirs, ours + constant, rtol=1e-5, atol=1e-6).all(axis=1)
    if agree.mean() < ENOUGH:
        return None
    return replace(leaves, constant=leaves.constant + constant)


def _bound(leaves: Leaves, table: Table) -> bool:
    """Show the encoders of leaves the samples; tell whether they encode these."""
    try:
        for encoder in leaves.encoders:
            encoder.bind(table)  # type: ignore[attr-defined]
    except NotDifferentiableError:
        return False
    return True


def _joined(trees: Iterable[Leaves], n_classes: int) -> Leaves | None:
    """Return the leaves of several trees, made one by one; None of too many."""
    parts, n_numbers = [], 0
    for leaves in trees:
        n_numbers += leaves.low.size
        if n_numbers > MOST_NUMBERS:
            return None
        parts.append(leaves)
    return Leaves(
        low=np.concatenate([part.low for part in parts]),
        high=np.concatenate([part.high for part in parts]),
        takes_missing=np.concatenate([part.takes_missing for part in parts]),
        values=np.concatenate([part.values for part in parts]),
        constant=np.zeros(n_classes),
    )


def _leaves_of_tree(
    left: np.ndarray,
    right: np.ndarray,
    feature: np.ndarray,
    threshold: np.ndarray,
    missing_goes_left: np.ndarray,
    values: np.ndarray,
    n_features: int,
) -> Leaves:
    """Return the leaves of one tree, from arrays with an entry for each node.

    From the root down, both children of all nodes of a depth at once. A leaf has no `left`
    child beyond 0.
    """
    shape = (len(left), n_features)
    low, high = np.full(shape, -np.inf), np.full(shape, np.inf)
    takes_missing = np.ones(shape, dtype=bool)
    nodes = np.array([0])
    while len(nodes := nodes[left[nodes] > 0]):
        by, at, to_left = feature[nodes], threshold[nodes], missing_goes_left[nodes]
        for children, goes in ((left[nodes], to_left), (right[nodes], ~to_left)):
            low[children], high[children] = low[nodes], high[nodes]
            takes_missing[children] = takes_missing[nodes]
            takes_missing[children, by] &= goes
        high[left[nodes], by] = np.minimum(high[left[nodes], by], at)
        low[right[nodes], by] = np.maximum(low[right[nodes], by], at)
        nodes = np.concatenate([left[nodes], right[nodes]])
    every_node = Leaves(low, high, takes_missing, values, np.zeros(values.shape[1]))
    return every_node[left <= 0]


def _of_sklearn(tree: Any, values: np.ndarray) -> Leaves:
    return _leaves_of_tree(
        tree.children_left,
        tree.children_right,
        tree.feature,
        _before_rounding(tree.threshold),
        tree.missing_go_to_left.astype(bool),
        values,
        tree.n_features,
    )


def _before_rounding(threshold: np.ndarray) -> np.ndarray:
    """Return where float64 begin to be beyond a threshold, of trees that round to float32.

    Half way between the last float32 that is not beyond and the first that is. Thresholds lie
    half way between samples, so that of numbers with few digits some are right there.
    """
    last = threshold.astype(np.float32)
    last = np.where(last > threshold, np.nextafter(last, np.float32(-np.inf)), last)
    first = np.nextafter(last, np.float32(np.inf))
    return np.asarray((last.astype(float) + first) / 2)


@leaves_of.register
def _(classifier: DecisionTreeClassifier) -> Leaves | None:
    leaves = _of_sklearn(classifier.tree_, classifier.tree_.value[:, 0, :])
    return _joined([leaves], len(classifier.classes_))


@leaves_of.register(RandomForestClassifier)
@leaves_of.register(ExtraTreesClassifier)
def _(forest: Any) -> Leaves | None:
    trees = [member.tree_ for member in forest.estimators_]
    parts = (_of_sklearn(tree, tree.value[:, 0, :] / len(trees)) for tree in trees)
    return _joined(parts, len(forest.classes_))


@leaves_of.register
def _(boosting: GradientBoostingClassifier) -> Leaves | None:
    def tree(member: Any, k: int) -> Leaves:
        values = boosting.learning_rate * member.tree_.value[:, 0, 0]
        return _of_sklearn(member.tree_, _in_column(k, values, n_classes))

    n_classes = len(boosting.classes_)
    return _joined(_by_class(tree, boosting.estimators_), n_classes)


@leaves_of.register
def _(boosting: HistGradientBoostingClassifier) -> Leaves | None:
    def tree(member: Any, k: int) -> Leaves:
        nodes = member.nodes
        return _leaves_of_tree(
            np.where(nodes["is_leaf"], 0, nodes["left"]).astype(int),
            nodes["right"].astype(int),
            nodes["feature_idx"].astype(int),
            nodes["num_threshold"],
            nodes["missing_go_to_left"].astype(bool),
            _in_column(k, nodes["value"], n_classes),
            boosting.n_features_in_,
        )

    n_classes, stages = len(boosting.classes_), boosting._predictors
    if any(member.nodes["is_categorical"].any() for members in stages for member in members):
        return None  # splits by sets, not at thresholds
    return _joined(_by_class(tree, stages), n_classes)


def _by_class(tree: Callable[[Any, int], Leaves], stages: Any) -> Iterator[Leaves]:
    """Yield the leaves of the trees of each stage: one for each class, or for the second of two."""
    for members in stages:
        for k, member in enumerate(members):
            yield tree(member, k if len(members) > 1 else 1)


def _in_column(k: int, values: np.ndarray, n_classes: int) -> np.ndarray:
    """Return values in the column of class k, 0 in the others."""
    return np.where(np.arange(n_classes) == k, values[:, None], 0.0)


@leaves_of.register
def _(pipeline: Pipeline) -> Leaves | None:
    *transformers, (_, last) = pipeline.steps
    return before_steps(transformers, leaves_of(last))


@leaves_of.register
def _(search: BaseSearchCV) -> Leaves | None:
    return leaves_of(search.best_estimator_)


@leaves_of.register
def _(frozen: FrozenEstimator) -> Leaves | None:
    return leaves_of(frozen.estimator)
