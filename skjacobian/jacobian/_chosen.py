"""Samples chosen from a batch, by their indices: taking what is theirs, and putting it back."""

from torch import Tensor

# None is all, without a copy.
Index = Tensor | None


def n_chosen(n_samples: int, index: Index) -> int:
    """Return how many samples are chosen."""
    return n_samples if index is None else len(index)


def at(tensor: Tensor, index: Index) -> Tensor:
    """Return what a tensor holds of the samples chosen."""
    return tensor if index is None else tensor.index_select(0, index)


def spread(values: Tensor, index: Index, n_samples: int) -> Tensor:
    """Return values of the samples chosen in their places, and 0 in those of the others.

    Examples
    --------
    >>> import torch
    >>> spread(torch.tensor([5.0, 7.0]), torch.tensor([2, 1]), n_samples=4)
    tensor([0., 7., 5., 0.])
    """
    return values if index is None else values.new_zeros(n_samples).index_copy(0, index, values)
