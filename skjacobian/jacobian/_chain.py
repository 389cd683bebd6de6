"""The product of the maps of a chain of layers: rows of Jacobians, reductions, gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skjacobian.jacobian._autograd import as_cotangents
from skjacobian.jacobian._chosen import Index, at, n_chosen
from skjacobian.jacobian._cost import (
    blocks_pay,
    gram_pays,
    masked_product_pays,
    samples_in_block,
)
from skjacobian.jacobian._dead_units import without_dead_units
from skjacobian.jacobian._dense_products import (
    gram_gradient,
    gram_product,
    masked_gradients,
    masked_product,
)
from skjacobian.jacobian._linearization import Linearization
from skjacobian.jacobian._maps import Convolution, Dense, Diagonal, Map, Reshape
from skjacobian.jacobian._reductions import Reduction, SquaredLength

Gradients = list[Tensor | None]


class StackLinearization(Linearization):
    """The Jacobian of a chain of layers at each sample, as the product of its maps.

    Parameters
    ----------
    maps : list of Map
        From the output to the input.
    logits : Tensor of shape (n_all, n_classes)
        Of all samples of the forward pass.
    index : Tensor of shape (n_samples,), optional
        Those that the Jacobian is taken at; None is all.
    """

    def __init__(self, maps: list[Map], logits: Tensor, index: Index = None) -> None:
        super().__init__(logits)
        self.maps = maps
        self._index = index

    @property
    def logits(self) -> Tensor:
        """The logits, shape (n_samples, n_classes)."""
        return at(self._logits, self._index)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the logits, which comes cheaper than the logits."""
        n_all, n_classes = self._logits.shape
        return n_chosen(n_all, self._index), n_classes

    def rows(self, V: Tensor | None) -> Tensor:
        """Return the rows VJ of each sample, without a graph; see `Linearization.rows`."""
        with torch.no_grad():
            G = as_cotangents(V, self).expand(self.shape[0], -1, -1)
            maps, _ = without_dead_units(self.maps, n_rows=G.shape[0] * G.shape[1])
            for layer in maps:
                G = layer(G)
        return G.flatten(2)

    def reduced(self, V: Tensor | None, reduction: Reduction) -> Tensor:
        """Return a reduction of the rows VJ of each sample, shape (n_samples,)."""
        value: Tensor = _Reduced.apply(  # type: ignore[no-untyped-call]
            self, V, reduction, *self.tensors()
        )
        return value

    def at(self, index: Index) -> "StackLinearization":
        """Return the Jacobian at the samples that `index` chooses."""
        return StackLinearization([layer.at(index) for layer in self.maps], self._logits, index)

    @property
    def convolves(self) -> bool:
        """Tell whether there are convolutions."""
        return any(isinstance(layer, Convolution) for layer in self.maps)

    def numbers_per_row(self) -> int:
        """Return how many numbers a row of one sample leaves behind for the backward pass."""
        return sum(layer.numbers_per_row() for layer in self.maps)

    def tensors(self) -> list[Tensor]:
        """Return all that the rows depend on."""
        return [layer.tensor for layer in self.maps if layer.tensor is not None]

    def part(self, samples: slice, tensors: Sequence[Tensor]) -> "StackLinearization":
        """Return the Jacobian at some of the samples, with other tensors in place."""
        remaining = iter(tensors)
        maps = [layer.part(samples, remaining) for layer in self.maps]
        return StackLinearization(maps, self.logits[samples])


class _Reduced(torch.autograd.Function):
    """A reduction of VJ, with the backward pass of its tape."""

    @staticmethod
    def forward(
        ctx: Any,
        linearization: StackLinearization,
        V: Tensor | None,
        reduction: Reduction,
        *tensors: Tensor,
    ) -> Tensor:
        # For their versions alone: a weight changed in between is an error then.
        ctx.save_for_backward(*tensors)
        ctx.tape = Tape(linearization, V, reduction)
        return ctx.tape.run()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
        assert ctx.saved_tensors is not None
        wanted = ctx.needs_input_grad[3:]
        by_V, gradients = ctx.tape.gradients(weight, wanted)
        return None, (by_V if ctx.needs_input_grad[1] else None), None, *gradients


