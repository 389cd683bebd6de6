"""What the views of classifiers made of other classifiers share; thresholds, self-training."""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import logit
from sklearn.model_selection import FixedThresholdClassifier, TunedThresholdClassifierCV
from sklearn.semi_supervised import SelfTrainingClassifier
from torch import Tensor

from skjacobian.differentiable._composition import Chain, view_of_part
from skjacobian.differentiable._registry import (
    ClassifierView,
    Function,
    module_of,
    view_of,
)
from skjacobian.exceptions import NotDifferentiableError


def inner_view(estimator: Any, place: str, needs_proba: bool = False) -> ClassifierView:
    """Return the view of a classifier that is part of another.

    Parameters
    ----------
    estimator : fitted classifier
    place : str
        Where it stands, for the error if it has no view.
    needs_proba : bool
        Also raise if it gives no probabilities.
    """
    module = view_of_part(module_of, estimator, place)
    view = module if isinstance(module, ClassifierView) else Function(module)
    if needs_proba and not (view.has_proba and hasattr(estimator, "predict_proba")):
        raise NotDifferentiableError(
            f"In {place}: Got {type(estimator).__name__}, but expected a classifier with a "
            "predict_proba that is differentiable: votes are not."
        )
    return view


def log_proba(view: ClassifierView, X: Tensor) -> Tensor:
    """Return the logarithm of `predict_proba`, whose gradient does not end where that is 0 or 1."""
    if isinstance(view, Chain):
        return log_proba(view.last, view.transform(X))
    if isinstance(view, LogProbaView):
        return view.predict_log_proba(X)
    if type(view).predict_proba is not ClassifierView.predict_proba:
        return safe_log(view.predict_proba(X))
    # A class that is ruled out has -inf, which would make gradients NaN.
    return view(X).log_softmax(1).clamp_min(-1e30)


def log_zero(dtype: torch.dtype) -> float:
    """Return what stands for log 0: finite, but its exponential is 0."""
    return 2 * float(np.log(torch.finfo(dtype).tiny))


def safe_log(P: Tensor) -> Tensor:
    """Return the logarithm of probabilities, whose gradient is finite also where they are 0."""
    tiny = torch.finfo(P.dtype).tiny
    return torch.where(P.lt(tiny), log_zero(P.dtype), P.clamp_min(tiny).log())


def rounded(log_P: Tensor, P: Tensor) -> Tensor:
    """Return the logarithm of `P`, with the gradient of `log_P`.

    Both are the same but for rounding. Where probabilities are rounded to 0 or 1 they tie, and
    `predict` takes the first, but the gradient is that of before the rounding.
    """
    value = P.detach().log().clamp_min(log_zero(P.dtype))
    return value + (log_P - log_P.detach())


def are_zeros(log_P: Tensor) -> Tensor:
    """Tell of which rows all probabilities are 0 to numpy."""
    return (log_P.exp() == 0).all(1, keepdim=True)


