"""Search among the leaves of trees (after Zhang, Zhang & Hsieh, NeurIPS 2020)."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from skjacobian._validation import check_flag
from skjacobian.attacks._base import Attack
from skjacobian.attacks._reach import TIE, Reach, Set
from skjacobian.attacks._search import BudgetSpentError, Search
from skjacobian.constraints import FeatureConstraints
from skjacobian.geometry import Ball
from skjacobian.leaves import Leaves
from skjacobian.validity import Rules

# A state of `Reach`, and its margin; a point, and whether it fools, as the leaves say.
State = tuple[np.ndarray, float]
Point = tuple[np.ndarray, bool]

POWERS = {"l1": 1.0, "l2": 2.0, "linf": np.inf}
# What greedy steps climb: the gain of margin over the cost to this power. Each finds what others
# miss.
EXPONENTS, EXPONENTS_OF_STARTS = (1.0, 0.5, 0.0, 2.0), (1.0, 0.0)
# Of the leaves that add most to a wrong class, so many are looked at, and searches begin in the
# best of these.
N_LEAVES, N_STARTS = 64, 4
# The share of the radius that is looked at first: there is less to look at.
AT_FIRST = 1 / 8
# Where the nearest point is looked for: the first radius, as a share of one beyond all
# thresholds, and the precision of the last.
FIRST_RADIUS, PRECISION = 2.0**-12, 1e-2


class LeafSearch(Attack):
    """Search among the leaves of trees: change one feature at a time, as far as a threshold.

    The scores of a forest or of boosted trees are constant between the thresholds of the trees, so
    the points just beyond these are all that there is to try (Kantchelian, Tygar & Joseph,
    arXiv 1509.07892, solve for the best of them; Zhang, Zhang & Hsieh, NeurIPS 2020, search from
    leaf to leaf). From the sample, and from the nearest points of leaves that favour another
    class, the step is taken that raises the margin most for what it costs of the radius; where no
    step helps, changes are taken back one at a time. What all steps would bring is summed at
    once, so that this takes milliseconds for a sample. The model itself judges the points that
    are found; nothing is random.

    It asks for the leaves, which scorers know of scikit-learn's decision trees, random forests,
    extremely randomized trees, gradient boosting (both kinds), and bagging, AdaBoost and soft votes
    of trees, alone or behind what scales, imputes, selects or encodes columns.

    Parameters
    ----------
    norm : {"linf", "l2", "l1"}, default="linf"
        Norm of the ball.
    eps : float or Tensor of shape (n_samples,), default=0.1
        Radius: ‖(X_adv - X) / feature_scale‖ <= eps. A tensor has one value per sample.
    feature_scale : None, "std", "range" or array of shape (n_features,), default=None
        Unit of each feature; None is 1, "std" and "range" are those of the X attacked.
    bounds : (low, high), optional
        Numbers or one value per feature. None means unbounded; there is no implicit clip.
    mutable : int, or array-like of int or bool, optional
        Features that may change: indices, or a boolean mask. None is all.
    constraints : FeatureConstraints, optional
        What else makes a sample valid, columns given by index. One-hot columns stay as they are.
    minimal : bool, default=False
        Whether to look for the nearest point that fools, as `FMN` does; eps is then the largest
        radius that is looked at.

    Raises
    ------
    TypeError
        By the search, if the leaves of the model are not known.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.tree import DecisionTreeClassifier
    >>> from skjacobian import RobustScorer
    >>> X, y = load_iris(return_X_y=True)
    >>> tree = DecisionTreeClassifier(max_depth=3, random_state=0).fit(X, y)
    >>> round(RobustScorer(norm="l2", eps=0.2, attack=LeafSearch())(tree, X, y), 2)
    0.89
    """

    needs: ClassVar[str] = "labels"

    def __init__(
        self,
        *,
        norm: str = "linf",
        eps: Any = 0.1,
        feature_scale: Any = None,
        bounds: Any = None,
        mutable: Any = None,
        constraints: FeatureConstraints | None = None,
        minimal: bool = False,
    ) -> None:
        self.norm = norm
        self.eps = eps
        self.feature_scale = feature_scale
        self.bounds = bounds
        self.mutable = mutable
        self.constraints = constraints
        self.minimal = minimal

    def check_params(self) -> None:
        """Raise a ValueError that names the first parameter with a bad value."""
        super().check_params()
        check_flag("minimal", self.minimal)

    def _search(self, search: Search, generator: torch.Generator) -> None:
        leaves = known_leaves(search.model)
        if leaves is None:
            raise TypeError(
                "Got a model whose leaves are not known, but expected a decision tree or an "
                "ensemble of trees of scikit-learn, alone or behind scalers, imputers and encoders."
            )
        find = _nearest_point if self.minimal else _best_point
        refuted = torch.ones_like(search.all_y, dtype=torch.bool)
        # Where the model does not confirm what the leaves say, once more with room for rounding.
        for is_careful in (False, True):
            if not search.restart() or not bool(refuted[search.active].any()):
                return
            X_adv = search.ball.X.clone()
            for i, allowed in enumerate(_sets(search.ball, leaves)):
                if search.is_late():
                    break
                if refuted[search.active[i]]:
                    point, fools = find(leaves, int(search.y[i]), allowed, is_careful)
                    X_adv[i] = torch.from_numpy(point[: X_adv.shape[1]]).to(X_adv)
                    refuted[search.active[i]] = fools
            self._ask(search, X_adv)

    def _ask(self, search: Search, X_adv: Tensor) -> None:
        """Ask the model about points, and keep those that fool it, however late it is."""
        if search.ball.missing is not None:
            X_adv = torch.where(search.ball.missing, 0.0, X_adv)
        X_adv = search.ball.enforce(X_adv)
        is_late, deadline, search.deadline = search.is_late(), search.deadline, None
        search.record(X_adv, search.margin(X_adv), ~search.done)
        search.deadline = deadline
        if is_late:
            raise BudgetSpentError


def known_leaves(model: Any) -> Leaves | None:
    """Return the leaves of a model that carries them; else None."""
    return getattr(model, "leaves", None)


def leaves_decide(model: Any, rules: Rules | None) -> bool:
    """Tell whether the leaves of a model are known, and all that may change is searched there.

    One-hot columns are not: one category changes two of them.
    """
    return known_leaves(model) is not None and (rules is None or not rules.groups)


def _sets(ball: Ball, leaves: Leaves) -> list[Set]:
    """Return what may become of each sample of a batch, with all features of the leaves."""
    rules, shape = ball.rules, ball.X.shape[1:]
    scale = torch.ones(shape) if ball.scale is None else ball.scale.expand(shape)
    unit, X = _array(scale), _array(ball.X)
    is_whole = np.zeros(shape, dtype=bool) if rules is None else _array(rules.is_whole) > 0
    if rules is not None:  # categories stay: one changes two columns
        unit[[j for group in rules.groups for j in group.tolist()]] = 0.0
    # With whole numbers points may be as far as the radius, to the last digit.
    eps = torch.as_tensor(ball.radii() if rules is not None else ball.eps_within_rounding())
    radii = np.broadcast_to(_array(eps).ravel(), len(X))
    low, high = np.full_like(X, -np.inf), np.full_like(X, np.inf)
    if ball.box is not None:
        low, high = (_array(side) for side in ball.box)
    if ball.norm != "linf":
        reach = radii[:, None] * unit
        low, high = np.maximum(low, X - reach), np.minimum(high, X + reach)
    low, high = np.where(unit > 0, low, X), np.where(unit > 0, high, X)
    if ball.missing is not None:
        X[ball.missing.cpu().numpy()] = np.nan
    fixed = leaves.encoded(X)
    X, low, high = (np.concatenate([part, fixed], axis=1) for part in (X, low, high))
    unit, is_whole = (np.pad(part, (0, fixed.shape[1])) for part in (unit, is_whole))
    return [
        Set(X[i], low[i], high[i], unit, radii[i], POWERS[ball.norm], is_whole)
        for i in range(len(X))
    ]


def _array(tensor: Tensor) -> np.ndarray:
    """Return a copy of a tensor as an array of float64."""
    array: np.ndarray = tensor.to("cpu", torch.float64, copy=True).numpy()
    return array


def _best_point(leaves: Leaves, y: int, allowed: Set, is_careful: bool) -> Point:
    """Return a point that fools, as the leaves say, or else the one of largest margin found."""
    near = allowed.within(AT_FIRST * allowed.eps)
    point, fools = _searched(Reach(leaves, y, near, is_careful))
    return (point, True) if fools else _searched(Reach(leaves, y, allowed, is_careful))


def _nearest_point(leaves: Leaves, y: int, allowed: Set, is_careful: bool) -> Point:
    """Return the nearest point found that fools, or else the one of largest margin.

    Radii are doubled until one suffices, then halved between what does and what does not.
    """
    spared, needed = 0.0, min(allowed.eps, _farthest(leaves, allowed))
    radius, best, is_found = needed * FIRST_RADIUS, allowed.x, False
    while spared < (1 - PRECISION) * needed:
        point, fools = _searched(Reach(leaves, y, allowed.within(radius), is_careful))
        if fools:
            best, needed, is_found = point, allowed.distance(point), True
        else:
            best, spared = best if is_found else point, radius
        radius = (spared + needed) / 2 if is_found else min(2 * radius, needed)
    return best, is_found


def _farthest(leaves: Leaves, allowed: Set) -> float:
    """Return a radius beyond all thresholds of the features that may move."""
    x = np.nan_to_num(allowed.x)
    ends = np.concatenate([leaves.low, leaves.high, [x]])
    ends = np.where(np.isfinite(ends), ends, x)
    beyond = np.where(allowed.unit > 0, np.abs(ends - x).max(0), 0.0)
    return 2 * allowed.distance(x + beyond)


def _searched(reach: Reach) -> Point:
    """Return the first point found of positive margin, or else the best."""
    best, largest = reach.stay, reach.margin(reach.stay)
    for state, margin in _searches(reach):
        if margin > largest:
            best, largest = state, margin
        if largest > 0:
            break
    return reach.point(best), bool(largest > 0)


def _searches(reach: Reach) -> Iterator[State]:
    """Yield where searches end: from the sample, from corners of boxes, from other leaves."""
    if reach.is_box:
        for start in (reach.stay, *reach.corners()):
            yield _reconsidered(reach, *_climbed(reach, start, 0.0), 0.0)
    else:
        for exponent in EXPONENTS:
            yield _reconsidered(reach, *_climbed(reach, reach.stay, exponent), exponent)
    states = reach.nearest_in_leaves(N_LEAVES)
    order = np.argsort([-reach.margin(state) for state in states], kind="stable")
    for start in states[order[:N_STARTS]]:
        for exponent in EXPONENTS_OF_STARTS:
            yield _climbed(reach, start, exponent)


def _climbed(reach: Reach, state: np.ndarray, exponent: float) -> State:
    """Climb from a state, one feature at a time, until the model is fooled or nothing helps."""
    state, margin = state.copy(), reach.margin(state)
    while margin <= 0:
        margins, costs = reach.margins(state), reach.costs(state)
        helps = (costs <= 1.0) & (margins > margin + TIE)
        if not helps.any():
            break
        gain = margins - margin
        price = np.maximum(costs - reach.cost[state].sum(), 1e-3)
        worth = np.where(helps & (margins > 0), np.inf, gain / price**exponent)
        chosen = np.where(helps, worth, -np.inf).argmax()
        state[reach.place[chosen]], margin = chosen, margins[chosen]
    return state, margin


def _reconsidered(reach: Reach, state: np.ndarray, margin: float, exponent: float) -> State:
    """Take back one change after another, and climb again from there; keep what helps."""
    for j in np.flatnonzero(state != reach.stay):
        if margin > 0:
            break
        without = state.copy()
        without[j] = reach.stay[j]
        other, its_margin = _climbed(reach, without, exponent)
        if its_margin > margin + TIE:
            state, margin = other, its_margin
    return state, margin
