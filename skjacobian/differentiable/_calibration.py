"""The view of a calibrated classifier."""

from typing import Any

import numpy as np
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.isotonic import IsotonicRegression
from sklearn.preprocessing import LabelEncoder
from torch import Tensor, nn
from torch.nn import functional as F

from skjacobian.differentiable._linear_classifiers import normalized
from skjacobian.differentiable._meta_classifiers import (
    LogProbaView,
    are_zeros,
    columns_of_classes,
    inner_view,
    log_mean,
    log_proba,
    mean,
    safe_log,
)
from skjacobian.differentiable._registry import (
    ClassifierView,
    View,
    as_precise_as,
    binary_probabilities,
    view_of,
)

# What scikit-learn adds to probabilities before it takes their logarithm.
TEMPERATURE_EPS = 1e-12

# How steeply plateaus of an isotonic regression rise to those who follow its gradient: by this
# over the whole range of scores. From 0.01 to 1 made no difference on digits and breast cancer.
SLANT = 0.05


class Calibrated(LogProbaView):
    """The mean of the probabilities of classifiers, each calibrated by itself.

    Parameters
    ----------
    views : list of ClassifierView
    exact_zeros : bool
        Whether probabilities are averaged as they are, not from their logarithms: isotonic
        ones can be 0, and ties between their plateaus must stay ties.
    """

    def __init__(self, views: list[ClassifierView], exact_zeros: bool) -> None:
        super().__init__()
        self.views: Any = nn.ModuleList(views)
        self.exact_zeros = exact_zeros

    def forward(self, X: Tensor) -> Tensor:
        """Return the logarithm of the mean probability."""
        if self.exact_zeros:
            return safe_log(self.predict_proba(X))
        return log_mean([log_proba(view, X) for view in self.views])

    def predict_proba(self, X: Tensor) -> Tensor:
        """Return the mean probability."""
        return mean([view.predict_proba(X) for view in self.views])


class Response(View):
    """What is calibrated: the decision function, or else the probabilities.

    Of two classes it is one column, for the second.
    """

    def __init__(self, estimator: Any) -> None:
        super().__init__()
        self.by_decision = hasattr(estimator, "decision_function")
        place = "the estimator of the CalibratedClassifierCV"
        self.view = inner_view(estimator, place, needs_proba=not self.by_decision)

    def forward(self, X: Tensor) -> Tensor:
        """Return an array of shape (n_samples, n_classes), or (n_samples, 1)."""
        if self.by_decision:
            decision = self.view.decision_function(X)
            return decision[:, None] if decision.ndim == 1 else decision
        P = self.view.predict_proba(X)
        return P[:, 1:] if P.shape[1] == 2 else P


class SigmoidCalibrated(ClassifierView):
    """Platt scaling, σ(-(a s + b)) of the score s of each class.

    Parameters
    ----------
    response : Response
    index : array of int
        The class that each calibrator is of.
    n_classes : int
    a, b : array of shape (n_calibrators,)
    """

    index: Tensor
    a: Tensor
    b: Tensor

    def __init__(
        self, response: Response, index: np.ndarray, n_classes: int, a: Any, b: Any
    ) -> None:
        super().__init__()
        self.response = response
        self.n_classes = n_classes
        self.hold(index=index, a=a, b=b)

    def forward(self, X: Tensor) -> Tensor:
        """Return the logarithm of the probabilities, which do not yet sum to 1."""
        scores = as_precise_as(self.response(X), self.a)
        z = -(self.a * scores[:, : len(self.a)] + self.b)
        if self.n_classes == 2:
            return torch.cat([F.logsigmoid(-z), F.logsigmoid(z)], dim=1)
        log_P = columns_of_classes(F.logsigmoid(z), self.index, self.n_classes, -np.inf)
        # Where all probabilities are 0 to numpy, scikit-learn makes them uniform.
        return torch.where(are_zeros(log_P), 0.0, log_P)


