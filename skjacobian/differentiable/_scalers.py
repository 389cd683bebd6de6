"""The views of scalers: affine maps of each feature, and rows scaled to norm 1."""

from typing import Any

import torch
from sklearn.preprocessing import (
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    RobustScaler,
    StandardScaler,
)
from torch import Tensor

from skjacobian.differentiable._registry import View, view_of


class Affine(View):
    """x ↦ (x - before)·scale + after, then clipped where there is a range; per feature."""

    before: Tensor
    scale: Tensor
    after: Tensor

    def __init__(
        self,
        before: Any = 0.0,
        scale: Any = 1.0,
        after: Any = 0.0,
        clip: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.hold(before=before, scale=scale, after=after)
        self.clip = clip

    def forward(self, X: Tensor) -> Tensor:
        """Return the scaled `X`, in its own dtype."""
        X = (X - self.before.to(X)) * self.scale.to(X) + self.after.to(X)
        return X if self.clip is None else torch.clamp(X, *self.clip)


class UnitRows(View):
    """x ↦ x / ‖x‖, in its own dtype; a row of norm 0 stays, as in scikit-learn."""

    def __init__(self, order: float = 2) -> None:
        super().__init__()
        self.order = order

    def forward(self, X: Tensor) -> Tensor:
        """Return the rows of `X`, of norm 1."""
        norms = torch.linalg.vector_norm(X, ord=self.order, dim=1, keepdim=True)
        # The bound below which sklearn.preprocessing.normalize takes a norm for 0.
        is_zero = norms < 10 * torch.finfo(X.dtype).eps
        return X / torch.where(is_zero, 1.0, norms)


@view_of(StandardScaler, settings=("copy", "with_mean", "with_std"))
def _(scaler: StandardScaler) -> View:
    before = scaler.mean_ if scaler.with_mean else 0.0
    return Affine(before=before, scale=1 / scaler.scale_ if scaler.with_std else 1.0)


@view_of(MinMaxScaler, settings=("feature_range", "copy", "clip"))
def _(scaler: MinMaxScaler) -> View:
    clip = tuple(scaler.feature_range) if scaler.clip else None
    return Affine(scale=scaler.scale_, after=scaler.min_, clip=clip)


@view_of(MaxAbsScaler, settings=("copy", "clip"))
def _(scaler: MaxAbsScaler) -> View:
    clip = (-1.0, 1.0) if getattr(scaler, "clip", False) else None
    return Affine(scale=1 / scaler.scale_, clip=clip)


@view_of(
    RobustScaler,
    settings=("with_centering", "with_scaling", "quantile_range", "copy", "unit_variance"),
)
def _(scaler: RobustScaler) -> View:
    before = scaler.center_ if scaler.with_centering else 0.0
    return Affine(before=before, scale=1 / scaler.scale_ if scaler.with_scaling else 1.0)


@view_of(Normalizer, settings=("norm", "copy"))
def _(normalizer: Normalizer) -> View:
    return UnitRows({"l1": 1, "l2": 2, "max": torch.inf}[normalizer.norm])
