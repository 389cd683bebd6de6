"""The views of ensembles of classifiers: voting, bagging, stacking."""

from typing import Any

import numpy as np
import torch
from sklearn.ensemble import BaggingClassifier, StackingClassifier, VotingClassifier
from torch import Tensor, nn

from skjacobian.differentiable._composition import Chain
from skjacobian.differentiable._meta_classifiers import (
    LogProbaView,
    columns_of_classes,
    inner_view,
    log_mean,
    log_proba,
    log_zero,
    mean,
    together,
)
from skjacobian.differentiable._projections import Select
from skjacobian.differentiable._registry import ClassifierView, View, is_dropped, view_of
from skjacobian.exceptions import NotDifferentiableError


class MeanProbability(LogProbaView):
    """The weighted mean of the probabilities of several classifiers.

    Parameters
    ----------
    views : list of ClassifierView
    classes : list of arrays of int
        Which classes the columns of each view stand for.
    n_classes : int
    weights : array of shape (n_views,), default=None
    """

    def __init__(
        self,
        views: list[ClassifierView],
        classes: list[np.ndarray],
        n_classes: int,
        weights: Any = None,
    ) -> None:
        super().__init__()
        self.views: Any = nn.ModuleList(views)
        self.classes = [torch.as_tensor(index, dtype=torch.int64) for index in classes]
        self.n_classes = n_classes
        self.weights = weights

    def forward(self, X: Tensor) -> Tensor:
        """Return the logarithm of the mean probability."""
        log_P = [log_proba(view, X) for view in self.views]
        missing = log_zero(log_P[0].dtype)
        return log_mean(self._of_all_classes(log_P, missing), self.weights)

    def predict_proba(self, X: Tensor) -> Tensor:
        """Return the mean probability; its rows sum to 1 only if those of the members do."""
        P = [view.predict_proba(X) for view in self.views]
        return mean(self._of_all_classes(P, missing=0.0), self.weights)

    def _of_all_classes(self, columns: list[Tensor], missing: float) -> list[Tensor]:
        """Return columns for all classes, with a value for those that a member never saw."""
        return [
            columns_of_classes(values, index, self.n_classes, missing)
            for values, index in zip(columns, self.classes, strict=True)
        ]

    def decision_function(self, X: Tensor) -> Tensor:
        """Return the mean of the decision functions."""
        return together([view.decision_function(X) for view in self.views], 0).mean(0)


@view_of(
    VotingClassifier,
    settings=("estimators", "voting", "weights", "n_jobs", "flatten_transform", "verbose"),
)
def _(voting: VotingClassifier) -> ClassifierView:
    if voting.voting == "hard":
        raise NotDifferentiableError(
            "Got VotingClassifier(voting='hard'), but expected voting='soft': the labels that "
            "it counts have no gradient."
        )
    weights = voting.weights
    if weights is not None:
        members = zip(voting.estimators, weights, strict=True)
        weights = np.array([w for (_, member), w in members if not is_dropped(member)], float)
        if (weights < 0).any():
            raise NotDifferentiableError(
                f"Got VotingClassifier(weights={voting.weights!r}), but expected weights of at "
                "least 0: the differentiable view averages probabilities."
            )
    views = [
        inner_view(member, f"estimator {name!r} of the VotingClassifier", needs_proba=True)
        for name, member in _members(voting)
    ]
    n_classes = len(voting.classes_)
    return MeanProbability(views, [np.arange(n_classes)] * len(views), n_classes, weights)


def _members(ensemble: Any) -> list[tuple[str, Any]]:
    """Return the fitted estimators of an ensemble with their names."""
    named = ensemble.named_estimators_.items()
    return [(name, member) for name, member in named if not is_dropped(member)]


@view_of(
    BaggingClassifier,
    settings=(
        *("estimator", "n_estimators", "max_samples", "max_features", "bootstrap"),
        *("bootstrap_features", "oob_score", "warm_start", "n_jobs", "random_state", "verbose"),
    ),
)
def _(bagging: BaggingClassifier) -> ClassifierView:
    if bagging.n_estimators != len(bagging.estimators_):
        raise NotDifferentiableError(
            f"Got BaggingClassifier(n_estimators={bagging.n_estimators}) that was fitted with "
            f"{len(bagging.estimators_)}, but expected the same number: fit it again."
        )
    place = "the estimator of the BaggingClassifier"
    members = zip(bagging.estimators_, bagging.estimators_features_, strict=True)
    views: list[ClassifierView] = [
        _of_features(features, bagging, inner_view(member, place, needs_proba=True))
        for member, features in members
    ]
    n_classes = bagging.n_classes_
    classes = [
        np.arange(n_classes) if len(member.classes_) == n_classes else member.classes_
        for member in bagging.estimators_
    ]
    return MeanProbability(views, classes, n_classes)


def _of_features(features: np.ndarray, bagging: BaggingClassifier, view: Any) -> ClassifierView:
    """Return the view of a member on the features that it was given."""
    if np.array_equal(features, np.arange(bagging.n_features_in_)):
        return view
    return Chain([Select(features), view])


class StackedScores(View):
    """The scores of several classifiers side by side, and X after them if it is passed through.

    Parameters
    ----------
    views : list of ClassifierView
    methods : list of {"predict_proba", "decision_function"}
        What each contributes. Of two probabilities it is the second.
    passthrough : bool
    binary : bool
        Whether there are two classes.
    """

    def __init__(
        self, views: list[ClassifierView], methods: list[str], passthrough: bool, binary: bool
    ) -> None:
        super().__init__()
        self.views: Any = nn.ModuleList(views)
        self.methods = methods
        self.passthrough = passthrough
        self.binary = binary

    def forward(self, X: Tensor) -> Tensor:
        """Return the features of the final estimator."""
        members = zip(self.views, self.methods, strict=True)
        columns = [self._columns(getattr(view, method)(X), method) for view, method in members]
        columns += [X] if self.passthrough else []
        return torch.cat([column.to(X.device) for column in columns], dim=1)

    def _columns(self, scores: Tensor, method: str) -> Tensor:
        if scores.ndim == 1:
            return scores[:, None]
        return scores[:, 1:] if self.binary and method == "predict_proba" else scores


@view_of(
    StackingClassifier,
    settings=(
        *("estimators", "final_estimator", "cv", "stack_method", "n_jobs", "passthrough"),
        "verbose",
    ),
)
def _(stacking: StackingClassifier) -> ClassifierView:
    if isinstance(stacking.classes_, list):
        raise NotDifferentiableError(
            "Got StackingClassifier fitted on several labels of each sample, but expected one."
        )
    views = []
    for (name, member), method in zip(_members(stacking), stacking.stack_method_, strict=True):
        place = f"estimator {name!r} of the StackingClassifier"
        if method == "predict":
            raise NotDifferentiableError(
                f"In {place}: Got stack_method 'predict', but expected 'predict_proba' or "
                "'decision_function': labels have no gradient."
            )
        views.append(inner_view(member, place, needs_proba=method == "predict_proba"))
    place = "the final estimator of the StackingClassifier"
    final = inner_view(stacking.final_estimator_, place)
    binary = len(stacking.classes_) == 2
    return Chain(
        [StackedScores(views, stacking.stack_method_, stacking.passthrough, binary), final]
    )
