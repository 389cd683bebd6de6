"""Valid samples as tensors: rules, the range of each feature, missing values, and gradients."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skjacobian._columns import Columns


class Box(NamedTuple):
    """The range of each feature of each sample."""

    low: Tensor
    high: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Box":
        """Return the box with both sides changed."""
        return Box(change(self.low), change(self.high))

    def of(self, index: Tensor | slice) -> "Box":
        """Return the ranges of the chosen samples."""
        return self.map(lambda side: side[index])

    def contains(self, X: Tensor) -> Tensor:
        """Tell of each sample whether it lies inside."""
        return ((self.low <= X) & (self.high >= X)).flatten(1).all(1)


@dataclass(frozen=True)
class Rules:
    """Constraints of samples as tensors; masks and numbers in the shape of one sample.

    Attributes
    ----------
    immutable, integer, increasing, decreasing : Tensor of bool
    groups : tuple of Tensor of int
        Indices of flattened features of which one is 1 and the others are 0.
    scale : Tensor or None
    bounds : pair of Tensor or None
    extends : bool
        Whether samples may lie outside `bounds`.
    """

    immutable: Tensor
    integer: Tensor
    increasing: Tensor
    decreasing: Tensor
    groups: tuple[Tensor, ...]
    scale: Tensor | None
    bounds: tuple[Tensor, Tensor] | None
    extends: bool

    @property
    def is_whole(self) -> Tensor:
        """Whether a feature is a whole number, one-hot ones included."""
        mask = self.integer.clone()
        for group in self.groups:
            mask.view(-1)[group] = True
        return mask

    def scaled(self, scale: Tensor | None) -> Tensor:
        """Return the feature scale, 0 where a feature cannot change."""
        factors = [factor for factor in (scale, self.scale) if factor is not None]
        return math.prod(factors, start=~self.immutable)

    def box(self, X: Tensor, bounds: tuple[Tensor, Tensor] | None) -> Box:
        """Return the range of the valid features around each sample."""
        infinite = torch.full_like(X, torch.inf)
        low, high = (-infinite, infinite) if bounds is None else bounds
        low, high = torch.where(self.increasing, X, low), torch.where(self.decreasing, X, high)
        for group in self.groups:
            flat_low, flat_high = _flat_view(low), _flat_view(high)
            flat_low[:, group] = flat_low[:, group].clamp(min=0.0)
            flat_high[:, group] = flat_high[:, group].clamp(max=1.0)
        whole = self.is_whole
        return Box(torch.where(whole, low.ceil(), low), torch.where(whole, high.floor(), high))

    def without_shut_groups(self, box: Box, X: Tensor) -> Box:
        """Return the box, with one point for the groups whose category cannot be left."""
        for group in self.groups:
            own = X.flatten(1)[:, group]
            stays = (box.low.flatten(1)[:, group] > 0).any(1, keepdim=True)
            for side in box:
                flat = _flat_view(side)
                flat[:, group] = torch.where(stays, own, flat[:, group])
        return box

    def nearest(self, X_adv: Tensor) -> Tensor:
        """Return the nearest samples with whole numbers, and the largest of a group as its 1."""
        valid = torch.where(self.integer, X_adv.round(), X_adv)
        flat = valid.flatten(1)
        for group in self.groups:
            of_group = X_adv.flatten(1)[:, group]
            flat[:, group] = torch.zeros_like(of_group).scatter_(
                1, of_group.argmax(1, keepdim=True), 1.0
            )
        return flat.reshape(X_adv.shape)

    def with_groups_of(self, X: Tensor, X_adv: Tensor) -> Tensor:
        """Return `X_adv` with the one-hot groups of the clean samples."""
        flat = X_adv.flatten(1).clone()
        for group in self.groups:
            flat[:, group] = X.flatten(1)[:, group]
        return flat.reshape(X_adv.shape)

    def toward(self, X: Tensor, X_adv: Tensor) -> Tensor:
        """Return whole numbers between those of `X` and of `X_adv`, and the groups of `X`.

        No farther from `X` than `X_adv` in any feature, so never outside a ball.
        """
        return self.with_groups_of(X, torch.where(self.integer, X + (X_adv - X).trunc(), X_adv))

    def hold(self, X_adv: Tensor) -> Tensor:
        """Tell of each sample whether it has whole numbers, and one 1 in each group."""
        flat = X_adv.nan_to_num(nan=0.0).flatten(1)
        whole = ((flat == flat.round()) | ~self.is_whole.flatten()).all(1)
        for group in self.groups:
            whole &= (flat[:, group].sum(1) == 1) & (flat[:, group] >= 0).all(1)
        return whole

    def check_clean(self, X: Tensor, columns: Columns) -> None:
        """Raise a ValueError unless the samples themselves are valid."""
        flat = X.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).flatten(1)
        broken = ((flat != flat.round()) & self.integer.flatten()).any(0).nonzero().flatten()
        if len(broken):
            raise ValueError(
                f"Got X with fractions in columns ({columns.shown(broken.tolist())}), but expected "
                "whole numbers: FeatureConstraints says integer."
            )
        for group in self.groups:
            ones = flat[:, group]
            wrong = (ones.sum(1) != 1) | ((ones != 0) & (ones != 1)).any(1)
            if bool(wrong.any()):
                raise ValueError(
                    f"Got X with {int(wrong.sum())} samples that are not one-hot in columns "
                    f"({columns.shown(group.tolist())}), but expected one 1 and zeros: "
                    "FeatureConstraints says one_hot."
                )


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
) -> Box | None:
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
    return Box(low, high)


def _flat_view(X: Tensor) -> Tensor:
    """Return samples as rows of features, in the same memory."""
    return X.view(len(X), math.prod(X.shape[1:]))  # of no samples, -1 would be any number
