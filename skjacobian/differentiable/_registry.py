"""The registry of torch views, and what views have in common.

`as_torch` is a registry by type. Teach it a type of yours with::

    @as_torch.register(MyTransformer)
    def _(transformer):
        return lambda X: ...  # a differentiable function of a tensor
"""

import inspect
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from skjacobian.exceptions import NotDifferentiableError

TensorFunction = Callable[[Tensor], Tensor]

# What is left for what has no view.
WITHOUT_GRADIENTS = (
    "RobustScorer and evaluate_robustness with attack='strong', and robustness_curve, do without "
    "gradients."
)

# The settings that the view of each scikit-learn type understands, or that do not matter
# to a fitted object.
SETTINGS: dict[type, frozenset[str]] = {}

# What an estimator computes: a subclass with one of its own computes something else.
_METHODS = ("transform", "predict", "predict_proba", "decision_function")


@singledispatch
def as_torch(estimator: Any) -> TensorFunction:
    """Return the differentiable torch function that a fitted estimator computes.

    Of a transformer it is the map that `transform` computes. Of a classifier it is the map
    from raw X to logits of shape (n_samples, n_classes), columns in the order of `classes_`:
    their softmax is `predict_proba`, or, where there is none that `predict` follows, they
    are the `decision_function` (of two classes the columns 0 and the decision), or, where
    `predict` counts votes of pairs of classes, margins of these. Steps, as votes and isotonic
    plateaus are, have gradients that lead over them.

    docs/tabular.md lists the estimators that are known. Others are taught with
    ``as_torch.register(type)``, on a function from the fitted estimator to such a map.

    Parameters
    ----------
    estimator : fitted estimator or transformer

    Returns
    -------
    callable
        Of the estimators known it is an `nn.Module`. It shares its weights with a network
        in `estimator`.

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
        "is known. docs/tabular.md lists those that are; teach it others with "
        f"as_torch.register. {WITHOUT_GRADIENTS}"
    )


def view_of(
    kind: type, settings: tuple[str, ...]
) -> Callable[[Callable[[Any], nn.Module]], Callable[[Any], nn.Module]]:
    """Register a function as the maker of the views of a scikit-learn type.

    Parameters
    ----------
    kind : type
        Also stands for its subclasses that compute as it does.
    settings : tuple of str
        The parameters of `kind` that the view follows, or that do not change what a fitted
        object computes. Others raise where they are set.
    """
    SETTINGS[kind] = frozenset(settings)

    def register(make: Callable[[Any], nn.Module]) -> Callable[[Any], nn.Module]:
        def checked(estimator: Any) -> nn.Module:
            check_is_fitted(estimator)
            check_methods(estimator, kind)
            _check_settings(estimator, kind)
            return _in_one_place(make(estimator))

        as_torch.register(kind, checked)
        return make

    return register


def _in_one_place(view: nn.Module) -> nn.Module:
    """Bring the arrays of a view to its first weights; networks stay where estimators have them."""
    weight = next(view.parameters(), None)
    if weight is None:
        return view
    for part in view.modules():
        if isinstance(part, View):
            for name, array in part.named_buffers(recurse=False):
                setattr(part, name, array.to(weight.device))
    return view


def is_dropped(part: Any) -> bool:
    """Tell whether a part of a composed estimator was given as "drop"."""
    return isinstance(part, str) and part == "drop"


def check_methods(estimator: Any, kind: type, methods: Sequence[str] = _METHODS) -> None:
    """Raise if an estimator has methods of its own where those of a known type are viewed."""
    if method := own_method(estimator, kind, methods):
        given = type(estimator)
        name = given.__name__ if given.__name__ != kind.__name__ else _full_name(given)
        raise NotDifferentiableError(
            f"Got an estimator of type {name}, which has its own {method}, but expected that of "
            f"{kind.__name__}. Teach as_torch the new type with as_torch.register. "
            f"{WITHOUT_GRADIENTS}"
        )


def own_method(estimator: Any, kind: type, methods: Sequence[str] = _METHODS) -> str | None:
    """Return the first of some methods that an estimator does not share with a type, if any."""
    for method in methods:
        # Not getattr: what sklearn makes available on a condition is another object each time.
        own = inspect.getattr_static(type(estimator), method, None)
        if own is not inspect.getattr_static(kind, method, None):
            return method
    return None


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _check_settings(estimator: Any, kind: type) -> None:
    """Raise if a setting may change what a fitted estimator computes in an unknown way."""
    defaults = _defaults_of(estimator)
    for name, value in estimator.get_params(deep=False).items():
        known = name in SETTINGS[kind]
        if not known and not (name in defaults and _same(value, defaults[name])):
            raise NotDifferentiableError(
                f"Got {type(estimator).__name__}({name}={value!r}), but the differentiable view "
                f"of {kind.__name__} does not know the parameter {name}."
            )


def _defaults_of(estimator: Any) -> dict[str, Any]:
    """Return the parameters of an estimator made without arguments, if it can be."""
    try:
        return dict(type(estimator)().get_params(deep=False))
    except TypeError:
        return {}


def _same(value: Any, default: Any) -> bool:
    return value is default or bool(np.array_equal(value, default))


class View(nn.Module):
    """A torch function with the fitted arrays that it needs, as buffers."""

    def hold(self, **arrays: Any) -> None:
        """Register arrays as buffers; all but those of float32 and of indices as float64."""
        for name, value in arrays.items():
            tensor = torch.tensor(np.asarray(value))
            if tensor.dtype not in (torch.float32, torch.int64):
                tensor = tensor.double()
            self.register_buffer(name, tensor)


def as_precise_as(X: Tensor, array: Tensor) -> Tensor:
    """Return `X` on the device of an array, in the wider of both types, as numpy computes."""
    return X.to(device=array.device, dtype=torch.promote_types(X.dtype, array.dtype))


class ClassifierView(View):
    """The torch view of a classifier; `forward` returns logits, columns as `classes_`.

    Attributes
    ----------
    has_proba : bool
        Whether `predict_proba` is that of the estimator.
    """

    has_proba = True

    def predict_proba(self, X: Tensor) -> Tensor:
        """Return the probability of each class."""
        return self(X).softmax(1)

    def decision_function(self, X: Tensor) -> Tensor:
        """Return what `decision_function` does; of two classes one value for each sample."""
        logits = self(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits


class Function(ClassifierView):
    """A function that a user registered, as a module."""

    def __init__(self, function: TensorFunction) -> None:
        super().__init__()
        self.function = function

    def forward(self, X: Tensor) -> Tensor:
        """Return what the function does."""
        return self.function(X)


def module_of(estimator: Any) -> nn.Module:
    """Return the view of a fitted estimator as a module, whatever was registered for it."""
    view = as_torch(estimator)
    return view if isinstance(view, nn.Module) else Function(view)


def binary_logits(decision: Tensor) -> Tensor:
    """Return logits of two classes, 0 and the decision function."""
    return torch.stack([torch.zeros_like(decision), decision], dim=1)


def binary_probabilities(p: Tensor) -> Tensor:
    """Return the probabilities of two classes, 1 - p and p."""
    return torch.stack([1 - p, p], dim=1)
