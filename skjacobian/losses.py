"""Per-sample losses of logits, each `(logits, y) -> (n_samples,)`, higher is worse."""

from collections.abc import Callable

import torch
from torch import Tensor
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
    index = y.unsqueeze(1)
    others = logits.scatter(1, index, -torch.inf)
    return others.amax(1) - logits.gather(1, index).squeeze(1)


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
    """
    return (_of_class(logits, target) - _of_class(logits, y)).squeeze(1)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio (z_target - z_y) / (z_(1) - (z_(3) + z_(4)) / 2).

    Croce & Hein, arXiv 2003.01690, equation 7. With three classes the denominator is
    z_(1) - z_(3), with two it is 1.

    Parameters
    ----------
    logits : Tensor of shape (n_samples, n_classes)
    y, target : Tensor of shape (n_samples,)
        True class, and the wrong class aimed at.

    Returns
    -------
    Tensor of shape (n_samples,)
    """
    return targeted_margin(logits, y, target) / _spread(logits, [3, 4])


def _of_class(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y.unsqueeze(1))


def _spread(logits: Tensor, ranks: list[int]) -> Tensor:
    """Return the largest logit minus the mean of those of `ranks`, as far as they exist."""
    ranks = [rank for rank in ranks if rank <= logits.shape[1]]
    if not ranks:
        return torch.ones_like(logits[:, 0])
    best = logits.topk(max(ranks), dim=1).values
    others = torch.stack([best[:, rank - 1] for rank in ranks]).mean(0)
    return (best[:, 0] - others).clamp(min=torch.finfo(logits.dtype).tiny)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}

TARGETED_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
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
    "cross_entropy": _cross_entropy_lead,
    "margin": _margin_lead,
    "dlr": _margin_lead,
}
