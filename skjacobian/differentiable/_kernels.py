"""The pairwise kernels of scikit-learn in torch, and the views of kernel feature maps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skjacobian.differentiable._registry import as_precise_as
from skjacobian.exceptions import NotDifferentiableError

Kernel = Callable[[Tensor, Tensor], Tensor]


def kernel_function(
    name: Any, *, gamma: float | None = None, degree: float = 3, coef0: float = 1
) -> Kernel:
    """Return a pairwise kernel of scikit-learn as a function of two tensors, which pickles.

    Parameters
    ----------
    name : {"linear", "poly", "polynomial", "rbf", "sigmoid", "cosine", "laplacian"}
        As in `sklearn.metrics.pairwise.pairwise_kernels`.
    gamma : float, optional
        Of all but "linear" and "cosine", which ignore it. None means 1 / n_features.
    degree : float
        Of "poly", and ignored by the others.
    coef0 : float
        Of "poly" and "sigmoid", and ignored by the others.

    Returns
    -------
    callable
        From `X` of shape (n, n_features) and `Z` of shape (m, n_features) to the kernel of
        each pair, of shape (n, m), in the wider type of both.

    Raises
    ------
    NotDifferentiableError
        For any other kernel.
    """
    kernels: dict[Any, Kernel] = {
        "linear": _linear,
        "poly": partial(_polynomial, gamma=gamma, degree=degree, coef0=coef0),
        "rbf": partial(_rbf, gamma=gamma),
        "sigmoid": partial(_sigmoid, gamma=gamma, coef0=coef0),
        "cosine": _cosine,
        "laplacian": partial(_laplacian, gamma=gamma),
    }
    kernels["polynomial"] = kernels["poly"]
    if not isinstance(name, str) or name not in kernels:
        raise NotDifferentiableError(
            f"Got kernel={name!r}, but expected one of {', '.join(sorted(kernels))}, whose "
            "differentiable views are known."
        )
    return kernels[name]


def _linear(X: Tensor, Z: Tensor) -> Tensor:
    return as_precise_as(X, Z) @ Z.T


def _polynomial(X: Tensor, Z: Tensor, gamma: float | None, degree: float, coef0: float) -> Tensor:
    return (_gamma(gamma, X) * _linear(X, Z) + coef0) ** degree


def _sigmoid(X: Tensor, Z: Tensor, gamma: float | None, coef0: float) -> Tensor:
    return torch.tanh(_gamma(gamma, X) * _linear(X, Z) + coef0)


def _rbf(X: Tensor, Z: Tensor, gamma: float | None) -> Tensor:
    return torch.exp(-_gamma(gamma, X) * _squared_distances(as_precise_as(X, Z), Z))


def _laplacian(X: Tensor, Z: Tensor, gamma: float | None) -> Tensor:
    return torch.exp(-_gamma(gamma, X) * torch.cdist(as_precise_as(X, Z), Z, p=1))


def _cosine(X: Tensor, Z: Tensor) -> Tensor:
    return unit_rows(as_precise_as(X, Z)) @ unit_rows(Z).T


def _gamma(gamma: float | None, X: Tensor) -> float:
    return 1 / X.shape[1] if gamma is None else gamma


def _squared_distances(X: Tensor, Z: Tensor) -> Tensor:
    """‖x‖² + ‖z‖² - 2xz: differences would take n·m·d numbers, cdist has no gradient at 0."""
    # Distances do not depend on the origin, and the sum cancels least around the mean.
    center = Z.mean(0)
    X, Z = X - center, Z - center
    squares = (X**2).sum(1)[:, None] + (Z**2).sum(1) - 2 * X @ Z.T
    return squares.clamp(min=0)


def unit_rows(X: Tensor, order: float = 2) -> Tensor:
    """Divide each row by its norm, but leave rows of norm zero, as scikit-learn does."""
    norms = torch.linalg.vector_norm(X, ord=order, dim=1, keepdim=True)
    # The bound of sklearn.preprocessing.normalize.
    is_zero = norms < 10 * torch.finfo(X.dtype).eps
    return X / torch.where(is_zero, 1.0, norms)
