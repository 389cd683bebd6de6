"""The views of classifiers that are linear in X, and of the nearest centroid."""

from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.linear_model import (
    LogisticRegression,
    LogisticRegressionCV,
    Perceptron,
    RidgeClassifier,
    RidgeClassifierCV,
    SGDClassifier,
)
from sklearn.neighbors import NearestCentroid
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn import functional as F

from skjacobian.differentiable._registry import (
    ClassifierView,
    as_precise_as,
    binary_probabilities,
    view_of,
)
from skjacobian.exceptions import NotDifferentiableError


class LinearLogits(ClassifierView):
    """x ↦ W x + b.

    Parameters
    ----------
    W : array of shape (n_classes, n_features), or one row for two classes
        One row is the decision function, which goes beside a logit that is always 0.
    b : array of shape (n_classes,), or one number
    has_proba : bool
        Whether the softmax of the logits is the estimator's `predict_proba`.
    """

    W: Tensor
    b: Tensor

    def __init__(self, W: Any, b: Any, has_proba: bool) -> None:
        super().__init__()
        W = np.atleast_2d(dense(W))
        dtype = np.result_type(W, b)
        W, b = W.astype(dtype), np.broadcast_to(b, len(W)).astype(dtype)
        if len(W) == 1:
            W, b = np.vstack([0 * W, W]), np.hstack([0 * b, b])
        self.hold(W=W, b=b)
        self.has_proba = has_proba

    def forward(self, X: Tensor) -> Tensor:
        """Return the logits of `X`."""
        X = as_precise_as(X, self.W)
        return F.linear(X, self.W.to(X), self.b.to(X))


class OneVsRestProbabilities(LinearLogits):
    """Linear logits, and probabilities that each class has against all others.

    Parameters
    ----------
    W, b
        As for `LinearLogits`.
    loss : {"log_loss", "modified_huber"}
        Says how a decision becomes a probability: by the logistic function, or by a line
        that is clipped.
    """

    def __init__(self, W: Any, b: Any, loss: str) -> None:
        super().__init__(W, b, has_proba=True)
        self.loss = loss

    def predict_proba(self, X: Tensor) -> Tensor:
        """Return the probabilities of the classes, which are made to sum to 1."""
        logits = self(X)
        if logits.shape[1] == 2:
            return binary_probabilities(self._probability(self.decision_function(X)))
        return normalized(self._probability(logits))

    def _probability(self, decision: Tensor) -> Tensor:
        if self.loss == "modified_huber":
            return (decision.clamp(-1, 1) + 1) / 2
        return decision.sigmoid()


class Centroids(ClassifierView):
    """The distances to the centroids, and the discriminant scores.

    With equal priors `predict` takes the nearest centroid, while `decision_function` and
    `predict_proba` divide the features by their standard deviations first: the logits are
    minus the squared distances then (of "manhattan" minus the distances). With other priors
    all follow the discriminant scores.
    """

    centroids: Tensor
    deviation: Tensor
    log_prior: Tensor

    def __init__(self, estimator: NearestCentroid) -> None:
        super().__init__()
        deviation = estimator.within_class_std_dev_
        prior = estimator.class_prior_
        self.hold(
            centroids=estimator.centroids_,
            # A feature that is constant in every class stays in its own unit.
            deviation=np.where(deviation == 0, 1.0, deviation),
            log_prior=np.log(prior),
        )
        self.equal_priors = bool(np.isclose(prior, 1 / len(prior)).all())
        self.metric = estimator.metric
        self.has_proba = estimator.metric == "euclidean"

    def forward(self, X: Tensor) -> Tensor:
        """Return what `predict` takes the largest of."""
        if not self.equal_priors:
            return self._discriminant_scores(X)
        X = as_precise_as(X, self.centroids)
        gaps = X[:, None] - self.centroids
        return -(gaps.abs() if self.metric == "manhattan" else gaps**2).sum(2)

    def predict_proba(self, X: Tensor) -> Tensor:
        """Return the softmax of the discriminant scores."""
        return self._discriminant_scores(X).softmax(1)

    def decision_function(self, X: Tensor) -> Tensor:
        """Return the discriminant scores; of two classes their difference."""
        scores = self._discriminant_scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def _discriminant_scores(self, X: Tensor) -> Tensor:
        """Return equation 18.2 of Hastie, Tibshirani & Friedman (2009)."""
        X = as_precise_as(X, self.centroids)
        gaps = (X[:, None] - self.centroids) / self.deviation
        squared = gaps.abs().sum(2) ** 2 if self.metric == "manhattan" else (gaps**2).sum(2)
        return 2 * self.log_prior - squared


