"""The leaves of decision trees as boxes, and how far samples are from them."""

import numpy as np


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
