"""The view of Gaussian process classifiers, and their kernels in torch."""

import math
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_triangular
from sklearn.gaussian_process import GaussianProcessClassifier, kernels
from sklearn.gaussian_process._gpc import COEFS, LAMBDAS
from torch import Tensor, nn

from skjacobian.differentiable._linear_classifiers import normalized
from skjacobian.differentiable._registry import (
    ClassifierView,
    View,
    as_precise_as,
    binary_logits,
    binary_probabilities,
    view_of,
)
from skjacobian.differentiable._votes import Votes
from skjacobian.exceptions import NotDifferentiableError
from skjacobian.model_outputs import log_of_probabilities


@singledispatch
def covariance(kernel: Any, X: Tensor, Z: Tensor) -> Tensor:
    """Return what a kernel of `sklearn.gaussian_process` makes of each pair of two samples.

    Parameters
    ----------
    kernel : sklearn.gaussian_process.kernels.Kernel
    X : Tensor of shape (n, n_features)
    Z : Tensor of shape (m, n_features)
        Other samples, so that noise is not shared.

    Returns
    -------
    Tensor of shape (n, m)
    """
    raise NotDifferentiableError(
        f"Got a Gaussian process with kernel {kernel!r}, but no differentiable view of "
        f"{type(kernel).__name__} is known."
    )


@covariance.register
def _(kernel: kernels.ConstantKernel, X: Tensor, Z: Tensor) -> Tensor:
    return X.new_full((len(X), len(Z)), float(kernel.constant_value))


@covariance.register
def _(kernel: kernels.WhiteKernel, X: Tensor, Z: Tensor) -> Tensor:
    return X.new_zeros(len(X), len(Z))


@covariance.register
def _(kernel: kernels.RBF, X: Tensor, Z: Tensor) -> Tensor:
    return torch.exp(-(_distances(X, Z, kernel.length_scale) ** 2) / 2)


@covariance.register
def _(kernel: kernels.Matern, X: Tensor, Z: Tensor) -> Tensor:
    d = _distances(X, Z, kernel.length_scale)
    if kernel.nu == 0.5:
        return torch.exp(-d)
    if kernel.nu == 1.5:
        d = math.sqrt(3) * d
        return (1 + d) * torch.exp(-d)
    if kernel.nu == 2.5:
        d = math.sqrt(5) * d
        return (1 + d + d**2 / 3) * torch.exp(-d)
    if kernel.nu == math.inf:
        return torch.exp(-(d**2) / 2)
    raise NotDifferentiableError(
        f"Got a Gaussian process with kernel {kernel!r}, but expected its nu to be one of 0.5, "
        "1.5, 2.5 and inf."
    )


@covariance.register
def _(kernel: kernels.RationalQuadratic, X: Tensor, Z: Tensor) -> Tensor:
    squared = _distances(X, Z, kernel.length_scale) ** 2
    return (1 + squared / (2 * kernel.alpha)) ** -kernel.alpha


@covariance.register
def _(kernel: kernels.ExpSineSquared, X: Tensor, Z: Tensor) -> Tensor:
    wave = torch.sin(math.pi * _distances(X, Z, kernel.periodicity))
    return torch.exp(-2 * (wave / kernel.length_scale) ** 2)


@covariance.register
def _(kernel: kernels.DotProduct, X: Tensor, Z: Tensor) -> Tensor:
    return X @ Z.T + kernel.sigma_0**2


@covariance.register
def _(kernel: kernels.Sum, X: Tensor, Z: Tensor) -> Tensor:
    return covariance(kernel.k1, X, Z) + covariance(kernel.k2, X, Z)


@covariance.register
def _(kernel: kernels.Product, X: Tensor, Z: Tensor) -> Tensor:
    return covariance(kernel.k1, X, Z) * covariance(kernel.k2, X, Z)


@covariance.register
def _(kernel: kernels.Exponentiation, X: Tensor, Z: Tensor) -> Tensor:
    return covariance(kernel.kernel, X, Z) ** kernel.exponent


def _distances(X: Tensor, Z: Tensor, unit: Any) -> Tensor:
    """Return distances in a unit of all features or of each, with gradient 0 where they are 0."""
    unit = torch.as_tensor(unit, dtype=X.dtype, device=X.device)
    # Other modes go through products, whose rounding the square root makes large.
    return torch.cdist(X / unit, Z / unit, compute_mode="donot_use_mm_for_euclid_dist")


@singledispatch
def variance(kernel: Any, X: Tensor) -> Tensor:
    """Return what a kernel of `sklearn.gaussian_process` makes of each sample and itself."""
    # All that are not registered are correlations, of 1 with oneself.
    return X.new_ones(len(X))


@variance.register
def _(kernel: kernels.ConstantKernel, X: Tensor) -> Tensor:
    return X.new_full((len(X),), float(kernel.constant_value))


@variance.register
def _(kernel: kernels.WhiteKernel, X: Tensor) -> Tensor:
    return X.new_full((len(X),), float(kernel.noise_level))


@variance.register
def _(kernel: kernels.DotProduct, X: Tensor) -> Tensor:
    return (X**2).sum(1) + kernel.sigma_0**2


@variance.register
def _(kernel: kernels.Sum, X: Tensor) -> Tensor:
    return variance(kernel.k1, X) + variance(kernel.k2, X)


