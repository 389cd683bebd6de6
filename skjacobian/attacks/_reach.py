"""What one sample can become, as trees see it: the leaves within reach, and the ways there."""

from typing import NamedTuple

import numpy as np

from skjacobian.leaves import Leaves

# By how much a value passes a threshold, relative to it: trees round to float32.
BEYOND = 2.0**-22
# A margin that decides; of equal scores the first class wins.
TIE = 1e-9


class Set(NamedTuple):
    """What an adversary may make of one sample.

    Attributes
    ----------
    x : array of float64 of shape (n_features,)
        The sample, NaN where a value is missing.
    low, high : array of shape (n_features,)
        The range of each feature, which holds the ball for linf, and x where it is fixed.
    unit : array of shape (n_features,)
        The feature scale, 0 where a feature is fixed.
    eps : float
    power : float
        p of Σ (|δ_j| / unit_j)^p <= eps^p; infinite for linf.
    is_whole : array of bool of shape (n_features,)
    """

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    unit: np.ndarray
    eps: float
    power: float
    is_whole: np.ndarray

    def within(self, radius: float) -> "Set":
        """Return what of the set is no farther from the sample than a radius, at most `eps`."""
        low = np.maximum(self.low, self.x - radius * self.unit)
        high = np.minimum(self.high, self.x + radius * self.unit)
        return self._replace(low=low, high=high, eps=radius)

    def distance(self, x: np.ndarray) -> float:
        """Return how far a point is from the sample."""
        delta = np.abs(np.nan_to_num(x - self.x))
        share = np.divide(delta, self.unit, out=np.zeros_like(delta), where=delta > 0)
        if self.power == np.inf:
            return float(share.max())
        return float((share**self.power).sum() ** (1 / self.power))


