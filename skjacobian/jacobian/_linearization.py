"""What the engines have in common: the Jacobian of a model at each of some samples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from skjacobian.jacobian._reductions import Reduction


class Linearization(ABC):
    """The Jacobian of a model at each of some samples.

    Parameters
    ----------
    logits : Tensor of shape (n_samples, n_classes)
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    @property
    def logits(self) -> Tensor:
        """The logits, shape (n_samples, n_classes)."""
        return self._logits

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the logits, which may come cheaper than the logits."""
        return len(self.logits), self._logits.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the logits."""
        return self._logits.dtype

    @property
    def device(self) -> torch.device:
        """Where the logits are."""
        return self._logits.device

    @property
    @abstractmethod
    def convolves(self) -> bool:
        """Tell whether there are convolutions."""

    @abstractmethod
    def rows(self, V: Tensor | None) -> Tensor:
        """Return the rows VJ of each sample, shape (n_samples, n_rows, n_features).

        Parameters
        ----------
        V : Tensor or None
            Cotangents, (n_samples, n_rows, n_classes); or class indices, (n_samples,
            n_rows), which may be the same for all samples, (1, n_rows); None is all
            classes.
        """

    @abstractmethod
    def reduced(self, V: Tensor | None, reduction: Reduction) -> Tensor:
        """Return a reduction of the rows VJ of each sample, shape (n_samples,)."""

    @abstractmethod
    def numbers_per_row(self) -> int:
        """Return how many numbers a row of one sample leaves behind for the backward pass."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Return all that the rows depend on."""

    @abstractmethod
    def part(self, samples: slice, tensors: Sequence[Tensor]) -> Self:
        """Return the Jacobian at some of the samples, with other tensors in place."""
