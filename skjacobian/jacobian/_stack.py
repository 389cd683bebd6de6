"""Closed form of the Jacobian of a chain of layers: products of weights and slopes.

For a network z ↦ W_L σ(W_{L-1} … σ(W_1 x)) the Jacobian at a sample is
W_L D_{L-1} W_{L-1} … D_1 W_1, D_l = diag σ'(z_l), so its rows need no backward passes of
autograd: the forward pass that the loss takes anyway leaves all the slopes.
"""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from skjacobian.jacobian._chain import StackLinearization
from skjacobian.jacobian._chosen import Index, at, n_chosen
from skjacobian.jacobian._maps import (
    AveragePooling,
    ChannelScale,
    Convolution,
    Dense,
    Diagonal,
    Map,
    MaxPooling,
    Reshape,
)
from skjacobian.layers import (
    ACTIVATIONS,
    BATCH_NORMS,
    CONVOLUTIONS,
    DROPOUTS,
    POOLINGS,
    Rescaling,
    is_changed,
    is_plain_sequence,
    pair,
    pools_disjointly,
)

ALWAYS_KNOWN = frozenset((nn.Linear, nn.ReLU, nn.Identity, Rescaling, *DROPOUTS))


def chain_of(model: object) -> list[nn.Module] | None:
    """Return the layers of a model whose Jacobian has a closed form here; else None.

    That is an `nn.Sequential`, or a subclass with its `forward`, nested as deep as may be,
    of linear, convolution, batch normalization (in eval mode), rescaling, pooling without
    overlap, dropout, flattening and elementwise activation layers, without hooks and without
    autocast.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return None
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    layers: list[nn.Module] = []
    return layers if _append_layers(model, layers) else None


def _append_layers(model: object, layers: list[nn.Module]) -> bool:
    """Append the layers of a model; tell whether all of them are known."""
    if not isinstance(model, nn.Module) or is_changed(model):
        return False
    if is_plain_sequence(model):
        return all(_append_layers(child, layers) for child in model._modules.values())
    layers.append(model)
    return _is_known(model)


def _is_known(layer: Any) -> bool:
    """Tell whether a layer, by its type and settings, is one of those handled here."""
    kind = type(layer)
    if kind in ALWAYS_KNOWN:
        return True
    if kind in CONVOLUTIONS:
        return layer.padding_mode == "zeros" and _padding(layer) is not None
    if kind in BATCH_NORMS:
        return not layer.training and bool(layer.track_running_stats)
    if kind in POOLINGS:
        return pools_disjointly(layer) and getattr(layer, "divisor_override", None) is None
    if kind is nn.Flatten:
        return (layer.start_dim, layer.end_dim) == (1, -1)
    if kind is nn.Unflatten:
        return layer.dim == 1
    return kind in ACTIVATIONS and not getattr(layer, "inplace", False)


def _padding(layer: Any) -> tuple[int, ...] | None:
    """Return the padding of a convolution on each side; None where the sides differ."""
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    if layer.padding == "same":
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return None if any(r % 2 for r in reach) else tuple(r // 2 for r in reach)
    return tuple(layer.padding)


class Record(NamedTuple):
    """What the forward pass of one layer leaves behind."""

    layer: Any
    input: Tensor
    output: Tensor
    # Dropout: the mask; max pooling: where in the input the maxima are.
    note: Tensor | None


# Takes of the samples of a batch those that are wanted.
Pick = Callable[[Tensor], Tensor]


class Stack:
    """A forward pass through a chain of layers, from which the Jacobian can be had.

    Parameters
    ----------
    layers : list of nn.Module
        As `chain_of` returns them.
    X : Tensor of shape (n_samples, *features)

    Attributes
    ----------
    logits : Tensor of shape (n_samples, n_classes)
    """

    def __init__(self, layers: list[nn.Module], X: Tensor) -> None:
        self.records: list[Record] = []
        value = X
        for layer in layers:
            output, note = _forward(layer, value)
            self.records.append(Record(layer, value, output, note))
            value = output
        self.logits = value

    def linearize(self, index: Index = None) -> StackLinearization:
        """Return the Jacobian at the samples, or at those that `index` chooses."""

        def pick(value: Tensor) -> Tensor:
            return at(value, index)

        maps: list[Map] = []
        before: Record | None = None
        for record, following in zip_longest(self.records, self.records[1:]):
            kind = type(record.layer)
            if kind in ACTIVATIONS and following and type(following.layer) is nn.MaxPool2d:
                before = record
            elif kind is nn.MaxPool2d:
                maps.append(_max_pooling(record, pick, before))
                before = None
            elif (made := _MAPS[kind](record, pick)) is not None:
                maps.append(made)
        if self.records and type(self.records[0].layer) is Rescaling:
            n_samples = n_chosen(len(self.logits), index)
            maps = _merged(maps, n_samples * self.logits.shape[1])
        return StackLinearization(maps[::-1], self.logits, index)


def _merged(maps: list[Map], n_rows: int) -> list[Map]:
    """Return the maps, the scale of the input in the weight behind it if that has fewer rows.

    Besides, the Gram matrix of that weight can then take the place of the product with it.
    """
    match maps:
        case [ChannelScale(input_shape=(_,), scale=scale), Dense(weight=weight), *behind]:
            if len(weight) <= n_rows:
                return [Dense(maps[0].input_shape, weight * scale), *behind]
    return maps


def _forward(layer: Any, value: Tensor) -> tuple[Tensor, Tensor | None]:
    # Without the calling conventions of modules, which cost as much as a small product.
    kind = type(layer)
    if kind is nn.Linear:
        return F.linear(value, layer.weight, layer.bias), None
    if kind is nn.ReLU:
        return torch.relu(value), None
    if kind is nn.MaxPool2d:
        return F.max_pool2d(value, layer.kernel_size, return_indices=True)
    if kind in DROPOUTS:
        if not layer.training or layer.p == 0:
            return value, None
        mask = layer(torch.ones_like(value))
        return value * mask, mask
    return layer(value), None


def _dense(record: Record, pick: Pick) -> Map:
    return Dense(tuple(record.input.shape[1:]), record.layer.weight)


def _diagonal(record: Record, pick: Pick) -> Map:
    return Diagonal(tuple(record.input.shape[1:]), _slope(record, pick))


def _mask(record: Record, pick: Pick) -> Map | None:
    shape = tuple(record.input.shape[1:])
    return None if record.note is None else Diagonal(shape, pick(record.note))


def _convolution(record: Record, pick: Pick) -> Map:
    layer, padding = record.layer, _padding(record.layer)
    assert padding is not None
    shape = tuple(record.input.shape[1:])
    return Convolution(shape, layer.weight, layer.stride, padding, layer.dilation, layer.groups)


def _average_pooling(record: Record, pick: Pick) -> Map:
    return AveragePooling(tuple(record.input.shape[1:]), pair(record.layer.kernel_size))


def _channel_scale(record: Record, pick: Pick) -> Map:
    layer = record.layer
    scale = (layer.running_var + layer.eps).rsqrt()
    scale = scale if layer.weight is None else layer.weight * scale
    return ChannelScale(tuple(record.input.shape[1:]), scale)


def _rescaling(record: Record, pick: Pick) -> Map | None:
    scale = record.layer.scale
    return None if scale is None else ChannelScale(tuple(record.input.shape[1:]), scale)


def _reshape(record: Record, pick: Pick) -> Map | None:
    before, after = record.input.shape[1:], record.output.shape[1:]
    return None if before == after else Reshape(tuple(before), tuple(after))


def _slope(record: Record, pick: Pick) -> Tensor:
    """Return σ'(z) of an activation, differentiable by z where that depends on it."""
    if type(record.layer) is nn.ReLU:
        return pick(record.output.detach()).sign()
    z = pick(record.input)
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not z.requires_grad:
            z = z.detach().requires_grad_()
        activated = record.layer(z)
        (slope,) = torch.autograd.grad(activated, z, torch.ones_like(activated), create_graph=graph)
    return slope


