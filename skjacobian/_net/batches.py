"""Training data as tensors, served in whole batches."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Samples, class indices and weights as tensors, moved once to where they are used.

    Parameters
    ----------
    X : Tensor of shape (n_samples, *features)
    y : Tensor of shape (n_samples,)
    sample_weight : Tensor of shape (n_samples,), optional
    """

    def __init__(self, X: Tensor, y: Tensor, sample_weight: Tensor | None = None) -> None:
        self.X = X
        self.y = y
        self.sample_weight = sample_weight

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.X[index], self.y[index]


class Batch(tuple[Tensor, Tensor]):
    """A pair (X, y), as skorch and its callbacks expect, that carries sample weights."""

    sample_weight: Tensor | None = None


def n_batches(n_samples: int, batch_size: int) -> int:
    """Return how many batches samples make; a last one of a single sample joins another.

    Batch normalization cannot be trained on a single sample.

    Examples
    --------
    >>> n_batches(96, 32), n_batches(97, 32), n_batches(98, 32)
    (3, 3, 4)
    """
    n_full, rest = divmod(n_samples, batch_size)
    return n_full + (rest > (1 if n_full else 0))


class Batches:
    """Serves whole batches by index, which costs a third of fetching row by row.

    Parameters
    ----------
    dataset : Samples
    batch_size : int
    shuffle : bool, default=False
    drop_last : bool, default=False
        Leave out what does not fill a batch.
    generator : torch.Generator, optional
        Source of the order; needed to shuffle.
    """

    def __init__(
        self,
        dataset: Samples,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.generator = generator

    def __len__(self) -> int:
        if self.drop_last:
            return len(self.dataset) // self.batch_size
        return n_batches(len(self.dataset), self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        X, y, weight = self.dataset.X, self.dataset.y, self.dataset.sample_weight
        n_samples = len(self.dataset)
        order = (
            torch.randperm(n_samples, generator=self.generator)
            if self.shuffle
            else torch.arange(n_samples)
        ).to(X.device)
        n_served = len(self) * self.batch_size if self.drop_last else n_samples
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        for start, end in pairwise((*starts, n_served)):
            index = order[start:end]
            batch = Batch((X.index_select(0, index), y.index_select(0, index)))
            batch.sample_weight = None if weight is None else weight.index_select(0, index)
            yield batch
