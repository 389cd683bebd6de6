"""Units that no sample of a batch activates: the Jacobian is the same without them.

Where σ' of a unit is 0 at every sample, its column of the weight behind it and its row of the
weight before it meet only zeros, in the product and in both gradients. So have a tenth to a
fifth of the units of a ReLU network that is trained on MNIST, and products of many rows are
that much smaller without them.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from skjacobian.jacobian._cost import UNITS_OF_KERNELS, leaving_out_pays
from skjacobian.jacobian._maps import Dense, Diagonal, Map


class Live(NamedTuple):
    """What is left of a matrix: indices of rows and of columns; None for all."""

    rows: Tensor | None = None
    columns: Tensor | None = None

    def of(self, matrix: Tensor) -> Tensor:
        """Return what is left of a matrix."""
        for dim, left in enumerate(self):
            matrix = matrix if left is None else matrix.index_select(dim, left)
        return matrix

    def whole(self, part: Tensor, like: Tensor) -> Tensor:
        """Return a matrix of the shape of `like`, 0 where it is not `part`."""
        for dim, left in enumerate(self):
            if left is not None:
                shape = [*part.shape[:dim], like.shape[dim], *part.shape[dim + 1 :]]
                part = part.new_zeros(shape).index_copy_(dim, left, part)
        return part


def without_dead_units(maps: list[Map], n_rows: int) -> tuple[list[Map], list[Live] | None]:
    """Return maps without dead units, and what is left of the tensor of each that has one.

    Left out are units between two dense layers, by eights, where that pays. Where it nowhere
    does, the maps are the same, and there is None beside them.

    Parameters
    ----------
    maps : list of Map
        From the output to the input.
    n_rows : int
        Of all samples together.
    """
    inputs = [_live_inputs(maps[position:], n_rows) for position in range(len(maps))]
    if all(units is None for units in inputs):
        return maps, None
    made: list[Map] = []
    left: list[Live] = []
    between: Tensor | None = None  # the units that are left behind the layer
    for layer, units in zip(maps, inputs, strict=True):
        live = Live()
        if isinstance(layer, Dense):
            live, between = Live(between, units), units
        elif isinstance(layer, Diagonal):
            live = Live(None, between)
        made.append(_part(layer, live))
        if layer.tensor is not None:
            left.append(live)
    return made, left


def _live_inputs(maps: list[Map], n_rows: int) -> Tensor | None:
    """Return the inputs of the first map that are left, some dead ones among them; None is all."""
    slopes = [layer.slope for layer in _between_dense(maps)]
    # Not worth waiting for an accelerator to tell. And the gradient by a slope of 0 is not 0.
    if not slopes or any(slope.is_cuda or slope.requires_grad for slope in slopes):
        return None
    is_live = torch.stack([slope.any(0) for slope in slopes]).all(0)
    n_units, n_live = len(is_live), int(is_live.sum())
    n_left = min(n_units, math.ceil(n_live / UNITS_OF_KERNELS) * UNITS_OF_KERNELS)
    if not leaving_out_pays(n_rows, n_left, n_units):
        return None
    # The live ones first, each kind in its order.
    return is_live.logical_not().byte().argsort(stable=True)[:n_left].sort().values


def _between_dense(maps: list[Map]) -> list[Diagonal]:
    """Return the elementwise maps between the first map and the next, if both are dense."""
    diagonals: list[Diagonal] = []
    for layer in maps[1:]:
        if not isinstance(layer, Diagonal):
            return diagonals if _is_dense(maps[0]) and _is_dense(layer) else []
        diagonals.append(layer)
    return []


def _is_dense(layer: Map) -> bool:
    """Tell whether this is a linear layer of flat samples."""
    return isinstance(layer, Dense) and len(layer.input_shape) == 1


def _part(layer: Map, live: Live) -> Map:
    """Return what is left of a dense layer or of a slope."""
    if layer.tensor is None or (live.rows is None and live.columns is None):
        return layer
    part = layer.with_tensor(live.of(layer.tensor))
    return part if live.columns is None else replace(part, input_shape=(len(live.columns),))
