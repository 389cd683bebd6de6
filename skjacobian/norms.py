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
    if norm == "l2":
        return torch.linalg.vector_norm(X.flatten(1), dim=1)
    flat = X.flatten(1)  # on the CPU these are several times as fast as linalg.vector_norm
    if norm == "l1":
        return flat.abs().sum(1)
    return torch.maximum(flat.amax(1).abs(), flat.amin(1).abs())


def unit_rows(G: Tensor) -> Tensor:
    """Divide each row by its l2 norm, safely for tiny and huge rows; a zero row stays zero."""
    flat = G.flatten(1)
    if G.is_cuda:  # which would wait to be asked
        return _unit_by_largest(flat).reshape(G.shape)
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    unit = flat * length.reciprocal()
    limits = torch.finfo(G.dtype)
    rounded = (length * limits.eps < limits.tiny**0.5) | ~(length < limits.eps * limits.max**0.5)
    if bool(rounded.any()):
        unit = torch.where(rounded, _unit_by_largest(flat), unit)
    return unit.reshape(G.shape)


def _unit_by_largest(flat: Tensor) -> Tensor:
    """Divide by the largest entry first: squares of tiny ones vanish, of huge ones overflow."""
    largest = flat.abs().amax(1, keepdim=True)
    flat = flat / largest.where(largest > 0, 1.0)
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return flat.mul_(length.where(length > 0, 1.0).reciprocal_())