def _max_pooling(record: Record, pick: Pick, before: Record | None = None) -> MaxPooling:
    """Return the derivative of max pooling, of an activation before it included."""
    assert record.note is not None
    height, width = pair(record.layer.kernel_size)
    row, column = (torch.arange(n, device=record.note.device) for n in record.note.shape[-2:])
    input_width = record.input.shape[-1]
    corner = (row * height * input_width).unsqueeze(1) + column * width
    offset = pick(record.note) - corner
    places = [i * input_width + j for i in range(height) for j in range(width)]
    slopes = torch.stack([offset == place for place in places], 1).to(record.output.dtype)
    if before is not None:
        at_maximum = before._replace(
            input=before.input.flatten(-2)
            .gather(-1, record.note.flatten(-2))
            .reshape(record.note.shape),
            output=record.output,
        )
        slopes = slopes * _slope(at_maximum, pick).unsqueeze(1)
    return MaxPooling(tuple(record.input.shape[1:]), (height, width), slopes)


# The derivative of each kind of layer; None where it is the identity.
_MAPS: dict[type, Callable[[Record, Pick], Map | None]] = {
    nn.Linear: _dense,
    nn.Identity: lambda record, pick: None,
    Rescaling: _rescaling,
    nn.Flatten: _reshape,
    nn.Unflatten: _reshape,
    nn.AvgPool2d: _average_pooling,
    **dict.fromkeys(ACTIVATIONS, _diagonal),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(BATCH_NORMS, _channel_scale),
    **dict.fromkeys(DROPOUTS, _mask),
}
