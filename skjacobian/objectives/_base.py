"""The contract of every training objective."""

from typing import NamedTuple

import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from skjacobian.model_modes import PredictLogits


class ObjectiveValue(NamedTuple):
    """What an objective says of a batch; every field has one row per sample.

    Attributes
    ----------
    loss : Tensor of shape (n_samples,)
        What is minimized, the penalty included.
    penalty : Tensor of shape (n_samples,) or None
        The regularizer without its strength, for the record.
    logits : Tensor of shape (n_samples, n_classes)
        The logits that the loss was computed from.
    """

    loss: Tensor
    penalty: Tensor | None
    logits: Tensor


class Objective(BaseEstimator):
    """Base of all objectives: `objective(predict_logits, X, y, *, generator)`.

    An objective is a value object, reads nothing but its arguments, and never reduces
    over samples: of loss and penalty alike, the net that trains takes Σwℓ/n over the n samples
    of a batch, with weights w whose mean over the training set is 1.
    """

    def __call__(
        self,
        predict_logits: PredictLogits,
        X: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator,
    ) -> ObjectiveValue:
        """Return the loss of each sample.

        Parameters
        ----------
        predict_logits : callable
            Maps X to logits of shape (n_samples, n_classes).
        X : Tensor of shape (n_samples, *features)
        y : Tensor of shape (n_samples,)
            Class indices.
        generator : torch.Generator
            A CPU generator, the source of all randomness.
        """
        raise NotImplementedError
