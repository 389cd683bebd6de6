"""The views of transformers that are linear maps, and of those that choose features."""

from functools import singledispatch
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.base import ClassifierMixin
from sklearn.decomposition import PCA, FactorAnalysis, FastICA, IncrementalPCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_selection import SelectorMixin
from sklearn.random_projection import GaussianRandomProjection, SparseRandomProjection
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from skjacobian.differentiable._registry import (
    View,
    as_precise_as,
    as_torch,
    check_methods,
    module_of,
    view_of,
)
from skjacobian.exceptions import NotDifferentiableError


class Linear(View):
    """x ↦ (x - before) Wᵀ."""

    before: Tensor
    W: Tensor

    def __init__(self, before: Any, W: np.ndarray) -> None:
        super().__init__()
        # torch takes no negative strides, which some solvers leave.
        self.hold(before=before, W=np.ascontiguousarray(W))

    def forward(self, X: Tensor) -> Tensor:
        """Return the projected `X`."""
        X = as_precise_as(X, self.W)
        return (X - self.before) @ self.W.to(X.dtype).T


class Select(View):
    """x ↦ the chosen features of x."""

    index: Tensor

    def __init__(self, index: np.ndarray) -> None:
        super().__init__()
        self.hold(index=index)

    def forward(self, X: Tensor) -> Tensor:
        """Return the chosen columns of `X`."""
        return X[:, self.index.to(X.device)]


@view_of(
    PCA,
    settings=(
        *("n_components", "copy", "whiten", "svd_solver", "tol", "iterated_power"),
        *("n_oversamples", "power_iteration_normalizer", "random_state"),
    ),
)
@view_of(IncrementalPCA, settings=("n_components", "whiten", "copy", "batch_size"))
def _(pca: PCA | IncrementalPCA) -> View:
    W = pca.components_
    if pca.whiten:
        # As PCA.transform does: a component of no variance is divided by the smallest step.
        deviation = np.sqrt(pca.explained_variance_)
        deviation = np.maximum(deviation, np.finfo(deviation.dtype).eps)
        W = W / deviation[:, None]
    return Linear(before=pca.mean_, W=W)


@view_of(
    TruncatedSVD,
    settings=(
        *("n_components", "algorithm", "n_iter", "n_oversamples"),
        *("power_iteration_normalizer", "random_state", "tol"),
    ),
)
def _(svd: TruncatedSVD) -> View:
    return Linear(before=0.0, W=svd.components_)


@view_of(
    FactorAnalysis,
    settings=(
        *("n_components", "tol", "copy", "max_iter", "noise_variance_init", "svd_method"),
        *("iterated_power", "rotation", "random_state"),
    ),
)
def _(analysis: FactorAnalysis) -> View:
    # The mean of the latent variables given x: Barber, Bayesian Reasoning, equation 21.2.33.
    W = analysis.components_ / analysis.noise_variance_
    precision = np.eye(len(W)) + W @ analysis.components_.T
    return Linear(before=analysis.mean_, W=np.linalg.solve(precision, W))


@view_of(
    FastICA,
    settings=(
        *("n_components", "algorithm", "whiten", "fun", "fun_args", "max_iter", "tol"),
        *("w_init", "whiten_solver", "random_state"),
    ),
)
def _(ica: FastICA) -> View:
    return Linear(before=ica.mean_ if ica.whiten else 0.0, W=ica.components_)


_RANDOM_PROJECTION = ("n_components", "eps", "compute_inverse_components", "random_state")


@view_of(GaussianRandomProjection, settings=_RANDOM_PROJECTION)
@view_of(SparseRandomProjection, settings=(*_RANDOM_PROJECTION, "density", "dense_output"))
def _(projection: GaussianRandomProjection | SparseRandomProjection) -> View:
    W = projection.components_
    return Linear(before=0.0, W=W.toarray() if sparse.issparse(W) else W)


def selected(selector: SelectorMixin) -> Select:
    """Return the view of the `transform` of what selects features."""
    check_methods(selector, SelectorMixin, ("transform",))
    return Select(selector.get_support(indices=True))


as_torch.register(SelectorMixin, selected)


@singledispatch
def transform_view(estimator: Any) -> nn.Module:
    """Return the view of what `transform` of a fitted estimator computes.

    That is `as_torch` but for those that classify as well, of which `as_torch` gives the
    logits: it is how the other steps of a pipeline than the last are used.
    """
    if isinstance(estimator, ClassifierMixin):
        raise NotDifferentiableError(
            f"Got a classifier of type {type(estimator).__name__} as a transformer, but the "
            "differentiable view of its transform is not known. Teach it with "
            "transform_view.register."
        )
    return module_of(estimator)


@transform_view.register
def _(analysis: LinearDiscriminantAnalysis) -> nn.Module:
    check_is_fitted(analysis)
    name = type(analysis).__name__
    if type(analysis).transform is not LinearDiscriminantAnalysis.transform:
        raise NotDifferentiableError(
            f"Got an estimator of type {name}, which has its own transform, but expected that "
            "of LinearDiscriminantAnalysis. Teach it with transform_view.register."
        )
    if analysis.solver == "lsqr":
        raise NotDifferentiableError(
            f"Got {name}(solver='lsqr'), which has no transform, but expected 'svd' or 'eigen'."
        )
    before = analysis.xbar_ if analysis.solver == "svd" else 0.0
    return Linear(before=before, W=analysis.scalings_[:, : analysis._max_components].T)
