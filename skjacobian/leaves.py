"""The leaves of classifiers that add up trees: where they are, and what they add to the scores."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Leaves:
    """The leaves of trees whose values add up to the scores of a classifier.

    A sample is in the leaf of a tree where low < x <= high holds for each feature, or where the
    value is missing and the leaf takes it.

    Attributes
    ----------
    low, high : array of float64 of shape (n_leaves, n_features)
    takes_missing : array of bool of shape (n_leaves, n_features)
    values : array of float64 of shape (n_leaves, n_classes)
    constant : array of float64 of shape (n_classes,)
        What is added to the scores of every sample.
    codes : array of bool of shape (n_leaves, n_coded, n_codes), optional
        Of the last features, which are codes of categories: which of these each leaf takes. There
        `low` and `high` say nothing.
    encoders : tuple of callable
        What the last features are where the samples do not have as many: what encoders make of
        columns that cannot change. Each maps samples (n_samples, n_columns) to some features.
    n_encoded : int
        How many features these are.

    Examples
    --------
    >>> low, high = np.array([[-np.inf], [2.0]]), np.array([[2.0], [np.inf]])
    >>> leaves = Leaves(low, high, np.ones((2, 1), bool), np.eye(2), np.zeros(2))
    >>> leaves.scores(np.array([[2.0], [2.5]]))
    array([[1., 0.],
           [0., 1.]])
    """

    low: np.ndarray
    high: np.ndarray
    takes_missing: np.ndarray
    values: np.ndarray
    constant: np.ndarray
    codes: np.ndarray | None = None
    encoders: tuple[Callable[[np.ndarray], np.ndarray], ...] = ()
    n_encoded: int = 0

    def scores(self, X: np.ndarray) -> np.ndarray:
        """Return the sum of the values of the leaves that each sample is in."""
        features = np.concatenate([X, self.encoded(X)], axis=1)
        inside = (self.let_in(x).all(axis=1) for x in features)
        return np.array([self.values[leaves].sum(axis=0) + self.constant for leaves in inside])

    def encoded(self, X: np.ndarray) -> np.ndarray:
        """Return the features of samples that are none of their columns."""
        return np.concatenate([X[:, :0], *(encode(X) for encode in self.encoders)], axis=1)

    def let_in(self, x: np.ndarray) -> np.ndarray:
        """Tell for each leaf and feature whether the leaf lets in the value of one sample."""
        inside = (self.low < x) & (x <= self.high)
        if self.codes is not None:
            n_coded = self.codes.shape[1]
            code = np.nan_to_num(x[-n_coded:]).astype(int)
            inside[:, -n_coded:] = self.codes[:, np.arange(n_coded), code]
        return np.asarray(np.where(np.isnan(x), self.takes_missing, inside))

    @cached_property
    def largest(self) -> np.ndarray:
        """The largest size of a threshold of each feature."""
        ends = (np.where(np.isfinite(side), np.abs(side), 0.0) for side in (self.low, self.high))
        return np.maximum(*(side.max(0, initial=0.0) for side in ends))

    def __getitem__(self, index: np.ndarray) -> "Leaves":
        """Return some of the leaves."""
        return replace(
            self,
            low=self.low[index],
            high=self.high[index],
            takes_missing=self.takes_missing[index],
            values=self.values[index],
            codes=None if self.codes is None else self.codes[index],
        )
