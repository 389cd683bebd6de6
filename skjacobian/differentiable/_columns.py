"""The view of a ColumnTransformer: columns that are transformed, and columns that are encoded."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sklearn.calibration import _CalibratedClassifier
from sklearn.compose import ColumnTransformer
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, TargetEncoder
from torch import Tensor, nn

from skjacobian._columns import shown
from skjacobian._table import Table
from skjacobian.differentiable._projections import transform_view
from skjacobian.differentiable._registry import WITHOUT_GRADIENTS, View, is_dropped, view_of
from skjacobian.exceptions import NotDifferentiableError
from skjacobian.model_modes import frozen

# Samples on which it is seen whether a view computes with codes.
PROBED = 256

ENCODERS = (OneHotEncoder, OrdinalEncoder, TargetEncoder)


class Columns(View):
    """The outputs of transformers of some columns each, side by side.

    Parameters
    ----------
    branches : list of (list of int, nn.Module, float)
        Indices of columns, what is made of them, and a factor of that.
    """

    def __init__(self, branches: list[tuple[list[int], nn.Module, float]]) -> None:
        super().__init__()
        self.columns = [columns for columns, _, _ in branches]
        self.weights = [weight for _, _, weight in branches]
        self.views = nn.ModuleList(view for _, view, _ in branches)

    def forward(self, X: Tensor) -> Tensor:
        """Return the transformed columns of `X`."""
        branches = zip(self.columns, self.views, self.weights, strict=True)
        return torch.cat([w * view(X[:, columns]) for columns, view, w in branches], dim=1)


class Encoded(View):
    """What an encoder makes of columns that cannot change: looked up, not computed.

    It knows the samples that `bind` has shown it, and no others.

    Parameters
    ----------
    encoder : fitted transformer
    columns : list of int
        The columns of the table that it is given.
    as_series : bool
        Whether it is given a single column as such.
    refusal : str
        Why it has no view that could follow columns of numbers; empty for an encoder of
        categories, which may look numbers up.
    """

    outputs: Tensor

    def __init__(self, encoder: Any, columns: list[int], as_series: bool, refusal: str) -> None:
        super().__init__()
        self.encoder, self.columns, self.as_series = encoder, columns, as_series
        self.refusal = refusal
        # The values of each column, and the combinations of those of the columns before it
        # with its own.
        self.values: list[Tensor] = []
        self.combinations: list[Tensor] = []

    def bind(self, table: Table) -> None:
        """Encode the samples of a table.

        Raises
        ------
        NotDifferentiableError
            If that would fix columns of numbers, which no encoder of categories reads.
        """
        numbers = [j for j in self.columns if j not in table.categories]
        if numbers and self.refusal:
            names = numbers if table.columns is None else [table.columns[j] for j in numbers]
            raise NotDifferentiableError(f"In columns of numbers ({shown(names)}): {self.refusal}")
        self.values, self.combinations = [], []
        # An attack that has lost its way asks about NaN alone: that has a place, too.
        asked = nn.functional.pad(table.tensor[:, self.columns], (0, 0, 0, 1), value=torch.nan)
        place = torch.zeros(len(asked), dtype=torch.int64)
        for column in _comparable(asked).T:
            self.values.append(torch.unique(column))
            pair = self._pair(place, column, self.values[-1])
            self.combinations.append(torch.unique(pair))
            place = torch.searchsorted(self.combinations[-1], pair)
        _, first = np.unique(place.numpy(), return_index=True)
        is_sample = first < len(table.tensor)
        encoded = self._encode(table, first[is_sample])
        outputs = np.full((len(first), encoded.shape[1]), np.nan)
        outputs[is_sample] = encoded
        self.hold(outputs=outputs)

    def _encode(self, table: Table, rows: np.ndarray) -> np.ndarray:
        columns = self.columns[0] if self.as_series else self.columns
        if table.columns is None:
            encoded = self.encoder.transform(np.asarray(table.X)[rows][:, columns])
        else:
            encoded = self.encoder.transform(table.X.iloc[rows, columns])
        return np.asarray(encoded.toarray() if hasattr(encoded, "toarray") else encoded)

    def _pair(self, place: Tensor, column: Tensor, values: Tensor) -> Tensor:
        """Return a number for each pair of a place and a value."""
        return place * len(values) + self._found(values, column.contiguous())

    def _found(self, known: Tensor, wanted: Tensor) -> Tensor:
        """Return the places of what is wanted in sorted, known values."""
        place = torch.searchsorted(known, wanted).clamp_(max=len(known) - 1)
        if not bool((known[place] == wanted).all()):
            raise ValueError(
                f"Got values in columns {self.columns} that are not those of the samples: "
                "columns behind an encoder cannot change."
            )
        return place

    def forward(self, X: Tensor) -> Tensor:
        """Return the encoded `X`, which has no gradient."""
        if not self.values:
            raise ValueError(
                "Got a view with encoded columns that knows no samples yet, but expected "
                "bind_samples(view, X) before it is called."
            )
        place = torch.zeros(len(X), dtype=torch.int64)
        columns = _comparable(X.detach().cpu()).T
        for column, values, known in zip(columns, self.values, self.combinations, strict=True):
            place = self._found(known, self._pair(place, column, values))
        return self.outputs.to(X)[place.to(X.device)]


def bind_samples(view: Any, X: Any) -> None:
    """Show a view the samples that it will be asked about, if it has encoded columns.

    Parameters
    ----------
    view : what `as_torch` returned
    X : array-like of shape (n_samples, n_features) or Table

    Raises
    ------
    NotDifferentiableError
        If the view takes columns of categories for numbers.
    """
    table = X if isinstance(X, Table) else Table(X)
    for part in view.modules() if isinstance(view, nn.Module) else ():
        if isinstance(part, Encoded):
            part.bind(table)
    coded = [j for j, known in table.categories.items() if known.dtype.kind != "b" or known.hasnans]
    if coded:
        _check_not_computed_with(view, table, coded)


def _check_not_computed_with(view: Any, table: Table, columns: list[int]) -> None:
    """Raise if a view computes with codes: then its outputs have a gradient by them.

    What looks codes up has none, and what else reads a category must be asked as it is.
    """
    X = table.tensor[:PROBED].clone().requires_grad_()
    with frozen(view), torch.enable_grad():
        output = view(X)
        weights = torch.linspace(0.5, 1.5, output.numel()).to(output).reshape(output.shape)
        gradient = torch.zeros_like(X)
        if output.requires_grad:
            (gradient,) = torch.autograd.grad((weights * output).sum(), X)
    names = table.columns or []
    read = [names[j] for j in columns if bool((gradient[:, j] != 0).any())]
    if read:
        raise NotDifferentiableError(
            f"Got columns {read} of categories that no encoder reads, but expected numbers (cast "
            "categories that are numbers to them) or OneHotEncoder, OrdinalEncoder or "
            "TargetEncoder: no differentiable view is known of what else becomes of them. "
            f"{WITHOUT_GRADIENTS}"
        )


def check_encodes_nothing(view: nn.Module, place: str) -> None:
    """Raise if a view looks columns up that are not those of X at the same places."""
    for part in view.modules():
        if isinstance(part, Encoded) and part.refusal and not part.as_series:  # not text
            raise NotDifferentiableError(f"In {place}: {part.refusal}")
        if isinstance(part, Encoded):
            raise NotDifferentiableError(
                f"Got an encoder inside {place}, but expected encoders in the first step, on "
                "columns of X itself: elsewhere it is not known which columns they read. "
                f"{WITHOUT_GRADIENTS}"
            )


def is_encoder(transformer: Any) -> bool:
    """Tell whether a transformer encodes categories, after imputing them perhaps."""
    if isinstance(transformer, Pipeline):
        return any(is_encoder(step) for _, step in transformer.steps)
    return isinstance(transformer, ENCODERS)


def encoded_columns(estimator: Any) -> list[int]:
    """Return the columns of X that a fitted estimator takes for categories."""
    if is_encoder(estimator):  # which nobody has fitted where it has no columns
        return list(range(getattr(estimator, "n_features_in_", 0)))
    if (is_categorical := getattr(estimator, "is_categorical_", None)) is not None:
        return np.flatnonzero(is_categorical).tolist()  # of histogram gradient boosting
    found: set[int] = set()
    for columns, inner in _parts_on_columns(estimator):
        local = encoded_columns(inner)
        found.update(local if columns is None else (int(columns[j]) for j in local))
    return sorted(found)


def unread_columns(estimator: Any) -> list[int]:
    """Return the columns of X that a fitted estimator drops before anything reads them."""
    if isinstance(estimator, ColumnTransformer):
        indices = estimator._transformer_to_input_indices
        kept = [name for name, part, _ in estimator.transformers_ if not is_dropped(part)]
        read = {int(j) for name in kept for j in indices[name]}
        return sorted(set(range(estimator.n_features_in_)) - read)
    parts = list(_parts_on_columns(estimator))
    if not parts or any(columns is not None for columns, _ in parts):
        return []
    return sorted(set.intersection(*(set(unread_columns(inner)) for _, inner in parts)))


def _parts_on_columns(estimator: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what reads X first in an estimator, and which of its columns; None is all."""
    if isinstance(estimator, Pipeline):
        yield None, estimator.steps[0][1]
    elif isinstance(estimator, ColumnTransformer):
        for name, transformer, _ in estimator.transformers_:
            yield estimator._transformer_to_input_indices[name], transformer
    elif isinstance(estimator, FeatureUnion):
        yield from ((None, transformer) for _, transformer in estimator.transformer_list)
    elif isinstance(estimator, FrozenEstimator | _CalibratedClassifier):
        yield None, estimator.estimator
    elif isinstance(members := getattr(estimator, "estimators_", None), list):
        columns = getattr(estimator, "estimators_features_", [None] * len(members))
        yield from zip(columns, members, strict=True)
    else:
        for name in ("best_estimator_", "estimator_", "calibrated_classifiers_"):
            if (inner := getattr(estimator, name, None)) is not None:
                yield from ((None, one) for one in (inner if isinstance(inner, list) else [inner]))


