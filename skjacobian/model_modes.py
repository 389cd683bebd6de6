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

# What layers took in, one tensor for each time that they were called.
NormalizedInputs = dict[Any, list[Tensor]]


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
        with differentiable_recurrence(model):
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


@contextmanager
def differentiable_recurrence(model: object) -> Iterator[None]:
    """Keep cuDNN from the recurrent layers of a module for the duration.

    On CUDA it has no gradients of theirs in eval mode, and no second derivatives in any; torch
    itself has both.
    """
    layers = model.modules() if isinstance(model, nn.Module) else ()
    if not any(isinstance(layer, nn.RNNBase) for layer in layers):
        yield
        return
    was_enabled = torch.backends.cudnn.enabled
    try:
        torch.backends.cudnn.enabled = False
        yield
    finally:
        torch.backends.cudnn.enabled = was_enabled


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
def normalized_inputs(model: object) -> Iterator[NormalizedInputs]:
    """Record what running statistics are made of: the inputs of batch normalization in training.

    Of layers with a scale and a shift, which `statistics_following` needs.
    """
    inputs: NormalizedInputs = {}

    def record(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        (taken,) = (*args, *kwargs.values())
        inputs.setdefault(layer, []).append(taken)

    hooks = [
        layer.register_forward_hook(record, with_kwargs=True)
        for layer in (model.modules() if isinstance(model, nn.Module) else ())
        if isinstance(layer, _BatchNorm)
        and (layer.training and layer.track_running_stats and layer.affine)
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def statistics_following(inputs: NormalizedInputs) -> Iterator[None]:
    """Let running statistics follow the weights before them, as gradients see it.

    In training they do: smaller weights give smaller statistics, and the same network. Where
    running statistics are constants, a penalty is smaller for smaller weights, and shrinks them
    without end: the loss, which sees the statistics of the batch, does not resist.
    """
    layers = {layer: (layer.weight, layer.bias) for layer in inputs}
    try:
        for layer, (weight, bias) in layers.items():
            following = _Following.apply(  # type: ignore[no-untyped-call]
                weight, bias, (layer.running_var + layer.eps).sqrt(), layer.eps, *inputs[layer]
            )
            # Not by name: only parameters may take the name of one.
            layer._parameters["weight"], layer._parameters["bias"] = following
        yield
    finally:
        for layer, (weight, bias) in layers.items():
            layer.weight, layer.bias = weight, bias


class _Following(torch.autograd.Function):
    """Scale γ and shift β, with gradients by the inputs of their layer.

    With μ and σ² the moments of the inputs, which running statistics follow, these are the
    gradients of γ/σ, relative to γ, and of -γμ/running σ. Of several calls the mean is taken.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor, spread: Tensor, eps: float, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, spread, *inputs)
        ctx.eps = eps
        return weight.clone(), bias.clone()

    @staticmethod
    def backward(ctx: Any, by_scale: Tensor, by_shift: Tensor) -> tuple[Any, ...]:
        weight, spread, *inputs = ctx.saved_tensors
        gradients: list[Tensor | None] = []
        for X, wanted in zip(inputs, ctx.needs_input_grad[4:], strict=True):
            if not wanted:
                gradients.append(None)
                continue
            others = [dim for dim in range(X.ndim) if dim != 1]
            n = X.numel() // len(weight) * len(inputs)
            # A fifth of the time of torch.var_mean on a CPU.
            centred = X.to(weight.dtype) - X.to(weight.dtype).mean(others, keepdim=True)
            variance = centred.square().mean(others)
            # ∂σ²/∂x = 2(x - μ)/n and ∂μ/∂x = 1/n: a straight line in x for each channel.
            slope = -by_scale * weight / (variance + ctx.eps) / n
            offset = -by_shift * weight / spread / n
            shape = (-1, *[1] * (X.ndim - 2))
            line = torch.addcmul(offset.view(shape), centred, slope.view(shape))
            gradients.append(line.to(X.dtype))
        return by_scale, by_shift, None, None, *gradients


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
