"""Accuracies of the classes, and averages over them."""

from typing import Any

import numpy as np

AVERAGES = ("mean", "worst_class", "tail30", "disparity")


def class_accuracies(right: np.ndarray, y: np.ndarray, weight: Any = None) -> dict[Any, float]:
    """Return the accuracy of each class that occurs in `y`."""
    chosen = {label: y == label for label in np.unique(y)}
    return {
        label: _share(right[of_class], None if weight is None else weight[of_class])
        for label, of_class in chosen.items()
        if weight is None or weight[of_class].sum() > 0
    }


def average_accuracy(right: np.ndarray, y: np.ndarray, weight: Any, average: str) -> float:
    """Return the accuracy over all samples, or what `average` makes of that of the classes."""
    if average == "mean":
        return _share(right, weight)
    accuracies = np.sort(list(class_accuracies(right, y, weight).values()))
    if average == "worst_class":
        return float(accuracies[0])
    if average == "disparity":
        return float(accuracies[0] - accuracies[-1]) if len(accuracies) > 1 else float("nan")
    n_worst = int(np.ceil(0.3 * len(accuracies)))
    return float(accuracies[:n_worst].mean())


def _share(right: np.ndarray, weight: np.ndarray | None) -> float:
    return float(np.average(right, weights=weight))
