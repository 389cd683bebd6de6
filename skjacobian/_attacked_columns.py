"""What an adversary may change of the columns of X, by their types and as users say it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from skjacobian._columns import Columns, by_place
from skjacobian._table import Table
from skjacobian.attacks import Attack
from skjacobian.constraints import FeatureConstraints, check_constraints
from skjacobian.threat_model import (
    DataScale,
    fit_feature_scale,
    resolve_bounds,
    resolve_mutable,
)


@dataclass(frozen=True)
class AttackedColumns:
    """The columns of X, of which an adversary may change some, in training and in scoring.

    Attributes
    ----------
    columns : Columns
    categories : list of int
        Columns that hold no numbers or are encoded, so that an adversary cannot change them.
    switches : list of int
        Those of bool that no encoder reads, as of `pandas.get_dummies`: their codes are the
        numbers 0 and 1, so that an adversary may choose among them where a one-hot group names
        them.
    integer : list of int
        Columns of an integer type.
    unread : list of int
        Columns that the classifier drops: what cannot change there is no matter.
    is_reordered : bool
        Whether they stand in another order than the user gave them in.
    """

    columns: Columns
    categories: list[int]
    switches: list[int]
    integer: list[int]
    unread: list[int]
    is_reordered: bool

    @classmethod
    def of(
        cls,
        table: Table,
        encoded: Sequence[int] = (),
        unread: Sequence[int] = (),
        is_reordered: bool = False,
    ) -> Self:
        """Return what the types of the columns of a table say of them.

        Parameters
        ----------
        table : Table
        encoded : sequence of int
            Columns that an encoder reads.
        unread, is_reordered
            As the attributes.
        """
        return cls(
            columns=Columns(tuple(table.tensor.shape[1:]), table.columns),
            categories=sorted({*table.categories, *encoded}),
            switches=[j for j in table.switches if j not in encoded],
            integer=table.integer,
            unread=list(unread),
            is_reordered=is_reordered,
        )

    def threat_model(
        self,
        X: Tensor,
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
            self._check_names_only(feature_scale, bounds, mutable, constraints)
        bounds = self._bounds(bounds, X, constraints)
        feature_scale = self.columns.in_order("feature_scale", feature_scale)
        mutable = resolve_mutable(mutable, X, self.columns.names)
        self._check_no_categories(mutable, constraints)
        return {
            "norm": norm,
            "eps": eps,
            "feature_scale": fit_feature_scale(feature_scale, X),
            "bounds": bounds,
            "mutable": mutable,
            "constraints": self._constraints(constraints),
        }

    def _check_names_only(
        self, feature_scale: Any, bounds: Any, mutable: Any, constraints: Any
    ) -> None:
        """Raise if a threat model says columns by place, where X has them in another order."""
        sides = bounds if isinstance(bounds, tuple | list) else ()
        labels = self.columns.are_index_of
        places = {
            "feature_scale": isinstance(feature_scale, DataScale)
            or (np.ndim(feature_scale) and not labels(feature_scale)),
            "bounds": any(np.ndim(side) and not labels(side) for side in sides),
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

    def _bounds(
        self, bounds: Any, X: Tensor, constraints: FeatureConstraints | None
    ) -> tuple[Any, Any] | None:
        """Return bounds by index, none of columns held fixed, whose codes are no values."""
        if isinstance(bounds, tuple | list):
            bounds = tuple(self.columns.in_order("bounds", side) for side in bounds)
        sides, held = resolve_bounds(bounds, X), self._held(constraints)
        if sides is None or not held:
            return bounds
        low, high = (side.expand(X.shape[1:]).double().cpu().numpy().copy() for side in sides)
        low[held], high[held] = -np.inf, np.inf
        return low, high

    def _check_no_categories(
        self, mutable: Tensor | None, constraints: FeatureConstraints | None
    ) -> None:
        if mutable is None:
            return
        if chosen := [j for j in self._held(constraints) if mutable.flatten()[j]]:
            raise ValueError(
                f"Got mutable with the columns {self.columns.labels(chosen)}, but expected "
                "columns of numbers that no encoder reads: others cannot be attacked."
            )

    def _constraints(self, constraints: FeatureConstraints | None) -> FeatureConstraints | None:
        """Return the constraints by index, with those that the types of the columns make."""
        if constraints is None and not self.categories and not self.integer:
            return None
        return (constraints or FeatureConstraints()).by_index(
            self.columns, immutable=self._held(constraints), integer=self.integer
        )

    def _said(self, name: str, constraints: FeatureConstraints | None) -> list[Any]:
        """Return what the constraints themselves say by one parameter, by index."""
        return [] if constraints is None else getattr(constraints.by_index(self.columns), name)

    def _held(self, constraints: FeatureConstraints | None) -> list[int]:
        """Return the categories, but not the columns of bool that one-hot groups name."""
        grouped = {j for group in self._said("one_hot", constraints) for j in group}
        free = grouped.intersection(self.switches)
        return [j for j in self.categories if j not in free]

    def warnings(
        self, attack: Attack, X: Tensor, mutable: Any, constraints: FeatureConstraints | None
    ) -> Iterator[str]:
        """Yield what to warn of before an attack: what it cannot do although nobody said so."""
        held = self.unsaid_categories(mutable, constraints)
        if held and not attack.eps_is_zero:
            yield (
                f"Got X whose columns ({held}) hold categories and are held fixed: who can change "
                "them may do better. FeatureConstraints(immutable=[...]) rules that out; "
                "one_hot=[[...]] makes columns of bool the categories of a group."
            )
        if stuck := self.stuck(attack, X, constraints):
            yield f"Got eps={attack.eps!r}, {stuck}"

    def unsaid_categories(self, mutable: Any, constraints: FeatureConstraints | None) -> str:
        """Return the names of the columns held fixed although nobody said that they are."""
        if mutable is not None:
            return ""
        said = {*self._said("immutable", constraints), *self.unread}
        return self.columns.shown([j for j in self._held(constraints) if j not in said])

    def stuck(self, attack: Attack, X: Tensor, constraints: FeatureConstraints | None) -> str:
        """Say, if so, that nothing can change at this radius, or some columns by too little."""
        if attack.eps_is_zero or len(X) == 0:
            return ""
        moves, lost = _movable(attack, X)
        if not bool(moves.any()):
            return (
                "at which no feature can change: whole numbers (columns of an integer type) do "
                "where eps·feature_scale is at least 1, immutable ones and those of scale 0 "
                '(constant ones have it under "std" and "range") never. This is as no attack at '
                "all."
            )
        said = {*self._said("integer", constraints), *self.unread}
        if few := [j for j in self.integer if lost.flatten()[j] and j not in said]:
            return (
                f"at which columns of an integer type ({self.columns.shown(few)}) cannot change, "
                "or by less than two thirds of eps·feature_scale: whole numbers change by whole "
                "numbers. Cast them to float if they can take any value."
            )
        if rounded := [j for j in _rounded(attack, X) if j not in self.unread]:
            return (
                f"at which columns ({self.columns.shown(rounded)}) cannot change, or by clearly "
                "less than eps·feature_scale: beside their numbers it is lost in the rounding of "
                f"{X.dtype}. Cast them to a wider type, or subtract an offset."
            )
        return ""


def _movable(attack: Attack, X: Tensor) -> tuple[Tensor, Tensor]:
    """Return which features can change, and which whole numbers not by 2/3 of their reach."""
    reach = attack.reach_of(X)
    if attack.constraints is None:
        return reach > 0, torch.zeros_like(reach, dtype=torch.bool)
    rules = attack.constraints.resolve(X)
    free = reach > 0
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