@variance.register
def _(kernel: kernels.Product, X: Tensor) -> Tensor:
    return variance(kernel.k1, X) * variance(kernel.k2, X)


@variance.register
def _(kernel: kernels.Exponentiation, X: Tensor) -> Tensor:
    return variance(kernel.kernel, X) ** kernel.exponent


def check_kernel(kernel: Any) -> None:
    """Raise if a kernel, or one that it is made of, is of no type that is known itself."""
    parts = ("k1", "k2", "kernel")
    for part in [getattr(kernel, name) for name in parts if hasattr(kernel, name)]:
        check_kernel(part)
    # A subclass may compute something else than what it inherits from.
    known = type(kernel) in covariance.registry
    one = torch.ones(1, 1)
    (covariance if known else covariance.dispatch(object))(kernel, one, one)


class LatentProcess(View):
    """A Gaussian process of two classes: its latent function, and what it makes probable.

    After Rasmussen & Williams (2006), algorithm 3.2, whose lines are named below.
    """

    X_train: Tensor
    residual: Tensor
    whitening: Tensor
    weights: Tensor
    slopes: Tensor

    def __init__(self, process: Any) -> None:
        super().__init__()
        check_kernel(process.kernel_)
        self.kernel = process.kernel_
        self.hold(
            X_train=np.asarray(process.X_train_, dtype=float),
            residual=process.y_train_ - process.pi_,
            # L⁻¹ W^½, which line 5 solves for.
            whitening=solve_triangular(process.L_, np.diag(process.W_sr_), lower=True),
            weights=COEFS.ravel(),
            slopes=LAMBDAS.ravel(),
        )

    def forward(self, X: Tensor) -> Tensor:
        """Return the mean of the latent function, positive for the second class."""
        return self._covariance(X) @ self.residual  # line 4

    def probability(self, X: Tensor) -> Tensor:
        """Return the probability of the second class.

        The mean of the logistic function, which is approximated by five error functions
        (Williams & Barber, 1998, appendix A), under the Gaussian latent distribution.
        """
        X = as_precise_as(X, self.X_train)
        K = self._covariance(X)
        mean = K @ self.residual
        spread = variance(self.kernel, X) - ((K @ self.whitening.T) ** 2).sum(1)  # line 6
        widened = (1 + 2 * spread[:, None] * self.slopes**2).sqrt()
        errors = torch.erf(self.slopes * mean[:, None] / widened)
        return ((1 + errors) / 2) @ self.weights  # line 7

    def _covariance(self, X: Tensor) -> Tensor:
        return covariance(self.kernel, as_precise_as(X, self.X_train), self.X_train)


class BinaryProcess(ClassifierView):
    """A Gaussian process of two classes.

    `predict` follows the sign of the latent mean, which are the logits: the probability
    exceeds 1/2 where it is positive, but for rounded constants of its approximation.
    """

    def __init__(self, process: Any) -> None:
        super().__init__()
        self.process = LatentProcess(process)

    def forward(self, X: Tensor) -> Tensor:
        """Return the logits of `X`, 0 and the latent mean."""
        return binary_logits(self.process(X))

    def predict_proba(self, X: Tensor) -> Tensor:
        """Return the probability of both classes."""
        return binary_probabilities(self.process.probability(X))


class OneVsRestProcesses(ClassifierView):
    """A Gaussian process for each class against the rest; logits are log probabilities."""

    def __init__(self, processes: list[Any]) -> None:
        super().__init__()
        self.processes = nn.ModuleList(LatentProcess(process) for process in processes)

    def forward(self, X: Tensor) -> Tensor:
        """Return the logarithm of what each process says."""
        # Which the approximation may have rounded to 0, or to a hair below.
        return log_of_probabilities(_probabilities(self.processes, X))

    def predict_proba(self, X: Tensor) -> Tensor:
        """Return what the processes say, made to sum to 1."""
        return normalized(_probabilities(self.processes, X))


class OneVsOneProcesses(ClassifierView):
    """A Gaussian process for each pair of classes; logits are the margins of their votes.

    The probabilities of the pairs break ties.
    """

    has_proba = False

    def __init__(self, processes: list[Any], n_classes: int) -> None:
        super().__init__()
        self.processes = nn.ModuleList(LatentProcess(process) for process in processes)
        self.votes = Votes(n_classes)

    def forward(self, X: Tensor) -> Tensor:
        """Return the margins of the votes."""
        decisions = -torch.stack([process(X) for process in self.processes], dim=1)
        confidence = -_probabilities(self.processes, X)
        predicted = self.votes.scores(decisions, confidence).argmax(1)
        return self.votes.margins(decisions, predicted, confidence)


def _probabilities(processes: Any, X: Tensor) -> Tensor:
    return torch.stack([process.probability(X) for process in processes], dim=1)


@view_of(
    GaussianProcessClassifier,
    settings=(
        *("kernel", "optimizer", "n_restarts_optimizer", "max_iter_predict", "warm_start"),
        *("copy_X_train", "random_state", "multi_class", "n_jobs"),
    ),
)
def _(classifier: GaussianProcessClassifier) -> ClassifierView:
    if classifier.n_classes_ == 2:
        return BinaryProcess(classifier.base_estimator_)
    processes = classifier.base_estimator_.estimators_
    if classifier.multi_class == "one_vs_rest":
        return OneVsRestProcesses(processes)
    return OneVsOneProcesses(processes, classifier.n_classes_)
