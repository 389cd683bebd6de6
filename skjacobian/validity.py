"""The range of valid features of each sample, missing values, and gradients past rounding."""

from typing import Any

import torch
from torch import Tensor

from skjacobian.constraints import Rules


class PassThrough(torch.autograd.Function):
    """Another tensor in the place of X, with the gradient of X; 0 where a value is missing."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, valid: Tensor, missing: Tensor | None) -> Tensor:
        """Return the other tensor."""
        ctx.missing = missing
        return valid.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient as it comes."""
        if ctx.missing is not None:
            gradient = torch.where(ctx.missing, 0.0, gradient)
        return gradient, None, None


def without_missing(X: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return samples with 0 in the place of NaN, and where that is; None for nowhere."""
    if not bool(X.sum().isnan()):  # a sum is faster than a look at each value
        return X, None
    missing = X.isnan()
    return torch.where(missing, 0.0, X), missing


def valid_range(
    X: Tensor,
    bounds: tuple[Tensor, Tensor] | None,
    rules: Rules | None = None,
    missing: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Return the range of the valid features around each sample, None for unbounded ones."""
    if bounds is None and rules is None and missing is None:
        return None
    infinite = X.new_tensor(torch.inf)
    low, high = (-infinite, infinite) if bounds is None else bounds
    if rules is not None:
        low, high = rules.box(X, bounds)
    # A sample that rounding put past its bound keeps its own value as the bound.
    low, high = torch.minimum(low, X), torch.maximum(high, X)
    if missing is not None:
        low, high = torch.where(missing, X, low), torch.where(missing, X, high)
    return low, high
