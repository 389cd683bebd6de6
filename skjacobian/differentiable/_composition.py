"""The views of what is made of other estimators: pipelines, unions, searches."""

from collections.abc import Callable
from typing import Any

import torch
from sklearn.base import is_classifier
from sklearn.feature_selection import RFE
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from skjacobian.differentiable._columns import check_encodes_nothing
from skjacobian.differentiable._projections import selected, transform_view
from skjacobian.differentiable._registry import (
    ClassifierView,
    Function,
    TensorFunction,
    View,
    as_torch,
    check_methods,
    module_of,
    view_of,
)
from skjacobian.exceptions import NotDifferentiableError


class Chain(ClassifierView):
    """Transformers in a row, and a classifier at the end if there is one.

    Parameters
    ----------
    views : list of nn.Module
        Brought to the device of the last, where its weights are; networks stay where the
        estimators have them.
    """

    def __init__(self, views: list[nn.Module]) -> None:
        super().__init__()
        for view in views[1:]:
            check_encodes_nothing(view, "a step of a pipeline behind others")
        *transformers, last = views or [nn.Identity()]
        self.transform = nn.Sequential(*transformers)
        # What a user registered may be any module, without probabilities of its own.
        is_known = isinstance(last, View | nn.Identity)
        self.last: Any = last if is_known else Function(last)
        self.has_proba = getattr(self.last, "has_proba", True)
        weight = next(last.parameters(), next(last.buffers(), None))
        for view in transformers:
            if weight is not None and next(view.parameters(), None) is None:
                view.to(weight.device)

    def forward(self, X: Tensor) -> Tensor:
        """Return what the last step makes of what the others make of `X`."""
        return self.last(self.transform(X))

    def predict_proba(self, X: Tensor) -> Tensor:
        """Return the probabilities that the last step gives."""
        return self.last.predict_proba(self.transform(X))

    def decision_function(self, X: Tensor) -> Tensor:
        """Return the decision function of the last step."""
        return self.last.decision_function(self.transform(X))


class Union(View):
    """What several transformers make of the same `X`, side by side.

    Parameters
    ----------
    views : list of nn.Module
    weights : list of float
        What each output is multiplied by.
    """

    def __init__(self, views: list[nn.Module], weights: list[float]) -> None:
        super().__init__()
        self.views = nn.ModuleList(views)
        self.weights = weights

    def forward(self, X: Tensor) -> Tensor:
        """Return the outputs, in the order of the transformers."""
        # No features first, so that there is something to join if all are dropped.
        outputs = [X[:, :0]]
        for view, weight in zip(self.views, self.weights, strict=True):
            outputs.append(weight * view(X))
        return torch.cat(outputs, dim=1)


def view_of_part(make: Callable[[Any], nn.Module], estimator: Any, place: str) -> nn.Module:
    """Return the view that `make` makes of a part; an error says of which."""
    try:
        return make(estimator)
    except NotDifferentiableError as error:
        raise NotDifferentiableError(f"In {place}: {error}") from error


def _chain(pipeline: Pipeline, last: Callable[[Any], nn.Module]) -> Chain:
    """Return the view of a pipeline, whose last step is used as `last` views it."""
    check_is_fitted(pipeline)
    check_methods(pipeline, Pipeline)
    n_steps, views = len(pipeline.steps), []
    for i, (name, step) in enumerate(pipeline.steps, start=1):
        if step is not None and step != "passthrough":
            make = last if i == n_steps else transform_view
            views.append(view_of_part(make, step, f"step {name!r} of the pipeline"))
    return Chain(views)


@as_torch.register
def _(pipeline: Pipeline) -> TensorFunction:
    return _chain(pipeline, module_of)


@transform_view.register
def _(pipeline: Pipeline) -> nn.Module:
    return _chain(pipeline, transform_view)


@view_of(
    FeatureUnion,
    settings=(
        *("transformer_list", "transformer_weights", "n_jobs", "verbose"),
        "verbose_feature_names_out",
    ),
)
def _(union: FeatureUnion) -> View:
    weights = union.transformer_weights or {}
    views: dict[str, nn.Module] = {}
    for name, transformer in union.transformer_list:
        if transformer == "passthrough":
            views[name] = nn.Identity()
        elif transformer != "drop":
            place = f"{name!r} of the feature union"
            views[name] = view_of_part(transform_view, transformer, place)
    # None is a weight of 1, as scikit-learn takes it.
    factors = [1.0 if (w := weights.get(name)) is None else w for name in views]
    return Union(list(views.values()), factors)


def _best_of(search: BaseSearchCV) -> Any:
    check_is_fitted(search, "best_estimator_")
    check_methods(search, BaseSearchCV)
    return search.best_estimator_


@as_torch.register
def _(search: BaseSearchCV) -> TensorFunction:
    return as_torch(_best_of(search))


@transform_view.register
def _(search: BaseSearchCV) -> nn.Module:
    return transform_view(_best_of(search))


@as_torch.register
def _(frozen: FrozenEstimator) -> TensorFunction:
    return as_torch(frozen.estimator)


@as_torch.register
def _(selector: RFE) -> TensorFunction:
    """Unlike other selectors it predicts, by the estimator that it was fitted with."""
    if not is_classifier(selector):
        return selected(selector)
    check_methods(selector, RFE)
    return Chain([selected(selector), module_of(selector.estimator_)])


transform_view.register(RFE, selected)


@transform_view.register
def _(frozen: FrozenEstimator) -> nn.Module:
    return transform_view(frozen.estimator)
