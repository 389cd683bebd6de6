"""Plain training."""

import torch
from torch import Tensor

from skjacobian.losses import cross_entropy
from skjacobian.model_modes import PredictLogits
from skjacobian.model_outputs import check_output
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
        """Return the cross-entropy of each sample; `generator` is not used.

        Raises
        ------
        TypeError
            If the model does not return a row of logits for each sample.
        """
        logits = predict_logits(X)
        check_output(logits, X)
        return ObjectiveValue(cross_entropy(logits, y), None, logits)
