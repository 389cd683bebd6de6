"""The views of support vector machines, and the votes of classifiers of pairs."""

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
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
from skjacobian.exceptions import NotDifferentiableError

# More than what confidences can make of a difference of scores, less than a vote.
TIE_BREAK = 2 / 3


class SupportVectors(ClassifierView):
    """Kernel machines, one for each pair of classes, and their votes.

    Of three or more classes the logits are the `decision_function` of shape "ovr": the
    votes, and a confidence within ±1/3, through which the gradient comes. `predict` counts
    votes alone, and of tied classes takes the first. Where there is a tie, and unless
    `break_ties`, the first of them gets 2/3 on top, so that the largest logit is that of
    the class predicted.

    `has_proba` is False: the probabilities of `probability=True` come from another fit, and
    `predict` does not follow them.
    """

    has_proba = False
    vectors: Tensor
    coefficients: Tensor
    intercept: Tensor
    pairs: Tensor

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
        self.hold(
            vectors=vectors,
            coefficients=coefficients,
            intercept=classifier.intercept_,
            pairs=pairs_of_classes(self.n_classes),
        )

    def forward(self, X: Tensor) -> Tensor:
        """Return the logits of `X`."""
        pairwise = self._pairwise(X)
        if self.n_classes == 2:
            return binary_logits(pairwise.squeeze(1))
        scores = self._scores(pairwise)
        return scores if self.break_ties else scores + self._tie_break(pairwise)

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
        return one_vs_rest_scores(pairwise >= 0, pairwise, self.pairs)

    def _tie_break(self, pairwise: Tensor) -> Tensor:
        """Return what lifts the first of the classes that share the most votes, if several."""
        # libsvm gives the vote of a decision of 0 to the second class, the scores to the first.
        votes = count_votes(pairwise > 0, self.pairs)
        is_best = votes == votes.amax(1, keepdim=True)
        is_tied = is_best.sum(1, keepdim=True) > 1
        first = torch.zeros_like(votes).scatter_(1, votes.argmax(1, keepdim=True), TIE_BREAK)
        return first * is_tied


def pairs_of_classes(n_classes: int) -> np.ndarray:
    """Return for each pair of classes a row with 1 for the first, -1 for the second."""
    pairs = list(combinations(range(n_classes), 2))
    signs = np.zeros((len(pairs), n_classes))
    for row, (first, second) in zip(signs, pairs, strict=True):
        row[first], row[second] = 1, -1
    return signs


def count_votes(first_wins: Tensor, pairs: Tensor) -> Tensor:
    """Return how many of its pairs each class wins."""
    # Wins and losses add up to n_classes - 1, and differ by this product.
    balance = torch.where(first_wins, 1.0, -1.0).to(pairs) @ pairs
    return (balance + pairs.shape[1] - 1) / 2


def one_vs_rest_scores(first_wins: Tensor, confidence: Tensor, pairs: Tensor) -> Tensor:
    """Return the votes for each class plus what its confidences come to, within ±1/3.

    Parameters
    ----------
    first_wins : Tensor of bool of shape (n_samples, n_pairs)
    confidence : Tensor of shape (n_samples, n_pairs)
        In the first class of each pair.
    pairs : Tensor of shape (n_pairs, n_classes)
        Of `pairs_of_classes`.
    """
    total = confidence @ pairs
    return count_votes(first_wins, pairs) + total / (3 * (total.abs() + 1))


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


def _support_vectors(classifier: Any) -> ClassifierView:
    if classifier.break_ties and classifier.decision_function_shape == "ovo":
        raise NotDifferentiableError(
            f"Got {type(classifier).__name__}(break_ties=True, decision_function_shape='ovo'), "
            "but expected one of both: such a classifier cannot predict."
        )
    return SupportVectors(classifier)


_SETTINGS = (
    *("kernel", "degree", "gamma", "coef0", "shrinking", "probability", "tol", "cache_size"),
    *("class_weight", "verbose", "max_iter", "decision_function_shape", "break_ties"),
    "random_state",
)


@view_of(SVC, settings=(*_SETTINGS, "C"))
def _(classifier: SVC) -> ClassifierView:
    return _support_vectors(classifier)


@view_of(NuSVC, settings=(*_SETTINGS, "nu"))
def _(classifier: NuSVC) -> ClassifierView:
    return _support_vectors(classifier)
