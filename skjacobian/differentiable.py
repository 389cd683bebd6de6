"""The torch view of fitted scikit-learn objects: what a gradient attack goes through.

`as_torch` is a registry by type. Teach it a type of yours with::

    @as_torch.register(MyTransformer)
    def _(transformer):
        return lambda X: ...  # a differentiable function of a tensor
"""

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.feature_selection import SelectorMixin
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from skjacobian._net import SkorchNet
from skjacobian.exceptions import NotDifferentiableError

TensorFunction = Callable[[Tensor], Tensor]


@singledispatch
def as_torch(estimator: Any) -> TensorFunction:
    """Return the differentiable torch function that a fitted estimator computes.

    Of a classifier it is the map from raw X to logits of shape (n_samples, n_classes),
    columns in the order of `classes_`; of a transformer the map that `transform` computes.
    Known are this package's classifiers, skorch nets, `nn.Module`, `Pipeline`, search
    objects, `FrozenEstimator`, and the affine transformers `StandardScaler`,
    `MinMaxScaler`, `MaxAbsScaler`, `RobustScaler`, `PCA` and feature selectors. More can
    be registered: `as_torch.register(type)`.

    Parameters
    ----------
    estimator : fitted estimator or transformer

    Returns
    -------
    callable
        An `nn.Module` on tensors, where the estimator is one of those above. It shares
        its weights with `estimator`.

    Raises
    ------
    NotDifferentiableError
        If no view is known; names the step of a pipeline that has none.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from sklearn.preprocessing import MinMaxScaler
    >>> scaler = MinMaxScaler().fit(np.array([[0.0], [4.0]]))
    >>> as_torch(scaler)(torch.tensor([[1.0]]))
    tensor([[0.2500]])
    """
    raise NotDifferentiableError(
        f"Got an estimator of type {type(estimator).__name__}, of which no differentiable view "
        "is known. Supported are the classifiers of skjacobian, skorch nets, torch modules, "
        "search objects, FrozenEstimator, and pipelines of them behind StandardScaler, "
        "MinMaxScaler, MaxAbsScaler, RobustScaler, PCA, feature selectors or 'passthrough'. "
        "Teach it others with as_torch.register."
    )


