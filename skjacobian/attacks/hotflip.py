"""HotFlip: categories and whole numbers changed one by one, the most promising first."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skjacobian._validation import check_count
from skjacobian.ascent_steps import ascend, open_part
from skjacobian.attacks._base import Attack
from skjacobian.attacks._flips import Changes, Moves
from skjacobian.attacks._search import Search
from skjacobian.constraints import FeatureConstraints
from skjacobian.geometry import Ball
from skjacobian.losses import soft_margin, value_and_slope

# Of the gain and the price of changes.
Worth = Callable[[Tensor, Tensor], Tensor]

# Where the ball is cut by a box, a step so many radii long and its projection lead to the best, for
# features up to so many times as steep as others.
LONG_STEP = 1e6
# From how many of the single changes that are tried whatever they promise, those that turn out
# best, a search goes on, and for how many steps.
MOST_WALKS = 8
STEPS_OF_WALK = 4


class HotFlip(Attack):
    """Greedy changes of categories and whole numbers, the most promising first.

    Ebrahimi, Rao, Lowd & Dou (ACL 2018, arXiv 1712.06751), for a budget: each step makes the
    change of one category, or of one whole number by 1, that to first order gains most for its
    price; a change made before may be taken back. At each step what is left of the budget is
    spent on the other features, by two steps along the gradient. Gradient attacks search among
    real numbers and round, which in l2 and l1 balls can lead back to X. For a linear model the
    first restart is nearly optimal. What the first order promises can mislead: where at most 256
    single changes are possible, each is tried in the end, and the search goes on from the best.

    Parameters
    ----------
    norm : {"l2", "l1", "linf"}, default="l2"
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
        Which columns hold categories and whole numbers, by index, and what else makes a sample
        valid.
    n_steps : int, default=50
        Changes of one search at most.
    n_restarts : int, default=4
        Searches. The first ranks changes by gain over price, the second by gain alone, the
        others by gain over price times random factors.

    Examples
    --------
    >>> import torch
    >>> from skjacobian import FeatureConstraints
    >>> W = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.9, 0.8]])
    >>> attack = HotFlip(norm="l2", eps=1.5, constraints=FeatureConstraints(integer=[0, 1, 2]))
    >>> X, y = torch.zeros(1, 3), torch.tensor([0])
    >>> attack(lambda X: X @ W.T - torch.tensor([0.0, 1.5]), X, y)
    tensor([[1., 1., 0.]])
    """

    def __init__(
        self,
        *,
        norm: str = "l2",
        eps: Any = 0.1,
        feature_scale: Any = None,
        bounds: Any = None,
        mutable: Any = None,
        constraints: FeatureConstraints | None = None,
        n_steps: int = 50,
        n_restarts: int = 4,
    ) -> None:
        self.norm = norm
        self.eps = eps
        self.feature_scale = feature_scale
        self.bounds = bounds
        self.mutable = mutable
        self.constraints = constraints
        self.n_steps = n_steps
        self.n_restarts = n_restarts

    def check_params(self) -> None:
        """Raise a ValueError that names the first parameter with a bad value."""
        super().check_params()
        check_count("n_steps", self.n_steps)
        check_count("n_restarts", self.n_restarts)

    def _search(self, search: Search, generator: torch.Generator) -> None:
        self.follow_promises(search, generator)
        self.try_each(search)

    def follow_promises(self, search: Search, generator: torch.Generator) -> None:
        """Search from X, in each restart for what is worth most to first order."""
        moves, n_steps = Moves(search.all_balls), check_count("n_steps", self.n_steps)
        for restart in range(check_count("n_restarts", self.n_restarts)):
            if not search.restart():
                return
            taste = torch.rand(len(moves), generator=generator, dtype=torch.float64)
            worth = partial(_worth, restart, taste.to(search.y.device))
            self._walk(search, moves, search.ball.X, n_steps, worth)
            if len(moves) == 0:
                return

    def try_each(self, search: Search) -> None:
        """Make each single change, if they are few, and go on from those that are best."""
        moves = Moves(search.all_balls)
        changes = moves.trials()
        margins = torch.full_like(search.best, -torch.inf).repeat(len(changes), 1)
        for place, margin in enumerate(margins):
            if not search.restart():
                return
            start = _changed(search, moves, changes, torch.full_like(search.all_y, place))
            if len(start):
                allowed = ~search.done
                found = self._first_margin(search, moves, start)
                margin[search.active] = found.where(allowed & ~found.isnan(), -torch.inf)
        best = margins.sort(dim=0, stable=True, descending=True).indices[:MOST_WALKS]
        for which in best:
            if not search.restart():
                return
            start = _changed(search, moves, changes, which)
            if len(start):
                self._walk(search, moves, start, STEPS_OF_WALK, torch.div)

    def _first_margin(self, search: Search, moves: Moves, X_adv: Tensor) -> Tensor:
        """Return the larger margin of points and of those where the rest has followed."""
        found, _, gradient = search.gradient(X_adv, partial(_soft_margin, search))
        search.keep(X_adv, found)
        rest = moves.rest(search.ball, X_adv)
        if rest is None:
            return found
        completed = _climb(rest, gradient)
        found_there = search.margin(completed)
        search.keep(completed, found_there)
        return torch.maximum(found, found_there)

    def _walk(
        self, search: Search, moves: Moves, X_adv: Tensor, n_steps: int, worth: Worth
    ) -> None:
        """Make one change after another, until none is left that promises anything."""
        loss = partial(_soft_margin, search)
        for step in range(n_steps):
            found, _, gradient = search.gradient(X_adv, loss)
            search.keep(X_adv, found)
            rest = moves.rest(search.ball, X_adv)
            if rest is not None:
                completed = _climb(rest, gradient)
                found, _, again = search.gradient(completed, loss)
                search.keep(completed, found)
                completed = _climb(rest, again)
                search.keep(completed, search.margin(completed))
            if len(moves) == 0:
                return
            best, chosen = worth(*moves.offers(search.ball, X_adv, gradient)).max(1)
            search.done |= best <= 0
            X_adv = moves.made(X_adv, gradient, chosen, best > 0)
            kept = search.drop(step)
            if kept is not None:
                X_adv = X_adv[kept]
            if len(X_adv) == 0 or bool(search.done.all()):
                return


def _worth(restart: int, taste: Tensor, gain: Tensor, price: Tensor) -> Tensor:
    """Return what a restart takes changes to be worth."""
    if restart == 1:
        return gain
    return gain / price * ((2 * taste - 1).exp() if restart > 1 else 1.0)


def _soft_margin(search: Search, logits: Tensor) -> tuple[Tensor, Tensor]:
    return value_and_slope(soft_margin, logits, y=search.y)


def _changed(search: Search, moves: Moves, changes: Changes, which: Tensor) -> Tensor:
    """Return the active samples, each with the change of its place; those not allowed are done.

    `which` has the place for each sample, active or not.
    """
    X_adv, allowed = moves.tried(search.ball, changes, which[search.active])
    search.done = ~allowed
    kept = search.drop(0)
    return X_adv if kept is None else X_adv[kept]


def _climb(rest: Ball, gradient: Tensor) -> Tensor:
    """Return the points of the sets that are best to first order."""
    assert isinstance(rest.eps, Tensor)
    # The square of the step must be finite.
    step = (LONG_STEP * rest.eps).clamp(max=torch.finfo(rest.X.dtype).max ** 0.5 / 2)
    # A copy: what is overwritten here says which changes to make.
    return ascend(rest, rest.X, open_part(rest, rest.X, gradient), step)
