"""The pairwise kernels of scikit-learn in torch, and the views of kernel feature maps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import KernelPCA
from sklearn.kernel_approximation import Nystroem, RBFSampler, SkewedChi2Sampler
from torch import Tensor

from skjacobian.differentiable._registry import View, as_precise_as, view_of
from skjacobian.differentiable._scalers import UnitRows
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
    X, Z = _of_one_type(X, Z)
    return X @ Z.T


def _polynomial(X: Tensor, Z: Tensor, gamma: float | None, degree: float, coef0: float) -> Tensor:
    return (_gamma(gamma, X) * _linear(X, Z) + coef0) ** degree


def _sigmoid(X: Tensor, Z: Tensor, gamma: float | None, coef0: float) -> Tensor:
    return torch.tanh(_gamma(gamma, X) * _linear(X, Z) + coef0)


def _rbf(X: Tensor, Z: Tensor, gamma: float | None) -> Tensor:
    return torch.exp(-_gamma(gamma, X) * _squared_distances(*_of_one_type(X, Z)))


def _laplacian(X: Tensor, Z: Tensor, gamma: float | None) -> Tensor:
    return torch.exp(-_gamma(gamma, X) * torch.cdist(*_of_one_type(X, Z), p=1))


def _cosine(X: Tensor, Z: Tensor) -> Tensor:
    X, Z = _of_one_type(X, Z)
    unit_rows = UnitRows()
    return unit_rows(X) @ unit_rows(Z).T


def _of_one_type(X: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
    X = as_precise_as(X, Z)
    return X, Z.to(X.dtype)


def _gamma(gamma: float | None, X: Tensor) -> float:
    return 1 / X.shape[1] if gamma is None else gamma


def _squared_distances(X: Tensor, Z: Tensor) -> Tensor:
    """‖x‖² + ‖z‖² - 2xz: differences would take n·m·d numbers, cdist has no gradient at 0."""
    # Distances do not depend on the origin, and the sum cancels least around the mean.
    center = Z.mean(0)
    X, Z = X - center, Z - center
    squares = (X**2).sum(1)[:, None] + (Z**2).sum(1) - 2 * X @ Z.T
    return squares.clamp(min=0)


class KernelMap(View):
    """x ↦ W (k(x, Z) - before) + after.

    Parameters
    ----------
    kernel : callable
        From `X` and `Z` to the kernel of each pair.
    Z : array of shape (n_landmarks, n_features)
    W : array of shape (n_components, n_landmarks)
    before : array of shape (n_landmarks,) or number
    after : array of shape (n_components,) or number
    """

    Z: Tensor
    W: Tensor
    before: Tensor
    after: Tensor

    def __init__(self, kernel: Kernel, Z: Any, W: Any, before: Any = 0.0, after: Any = 0.0) -> None:
        super().__init__()
        self.kernel = kernel
        # In float64, whatever it was fitted on: distances cancel.
        arrays = {"Z": Z, "W": W, "before": before, "after": after}
        self.hold(**{name: np.asarray(array, float) for name, array in arrays.items()})

    def forward(self, X: Tensor) -> Tensor:
        """Return the features of `X`."""
        return (self.kernel(X, self.Z) - self.before) @ self.W.T + self.after


class RandomFourier(View):
    """x ↦ amplitude · cos(Wx + phase); where `skewedness` is given, of log(x + skewedness).

    It is NaN where x + skewedness is negative, for which `transform` raises.
    """

    W: Tensor
    phase: Tensor

    def __init__(self, sampler: Any, skewedness: float | None = None) -> None:
        super().__init__()
        W, phase = sampler.random_weights_.T, sampler.random_offset_
        self.hold(W=W.astype(float), phase=phase.astype(float))
        self.amplitude = (2 / sampler.n_components) ** 0.5
        self.skewedness = skewedness

    def forward(self, X: Tensor) -> Tensor:
        """Return the random features of `X`."""
        X = as_precise_as(X, self.W)
        if self.skewedness is not None:
            X = torch.log(X + self.skewedness)
        return self.amplitude * torch.cos(X @ self.W.T + self.phase)


@view_of(
    KernelPCA,
    settings=(
        *("n_components", "kernel", "gamma", "degree", "coef0", "kernel_params", "alpha"),
        *("fit_inverse_transform", "eigen_solver", "tol", "max_iter", "iterated_power"),
        *("remove_zero_eig", "random_state", "copy_X", "n_jobs"),
    ),
)
def _(pca: KernelPCA) -> View:
    kernel = kernel_function(pca.kernel, gamma=pca.gamma_, degree=pca.degree, coef0=pca.coef0)
    # A component of eigenvalue 0 is 0.
    scale = np.sqrt(np.where(pca.eigenvalues_ == 0, np.inf, pca.eigenvalues_))
    W = (pca.eigenvectors_ / scale).T.astype(float)
    # To center K is to subtract the means of the training samples, then from each row its own
    # mean, which W does if it has none, and to add what rounding left of the mean of all.
    means, mean = pca._centerer.K_fit_rows_.astype(float), float(pca._centerer.K_fit_all_)
    after = (mean - means.mean()) * W.sum(1)
    return KernelMap(kernel, pca.X_fit_, W - W.mean(1, keepdims=True), means, after)


@view_of(
    Nystroem,
    settings=(
        *("kernel", "gamma", "coef0", "degree", "kernel_params", "n_components"),
        *("random_state", "n_jobs"),
    ),
)
def _(nystroem: Nystroem) -> View:
    chosen = {name: getattr(nystroem, name) for name in ("gamma", "degree", "coef0")}
    params = dict(nystroem.kernel_params or {})
    params |= {name: value for name, value in chosen.items() if value is not None}
    # Of kernels known by their name scikit-learn drops parameters that they do not have.
    params = {name: params[name] for name in chosen if name in params}
    kernel = kernel_function(nystroem.kernel, **params)
    return KernelMap(kernel, nystroem.components_, nystroem.normalization_)


@view_of(RBFSampler, settings=("gamma", "n_components", "random_state"))
def _(sampler: RBFSampler) -> View:
    return RandomFourier(sampler)


@view_of(SkewedChi2Sampler, settings=("skewedness", "n_components", "random_state"))
def _(sampler: SkewedChi2Sampler) -> View:
    return RandomFourier(sampler, skewedness=sampler.skewedness)
