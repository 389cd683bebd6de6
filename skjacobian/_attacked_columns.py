"""The columns of a table under attack, and a threat model as users say it of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skjacobian._columns import Columns, by_place
from skjacobian._table import Table
from skjacobian.attacks import Attack
from skjacobian.constraints import FeatureConstraints, check_constraints
from skjacobian.threat_model import DataScale, fit_feature_scale, resolve_mutable


@dataclass(frozen=True)
class AttackedColumns:
    """The columns of a table, of which an adversary may change some.

    Attributes
    ----------
    table : Table
    categories : list of int
        Columns that hold no numbers or are encoded, so that an adversary cannot change them.
    encoded : list of int
        Those that an encoder reads.
    unread : list of int
        Columns that the classifier drops: what cannot change there is no matter.
    is_reordered : bool
        Whether they stand in another order than the user gave them in.
    """

    table: Table
    categories: list[int]
    encoded: list[int]
    unread: list[int]
    is_reordered: bool

    def threat_model(
        self,
        norm: str,
        eps: float,
        feature_scale: Any,
        bounds: Any,
        mutable: Any,
        constraints: Any,
    ) -> dict[str, Any]:
        """Return the parameters of an attack, what depends on the data taken from all of X."""
        check_constraints(constraints, feature_scale, bounds)
        if self.is_reordered:
            _check_names_only(self._columns, feature_scale, bounds, mutable, constraints)
        feature_scale = self._columns.in_order(feature_scale)
        mutable = resolve_mutable(mutable, self.table.tensor, self.table.columns)
        self._check_no_categories(mutable, constraints)
        return {
            "norm": norm,
            "eps": eps,
            "feature_scale": fit_feature_scale(feature_scale, self.table.tensor),
            "bounds": bounds_in_order(bounds, self._columns),
            "mutable": mutable,
            "constraints": self._constraints(constraints),
        }

    def _held(self, constraints: FeatureConstraints | None) -> list[int]:
        """Return the categories, but not the columns of bool that one-hot groups name."""
        switches = one_hot_switches(self.table, constraints, self._columns)
        return [j for j in self.categories if j not in switches or j in self.encoded]

    def _check_no_categories(
        self, mutable: Tensor | None, constraints: FeatureConstraints | None
    ) -> None:
        if mutable is None:
            return
        if chosen := [j for j in self._held(constraints) if mutable.flatten()[j]]:
            raise ValueError(
                f"Got mutable with the columns {self._columns.labels(chosen)}, but expected "
                "columns of numbers that no encoder reads: others cannot be attacked."
            )

    def _constraints(self, constraints: FeatureConstraints | None) -> FeatureConstraints | None:
        """Return the constraints by index, with those that the types of the columns make."""
        if constraints is None and not self.categories and not self.table.integer:
            return None
        return (constraints or FeatureConstraints()).by_index(
            self._columns, immutable=self._held(constraints), integer=self.table.integer
        )

    def unsaid_categories(self, mutable: Any, constraints: FeatureConstraints | None) -> str:
        """Return the names of the columns held fixed although nobody said that they are."""
        if mutable is not None:
            return ""
        said = [] if constraints is None else constraints.by_index(self._columns).immutable
        held = self._held(constraints)
        unsaid = [j for j in held if j not in said and j not in self.unread]
        return self._columns.shown(unsaid)

    def stuck(self, attack: Attack, constraints: FeatureConstraints | None) -> str:
        """Say, if so, what cannot change at this radius although nobody said that it cannot."""
        said = [] if constraints is None else constraints.by_index(self._columns).integer
        unsaid = [j for j in self.table.integer if j not in said]
        return stuck(
            attack,
            self.table.tensor,
            self._columns,
            integer=[j for j in unsaid if j not in self.unread],
            unread=self.unread,
        )

    @property
    def _columns(self) -> Columns:
        return Columns(self.table.tensor.shape[1:], self.table.columns)


def held_fixed(columns: str) -> str:
    """Say that columns are held fixed although nobody said that they are."""
    return (
        f"Got X whose columns ({columns}) hold categories and are held fixed: who can change them "
        "may do better. FeatureConstraints(immutable=[...]) rules that out; one_hot=[[...]] makes "
        "columns of bool the categories of a group."
    )


def one_hot_switches(
    table: Table, constraints: FeatureConstraints | None, columns: Columns
) -> set[int]:
    """Return the columns of bool that one-hot groups name, as of `pandas.get_dummies`.

    Their codes are the numbers 0 and 1, so that the adversary may choose among the categories.
    """
    if constraints is None:
        return set()
    groups = constraints.by_index(columns).one_hot
    return {j for group in groups for j in group if _is_bool(table, j)}


def _is_bool(table: Table, column: int) -> bool:
    known = table.categories.get(column)
    return getattr(getattr(known, "dtype", None), "kind", None) == "b"


def in_the_order_of_fit(estimator: Any, X: Any) -> Any:
    """Return a DataFrame with the columns that an estimator was fitted on, in their order.

    What selects columns by name takes them in any order, and others besides them.
    """
    names = getattr(estimator, "feature_names_in_", None)
    if names is None or not hasattr(X, "iloc") or list(X.columns) == list(names):
        return X
    missing = [name for name in names if name not in X.columns]
    if missing:
        raise ValueError(
            f"Got X without the columns {missing}, but expected those that "
            f"{type(estimator).__name__} was fitted on."
        )
    return X[list(names)]


def bounds_in_order(bounds: Any, columns: Columns) -> Any:
    """Return both sides of bounds in the order of the columns; what is no pair as it is."""
    if not isinstance(bounds, tuple | list):
        return bounds
    return tuple(map(columns.in_order, bounds))


def _check_names_only(
    columns: Columns, feature_scale: Any, bounds: Any, mutable: Any, constraints: Any
) -> None:
    """Raise if a threat model names columns by place, where X has them in another order."""
    sides = bounds if isinstance(bounds, tuple | list) else ()
    places = {
        "feature_scale": isinstance(feature_scale, DataScale)
        or (np.ndim(feature_scale) and not columns.are_index_of(feature_scale)),
        "bounds": any(np.ndim(side) and not columns.are_index_of(side) for side in sides),
        "mutable": by_place(mutable),
        "constraints": constraints is not None and constraints.has_places,
    }
    said = [name for name, is_by_place in places.items() if is_by_place]
    if said:
        raise ValueError(
            f"Got {' and '.join(said)} by place and X with other columns, or in another order, "
            "than the estimator was fitted on, but expected names (a Series for values by "
            "column), or X[estimator.feature_names_in_]: places would be ambiguous."
        )


def stuck(
    attack: Attack,
    X: Tensor,
    columns: Columns,
    *,
    integer: Sequence[int] = (),
    unread: Sequence[int] = (),
) -> str:
    """Say, if so, that nothing can change at this radius, or some columns by too little.

    Parameters
    ----------
    attack : Attack
    X : Tensor of shape (n_samples, *features)
    columns : Columns
    integer : sequence of int
        Columns that are whole numbers by their type alone.
    unread : sequence of int
        Columns that do not matter.
    """
    if attack.eps_is_zero or len(X) == 0:
        return ""
    moves, lost = _movable(attack, X)
    if not bool(moves.any()):
        return (
            "at which no feature can change: whole numbers (columns of an integer type) do where "
            "eps·feature_scale is at least 1, immutable ones and those of scale 0 (constant ones "
            'have it under "std" and "range") never. This is as no attack at all.'
        )
    if few := [j for j in integer if lost.flatten()[j]]:
        return (
            f"at which columns of an integer type ({columns.shown(few)}) cannot change, or by "
            "less than two thirds of eps·feature_scale: whole numbers change by whole numbers. "
            "Cast them to float if they can take any value."
        )
    if rounded := [j for j in _rounded(attack, X) if j not in unread]:
        return (
            f"at which columns ({columns.shown(rounded)}) cannot change, or by clearly less "
            f"than eps·feature_scale: beside their numbers it is lost in the rounding of "
            f"{X.dtype}. Cast them to a wider type, or subtract an offset."
        )
    return ""


def _movable(attack: Attack, X: Tensor) -> tuple[Tensor, Tensor]:
    """Return which features can change, and which whole numbers not by 2/3 of their reach."""
    reach = attack.reach_of(X)
    if attack.constraints is None:
        return reach > 0, torch.zeros_like(reach, dtype=torch.bool)
    rules = attack.constraints.resolve(X)
    free = (reach > 0) & ~(rules.increasing & rules.decreasing)
    lost = free & rules.is_whole & (3 * reach.floor() < 2 * reach)
    return free & ~(rules.is_whole & (reach < 1)), lost


def _rounded(attack: Attack, X: Tensor) -> list[int]:
    """Return the columns in which rounding takes a tenth of the reach from most samples."""
    reach = attack.reach_of(X).to(X.dtype)
    unit = torch.finfo(X.dtype).eps
    if bool((unit * X.abs().nan_to_num(nan=0.0).amax(0) <= 0.1 * reach).all()):
        return []
    lost = unit * X.abs() > 0.1 * reach
    mostly = lost.sum(0) > 0.5 * (~X.isnan()).sum(0)
    return ((reach > 0) & mostly).flatten().nonzero().flatten().tolist()
