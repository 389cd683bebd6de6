"""Fast minimum-norm attack (Pintor et al., arXiv 2102.12827)."""

from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from torch import Tensor

from skjacobian._rng import spawned
from skjacobian._validation import check_count, check_radii, unwrap_scalar
from skjacobian.ascent_steps import ascend, dual_length, open_features, steepest
from skjacobian.attacks._base import Attack
from skjacobian.attacks._closest import FARTHER, LEAP, OVERSHOOT, Closest
from skjacobian.attacks._flips import flips_pay
from skjacobian.attacks._outlook import Slopes
from skjacobian.attacks._search import AIMED_CLASSES, LossAndSlope, Search
from skjacobian.attacks._single_features import ranked_vertices, vertex, vertices_pay
from skjacobian.constraints import FeatureConstraints
from skjacobian.geometry import LARGEST_RADIUS, Ball
from skjacobian.losses import soft_margin, targeted_margin, value_and_slope
from skjacobian.model_modes import PredictLogits
from skjacobian.norms import rows

# By how much a radius may grow in one step from 0, as a share of the norm of the sample.
FIRST = 1 / 16
# Samples are given up, from this share of the steps of a search on, that to first order come
# no nearer than this share of the distance found.
SHARE_OF_STEPS = {"linf": 0.6, "l2": 0.4, "l1": 0.6}
NEARER = 0.999
# Where certain radii are asked about, samples are given up, from these shares of the steps of the
# first search and of others on, that come no nearer than so many times the next of them; where the
# slope has been steady, unlike that of kernel machines, of which the first order says too little.
SHARES_OF_STEPS_TO_RADII = 0.4, 0.3
BEYOND = 1.25
# Where few features may change, a search aims at each of the likeliest wrong classes, so briefly;
# and so many more start elsewhere.
AIMED_STEPS = 4
MORE_RESTARTS = 8
# What share of the clean margin is none.
TIE = 1e-6
# Of how few features random points find what gradients lead past.
PROBED_FEATURES = 20


