"""Logits and Jacobian norms of a dense network, with one backward pass by hand for both.

The gradient of a loss by a weight is δᵀh: δ the cotangents of the layer's output, h its
input. That of a norm is GᵀD: G the cotangents that make the rows of the Jacobian, D the
tangents that the norm's gradient becomes on its way back. So both are `by_tensor` of the
same map, and δ goes down through the same maps as G. On small networks autograd's books
cost more than these products; here a penalty costs little more than its operations.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from skjacobian.jacobian._chain import Tape
from skjacobian.jacobian._chosen import Index, at, n_chosen, spread
from skjacobian.jacobian._cost import rows_that_fit
from skjacobian.jacobian._maps import Dense
from skjacobian.jacobian._norms import JacobianNorm
from skjacobian.jacobian._relu_pass import ReLUPass, relu_pass_fits
from skjacobian.jacobian._stack import Stack
from skjacobian.layers import DROPOUTS

LAYERS = frozenset((nn.Linear, nn.ReLU, nn.LeakyReLU, nn.Flatten, nn.Identity, *DROPOUTS))


def joint_pass_fits(layers: list[nn.Module], norm: JacobianNorm, n_samples: int) -> bool:
    """Tell whether `joint_pass` knows the layers and the norm, and has room for the rows."""
    last = layers[-1] if layers else None
    if norm.output != "logits" or not isinstance(last, nn.Linear):
        return False
    numbers = 0
    for layer in layers:
        if type(layer) not in LAYERS:
            return False
        if isinstance(layer, nn.Linear):
            numbers += 2 * layer.in_features
    n_rows = norm.n_rows(last.out_features) * n_samples
    return n_rows <= rows_that_fit(numbers, last.weight.dtype)


def joint_pass(
    layers: list[nn.Module],
    X: Tensor,
    index: Index,
    norm: JacobianNorm,
    y: Tensor | None,
    generator: torch.Generator,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return logits, and the norm at the samples chosen, 0 at the others.

    Parameters
    ----------
    layers : list of nn.Module
        Such as `joint_pass_fits` accepts.
    X : Tensor of shape (n_samples, *features)
    index : Tensor of shape (n_chosen,) or None
    norm : JacobianNorm
    y : Tensor of shape (n_chosen,) or None
        Class indices, where the norm depends on them.
    generator : torch.Generator
    scale : float, default=1
        What the norms are multiplied by.

    Returns
    -------
    logits : Tensor of shape (n_samples, n_classes)
    norms : Tensor of shape (n_samples,)
    """
    dense = [layer for layer in reversed(layers) if isinstance(layer, nn.Linear)]
    tensors = [layer.weight for layer in dense] + [layer.bias for layer in dense]
    if relu_pass_fits(layers, X, norm, n_chosen(len(X), index)):
        logits, norms = ReLUPass.apply(  # type: ignore[no-untyped-call]
            X, index, norm, generator, scale, *tensors
        )
        return logits, norms
    measure = (norm, y, generator, scale)
    logits, norms = _JointPass.apply(  # type: ignore[no-untyped-call]
        layers, X, index, measure, *tensors
    )
    return logits, norms


class _JointPass(torch.autograd.Function):
    """The tensors are the weights, from the last layer to the first, then their biases."""

    @staticmethod
    def forward(
        ctx: Any,
        layers: list[nn.Module],
        X: Tensor,
        index: Index,
        measure: tuple[JacobianNorm, Tensor | None, torch.Generator, float],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        stack = Stack(layers, X)
        at_all = stack.linearize()
        chosen = at_all if index is None else at_all.at(index)
        norm, y, generator, scale = measure
        V, reduction, factor = norm.rows_wanted(chosen, y, generator)
        ctx.factor, ctx.index = scale * factor, index
        ctx.tape = Tape(chosen, V, reduction)
        # For their versions alone: a weight changed in between is an error then.
        ctx.save_for_backward(*tensors)
        ctx.maps = at_all.maps
        ctx.inputs = [r.input for r in reversed(stack.records) if isinstance(r.layer, nn.Linear)]
        return stack.logits, spread(ctx.factor * ctx.tape.run(), index, len(X))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor, weight: Tensor) -> tuple[Any, ...]:
        assert ctx.saved_tensors is not None
        n_dense = len(ctx.inputs)
        weights_wanted = iter(ctx.needs_input_grad[4 : 4 + n_dense])
        biases_wanted = iter(ctx.needs_input_grad[4 + n_dense :])
        inputs = iter(ctx.inputs)
        delta = delta.unsqueeze(1)
        wanted, totals, by_bias = [], [], []
        for layer in ctx.maps:
            if isinstance(layer, Dense):
                wanted.append(next(weights_wanted))
                h = next(inputs).unsqueeze(1)
                totals.append(layer.by_tensor(delta, h) if wanted[-1] else None)
                by_bias.append(delta.sum((0, 1)) if next(biases_wanted) else None)
            elif layer.tensor is not None:
                wanted.append(False)
                totals.append(None)
            if len(by_bias) < n_dense:
                delta = layer(delta)
        _, totals = ctx.tape.gradients(ctx.factor * at(weight, ctx.index), wanted, totals)
        tensors = (layer for layer in ctx.maps if layer.tensor is not None)
        by_weight = [
            t for layer, t in zip(tensors, totals, strict=True) if isinstance(layer, Dense)
        ]
        return None, None, None, None, *by_weight, *by_bias
