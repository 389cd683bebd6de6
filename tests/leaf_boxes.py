"""The leaves of decision trees as boxes: how far samples are from them, and what attacks get."""

import numpy as np

from skjacobian._table import Table
from skjacobian.differentiable import black_box


def known(classifier, X):
    """The leaves that an attack on a fitted classifier gets."""
    return black_box(classifier, Table(X)).leaves


def scores(classifier, X):
    """What leaves add up to: a column for each class."""
    method = "decision_function" if hasattr(classifier, "decision_function") else "predict_proba"
    values = getattr(classifier, method)(X)
    return values if values.ndim == 2 else np.stack([0 * values, values], 1)


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def leaves(tree, n_features):
    """Yield the box of each leaf of a tree, and the class that it predicts."""
    nodes = [(0, np.full(n_features, -np.inf), np.full(n_features, np.inf))]
    while nodes:
        node, low, high = nodes.pop()
        left, feature = tree.tree_.children_left[node], tree.tree_.feature[node]
        if left < 0:
            yield low, high, tree.classes_[tree.tree_.value[node].argmax()]
            continue
        below, above = high.copy(), low.copy()
        below[feature] = min(high[feature], tree.tree_.threshold[node])
        above[feature] = max(low[feature], tree.tree_.threshold[node])
        nodes += [
            (left, low, below),
            (tree.tree_.children_right[node], above, high),
        ]


def distance_to_leaves(tree, X, y, norm, unit=1.0):
    """The distance of each sample to the nearest leaf of another class: exact."""
    nearest = np.full(len(X), np.inf)
    for low, high, label in leaves(tree, X.shape[1]):
        delta = (np.clip(X, low, high) - X) / unit
        length = np.linalg.norm(delta, {"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=1)
        nearest = np.where(y != label, np.minimum(nearest, length), nearest)
    return nearest
