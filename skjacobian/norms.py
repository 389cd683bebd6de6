"""Norms of samples, row by row: a sample is a row, its features may have any shape."""

import torch
from torch import Tensor


def rows(value: Tensor, like: Tensor) -> Tensor:
    """Shape one value per sample so that it broadcasts over the features of `like`."""
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim == 1 else value


def vector_norm(X: Tensor, norm: str) -> Tensor:
    """Return the l1, l2 or linf norm of each row of `X`, shape (n_samples,).

    Examples
    --------
    >>> import torch
    >>> vector_norm(torch.tensor([[3.0, -4.0]]), "l2")
    tensor([5.])
    """
    flat = X.flatten(1)
    if norm == "l2":
        length = torch.linalg.vector_norm(flat, dim=1)
        if _are_exact(length):
            return length
        scaled, largest = _over_largest(flat)
        exact = torch.linalg.vector_norm(scaled, dim=1) * largest.squeeze(1)
        # Of an infinite entry the norm is infinite, and was.
        return torch.where(_is_rounded(length) & ~exact.isnan(), exact, length)
    # On the CPU these are several times as fast as linalg.vector_norm.
    if norm == "l1":
        return flat.abs().sum(1)
    return torch.maximum(flat.amax(1).abs(), flat.amin(1).abs())


def unit_rows(G: Tensor) -> Tensor:
    """Divide each row by its l2 norm, safely for tiny and huge rows; a zero row stays zero."""
    flat = G.flatten(1)
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    unit = flat * length.reciprocal()
    if not _are_exact(length):
        scaled, _ = _over_largest(flat)
        length_scaled = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
        exact = scaled.mul_(length_scaled.where(length_scaled > 0, 1.0).reciprocal_())
        unit = torch.where(_is_rounded(length), exact, unit)
    return unit.reshape(G.shape)


def _are_exact(length: Tensor) -> bool:
    """Tell whether no l2 norm is inexact; a card is not asked, which would have to wait."""
    if length.is_cuda:
        return False
    if length.numel() == 0:
        return True
    least, largest = _exact_range(length.dtype)
    # Two numbers, where `_is_rounded` makes three masks.
    low, high = length.aminmax()
    return least <= low.item() and high.item() < largest


def _is_rounded(length: Tensor) -> Tensor:
    """Tell which l2 norms are inexact: squares of tiny numbers vanish, of huge ones overflow."""
    least, largest = _exact_range(length.dtype)
    return ~((length >= least) & (length < largest))


def _exact_range(dtype: torch.dtype) -> tuple[float, float]:
    limits = torch.finfo(dtype)
    return limits.tiny**0.5 / limits.eps, limits.eps * limits.max**0.5


def _over_largest(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows over their largest entries, and these, shape (n_samples, 1)."""
    largest = flat.abs().amax(1, keepdim=True)
    return flat / largest.where(largest > 0, 1.0), largest
