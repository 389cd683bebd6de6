"""The default networks, and how a network is made to fit the data."""

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

from skjacobian._validation import check_count, check_option, did_you_mean, reject
from skjacobian.layers import BATCH_NORMS, CONVOLUTIONS, Rescaling, is_changed
from skjacobian.model_outputs import CHANGES_X, output_kind

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class _Layers(nn.Sequential):
    """A sequence of layers, slices of which are plain sequences."""

    def __getitem__(self, index: Any) -> Any:
        layers = list(self)[index]
        return nn.Sequential(*layers) if isinstance(index, slice) else layers


class MLP(_Layers):
    """Multi-layer perceptron; features of any shape are flattened first.

    Parameters
    ----------
    n_features : int
        Number of features of a sample, all dimensions multiplied.
    n_classes : int
        Number of logits.
    hidden_units : sequence of int, default=(128, 64)
        Width of each hidden layer.
    activation : {"relu", "elu", "gelu", "silu", "softplus", "tanh"}, default="relu"
        Nonlinearity after each hidden layer.
    dropout : float, default=0.0
        Probability of dropping a hidden unit while training.

    Examples
    --------
    >>> import torch
    >>> MLP(n_features=4, n_classes=3, hidden_units=(8,))(torch.zeros(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        n_features: int,
        n_classes: int,
        hidden_units: Sequence[int] = (128, 64),
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            nn.Flatten(), *_dense(n_features, n_classes, hidden_units, activation, dropout)
        )


class CNN(_Layers):
    """Small convolutional network in the manner of LeNet-5 (LeCun et al., 1998).

    Convolution, activation and 2x2 max pooling for each entry of `channels`, then dense
    layers. Pooling is left out once the image is a single pixel wide or high.

    Parameters
    ----------
    input_shape : tuple of int
        Shape of a sample: (channels, height, width), (height, width), or (n_features,)
        with `image_shape`.
    n_classes : int
        Number of logits.
    image_shape : tuple of int, optional
        Shape that flat samples are given, (channels, height, width) or (height, width).
    channels : sequence of int, default=(16, 32)
        Output channels of each convolution.
    kernel_size : int, default=5
        Odd width of the kernels; the image keeps its size.
    hidden_units : sequence of int, default=(128,)
        Width of each dense hidden layer.
    activation : {"relu", "elu", "gelu", "silu", "softplus", "tanh"}, default="relu"
        Nonlinearity after each hidden layer.
    dropout : float, default=0.0
        Probability of dropping a dense hidden unit while training.

    Examples
    --------
    >>> import torch
    >>> cnn = CNN(input_shape=(64,), n_classes=10, image_shape=(8, 8))
    >>> cnn(torch.zeros(2, 64)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        n_classes: int,
        image_shape: tuple[int, ...] | None = None,
        channels: Sequence[int] = (16, 32),
        kernel_size: int = 5,
        hidden_units: Sequence[int] = (128,),
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        shape = _image_shape(tuple(input_shape), image_shape)
        width_in, height, width = shape
        layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, shape)]
        for width_out in _widths("channels", channels):
            layers.append(nn.Conv2d(width_in, width_out, kernel_size, padding="same"))
            layers.append(_activation(activation))
            if min(height, width) >= 2:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            width_in = width_out
        n_flat = width_in * height * width
        super().__init__(
            *layers, nn.Flatten(), *_dense(n_flat, n_classes, hidden_units, activation, dropout)
        )
        self.image_shape = shape


# Modules whose forward pass is known not to draw random numbers.
_DETERMINISTIC = (
    *(MLP, CNN, nn.Sequential, nn.Flatten, nn.Unflatten, nn.Linear, *CONVOLUTIONS, *BATCH_NORMS),
    *(nn.GroupNorm, nn.LayerNorm),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    *(nn.Identity, Rescaling, nn.LeakyReLU, nn.Sigmoid, *ACTIVATIONS.values()),
)


def may_draw(module: nn.Module) -> bool:
    """Tell whether a forward pass may draw random numbers; a type not known may, or a hook."""
    return any(type(part) not in _DETERMINISTIC or is_changed(part) for part in module.modules())


MODULES: dict[str, type[nn.Module]] = {"mlp": MLP, "cnn": CNN}


