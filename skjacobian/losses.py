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


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin}


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
}
