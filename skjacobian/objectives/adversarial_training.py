"""Adversarial training (Madry et al., arXiv 1706.06083)."""

import torch
from torch import Tensor

from skjacobian._validation import reject
from skjacobian.attacks import Attack
from skjacobian.attacks._ascent import GradientAscent
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
        The inner maximization, with the threat model: `PGD` or `FGSM`, of which the last point
        of one search is taken. Its `loss` is what is climbed (the paper's is cross-entropy).
        Its `feature_scale` must be None or an array: the statistics of one batch are not those
        of the data.
    objective : Objective
        What is evaluated at the perturbed samples.

    Examples
    --------
    >>> import torch
    >>> from skjacobian.attacks import FGSM
    >>> from skjacobian.objectives import CrossEntropy
    >>> W, X, y = torch.tensor([[1.0], [-1.0]]), torch.ones(1, 1), torch.tensor([0])
    >>> objective = AdversarialTraining(attack=FGSM(eps=0.5), objective=CrossEntropy())
    >>> value = objective(lambda X: X @ W.T, X, y, generator=torch.Generator())
    >>> value.logits
    tensor([[ 0.5000, -0.5000]])
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
        """Return the objective of each perturbed sample.

        Raises
        ------
        TypeError
            If `attack` is not `PGD` or `FGSM`.
        ValueError
            If a parameter of it makes no sense, it searches more than once, or takes its units
            from the batch.
        """
        attack = inner(self.attack)
        if attack.eps_is_zero:
            return self.objective(predict_logits, X, y, generator=generator)
        attack_loss = LOSSES[attack.loss]
        with frozen(predict_logits):
            X_adv = attack.maximize(
                lambda X_adv: attack_loss(predict_logits(X_adv), y),
                attack.ball(X),
                generator,
            )
        return self.objective(predict_logits, X_adv, y, generator=generator)


def inner(attack: Attack) -> GradientAscent:
    """Return the attack of an inner maximization; raise unless it is one sound ascent of a loss."""
    if not isinstance(attack, GradientAscent):
        raise TypeError(f"Got attack={attack!r}, but expected PGD or FGSM, one ascent of a loss.")
    if attack.n_restarts != 1 or attack.n_targets is not None:
        reject("attack", attack, "n_restarts=1 and n_targets=None: training takes one search")
    if isinstance(attack.feature_scale, str):
        expected = "None or an array: the statistics of one batch are not those of the data"
        reject("feature_scale", attack.feature_scale, expected)
    attack.check_params()
    return attack