class Tape:
    """A reduction of the rows VJ, and what its backward pass needs.

    Parameters
    ----------
    linearization : StackLinearization
    V : Tensor or None
        As `Linearization.rows` takes it.
    reduction : Reduction
    """

    def __init__(
        self, linearization: StackLinearization, V: Tensor | None, reduction: Reduction
    ) -> None:
        self.reduction = reduction
        n_samples, n_classes = linearization.shape
        self.n_rows = n_samples * (n_classes if V is None else V.shape[1])
        self.wholes = linearization.tensors()
        maps, self.left = without_dead_units(linearization.maps, self.n_rows)
        self.start, self.maps = _start(linearization, maps, V)

    def run(self) -> Tensor:
        """Return the value, shape (n_samples,)."""
        G = self.start()
        self.end, maps = _end(self.reduction, self.maps, self.n_rows)
        self.steps: list[tuple[Map, Tensor]] = []
        for layer in maps:
            self.steps.append((layer, G))
            G = layer(G)
        value: Tensor = self.end(G)
        return value

    def gradients(
        self, weight: Tensor, wanted: Sequence[bool], totals: Gradients | None = None
    ) -> tuple[Tensor | None, Gradients]:
        """Return the gradients of Σ weight · value by V and by the maps' tensors.

        Parameters
        ----------
        weight : Tensor of shape (n_samples,)
        wanted : sequence of bool
            For each of `StackLinearization.tensors`, whether its gradient is.
        totals : list of Tensor or None
            Gradients that these are added to; None starts from nothing.
        """
        totals = [None] * len(wanted) if totals is None else totals
        if self.left is None:
            return self._gradients(weight, wanted, totals)
        by_V, parts = self._gradients(weight, wanted, [None] * len(wanted))
        gradients = [
            None if part is None else live.whole(part, like=tensor)
            for live, part, tensor in zip(self.left, parts, self.wholes, strict=True)
        ]
        return by_V, [_sum(*both) for both in zip(totals, gradients, strict=True)]

    def _gradients(
        self, weight: Tensor, wanted: Sequence[bool], totals: Gradients
    ) -> tuple[Tensor | None, Gradients]:
        """Return the gradients by V and by what is left of the tensors, added to `totals`."""
        position = len(wanted)
        D, of_end = self.end.gradients(weight)
        for gradient in of_end:
            position -= 1
            totals[position] = _sum(totals[position], gradient() if wanted[position] else None)
        for layer, G in reversed(self.steps):
            if layer.tensor is not None:
                position -= 1
                if wanted[position]:
                    total = totals[position]
                    totals[position] = (
                        layer.by_tensor(G, D) if total is None else layer.add_by_tensor(total, G, D)
                    )
            D = layer.by_cotangent(D)
        by_V, of_start = self.start.gradients(D, totals)
        for position, gradient in enumerate(of_start):
            if wanted[position]:
                totals[position] = gradient
        return by_V, totals


