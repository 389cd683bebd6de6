"""Tables as tensors: numbers as they are, anything else as codes, and back."""

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

    def _encoded(self) -> Any:
        """Return the columns as numbers; a DataFrame of nothing else as it is."""
        series = [_without_objects(self.X.iloc[:, j]) for j in range(self.X.shape[1])]
        kinds = [getattr(column.dtype, "kind", "O") for column in series]
        self.integer = [j for j, kind in enumerate(kinds) if kind in "iu"]
        for j, kind in enumerate(kinds):
            if kind not in "fiu":
                codes, known = series[j].factorize(sort=kind == "b", use_na_sentinel=False)
                if kind == "b" and len(known) == 1:  # its code is its value
                    codes = codes + int(known[0])
                    known = type(known)([False, True])
                elif series[j].dtype == object:
                    codes, known = _telling_none(series[j], codes, known)
                self.categories[j] = known
                series[j] = type(series[j])(codes, dtype=np.float32)
        if not series:
            return self.X
        types = {str(column.dtype).lower() for column in series if column.dtype.kind == "f"}
        whole = [series[j] for j in self.integer]
        present = [c for column in whole if len(c := column.dropna())]
        is_exact = all(c.min() > -(2**24) and c.max() < 2**24 for c in present)  # in float32
        dtype = np.float32 if types == {"float32"} and is_exact else np.float64
        return np.stack([c.to_numpy(dtype=dtype, na_value=np.nan) for c in series], axis=1)

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
        decoded = {}
        for j, column in enumerate(values.T):
            series = self.X.iloc[:, j]
            if j in self.categories:
                decoded[j] = type(series)(self.categories[j].take(column.astype(int)))
            else:
                decoded[j] = type(series)(column, dtype=_type_of(series, column))
        frame = type(self.X)(decoded).set_axis(self.columns, axis=1)
        return frame if index is None else frame.set_axis(index, axis=0)

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
    return value is None or (isinstance(value, Real) and not isinstance(value, bool | np.bool_))


def _without_objects(column: Any) -> Any:
    """Return a column of objects that are all numbers as floats, as scikit-learn takes it."""
    if column.dtype != object or not all(map(_is_number, column)):
        return column
    return column.astype(np.float64)


def _telling_none(column: Any, codes: np.ndarray, known: Any) -> tuple[np.ndarray, Any]:
    """Give None a code of its own: pandas knows one missing value, and encoders two."""
    is_none = np.array([value is None for value in column])
    if not is_none.any():
        return codes, known
    return np.where(is_none, len(known), codes), type(known)([*known, None], dtype=object)


def _type_of(series: Any, values: np.ndarray) -> Any:
    """Return the type of a column if it can hold the numbers as they are, else a wider one."""
    dtype = series.dtype
    if dtype.kind == "f" and isinstance(dtype, np.dtype):
        kept = np.array_equal(values.astype(dtype), values, equal_nan=True)
        return dtype if kept else values.dtype
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
