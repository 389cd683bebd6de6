"""The views of torch modules and skorch nets."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor, nn

from skjacobian._net.objective_net import SkorchNet
from skjacobian._validation import check_labels
from skjacobian.differentiable._registry import (
    ClassifierView,
    TensorFunction,
    as_torch,
    binary_logits,
)
from skjacobian.exceptions import NotDifferentiableError
from skjacobian.model_modes import frozen
from skjacobian.model_outputs import outputs

LOGIT_CRITERIA = (nn.CrossEntropyLoss, nn.NLLLoss, nn.BCEWithLogitsLoss)


def floating_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters of a module, then its buffers, of numbers that are not whole."""
    # One after the other: an attack asks for the first at every step.
    tensors = chain(module.parameters(), module.buffers())
    return (tensor for tensor in tensors if tensor.is_floating_point())


class Network(ClassifierView):
    """A network that takes any floating dtype and any device.

    Parameters
    ----------
    module : nn.Module
        Returns logits.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, X: Tensor) -> Tensor:
        """Return the logits of `X`, on the device and in the dtype of the weights."""
        weight = next(floating_tensors(self.module), X)
        return self.module(X.to(device=weight.device, dtype=weight.dtype))


class SkorchLogits(Network):
    """The logits of a skorch net, whatever its criterion expects of the module.

    Parameters
    ----------
    net : skorch.NeuralNet
        With one of `LOGIT_CRITERIA`: cross-entropy, negative log likelihood (whose module
        returns probabilities, by skorch's convention) or binary cross-entropy on logits.
    """

    def __init__(self, net: SkorchNet) -> None:
        super().__init__(net.module_)
        self.criterion = net.criterion_

    def forward(self, X: Tensor) -> Tensor:
        """Return logits of shape (n_samples, n_classes)."""
        output: Any = super().forward(X)
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(self.criterion, nn.NLLLoss):
            return (output + torch.finfo(output.dtype).eps).log()
        if isinstance(self.criterion, nn.BCEWithLogitsLoss):
            return binary_logits(output.reshape(-1))
        return output


class FittedModule(ClassifierMixin, BaseEstimator):
    """A trained torch module as a fitted classifier of the classes 0, 1, ..., n_classes - 1.

    Parameters
    ----------
    module : nn.Module
        Returns logits, or probabilities. It is asked in eval mode, and left as it was.
    X : array-like of shape (n_samples, *features)
        Samples, of which one tells the number of classes.
    """

    BATCH_SIZE = 1024

    def __init__(self, module: nn.Module, X: Any) -> None:
        self.module = module
        n_outputs = self._outputs(X[:1]).shape[1]
        if n_outputs < 2:
            raise ValueError(
                f"Got a module of type {type(module).__name__} with {n_outputs} output, but "
                "expected a logit for each of at least 2 classes: of one logit z make (0, z)."
            )
        self.classes_ = np.arange(n_outputs)

    def check_labels(self, y: np.ndarray) -> None:
        """Raise a ValueError for labels that a module can never predict."""
        n_outputs, kind = len(self.classes_), type(self.module).__name__
        expected = f"those of the {n_outputs} outputs of {kind}, 0 to {n_outputs - 1}"
        check_labels(y, self.classes_, expected)

    def predict(self, X: Any) -> np.ndarray:
        """Return the class of the largest output."""
        predicted: np.ndarray = self._outputs(X).argmax(1).numpy()
        return predicted

    def _outputs(self, X: Any) -> Tensor:
        view, samples = Network(self.module), torch.from_numpy(np.asarray(X).copy())
        batches = torch.split(samples, self.BATCH_SIZE)
        with frozen(self.module), torch.no_grad():
            try:
                return torch.cat([outputs(view, batch).cpu() for batch in batches])
            except RuntimeError as error:
                raise ValueError(
                    f"Got X with samples of shape {tuple(samples.shape[1:])}, but expected those "
                    f"that {type(self.module).__name__} takes: {error}"
                ) from error


@as_torch.register
def _(module: nn.Module) -> TensorFunction:
    return Network(module)


@as_torch.register
def _(classifier: FittedModule) -> TensorFunction:
    return Network(classifier.module)


@as_torch.register
def _(net: SkorchNet) -> TensorFunction:
    net.check_is_fitted()
    if not isinstance(net.criterion_, LOGIT_CRITERIA):
        known = ", ".join(criterion.__name__ for criterion in LOGIT_CRITERIA)
        raise NotDifferentiableError(
            f"Got a skorch net with criterion {type(net.criterion_).__name__}, but expected one "
            f"of {known}: it is not known how others turn outputs into logits."
        )
    return SkorchLogits(net)
