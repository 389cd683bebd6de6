"""The views of transformers that are linear maps, and of those that choose features."""

from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.feature_selection import SelectorMixin
from torch import Tensor

from skjacobian.differentiable._registry import (
    TensorFunction,
    View,
    as_precise_as,
    as_torch,
    view_of,
)


class Linear(View):
    """x ↦ (x - before) Wᵀ."""

    before: Tensor
    W: Tensor

    def __init__(self, before: Any, W: np.ndarray) -> None:
        super().__init__()
        self.hold(before=before, W=W)

    def forward(self, X: Tensor) -> Tensor:
        """Return the projected `X`."""
        return (as_precise_as(X, self.W) - self.before) @ self.W.T


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
def _(pca: PCA) -> View:
    W = pca.components_
    if pca.whiten:
        # As PCA.transform does: a component of no variance is divided by the smallest step.
        deviation = np.sqrt(pca.explained_variance_)
        deviation = np.maximum(deviation, np.finfo(deviation.dtype).eps)
        W = W / deviation[:, None]
    return Linear(before=pca.mean_, W=W)


@as_torch.register
def _(selector: SelectorMixin) -> TensorFunction:
    return Select(selector.get_support(indices=True))
