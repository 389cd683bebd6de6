"""TRADES (Zhang et al., arXiv 1901.08573)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skjacobian._validation import check_strength, reject
from skjacobian.attacks import Attack
from skjacobian.model_modes import PredictLogits, frozen
from skjacobian.objectives._base import Objective, ObjectiveValue
from skjacobian.objectives.adversarial_training import inner


class TRADES(Objective):
    """A clean objective plus β times how far an attack can move the prediction.

    ℓ(x) + β max_{δ in ball} KL(p(x) ‖ p(x + δ)) (Zhang et al., arXiv 1901.08573, equation
    5, with β = 1/λ there).

    Parameters
    ----------
    attack : Attack
        The inner maximization, with the threat model, as in `AdversarialTraining`; it
        needs a random start, because the divergence has gradient 0 at the clean sample. The
        start is uniform in the ball; the paper's is x + 0.001·N(0, I). From ours as many steps
        reach a larger divergence, so the same β weighs more here.
    objective : Objective
        What is evaluated at the clean samples.
    beta : float, default=6.0
        β; 6 is the authors' choice.

    Examples
    --------
    >>> import torch
    >>> from skjacobian.attacks import PGD
    >>> from skjacobian.objectives import CrossEntropy
    >>> W, X, y = torch.tensor([[1.0], [-1.0]]), torch.zeros(1, 1), torch.tensor([0])
    >>> objective = TRADES(attack=PGD(eps=0.5), objective=CrossEntropy())
    >>> value = objective(lambda X: X @ W.T, X, y, generator=torch.Generator())
    >>> value.loss  # log 2 + 6 KL((0.5, 0.5) ‖ (0.73, 0.27))
    tensor([1.4138])
    """

    def __init__(self, *, attack: Attack, objective: Objective, beta: Any = 6.0) -> None:
        self.attack = attack
        self.objective = objective
        self.beta = beta

    def __call__(
        self,
        predict_logits: PredictLogits,
        X: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator,
    ) -> ObjectiveValue:
        """Return the clean objective plus the divergence of each sample.

        Raises
        ------
        TypeError
            If `attack` is not `PGD` or `FGSM`.
        ValueError
            If a parameter of it makes no sense, it searches more than once, takes its units from
            the batch or starts at the sample, and for a negative `beta`.
        """
        attack, beta = inner(self.attack), check_strength("beta", self.beta)
        if not attack.random_start:
            expected = "True for TRADES, whose divergence has no gradient at X"
            reject("random_start", attack.random_start, expected)
        if attack.eps_is_zero:
            return self.objective(predict_logits, X, y, generator=generator)
        with frozen(predict_logits):
            with torch.no_grad():
                clean_logits = predict_logits(X)
            X_adv = attack.maximize(
                lambda X_adv: divergence(clean_logits, predict_logits(X_adv)),
                attack.ball(X),
                generator,
            )
        clean = self.objective(predict_logits, X, y, generator=generator)
        moved = divergence(clean.logits, predict_logits(X_adv))
        return clean._replace(loss=clean.loss + beta * moved)


def divergence(logits: Tensor, other_logits: Tensor) -> Tensor:
    """KL(softmax(logits) ‖ softmax(other_logits)) of each sample, shape (n_samples,)."""
    log_p, log_q = F.log_softmax(logits, 1), F.log_softmax(other_logits, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)
