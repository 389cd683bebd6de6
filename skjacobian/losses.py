"""Per-sample losses of logits, each `(logits, y) -> (n_samples,)`, higher is worse."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy -log softmax(logits)_y of each sample.

    Parameters
    ----------
    logits : Tensor of shape (n_samples, n_classes)
    y : Tensor of shape (n_samples,)
        Class indices.

    Returns
    -------
    Tensor of shape (n_samples,)

    Examples
    --------
    >>> import torch
    >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).exp()
    tensor([4.])
    """
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Margin max_{k != y} z_k - z_y of each sample: positive where it is misclassified.

    The loss of Carlini & Wagner (arXiv 1608.04644, f_6) without its floor. Unlike
    cross-entropy its gradient does not vanish where the network is very confident.

    Parameters
    ----------
    logits : Tensor of shape (n_samples, n_classes)
    y : Tensor of shape (n_samples,)
        Class indices.

    Returns
    -------
    Tensor of shape (n_samples,)

    Examples
    --------
    >>> import torch
    >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
    tensor([-1.])
    """
    best, own = best_wrong_and_own(logits, y)
    return best - own


def best_wrong_and_own(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits max_{k != y} z_k and z_y of each sample: the margin lies between them.

    Parameters
    ----------
    logits : Tensor of shape (n_samples, n_classes)
    y : Tensor of shape (n_samples,)
        Class indices.

    Returns
    -------
    best_wrong, own : Tensor of shape (n_samples,)

    Examples
    --------
    >>> import torch
    >>> best_wrong_and_own(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
    (tensor([2.]), tensor([3.]))
    """
    index = y.unsqueeze(1)
    others = logits.scatter(1, index, -torch.inf)
    return others.amax(1), logits.gather(1, index).squeeze(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio of each sample: the margin over the spread of the best three.

    (max_{k != y} z_k - z_y) / (z_(1) - z_(3)) with the logits sorted downwards (Croce & Hein,
    arXiv 2003.01690, equation 6). It does not change when logits are multiplied. Two classes
    have no third logit; their margin is returned as it is.

    Parameters
    ----------
    logits : Tensor of shape (n_samples, n_classes)
    y : Tensor of shape (n_samples,)
        Class indices.

    Returns
    -------
    Tensor of shape (n_samples,)

    Examples
    --------
    >>> import torch
    >>> dlr(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
    tensor([-0.5000])
    """
    return margin(logits, y) / _spread(logits, [3])


# Temperature of `soft_margin` in units of the spread of the logits. From 1/20 to 1/10 PGD-40
# was about as strong on six pairs of MNIST network and ball, at 1/30 and 1/6 half a point weaker.
TEMPERATURE = 1 / 15


def soft_margin(logits: Tensor, y: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Margin of each sample with a soft maximum over the wrong classes.

    T log Σ_{k != y} exp(z_k / T) - z_y. At T = 1 its gradient is that of cross-entropy divided
    by 1 - p_y. So it weighs all wrong classes, as cross-entropy does, which finds more than the
    margin alone. Like the margin it has a gradient where the network is very confident, whose
    direction does not change when all logits are multiplied by one number.

    T is `temperature` times the spread max z - min z, treated as a constant. With four classes
    or more the spread is capped at three times the distance from the largest logit to the
    middle one, so that a few masked classes (logits of -1e9, say) do not widen it.

    Parameters
    ----------
    logits : Tensor of shape (n_samples, n_classes)
    y : Tensor of shape (n_samples,)
        Class indices.
    temperature : float, default=1/15
        T over the spread of the logits.

    Returns
    -------
    Tensor of shape (n_samples,)
        Negative only where the sample is classified correctly.

    Examples
    --------
    >>> import torch
    >>> logits = torch.tensor([[3.0, 1.0, 2.0]])
    >>> soft_margin(logits, torch.tensor([0]))
    tensor([-0.9999])
    >>> soft_margin(100 * logits, torch.tensor([0]))
    tensor([-99.9926])
    """
    value: Tensor = _SoftMargin.apply(logits, y, temperature)  # type: ignore[no-untyped-call]
    return value


def _width(logits: Tensor) -> Tensor:
    """Return the spread of the logits of each sample, whatever the lowest of them are."""
    largest = logits.amax(1, keepdim=True)
    whole = largest - logits.amin(1, keepdim=True)
    n_classes = logits.shape[1]
    if n_classes < 4:
        return whole
    middle = logits.kthvalue((n_classes + 1) // 2, dim=1, keepdim=True).values
    return torch.minimum(whole, 3 * (largest - middle))


def _soft_margin_and_slope(
    logits: Tensor, y: Tensor, temperature: float = TEMPERATURE
) -> tuple[Tensor, Tensor]:
    T = (temperature * _width(logits)).nan_to_num_(1.0, posinf=1.0)
    T.masked_fill_(T <= 0, 1.0)
    index = y.unsqueeze(1)
    others = (logits / T).scatter_(1, index, -torch.inf)
    log_sum = others.logsumexp(1, keepdim=True)
    value = (T * log_sum - logits.gather(1, index)).squeeze(1)
    # The soft maximum weighs the wrong classes by the softmax over them.
    return value, others.sub_(log_sum).exp_().scatter_(1, index, -1.0)


class _SoftMargin(torch.autograd.Function):
    """One node where autograd would make a dozen."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor, temperature: float) -> Tensor:
        value, slope = _soft_margin_and_slope(logits, y, temperature)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return upstream.unsqueeze(1) * slope, None, None


def value_and_slope(
    loss: Callable[..., Tensor], logits: Tensor, **params: Any
) -> tuple[Tensor, Tensor]:
    """Return `loss(logits, **params)` and its derivative by the logits, without a graph.

    In closed form for `soft_margin`, which attacks climb unless told otherwise: a step of an
    attack on a small network is spent on starting kernels, and autograd starts a dozen.

    Parameters
    ----------
    loss : callable
        Of this file: logits of shape (n_samples, n_classes) to one value for each sample.
    logits : Tensor of shape (n_samples, n_classes)
    **params
        What else the loss takes, by name.

    Returns
    -------
    value : Tensor of shape (n_samples,)
    slope : Tensor of shape (n_samples, n_classes)

    Examples
    --------
    >>> import torch
    >>> value_and_slope(margin, torch.tensor([[3.0, 1.0, 2.0]]), y=torch.tensor([0]))
    (tensor([-1.]), tensor([[-1.,  0.,  1.]]))
    """
    logits = logits.detach()
    if loss is soft_margin:
        return _soft_margin_and_slope(logits, **params)
    logits.requires_grad_()
    value = loss(logits, **params)
    (slope,) = torch.autograd.grad(value, logits, torch.ones_like(value))
    return value.detach(), slope


def targeted_cross_entropy(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Log-probability log softmax(logits)_target of each sample; `y` does not matter.

    Parameters
    ----------
    logits : Tensor of shape (n_samples, n_classes)
    y, target : Tensor of shape (n_samples,)
        True class, and the wrong class aimed at.

    Returns
    -------
    Tensor of shape (n_samples,)

    Examples
    --------
    >>> import torch
    >>> targeted_cross_entropy(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([1])).exp()
    tensor([0.2500])
    """
    return -F.cross_entropy(logits, target, reduction="none")


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Margin z_target - z_y of each sample.

    Parameters
    ----------
    logits : Tensor of shape (n_samples, n_classes)
    y, target : Tensor of shape (n_samples,)
        True class, and the wrong class aimed at.

    Returns
    -------
    Tensor of shape (n_samples,)

    Examples
    --------
    >>> import torch
    >>> logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    >>> targeted_margin(logits, torch.tensor([0]), torch.tensor([1]))
    tensor([-2.])
    """
    return (_of_class(logits, target) - _of_class(logits, y)).squeeze(1)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio (z_target - z_y) / (z_(1) - (z_(3) + z_(4)) / 2).

    Croce & Hein, arXiv 2003.01690, equation 7. Fewer than four classes have no such ratio
    that is not constant somewhere; their targeted margin is returned as it is.

    Parameters
    ----------
    logits : Tensor of shape (n_samples, n_classes)
    y, target : Tensor of shape (n_samples,)
        True class, and the wrong class aimed at.

    Returns
    -------
    Tensor of shape (n_samples,)

    Examples
    --------
    >>> import torch
    >>> logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    >>> targeted_dlr(logits, torch.tensor([0]), torch.tensor([1]))
    tensor([-0.8000])
    """
    return targeted_margin(logits, y, target) / _spread(logits, [3, 4])


def _of_class(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y.unsqueeze(1))


def _spread(logits: Tensor, ranks: list[int]) -> Tensor:
    """Return the largest logit minus the mean of those of `ranks`; 1 where there are fewer finite.

    At least the rounding error of the logits, so that ties can be divided by it.
    """
    if logits.shape[1] < max(ranks):
        return torch.ones_like(logits[:, 0])
    best = logits.topk(max(ranks), dim=1).values
    others = torch.stack([best[:, rank - 1] for rank in ranks]).mean(0)
    limits = torch.finfo(logits.dtype)
    # Infinite logits are those of masked classes.
    rounding = limits.eps * logits.detach().abs().nan_to_num(posinf=0.0).amax(1)
    spread = best[:, 0] - others
    spread = spread.where(spread.isfinite(), 1.0)
    return torch.maximum(spread, rounding.clamp(min=limits.tiny))


LOSSES: dict[str, Loss] = {
    "soft_margin": soft_margin,
    "cross_entropy": cross_entropy,
    "margin": margin,
    "dlr": dlr,
}

TARGETED_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "soft_margin": targeted_margin,  # one wrong class needs no soft maximum
    "cross_entropy": targeted_cross_entropy,
    "margin": targeted_margin,
    "dlr": targeted_dlr,
}


def _cross_entropy_lead(loss: Tensor) -> tuple[Tensor, Tensor]:
    """log(p_y / (1 - p_y)) of ℓ = -log p_y, and the size of its derivative by ℓ."""
    return -torch.expm1(loss).log(), -1 / torch.expm1(-loss)


def _margin_lead(loss: Tensor) -> tuple[Tensor, Tensor]:
    return -loss, torch.ones_like(loss)


# How far a model is ahead: a number that is positive only where it is right, from the loss
# of a sample, with the size of its derivative by the loss.
LEADS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "soft_margin": _margin_lead,
    "cross_entropy": _cross_entropy_lead,
    "margin": _margin_lead,
    "dlr": _margin_lead,
}