def together(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Stack what several views return, on the device of the first."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors], dim)


def mean(P: Sequence[Tensor], weights: Any = None) -> Tensor:
    """Return Σᵢ wᵢ Pᵢ / Σᵢ wᵢ, in the order of numpy, so that equal sums stay equal."""
    stacked = together(P, 0)
    w = _as_weights(weights, stacked)
    return reduce(torch.add, (w * stacked).unbind()) / w.sum()


def log_mean(log_P: Sequence[Tensor], weights: Any = None) -> Tensor:
    """Return log Σᵢ wᵢ exp(log Pᵢ) / Σᵢ wᵢ."""
    stacked = together(log_P, 0)
    w = _as_weights(weights, stacked)
    log_of_mean = torch.logsumexp(stacked + (w / w.sum()).log(), 0)
    return rounded(log_of_mean, mean(stacked.exp().unbind(), weights))


def _as_weights(weights: Any, stacked: Tensor) -> Tensor:
    """Return weights, equal ones by default, that multiply what is stacked."""
    w = np.ones(len(stacked)) if weights is None else np.asarray(weights, dtype=float)
    return torch.from_numpy(w).to(stacked.device)[:, None, None]


def columns_of_classes(values: Tensor, index: Tensor, n_classes: int, missing: float) -> Tensor:
    """Return a column for each class, those at `index` from `values` and others constant."""
    columns = values.new_full((len(values), n_classes), missing)
    return columns.index_copy(1, index.to(values.device), values)


class LogProbaView(ClassifierView):
    """A view that knows the logarithm of its probabilities, though they are no softmax."""

    def predict_log_proba(self, X: Tensor) -> Tensor:
        """Return the logarithm of the probabilities; unless overridden it is the logits."""
        return self(X)


class Thresholded(LogProbaView):
    """A classifier of two classes with a threshold of its own.

    The logits are 0 and how far the score is above the threshold. Of probabilities that is
    the difference of the log odds, which does not saturate.

    Parameters
    ----------
    view : ClassifierView
        Gives `predict_proba` and `decision_function`, which have no threshold.
    on_proba : bool
        Whether the score is the probability of the positive class, or the decision function.
    threshold : float
    positive : int
        Column of the positive class.
    """

    def __init__(
        self, view: ClassifierView, on_proba: bool, threshold: float, positive: int
    ) -> None:
        super().__init__()
        self.view = view
        self.has_proba = view.has_proba
        self.on_proba = on_proba
        self.on_log_odds = on_proba and 0 < threshold < 1
        self.positive = positive
        threshold = float(logit(threshold) if self.on_log_odds else threshold)
        # A score at the threshold is positive, while of equal logits the first wins.
        self.threshold = float(np.nextafter(threshold, -np.inf)) if positive == 1 else threshold

    def forward(self, X: Tensor) -> Tensor:
        """Return 0 for the negative class, and the score less the threshold."""
        margin = self._score(X).double() - self.threshold
        columns = [torch.zeros_like(margin), margin]
        return torch.stack(columns if self.positive == 1 else columns[::-1], dim=1)

    def _score(self, X: Tensor) -> Tensor:
        if self.on_log_odds:
            log_P = log_proba(self.view, X)
            return log_P[:, self.positive] - log_P[:, 1 - self.positive]
        if self.on_proba:
            return self.view.predict_proba(X)[:, self.positive]
        decision = self.view.decision_function(X)
        return decision if self.positive == 1 else -decision

    def predict_proba(self, X: Tensor) -> Tensor:
        """Return the probabilities that the classifier within gives."""
        return self.view.predict_proba(X)

    def predict_log_proba(self, X: Tensor) -> Tensor:
        """Return the logarithm of these probabilities."""
        return log_proba(self.view, X)

    def decision_function(self, X: Tensor) -> Tensor:
        """Return the decision function of the classifier within."""
        return self.view.decision_function(X)


@view_of(
    FixedThresholdClassifier, settings=("estimator", "threshold", "pos_label", "response_method")
)
@view_of(
    TunedThresholdClassifierCV,
    settings=(
        *("estimator", "scoring", "response_method", "thresholds", "cv", "refit", "n_jobs"),
        *("random_state", "store_cv_results"),
    ),
)
def _(classifier: FixedThresholdClassifier | TunedThresholdClassifierCV) -> ClassifierView:
    rule = rule_of(classifier)
    place = f"the estimator of the {type(classifier).__name__}"
    return Thresholded(inner_view(classifier.estimator_, place, rule.on_proba), *rule)


class Rule(NamedTuple):
    """What a classifier with a threshold of its own decides by.

    Attributes
    ----------
    on_proba : bool
        Whether the score is the probability of the positive class, or the decision function.
    threshold : float
    positive : int
        Column of the positive class.
    """

    on_proba: bool
    threshold: float
    positive: int


def rule_of(classifier: FixedThresholdClassifier | TunedThresholdClassifierCV) -> Rule:
    """Return what a fitted classifier with a threshold decides by."""
    on_proba = classifier.response_method == "predict_proba"
    if classifier.response_method == "auto":
        on_proba = hasattr(classifier.estimator_, "predict_proba")
    if isinstance(classifier, TunedThresholdClassifierCV):
        threshold, pos_label = classifier.best_threshold_, classifier._curve_scorer._get_pos_label()
    else:
        threshold, pos_label = classifier.threshold, classifier.pos_label
        if threshold == "auto":
            threshold = 0.5 if on_proba else 0.0
    labels = classifier.classes_.tolist()
    if pos_label is not None and pos_label not in labels:
        raise NotDifferentiableError(
            f"Got {type(classifier).__name__} with pos_label {pos_label!r}, but expected one of "
            f"{labels}."
        )
    return Rule(on_proba, threshold, 1 if pos_label is None else labels.index(pos_label))


@view_of(
    SelfTrainingClassifier,
    settings=("estimator", "threshold", "criterion", "k_best", "max_iter", "verbose"),
)
def _(classifier: SelfTrainingClassifier) -> ClassifierView:
    return inner_view(classifier.estimator_, "the estimator of the SelfTrainingClassifier")
