"""What an adversary may change, as users say it: feature scale, mutable features, bounds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skjacobian._columns import Columns
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
    >>> X = torch.tensor([[0.0, 1.0, 2.0], [4.0, 1.0, 5.0]])
    >>> fit_feature_scale("range", X).values
    tensor([4., 0., 3.])
    """
    scale = resolve_feature_scale(feature_scale, X)
    if scale is not None and isinstance(feature_scale, str):
        return DataScale(scale)
    return feature_scale


def resolve_feature_scale(feature_scale: Any, X: Tensor, mutable: Any = None) -> Tensor | None:
    """Turn `feature_scale` into a tensor of the shape of one sample, or None for 1.

    Parameters
    ----------
    feature_scale : None, "std", "range", array of shape (n_features,) or DataScale
        "std" and "range" are those of `X`; a feature that is constant in `X` then gets
        scale 0 and is held fixed.
    X : Tensor of shape (n_samples, *features)
    mutable : None, int, or array-like of int or bool, default=None
        The features that may change, as `resolve_mutable` takes them; all others get scale
        0 and are held fixed.

    Raises
    ------
    ValueError
        For an unknown name, a wrong length, or a given scale that is not positive.

    Examples
    --------
    >>> import torch
    >>> X = torch.tensor([[0.0, 1.0, 2.0], [4.0, 1.0, 5.0]])
    >>> resolve_feature_scale("range", X)
    tensor([4., 0., 3.])
    >>> resolve_feature_scale("range", X, mutable=[0, 1])
    tensor([4., 0., 0.])
    """
    scale = _resolve_scale(feature_scale, X)
    mask = resolve_mutable(mutable, X)
    if mask is None:
        return scale
    return mask.to(X.dtype) if scale is None else scale * mask


def _resolve_scale(feature_scale: Any, X: Tensor) -> Tensor | None:
    if feature_scale is None:
        return None
    if isinstance(feature_scale, DataScale):
        return feature_scale.values.to(X)
    if isinstance(feature_scale, str):
        check_option("feature_scale", feature_scale, ["std", "range"])
        return _std(X) if feature_scale == "std" else _range(X)
    scale = _per_feature("feature_scale", feature_scale, X)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        reject("feature_scale", feature_scale, "positive finite numbers")
    return scale.to(X.device).expand(X.shape[1:])


def _std(X: Tensor) -> Tensor:
    """Return the standard deviation of each feature, missing values left out."""
    if bool(X.isnan().any()):
        std = (X - X.nanmean(0)).square_().nanmean(0).sqrt_()
    else:
        std = X.std(0, correction=0)
    # Of equal numbers the mean may be another by rounding.
    return std.where(_range(X) > 0, 0.0)


def _range(X: Tensor) -> Tensor:
    """Return the range of each feature, missing values left out."""
    missing = X.isnan()
    low, high = (X.masked_fill(missing, end) for end in (torch.inf, -torch.inf))
    return (high.amax(0) - low.amin(0)).clamp_(min=0.0)


def resolve_mutable(mutable: Any, X: Tensor, names: list[Any] | None = None) -> Tensor | None:
    """Turn `mutable` into a mask of the shape of one sample, or None for all features.

    Parameters
    ----------
    mutable : None, str, int, or array-like of str, int or bool
        The features that an adversary may change, as `Columns` takes them.
    X : Tensor of shape (n_samples, *features)
    names : list, optional
        Of the columns.

    Returns
    -------
    Tensor of bool in the shape of one sample, or None

    Raises
    ------
    ValueError
        For anything else, and where no feature is left to change.

    Examples
    --------
    >>> import torch
    >>> resolve_mutable([0, -1], torch.zeros(5, 3))
    tensor([ True, False,  True])
    >>> resolve_mutable("age", torch.zeros(5, 2), ["sex", "age"])
    tensor([False,  True])
    """
    if mutable is None:
        return None
    mask = Columns(X.shape[1:], names).mask("mutable", mutable)
    if not mask.any():
        reject("mutable", mutable, "at least one column of X, or None for all")
    return torch.from_numpy(mask).to(X.device)


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
    expected = (
        "None or a tuple (low, high) of numbers or per-feature arrays with low <= high (-inf and "
        "inf for none)"
    )
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        reject("bounds", bounds, expected + _by_column(bounds))
    exact = X.new_empty((0, *X.shape[1:]), dtype=torch.float64)
    low, high = (_per_feature("bounds", side, exact) for side in bounds)
    if not bool((low <= high).all()):
        reject("bounds", bounds, expected)
    return inward(low, high, X)


