"""The views of classifiers that reduce many classes to problems of two."""

from typing import Any

import torch
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier
from torch import Tensor, nn

from skjacobian.differentiable._meta_classifiers import (
    LogProbaView,
    are_zeros,
    inner_view,
    log_proba,
    log_zero,
    rounded,
    together,
)
from skjacobian.differentiable._registry import (
    ClassifierView,
    binary_logits,
    binary_probabilities,
    view_of,
)
from skjacobian.differentiable._votes import Votes, shrunk
from skjacobian.exceptions import NotDifferentiableError


class OneVsRest(LogProbaView):
    """One classifier for each class against all others; of two classes one classifier.

    Parameters
    ----------
    views : list of ClassifierView
        Their second class is the one that each is of.
    by_decision : bool
        Whether `predict` compares decision functions, or probabilities.
    has_proba : bool
    """

    def __init__(self, views: list[ClassifierView], by_decision: bool, has_proba: bool) -> None:
        super().__init__()
        self.views: Any = nn.ModuleList(views)
        self.by_decision = by_decision
        self.has_proba = has_proba

    def forward(self, X: Tensor) -> Tensor:
        """Return the decision functions, or the logarithms of the probabilities."""
        if self.by_decision:
            decision = self.decision_function(X)
            return binary_logits(decision) if decision.ndim == 1 else decision
        if len(self.views) == 1:
            return log_proba(self.views[0], X)
        logits = self._log_proba_of_each(X)
        return rounded(logits, logits.exp())

    def predict_proba(self, X: Tensor) -> Tensor:
        """Return the probabilities, divided by their sum where that is not 0."""
        if not self.has_proba:
            return super().predict_proba(X)
        if len(self.views) == 1:
            return binary_probabilities(self.views[0].predict_proba(X)[:, 1])
        log_P = self._log_proba_of_each(X)
        return torch.where(are_zeros(log_P), 0.0, log_P.softmax(1))

    def predict_log_proba(self, X: Tensor) -> Tensor:
        """Return the logarithm of the probabilities."""
        if len(self.views) == 1:
            return log_proba(self.views[0], X)
        log_P = self._log_proba_of_each(X)
        return torch.where(are_zeros(log_P), log_zero(log_P.dtype), log_P.log_softmax(1))

    def _log_proba_of_each(self, X: Tensor) -> Tensor:
        """Return the logarithm of the probability of each class against all others."""
        return together([log_proba(view, X)[:, 1] for view in self.views], 1)

    def decision_function(self, X: Tensor) -> Tensor:
        """Return the decision functions of the classifiers, of two classes one value each."""
        if not self.by_decision:
            return super().decision_function(X)
        decisions = [view.decision_function(X) for view in self.views]
        return decisions[0] if len(decisions) == 1 else together(decisions, 1)


@view_of(OneVsRestClassifier, settings=("estimator", "n_jobs", "verbose"))
def _(classifier: OneVsRestClassifier) -> ClassifierView:
    if classifier.multilabel_:
        raise NotDifferentiableError(
            "Got OneVsRestClassifier fitted on several labels of each sample, but expected one."
        )
    if len(classifier.classes_) < 2:
        raise NotDifferentiableError(
            "Got OneVsRestClassifier fitted on 1 class, but expected at least 2."
        )
    by_decision = all(hasattr(part, "decision_function") for part in classifier.estimators_)
    views = _binary_views(classifier, needs_proba=not by_decision)
    has_proba = hasattr(classifier, "predict_proba") and all(view.has_proba for view in views)
    return OneVsRest(views, by_decision, has_proba)


def _binary_views(classifier: Any, needs_proba: bool) -> list[ClassifierView]:
    place = f"the estimator of the {type(classifier).__name__}"
    return [inner_view(part, place, needs_proba) for part in classifier.estimators_]


class OneVsOne(ClassifierView):
    """One classifier for each pair of classes: votes, and confidences that decide ties.

    Of three or more classes the logits are margins of the votes (`Votes.margins`); those of
    the `decision_function` itself, votes and confidences within ±1/3, have hardly a gradient.

    Parameters
    ----------
    views : list of ClassifierView
        Of the pairs (0, 1), (0, 2), …, (1, 2), …
    n_classes : int
    by_decision : bool
        Whether the confidence is the decision function, or the probability of the second class.
    """

    has_proba = False

    def __init__(self, views: list[ClassifierView], n_classes: int, by_decision: bool) -> None:
        super().__init__()
        self.views: Any = nn.ModuleList(views)
        self.by_decision = by_decision
        if n_classes > 2:
            self.votes = Votes(n_classes)

    def forward(self, X: Tensor) -> Tensor:
        """Return the margins of the votes; of two classes the decision less its threshold."""
        if len(self.views) == 1:
            return binary_logits(self.decision_function(X) - (0.0 if self.by_decision else 0.5))
        decisions = self._decisions(X)
        confidence = self._confidence(X)
        predicted = self.votes.scores(decisions, confidence).argmax(1)
        return self.votes.margins(decisions, predicted, confidence)

    def decision_function(self, X: Tensor) -> Tensor:
        """Return the votes for each class plus its confidences, shrunk to less than a vote."""
        decisions, confidence = self._decisions(X), self._confidence(X)
        if len(self.views) > 1:
            return self.votes.scores(decisions, confidence)
        confidence = -confidence.squeeze(1)
        return (decisions.squeeze(1) < 0).to(confidence) + shrunk(confidence)

    def _decisions(self, X: Tensor) -> Tensor:
        """Return by how much the logit of the first class of each pair is larger."""
        logits = [view(X) for view in self.views]
        return together([z[:, 0] - z[:, 1] for z in logits], 1).double()

    def _confidence(self, X: Tensor) -> Tensor:
        """Return what breaks ties of the votes, for the first class of each pair."""
        if self.by_decision:
            of_second = [view.decision_function(X) for view in self.views]
        else:
            of_second = [view.predict_proba(X)[:, 1] for view in self.views]
        return -together(of_second, 1).double()


@view_of(OneVsOneClassifier, settings=("estimator", "n_jobs"))
def _(classifier: OneVsOneClassifier) -> ClassifierView:
    if classifier.pairwise_indices_ is not None:
        raise NotDifferentiableError(
            "Got OneVsOneClassifier of an estimator that expects a precomputed kernel, but "
            "expected one that takes X."
        )
    by_decision = all(hasattr(part, "decision_function") for part in classifier.estimators_)
    views = _binary_views(classifier, needs_proba=not by_decision)
    return OneVsOne(views, len(classifier.classes_), by_decision)
