"""The views of transformers that treat each feature by itself."""

from typing import Any

import torch
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler
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
