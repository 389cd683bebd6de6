"""Evaluating a norm part by part, so that memory stays bounded."""

from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skjacobian._rng import replayed_rng
from skjacobian.jacobian._reductions import Reduction


class Linearization(Protocol):
    """The Jacobian of a model at each of some samples."""

    @property
    def logits(self) -> Tensor:
        """The logits, shape (n_samples, n_classes)."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the logits."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the logits."""

    @property
    def device(self) -> torch.device:
        """Where the logits are."""

    @property
    def convolves(self) -> bool:
        """Tell whether there are convolutions."""

    def rows(self, V: Tensor | None) -> Tensor:
        """Return the rows VJ of each sample, shape (n_samples, n_rows, n_features)."""

    def reduced(self, V: Tensor | None, reduction: Reduction) -> Tensor:
        """Return a reduction of the rows VJ of each sample, shape (n_samples,)."""

    def numbers_per_row(self) -> int:
        """Return how many numbers a row of one sample leaves behind for the backward pass."""

    def tensors(self) -> list[Tensor]:
        """Return all that the rows depend on."""

    def part(self, samples: slice, tensors: Any) -> Self:
        """Return the Jacobian at some of the samples, with other tensors in place."""


Part = tuple[slice, Tensor | None]


def cut(n_samples: int, n_rows: int, V: Tensor | None, at_once: int, rows_add: bool) -> list[Part]:
    """Return parts of samples and rows, of at most `at_once` rows each if possible.

    Each sample counts as `n_rows` rows, all classes where V is None. Rows of one sample are
    parted only where the reduction is a sum over rows.
    """
    step = max(1, at_once // n_rows)
    parts: list[Part] = []
    for start in range(0, n_samples, step):
        samples = slice(start, start + step)
        of_samples = None if V is None else V[samples]
        if at_once >= n_rows or not rows_add:
            parts.append((samples, of_samples))
            continue
        rows = torch.arange(n_rows).unsqueeze(0) if of_samples is None else of_samples
        parts += [(samples, part) for part in torch.split(rows, at_once, dim=1)]
    return parts


def reduced_in_parts(
    reduction: Reduction, linearization: Linearization, parts: list[Part], *, create_graph: bool
) -> Tensor:
    """Return the reduction of each sample, with the graph of one part at a time in memory."""
    if not create_graph:
        with torch.no_grad():
            return sum_of_parts(reduction, linearization, parts, linearization.tensors())
    with torch.enable_grad():
        values: Tensor = _InParts.apply(  # type: ignore[no-untyped-call]
            reduction, linearization, parts, *linearization.tensors()
        )
    return values


def sum_of_parts(
    reduction: Reduction, linearization: Linearization, parts: list[Part], tensors: list[Tensor]
) -> Tensor:
    """Return the reduction of each sample, without a graph."""
    values = zeros(linearization)
    for samples, V in parts:
        part = linearization.part(samples, tensors)
        values[samples] += part.reduced(_on(values, V), reduction).detach()
    return values


def zeros(linearization: Linearization) -> Tensor:
    """Return a zero for each sample."""
    return torch.zeros(
        linearization.shape[0], dtype=linearization.dtype, device=linearization.device
    )


def _on(like: Tensor, V: Tensor | None) -> Tensor | None:
    return None if V is None else V.to(like.device)


class _InParts(torch.autograd.Function):
    """A sum over parts whose gradients are taken in the forward pass, part by part.

    They are those of the plain sum over samples. A mean, the usual case, needs them times
    one number; for unequal sample weights they are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, reduction: Reduction, linearization: Any, parts: list[Part], *tensors: Tensor
    ) -> Tensor:
        with replayed_rng(linearization.device) as ctx.replay:
            values, gradients = _values_and_gradients(
                reduction, linearization, parts, tensors, None
            )
        ctx.reduction, ctx.linearization, ctx.parts = reduction, linearization, parts
        ctx.save_for_backward(*tensors)
        ctx.gradients = gradients
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
        if bool((weight == weight[0]).all()):
            gradients = [None if g is None else g * weight[0] for g in ctx.gradients]
        else:
            with ctx.replay():
                _, gradients = _values_and_gradients(
                    ctx.reduction, ctx.linearization, ctx.parts, ctx.saved_tensors, weight
                )
        return None, None, None, *gradients


def _values_and_gradients(
    reduction: Reduction,
    linearization: Linearization,
    parts: list[Part],
    tensors: tuple[Tensor, ...],
    weight: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the values, and the gradients of their (weighted) sum by the tensors."""
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    sums = [torch.zeros_like(leaf) for leaf in wanted]
    values = zeros(linearization)
    for samples, V in parts:
        with torch.enable_grad():
            value = linearization.part(samples, leaves).reduced(_on(values, V), reduction)
            total = value.sum() if weight is None else weight[samples] @ value
            gradients = torch.autograd.grad(total, wanted, allow_unused=True) if wanted else ()
        values[samples] += value.detach()
        for running, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                running += gradient
    found = iter(sums)
    return values, [next(found) if leaf.requires_grad else None for leaf in leaves]
