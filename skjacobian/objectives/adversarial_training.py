"""Adversarial training (Madry et al., arXiv 1706.06083)."""

import torch
from torch import Tensor

from skjacobian.attacks import Attack
from skjacobian.losses import LOSSES
from skjacobian.model_modes import PredictLogits, frozen
from skjacobian.objectives._base import Objective, ObjectiveValue


class AdversarialTraining(Objective):
    """An objective at the worst perturbation that an attack finds for each sample.

    min_θ E max_{δ in ball} ℓ(x + δ) (Madry et al., arXiv 1706.06083, equation 2.1). The
    attack sees the network in eval mode, so it leaves batch statistics alone.

    Parameters
    ----------
    attack : Attack
        The inner maximization, with the threat model. Its `feature_scale` must be None or
        an array: the statistics of one batch are not those of the data.
    objective : Objective
        What is evaluated at the perturbed samples.
    """

    def __init__(self, *, attack: Attack, objective: Objective) -> None:
        self.attack = attack
        self.objective = objective

    def __call__(
        self,
        predict_logits: PredictLogits,
        X: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator,
    ) -> ObjectiveValue:
        """Return the objective of each perturbed sample."""
        if self.attack.eps_is_zero:
            return self.objective(predict_logits, X, y, generator=generator)
        attack_loss = LOSSES[self.attack.loss]
        with frozen(predict_logits):
            X_adv = self.attack.maximize(
                lambda X_adv: attack_loss(predict_logits(X_adv), y),
                self.attack.ball(X),
                generator,
            )
        return self.objective(predict_logits, X_adv, y, generator=generator)
