"""A scikit-learn transformer as the first layers of a network."""

import copy
from typing import Any, Self

import numpy as np
import torch
from sklearn import config_context
from sklearn.base import clone
from sklearn.utils._param_validation import HasMethods
from sklearn.utils.metadata_routing import get_routing_for_object
from sklearn.utils.validation import has_fit_parameter
from torch import Tensor, nn

from skjacobian.differentiable import Affine, Chain, Linear
from skjacobian.differentiable._projections import transform_view
from skjacobian.exceptions import NotDifferentiableError
from skjacobian.layers import Rescaling, linear


class TransformerInstance(HasMethods):
    """Constraint on a parameter: a transformer, and not its class."""

    def __init__(self) -> None:
        super().__init__(["fit", "transform"])

    def is_satisfied_by(self, val: Any) -> bool:
        """Tell whether `val` is an object with `fit` and `transform`."""
        return not isinstance(val, type) and bool(super().is_satisfied_by(val))

    def __str__(self) -> str:
        return (
            "a transformer that as_torch knows (an instance with 'fit' and 'transform', not its "
            "class)"
        )


def fit_preprocessor(
    preprocessor: Any,
    X: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray | None,
    rows: np.ndarray,
    names: Any = None,
) -> Any:
    """Return a clone of a transformer, fitted on some rows; None for None.

    The weights go to each part, of a pipeline too, whose `fit` takes them.

    Parameters
    ----------
    preprocessor : transformer or None
    X : ndarray of shape (n_samples, n_features)
    y : ndarray of shape (n_samples,)
    weight : ndarray of shape (n_samples,) or None
    rows : ndarray of int
        Those to fit on.
    names : array of str, optional
        Those of the columns, by which it may choose some.

    Raises
    ------
    ValueError
        If `X` holds images.
    """
    if preprocessor is None:
        return None
    if X.ndim > 2:
        raise ValueError(
            f"Got preprocessor={preprocessor!r} and X with samples of shape {X.shape[1:]}, but a "
            "preprocessor expected X of shape (n_samples, n_features)."
        )
    # `clone` leaves the estimator in a FrozenEstimator as it is, and requests are set below.
    preprocessor = copy.deepcopy(clone(preprocessor))
    X, y = (X, y) if len(rows) == len(X) else (X[rows], y[rows])
    X = _named(X, names)
    if weight is None:
        return preprocessor.fit(X, y)
    with config_context(enable_metadata_routing=True):
        for part in (preprocessor, *preprocessor.get_params().values()):
            if hasattr(part, "set_fit_request") and has_fit_parameter(part, "sample_weight"):
                part.set_fit_request(sample_weight=True)
        routing = get_routing_for_object(preprocessor)
        taken = routing.consumes("fit", ["sample_weight"])
        return preprocessor.fit(X, y, **dict.fromkeys(taken, weight[rows]))


def _named(X: np.ndarray, names: Any) -> Any:
    """Return a DataFrame of named columns, if they have names and there is pandas."""
    if names is None:
        return X
    try:
        import pandas as pd
    except ImportError:  # a table of another library
        return X
    return pd.DataFrame(X, columns=names)


def output_shape(preprocessor: Any, sample: np.ndarray) -> tuple[int, ...]:
    """Return the shape that a fitted preprocessor, or None, gives a sample.

    Parameters
    ----------
    preprocessor : fitted transformer or None
    sample : ndarray of shape (1, *features)

    Raises
    ------
    NotDifferentiableError
        If `as_torch` does not know it.
    """
    with torch.no_grad():
        X = torch.from_numpy(sample.copy())
        for layer in preprocessing_layers(preprocessor, X.dtype):
            X = layer(X)
    return tuple(X.shape[1:])


def behind_preprocessor(preprocessor: Any, module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a network that takes raw X, whose last layer is `module`.

    That is an `nn.Sequential` of the preprocessor's layers, which are not trained, and the
    module; the module alone where the preprocessor is None.
    """
    layers = preprocessing_layers(preprocessor, dtype)
    return module if preprocessor is None else nn.Sequential(*layers, module)


def preprocessing_layers(preprocessor: Any, dtype: torch.dtype) -> list[nn.Module]:
    """Return the layers that compute what a fitted preprocessor does; none for None.

    All their numbers are buffers that are not part of the state: the state holds what is
    trained, and the preprocessor, which has these numbers, is kept by itself.

    Parameters
    ----------
    preprocessor : fitted transformer or None
    dtype : torch.dtype
        That of the layers and of what they return.

    Raises
    ------
    NotDifferentiableError
        If `as_torch` does not know it.
    """
    if preprocessor is None:
        return []
    try:
        view = transform_view(preprocessor)
    except NotDifferentiableError as error:
        raise NotDifferentiableError(
            f"Got preprocessor={preprocessor!r}, but expected None or a transformer that "
            f"as_torch knows. {error}"
        ) from error
    return [_constant(layer.to(dtype)) for layer in _layers_of(view)]


class Frozen(nn.Module):
    """A view that stays in eval mode, and returns the dtype of its input.

    Parameters
    ----------
    view : nn.Module
        Is copied: it may share its numbers with an estimator.
    """

    def __init__(self, view: nn.Module) -> None:
        super().__init__()
        self.view = copy.deepcopy(view)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, X: Tensor) -> Tensor:
        """Return what the view returns."""
        return self.view(X).to(X.dtype)


def _layers_of(view: nn.Module) -> list[nn.Module]:
    """Return the layers of a view: those that Jacobians have a closed form for if possible."""
    if type(view) is Chain:
        return [layer for part in (*view.transform, view.last) for layer in _layers_of(part)]
    if type(view) is nn.Identity:
        return []
    if type(view) is Affine and view.clip is None:
        return [_rescaling(view.before, view.scale, view.after)]
    if type(view) is Linear:
        # Two layers: with the product of `before` in a bias, float32 would lose digits.
        return [_rescaling(before=view.before), linear(view.W)]
    return [Frozen(view)]


def _rescaling(
    before: Tensor | None = None, scale: Tensor | None = None, after: Tensor | None = None
) -> Rescaling:
    """Return the layer without the steps that change nothing."""
    steps = ((before, 0), (scale, 1), (after, 0))
    return Rescaling(*(None if t is None or bool((t == n).all()) else t for t, n in steps))


def _constant(layer: nn.Module) -> nn.Module:
    """Turn all parameters and buffers into buffers that are not part of the state."""
    for part in layer.modules():
        tensors = {**part._parameters, **part._buffers}
        part._parameters.clear()
        for name, tensor in tensors.items():
            value = None if tensor is None else tensor.detach()
            part.register_buffer(name, value, persistent=False)
    return layer
