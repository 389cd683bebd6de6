"""What a model is, and its modes for a while: frozen for an attack, batch normalization in eval."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

# What attacks, norms and objectives take for a model: samples in, logits out.
PredictLogits = Callable[[Tensor], Tensor]


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
