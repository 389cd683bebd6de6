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
from skjacobian.differentiable._columns import Encoded, branch
from skjacobian.differentiable._elementwise import Fill
from skjacobian.differentiable._projections import Select, transform_view
from skjacobian.differentiable._registry import is_dropped
from skjacobian.differentiable._scalers import Affine
from skjacobian.exceptions import NotDifferentiableError
from skjacobian.leaves import Leaves


@singledispatch
def leaves_before(transformer: Any, leaves: Leaves) -> Leaves | None:
    """Return leaves of what a fitted transformer returns as leaves of what it is given.

    Returns
    -------
    Leaves or None
        None where they are no boxes there: behind what makes a feature from several, or bends it.
    """
    if leaves.encoders:  # which read what the transformer makes
        return None
    try:
        view = transform_view(transformer)
    except NotDifferentiableError:
        return None
    n_features = getattr(transformer, "n_features_in_", leaves.low.shape[1])
    return _before_view(view, leaves, n_features)


@leaves_before.register
def _(pipeline: Pipeline, leaves: Leaves) -> Leaves | None:
    return before_steps(pipeline.steps, leaves)


def before_steps(steps: list[tuple[str, Any]], leaves: Leaves | None) -> Leaves | None:
    """Return leaves before transformers in a row."""
    for _, step in reversed(steps):
        if leaves is not None and step is not None and step != "passthrough":
            leaves = leaves_before(step, leaves)
    return leaves


@leaves_before.register
def _(transformer: ColumnTransformer, leaves: Leaves) -> Leaves | None:
    if leaves.encoders or transformer.transformer_weights:
        return None
    whole, encoders, encoded = _unlimited(leaves, transformer.n_features_in_), [], []
    try:
        for columns, part, view, outputs in _branches(transformer):
            own = _columns_of(leaves, outputs)
            if isinstance(view, Encoded):
                encoders.append(Lookup(columns, view))
                encoded.append(own)
                continue
            before = own if part == "passthrough" else leaves_before(part, own)
            if before is None or before.encoders:
                return None
            _limit(whole, columns, before)
    except NotDifferentiableError:
        return None
    low, high, takes_missing = (
        np.concatenate([getattr(part, name) for part in (whole, *encoded)], axis=1)
        for name in ("low", "high", "takes_missing")
    )
    return replace(
        leaves, low=low, high=high, takes_missing=takes_missing, encoders=tuple(encoders)
    )


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


def _before_view(view: nn.Module, leaves: Leaves, n_features: int) -> Leaves | None:
    """Return leaves before what a view does to each feature by itself."""
    if isinstance(view, nn.Identity):
        return leaves
    if isinstance(view, Select):
        chosen = _unlimited(leaves, n_features)
        _limit(chosen, view.index.tolist(), leaves)
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
    whole = _unlimited(leaves, n_features)
    _limit(whole, kept, replace(leaves, takes_missing=inside))
    # A leaf that the indicator 0 is not in takes missing values alone.
    whole.low[:, indicated] = np.where(not_missing, whole.low[:, indicated], np.inf)
    whole.takes_missing[:, indicated] &= inside[:, len(kept) :]
    return whole


def _lets_in(leaves: Leaves, x: np.ndarray) -> np.ndarray:
    return np.asarray((leaves.low < x) & (x <= leaves.high))


def _unlimited(leaves: Leaves, n_features: int) -> Leaves:
    """Return as many leaves that let in everything."""
    shape = (len(leaves.low), n_features)
    low, high = np.full(shape, -np.inf), np.full(shape, np.inf)
    return replace(leaves, low=low, high=high, takes_missing=np.ones(shape, dtype=bool))


def _limit(whole: Leaves, columns: list[int], part: Leaves) -> None:
    """Limit some features of leaves, in place, to those of the first features of others."""
    n = len(columns)
    whole.low[:, columns] = np.maximum(whole.low[:, columns], part.low[:, :n])
    whole.high[:, columns] = np.minimum(whole.high[:, columns], part.high[:, :n])
    whole.takes_missing[:, columns] &= part.takes_missing[:, :n]


def _columns_of(leaves: Leaves, columns: slice) -> Leaves:
    """Return leaves of some features."""
    low, high = leaves.low[:, columns], leaves.high[:, columns]
    return replace(leaves, low=low, high=high, takes_missing=leaves.takes_missing[:, columns])