class Network(nn.Module):
    """A network that takes any floating dtype and any device.

    Parameters
    ----------
    module : nn.Module
        Returns logits.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, X: Tensor) -> Tensor:
        """Return the logits of `X`, on the device and in the dtype of the weights."""
        weight = next(self.module.parameters(), X)
        return self.module(X.to(device=weight.device, dtype=weight.dtype))


def black_box(estimator: Any, X: Any) -> TensorFunction:
    """Return what a fitted classifier says of tensors, as scores without gradients.

    Probabilities where it gives them, else the decision function, else rows of 0 and 1 for
    the predicted class; columns in the order of `classes_`.

    Parameters
    ----------
    estimator : fitted classifier
    X : array-like of shape (n_samples, *features)
        The container that the estimator receives; of a DataFrame the columns are kept.

    Returns
    -------
    callable
        Maps tensors of shape (n_samples, *features) to tensors (n_samples, n_classes).

    Examples
    --------
    >>> import torch
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.tree import DecisionTreeClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> scores = black_box(DecisionTreeClassifier(random_state=0).fit(X, y), X)
    >>> scores(torch.from_numpy(X[:1]))
    tensor([[1., 0., 0.]], dtype=torch.float64)
    """
    check_is_fitted(estimator)

    def scores(samples: Tensor) -> Tensor:
        values = samples.detach().cpu().numpy()
        if hasattr(X, "columns"):
            values = type(X)(values, columns=X.columns)
        return torch.from_numpy(_class_scores(estimator, values)).to(samples)

    return scores


def _class_scores(estimator: Any, X: Any) -> np.ndarray:
    """Return one column for each class."""
    if hasattr(estimator, "predict_proba"):
        return np.asarray(estimator.predict_proba(X))
    if hasattr(estimator, "decision_function"):
        decision = np.asarray(estimator.decision_function(X))
        if decision.ndim == 1:
            return np.stack([0 * decision, decision], axis=1)
        if decision.shape[1] == len(estimator.classes_) and not _scores_pairs(estimator):
            return decision
    return (np.asarray(estimator.predict(X))[:, None] == estimator.classes_).astype(float)


def _scores_pairs(estimator: Any) -> bool:
    """Tell whether a decision function has a column for each of three pairs of three classes."""
    if len(estimator.classes_) != 3 or not hasattr(estimator, "get_params"):
        return False
    params = estimator.get_params().items()
    return any(k.endswith("decision_function_shape") and v == "ovo" for k, v in params)


LOGIT_CRITERIA = (nn.CrossEntropyLoss, nn.NLLLoss, nn.BCEWithLogitsLoss)


class SkorchLogits(nn.Module):
    """The logits of a skorch net, whatever its criterion expects of the module.

    Parameters
    ----------
    net : skorch.NeuralNet
        With one of `LOGIT_CRITERIA`: cross-entropy, negative log likelihood (whose module
        returns probabilities, by skorch's convention) or binary cross-entropy on logits.
    """

    def __init__(self, net: SkorchNet) -> None:
        super().__init__()
        self.module = net.module_
        self.criterion = net.criterion_

    def forward(self, X: Tensor) -> Tensor:
        """Return logits of shape (n_samples, n_classes)."""
        weight = next(self.module.parameters(), X)
        output = self.module(X.to(device=weight.device, dtype=weight.dtype))
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(self.criterion, nn.NLLLoss):
            return (output + torch.finfo(output.dtype).eps).log()
        if isinstance(self.criterion, nn.BCEWithLogitsLoss):
            positive = output.reshape(-1)
            return torch.stack([torch.zeros_like(positive), positive], dim=1)
        return output


class Affine(nn.Module):
    """x ↦ (x - before)·scale + after, then clipped where there is a range; per feature."""

    before: Tensor
    scale: Tensor
    after: Tensor

    def __init__(
        self,
        before: Any = 0.0,
        scale: Any = 1.0,
        after: Any = 0.0,
        clip: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("before", before), ("scale", scale), ("after", after)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float64))
        self.clip = clip

    def forward(self, X: Tensor) -> Tensor:
        """Return the scaled `X`."""
        X = (X - self.before.to(X)) * self.scale.to(X) + self.after.to(X)
        return X if self.clip is None else X.clamp(*self.clip)


class Linear(nn.Module):
    """x ↦ (x - before) Wᵀ."""

    before: Tensor
    W: Tensor

    def __init__(self, before: np.ndarray, W: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("before", torch.as_tensor(before, dtype=torch.float64))
        self.register_buffer("W", torch.as_tensor(W, dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        """Return the projected `X`."""
        return (X - self.before.to(X)) @ self.W.to(X).T


class Select(nn.Module):
    """x ↦ the chosen features of x."""

    index: Tensor

    def __init__(self, index: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("index", torch.as_tensor(index))

    def forward(self, X: Tensor) -> Tensor:
        """Return the chosen columns of `X`."""
        return X[:, self.index.to(X.device)]


@as_torch.register
def _(module: nn.Module) -> TensorFunction:
    return Network(module)


@as_torch.register
def _(net: SkorchNet) -> TensorFunction:
    net.check_is_fitted()
    if not isinstance(net.criterion_, LOGIT_CRITERIA):
        known = ", ".join(criterion.__name__ for criterion in LOGIT_CRITERIA)
        raise NotDifferentiableError(
            f"Got a skorch net with criterion {type(net.criterion_).__name__}, but expected one "
            f"of {known}: it is not known how others turn outputs into logits."
        )
    return SkorchLogits(net)


@as_torch.register
def _(pipeline: Pipeline) -> TensorFunction:
    check_is_fitted(pipeline)
    views = []
    for name, step in pipeline.steps:
        if step is None or step == "passthrough":
            continue
        try:
            views.append(as_torch(step))
        except NotDifferentiableError as error:
            raise NotDifferentiableError(f"In step {name!r} of the pipeline: {error}") from error
    return nn.Sequential(*[v if isinstance(v, nn.Module) else _Function(v) for v in views])


class _Function(nn.Module):
    """A plain function as a module, so that it can stand in a sequence."""

    def __init__(self, function: TensorFunction) -> None:
        super().__init__()
        self.function = function

    def forward(self, X: Tensor) -> Tensor:
        return self.function(X)


@as_torch.register
def _(search: BaseSearchCV) -> TensorFunction:
    check_is_fitted(search, "best_estimator_")
    return as_torch(search.best_estimator_)


@as_torch.register
def _(frozen: FrozenEstimator) -> TensorFunction:
    return as_torch(frozen.estimator)


@as_torch.register
def _(scaler: StandardScaler) -> TensorFunction:
    check_is_fitted(scaler)
    before = scaler.mean_ if scaler.with_mean else 0.0
    return Affine(before=before, scale=1 / scaler.scale_ if scaler.with_std else 1.0)


@as_torch.register
def _(scaler: MinMaxScaler) -> TensorFunction:
    check_is_fitted(scaler)
    clip = tuple(scaler.feature_range) if scaler.clip else None
    return Affine(scale=scaler.scale_, after=scaler.min_, clip=clip)


@as_torch.register
def _(scaler: MaxAbsScaler) -> TensorFunction:
    check_is_fitted(scaler)
    clip = (-1.0, 1.0) if getattr(scaler, "clip", False) else None
    return Affine(scale=1 / scaler.scale_, clip=clip)


@as_torch.register
def _(scaler: RobustScaler) -> TensorFunction:
    check_is_fitted(scaler)
    before = scaler.center_ if scaler.with_centering else 0.0
    return Affine(before=before, scale=1 / scaler.scale_ if scaler.with_scaling else 1.0)


@as_torch.register
def _(pca: PCA) -> TensorFunction:
    check_is_fitted(pca)
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
