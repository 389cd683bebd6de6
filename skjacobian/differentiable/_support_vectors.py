"""The views of support vector machines."""

from itertools import combinations, pairwise
from typing import Any

import numpy as np
from sklearn.svm import SVC, NuSVC
from torch import Tensor

from skjacobian.differentiable._kernels import kernel_function
from skjacobian.differentiable._linear_classifiers import dense
from skjacobian.differentiable._registry import (
    ClassifierView,
    as_precise_as,
    binary_logits,
    view_of,
)
from skjacobian.differentiable._votes import Votes
from skjacobian.exceptions import NotDifferentiableError


class SupportVectors(ClassifierView):
    """Kernel machines, one for each pair of classes, and their votes.

    Of three or more classes the logits are margins of the votes (`Votes.margins`): 0 for the
    class predicted, and less for the others. `predict` counts votes alone and of tied classes
    takes the first; with `break_ties` it takes the largest `decision_function` of shape
    "ovr": the votes, and confidences within ±1/3.

    `has_proba` is False: the probabilities of `probability=True` come from another fit, and
    `predict` does not follow them.
    """

    has_proba = False
    vectors: Tensor
    coefficients: Tensor
    intercept: Tensor

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.n_classes = len(classifier.classes_)
        self.shape = classifier.decision_function_shape
        self.break_ties = classifier.break_ties
        self.kernel = kernel_function(
            classifier.kernel,
            gamma=classifier._gamma,
            degree=classifier.degree,
            coef0=classifier.coef0,
        )
        vectors, coefficients = dense(classifier.support_vectors_), _dual_coefficients(classifier)
        if classifier.kernel == "linear":
            # The machine of each pair is one product with its weights.
            vectors, coefficients = coefficients @ vectors, np.eye(len(coefficients))
        self.hold(vectors=vectors, coefficients=coefficients, intercept=classifier.intercept_)
        if self.n_classes > 2:
            self.votes = Votes(self.n_classes)

    def forward(self, X: Tensor) -> Tensor:
        """Return the logits of `X`."""
        pairwise = self._pairwise(X)
        if self.n_classes == 2:
            return binary_logits(pairwise.squeeze(1))
        if self.break_ties:
            predicted = self._scores(pairwise).argmax(1)
            return self.votes.margins(pairwise, predicted, confidence=pairwise)
        # libsvm gives the vote of a decision of 0 to the second class, the scores to the first.
        predicted = self.votes.count(pairwise).argmax(1)
        return self.votes.margins(pairwise, predicted, confidence=None)

    def decision_function(self, X: Tensor) -> Tensor:
        """Return the decision function in the shape that was set."""
        pairwise = self._pairwise(X)
        if self.n_classes == 2:
            return pairwise.squeeze(1)
        return pairwise if self.shape == "ovo" else self._scores(pairwise)

    def _pairwise(self, X: Tensor) -> Tensor:
        """Return the decision of each pair, positive for the first class of three or more."""
        X = as_precise_as(X, self.vectors)
        return self.kernel(X, self.vectors) @ self.coefficients.T + self.intercept

    def _scores(self, pairwise: Tensor) -> Tensor:
        return self.votes.scores(pairwise, pairwise)


def _dual_coefficients(classifier: Any) -> np.ndarray:
    """Return the coefficient of each support vector in the machine of each pair of classes."""
    dual = dense(classifier.dual_coef_)
    if len(dual) == 1:
        return dual
    edges = np.cumsum([0, *classifier.n_support_])
    of_class = [slice(*edge) for edge in pairwise(edges)]
    pairs = list(combinations(range(len(of_class)), 2))
    coefficients = np.zeros((len(pairs), edges[-1]))
    for row, (first, second) in zip(coefficients, pairs, strict=True):
        # libsvm leaves out the column of a class against itself.
        row[of_class[first]] = dual[second - 1, of_class[first]]
        row[of_class[second]] = dual[first, of_class[second]]
    return coefficients


_SETTINGS = (
    *("kernel", "degree", "gamma", "coef0", "shrinking", "probability", "tol", "cache_size"),
    *("class_weight", "verbose", "max_iter", "decision_function_shape", "break_ties"),
    "random_state",
)


@view_of(SVC, settings=(*_SETTINGS, "C"))
@view_of(NuSVC, settings=(*_SETTINGS, "nu"))
def _(classifier: SVC | NuSVC) -> ClassifierView:
    if classifier.break_ties and classifier.decision_function_shape == "ovo":
        raise NotDifferentiableError(
            f"Got {type(classifier).__name__}(break_ties=True, decision_function_shape='ovo'), "
            "but expected one of both: such a classifier cannot predict."
        )
    return SupportVectors(classifier)
