"""What is attacked of an estimator, its torch view or a black box, and what it must have for it."""

from numbers import Real
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from skjacobian._table import Table
from skjacobian.differentiable import (
    BlackBox,
    TensorFunction,
    as_torch,
    bind_samples,
    black_box,
    methods_of,
)
from skjacobian.exceptions import NotDifferentiableError


def attacked_view(estimator: Any, table: Table, needs: str) -> tuple[TensorFunction, str | None]:
    """Return what an attack that needs so much attacks, and by which method if a black box."""
    try:
        view = as_torch(estimator)
        bind_samples(view, table)
    except NotDifferentiableError:
        check_is_fitted(estimator)
        check_has(estimator, "classes_")
        if needs == "gradients":
            raise
        return _black_box_that_decides(estimator, table)
    return view, None


def _black_box_that_decides(estimator: Any, table: Table) -> tuple[BlackBox, str]:
    """Return the scores of a classifier whose largest is what it predicts, and their method.

    A `predict` with a threshold of its own does not follow the probabilities.
    """
    methods = methods_of(estimator)
    predicted, again = (np.asarray(estimator.predict(table.X)) for _ in range(2))
    if not np.array_equal(predicted, again):  # at random, which says nothing of the scores
        return black_box(estimator, table, methods[0]), methods[0]
    for method in methods[:-1]:
        view = black_box(estimator, table, method)
        largest = np.asarray(estimator.classes_)[view(table.tensor).argmax(1).numpy()]
        if np.array_equal(largest, predicted):
            return view, method
    return black_box(estimator, table, methods[-1]), methods[-1]


def check_has(estimator: Any, name: str) -> None:
    """Raise if an estimator cannot be asked for a class."""
    if not hasattr(estimator, name):
        raise TypeError(
            f"Got an estimator of type {type(estimator).__name__} without {name}, but "
            "expected a fitted classifier, which has predict and classes_."
        )


def check_has_one_output(estimator: Any) -> None:
    """Raise if an estimator has classes for each of several outputs."""
    classes = getattr(estimator, "classes_", ())
    if isinstance(classes, list) and any(np.ndim(labels) for labels in classes):
        raise TypeError(
            f"Got an estimator of type {type(estimator).__name__} with classes for each of "
            f"{len(classes)} outputs, but expected a classifier with one."
        )


def check_kind_of_labels(y: np.ndarray, classes: Any) -> None:
    """Raise for labels that no class can be: strings for numbers, fractions, None."""
    known = np.ravel(classes).tolist()
    kinds = {_kind_of_label(label) for label in known}
    for given in dict.fromkeys(y.tolist()):
        if _kind_of_label(given) not in kinds:
            raise ValueError(
                f"Got y with labels like {given!r}, but expected those that the classifier was "
                f"fitted on, like {known[0]!r}."
            )


def _kind_of_label(label: Any) -> str:
    """Return what a label is; whole numbers are equal whatever their types."""
    if isinstance(label, Real | np.bool_):
        return "whole number" if float(label).is_integer() else "fraction"
    return "string" if isinstance(label, str) else type(label).__name__
