"""Plain training."""

import torch
from torch import Tensor

from skjacobian.losses import cross_entropy
from skjacobian.model_modes import PredictLogits
from skjacobian.objectives._base import Objective, ObjectiveValue


class CrossEntropy(Objective):
    """The cross-entropy of the clean samples.

    Examples
    --------
    >>> import torch
    >>> value = CrossEntropy()(
    ...     lambda X: X, torch.zeros(1, 2), torch.tensor([0]), generator=torch.Generator()
    ... )
    >>> value.loss
    tensor([0.6931])
    """

    def __call__(
        self,
        predict_logits: PredictLogits,
        X: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator,
    ) -> ObjectiveValue:
        """Return the cross-entropy of each sample; `generator` is not used."""
        logits = predict_logits(X)
        return ObjectiveValue(cross_entropy(logits, y), None, logits)
