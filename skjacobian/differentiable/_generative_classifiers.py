"""The views of classifiers that model each class as a Gaussian."""

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.naive_bayes import GaussianNB
from torch import Tensor

from skjacobian.differentiable._linear_classifiers import LinearLogits
from skjacobian.differentiable._registry import ClassifierView, as_precise_as, view_of


class DiagonalGaussians(ClassifierView):
    """x ↦ log P(y) + log N(x; θ_y, diag σ²_y): the logarithm of the joint density."""

    means: Tensor
    variances: Tensor
    constant: Tensor

    def __init__(self, means: np.ndarray, variances: np.ndarray, priors: np.ndarray) -> None:
        super().__init__()
        log_volume = np.log(2 * np.pi * variances).sum(1)
        self.hold(means=means, variances=variances, constant=_log(priors) - log_volume / 2)

    def forward(self, X: Tensor) -> Tensor:
        """Return the joint log likelihood of `X` and each class."""
        X = as_precise_as(X, self.means)
        squared = ((X[:, None] - self.means) ** 2 / self.variances).sum(2)
        return self.constant - squared / 2


class Gaussians(ClassifierView):
    """x ↦ log P(y) + log N(x; μ_y, Σ_y), less what is the same for all classes.

    Parameters
    ----------
    means : array of shape (n_classes, n_features)
    rotations : list of n_classes arrays of shape (n_features, rank)
        The eigenvectors of each Σ_y.
    scalings : list of n_classes arrays of shape (rank,)
        Its eigenvalues.
    priors : array of shape (n_classes,)
    """

    means: Tensor
    whitening: Tensor
    constant: Tensor

    def __init__(
        self,
        means: np.ndarray,
        rotations: list[np.ndarray],
        scalings: list[np.ndarray],
        priors: np.ndarray,
    ) -> None:
        super().__init__()
        # Directions of no variance count for nothing in scikit-learn: columns of zeros.
        whitening = np.zeros((*means.shape, means.shape[1]))
        for W, R, S in zip(whitening, rotations, scalings, strict=True):
            W[:, : len(S)] = R * S**-0.5
        log_volume = np.array([np.log(S).sum() for S in scalings])
        self.hold(means=means, whitening=whitening, constant=_log(priors) - log_volume / 2)

    def forward(self, X: Tensor) -> Tensor:
        """Return the log posterior of each class up to a constant of the sample."""
        X = as_precise_as(X, self.whitening)
        centered = X - self.means[:, None]
        squared = (torch.bmm(centered, self.whitening) ** 2).sum(2)
        return self.constant - squared.T / 2


def _log(priors: np.ndarray) -> np.ndarray:
    """Return -inf for a class that is ruled out, without a warning."""
    with np.errstate(divide="ignore"):
        return np.log(priors)


@view_of(GaussianNB, settings=("priors", "var_smoothing"))
def _(classifier: GaussianNB) -> ClassifierView:
    return DiagonalGaussians(classifier.theta_, classifier.var_, classifier.class_prior_)


@view_of(
    LinearDiscriminantAnalysis,
    settings=(
        *("solver", "shrinkage", "priors", "n_components", "store_covariance", "tol"),
        "covariance_estimator",
    ),
)
def _(classifier: LinearDiscriminantAnalysis) -> ClassifierView:
    return LinearLogits(classifier.coef_, classifier.intercept_, has_proba=True)


@view_of(
    QuadraticDiscriminantAnalysis,
    settings=(
        *("solver", "shrinkage", "priors", "reg_param", "store_covariance", "tol"),
        "covariance_estimator",
    ),
)
def _(classifier: QuadraticDiscriminantAnalysis) -> ClassifierView:
    return Gaussians(
        classifier.means_, classifier.rotations_, classifier.scalings_, classifier.priors_
    )
