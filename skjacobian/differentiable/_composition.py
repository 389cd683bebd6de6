"""The views of what is made of other estimators in a row: pipelines, searches."""

from typing import Any

from sklearn.frozen import FrozenEstimator
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from skjacobian.differentiable._registry import (
    ClassifierView,
    TensorFunction,
    as_torch,
    module_of,
)
from skjacobian.exceptions import NotDifferentiableError


class Chain(ClassifierView):
    """Transformers in a row, and a classifier at the end if there is one.

    Parameters
    ----------
    views : list of nn.Module
        Brought to the device of the last, where its weights are.
    """

    def __init__(self, views: list[nn.Module]) -> None:
        super().__init__()
        *transformers, last = views or [nn.Identity()]
        self.transform = nn.Sequential(*transformers)
        self.last = last
        self.has_proba = getattr(last, "has_proba", True)
        weight = next(last.parameters(), next(last.buffers(), None))
        if weight is not None:
            self.transform.to(weight.device)

    def forward(self, X: Tensor) -> Tensor:
        """Return what the last step makes of what the others make of `X`."""
        return self.last(self.transform(X))

    def predict_proba(self, X: Tensor) -> Tensor:
        """Return the probabilities that the last step gives."""
        last: Any = self.last
        return last.predict_proba(self.transform(X))

    def decision_function(self, X: Tensor) -> Tensor:
        """Return the decision function of the last step."""
        last: Any = self.last
        return last.decision_function(self.transform(X))


@as_torch.register
def _(pipeline: Pipeline) -> TensorFunction:
    check_is_fitted(pipeline)
    views = []
    for name, step in pipeline.steps:
        if step is None or step == "passthrough":
            continue
        try:
            views.append(module_of(step))
        except NotDifferentiableError as error:
            raise NotDifferentiableError(f"In step {name!r} of the pipeline: {error}") from error
    return Chain(views)


@as_torch.register
def _(search: BaseSearchCV) -> TensorFunction:
    check_is_fitted(search, "best_estimator_")
    return as_torch(search.best_estimator_)


@as_torch.register
def _(frozen: FrozenEstimator) -> TensorFunction:
    return as_torch(frozen.estimator)