class Reach:
    """Changes of one sample, feature by feature, to values just beyond thresholds of trees.

    Between two thresholds nothing changes, so these values are all that there is to try. A state
    is an array that names one of them for each feature that may move.

    Parameters
    ----------
    leaves : Leaves
    y : int
        The true class.
    allowed : Set
    is_careful : bool, default=False
        Whether to take equal scores for no success, and to pass each threshold by more than its
        own rounding: by that of the largest threshold of the feature, as scalers of float32 do.

    Attributes
    ----------
    feature, value, cost : array of shape (n_values,)
        What may be tried, sorted: values of which feature, and what each takes of the budget, 1.
    place : array of int of shape (n_values,)
        Where the feature stands in a state.
    stay : array of int of shape (n_moving,)
        The state of the sample itself.
    """

    def __init__(self, leaves: Leaves, y: int, allowed: Set, is_careful: bool = False) -> None:
        self._x = allowed.x
        near = leaves[_near(leaves, allowed)]
        room = leaves.largest if is_careful else np.zeros(len(allowed.x))
        self.feature, self.value = _values_to_try(near, allowed, room)
        moves = np.isin(np.arange(len(self._x)), self.feature)
        near = near[np.flatnonzero((near.let_in(self._x) | moves).all(axis=1))]
        self.cost = _cost(self.value - self._x[self.feature], self.feature, allowed)
        moving, begin, self.place, counts = np.unique(
            self.feature, return_index=True, return_inverse=True, return_counts=True
        )
        self.stay = np.flatnonzero(self.value == self._x[self.feature])
        self._begin, self._end = begin, begin + counts
        # Of each feature the values from `_first` on and before `_last` are in the leaf. A row
        # for each feature, because numpy sums over rows in less than half the time.
        shape = (len(moving), len(near.low))
        self._first, self._last = (np.empty(shape, dtype=np.int32) for _ in range(2))
        for j, (feature, start, stop) in enumerate(zip(moving, begin, self._end, strict=True)):
            values = self.value[start:stop]
            self._first[j] = start + np.searchsorted(values, near.low[:, feature], side="right")
            self._last[j] = start + np.searchsorted(values, near.high[:, feature], side="right")
        self._cut = self._intervals_outside()
        wins_ties = (np.arange(len(near.constant)) < y) & (not is_careful)
        ahead = np.where(wins_ties, TIE, -TIE)
        self._values = np.delete(near.values - near.values[:, [y]], y, axis=1)
        self._constant = np.delete(near.constant - near.constant[y] + ahead, y)

    def _intervals_outside(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (leaf, start, stop): intervals of values that are not in a leaf."""
        below = np.nonzero(self._first > self._begin[:, None])
        above = np.nonzero(self._last < self._end[:, None])
        leaf = np.concatenate([below[1], above[1]])
        start = np.concatenate([self._begin[below[0]], self._last[above]])
        return leaf, start, np.concatenate([self._first[below], self._end[above[0]]])

    def _out(self, state: np.ndarray) -> np.ndarray:
        """Tell which features (rows) keep a state out of which leaves (columns)."""
        at = state.astype(np.int32)[:, None]
        return np.asarray((at < self._first) | (self._last <= at))

    def margin(self, state: np.ndarray) -> float:
        """Return the largest margin of a wrong class in a state; beyond 0 the model is fooled."""
        held = ~self._out(state).any(axis=0)
        return float((self._values[held].sum(axis=0) + self._constant).max())

    def margins(self, state: np.ndarray) -> np.ndarray:
        """Return the largest margin with each value in the place of that of its feature.

        As a sum over intervals of values: a leaf that one feature alone keeps out adds where that
        feature's value is in the leaf; one that holds the state is lost where one is not.
        """
        if len(state) == 0:
            return np.empty(0)
        out = self._out(state)
        n_out = out.sum(axis=0, dtype=np.int32)
        held, alone = n_out == 0, np.flatnonzero(n_out == 1)
        by = np.argmax(out[:, alone], axis=0)
        leaf, start, stop = (part[held[self._cut[0]]] for part in self._cut)
        starts = np.concatenate([self._first[by, alone], start])
        stops = np.concatenate([self._last[by, alone], stop])
        rises = np.concatenate([self._values[alone], -self._values[leaf]])
        at, n_values = np.concatenate([starts, stops]), len(self.value)
        steps = [
            np.bincount(at, weights=np.concatenate([rise, -rise]), minlength=n_values + 1)
            for rise in rises.T
        ]
        changes = np.cumsum(steps, axis=1)[:, :n_values].T
        total = self._values[held].sum(axis=0) + self._constant
        return np.asarray((changes + total).max(axis=1))

    def costs(self, state: np.ndarray) -> np.ndarray:
        """Return what each value costs in the place of that of its feature."""
        spent = self.cost[state]
        return np.asarray(spent.sum() - spent[self.place] + self.cost)

    @property
    def is_box(self) -> bool:
        """Whether all features may move at once, as in a linf ball."""
        return not self.cost.any()

    def corners(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the states of each feature's best value alone, of its lowest, and its highest."""
        by_margin = np.lexsort((self.margins(self.stay), self.place))
        return by_margin[self._end - 1], self._begin, self._end - 1

    def nearest_in_leaves(self, n_leaves: int) -> np.ndarray:
        """Return the nearest states in leaves, of those that add most to a wrong class."""
        can_hold = (self._first < self._last).all(axis=0)
        others = np.flatnonzero(self._out(self.stay).any(axis=0) & can_hold)
        rank = np.argsort(-self._values[others].max(axis=1), kind="stable")
        order = others[rank[:n_leaves]]
        states = np.clip(self.stay, self._first[:, order].T, self._last[:, order].T - 1)
        return np.asarray(states[self.cost[states].sum(axis=1) <= 1.0])

    def point(self, state: np.ndarray) -> np.ndarray:
        """Return the sample in a state."""
        x = self._x.copy()
        x[self.feature[state]] = self.value[state]
        return x


def _near(leaves: Leaves, allowed: Set) -> np.ndarray:
    """Return which leaves are no farther than the radius, and in the range of each feature."""
    x, missing = allowed.x, np.isnan(allowed.x)
    met = (leaves.low < allowed.high) & (allowed.low <= leaves.high)
    near = np.flatnonzero(np.where(missing, leaves.takes_missing, met).all(axis=1))
    gap = np.maximum(np.maximum(leaves.low[near] - x, x - leaves.high[near]), 0.0)
    gap[:, missing] = 0.0
    cost = _cost(gap, np.arange(len(x)), allowed).sum(axis=1)
    return np.asarray(near[np.flatnonzero(cost <= 1.0)])


def _values_to_try(leaves: Leaves, allowed: Set, room: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (feature, value): just above lower ends of leaves and below upper ones, and x."""
    x, whole = allowed.x, allowed.is_whole
    # Whole numbers are not rounded, and one may be a threshold itself.
    up = np.where(whole, np.floor(leaves.low) + 1, _beyond(leaves.low, room, 1.0))
    down = np.where(whole, np.floor(leaves.high), _beyond(leaves.high, room, -1.0))
    rising = (leaves.low >= x) & (up <= allowed.high)
    falling = (leaves.high < x) & (down >= allowed.low)
    feature = np.concatenate([np.nonzero(rising)[1], np.nonzero(falling)[1]])
    moving = np.unique(feature)
    feature = np.concatenate([feature, moving])
    value = np.concatenate([up[rising], down[falling], x[moving]])
    order = np.lexsort((value, feature))
    feature, value = feature[order], value[order]
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (np.diff(feature) != 0) | (np.diff(value) != 0)
    return feature[is_new], value[is_new]


def _cost(delta: np.ndarray, feature: np.ndarray, allowed: Set) -> np.ndarray:
    """Return the share of the budget that changes of features take: none under linf."""
    if allowed.power == np.inf:
        return np.zeros_like(delta)
    unit = allowed.eps * allowed.unit[feature]
    share = np.divide(np.abs(delta), unit, out=np.full_like(delta, np.inf), where=unit > 0)
    return np.asarray(np.where(delta == 0, 0.0, share**allowed.power))


def _beyond(threshold: np.ndarray, room: np.ndarray, sign: float) -> np.ndarray:
    """Return values beyond thresholds by little more than trees round, of numbers up to `room`."""
    size = np.maximum(np.where(np.isfinite(threshold), np.abs(threshold), 0.0), room)
    return threshold + sign * (BEYOND * size + np.finfo(np.float32).tiny)
