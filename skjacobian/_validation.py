"""Checks of parameters, all in one message form: Got name=value, but expected …."""

import difflib
import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, NoReturn

import numpy as np
import torch
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import _check_sample_weight


def reject(name: str, value: object, expected: str) -> NoReturn:
    """Raise the package's one form of error for a bad parameter value."""
    raise ValueError(f"Got {name}={value!r}, but expected {expected}.")


def unwrap_scalar(value: Any) -> Any:
    """Turn a number of numpy, 0-d array or tensor into one of Python; leave anything else alone."""
    if isinstance(value, np.number | np.ndarray | torch.Tensor) and value.ndim == 0:
        return value.item()
    return value


def check_number(
    name: str, value: Any, accept: Callable[[float], bool], expected: str, *, integer: bool = False
) -> float:
    """Return `value` as a Python number if it is a finite number that `accept` accepts."""
    number = unwrap_scalar(value)
    is_number = isinstance(number, Integral if integer else Real)
    if (
        not is_number
        or type(number) is bool
        or not math.isfinite(number)
        or not accept(float(number))
    ):
        reject(name, value, expected)
    return float(number)


def check_non_negative(name: str, value: Any) -> float:
    """Return `value` as a finite float >= 0, or raise."""
    return check_number(name, value, lambda v: v >= 0, "a non-negative finite number")


def check_strength(name: str, value: Any) -> float | torch.Tensor:
    """Return a tensor, one value per sample, as it is, and else a finite float >= 0, or raise."""
    return value if isinstance(value, torch.Tensor) else check_non_negative(name, value)


def check_positive(name: str, value: Any) -> float:
    """Return `value` as a finite float > 0, or raise."""
    return check_number(name, value, lambda v: v > 0, "a positive finite number")


def check_count(name: str, value: Any) -> int:
    """Return `value` as an integer >= 1, or raise."""
    return int(
        check_number(name, value, lambda v: v >= 1, "an integer of at least 1", integer=True)
    )


def check_radii(name: str, value: Any) -> np.ndarray:
    """Return radii as an array in rising order, or raise."""
    expected = "non-negative finite numbers, at least one"
    try:
        radii = np.sort(np.ravel(np.asarray(value, dtype=float)))
    except (TypeError, ValueError):
        reject(name, value, expected)
    if len(radii) == 0 or not (np.isfinite(radii) & (radii >= 0)).all():
        reject(name, value, expected)
    return radii


def check_count_or_auto(name: str, value: Any) -> int | None:
    """Return `value` as an integer >= 1, None for "auto", or raise."""
    if isinstance(value, str) and value == "auto":
        return None
    expected = "an integer of at least 1 or 'auto'"
    return int(check_number(name, value, lambda v: v >= 1, expected, integer=True))


def check_flag(name: str, value: Any) -> bool:
    """Return `value` as a bool, or raise: "no" and "False" would be taken for True."""
    flag = unwrap_scalar(value)
    if not isinstance(flag, bool | np.bool_):
        reject(name, value, "True or False")
    return bool(flag)


def check_labels(y: np.ndarray, classes: np.ndarray, expected: str) -> None:
    """Raise a ValueError that names the labels of `y` that are not among `classes`."""
    unknown = np.setdiff1d(y, classes)
    if len(unknown):
        raise ValueError(f"Got y with labels {unknown.tolist()}, but expected {expected}.")


def check_weights(sample_weight: Any, X: Any) -> np.ndarray:
    """Return weights as an array, one for each sample of `X`, not all zero; or raise."""
    try:
        np.asarray(sample_weight, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Got sample_weight of type {type(sample_weight).__name__}, but expected a number for "
            f"each sample: {error}"
        ) from error
    weight: np.ndarray = _check_sample_weight(
        unwrap_scalar(sample_weight), X, ensure_non_negative=True
    )
    # What scikit-learn lets pass: one number of any kind, before 1.9 zeros.
    if not np.isfinite(weight).all() or not weight.any():
        raise ValueError(
            f"Got sample_weight from {weight.min():g} to {weight.max():g}, but expected finite "
            "numbers, and a weight that is not zero."
        )
    return weight


def check_number_per_sample(name: str, values: Any) -> np.ndarray:
    """Return `values` as an array of floats of shape (n_samples,), or raise."""
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Got {name} that are no array of numbers: {error}.") from error
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"Got {name} of shape {array.shape}, but expected (n_samples,).")
    return array


def check_axes(ax: Any) -> None:
    """Raise unless `ax` is one matplotlib Axes, or None for new ones."""
    if ax is not None and not hasattr(ax, "plot"):
        expected = "one matplotlib Axes or None"
        raise TypeError(f"Got ax of type {type(ax).__name__}, but expected {expected}.")


def check_tensor(name: str, value: Any, instead: str) -> None:
    """Raise a TypeError unless `value` is a tensor; `instead` says what takes arrays."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"Got {name} of type {type(value).__name__}, but expected a torch.Tensor. {instead}"
        )


def check_floating(name: str, value: torch.Tensor) -> None:
    """Raise unless a tensor is of a floating type."""
    if not value.is_floating_point():
        raise ValueError(f"Got {name} of {value.dtype}, but expected floating numbers.")


def check_option(name: str, value: Any, options: Iterable[str]) -> str:
    """Return `value` if it is one of `options`, or raise with the closest option."""
    options = list(options)
    if not isinstance(value, str) or value not in options:
        reject(
            name, value, "one of " + ", ".join(map(repr, options)) + did_you_mean(value, options)
        )
    return value


def did_you_mean(word: object, options: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest of `options`, or an empty string."""
    if not isinstance(word, str):
        return ""
    lower = {option.lower(): option for option in options if isinstance(option, str)}
    close = difflib.get_close_matches(word.lower(), lower, n=1)
    return f" (did you mean {lower[close[0]]!r}?)" if close else ""


class ScalarInterval(Interval):
    """scikit-learn's `Interval` that accepts 0-d arrays, as a grid may pass them, and no bool."""

    def is_satisfied_by(self, val: Any) -> bool:
        """Tell whether `val`, or the number in it, lies in the interval."""
        number = unwrap_scalar(val)
        return not isinstance(number, bool) and bool(super().is_satisfied_by(number))
