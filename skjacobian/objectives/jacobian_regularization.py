"""Jacobian regularization (Wu & Li, arXiv 2412.12449; Hoffman et al., arXiv 1908.02729)."""

from typing import Any

import numpy as np
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
    penalty_samples : int or float, optional
        Samples of each batch that the penalty is taken on, as a number or a share, drawn
        anew each time. Theirs is scaled up by n/m and the others' is 0, so that any
        weighted mean over the batch is unbiased. None takes all.

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
        self,
        *,
        lam: Any = 0.005,
        norm: str = "l2",
        n_projections: int | None = None,
        penalty_samples: int | float | None = None,
    ) -> None:
        self.lam = lam
        self.norm = norm
        self.n_projections = n_projections
        self.penalty_samples = penalty_samples

    def __call__(
        self,
        predict_logits: PredictLogits,
        X: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator,
    ) -> ObjectiveValue:
        """Return the regularized cross-entropy of each sample."""
        n_penalized = self._n_penalized(len(X))
        if n_penalized < len(X):
            logits = predict_logits(X)
            index = torch.randperm(len(X), generator=generator)[:n_penalized].to(X.device)
            part = X[index].detach().requires_grad_()
            with batch_norm_in_eval(predict_logits):
                norms = self._norms(predict_logits(part), part, generator)
            penalty = torch.zeros_like(logits[:, 0]).index_copy(0, index, norms)
            penalty = penalty * (len(X) / n_penalized)
        else:
            X = X.detach().requires_grad_()
            logits, penalized_logits = _logits_twice(predict_logits, X)
            penalty = self._norms(penalized_logits, X, generator)
        loss = cross_entropy(logits, y) + self.lam * penalty
        return ObjectiveValue(loss, penalty.detach(), logits)

    def _n_penalized(self, n_samples: int) -> int:
        """Return the number of samples of a batch that the penalty is taken on."""
        if self.penalty_samples is None:
            return n_samples
        if isinstance(self.penalty_samples, int | np.integer):
            return min(int(self.penalty_samples), n_samples)
        return max(1, round(self.penalty_samples * n_samples))

    def _norms(self, logits: Tensor, X: Tensor, generator: torch.Generator) -> Tensor:
        return jacobian_norm_of(
            logits,
            X,
            norm=self.norm,
            n_projections=self.n_projections,
            generator=generator,
            create_graph=True,
        )


def _logits_twice(predict_logits: PredictLogits, X: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits for the loss and those for the penalty, from one pass if possible.

    Only where batch normalization mixes the samples does the penalty take a pass of its
    own, with the running statistics and the same dropout masks.
    """
    if not mixes_samples(predict_logits):
        logits = predict_logits(X)
        return logits, logits
    with replayed_rng(X.device) as replay:
        logits = predict_logits(X)
        with batch_norm_in_eval(predict_logits), replay():
            return logits, predict_logits(X)
