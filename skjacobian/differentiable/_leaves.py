"""The leaves of fitted trees and ensembles of trees of scikit-learn.

`leaves_of` is a registry by type. Teach it another library's trees with::

    @leaves_of.register(MyBoosting)
    def _(classifier):
        return Leaves(...)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np
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
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import Pipeline
from sklearn.tree import DecisionTreeClassifier

from skjacobian._table import Table
from skjacobian.differentiable._columns import encoded_columns
from skjacobian.differentiable._leaves_behind import (
    before_codes,
    before_steps,
    leaves_before,
    limit,
    unlimited,
)
from skjacobian.differentiable._registry import TensorFunction, own_method
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


def _known(classifier: Any) -> Leaves | None:
    """Return the leaves, but None of a subclass that computes by methods of its own."""
    kind = next(kind for kind in type(classifier).__mro__ if kind in leaves_of.registry)
    return None if own_method(classifier, kind) else leaves_of(classifier)


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
    leaves = _known(classifier)
    if leaves is None or len(leaves.constant) < 2:
        return None
    if leaves.low.shape[1] != X.shape[1] + leaves.n_encoded:
        return None
    fixed = {*encoded_columns(classifier), *table.categories}
    if not fixed.issuperset(_read_by(leaves.encoders)) or not _bound(leaves, table):
        return None
    some = X[np.linspace(0, len(X) - 1, min(N_COMPARED, len(X))).astype(int)]
    some = some.double()  # in which votes that are equal stay equal
    theirs, ours = scores(some).numpy(), leaves.scores(some.numpy())
    if theirs.shape != ours.shape:
        return None
    constant = np.median(theirs - ours, axis=0)
    agree = np.isclose(theirs, ours + constant, rtol=1e-5, atol=1e-6).all(axis=1)
    if agree.mean() < ENOUGH:
        return None
    return replace(leaves, constant=leaves.constant + constant)


def _read_by(encoders: Iterable[Any]) -> set[int]:
    return {column for encoder in encoders for column in encoder.columns}


def _bound(leaves: Leaves, table: Table) -> bool:
    """Show the encoders of leaves the samples; tell whether they encode these."""
    try:
        for encoder in leaves.encoders:
            encoder.bind(table)  # type: ignore[attr-defined]
    except NotDifferentiableError:
        return False
    return True


def joined(trees: Iterable[Leaves], n_classes: int) -> Leaves | None:
    """Return the leaves of several trees, made one by one; None of too many."""
    parts, n_numbers = [], 0
    for leaves in trees:
        n_numbers += leaves.low.size + (0 if leaves.codes is None else leaves.codes.size)
        if n_numbers > MOST_NUMBERS:
            return None
        parts.append(leaves)
    return Leaves(
        low=np.concatenate([part.low for part in parts]),
        high=np.concatenate([part.high for part in parts]),
        takes_missing=np.concatenate([part.takes_missing for part in parts]),
        values=np.concatenate([part.values for part in parts]),
        constant=np.zeros(n_classes),
        codes=None if parts[0].codes is None else np.concatenate([part.codes for part in parts]),
    )


class _Nodes(NamedTuple):
    """The nodes of a tree, an entry for each in every array.

    Attributes
    ----------
    left, right : array of int
        The children; a leaf has none on the left beyond 0.
    feature : array of int
    threshold : array of float
        NaN where codes of categories are split.
    missing_goes_left : array of bool
    values : array of shape (n_nodes, n_classes)
    goes_left : array of bool of shape (n_nodes, n_codes), optional
        Which codes do.
    """

    left: np.ndarray
    right: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    missing_goes_left: np.ndarray
    values: np.ndarray
    goes_left: np.ndarray | None = None


def _leaves_of_tree(tree: _Nodes, n_features: int, n_coded: int = 0) -> Leaves:
    """Return the leaves of one tree, of whose features the last are `n_coded` codes.

    From the root down, both children of all nodes of a depth at once.
    """
    shape = (len(tree.left), n_features)
    low, high = np.full(shape, -np.inf), np.full(shape, np.inf)
    takes_missing = np.ones(shape, dtype=bool)
    codes = None
    if tree.goes_left is not None:
        codes = np.ones((shape[0], n_coded, tree.goes_left.shape[1]), dtype=bool)
    nodes = np.array([0])
    while len(nodes := nodes[tree.left[nodes] > 0]):
        by, at, left, right = (part[nodes] for part in (tree.feature, tree.threshold, *tree[:2]))
        to_left = tree.missing_goes_left[nodes]
        for children, goes in ((left, to_left), (right, ~to_left)):
            low[children], high[children] = low[nodes], high[nodes]
            takes_missing[children] = takes_missing[nodes]
            takes_missing[children, by] &= goes
        high[left, by] = np.fmin(high[left, by], at)
        low[right, by] = np.fmax(low[right, by], at)
        if codes is not None and tree.goes_left is not None:
            is_coded = np.isnan(at)
            split, at_code = tree.goes_left[nodes[is_coded]], by[is_coded] - n_features + n_coded
            for children, goes in ((left, split), (right, ~split)):
                codes[children] = codes[nodes]
                codes[children[is_coded], at_code] &= goes
        nodes = np.concatenate([left, right])
    constant = np.zeros(tree.values.shape[1])
    every_node = Leaves(low, high, takes_missing, tree.values, constant, codes)
    return every_node[tree.left <= 0]


def _of_sklearn(tree: Any, values: np.ndarray) -> Leaves:
    nodes = _Nodes(
        tree.children_left,
        tree.children_right,
        tree.feature,
        _before_rounding(tree.threshold),
        tree.missing_go_to_left.astype(bool),
        values,
    )
    return _leaves_of_tree(nodes, tree.n_features)


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
    return joined([leaves], len(classifier.classes_))


@leaves_of.register(RandomForestClassifier)
@leaves_of.register(ExtraTreesClassifier)
def _(forest: Any) -> Leaves | None:
    trees = [member.tree_ for member in forest.estimators_]
    parts = (_of_sklearn(tree, tree.value[:, 0, :] / len(trees)) for tree in trees)
    return joined(parts, len(forest.classes_))


@leaves_of.register
def _(boosting: GradientBoostingClassifier) -> Leaves | None:
    def tree(member: Any, k: int) -> Leaves:
        values = boosting.learning_rate * member.tree_.value[:, 0, 0]
        return _of_sklearn(member.tree_, _in_column(k, values, n_classes))

    n_classes = len(boosting.classes_)
    return joined(_by_class(tree, boosting.estimators_), n_classes)


@leaves_of.register
def _(boosting: HistGradientBoostingClassifier) -> Leaves | None:
    def tree(member: Any, k: int) -> Leaves:
        nodes = member.nodes
        of_tree = _Nodes(
            np.where(nodes["is_leaf"], 0, nodes["left"]).astype(int),
            nodes["right"].astype(int),
            place[nodes["feature_idx"]],
            np.where(nodes["is_categorical"], np.nan, nodes["num_threshold"]),
            nodes["missing_go_to_left"].astype(bool),
            _in_column(k, nodes["value"], len(boosting.classes_)),
            _codes_that_go_left(member, n_codes) if coded else None,
        )
        return _leaves_of_tree(of_tree, len(place), len(coded))

    coded, encoder, n_codes = [], None, 0
    if boosting.is_categorical_ is not None:
        coded = np.flatnonzero(boosting.is_categorical_).tolist()
        encoder = boosting._preprocessor.named_transformers_["encoder"]
        n_codes = max(map(len, encoder.categories_))
    # It puts columns of categories first, as codes; here they come last.
    place = np.roll(np.arange(boosting.n_features_in_), len(coded))
    leaves = joined(_by_class(tree, boosting._predictors), len(boosting.classes_))
    return before_codes(leaves, encoder, coded) if leaves is not None and coded else leaves


def _codes_that_go_left(member: Any, n_codes: int) -> np.ndarray:
    """Return for each node of a tree of histogram boosting which codes go left."""
    bits = np.unpackbits(member.raw_left_cat_bitsets.view(np.uint8), axis=1, bitorder="little")
    goes_left = np.zeros((len(member.nodes), n_codes), dtype=bool)
    split = member.nodes["is_categorical"].astype(bool)
    goes_left[split] = bits[member.nodes["bitset_idx"][split], :n_codes]
    return goes_left


def _by_class(tree: Callable[[Any, int], Leaves], stages: Any) -> Iterator[Leaves]:
    """Yield the leaves of the trees of each stage: one for each class, or for the second of two."""
    for members in stages:
        for k, member in enumerate(members):
            yield tree(member, k if len(members) > 1 else 1)


def _in_column(k: int, values: np.ndarray, n_classes: int) -> np.ndarray:
    """Return values in the column of class k, 0 in the others."""
    return np.where(np.arange(n_classes) == k, values[:, None], 0.0)


# --- ensembles of classifiers whose own leaves are known ---------------------------------


@leaves_of.register
def _(bagging: BaggingClassifier) -> Leaves | None:
    equal = np.full(len(bagging.estimators_), 1 / len(bagging.estimators_))
    return _mean(bagging, equal, bagging.estimators_features_)


@leaves_of.register
def _(voting: VotingClassifier) -> Leaves | None:
    if voting.voting != "soft":
        return None
    n_members = len(voting.estimators_)
    weights = voting._weights_not_none or np.ones(n_members)
    every = np.arange(getattr(voting, "n_features_in_", 0))
    return _mean(voting, np.divide(weights, np.sum(weights)), [every] * n_members)


@leaves_of.register
def _(boosting: AdaBoostClassifier) -> Leaves | None:
    members, n_classes = boosting.estimators_, len(boosting.classes_)
    if not all(isinstance(member, DecisionTreeClassifier) for member in members):
        return None
    # Of fewer trees than were asked for, as when one is right about all, there are more weights.
    weights = boosting.estimator_weights_[: len(members)] / boosting.estimator_weights_.sum()
    votes = (
        _votes(member, weight, np.searchsorted(boosting.classes_, member.classes_), n_classes)
        for member, weight in zip(members, weights, strict=True)
    )
    return joined(votes, n_classes)


def _mean(ensemble: Any, weights: np.ndarray, features: Sequence[np.ndarray]) -> Leaves | None:
    """Return the leaves of a weighted mean of probabilities of members that know classes by place.

    Each member is given some of the features.
    """
    parts, n_classes = [], len(ensemble.classes_)
    for member, weight, columns in zip(ensemble.estimators_, weights, features, strict=True):
        leaves = _known(member)
        decides_otherwise = hasattr(member, "decision_function")  # than by its probabilities
        if leaves is None or leaves.encoders or decides_otherwise:
            return None
        whole = unlimited(leaves, ensemble.n_features_in_)
        limit(whole, list(columns), leaves)
        values = np.zeros((len(leaves.values), n_classes))
        values[:, np.asarray(member.classes_, dtype=int)] = weight * leaves.values
        parts.append(replace(whole, values=values))
    return joined(parts, n_classes)


def _votes(
    tree: DecisionTreeClassifier, weight: float, classes: np.ndarray, n_classes: int
) -> Leaves:
    """Return the leaves of a tree whose class gets a weight, and each other its share of -1.

    Of two classes the second gets both, as in a decision function.
    """
    leaves = leaves_of(tree)
    assert leaves is not None
    is_winner = np.arange(n_classes) == classes[leaves.values.argmax(axis=1)][:, None]
    votes = np.where(is_winner, weight, -weight / (n_classes - 1))
    if n_classes == 2:
        votes = np.stack([np.zeros(len(votes)), 2 * votes[:, 1]], axis=1)
    return replace(leaves, values=votes)


# --- what holds a classifier --------------------------------------------------------------


@leaves_of.register
def _(pipeline: Pipeline) -> Leaves | None:
    *transformers, (_, last) = pipeline.steps
    return before_steps(transformers, _known(last))


@leaves_of.register
def _(search: BaseSearchCV) -> Leaves | None:
    return _known(search.best_estimator_)


@leaves_of.register
def _(frozen: FrozenEstimator) -> Leaves | None:
    return _known(frozen.estimator)


@leaves_of.register
def _(selector: RFE) -> Leaves | None:
    leaves = _known(selector.estimator_)
    return None if leaves is None else leaves_before(selector, leaves)
