"""What makes a sample valid: columns that are fixed, whole, one-directional, or one-hot."""

import copy
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from skjacobian._columns import Columns, by_place
from skjacobian._table import Table
from skjacobian._validation import check_option, reject
from skjacobian.threat_model import inward
from skjacobian.validity import Rules

COLUMNS = ("immutable", "integer", "increasing", "decreasing")
LEARNED_SCALES = ("std", "range")


class FeatureConstraints(BaseEstimator):
    """What an adversary cannot do to the columns of a table.

    Columns are said as in scikit-learn: one or several, all by the names of a DataFrame or all
    by index, or a boolean mask. Whatever an attack tries and returns obeys all constraints,
    exactly. Missing values (NaN) are left alone, with or without constraints.

    Parameters
    ----------
    immutable : str, int, or array-like of str, int or bool, optional
        Columns that cannot change.
    integer : str, int, or array-like of str, int or bool, optional
        Columns of whole numbers. `RobustScorer` and the like take the columns of a DataFrame
        that have an integer type for such anyway.
    increasing, decreasing : str, int, or array-like of str, int or bool, optional
        Columns that can only grow, or only fall: age, years left; no column is in both.
    one_hot : sequence of array-like of str, int or bool, optional
        Groups of columns of which exactly one is 1 and the others are 0; no column is in two.
        Another category is a perturbation of two columns by 1.
    scale : "std", "range", or mapping of column to number, "std" or "range", optional
        Unit of columns, ‖delta / scale‖ <= eps; 1 for those not named. "std" and "range" are
        those of the data that `fit` sees.
    bounds : mapping of column to (low, high), or "train", optional
        Range of valid values; columns not named are unbounded. "train" takes the range that
        `fit` sees, and a sample that lies outside cannot go farther out.

    Attributes
    ----------
    n_features_in_ : int
        Number of columns that `fit` saw.
    feature_names_in_ : array of shape (n_features_in_,)
        Their names, where it saw a DataFrame.
    low_, high_ : array of shape (n_features_in_,)
        Range of each column; NaN for those that hold no numbers.
    scale_ : array of shape (n_features_in_,)
        Scale of each column, where `scale` says "std" or "range".

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.linear_model import LogisticRegression
    >>> from skjacobian import FeatureConstraints, RobustScorer
    >>> X, y = np.array([[20.0, 1.0], [30.0, 3.0], [40.0, 2.0], [50.0, 5.0]]), [0, 0, 1, 1]
    >>> model = LogisticRegression().fit(X, y)
    >>> RobustScorer(norm="linf", eps=8)(model, X, y)
    0.5
    >>> constraints = FeatureConstraints(increasing=[0], immutable=[1])
    >>> RobustScorer(norm="linf", eps=8, constraints=constraints)(model, X, y)
    0.75
    """

    def __init__(
        self,
        *,
        immutable: Any = None,
        integer: Any = None,
        increasing: Any = None,
        decreasing: Any = None,
        one_hot: Any = None,
        scale: Any = None,
        bounds: Any = None,
    ) -> None:
        self.immutable = immutable
        self.integer = integer
        self.increasing = increasing
        self.decreasing = decreasing
        self.one_hot = one_hot
        self.scale = scale
        self.bounds = bounds

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn the range and the scale of the columns; missing values are left out.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_features)
            Columns that hold no numbers are skipped; those of bool hold 0 and 1.
        y : ignored

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For a column that `X` does not have, for constraints that contradict each other, and
            for a scale or range that makes no sense.
        """
        table = Table(X)
        # A new one: an earlier fit may have learned other columns.
        unfitted = type(self)(**self.get_params(deep=False))
        unfitted.by_index(Columns(tuple(table.tensor.shape[1:]), table.columns))
        columns = _present_numbers(table)
        self.n_features_in_ = len(columns)
        self.__dict__.pop("feature_names_in_", None)
        if table.columns is not None:
            self.feature_names_in_ = np.array(table.columns, dtype=object)
        self.low_ = np.array([column.min() if len(column) else np.nan for column in columns])
        self.high_ = np.array([column.max() if len(column) else np.nan for column in columns])
        self._range = np.nan_to_num(self.high_ - self.low_)
        std = np.array([column.std() if len(column) else 0.0 for column in columns])
        # Of equal numbers the mean may be another by rounding.
        self._std = np.where(self._range > 0, std, 0.0)
        return self

    @property
    def scale_(self) -> np.ndarray:
        """Scale of each column, as `scale` says now."""
        if not (self._scale_is_learned and hasattr(self, "_std")):
            raise AttributeError("scale_ is there after fit, where scale says 'std' or 'range'.")
        return self._scales(len(self._std), getattr(self, "feature_names_in_", None))

    def _scales(self, n_features: int, names: Sequence[Any] | None = None) -> np.ndarray:
        """Return the scale of each column."""
        if isinstance(self.scale, str):
            said = dict.fromkeys(range(n_features), self.scale)
        else:
            columns = Columns((n_features,), None if names is None else list(names))
            said = columns.by_index("scale", self.scale)
        scales = np.ones(n_features)
        for j, scale in said.items():  # a number, or what `fit` has learned under this name
            scales[j] = getattr(self, f"_{scale}")[j] if isinstance(scale, str) else scale
        return scales

    @property
    def _scale_is_learned(self) -> bool:
        scales = self.scale.values() if isinstance(self.scale, Mapping) else [self.scale]
        return any(isinstance(scale, str) for scale in scales)

    def _check_values(self) -> None:
        """Raise for scales and bounds that make no sense."""
        if isinstance(self.scale, str):
            check_option("scale", self.scale, LEARNED_SCALES)
        elif self.scale is not None:
            expected = "a mapping of columns to positive finite numbers, 'std', 'range' or None"
            is_mapping = isinstance(self.scale, Mapping)
            if not is_mapping or not all(map(_is_scale, self.scale.values())):
                reject("scale", self.scale, expected)
        if isinstance(self.bounds, str):
            check_option("bounds", self.bounds, ["train"])
        elif self.bounds is not None:
            expected = "a mapping of columns to (low, high) with low <= high, 'train' or None"
            is_mapping = isinstance(self.bounds, Mapping)
            if not is_mapping or not all(map(_is_range, self.bounds.values())):
                reject("bounds", self.bounds, expected)

    def _check_consistent(self, columns: Columns) -> None:
        """Raise for columns that must both grow and fall, and for groups that share some."""
        grow, fall = (columns.indices(name, getattr(self, name)) for name in COLUMNS[2:])
        if both := sorted({*grow}.intersection(fall)):
            raise ValueError(
                f"Got increasing and decreasing with the same columns ({columns.shown(both)}), but "
                "expected each in one of them; immutable is for what cannot change."
            )
        groups = [columns.indices("one_hot", group) for group in self._groups]
        if not all(groups):
            reject("one_hot", self.one_hot, "columns in each group")
        members = [j for group in groups for j in group]
        if shared := sorted({j for j in members if members.count(j) > 1}):
            raise ValueError(
                f"Got one_hot with columns ({columns.shown(shared)}) in several groups, but "
                "expected each in one."
            )

    def __sklearn_clone__(self) -> "FeatureConstraints":
        # What was learned is a fact about the data, as are the constraints: it is part of
        # them, where a search copies the scorer that holds them.
        return copy.copy(self)

    def by_index(self, columns: Columns, **more: Sequence[int]) -> "FeatureConstraints":
        """Return the same constraints with indices in the place of column names.

        Parameters
        ----------
        columns : Columns
            All columns of X, in order.
        **more : sequence of int
            Further columns that are `immutable`, `integer`, `increasing` or `decreasing`.
        """
        self._check_values()
        self._check_consistent(columns)
        indexed = copy.copy(self)
        for name in COLUMNS:
            said = columns.indices(name, getattr(self, name))
            setattr(indexed, name, sorted({*said, *more.get(name, ())}))
        indexed.one_hot = [columns.indices("one_hot", group) for group in self._groups]
        for name in ("scale", "bounds"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                setattr(indexed, name, columns.by_index(name, value))
        return indexed._in_the_order_of(columns.names or ())

    @property
    def _groups(self) -> list[Any]:
        """The one-hot groups, each as columns are said."""
        groups = () if self.one_hot is None else self.one_hot
        if not (_is_group(groups) and all(map(_is_group, groups))):
            reject("one_hot", self.one_hot, "groups of columns, as in [['red', 'green', 'blue']]")
        return list(groups)

    def narrowed(self, low: np.ndarray, high: np.ndarray) -> "FeatureConstraints":
        """Return constraints, said by index and with bounds, whose bounds lie in a range too."""
        narrowed = copy.copy(self)
        own = self._sides(len(low))
        assert own is not None
        low, high = np.maximum(own[0], low), np.minimum(own[1], high)
        if isinstance(self.bounds, str):
            narrowed.low_, narrowed.high_ = low, high
        else:
            narrowed.bounds = dict(enumerate(zip(low, high, strict=True)))
        return narrowed

    @property
    def learns(self) -> bool:
        """Whether scale or bounds are still to be learned from data."""
        said = self._scale_is_learned or isinstance(self.bounds, str)
        return said and not hasattr(self, "low_")

    @property
    def has_places(self) -> bool:
        """Whether columns are said by index or by mask, or were learned without names."""
        said = [getattr(self, name) for name in COLUMNS] + self._groups
        said += [value for value in (self.scale, self.bounds) if isinstance(value, Mapping)]
        learned = hasattr(self, "n_features_in_") and not hasattr(self, "feature_names_in_")
        return learned or any(map(by_place, said))

    def _in_the_order_of(self, names: Sequence[Any]) -> "FeatureConstraints":
        """Put what `fit` learned by name in the order of the columns, and forget their names."""
        seen = list(self.__dict__.pop("feature_names_in_", names))
        if any(isinstance(name, str) for name in names) and seen != list(names):
            if sorted(map(str, seen)) != sorted(map(str, names)):
                raise ValueError(
                    f"Got X with the columns {list(names)}, but expected those that "
                    f"FeatureConstraints was fitted on: {seen}."
                )
            order = [seen.index(name) for name in names]
            for learned in ("low_", "high_", "_std", "_range"):
                if hasattr(self, learned):
                    setattr(self, learned, getattr(self, learned)[order])
        return self

    def resolve(self, X: Tensor) -> "Rules":
        """Return the constraints as tensors, for samples `X` of shape (n_samples, *features).

        Raises
        ------
        ValueError
            For a column that is not there and a value that makes no sense.
        """
        n_features = X.shape[1:].numel()
        if getattr(self, "n_features_in_", n_features) != n_features:
            raise ValueError(
                f"Got X with {n_features} features, but expected {self.n_features_in_}, as "
                "FeatureConstraints was fitted on."
            )
        self._check_values()
        columns = Columns(X.shape[1:])
        self._check_consistent(columns)
        masks = {name: columns.mask(name, getattr(self, name)) for name in COLUMNS}
        groups = [columns.indices("one_hot", group) for group in self._groups]
        return Rules(
            **{name: torch.from_numpy(mask).to(X.device) for name, mask in masks.items()},
            groups=tuple(torch.tensor(group, device=X.device) for group in groups),
            scale=self._scale_of(X),
            bounds=self._bounds_of(X),
            extends=isinstance(self.bounds, str),
        )

    def _scale_of(self, X: Tensor) -> Tensor | None:
        if self.scale is None:
            return None
        if self._scale_is_learned:
            check_is_fitted(self, "scale_")
        scales = self._scales(X.shape[1:].numel())
        return torch.tensor(scales).to(X).reshape(X.shape[1:])

    def _bounds_of(self, X: Tensor) -> tuple[Tensor, Tensor] | None:
        bounds = self._sides(X.shape[1:].numel())
        if bounds is None:
            return None
        low, high = (torch.tensor(side).reshape(X.shape[1:]) for side in bounds)
        return inward(low, high, X)

    def _sides(self, n_features: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the lower and the upper bounds, infinite where there are none."""
        if self.bounds is None:
            return None
        if isinstance(self.bounds, str):
            check_is_fitted(self, "low_")
            unknown = np.isnan(self.low_)  # what is infinite already stays so
            return np.where(unknown, -np.inf, self.low_), np.where(unknown, np.inf, self.high_)
        low, high = np.full(n_features, -np.inf), np.full(n_features, np.inf)
        for j, pair in Columns((n_features,)).by_index("bounds", self.bounds).items():
            low[j], high[j] = pair
        return low, high