def _sum(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if total is None or gradient is None:
        return gradient if total is None else total
    return total.add_(gradient)


# --- the first rows ----------------------------------------------------------------------


def _start(
    linearization: StackLinearization, maps: list[Map], V: Tensor | None
) -> tuple[Any, list[Map]]:
    """Return what makes the first rows from the first of the maps, and the maps behind it."""
    n_samples = linearization.shape[0]
    if V is not None and V.is_floating_point():
        return _Cotangents(V), maps
    match maps:
        case [Dense(weight=weight), *behind] if V is not None:
            return _ChosenRows(V, weight), behind
        case [
            Dense(weight=weight),
            Diagonal(slope=slope),
            Dense(weight=W),
            *behind,
        ] if not slope.requires_grad and masked_product_pays(n_samples, W):
            # A product without a gradient by the slopes; piecewise linear activations need none.
            return _MaskedRows(weight, slope, W), behind
        case [Dense(weight=weight), *behind]:
            return _AllRows(weight, n_samples), behind
    cotangents = as_cotangents(V, linearization)
    return _Cotangents(cotangents.expand(n_samples, -1, -1)), maps


@dataclass(frozen=True)
class _Cotangents:
    """Rows given as combinations of logits."""

    V: Tensor

    def __call__(self) -> Tensor:
        return self.V

    def gradients(self, D: Tensor, totals: Gradients) -> tuple[Tensor | None, Gradients]:
        return D, []


@dataclass(frozen=True)
class _AllRows:
    """All rows of the last weight, for every sample."""

    weight: Tensor
    n_samples: int

    def __call__(self) -> Tensor:
        return self.weight.expand(self.n_samples, *self.weight.shape)

    def gradients(self, D: Tensor, totals: Gradients) -> tuple[None, Gradients]:
        return None, [_sum(totals[0], D.sum(0))]


@dataclass(frozen=True)
class _ChosenRows:
    """For each sample the rows of the last weight that V names."""

    V: Tensor
    weight: Tensor

    def __call__(self) -> Tensor:
        return torch.embedding(self.weight, self.V)

    def gradients(self, D: Tensor, totals: Gradients) -> tuple[None, Gradients]:
        total = torch.zeros_like(self.weight) if totals[0] is None else totals[0]
        return None, [total.index_add_(0, self.V.flatten(), D.flatten(0, 1))]


@dataclass(frozen=True)
class _MaskedRows:
    """All rows behind the last two dense layers."""

    weight: Tensor
    slope: Tensor
    W: Tensor

    def __call__(self) -> Tensor:
        return masked_product(self.weight, self.slope, self.W)

    def gradients(self, D: Tensor, totals: Gradients) -> tuple[None, Gradients]:
        by_weight, by_W = masked_gradients(self.weight, self.slope, self.W, D)
        return None, [_sum(totals[0], by_weight), None, _sum(totals[2], by_W)]


# --- the last rows -----------------------------------------------------------------------


def _end(reduction: Reduction, maps: list[Map], n_rows: int) -> tuple[Any, list[Map]]:
    """Return what reduces the rows, and the maps before it."""
    n_maps = len(maps)
    while n_maps and isinstance(maps[n_maps - 1], Reshape):
        n_maps -= 1
    match maps[:n_maps]:
        case [*before, Dense(input_shape=(_,), weight=W)]:
            if isinstance(reduction, SquaredLength) and gram_pays(n_rows, *W.shape):
                return _GramEnd(W), before
            if blocks_pay(n_rows, W):
                return _BlockEnd(W, reduction), before
    return _End(reduction), maps


@dataclass
class _End:
    """A reduction of the rows."""

    reduction: Reduction

    def __call__(self, rows: Tensor) -> Tensor:
        self.rows = rows
        return self.reduction(rows.flatten(2))

    def gradients(self, weight: Tensor) -> tuple[Tensor, list[Callable[[], Tensor]]]:
        D = self.reduction.gradient(self.rows.flatten(2), weight)
        return D.reshape(self.rows.shape), []


@dataclass
class _GramEnd:
    """Σ ‖a W‖² over the rows a, without the product a W."""

    W: Tensor

    def __call__(self, A: Tensor) -> Tensor:
        self.A, self.AG = A, gram_product(A, self.W)
        return torch.linalg.vecdot(self.A.flatten(1), self.AG.flatten(1))

    def gradients(self, weight: Tensor) -> tuple[Tensor, list[Callable[[], Tensor]]]:
        D = self.AG * (2 * weight).reshape(-1, 1, 1)
        return D, [lambda: gram_gradient(self.A, weight, self.W)]


@dataclass
class _BlockEnd:
    """A reduction of the rows A W, block by block of samples, which stay in the caches."""

    W: Tensor
    reduction: Reduction

    def __call__(self, A: Tensor) -> Tensor:
        self.A, self.rows = A, A.new_empty(*A.shape[:2], self.W.shape[1])
        values = []
        for block in self._blocks():
            rows = self.rows[block]
            torch.mm(A[block].flatten(0, 1), self.W, out=rows.flatten(0, 1))
            values.append(self.reduction(rows))
        return torch.cat(values)

    def gradients(self, weight: Tensor) -> tuple[Tensor, list[Callable[[], Tensor]]]:
        by_A, by_W = torch.empty_like(self.A), torch.zeros_like(self.W)
        for block in self._blocks():
            D = self.reduction.gradient(self.rows[block], weight[block]).flatten(0, 1)
            by_W.addmm_(self.A[block].flatten(0, 1).T, D)
            torch.mm(D, self.W.T, out=by_A[block].flatten(0, 1))
        return by_A, [lambda: by_W]

    def _blocks(self) -> list[slice]:
        step = samples_in_block(self.rows.shape[1] * self.rows.shape[2])
        return [slice(start, start + step) for start in range(0, len(self.A), step)]
