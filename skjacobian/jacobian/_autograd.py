"""The Jacobian of any differentiable model, by backward passes."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from skjacobian._rng import replayed_rng
from skjacobian.jacobian._linearization import Linearization
from skjacobian.jacobian._reductions import ReducedRows, Reduction
from skjacobian.layers import CONVOLUTIONS
from skjacobian.model_modes import (
    PredictLogits,
    batch_norm_in_eval,
    differentiable_recurrence,
    running_statistics,
)
from skjacobian.model_outputs import check_gradients_are_possible, outputs


class AutogradLinearization(Linearization):
    """The Jacobian of a model at each sample, one backward pass for each of its rows.

    Parameters
    ----------
    predict_logits : callable
    X : Tensor of shape (n_samples, *features)
    batched : bool
        Take all backward passes at once, by `torch.vmap`, instead of one after another.
    create_graph : bool
        Whether the rows can be differentiated.
    may_loop : bool
        Whether one after another will do where `batched` fails.
    """

    def __init__(
        self,
        predict_logits: PredictLogits,
        X: Tensor,
        *,
        batched: bool,
        create_graph: bool,
        may_loop: bool = False,
    ) -> None:
        check_gradients_are_possible()
        self.predict_logits = predict_logits
        self.batched = batched
        self.create_graph = create_graph
        self.may_loop = may_loop
        saved_sizes: list[int] = []

        def count(saved: Tensor) -> Tensor:
            saved_sizes.append(saved.numel())
            return saved.detach()

        with (
            replayed_rng(X.device) as self._replay,
            torch.enable_grad(),
            batch_norm_in_eval(predict_logits),
            differentiable_recurrence(predict_logits),
            # The other kernels of attention have no second derivative.
            sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext(),
        ):
            self.X = X.detach().requires_grad_()
            self._statistics = running_statistics(predict_logits)
            with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
                logits = outputs(predict_logits, self.X)
        if create_graph:
            _check_differentiable_twice(logits)
        super().__init__(logits)
        self._saved_numbers = sum(saved_sizes)

    def rows(self, V: Tensor | None) -> Tensor:
        """Return the rows VJ of each sample; see `Linearization.rows`."""
        V = as_cotangents(V, self.logits)
        # Each cotangent by itself, in the order of rows, not of samples.
        cotangents = V.transpose(0, 1).expand(-1, *self.logits.shape)
        rows = None
        if self.batched and len(cotangents) > 1:
            rows = self._all_vjps(cotangents.contiguous())
        if rows is None:
            rows = torch.stack([self._vjp(v) for v in cotangents])
        return rows.flatten(2).transpose(0, 1)

    def reduced(self, V: Tensor | None, reduction: Reduction) -> Tensor:
        """Return a reduction of the rows VJ of each sample, shape (n_samples,)."""
        value: Tensor = ReducedRows.apply(self.rows(V), reduction)  # type: ignore[no-untyped-call]
        return value

    def _all_vjps(self, cotangents: Tensor) -> Tensor | None:
        """Return all products in one pass, or None if a function in the model has no such pass."""
        try:
            return self._vjp(cotangents)
        except RuntimeError as error:
            if self.may_loop:
                return None
            raise ValueError(
                "Got engine='batched', but expected 'loop' or 'auto' for this model: a function "
                f"in it cannot be differentiated for all classes at once ({error})"
            ) from error

    def _vjp(self, v: Tensor) -> Tensor:
        product = None
        if self.logits.requires_grad:
            (product,) = torch.autograd.grad(
                self.logits,
                self.X,
                v,
                create_graph=self.create_graph,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=v.ndim > self.logits.ndim,
            )
        if product is None:
            raise ValueError(
                "Got logits that do not depend on X differentiably, but expected those of a "
                "differentiable model."
            )
        return product

    @property
    def convolves(self) -> bool:
        """Tell whether there are convolutions."""
        model = self.predict_logits
        return isinstance(model, nn.Module) and any(
            isinstance(layer, CONVOLUTIONS) for layer in model.modules()
        )

    def numbers_per_row(self) -> int:
        """Return how many numbers a row of one sample leaves behind for the backward pass.

        About as many as the forward pass left for the first backward pass.
        """
        return -(-self._saved_numbers // max(1, len(self.X)))

    def tensors(self) -> list[Tensor]:
        """Return the parameters; none are known of a callable that is not a module."""
        model = self.predict_logits
        return list(model.parameters()) if isinstance(model, nn.Module) else []

    def part(self, samples: slice, tensors: Sequence[Tensor]) -> "AutogradLinearization":
        """Return the Jacobian at some of the samples, with other parameters in place.

        Layers that draw at random draw the same each time for the same samples, so that all
        rows of a sample, taken in whatever parts, see one dropout mask.
        """
        model = self.predict_logits
        predict_logits = model
        if isinstance(model, nn.Module):
            # A pass in training mode may have changed the statistics by the time of the gradients.
            state = _by_place(model, tensors) | self._statistics

            def predict_logits(X: Tensor) -> Tensor:
                with batch_norm_in_eval(model):
                    output = functional_call(model, state, (X,), tie_weights=False)
                    return cast(Tensor, output)

        with self._replay(variant=samples.start or 0):
            return AutogradLinearization(
                predict_logits,
                self.X[samples],
                batched=self.batched,
                create_graph=self.create_graph,
                may_loop=self.may_loop,
            )


# What `once_differentiable` makes of a backward pass.
_ONCE = once_differentiable(lambda ctx: ctx).__code__


def _check_differentiable_twice(logits: Tensor) -> None:
    """Raise a ValueError for a custom function in the graph that is marked as having no second.

    Torch says so only in some ways of asking; in others its part of the gradient is missing.
    """
    for node in _graph(logits):
        function: Any = getattr(node, "_forward_cls", None)
        if function is not None and getattr(function.backward, "__code__", None) is _ONCE:
            raise ValueError(
                f"Got a model with the function {function.__name__}, marked @once_differentiable, "
                "but expected one that can be differentiated twice: the gradient of a penalty on "
                "the Jacobian is a second derivative."
            )


def _graph(output: Tensor) -> set[Any]:
    """Return the nodes of the autograd graph of a tensor."""
    nodes: set[Any] = set()
    to_visit: set[Any] = {output.grad_fn}
    while to_visit:
        node = to_visit.pop()
        if node is not None:
            nodes.add(node)
            to_visit.update(before for before, _ in node.next_functions if before not in nodes)
    return nodes


def _by_place(model: nn.Module, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what to put in the place of each parameter, by the name of the place.

    A parameter may have several places, a layer several names, of which one is given: torch
    takes out a layer that is given twice and does not put its own parameter back.
    """
    of = {id(p): tensor for p, tensor in zip(model.parameters(), tensors, strict=True)}
    return {
        f"{prefix}.{name}".removeprefix("."): of[id(parameter)]
        for prefix, layer in model.named_modules()
        for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False)
    }


def as_cotangents(V: Tensor | None, like: Any) -> Tensor:
    """Return V as cotangents of logits, shape (n_samples or 1, n_rows, n_classes)."""
    if V is not None and V.is_floating_point():
        return V
    unit = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    return unit.unsqueeze(0) if V is None else unit[V]
