"""What a model is made of, as far as the cost of its Jacobian depends on it: counted once."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from skjacobian.model_modes import batch_norm_in_eval, frozen
from skjacobian.model_outputs import outputs


class Sizes(NamedTuple):
    """What the cost of a model's Jacobian depends on."""

    # Of one forward pass of one sample; 0 for a callable of unknown inside.
    operations: int
    n_classes: int


_SIZES: weakref.WeakKeyDictionary[nn.Module, Sizes] = weakref.WeakKeyDictionary()


def sizes_of(model: Callable[[Tensor], Tensor], X: Tensor) -> Sizes:
    """Return the sizes of a model, found once for each module from its first sample.

    Counted are the products with weights: 2 operations for each number of a weight, at each
    place of a convolution's output and for each row that a linear layer is applied to. Where
    there are weights of another kind, torch counts all products.
    """
    if not isinstance(model, nn.Module):
        with torch.no_grad():
            return Sizes(0, outputs(model, X[:1].detach()).shape[1])
    if model not in _SIZES:
        counts: list[int] = []
        seen: set[int] = set()

        def count(layer: nn.Module, inputs: Any, output: Any) -> None:
            weight = getattr(layer, "weight", None)
            shaped = isinstance(output, Tensor) and output.ndim > 0
            if isinstance(weight, Tensor) and weight.ndim >= 2 and shaped:
                seen.add(id(weight))
                counts.append(2 * weight.numel() * output[0].numel() // len(weight))

        layers = [layer for layer in model.modules() if not layer._modules]
        hooks = [layer.register_forward_hook(count) for layer in layers]
        try:
            with batch_norm_in_eval(model), frozen(model), torch.no_grad():
                n_classes = outputs(model, X[:1].detach()).shape[1]
        finally:
            for hook in hooks:
                hook.remove()
        is_whole = all(p.ndim < 2 or id(p) in seen for p in model.parameters())
        operations = sum(counts) if is_whole else _operations_seen_by_torch(model, X[:1].detach())
        _SIZES[model] = Sizes(operations, n_classes)
    return _SIZES[model]


def _operations_seen_by_torch(model: nn.Module, X: Tensor) -> int:
    """Return the operations of the products in a forward pass, whatever weights they are with.

    Not asked where all weights are those of layers: at its first use it imports for a second.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False, custom_mapping=_RECURRENT)
    # With a gradient, without which transformers take a way of their own that is not counted.
    with batch_norm_in_eval(model), frozen(model), torch.enable_grad(), counter:
        model(X.requires_grad_() if X.is_floating_point() else X)
    return int(counter.get_total_flops())


def _operations_of_rnn(
    X: torch.Size, input_weight: torch.Size, hidden_weight: torch.Size, *_: Any, **__: Any
) -> int:
    return 2 * X[0] * X[1] * (input_weight.numel() + hidden_weight.numel())


_RECURRENT = {torch.ops.aten.mkldnn_rnn_layer: _operations_of_rnn}