def check_constraints(constraints: Any, feature_scale: Any, bounds: Any) -> None:
    """Raise if `constraints` are none, or say what another parameter says, too."""
    if constraints is None:
        return
    if not isinstance(constraints, FeatureConstraints):
        reject("constraints", constraints, "None or FeatureConstraints")
    for name, other, value in (
        ("scale", "feature_scale", feature_scale),
        ("bounds", "bounds", bounds),
    ):
        if getattr(constraints, name) is not None and value is not None:
            raise ValueError(
                f"Got {other}={value!r} and FeatureConstraints with {name}, but expected one of "
                "both."
            )


def _present_numbers(table: Table) -> list[np.ndarray]:
    """Return the values of each column, 0 and 1 of bool, none of those that hold no numbers."""
    columns = table.tensor.double().flatten(1).numpy().T
    without_numbers = {*table.categories}.difference(table.switches)
    return [
        column[:0] if j in without_numbers else column[~np.isnan(column)]
        for j, column in enumerate(columns)
    ]


def _is_scale(scale: Any) -> bool:
    """Tell whether something is a positive finite number, or one to be learned."""
    if isinstance(scale, str):
        return scale in LEARNED_SCALES
    return isinstance(scale, Real) and 0 < float(scale) < math.inf


def _is_range(pair: Any) -> bool:
    """Tell whether something is (low, high), two numbers in this order."""
    try:
        low, high = map(float, pair)
    except (TypeError, ValueError):
        return False
    return low <= high


def _is_group(columns: Any) -> bool:
    return hasattr(columns, "__iter__") and not isinstance(columns, str)
