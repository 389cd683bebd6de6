"""Columns of X as users say them: by name, by index or by a mask; and values of columns by name."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from torch import Tensor

from skjacobian._validation import did_you_mean, reject

_NAMES_NEED = (
    "names need a DataFrame, which a step of a pipeline gets from the one before it by "
    "set_output(transform='pandas')"
)
_KINDS = {"names": str, "mask": bool | np.bool_, "indices": int | np.integer}


@dataclass(frozen=True)
class Columns:
    """The columns of X, the features of its samples where it is no table.

    Attributes
    ----------
    shape : tuple of int
        That of a sample. Indices are those of the flattened one.
    names : list, optional
        Of the columns of a DataFrame. Those that are no strings name nothing, as in
        scikit-learn: numbers are indices.

    Examples
    --------
    >>> columns = Columns((3,), ["age", "sex", "income"])
    >>> columns.indices("immutable", "sex")
    [1]
    >>> columns.indices("immutable", [-1, 0])
    [2, 0]
    >>> columns.indices("immutable", [True, False, True])
    [0, 2]
    >>> import pandas as pd
    >>> columns.indices("immutable", pd.Series({"income": True, "age": False, "sex": False}))
    [2]
    """

    shape: tuple[int, ...]
    names: list[Any] | None = None

    def __len__(self) -> int:
        return math.prod(self.shape)

    def indices(self, parameter: str, said: Any) -> list[int]:
        """Return the indices of columns, in the order in which a parameter says them, or raise.

        Parameters
        ----------
        parameter : str
            Its name, for the error.
        said : str, int, or array-like of str, int or bool; None for no columns
            A mask has the shape of a sample, or is flat; a Series is read by its labels.
        """
        values = _array(said)
        kind = _kind(values)
        if kind == "mask":
            values = _array(self.in_order(parameter, said))
        if values.size == 0:
            return []
        if kind == "mask" and values.shape in (self.shape, (len(self),)):
            return np.flatnonzero(values).tolist()
        if kind == "names" and not self._places:
            but = (
                _NAMES_NEED
                if self.names is None
                else f"the names of X are no strings, but like {self.names[0]!r}"
            )
            self._reject(parameter, said, f"; {but}")
        if kind not in ("names", "indices") or values.ndim > 1:
            self._reject(parameter, said, ", all of one kind")
        found = [self._index(parameter, said, value) for value in values.tolist()]
        if len(set(found)) < len(found):  # zeros and ones are no mask
            self._reject(parameter, said, ", each once")
        return found

    def mask(self, parameter: str, said: Any) -> np.ndarray:
        """Return a mask of columns in the shape of a sample."""
        mask = np.zeros(len(self), dtype=bool)
        mask[self.indices(parameter, said)] = True
        return mask.reshape(self.shape)

    def by_index(self, parameter: str, values: Mapping[Any, Any]) -> dict[int, Any]:
        """Return a mapping of columns with their indices as its keys."""
        return dict(zip(self.indices(parameter, values), values.values(), strict=True))

    def are_index_of(self, values: Any) -> bool:
        """Tell whether values are a pandas Series with one for the name of each column."""
        return (
            self.names is not None
            and hasattr(values, "loc")
            and set(self.names) <= set(values.index)
        )

    def in_order(self, parameter: str, values: Any) -> Any:
        """Return a Series of values by name as an array, in this order; others as they are.

        A Series whose index holds no names is read by place, as an array.

        Examples
        --------
        >>> import pandas as pd
        >>> by_name = pd.Series({"age": 3.0, "sex": 1.0})
        >>> Columns((2,), ["sex", "age"]).in_order("feature_scale", by_name)
        array([1., 3.])
        """
        if self._places and hasattr(values, "loc") and not by_place(values.index):
            self._check_all_have_values(parameter, values.index)
        return values.loc[self.names].to_numpy() if self.are_index_of(values) else values

    def labels(self, indices: Sequence[int]) -> list[Any]:
        """Return the names of columns, or their indices where they have none."""
        return list(indices) if self.names is None else [self.names[j] for j in indices]

    def shown(self, indices: Sequence[int]) -> str:
        """Return the names of columns for a message."""
        return shown(self.labels(indices))

    def _check_all_have_values(self, parameter: str, index: Any) -> None:
        missing = [name for name in self._places if name not in index]
        if missing:
            unknown = [name for name in index if name not in self._places]
            some = ""
            if parameter in ("feature_scale", "bounds"):
                some = " FeatureConstraints takes the scale and range of some columns."
            raise ValueError(
                f"Got {parameter} without values for {missing}, but expected one for each column "
                f"of X{did_you_mean(missing[0], unknown)}.{some}"
            )

    @cached_property
    def _places(self) -> dict[str, int]:
        """Where the names stand; the first of those that are equal."""
        named = reversed([*enumerate(self.names or ())])
        return {name: j for j, name in named if isinstance(name, str)}

    def _index(self, parameter: str, said: Any, value: Any) -> int:
        if value in self._places:
            return self._places[value]
        if not isinstance(value, str) and -len(self) <= value < len(self):
            return int(value) % len(self)
        self._reject(parameter, said, f"; {value!r} is none{did_you_mean(value, self._places)}")

    def _reject(self, parameter: str, said: Any, but: str) -> NoReturn:
        names = "names, " if self._places else ""
        reject(
            parameter,
            said,
            f"columns of X: {names}indices from {-len(self)} to {len(self) - 1} or a boolean mask "
            f"of shape {tuple(self.shape)}{but}",
        )


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


def shown(names: Sequence[Any]) -> str:
    """Return names, not too many of them, for a message."""
    return ", ".join(map(str, names[:10])) + (", …" if names[10:] else "")


def by_place(said: Any) -> bool:
    """Tell whether columns are said by index or by a mask, which depend on their order.

    Examples
    --------
    >>> by_place(["age", "sex"]), by_place([0, 1]), by_place(None)
    (False, True, False)
    """
    values = _array(said)
    if _kind(values) == "mask" and hasattr(said, "loc"):
        return by_place(said.index)
    return values.size > 0 and _kind(values) != "names"


def _array(said: Any) -> np.ndarray:
    """Return what was said of columns as an array, whose types are those that were given."""
    if said is None:
        said = []
    if isinstance(said, Tensor):
        said = said.cpu()
    if hasattr(said, "__array__"):
        return np.atleast_1d(np.asarray(said))
    if hasattr(said, "__iter__") and not isinstance(said, str):
        said = list(said)
    return np.atleast_1d(np.array(said, dtype=object))


def _kind(values: np.ndarray) -> str | None:
    """Return "names", "mask" or "indices"; None for anything else, and for a mixture."""
    kinds = {
        next((kind for kind, types in _KINDS.items() if issubclass(found, types)), None)
        for found in set(map(type, values.ravel().tolist()))
    }
    return kinds.pop() if len(kinds) == 1 else None
