"""From the rows of each sample's Jacobian to its norm, and back."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Reduction(ABC):
    """A function of the rows (n_samples, n_rows, n_features) of each sample.

    Attributes
    ----------
    adds_rows : bool
        Whether it is a sum of terms of one row each.
    """

    adds_rows = True

    @abstractmethod
    def __call__(self, rows: Tensor) -> Tensor:
        """Return the value at each sample, shape (n_samples,)."""

    @abstractmethod
    def gradient(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient by the rows of Σ weight · value; shape of the rows."""


class SquaredLength(Reduction):
    """Σ_kj J_kj²."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Return Σ_kj J_kj²."""
        flat = rows.flatten(1)
        return torch.linalg.vecdot(flat, flat)

    def gradient(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Return 2 J."""
        return rows * (2 * weight).reshape(-1, 1, 1)


class Entries(Reduction):
    """Σ_kj |J_kj|, with gradient 0 at 0."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Return Σ_kj |J_kj|."""
        return torch.linalg.vector_norm(rows.flatten(1), 1, dim=1)

    def gradient(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Return sign J."""
        return rows.sign().mul_(weight.reshape(-1, 1, 1))


class Columns(Reduction):
    """Σ_j ‖J_·j‖₂, with gradient 0 at a column of zeros, where the norm has a kink."""

    adds_rows = False

    def __call__(self, rows: Tensor) -> Tensor:
        """Return Σ_j ‖J_·j‖₂."""
        return torch.linalg.vector_norm(rows, dim=1).sum(1)

    def gradient(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Return J_kj / ‖J_·j‖₂."""
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows * (weight.reshape(-1, 1, 1) / norms.masked_fill(norms == 0, torch.inf))


class Length(Reduction):
    """‖J‖_F, with gradient 0 at J = 0, where the norm has a kink."""

    adds_rows = False

    def __call__(self, rows: Tensor) -> Tensor:
        """Return ‖J‖_F."""
        return torch.linalg.vector_norm(rows.flatten(1), dim=1)

    def gradient(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Return J / ‖J‖_F."""
        norms = self(rows)
        return rows * (weight / norms.masked_fill(norms == 0, torch.inf)).reshape(-1, 1, 1)


SQUARED_LENGTH = SquaredLength()
ENTRIES = Entries()
COLUMNS = Columns()
LENGTH = Length()