class FMN(Attack):
    """Fast minimum-norm attack: the smallest perturbation that fools the model.

    Climbs the margin inside a ball whose radius follows the distance of the decision
    boundary, for each sample its own (Pintor et al., arXiv 2102.12827, algorithm 1):

    r ← ‖δ‖ - m / ‖∇ₓm‖_*, x ← Π_r(x + α·argmax_{‖d‖<=1} dᵀ∇ₓm)

    with the margin m = max_{k != y} z_k - z_y at x + δ, the dual norm ‖·‖_* and the
    projection Π_r on the ball of radius r. One run gives the robust accuracy at every
    radius, see `distances`. The departures from the paper, each measured on
    three MNIST networks:

    - The paper estimates the radius by its first-order form only until a sample is fooled,
      and then lets it rise and fall by a factor that decays. Here the estimate is used
      throughout: it is Newton's method for the radius at which the largest margin in the
      ball is 0, and converges in a few steps. It grows at most fourfold in one: on plateaus,
      which kernel machines have, the estimate leads far away from the data. Under l2 it is of
      the part of δ that is not stuck at bounds, and r² the sum of the squares of both parts:
      of tables of steep and gentle features distances had been up to 7 % too large.
    - Where at most 100 features may change, short searches towards each of the 9 likeliest wrong
      classes follow, which is exact if the model is linear, and eight more: from random points no
      farther than what was found, every other one half way from there to the closest; but under l1
      and l2 four of them from the best changes of single features. These take short steps,
      r/2·(1 - step/n_steps): longer ones forget where they began. Of 27 classifiers of tables, up
      to 10 % of the distances were more than 5 % too large with four from random points, and less
      than 1 % are (docs/architecture.md).
    - Where at most 20 features may change, random points follow, each no farther than what
      was found, until 50 in a row are in vain or 500 were tried; the search goes on from those
      that fooled. Gradients lead past the pockets of kernel machines, and see nothing on their
      plateaus. Without random points, a sixth to a third of the distances from two moons to the
      boundary of `SVC(gamma=1)` were too large by a tenth or more; with them, 3 to 8 % were.
    - Where a search has crossed the boundary in a leap, as of a model that rounds, bisection on the
      way back to X follows: without it, curves were up to 60 points above PGD.
    - Over categories, and in l2 and l1 balls over whole numbers, HotFlip looks for closer points.
    - α falls as 4r·(1 - step/n_steps)³, large enough at first to cross the ball. For l1 it
      is 1.5r·(1 - step/n_steps)², a step of conditional gradients (`ascend`): projected
      full gradients left the robust accuracy a point higher.
    - What is climbed is the margin with a soft maximum over the wrong classes, whose
      temperature falls. Following the one class that leads now ends at worse optima.
    - A second search begins opposite of where the first ended: there it finds another
      optimum more often than from a random point, and than more steps would.
    - After 60 % of the steps of a search, 40 % under l2, samples are given up whose distance
      would, to first order, fall by less than 0.1 %. That saves a seventh to two fifths of the
      time and makes distances 0.03 to 0.2 % larger.
    - With `radii`, where more than 100 features may change, samples are given up whose distance
      would, to first order, stay a quarter above the next of these: that saves another tenth to
      fifth of the time.

    Parameters
    ----------
    norm : {"linf", "l2", "l1"}, default="linf"
        Norm whose smallest value is sought.
    eps : float or Tensor of shape (n_samples,), default=numpy.inf
        Largest radius that is looked at: ‖(X_adv - X) / feature_scale‖ <= eps. A tensor has one
        finite value per sample.
    feature_scale : None, "std", "range" or array of shape (n_features,), default=None
        Unit of each feature; None is 1, "std" and "range" are those of the X attacked.
    bounds : (low, high), optional
        Numbers or one value per feature. None means unbounded; there is no implicit clip.
    mutable : int, or array-like of int or bool, optional
        Features that may change: indices, or a boolean mask. None is all.
    constraints : FeatureConstraints, optional
        What else makes a sample valid, columns given by index.
    n_steps : int, default=14
        Gradient steps of one restart.
    n_restarts : int, default=2
        Searches. The first starts at X, the second at 2X - X_adv, opposite the closest X_adv that
        the first found, the others at random points no farther from X than the closest.
        Where nothing was found, they start at random points no farther from X than 0 is.
    radii : array-like of float, optional
        What the distances will be compared with. They are as exact as the search can make them
        only as to which of these they exceed. None is everything.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> X, y = torch.tensor([[1.0, 0.5]]), torch.tensor([0])
    >>> FMN(norm="linf").distances(lambda X: X @ W.T, X, y).round(decimals=4)
    tensor([0.2500], dtype=torch.float64)
    """

    # The factor c and the power p of the step size α = c·r·(1 - step/n_steps)^p.
    STEP_SIZES = {"linf": (4, 3), "l2": (4, 3), "l1": (1.5, 2)}
    # The same for a search from elsewhere, among few features: large steps would forget where.
    LOCAL_STEP_SIZE = 0.5, 1
    # Temperatures of the soft maximum at the first and the last step of the first search, as
    # shares of the spread of the logits. All other searches stay at the last.
    TEMPERATURES = 0.12, 0.03

    def __init__(
        self,
        *,
        norm: str = "linf",
        eps: Any = np.inf,
        feature_scale: Any = None,
        bounds: Any = None,
        mutable: Any = None,
        constraints: FeatureConstraints | None = None,
        n_steps: int = 14,
        n_restarts: int = 2,
        radii: Any = None,
    ) -> None:
        self.norm = norm
        self.eps = eps
        self.feature_scale = feature_scale
        self.bounds = bounds
        self.mutable = mutable
        self.constraints = constraints
        self.n_steps = n_steps
        self.n_restarts = n_restarts
        self.radii = radii

    def check_params(self) -> None:
        """Raise a ValueError that names the first parameter with a bad value."""
        super(FMN, self._with_finite_eps()).check_params()
        check_count("n_steps", self.n_steps)
        check_count("n_restarts", self.n_restarts)
        if self.radii is not None:
            check_radii("radii", self.radii)

    def ball(self, X: Tensor) -> Ball:
        """Return the sets that this adversary may choose from, around the rows of `X`."""
        return super(FMN, self._with_finite_eps()).ball(X)

    def _with_finite_eps(self) -> "FMN":
        """Return an attack whose radius, if it was the number inf, is beyond all data."""
        eps = unwrap_scalar(self.eps) if not isinstance(self.eps, Tensor) else self.eps
        if not isinstance(eps, Real) or eps != np.inf:
            return self
        bounded: FMN = clone(self).set_params(eps=LARGEST_RADIUS)
        return bounded

    def distances(
        self,
        predict_logits: PredictLogits,
        X: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the norm of the smallest perturbation found that fools the model.

        Robust accuracy at radius r is `(distances > r).mean()`, for every r <= eps.

        Parameters
        ----------
        predict_logits, X, y, generator
            As for `__call__`.

        Returns
        -------
        Tensor of float64 of shape (n_samples,)
            ‖(X_adv - X) / feature_scale‖; 0 where the clean sample is misclassified, inf
            where no perturbation within `eps` was found.
        """
        found = self.search(predict_logits, X, y, generator=generator)
        return self.ball(X).distance(found.X_adv).where(found.fooled, torch.inf)

    def _search(self, search: Search, generator: torch.Generator) -> None:
        ball, closest, eligible = search.all_balls, Closest(search.all_balls), search.eligible
        try:
            self._approach(search, closest, generator)
        finally:  # also where a budget is spent
            search.all_balls, search.eligible = ball, eligible
            closest.record(search)

    def _approach(self, search: Search, closest: Closest, generator: torch.Generator) -> None:
        """Look for ever closer perturbations: from X, and from elsewhere among few features."""
        ball, eligible = search.all_balls, search.eligible
        for sets in _ways_to_round(ball):
            search.all_balls = sets
            for restart in range(check_count("n_restarts", self.n_restarts)):
                if search.restart():
                    start = closest.start(search, restart, generator)
                    self._descend(search, closest, restart, start)
        search.all_balls = ball
        if ball.has_few_features:
            self._aim(search, closest)
            n_nearby = MORE_RESTARTS
            if vertices_pay(ball):
                n_nearby //= 2
                self._restart_at_vertices(search, closest, MORE_RESTARTS - n_nearby)
            self._restart_nearby(search, closest, generator, n_nearby)
        if len(ball.free_features()) <= PROBED_FEATURES and closest.probe(search, generator):
            self._descend(search, closest, 2, closest.X_adv[search.active])
        search.eligible = eligible
        if flips_pay(ball):
            closest.flip(search, generator)

    def _aim(self, search: Search, closest: Closest) -> None:
        """Search towards each wrong class in turn, the likeliest first: exact if linear."""
        ball, n_wrong = search.all_balls, search.n_wrong_classes()
        for sets in _ways_to_round(ball):
            search.all_balls = sets
            for rank in range(min(AIMED_CLASSES, n_wrong) if n_wrong > 1 else 0):
                if search.restart(rank):
                    self._descend(search, closest, 0, search.ball.X)
        search.all_balls = ball

    def _restart_nearby(
        self, search: Search, closest: Closest, generator: torch.Generator, n_searches: int
    ) -> None:
        """Search again from random points, and from half way from these to the closest."""
        # One for each: what it draws does not depend on who else is searched.
        for place, own in enumerate(spawned(generator, n_searches)):
            if search.restart():
                start = closest.random(search, own)
                if place % 2 == 1:
                    start = torch.lerp(start, closest.X_adv[search.active], 0.5)
                self._descend(search, closest, 2, start)

    def _restart_at_vertices(self, search: Search, closest: Closest, n_searches: int) -> None:
        """Search again where one feature alone has changed as far as what was found."""

        def keep(X_adv: Tensor, found: Tensor) -> None:
            closest.update(search, X_adv, found, search.ball.quick_distance(X_adv))

        nearer = partial(closest.ball, search)
        vertices = ranked_vertices(search, nearer, keep)
        for place in range(min(n_searches, vertices.shape[1])):
            if search.restart():
                start = vertex(nearer(), vertices[search.active, place])
                self._descend(search, closest, 2, start)

    def _descend(self, search: Search, closest: Closest, restart: int, X_adv: Tensor) -> None:
        """Approach the boundary once from one start; algorithm 1 of the paper."""
        is_aimed = search.target is not None
        n_steps = AIMED_STEPS if is_aimed else check_count("n_steps", self.n_steps)
        radii, slopes = self._radii_asked(search), Slopes(search)
        is_local = restart > 1 and search.all_balls.has_few_features
        factor, power = self.LOCAL_STEP_SIZE if is_local else self.STEP_SIZES[self.norm]
        for step in range(n_steps):
            progress = step / n_steps if restart == 0 else 1.0
            found, value, gradient = search.gradient(X_adv, self._loss(search, progress))
            length, slope, moving = search.ball.in_blocks(_course, X_adv, gradient).unbind(1)
            if restart == step == 0:
                closest.clean[search.active] = found
            closest.update(search, X_adv, found, length)
            lead = value.to(found.dtype) if is_aimed else found
            if search.ball.rules is not None:
                lead = _past_ties(lead, closest.clean[search.active])
            radius = _newton(lead, length, slope, moving, closest.size[search.active])
            distance = closest.distance[search.active]
            if is_aimed or step >= SHARE_OF_STEPS[self.norm] * n_steps:
                search.done |= (radius > NEARER * distance) & ~closest.has_leapt(search.active)
            slopes.observe(slope)
            if radii is not None and step >= SHARES_OF_STEPS_TO_RADII[restart > 0] * n_steps:
                # Of a leap, the slope says too little.
                is_explained = closest.margin[search.active] <= slope * distance
                search.done |= slopes.are_steady() & is_explained & _is_far(radii, distance, radius)
            kept = search.drop(step)
            if kept is not None:
                X_adv, gradient, radius = X_adv[kept], gradient[kept], radius[kept]
                slopes.keep(kept)
            if len(X_adv) == 0:
                return
            radius = torch.minimum(radius, closest.distance[search.active])
            step_size = rows(factor * (1 - step / n_steps) ** power * radius, X_adv)
            X_adv = _ascend(search.ball, X_adv, gradient, radius, step_size)
        closest.update(search, X_adv, search.margin(X_adv), search.ball.quick_distance(X_adv))
        closest.approach(search)

    def _radii_asked(self, search: Search) -> Tensor | None:
        """Return the radii that alone matter, in rising order; None if all do."""
        if self.radii is None or search.all_balls.has_few_features:
            return None
        return torch.from_numpy(check_radii("radii", self.radii)).to(search.ball.X)

    def _loss(self, search: Search, progress: float) -> LossAndSlope:
        if search.target is not None:
            return partial(value_and_slope, targeted_margin, y=search.y, target=search.target)
        hot, cold = self.TEMPERATURES
        temperature = hot * (cold / hot) ** progress
        return partial(value_and_slope, soft_margin, y=search.y, temperature=temperature)


def _ways_to_round(ball: Ball) -> list[Ball]:
    """Return the sets to search: where there are whole numbers, with each way to round them.

    To the nearest, towards X, and not at all; which is closest in the end depends.
    """
    if ball.rules is None or not bool(ball.rules.is_whole.any()):
        return [ball]
    return [ball, replace(ball, stays_closer=True), ball.with_whole_fixed()]


def _is_far(radii: Tensor, distance: Tensor, radius: Tensor) -> Tensor:
    """Tell where the boundary is, to first order at `radius`, far from the next of the radii.

    That is the largest below the distance found, or 0.
    """
    below = torch.cat([radii.new_zeros(1), radii])[torch.searchsorted(radii, distance)]
    return distance.isfinite() & (radius > BEYOND * below)


def _past_ties(found: Tensor, clean: Tensor) -> Tensor:
    """Return margins, those of 0 as a share below it: there the next whole number is to be tried.

    Rounding would take a radius that is larger by a hair back to the same point.
    """
    size = clean.abs()
    is_tie = (found <= 0) & (found > -TIE * size)
    return torch.where(is_tie, -LEAP * size, found)


def _newton(found: Tensor, length: Tensor, slope: Tensor, moving: Tensor, size: Tensor) -> Tensor:
    """Return the radius at which the largest margin is 0 to first order (equation 5).

    Of a perturbation of this length only a part, of length `moving`, is not stuck at bounds, and
    changes with the radius: along it, `slope` is that of the margin. Where the model is fooled
    the radius falls by no more than half, so that a flat margin cannot send it back to 0.
    """
    limits = torch.finfo(length.dtype)
    stuck = (length - moving).relu_().mul_(length + moving).sqrt_()
    moved = (moving - found / slope.clamp(min=limits.tiny)).clamp_(min=0.0)
    radius = torch.maximum(torch.hypot(stuck, moved), length / 2)
    # On a plateau the boundary is nowhere near to first order: do not leave the data for it.
    farthest = FARTHER * torch.maximum(length, FIRST * size)
    radius = torch.minimum(radius, torch.where(farthest > 0, farthest, torch.inf))
    # On a linear model that is the boundary itself, so go across by a hair: by more than
    # the rounding error of X + δ.
    radius = (1 + OVERSHOOT) * radius + 4 * limits.eps * size
    return radius.clamp(max=limits.max**0.5 / 16)


def _course(ball: Ball, X_adv: Tensor, gradient: Tensor) -> Tensor:
    """Return how far points are, how fast the margin climbs from there, and along how much.

    As columns: the length of the perturbation; the dual length of the gradient over the features
    that the box lets follow it; and, under l2, the length over these. Under linf categories are
    none of them: all change at one radius, at which the margin leaps.
    """
    delta = X_adv - ball.X
    length = ball.length_of(delta)
    if ball.box is None:
        return torch.stack([length, dual_length(ball, gradient), length], dim=1)
    is_open = open_features(ball, X_adv, gradient)
    if ball.norm == "linf" and ball.rules is not None and ball.rules.groups:
        is_open.flatten(1)[:, torch.cat(ball.rules.groups)] = 0.0
    moving = ball.length_of(delta.mul_(is_open)) if ball.norm == "l2" else length
    return torch.stack([length, dual_length(ball, is_open.mul_(gradient)), moving], dim=1)


def _ascend(
    ball: Ball, X_adv: Tensor, gradient: Tensor, radius: Tensor, step_size: Tensor
) -> Tensor:
    """Return the next iterate, inside the ball of this radius up to rounding."""
    if ball.norm == "linf":
        return ball.in_blocks(_ascend_linf, X_adv, gradient, radius, step_size)
    if ball.norm == "l1":  # whose step starts inside
        length = ball.quick_distance(X_adv)
        share = radius / torch.maximum(length, radius).clamp(min=torch.finfo(length.dtype).tiny)
        X_adv = torch.lerp(ball.X, X_adv, rows(share, X_adv))
    X_adv = ascend(ball.with_radius(radius), X_adv, gradient, step_size)
    # What rounding leaves outside the box is moved before it is judged, not after.
    return X_adv if ball.box is None else X_adv.clamp_(*ball.box)


def _ascend_linf(
    ball: Ball, X_adv: Tensor, gradient: Tensor, radius: Tensor, step_size: Tensor
) -> Tensor:
    """Ascend without building the box of this radius, which took as long as the model."""
    assert ball.box is not None
    reach = rows(radius, X_adv) if ball.scale is None else rows(radius, X_adv) * ball.scale
    delta = (X_adv - ball.X).addcmul_(steepest(ball, gradient), step_size)
    torch.minimum(delta, reach, out=delta)
    torch.maximum(delta, -reach, out=delta)
    return delta.add_(ball.X).clamp_(*ball.box)