class IsotonicCalibrated(ClassifierView):
    """Isotonic regression on the score of each class.

    Parameters
    ----------
    response : Response
    index : array of int
        The class that each calibrator is of.
    n_classes : int
    calibrators : list of Interpolation
    """

    index: Tensor

    def __init__(
        self, response: Response, index: np.ndarray, n_classes: int, calibrators: list[Any]
    ) -> None:
        super().__init__()
        self.response = response
        self.n_classes = n_classes
        self.calibrators = nn.ModuleList(calibrators)
        self.hold(index=index)

    def forward(self, X: Tensor) -> Tensor:
        """Return the logarithm of the probabilities."""
        return safe_log(self.predict_proba(X))

    def predict_proba(self, X: Tensor) -> Tensor:
        """Return the probabilities; uniform ones where the regressions give only zeros."""
        scores = self.response(X)
        columns = [f(s) for f, s in zip(self.calibrators, scores.unbind(1), strict=False)]
        if self.n_classes == 2:
            return binary_probabilities(columns[0])
        P = torch.stack(columns, dim=1)
        return normalized(columns_of_classes(P, self.index, self.n_classes, 0.0))


class Interpolation(View):
    """The line through points, constant beyond the first and the last.

    Its gradient is that of a line with a slant on top. Without one it is 0 on the plateaus,
    where most samples are: PGD left 0.93 of breast cancer to a machine that it leaves 0.13.
    """

    x: Tensor
    y: Tensor

    def __init__(self, regression: IsotonicRegression) -> None:
        super().__init__()
        self.hold(x=regression.X_thresholds_, y=regression.y_thresholds_)
        self.least, self.largest = float(regression.X_min_), float(regression.X_max_)

    def forward(self, score: Tensor) -> Tensor:
        """Return the interpolated values at `score`, in float64."""
        if len(self.y) == 1:
            return self.y.double().expand(len(score))
        # In the precision of the thresholds, as scikit-learn converts scores to it.
        limit = torch.finfo(self.x.dtype).max
        free = score.to(self.x).clamp(-limit, limit)
        score = free.clamp(self.least, self.largest)
        right = torch.searchsorted(self.x, score.detach().contiguous(), right=True)
        right = right.clamp(1, len(self.x) - 1)
        slope = (self.y[right] - self.y[right - 1]) / (self.x[right] - self.x[right - 1])
        value = self.y[right - 1] + slope * (score - self.x[right - 1])
        slant = SLANT / (self.x[-1] - self.x[0])
        return (value + slant * (free - free.detach())).double()


class TemperatureCalibrated(ClassifierView):
    """Logits times an inverse temperature β."""

    def __init__(self, response: Response, beta: float) -> None:
        super().__init__()
        self.response = response
        self.beta = beta

    def forward(self, X: Tensor) -> Tensor:
        """Return the scaled logits."""
        view = self.response.view
        if not self.response.by_decision:
            log_P = log_proba(view, X)
            eps = torch.full_like(log_P, np.log(TEMPERATURE_EPS))
            # Rows that do not sum to 1 are logits to scikit-learn, if it gets them alone.
            is_logits = (log_P.exp().sum(1, keepdim=True) - 1).abs() > 1e-5
            return self.beta * torch.where(is_logits, log_P.exp(), torch.logaddexp(log_P, eps))
        decision = view.decision_function(X)
        if decision.ndim == 1:
            decision = torch.stack([-decision, decision], dim=1)
        return self.beta * decision


@view_of(CalibratedClassifierCV, settings=("estimator", "method", "cv", "n_jobs", "ensemble"))
def _(classifier: CalibratedClassifierCV) -> ClassifierView:
    views = [_calibrated(part) for part in classifier.calibrated_classifiers_]
    isotonic = classifier.calibrated_classifiers_[0].method == "isotonic"
    return Calibrated(views, exact_zeros=isotonic)


def _calibrated(part: Any) -> ClassifierView:
    """Return the view of one of the calibrated classifiers that scikit-learn averages."""
    response = Response(part.estimator)
    if part.method == "temperature":
        return TemperatureCalibrated(response, float(part.calibrators[0].beta_))
    of_class = LabelEncoder().fit(part.classes).transform(part.estimator.classes_)
    index, n_classes = of_class[: len(part.calibrators)], len(part.classes)
    if part.method == "isotonic":
        lines = [Interpolation(calibrator) for calibrator in part.calibrators]
        return IsotonicCalibrated(response, index, n_classes, lines)
    a = np.array([calibrator.a_ for calibrator in part.calibrators])
    b = np.array([calibrator.b_ for calibrator in part.calibrators])
    return SigmoidCalibrated(response, index, n_classes, a, b)
