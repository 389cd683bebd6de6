"""Tables as tensors: numbers as they are, anything else as codes, and back."""

from collections import defaultdict
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_array


class Table:
    """Samples as a tensor with one feature for each column, and the way back.

    Columns of a DataFrame that hold no numbers become codes, which an adversary cannot
    change. What comes back has the columns and the types of what was given.

    Parameters
    ----------
    X : DataFrame or array-like of shape (n_samples, *features)
        Missing values are NaN. What comes back for a DataFrame is one of pandas.

    Attributes
    ----------
    tensor : Tensor of shape (n_samples, *features)
        float32 if all floating numbers are, and it can hold the whole ones; else float64.
    columns : list or None
        The names of the columns of a DataFrame.
    integer : list of int
        Columns of an integer type.
    categories : dict of int to Index
        What the codes of a column stand for.

    Examples
    --------
    >>> import pandas as pd
    >>> table = Table(pd.DataFrame({"age": [30, 50], "sex": ["f", "m"]}))
    >>> table.tensor.tolist(), table.integer
    ([[30.0, 0.0], [50.0, 1.0]], [0])
    >>> table.decode(table.tensor.numpy() + [2.0, 0.0])
       age sex
    0   32   f
    1   52   m
    """

    def __init__(self, X: Any) -> None:
        self.X = X = as_pandas(X)
        self.columns = list(X.columns) if hasattr(X, "iloc") else None
        self.categories: dict[int, Any] = {}
        self.integer: list[int] = []
        values = check_array(
            _numbers(X) if self.columns is None else self._encoded(),
            dtype=[np.float64, np.float32],
            allow_nd=True,
            ensure_all_finite="allow-nan",
            input_name="X",
        )
        self.tensor = torch.from_numpy(np.array(values))

    def _encoded(self) -> np.ndarray:
        """Return the columns as numbers, and remember their types."""
        X = self.X
        self._dtypes = list(X.dtypes)
        self._plain = _columns_by_type(self._dtypes)
        self._others = sorted({*range(len(self._dtypes))}.difference(*self._plain.values()))
        self.integer = [j for j, dtype in enumerate(self._dtypes) if dtype.kind in "iu"]
        values, dtypes = np.empty(X.shape), [*self._plain]
        for columns in self._plain.values():
            values[:, columns] = X.iloc[:, columns].to_numpy()
        for j in self._others:
            column = _without_objects(X.iloc[:, j])
            if column.dtype.kind in "fiu":
                values[:, j] = column.to_numpy(dtype=np.float64, na_value=np.nan)
                dtypes.append(column.dtype)
            else:
                values[:, j], self.categories[j] = _coded(column)
                dtypes.append(np.dtype(np.float32))
        types = {str(dtype).lower() for dtype in dtypes if dtype.kind == "f"}
        whole = np.nan_to_num(values[:, self.integer])
        is_exact = bool((np.abs(whole) < 2**24).all())  # in float32
        return values.astype(np.float32) if types == {"float32"} and is_exact else values

    @property
    def switches(self) -> list[int]:
        """Columns of bool, whose codes are the numbers 0 and 1."""
        types = {j: getattr(known, "dtype", None) for j, known in self.categories.items()}
        return [j for j, dtype in types.items() if getattr(dtype, "kind", None) == "b"]

    def decode(self, values: np.ndarray, index: Any = None) -> Any:
        """Return numbers of shape (n_samples, *features) in the container that was given.

        Parameters
        ----------
        values : array
            Codes where there were categories, and whole numbers where there were integers.
        index : pandas Index, optional
            That of the rows.
        """
        if self.columns is None:
            return values
        import pandas as pd

        blocks, others = self._blocks(values)
        # Always a copy, as a classifier may write into what it is given.
        parts = [
            pd.DataFrame(values.T[columns].astype(dtype, copy=False).T, copy=False)
            for dtype, columns in blocks.items()
        ]
        if len(others):
            parts.append(pd.DataFrame({j: self._decoded(j, values[:, j]) for j in others}))
        frame = parts[0]
        if len(parts) > 1:
            places = np.argsort(np.concatenate([*blocks.values(), others]))
            frame = pd.concat(parts, axis=1, ignore_index=True).take(places, axis=1)
        frame = type(self.X)(frame).set_axis(self.X.columns, axis=1)
        return frame if index is None else frame.set_axis(index, axis=0)

    def _blocks(self, values: np.ndarray) -> tuple[dict[np.dtype, np.ndarray], np.ndarray]:
        """Return the columns of each type that can be made at once, and the other ones."""
        found: dict[np.dtype, list[np.ndarray]] = defaultdict(list)
        others = [np.array(self._others, dtype=int)]
        for dtype, columns in self._plain.items():
            held = _holds(dtype, values, columns)
            wider = found[values.dtype] if dtype.kind == "f" else others
            found[dtype].append(columns[held])
            wider.append(columns[~held])
        joined = {dtype: np.sort(np.concatenate(columns)) for dtype, columns in found.items()}
        blocks = {dtype: columns for dtype, columns in joined.items() if len(columns)}
        return blocks, np.sort(np.concatenate(others))

    def _decoded(self, j: int, values: np.ndarray) -> Any:
        """Return the numbers of one column as a Series."""
        import pandas as pd

        if j in self.categories:
            return pd.Series(self.categories[j].take(values.astype(int)))
        return pd.Series(values, dtype=_type_of(self._dtypes[j], values))

    def rows(self, chosen: np.ndarray, values: np.ndarray) -> Any:
        """Return numbers in the place of those of chosen rows, whose index they get."""
        return self.decode(values, None if self.columns is None else self.X.index[chosen])


