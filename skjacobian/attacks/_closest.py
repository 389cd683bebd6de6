"""The closest perturbation of each sample that fooled a model, as a search of FMN finds it."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from skjacobian._rng import spawned
from skjacobian.ascent_steps import ascend
from skjacobian.attacks._flips import Moves
from skjacobian.attacks._search import Search
from skjacobian.attacks.hotflip import HotFlip
from skjacobian.geometry import Ball
from skjacobian.losses import margin, value_and_slope
from skjacobian.norms import rows

# From shares of a way to the points there.
Way = Callable[[Tensor], Tensor]

# How far beyond the boundary to aim, as a share of its distance.
OVERSHOOT = 1e-4
# How many times as far as what is known of a sample to look for more at most.
FARTHER = 4.0
# How many random points a sample gets in vain, and at all.
PATIENCE = 50
MOST_PROBES = 500
# How often at most HotFlip looks nearer than what it has found; and by how much where it tries
# each single change, which is costly.
FLIP_ROUNDS = 10
CLOSER = 0.99
# What share of the clean margin is a leap across the boundary, as where a model rounds: its slope
# says nothing then of how near the boundary is.
LEAP = 0.01
# How precisely the way back to X is searched, after a leap or for what other features must change.
N_HALVINGS = 10


class Closest:
    """The closest perturbation of each sample that fooled the model, and its distance."""

    def __init__(self, ball: Ball) -> None:
        self.X_adv = ball.X.clone()
        self.distance = ball.X.new_full((len(ball.X),), torch.inf)
        self.margin = ball.X.new_full((len(ball.X),), -torch.inf)
        self.clean = torch.full_like(self.margin, torch.nan)
        self.size = ball.length_of(ball.X)

    def start(self, search: Search, restart: int, generator: torch.Generator) -> Tensor:
        """Return where a restart begins: at X, opposite of the closest, or at random."""
        ball = search.ball
        if restart == 0:
            return ball.X
        # What others draw does not depend on whether this is drawn.
        (own,) = spawned(generator, 1)
        if restart > 1:
            return self.random(search, own)
        is_found = self.distance[search.active].isfinite()
        opposite = 2 * ball.X - self.X_adv[search.active]
        if ball.box is not None:
            opposite = opposite.clamp_(*ball.box)
        if not opposite.is_cuda and bool(is_found.all()):
            return opposite
        return torch.where(rows(is_found, opposite), opposite, self.random(search, own))

    def ball(self, search: Search) -> Ball:
        """Return the sets of the active samples that reach as far as the closest points.

        Where none was found, as far as the sample is from 0.
        """
        distance, size = self.distance[search.active], self.size[search.active]
        radius = distance.where(distance.isfinite(), size.where(size > 0, 1.0))
        return search.ball.with_radius(radius)

    def random(self, search: Search, generator: torch.Generator) -> Tensor:
        """Return random points of the active samples, at most as far from X as the closest."""
        return self.ball(search).random_start(generator)

    def probe(self, search: Search, generator: torch.Generator) -> bool:
        """Look for closer points at random; turn to the samples that have one, if any has.

        What a sample gets does not depend on who else is searched.
        """
        (own,) = spawned(generator, 1)
        before, eligible = self.distance.clone(), search.eligible
        in_vain = torch.zeros_like(search.all_y)
        for _ in range(MOST_PROBES):
            search.eligible = eligible & (in_vain < PATIENCE)
            if not search.restart():
                break
            X_adv = self.random(search, own)
            so_far = self.distance.clone()
            self.update(search, X_adv, search.margin(X_adv), search.ball.quick_distance(X_adv))
            in_vain = torch.where(self.distance < so_far, 0, in_vain + 1)
        search.eligible = eligible & (self.distance < before)
        return search.restart()

    def update(self, search: Search, X_adv: Tensor, found: Tensor, length: Tensor) -> None:
        """Keep those of the active samples' points that fool the model and are closer."""
        given_up, active = search.done, search.active
        distance, fooled = self.distance[active], found > 0
        # Misclassified from the outset: nothing can be closer.
        at_outset = fooled & (length == 0)
        search.record(X_adv, found, at_outset | (distance.isinf() & ~fooled))
        search.done = given_up | at_outset
        # Not by rounding alone: who is fooled at the distance kept stays at that distance.
        X_adv = search.ball.nearest_valid(X_adv)
        if search.ball.rules is not None:
            length = search.ball.quick_distance(X_adv)
        closer = length < distance * (1 - OVERSHOOT)
        # Who waits to be dropped gets no more than who has been.
        better = fooled & closer & ~given_up
        if better.is_cuda:  # without waiting for the device
            better_row = rows(better, X_adv)
            self.X_adv[active] = torch.where(better_row, X_adv, self.X_adv[active])
            self.distance[active] = torch.where(better, length, self.distance[active])
            self.margin[active] = torch.where(better, found, self.margin[active])
            return
        chosen = better.nonzero().squeeze(1)
        target = active[chosen]
        self.X_adv[target] = X_adv[chosen]
        self.distance[target] = length[chosen]
        self.margin[target] = found[chosen]

    def has_leapt(self, index: Tensor) -> Tensor:
        """Tell which samples the model is far more wrong about than a step across would make it."""
        return self.margin[index] > LEAP * self.clean[index].abs()

    def approach(self, search: Search) -> None:
        """Bisect the way back to X of the active samples that a leap has fooled."""
        search.done |= ~self.has_leapt(search.active)
        search.drop(0)
        if len(search.active) == 0:
            return
        far = self.X_adv[search.active]
        # What was found elsewhere, among other ways to round, is no point of these sets.
        no_margin = torch.full_like(self.margin[search.active], -torch.inf)
        X_adv, found = shortest_way(search, _way_back(search, far), far, no_margin)
        self.update(search, X_adv, found, search.ball.quick_distance(X_adv))

    def flip(self, search: Search, generator: torch.Generator) -> None:
        """Look for closer points by changing categories and whole numbers one by one."""
        attack = HotFlip(n_restarts=2)
        # One for each round: what it draws does not depend on who else is searched.
        promising = [
            partial(attack.follow_promises, generator=own)
            for own in spawned(generator, FLIP_ROUNDS)
        ]
        self._flip_nearer(search, 1 - OVERSHOOT, promising)
        self._flip_nearer(search, CLOSER, [attack.try_each] * FLIP_ROUNDS)

    def _flip_nearer(
        self, search: Search, share: float, rounds: Sequence[Callable[[Search], None]]
    ) -> None:
        """Look, in each round, within a share of the distance that those before have found."""
        ball, eligible = search.all_balls, self.distance > 0
        for look in rounds:
            known = self.distance.where(self.distance.isfinite(), FARTHER * (1 + self.size))
            radius = share * known
            inner = Search(search.model, ball.with_radius(radius), search.all_y)
            inner.inspected, inner.eligible = True, eligible
            inner.output_kind = search.output_kind
            look(inner)
            _shorten(inner)
            search.n_queries += inner.n_queries
            search.is_undefined |= inner.is_undefined
            length = ball.quick_distance(inner.X_best)
            eligible = (inner.best > 0) & (length < self.distance)
            if not bool(eligible.any()):
                return
            self.X_adv[eligible] = inner.X_best[eligible]
            self.distance[eligible] = length[eligible]
            self.margin[eligible] = inner.best[eligible]

    def record(self, search: Search) -> None:
        """Hand over what was found."""
        if search.restart():
            chosen = search.active
            search.record(self.X_adv[chosen], self.margin[chosen], self.margin[chosen] > 0)