def inward(low: Tensor, high: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Return float64 bounds in the dtype of `X`, rounded inward so that they are kept."""
    lower, upper = low.to(X.dtype), high.to(X.dtype)
    up = lower.nextafter(torch.full_like(lower, torch.inf))
    down = upper.nextafter(torch.full_like(upper, -torch.inf))
    lower = torch.where(lower.double() < low, up, lower)
    upper = torch.where(upper.double() > high, down, upper)
    return lower.to(X.device), upper.to(X.device)


def without_shut(
    scale: Tensor | None, bounds: tuple[Tensor, Tensor] | None, X: Tensor
) -> Tensor | None:
    """Return the feature scale, 0 where the bounds leave a feature one value.

    Else the gradient there, which nothing can follow, would count in the length of an l2 step.
    """
    if bounds is None or bounds[0].ndim == bounds[1].ndim == 0:
        return scale
    is_open = bounds[0] < bounds[1]
    if not is_open.is_cuda and bool(is_open.all()):  # a card would wait to be asked
        return scale
    return is_open.to(X.dtype) if scale is None else scale * is_open


def _by_column(value: Any) -> str:
    """Return what takes values of some columns, where that is what was given."""
    is_mapping = isinstance(value, Mapping)
    return "; FeatureConstraints takes the scale and range of some columns" if is_mapping else ""


def _per_feature(name: str, value: Any, X: Tensor) -> Tensor:
    """Return `value` as a CPU tensor that broadcasts over a sample of `X`."""
    try:
        given = np.asarray(value)
        # A copy, for arrays that nobody may write to.
        tensor = torch.tensor(given.astype(np.float64), dtype=X.dtype)
    except (TypeError, ValueError):
        reject(name, value, "numbers" + _by_column(value))
    if given.dtype.kind in "SU":
        reject(name, value, "numbers, not strings")
    if tensor.numel() == 1:
        return tensor.reshape(())
    shape = X.shape[1:]
    if tensor.ndim == len(shape) > 1 and all(
        n in (1, of) for n, of in zip(tensor.shape, shape, strict=True)
    ):
        return tensor.expand(shape)
    if tensor.numel() != shape.numel():
        broadcast = f", or a shape that broadcasts to {tuple(shape)}" if len(shape) > 1 else ""
        raise ValueError(
            f"Got {name} with {tensor.numel()} values, but expected one number or one value "
            f"for each of the {shape.numel()} features{broadcast}."
        )
    return tensor.reshape(shape)


def outside(X: Tensor, bounds: tuple[Tensor, Tensor] | None) -> Tensor:
    """Tell which samples lie outside their bounds, by more than rounding."""
    if bounds is None or X.numel() == 0:
        return torch.zeros(len(X), dtype=torch.bool, device=X.device)
    excess = torch.maximum(bounds[0] - X, X - bounds[1])
    ulps = _ROUNDING_ULPS * torch.finfo(X.dtype).eps
    return (excess > ulps * X.abs().clamp(min=1.0)).flatten(1).any(1)


def check_inside(
    X: Tensor, bounds: tuple[Tensor, Tensor] | None, columns: Columns | None = None
) -> None:
    """Raise a ValueError unless every sample of `X` lies inside `bounds`, up to rounding."""
    if bounds is None or X.numel() == 0:
        return
    low, high = bounds
    if bool(((X.amin(0) >= low) & (X.amax(0) <= high)).all()):
        return
    is_outside = outside(X, bounds)
    if bool(is_outside.any()):
        excess = torch.maximum(low - X, X - high).nan_to_num(nan=0.0)[is_outside]
        shown = f"bounds={tuple(round(float(side.max()), 6) for side in bounds)}"
        if low.numel() > 1 or high.numel() > 1:
            broken = (excess > 0).flatten(1).any(0).nonzero().flatten().tolist()
            shown = f"the bounds of columns ({(columns or Columns(X.shape[1:])).shown(broken)})"
        raise ValueError(
            f"Got X with {int(is_outside.sum())} of {len(X)} samples outside {shown}, by "
            f"up to {float(excess.max()):.4g}, but expected every clean sample inside its bounds. "
            "Bounds are in the units of the array that is attacked; "
            "FeatureConstraints(bounds='train') lets a sample outside go no farther out."
        )