def as_pandas(X: Any) -> Any:
    """Return a DataFrame of another library, such as polars, as one of pandas; else X itself."""
    return X.to_pandas() if hasattr(X, "to_pandas") and not hasattr(X, "iloc") else X


def _numbers(X: Any) -> Any:
    """Return an array of objects as floats, as scikit-learn takes it; any other as it is."""
    if isinstance(X, list | tuple) and any(isinstance(row, str) for row in X):
        X = np.array(X, dtype=object)
    if not isinstance(X, np.ndarray) or X.dtype.kind not in "OUS":
        return X
    for value in X.flat:
        if not _is_number(value):
            raise ValueError(
                f"Got X with {value!r}, which is no number, but expected numbers, or a DataFrame "
                "for columns of anything else."
            )
    return X.astype(np.float64)


def _is_number(value: Any) -> bool:
    """Tell whether an object is a number or missing, and not one that is written out."""
    return value is None or (
        isinstance(value, Real | Decimal) and not isinstance(value, bool | np.bool_)
    )


def _without_objects(column: Any) -> Any:
    """Return a column of objects that are all numbers as floats, as scikit-learn takes it."""
    if column.dtype != object or not all(map(_is_number, column)):
        return column
    return column.astype(np.float64)


def _columns_by_type(dtypes: list[Any]) -> dict[np.dtype, np.ndarray]:
    """Return the columns of each of numpy's types of numbers, which can be made at once."""
    found = defaultdict(list)
    for j, dtype in enumerate(dtypes):
        if isinstance(dtype, np.dtype) and dtype.kind in "fiu":
            found[dtype].append(j)
    return {dtype: np.array(columns) for dtype, columns in found.items()}


def _coded(column: Any) -> tuple[np.ndarray, Any]:
    """Return codes for the values of a column, and what they stand for."""
    is_truth = column.dtype.kind == "b"
    try:
        codes, known = column.factorize(sort=is_truth, use_na_sentinel=False)
    except TypeError:  # of lists and the like, which have no hash: each is a value of its own
        return np.arange(len(column)), column.array
    if is_truth and len(known) == 1 and not known.hasnans:  # its code is its value
        return codes + int(known[0]), type(known)([False, True], dtype=known.dtype)
    if column.dtype == object:
        return _telling_none(column, codes, known)
    return codes, known


def _telling_none(column: Any, codes: np.ndarray, known: Any) -> tuple[np.ndarray, Any]:
    """Give None a code of its own: pandas knows one missing value, and encoders two."""
    is_none = np.array([value is None for value in column])
    if not is_none.any():
        return codes, known
    return np.where(is_none, len(known), codes), type(known)([*known, None], dtype=object)


def _holds(dtype: np.dtype, values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Tell of which columns a type can hold the numbers as they are."""
    if np.can_cast(values.dtype, dtype):
        return np.ones(len(columns), dtype=bool)
    wanted = values[:, columns]
    with np.errstate(invalid="ignore"):  # NaN is no whole number
        cast = wanted.astype(dtype)
    return np.asarray(((cast == wanted) | np.isnan(cast)).all(axis=0))


def _type_of(dtype: Any, values: np.ndarray) -> Any:
    """Return the type of a column, or a wider one for whole numbers that it cannot hold."""
    if dtype.kind in "iu":
        limits = np.iinfo(getattr(dtype, "numpy_dtype", dtype))
        known = values[~np.isnan(values)]
        kept = limits.min <= known.min(initial=0) and known.max(initial=0) <= limits.max
        return dtype if kept else _widest_integer(dtype)
    return dtype


def _widest_integer(dtype: Any) -> Any:
    """Return the type of 64 bits with a sign that numpy, pandas or Arrow has for a narrower one."""
    if isinstance(dtype, np.dtype):
        return np.dtype(np.int64)
    return "int64[pyarrow]" if hasattr(dtype, "pyarrow_dtype") else "Int64"
