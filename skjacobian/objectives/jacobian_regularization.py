"""Jacobian regularization (Wu & Li, arXiv 2412.12449; Hoffman et al., arXiv 1908.02729)."""

from typing import Any

import torch
from torch import Tensor

from skjacobian._rng import replayed_rng
from skjacobian.jacobian import jacobian_norm_of
from skjacobian.losses import cross_entropy
from skjacobian.model_modes import batch_norm_in_eval, mixes_samples
from skjacobian.objectives._base import Objective, ObjectiveValue, PredictLogits


class JacobianRegularization(Objective):
    """Cross-entropy plus λ times a norm of the Jacobian of the logits.

    ℓ(x) + λ‖J(x)‖: to first order an upper bound on the adversarial loss, the l2 norm
    under l2 attack and the l1 norm under linf attack (following Wu & Li, arXiv
    2412.12449; λ is a free parameter, not the radius of the attack).

    Parameters
    ----------
    lam : float, default=0.005
        λ. Also a tensor with one value per sample.
    norm : {"l2", "l1", "l21"}, default="l2"
        See `skjacobian.jacobian.jacobian_norm`; "l2" penalizes the square.
    n_projections : int, optional
        None is exact; a number estimates "l2" and "l21" from that many random directions.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[3.0], [-4.0]])
    >>> objective = JacobianRegularization(lam=0.1, norm="l2")
    >>> value = objective(
    ...     lambda X: X @ W.T, torch.zeros(1, 1), torch.tensor([0]), generator=torch.Generator()
    ... )
    >>> value.penalty, value.loss.detach()
    (tensor([25.]), tensor([3.1931]))
    """

    def __init__(
        self, *, lam: Any = 0.005, norm: str = "l2", n_projections: int | None = None
    ) -> None:
        self.lam = lam
        self.norm = norm
        self.n_projections = n_projections

    def __call__(
        self,
        predict_logits: PredictLogits,
        X: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator,
    ) -> ObjectiveValue:
        """Return the regularized cross-entropy of each sample.

        Loss and penalty share one forward pass. Only where batch normalization mixes the
        samples does the penalty take a pass of its own, with the running statistics and
        the same dropout masks.
        """
        X = X.detach().requires_grad_()
        if mixes_samples(predict_logits):
            with replayed_rng(X.device) as replay:
                logits = predict_logits(X)
                with batch_norm_in_eval(predict_logits), replay():
                    penalized_logits = predict_logits(X)
        else:
            logits = penalized_logits = predict_logits(X)
        penalty = jacobian_norm_of(
            penalized_logits,
            X,
            norm=self.norm,
            n_projections=self.n_projections,
            generator=generator,
            create_graph=True,
        )
        loss = cross_entropy(logits, y) + self.lam * penalty
        return ObjectiveValue(loss, penalty.detach(), logits)
