"""What a model is, and its modes for a while: frozen for an attack, batch normalization in eval."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

# What attacks, norms and objectives take for a model: samples in, logits out.
PredictLogits = Callable[[Tensor], Tensor]

# Mean and variance of each channel that a layer took in, one pair for each time it was called.
Moments = dict[Any, list[tuple[Tensor, Tensor]]]


@contextmanager
def frozen(model: object) -> Iterator[None]:
    """Put a module in eval mode with frozen parameters, and restore both afterwards."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


def trains_norms(model: object) -> bool:
    """Tell whether `model` is a module in training mode that `batch_norm_in_eval` changes."""
    return isinstance(model, nn.Module) and any(
        isinstance(module, _BatchNorm) or module.track_running_stats
        for module in model.modules()
        if isinstance(module, _NormBase) and module.training
    )


@contextmanager
def batch_norm_in_eval(model: object) -> Iterator[None]:
    """Put normalization that keeps running statistics in eval mode for the duration.

    That is batch normalization, and instance normalization that was told to.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    norms = [m for m in model.modules() if isinstance(m, _NormBase)]
    for module in norms:
        if isinstance(module, _BatchNorm) and not module.track_running_stats:
            raise ValueError(
                "Got a module with batch normalization that keeps no running statistics "
                "(track_running_stats=False), but expected one that treats each sample by "
                "itself: such a layer mixes the samples of a batch, so a sample has no "
                "Jacobian of its own. Use nn.GroupNorm or nn.LayerNorm."
            )
    changed = [
        (module, module.running_mean, module.running_var)
        for module in norms
        if module.training and module.track_running_stats
    ]
    try:
        for module, mean, variance in changed:
            module.training = False
            # A pass in training mode changes them in place, unseen by autograd: a graph that is
            # made here and differentiated after such a pass needs statistics of its own.
            module.running_mean, module.running_var = _copy(mean), _copy(variance)
        yield
    finally:
        for module, mean, variance in changed:
            module.training = True
            module.running_mean, module.running_var = mean, variance


@contextmanager
def moments_recorded(model: object) -> Iterator[Moments]:
    """Record what batch normalization in training mode makes running statistics of.

    Of layers with a scale and a shift, which `statistics_following` needs.
    """
    moments: Moments = {}

    def record(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        (taken,) = (*args, *kwargs.values())
        others = [dim for dim in range(taken.ndim) if dim != 1]
        variance, mean = torch.var_mean(taken.to(layer.weight.dtype), others, correction=0)
        moments.setdefault(layer, []).append((mean, variance))

    hooks = [
        layer.register_forward_hook(record, with_kwargs=True)
        for layer in (model.modules() if isinstance(model, nn.Module) else ())
        if isinstance(layer, _BatchNorm)
        and (layer.training and layer.track_running_stats and layer.affine)
    ]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def statistics_following(moments: Moments) -> Iterator[None]:
    """Let running statistics follow the weights before them, as gradients see it.

    In training they do: smaller weights give smaller statistics, and the same network. Where
    running statistics are constants, a penalty is smaller for smaller weights, and shrinks them
    without end: the loss, which sees the statistics of the batch, does not resist.

    No value changes. Scale and shift become γ·σ̄/σ and β - (γ/σ̄)(μ - μ̄), μ and σ the moments of
    the batch, and a bar what counts as a constant, in the shift the running σ.
    """
    layers = {layer: (layer.weight, layer.bias) for layer in moments}
    try:
        for layer, (weight, bias) in layers.items():
            mean, variance = (torch.stack(m).mean(0) for m in zip(*moments[layer], strict=True))
            variance = variance + layer.eps
            spread = (layer.running_var + layer.eps).sqrt()
            # Not by name: only parameters may take the name of one.
            layer._parameters["weight"] = weight * (variance.detach() / variance).sqrt()
            layer._parameters["bias"] = bias - weight.detach() / spread * (mean - mean.detach())
        yield
    finally:
        for layer, (weight, bias) in layers.items():
            layer.weight, layer.bias = weight, bias


def _copy(statistics: Tensor | None) -> Tensor | None:
    """Return a copy of what there is; what a lazy layer has yet to make it makes in place."""
    return statistics if statistics is None or is_lazy(statistics) else statistics.clone()


def running_statistics(model: object) -> dict[str, Tensor]:
    """Return the running statistics that normalization in eval mode uses now, by name."""
    if not isinstance(model, nn.Module):
        return {}
    return {
        f"{prefix}.{name}".removeprefix("."): buffer
        for prefix, module in model.named_modules()
        if isinstance(module, _NormBase)
        for name, buffer in module.named_buffers()
    }
