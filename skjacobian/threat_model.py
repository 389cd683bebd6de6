"""The units and the range of a perturbation: feature scale and bounds, as users give them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skjacobian._validation import check_option, reject

# A clean sample may exceed its bounds by this many units in the last place: scalers
# return 1.0000000000000002 for 1.
_ROUNDING_ULPS = 16


@dataclass(frozen=True)
class DataScale:
    """A feature scale computed from data, where 0 holds a feature fixed.

    What "std" and "range" become before the data is cut into batches.

    Attributes
    ----------
    values : Tensor in the shape of one sample
    """

    values: Tensor


def fit_feature_scale(feature_scale: Any, X: Tensor) -> Any:
    """Replace "std" and "range" by those of `X`; check anything else, and return it.

    Examples
    --------
    >>> import torch
    >>> fit_feature_scale("range", torch.tensor([[0.0, 1.0], [4.0, 1.0]])).values
    tensor([4., 0.])
    """
    scale = resolve_feature_scale(feature_scale, X)
    if isinstance(feature_scale, str) and scale is not None:
        return DataScale(scale)
    return feature_scale


def resolve_feature_scale(feature_scale: Any, X: Tensor) -> Tensor | None:
    """Turn `feature_scale` into a tensor of the shape of one sample, or None for 1.

    Parameters
    ----------
    feature_scale : None, "std", "range", array of shape (n_features,) or DataScale
        "std" and "range" are those of `X`; a feature that is constant in `X` then gets
        scale 0 and is held fixed.
    X : Tensor of shape (n_samples, *features)

    Raises
    ------
    ValueError
        For an unknown name, a wrong length, or a given scale that is not positive.

    Examples
    --------
    >>> import torch
    >>> resolve_feature_scale("range", torch.tensor([[0.0, 1.0], [4.0, 1.0]]))
    tensor([4., 0.])
    """
    if feature_scale is None:
        return None
    if isinstance(feature_scale, DataScale):
        return feature_scale.values.to(X)
    if isinstance(feature_scale, str):
        check_option("feature_scale", feature_scale, ["std", "range"])
        return X.std(0, correction=0) if feature_scale == "std" else X.amax(0) - X.amin(0)
    scale = _per_feature("feature_scale", feature_scale, X)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        reject("feature_scale", feature_scale, "positive finite numbers")
    return scale.to(X.device)


def resolve_bounds(bounds: Any, X: Tensor) -> tuple[Tensor, Tensor] | None:
    """Turn `bounds` into two tensors that broadcast over `X`, or None for unbounded.

    Parameters
    ----------
    bounds : None or (low, high)
        Each a number or an array with one value per feature; infinities are allowed.
    X : Tensor of shape (n_samples, *features)

    Raises
    ------
    ValueError
        If `bounds` is not such a pair, has a wrong length, or low exceeds high.
    """
    if bounds is None:
        return None
    expected = "None or a pair (low, high) of numbers or per-feature arrays with low <= high"
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        reject("bounds", bounds, expected)
    low, high = (_per_feature("bounds", side, X) for side in bounds)
    if not bool((low <= high).all()):
        reject("bounds", bounds, expected)
    return low.to(X.device), high.to(X.device)


def _per_feature(name: str, value: Any, X: Tensor) -> Tensor:
    """Return `value` as a CPU tensor that broadcasts over a sample of `X`."""
    try:
        tensor = torch.as_tensor(np.asarray(value, dtype=np.float64), dtype=X.dtype)
    except (TypeError, ValueError):
        reject(name, value, "numbers")
    n_features = X[0].numel() if len(X) else int(np.prod(X.shape[1:]))
    if tensor.numel() == 1:
        return tensor.reshape(())
    if tensor.numel() != n_features:
        raise ValueError(
            f"Got {name} with {tensor.numel()} values, but expected one number or one value "
            f"for each of the {n_features} features."
        )
    return tensor.reshape(X.shape[1:])


def check_inside(X: Tensor, bounds: tuple[Tensor, Tensor] | None) -> None:
    """Raise a ValueError unless every sample of `X` lies inside `bounds`, up to rounding."""
    if bounds is None or X.numel() == 0:
        return
    low, high = bounds
    if bool(((low - X).amax() <= 0) & ((X - high).amax() <= 0)):
        return
    excess = torch.maximum(low - X, X - high)
    ulps = _ROUNDING_ULPS * torch.finfo(X.dtype).eps
    outside = (excess > ulps * X.abs().clamp(min=1.0)).flatten(1).any(1)
    if bool(outside.any()):
        shown = tuple(round(float(b.min() if b is low else b.max()), 6) for b in bounds)
        raise ValueError(
            f"Got X with {int(outside.sum())} of {len(X)} samples outside bounds={shown}, by up "
            f"to {float(excess.max()):.4g}, but expected every clean sample inside its bounds. "
            "Bounds are in the units of the array that is attacked."
        )