@view_of(
    ColumnTransformer,
    settings=(
        *("transformers", "remainder", "sparse_threshold", "n_jobs", "transformer_weights"),
        *("verbose", "verbose_feature_names_out", "force_int_remainder_cols"),
    ),
)
def _(transformer: ColumnTransformer) -> View:
    inputs = transformer._transformer_to_input_indices
    weights = transformer.transformer_weights or {}
    branches = [
        (list(inputs[name]), branch(name, part, columns, inputs[name]), weights.get(name, 1.0))
        for name, part, columns in transformer.transformers_
        if not is_dropped(part) and len(inputs[name])
    ]
    return Columns(branches)


def branch(name: str, transformer: Any, columns: Any, indices: list[int]) -> nn.Module:
    """Return the view of the transformer of some columns, or look its outputs up."""
    if isinstance(transformer, str):  # "passthrough"
        return nn.Identity()
    place = f"{name!r} of the column transformer"
    as_series = isinstance(columns, str | int)
    refusal = ""
    if as_series and not is_encoder(transformer):
        refusal = _refusal(place, f"Got the column {columns!r}, but expected [{columns!r}].")
    elif not is_encoder(transformer):
        try:
            view = transform_view(transformer)
        except NotDifferentiableError as error:
            refusal = _refusal(place, str(error))  # no matter where it reads no numbers
        else:
            check_encodes_nothing(view, place)
            return view
    return Encoded(transformer, list(indices), as_series, refusal)


def _refusal(place: str, reason: str) -> str:
    """Return what to say of a transformer without a view, if it turns out to need one."""
    hint = "" if WITHOUT_GRADIENTS in reason else f" {WITHOUT_GRADIENTS}"
    return f"In {place}: {reason}{hint}"


def _comparable(values: Tensor) -> Tensor:
    """Return values as float64, with inf for the missing ones, which equal each other then."""
    return torch.where(values.isnan(), torch.inf, values.double())