def normalized(P: Tensor) -> Tensor:
    """Divide each row by its sum; rows of zeros become uniform, as scikit-learn makes them."""
    total = P.sum(1, keepdim=True)
    is_zero = total == 0
    return torch.where(is_zero, 1 / P.shape[1], P / torch.where(is_zero, 1.0, total))


def dense(array: Any) -> np.ndarray:
    """Return an array that may be sparse as one that is not."""
    return array.toarray() if sparse.issparse(array) else np.asarray(array)


@view_of(
    LogisticRegression,
    settings=(
        *("penalty", "C", "l1_ratio", "dual", "tol", "fit_intercept", "intercept_scaling"),
        *("class_weight", "random_state", "solver", "max_iter", "verbose", "warm_start"),
        "n_jobs",
    ),
)
@view_of(
    LogisticRegressionCV,
    settings=(
        *("Cs", "l1_ratios", "fit_intercept", "cv", "dual", "penalty", "scoring", "solver"),
        *("tol", "max_iter", "class_weight", "n_jobs", "verbose", "refit", "random_state"),
        *("intercept_scaling", "use_legacy_attributes"),
    ),
)
def _(classifier: LogisticRegression | LogisticRegressionCV) -> ClassifierView:
    return LinearLogits(classifier.coef_, classifier.intercept_, has_proba=True)


@view_of(
    RidgeClassifier,
    settings=(
        *("alpha", "fit_intercept", "copy_X", "max_iter", "tol", "class_weight", "solver"),
        *("positive", "random_state"),
    ),
)
@view_of(
    RidgeClassifierCV,
    settings=("alphas", "fit_intercept", "scoring", "cv", "class_weight", "store_cv_results"),
)
def _(classifier: RidgeClassifier | RidgeClassifierCV) -> ClassifierView:
    check_is_not_multilabel(classifier)
    return LinearLogits(classifier.coef_, classifier.intercept_, has_proba=False)


def check_is_not_multilabel(classifier: Any) -> None:
    """Raise if a classifier was fitted on several labels of each sample."""
    kind = classifier._label_binarizer.y_type_
    if kind.startswith("multilabel"):
        raise NotDifferentiableError(
            f"Got {type(classifier).__name__} fitted on a {kind} target, but expected one label "
            "for each sample."
        )


_STOCHASTIC_SETTINGS = (
    *("alpha", "class_weight", "early_stopping", "eta0", "fit_intercept", "l1_ratio"),
    *("max_iter", "n_iter_no_change", "n_jobs", "penalty", "random_state", "shuffle", "tol"),
    *("validation_fraction", "verbose", "warm_start"),
)


@view_of(
    SGDClassifier,
    settings=(*_STOCHASTIC_SETTINGS, "average", "epsilon", "learning_rate", "loss", "power_t"),
)
def _(classifier: SGDClassifier) -> ClassifierView:
    W, b = classifier.coef_, classifier.intercept_
    if classifier.loss in ("log_loss", "modified_huber"):
        return OneVsRestProbabilities(W, b, classifier.loss)
    return LinearLogits(W, b, has_proba=False)


@view_of(Perceptron, settings=_STOCHASTIC_SETTINGS)
@view_of(
    LinearSVC,
    settings=(
        *("penalty", "loss", "dual", "tol", "C", "multi_class", "fit_intercept"),
        *("intercept_scaling", "class_weight", "verbose", "random_state", "max_iter"),
    ),
)
def _(classifier: Perceptron | LinearSVC) -> ClassifierView:
    return LinearLogits(classifier.coef_, classifier.intercept_, has_proba=False)


@view_of(NearestCentroid, settings=("metric", "shrink_threshold", "priors"))
def _(classifier: NearestCentroid) -> ClassifierView:
    return Centroids(classifier)
