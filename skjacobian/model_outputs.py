"""What a model returns: asked with checks, told apart, turned into logits, differentiated."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from skjacobian._rng import replayed_rng
from skjacobian.exceptions import NoGradientError
from skjacobian.model_modes import PredictLogits, batch_norm_in_eval, frozen

# From samples, or their logits, to one value for each sample.
SampleLoss = Callable[[Tensor], Tensor]

CHANGES_X = (
    "Got a model that changes its input in place, but expected one that leaves X as it is: "
    "x = x - 0.5, not x -= 0.5, and no inplace=True in its first layer."
)


MIXES_SAMPLES = (
    "Got a model whose answer to a sample depends on the samples beside it{}, but expected one "
    "that treats each by itself: else a sample has no Jacobian of its own. Statistics and sums "
    "over the batch do this (not those of nn.BatchNorm1d and its like, which are in eval mode "
    "meanwhile), and recurrent layers or attention without batch_first=True."
)


def outputs(model: PredictLogits, X: Tensor) -> Tensor:
    """Return what a model returns of samples, on their device.

    Of several estimators, the last may have its network on another.

    Raises
    ------
    TypeError
        If that is not one row of numbers for each sample.
    ValueError
        If the model has changed `X`.
    """
    version = None if X.is_inference() else X._version
    try:
        output = model(X)
    except RuntimeError as error:
        if "leaf Variable that requires grad" in str(error):
            raise ValueError(CHANGES_X) from error
        raise
    if version is not None and X._version != version:
        raise ValueError(CHANGES_X)
    check_output(output, X)
    return output.to(X.device)


def check_gradients_are_possible() -> None:
    """Raise a RuntimeError in inference mode, in which nothing has a gradient."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("Got torch.inference_mode(), but expected a mode with gradients.")


def check_output(output: object, X: Tensor) -> None:
    """Raise a TypeError unless a model has returned one row of numbers for each sample."""
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(X):
        got = f"type {type(output).__name__}"
        if isinstance(output, Tensor):
            got = f"shape {tuple(output.shape)}"
        raise TypeError(
            f"Got a model whose output for {len(X)} samples has {got}, but expected a tensor of "
            "logits of shape (n_samples, n_classes)."
        )


def check_class_indices(y: Tensor, n_classes: int) -> None:
    """Raise a ValueError if a class index is none of the columns of a model's output."""
    largest = int(y.max()) if len(y) else 0
    if largest >= n_classes:
        raise ValueError(
            f"Got y up to {largest} and a model of {n_classes} classes, but expected class indices "
            f"from 0 to {n_classes - 1}."
        )


def check_samples_apart(model: PredictLogits, X: Tensor) -> None:
    """Raise a ValueError if a model's answer to a sample depends on the samples beside it.

    Two samples are asked about side by side, and each beside itself, a module in eval mode. Of a
    model that answers at random, or takes no batches of two, this says nothing.
    """
    if len(X) < 2:
        return
    first, second = X[:1].detach(), X[1:2].detach()
    pairs = [(first, second), (first, second), (first, first), (second, second)]
    with frozen(model), batch_norm_in_eval(model), torch.no_grad():
        try:
            beside, again, of_first, of_second = (outputs(model, torch.cat(p)) for p in pairs)
        except Exception:
            return
    if not torch.equal(beside, again) or not bool(beside.isfinite().all()):
        return
    alone = torch.stack([of_first[0], of_second[1]])
    rounding = torch.finfo(beside.dtype).eps ** 0.5 * beside.abs().amax()
    if not bool(((beside - alone).abs() <= rounding).all()):
        raise ValueError(MIXES_SAMPLES.format(""))


def check_samples_apart_in_training(module: nn.Module, X: Tensor) -> None:
    """Raise a ValueError if a module's answer to a sample depends on others in training mode.

    Normalization that torch does not know as such keeps samples apart in eval mode alone. Behind
    the statistics of a batch the gradients of all its samples add up to nearly 0, and a penalty
    penalizes nothing. Asked is a copy, by gradients, which dropout does not disturb. Of a module
    that cannot be copied this says nothing.
    """
    X = X.detach().requires_grad_()
    with replayed_rng(X.device) as replay, replay():
        try:
            copied = copy.deepcopy(module).train()
            with batch_norm_in_eval(copied), torch.enable_grad():
                first = copied(X)[0]
                (by_X,) = torch.autograd.grad(first, X, torch.arange(1, len(first) + 1).to(first))
        except Exception:
            return
    if bool((by_X[1:].abs() > 0).any()):
        raise ValueError(MIXES_SAMPLES.format(" in training mode"))


def output_kind(output: Tensor) -> str:
    """Tell what a model returns: "logits", "probabilities" or "decisions" (one-hot rows)."""
    with torch.no_grad():
        in_simplex = (output >= 0).all() & ((output.sum(1) - 1).abs() <= 1e-4).all()
        if output.shape[1] < 2 or len(output) == 0 or not bool(in_simplex):
            return "logits"
        is_one_hot = bool(((output == 0) | (output == 1)).all())
        return "decisions" if is_one_hot else "probabilities"


def log_of_probabilities(probabilities: Tensor) -> Tensor:
    """Return logits of probabilities.

    They differ from those that the probabilities come from by a constant of the sample, which
    changes neither losses nor margins. Cross-entropy of the probabilities themselves, as if
    they were logits, has hardly any gradient.
    """
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()


def input_gradient(loss: SampleLoss, X: Tensor) -> Tensor:
    """Return ∂(Σ_i loss_i)/∂X, shape of X, by `torch.autograd.grad`; it may be overwritten.

    Raises
    ------
    NoGradientError
        If the loss does not depend on X differentiably.
    """
    X = X.detach().requires_grad_()
    value = loss(X)
    return pulled_back(torch.ones_like(value), value, X)


def pulled_back(slope: Tensor, output: Tensor, X: Tensor) -> Tensor:
    """Return slopeᵀ ∂output/∂X, shape of X, by `torch.autograd.grad`; it may be overwritten.

    Raises
    ------
    NoGradientError
        If the output does not depend on X differentiably.
    """
    gradient = None
    if output.requires_grad:
        (gradient,) = torch.autograd.grad(output, X, slope, allow_unused=True)
    if gradient is None:
        raise NoGradientError(
            "Got predict_logits whose output does not depend on X differentiably, but "
            "expected a differentiable model: a gradient attack cannot run on it."
        )
    # Behind a sum over features all of these share one number in memory.
    return gradient.contiguous() if 0 in gradient.stride() else gradient
