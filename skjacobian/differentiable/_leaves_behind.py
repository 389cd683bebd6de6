"""Leaves behind transformers: in the columns, and the units, of what these are given."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import Pipeline
from torch import Tensor, nn

from skjacobian._table import Table
from skjacobian.differentiable._columns import Encoded, bind_samples, branch
from skjacobian.differentiable._elementwise import Fill
from skjacobian.differentiable._projections import Select, transform_view
from skjacobian.differentiable._registry import is_dropped
from skjacobian.differentiable._scalers import Affine
from skjacobian.exceptions import NotDifferentiableError
from skjacobian.leaves import Leaves


def leaves_before(transformer: Any, leaves: Leaves) -> Leaves | None:
    """Return leaves of what a fitted transformer returns as leaves of what it is given.

    Returns
    -------
    Leaves or None
        None where they are no boxes there: behind what makes a feature from several, or bends it.
    """
    n_plain = leaves.low.shape[1] - leaves.n_encoded
    plain = replace(_features(leaves, slice(n_plain)), encoders=(), n_encoded=0)
    try:
        before = _before(transformer, plain)
        behind = [_behind(transformer, encoder) for encoder in leaves.encoders]
    except NotDifferentiableError:
        return None
    if before is None or None in behind:
        return None
    return _beside(before, [_features(leaves, slice(n_plain, None))], behind)


def before_steps(steps: list[tuple[str, Any]], leaves: Leaves | None) -> Leaves | None:
    """Return leaves before transformers in a row."""
    for _, step in reversed(steps):
        if leaves is not None and step is not None and step != "passthrough":
            leaves = leaves_before(step, leaves)
    return leaves


def before_codes(leaves: Leaves, encoder: Any, columns: list[int]) -> Leaves:
    """Return leaves whose last features are what an encoder makes of some columns."""
    n_features = leaves.low.shape[1]
    others = [j for j in range(n_features) if j not in columns]
    whole = unlimited(leaves, n_features)
    limit(whole, others, leaves)
    lookup = Lookup(columns, Encoded(encoder, columns, as_series=False, refusal=""))
    return _beside(whole, [_features(leaves, slice(len(others), None))], [lookup])


@singledispatch
def _before(transformer: Any, leaves: Leaves) -> Leaves | None:
    view = transform_view(transformer)
    return _before_view(view, leaves, getattr(transformer, "n_features_in_", 0))


@_before.register
def _(pipeline: Pipeline, leaves: Leaves) -> Leaves | None:
    return before_steps(pipeline.steps, leaves)


@_before.register
def _(transformer: ColumnTransformer, leaves: Leaves) -> Leaves | None:
    if transformer.transformer_weights:
        return None
    whole, encoded, lookups = unlimited(leaves, transformer.n_features_in_), [], []
    for columns, part, view, outputs in _branches(transformer):
        own = _features(leaves, outputs)
        if isinstance(view, Encoded):
            encoded.append(own)
            lookups.append(Lookup(columns, view))
            continue
        before = own if part == "passthrough" else leaves_before(part, own)
        if before is None or before.encoders:
            return None
        limit(whole, columns, before)
    return _beside(whole, encoded, lookups)


def _branches(
    transformer: ColumnTransformer,
) -> Iterator[tuple[list[int], Any, nn.Module, slice]]:
    """Yield the columns of each transformer, itself, its view, and where its outputs are."""
    inputs, outputs = transformer._transformer_to_input_indices, transformer.output_indices_
    for name, part, columns in transformer.transformers_:
        if not is_dropped(part) and len(inputs[name]):
            view = branch(name, part, columns, inputs[name])
            yield list(inputs[name]), part, view, outputs[name]


@dataclass(frozen=True)
class Lookup:
    """What an encoder makes of columns that cannot change, as leaves ask for it.

    Attributes
    ----------
    columns : list of int
    view : Encoded
    """

    columns: list[int]
    view: Encoded

    def bind(self, table: Table) -> None:
        """Encode the samples of a table, which are all that may be asked about."""
        self.view.bind(table)

    def __call__(self, X: np.ndarray) -> np.ndarray:
        """Return the encoded columns."""
        encoded: Tensor = self.view(torch.from_numpy(X[:, self.columns]))
        return encoded.numpy()


@dataclass(frozen=True)
class Behind:
    """What an encoder makes of what a transformer returns.

    Attributes
    ----------
    columns : list of int
        What the encoder reads, before the transformer.
    view : callable
        That of the transformer.
    encoder : Lookup or Behind
    """

    columns: list[int]
    view: Any
    encoder: Any

    def bind(self, table: Table) -> None:
        """Show both the samples."""
        bind_samples(self.view, table)
        self.encoder.bind(Table(self.view(table.tensor.double()).numpy()))

    def __call__(self, X: np.ndarray) -> np.ndarray:
        """Return the encoded columns."""
        encoded: np.ndarray = self.encoder(self.view(torch.from_numpy(X)).numpy())
        return encoded


def _behind(transformer: Any, encoder: Any) -> Behind | None:
    """Return an encoder behind a transformer; None where it is not known what it reads there."""
    names = hasattr(getattr(encoder.view, "encoder", None), "feature_names_in_")
    if not isinstance(transformer, ColumnTransformer) or names:
        return None
    columns = [
        column
        for inputs, _, _, outputs in _branches(transformer)
        if any(outputs.start <= j < outputs.stop for j in encoder.columns)
        for column in inputs
    ]
    return Behind(columns, transform_view(transformer), encoder)


def _before_view(view: nn.Module, leaves: Leaves, n_features: int) -> Leaves | None:
    """Return leaves before what a view does to each feature by itself."""
    if isinstance(view, nn.Identity):
        return leaves
    if isinstance(view, Select):
        chosen = unlimited(leaves, n_features)
        limit(chosen, view.index.tolist(), leaves)
        return chosen
    if isinstance(view, Fill) and np.isnan(view.missing):
        return _before_filled(view, leaves, n_features)
    if isinstance(view, Affine) and view.clip is None and bool((view.scale > 0).all()):
        before, scale, after = (part.numpy() for part in (view.before, view.scale, view.after))
        low, high = ((side - after) / scale + before for side in (leaves.low, leaves.high))
        return replace(leaves, low=low, high=high)
    return None


def _before_filled(fill: Fill, leaves: Leaves, n_features: int) -> Leaves:
    """Return leaves before missing values are filled, and indicators of them are appended."""
    kept, indicated = fill.kept.tolist(), fill.indicated.tolist()
    inside = _lets_in(leaves, np.append(fill.statistics.numpy(), np.ones(len(indicated))))
    not_missing = _lets_in(leaves, np.zeros(leaves.low.shape[1]))[:, len(kept) :]
    whole = unlimited(leaves, n_features)
    limit(whole, kept, replace(leaves, takes_missing=inside))
    # A leaf that the indicator 0 is not in takes missing values alone.
    whole.low[:, indicated] = np.where(not_missing, whole.low[:, indicated], np.inf)
    whole.takes_missing[:, indicated] &= inside[:, len(kept) :]
    return whole


def _lets_in(leaves: Leaves, x: np.ndarray) -> np.ndarray:
    return np.asarray((leaves.low < x) & (x <= leaves.high))


def unlimited(leaves: Leaves, n_features: int) -> Leaves:
    """Return as many leaves that let in everything."""
    shape = (len(leaves.low), n_features)
    low, high = np.full(shape, -np.inf), np.full(shape, np.inf)
    return replace(leaves, low=low, high=high, takes_missing=np.ones(shape, dtype=bool))


def limit(whole: Leaves, columns: list[int], part: Leaves) -> None:
    """Limit some features of leaves, in place, to those of the first features of others."""
    for j, column in enumerate(columns):  # of which some may be there twice
        whole.low[:, column] = np.maximum(whole.low[:, column], part.low[:, j])
        whole.high[:, column] = np.minimum(whole.high[:, column], part.high[:, j])
        whole.takes_missing[:, column] &= part.takes_missing[:, j]


def _features(leaves: Leaves, features: slice) -> Leaves:
    """Return leaves of some features."""
    low, high = leaves.low[:, features], leaves.high[:, features]
    return replace(leaves, low=low, high=high, takes_missing=leaves.takes_missing[:, features])


def _beside(whole: Leaves, encoded: list[Leaves], encoders: list[Any]) -> Leaves:
    """Return leaves with further features behind: what encoders make of columns."""
    parts = [whole, *encoded]
    return replace(
        whole,
        low=np.concatenate([part.low for part in parts], axis=1),
        high=np.concatenate([part.high for part in parts], axis=1),
        takes_missing=np.concatenate([part.takes_missing for part in parts], axis=1),
        encoders=(*whole.encoders, *encoders),
        n_encoded=whole.n_encoded + sum(part.low.shape[1] for part in encoded),
    )