def straight_way(start: Tensor, far: Tensor) -> Way:
    """Return the straight way from one point of each sample to another."""
    return lambda share: torch.lerp(start, far, rows(share, far))


def _way_back(search: Search, far: Tensor) -> Way:
    """Return the way from X to points that fool the model.

    In linf balls over whole numbers that of the nearest points in growing balls, to where the
    gradient leads: one number that leapt allows all features as much, which may save its last step.
    """
    ball = search.ball
    if ball.norm != "linf" or ball.rules is None:
        return straight_way(ball.X, far)
    length = ball.quick_distance(far)
    _, _, gradient = search.gradient(far, partial(value_and_slope, margin, y=search.y))
    corner = ascend(ball.with_radius(length), far, gradient, rows(2 * length, far))
    far = torch.where(rows(search.margin(corner) > 0, far), corner, far)
    return lambda share: ball.with_radius(share * length).project(far)


def shortest_way(search: Search, way: Way, far: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Bisect the way of each active sample to a point `far` that fools the model.

    Parameters
    ----------
    search : Search
    way : callable
        Maps a share of the way, shape (n_active,), to the points there; 1 to `far`.
    far : Tensor of shape (n_active, *features)
    found : Tensor of shape (n_active,)
        The margins of `far`.

    Returns
    -------
    X_adv : Tensor of shape (n_active, *features)
        The first points of the way seen to fool the model, `far` where none was.
    found : Tensor of shape (n_active,)
        Their margins; for `far`, what was given.
    """
    closest = far
    spared, needed = torch.zeros_like(found), torch.ones_like(found)
    for _ in range(N_HALVINGS):
        share = (spared + needed) / 2
        X_adv = way(share)
        value = search.margin(X_adv)
        fools = value > 0
        closest, found = X_adv.where(rows(fools, far), closest), value.where(fools, found)
        spared, needed = share.where(~fools, spared), share.where(fools, needed)
    return closest, found


def _shorten(search: Search) -> None:
    """Take back, by bisection, what features that are not changed one by one have moved too far."""
    ball, best = search.all_balls, search.best
    single = Moves(ball).one_by_one(ball).reshape(ball.X.shape)
    flipped = torch.where(single, search.X_best, ball.X)
    fooled = best > 0
    if not bool(fooled.any()) or bool((flipped == search.X_best).all()):
        return
    # Those that are fooled, and are searched again.
    search.eligible, search.best = fooled, best.where(~fooled, -torch.inf)
    search.restart()
    chosen = search.active
    far = search.X_best[chosen]
    way = straight_way(flipped[chosen], far)
    X_adv, best[chosen] = shortest_way(search, way, far, best[chosen])
    search.X_best[chosen] = search.ball.nearest_valid(X_adv)
    search.best = best