def _image_shape(
    input_shape: tuple[int, ...], image_shape: tuple[int, ...] | None
) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that the samples are or hold."""
    shape = input_shape if image_shape is None else tuple(image_shape)
    if len(shape) not in (2, 3):
        raise ValueError(
            f"Got X with samples of shape {input_shape} and image_shape={image_shape!r}, but "
            "the CNN expected images: pass X of shape (n_samples, channels, height, width), "
            "or flat X with module__image_shape=(channels, height, width)."
        )
    if math.prod(shape) != math.prod(input_shape):
        raise ValueError(
            f"Got image_shape={image_shape!r}, but expected a shape that holds the "
            f"{math.prod(input_shape)} features of a sample."
        )
    channels, height, width = shape if len(shape) == 3 else (1, *shape)
    return channels, height, width


def _dense(
    n_in: int, n_out: int, hidden_units: Sequence[int], activation: str, dropout: float
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for n_hidden in _widths("hidden_units", hidden_units):
        layers += [nn.Linear(n_in, n_hidden), _activation(activation)]
        if dropout:
            layers.append(nn.Dropout(dropout))
        n_in = n_hidden
    return [*layers, nn.Linear(n_in, n_out)]


def _widths(name: str, widths: int | Sequence[int]) -> list[int]:
    """Return the widths of layers; a number is that of one layer."""
    return [check_count(name, width) for width in np.atleast_1d(np.asarray(widths, dtype=object))]


def _activation(name: str) -> nn.Module:
    return ACTIVATIONS[check_option("activation", name, ACTIVATIONS)]()


def module_params(
    module: str | Callable[..., nn.Module],
    given: dict[str, Any],
    *,
    input_shape: tuple[int, ...],
    n_classes: int,
) -> dict[str, Any]:
    """Return `given` and those sizes of the data that the signature asks for by name."""
    if isinstance(module, nn.Module):
        raise TypeError(
            f"Got module=<instance of {type(module).__name__}>, but expected a class or a "
            "function that makes a module, so that each fit can start from new weights "
            "(lambda: copy.deepcopy(net) starts from those of net)."
        )
    factory = _factory(module)
    try:
        accepted = inspect.signature(factory).parameters
    except ValueError:  # of classes written in C
        reject("module", module, "a class or a function that makes an nn.Module")
    sizes = {
        "n_features": math.prod(input_shape),
        "n_classes": n_classes,
        "input_shape": tuple(input_shape),
    }
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        for name in given:
            if name not in accepted:
                options = [option for option in accepted if option not in sizes]
                reject(
                    f"module__{name}",
                    given[name],
                    f"a parameter of the module: {', '.join(options)}"
                    + did_you_mean(name, options),
                )
    return {**{n: v for n, v in sizes.items() if n in accepted}, **given}


def make_module(
    module: str | Callable[..., nn.Module],
    params: dict[str, Any],
    *,
    input_shape: tuple[int, ...],
    n_classes: int,
    dtype: torch.dtype,
) -> nn.Module:
    """Make a module and let two samples of zeros through it, which sizes lazy layers too.

    Parameters
    ----------
    module : {"mlp", "cnn"}, nn.Module subclass or callable
    params : dict
        As `module_params` returns them.
    input_shape : tuple of int
        Shape of a sample.
    n_classes : int
        Number of logits expected.
    dtype : torch.dtype
        That of the weights.

    Raises
    ------
    TypeError
        If `module` does not make an `nn.Module`.
    ValueError
        If the output is not one logit for each class.
    """
    made = _made(module, params)
    made.to(dtype).eval()
    probe = torch.zeros(2, *input_shape, dtype=dtype)
    with torch.no_grad():
        try:
            output = made(probe)
        except RuntimeError as error:
            raise ValueError(
                f"Got module={module!r}, but expected one that takes {dtype} of shape "
                f"(n_samples, {', '.join(map(str, input_shape))}): {error}"
            ) from error
    made.train()
    if probe._version:
        raise ValueError(CHANGES_X)
    _check_logits(module, output, n_classes)
    if not any(weight.requires_grad for weight in made.parameters()):
        reject("module", module, "one with a parameter to train (requires_grad=True)")
    return made


def _made(module: str | Callable[..., nn.Module], params: dict[str, Any]) -> nn.Module:
    """Return what a class or function makes, if that is a module of real weights."""
    factory = _factory(module)
    try:
        inspect.signature(factory).bind(**params)
    except TypeError as error:
        expected = "all of its parameters, each said as module__<parameter>=..."
        raise TypeError(f"Got module={module!r}, but expected {expected}: {error}.") from error
    # Copies: training must not change what the user handed over, such as a trained backbone.
    made = factory(**copy.deepcopy(params))
    if not isinstance(made, nn.Module):
        reject("module", module, f"something that makes an nn.Module, not {type(made).__name__}")
    if any(weight.is_complex() for weight in made.parameters()):
        expected = "one with real weights (torch.view_as_complex makes a complex one)"
        reject("module", module, expected)
    _check_is_new(module, made)
    return made


# What modules made before consist of, as far as it lives on, by id: modules may not be hashable.
_MADE: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


def _check_is_new(module: Any, made: nn.Module) -> None:
    """Raise if weights to train are those of another fit, which would go on training them."""
    trained = [
        part
        for part in made.modules()
        if any(weight.requires_grad for weight in part.parameters(recurse=False))
    ]
    if any(_MADE.get(id(part)) is part for part in trained):
        raise ValueError(
            f"Got module={module!r}, which returned weights that it had returned before, but "
            "expected new ones each time, so that no fit changes another: return a "
            "copy.deepcopy of a trained module, or hold it fixed by requires_grad_(False)."
        )
    _MADE.update((id(part), part) for part in trained)


def _check_logits(module: Any, output: Any, n_classes: int) -> None:
    """Raise unless the output for two samples has their logits; warn of probabilities."""
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if shape != (2, n_classes):
        raise ValueError(
            f"Got module={module!r} whose output for 2 samples has shape {shape}, but expected "
            f"logits of shape (2, {n_classes}), one for each class."
        )
    if output_kind(output) != "logits":
        warnings.warn(
            f"Got module={module!r} whose outputs are positive and sum to 1, as probabilities "
            "do, but logits are expected: leave out the softmax.",
            UserWarning,
            stacklevel=3,
        )


def _factory(module: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return MODULES[module] if isinstance(module, str) else module
