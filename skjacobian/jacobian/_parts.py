"""Evaluating a norm part by part, so that memory stays bounded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skjacobian._rng import replayed_rng
from skjacobian.jacobian._linearization import Linearization
from skjacobian.jacobian._reductions import Reduction

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
    tensors = linearization.tensors()
    if not create_graph:
        constants = [tensor.detach() for tensor in tensors]
        return _values_and_gradients(reduction, linearization, parts, constants, None)[0]
    with torch.enable_grad():
        values: Tensor = _InParts.apply(  # type: ignore[no-untyped-call]
            reduction, linearization, parts, *tensors
        )
    return values


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
    tensors: Sequence[Tensor],
    weight: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the values, and the gradients of their (weighted) sum by the tensors."""
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    sums = [torch.zeros_like(leaf) for leaf in wanted]
    values = torch.zeros(
        linearization.shape[0], dtype=linearization.dtype, device=linearization.device
    )
    for samples, V in parts:
        with torch.enable_grad():
            value = linearization.part(samples, leaves).reduced(_on(values, V), reduction)
            total = value.sum() if weight is None else weight[samples] @ value
            gradients: Sequence[Tensor | None] = [None] * len(wanted)
            if wanted and total.requires_grad:
                gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        values[samples] += value.detach()
        for running, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                running += gradient
    found = iter(sums)
    return values, [next(found) if leaf.requires_grad else None for leaf in leaves]
