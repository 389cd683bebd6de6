"""Perturbation sets: random starts, projection, membership with no tolerance.

Everything is row by row: a sample is a row, its features may have any shape. A feature
scale s turns the constraint into ‖delta / s‖ <= eps, so all of it is computed in the
scaled coordinates u = delta / s. Features of scale 0 are held fixed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from skjacobian._validation import check_non_negative, check_option, reject
from skjacobian.norms import rows, vector_norm
from skjacobian.projections import project_l1, project_l1_box, project_l2_box
from skjacobian.random_points import draws_for, in_unit_ball, uniform_rows
from skjacobian.validity import Box, PassThrough, Rules, valid_range, without_missing

BALL_NORMS = ("l2", "linf", "l1")

# Up to so many features that may change X is like a table: queries are cheap, a single sample
# counts for more, and gradients miss more.
FEW_FEATURES = 100
# Numbers of one tensor in a block of rows that the caches of a CPU hold, with others like it.
NUMBERS_IN_BLOCK = 2**16
# A radius beyond all data.
LARGEST_RADIUS = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Ball:
    """The perturbed samples that an adversary may choose, one set per row.

    {x : ‖(x - X) / scale‖ <= eps, low <= x <= high}. Make one with `Ball.around`.

    Attributes
    ----------
    X : Tensor of shape (n_samples, *features)
        The clean samples, the centers; 0 where a value is missing.
    norm : {"l2", "linf", "l1"}
    eps : float or Tensor of shape (n_samples, 1, ...)
    scale : Tensor or None
        Feature scale, in the shape of one sample; None is 1.
    box : Box or None
        Sides of shape (n_samples, *features); for linf it already holds the ball.
    u_box : Box or None
        For l1 and l2 the box around the origin of the scaled coordinates, its sides of shape
        (n_samples, n_features).
    rules : Rules or None
        What makes a sample valid. The attacks search the convex set; `valid` tells which
        samples its points stand for.
    missing : Tensor of bool of shape (n_samples, *features) or None
        Where the samples have no value, which stays so.
    stays_closer : bool
        Whether the valid sample of a point may be no farther from X than the point is.
    """

    X: Tensor
    norm: str
    eps: float | Tensor
    scale: Tensor | None
    box: Box | None
    u_box: Box | None = None
    rules: Rules | None = None
    missing: Tensor | None = None
    stays_closer: bool = False

    @classmethod
    def around(
        cls,
        X: Tensor,
        *,
        norm: str,
        eps: float | Tensor,
        scale: Tensor | None = None,
        bounds: tuple[Tensor, Tensor] | None = None,
        rules: Rules | None = None,
    ) -> "Ball":
        """Build the sets around the rows of `X`.

        Parameters
        ----------
        X : Tensor of shape (n_samples, *features)
        norm : {"l2", "linf", "l1"}
        eps : float or Tensor of shape (n_samples,)
            Radius, in the units of `X` over `scale`.
        scale : Tensor or None
            As `threat_model.resolve_feature_scale` returns it.
        bounds : pair of Tensor or None
            As `threat_model.resolve_bounds` returns it; `X` lies inside.
        rules : Rules or None
            As `FeatureConstraints.resolve` returns them.

        Examples
        --------
        >>> import torch
        >>> ball = Ball.around(torch.zeros(1, 2), norm="linf", eps=0.5)
        >>> ball.project(torch.tensor([[1.0, -0.25]]))
        tensor([[ 0.5000, -0.2500]])
        """
        check_option("norm", norm, BALL_NORMS)
        # The square of the radius must be finite; beyond this it makes no difference.
        most = torch.finfo(X.dtype).max ** 0.5 / 16
        if isinstance(eps, Tensor):
            if eps.shape not in ((), X.shape[:1]):
                reject("eps", eps, f"one radius, or one for each of {len(X)} samples")
            eps = eps.to(X).clamp(max=most)
        else:
            eps = min(check_non_negative("eps", eps), most)
        X, missing = without_missing(X)
        box = valid_range(X, bounds, rules, missing)
        eps = rows(eps, X) if isinstance(eps, Tensor) else eps
        ball = cls(X, norm, eps, scale, box, rules=rules, missing=missing)
        return ball._with_linf_box() if norm == "linf" else ball._with_scaled_box()

    def _with_linf_box(self) -> "Ball":
        """Intersect the box with the linf ball, rounded inward so that it is never left."""
        radius = self._rounded_inward(self._radius())
        if self.rules is not None:
            radius = torch.where(self.rules.is_whole, self._whole_radius(), radius)
        low, high = self.X - radius, self.X + radius
        if self.box is not None:
            torch.maximum(low, self.box.low, out=low)
            torch.minimum(high, self.box.high, out=high)
        box = Box(low, high)
        return replace(self, box=self.rules.without_shut_groups(box, self.X) if self.rules else box)

    def _with_scaled_box(self) -> "Ball":
        """Add the box in scaled coordinates, once for all projections."""
        if self.box is None:
            return self
        return replace(self, u_box=self.box.map(lambda side: self.to_scaled(side - self.X)))

    def to_scaled(self, delta: Tensor) -> Tensor:
        """Return u = delta / scale as rows, 0 where the feature is held fixed."""
        if self.scale is None:
            return delta.flatten(1)
        return torch.where(self.scale > 0, delta / self.scale, 0.0).flatten(1)

    def length_of(self, delta: Tensor) -> Tensor:
        """Return ‖delta / scale‖ of each row, in the precision of the samples."""
        return vector_norm(self.to_scaled(delta), self.norm)

    def from_scaled(self, u: Tensor) -> Tensor:
        """Return X + u * scale, for rows u."""
        delta = u.reshape(self.X.shape)
        return self.X + (delta if self.scale is None else delta * self.scale)

    def eps_within_rounding(self) -> float | Tensor:
        """Return eps, in a shape that broadcasts over rows of features, short of it by rounding.

        So that `enforce` leaves most points alone: those it moves must be judged again.
        """
        eps = self.eps.flatten(1) if isinstance(self.eps, Tensor) and self.eps.ndim else self.eps
        return eps * (1 - 8 * torch.finfo(self.X.dtype).eps)

    def _radius(self) -> float | Tensor:
        """Return eps, per feature where there is a scale, a few ulps short of it."""
        shortened = self.eps * (1 - 4 * torch.finfo(self.X.dtype).eps)
        return shortened if self.scale is None else shortened * self.scale

    def _whole_radius(self) -> Tensor:
        """Return the largest whole number n with n / scale <= eps."""
        scale = 1.0 if self.scale is None else self.scale.double()
        eps = torch.as_tensor(self.eps, dtype=torch.float64, device=self.X.device)
        n = (eps * scale).round()
        return torch.where(self._over(n, scale) <= eps, n, n - 1).clamp(min=0.0).to(self.X)

    def _over(self, delta: Tensor, scale: float | Tensor) -> Tensor:
        """Return delta / scale, 0 for no change of a feature that is held fixed."""
        return torch.where(delta == 0, 0.0, delta / scale)

    def _rounded_inward(self, distance: float | Tensor) -> Tensor:
        """Shorten distances from X by the rounding error that adding them to X can make.

        |fl(x + d) - x| <= |d| + u (|x| + |d|) with u = eps/2, so d shortened by 2u|x| lands
        within the distance asked for, whatever the direction of rounding.
        """
        rounding = self.X.abs().mul_(-torch.finfo(self.X.dtype).eps)
        return rounding.add_(distance).clamp_(min=0.0)

    def _scaled(self, X_adv: Tensor) -> Tensor:
        """Return (X_adv - X) / scale in float64."""
        delta = self._present(X_adv).to(torch.float64, copy=True).sub_(self.X)
        if self.scale is None:
            return delta
        # A feature held fixed (scale 0) is at distance 0, and infinitely far once moved.
        return self._over(delta, self.scale.double())

    def _present(self, X_adv: Tensor) -> Tensor:
        """Return `X_adv` with 0 in the place of what is missing in the clean samples."""
        return X_adv if self.missing is None else torch.where(self.missing, 0.0, X_adv)

    def __getitem__(self, index: Tensor | slice) -> "Ball":
        """Return the sets of the chosen rows."""
        eps = self.eps
        return Ball(
            self.X[index],
            self.norm,
            eps[index] if isinstance(eps, Tensor) and eps.ndim else eps,
            self.scale,
            None if self.box is None else self.box.of(index),
            None if self.u_box is None else self.u_box.of(index),
            rules=self.rules,
            missing=None if self.missing is None else self.missing[index],
            stays_closer=self.stays_closer,
        )

    def with_radius(self, radius: Tensor) -> "Ball":
        """Return the sets of radius at most `radius`, shape (n_samples,), inside these."""
        most = self.radii()
        if isinstance(most, Tensor):
            eps = torch.minimum(radius, most.to(radius))
        else:  # a number, whose copy would wait for an accelerator
            eps = radius.clamp(max=most)
        ball = replace(self, eps=rows(eps, self.X))
        return ball._with_linf_box() if self.norm == "linf" else ball

    def distance(self, X_adv: Tensor) -> Tensor:
        """Return ‖(X_adv - X) / scale‖ of each row, in float64, shape (n_samples,)."""
        return vector_norm(self._scaled(X_adv), self.norm)

    def quick_distance(self, X_adv: Tensor) -> Tensor:
        """Return the distance of each row in the precision of the samples."""
        return self.in_blocks(lambda sets, points: sets.length_of(points - sets.X), X_adv)

    def contains(self, X_adv: Tensor) -> Tensor:
        """Tell of each row whether it lies inside ball and box, with no tolerance."""
        X_adv = self._present(X_adv)
        inside = self.distance(X_adv) <= self.radii()
        return inside if self.box is None else inside & self.box.contains(X_adv)

    def radii(self) -> float | Tensor:
        """Return the radius, one number or a tensor of shape (n_samples,)."""
        return self.eps.flatten() if isinstance(self.eps, Tensor) else self.eps

    def valid(self, X_adv: Tensor) -> Tensor:
        """Return the valid samples that points of the sets stand for; gradients pass through.

        Missing values are put back.
        """
        if self.rules is None and self.missing is None:
            return X_adv
        valid = self.nearest_valid(X_adv.detach())
        if self.missing is not None:
            valid = torch.where(self.missing, torch.nan, valid)
        passed: Tensor = PassThrough.apply(X_adv, valid, self.missing)  # type: ignore[no-untyped-call]
        return passed

    def with_whole_fixed(self) -> "Ball":
        """Return the sets in which whole numbers and categories stay as they are."""
        assert self.rules is not None
        assert self.box is not None
        whole = self.rules.is_whole
        box = self.box.map(lambda side: torch.where(whole, self.X, side))
        ball = replace(self, box=box)
        return ball if self.norm == "linf" else ball._with_scaled_box()

    def nearest_valid(self, X_adv: Tensor) -> Tensor:
        """Return the nearest valid samples that are not too far from X, 0 where a value misses.

        Nearest is best, where that is no farther from X than eps (not with `stays_closer`) or
        than the point itself; then whole numbers on the way to X; then the nearest with the
        categories of X; then whole numbers on the way to X with these.
        """
        if self.rules is None:
            return X_adv
        limit = self.distance(X_adv)
        if not self.stays_closer:
            limit = limit.clamp(min=self.radii())
        nearest = self.rules.nearest(X_adv)
        kept = self.rules.with_groups_of(self.X, nearest)
        valid = self.rules.toward(self.X, X_adv)
        between = self.rules.with_groups_of(nearest, valid)
        for better in (kept, between, nearest) if self.rules.groups else (kept, nearest):
            valid = torch.where(rows(self._reaches(better, limit), valid), better, valid)
        return valid

    def _reaches(self, X_adv: Tensor, limit: Tensor) -> Tensor:
        """Tell of each row whether it lies in the box, within a distance of X."""
        assert self.box is not None
        return self.box.contains(X_adv) & (self.distance(X_adv) <= limit)

    def random_start(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a perturbation of each row uniformly from its ball, then move it into the box.

        That is the nearest point of the set: it comes no farther from X than it was.

        Rows with equal values get equal starts, so that a sample of weight 2 acts like two
        samples, and the start of a row does not depend on the batch that it comes in.
        """
        draws = draws_for(self.X, generator)
        return self.in_blocks(lambda sets, _: sets._random_points(draws), self.X)

    def _random_points(self, draws: Tensor) -> Tensor:
        """Return the points of the sets that follow from what all rows share."""
        uniform = uniform_rows(self.X, draws)
        free = self.free_features()
        all_free = len(free) == uniform.shape[1] - 1
        if len(free) == 0:
            return self.X
        if not all_free:  # the ball is of these alone
            uniform = torch.cat([uniform[:, :1], uniform[:, 1 + free]], dim=1)
        unit = in_unit_ball(uniform, self.norm)
        if not all_free:
            unit = torch.zeros_like(self.X.flatten(1)).index_copy(1, free, unit)
        delta = unit.reshape(self.X.shape).mul_(self.eps)
        start = (delta if self.scale is None else delta.mul_(self.scale)).add_(self.X)
        return start if self.box is None else start.clamp_(*self.box)

    def free_features(self) -> Tensor:
        """Return the indices of the flattened features whose scale is not 0."""
        if self.scale is None:
            return torch.arange(self.X.shape[1:].numel(), device=self.X.device)
        return self.scale.expand(self.X.shape[1:]).flatten().nonzero().squeeze(1)

    def of_free(self, gradient: Tensor) -> Tensor:
        """Return a gradient with 0 at the features of scale 0, where it may be infinite."""
        return gradient if self.scale is None else torch.where(self.scale > 0, gradient, 0.0)

    @property
    def has_few_features(self) -> bool:
        """Whether few features may change, as in a table."""
        return len(self.free_features()) <= FEW_FEATURES

    def project(self, X_adv: Tensor) -> Tensor:
        """Return the nearest point of each set (in scaled coordinates), up to rounding."""
        if self.norm == "linf":
            assert self.box is not None
            return torch.clamp(X_adv, *self.box)
        return self.in_blocks(Ball._projected, X_adv)

    def _projected(self, X_adv: Tensor) -> Tensor:
        u, eps = self.to_scaled(X_adv - self.X), self.eps_within_rounding()
        if self.u_box is not None:
            project = project_l1_box if self.norm == "l1" else project_l2_box
            u = project(u, eps, *self.u_box)
        elif self.norm == "l1":
            u = project_l1(u, eps)
        else:
            length = torch.linalg.vector_norm(u, dim=1, keepdim=True)
            u = u * (eps / length.where(length > 0, 1.0)).clamp(max=1.0)
        return self.from_scaled(u)

    def enforce(self, X_adv: Tensor) -> Tensor:
        """Return `X_adv` with every row exactly inside, moved by rounding errors at most.

        `project` is exact up to the rounding of its dtype; this is exact in the sense of
        `contains`: no tolerance, the norm computed in float64.
        """
        if self.norm == "linf":
            assert self.box is not None
            return torch.clamp(X_adv, *self.box)
        return self.in_blocks(Ball._moved_inside, X_adv)

    def _moved_inside(self, X_adv: Tensor) -> Tensor:
        delta = X_adv - self.X
        length = rows(self.distance(X_adv), delta)
        slack = 4 * torch.finfo(self.X.dtype).eps
        if self.norm == "l1":  # whose sum, in float64, may round by this much
            slack += torch.finfo(torch.float64).eps * self.X.shape[1:].numel()
        limit = self.eps * (1 - slack)
        # Who is inside stays: a point just across the decision boundary must not be moved.
        is_outside = length > limit
        if not is_nowhere(is_outside):
            shrink = (limit / length.clamp(min=1e-300)).clamp(max=1.0)
            delta = delta * shrink.to(delta.dtype)
            moved = self.X + delta.sign() * self._rounded_inward(delta.abs())
            X_adv = moved.where(is_outside, X_adv)
        return X_adv if self.box is None else X_adv.clamp(*self.box)

    def in_blocks(self, change: Callable[..., Tensor], X_adv: Tensor, *more: Any) -> Tensor:
        """Change points block by block: of images, on the CPU, in two thirds of the time.

        The steps in between are as large as the points, and stay in the caches. Of `more`,
        which `change` takes too, tensors have a row for each point.
        """
        n_rows = max(1, NUMBERS_IN_BLOCK // max(1, X_adv.shape[1:].numel()))
        if X_adv.is_cuda or len(X_adv) <= n_rows:
            return change(self, X_adv, *more)
        blocks = [slice(start, start + n_rows) for start in range(0, len(X_adv), n_rows)]
        return torch.cat(
            [
                change(self[block], *(_of_block(v, block) for v in (X_adv, *more)))
                for block in blocks
            ]
        )


def is_nowhere(condition: bool | Tensor) -> bool:
    """Tell whether a condition holds for no row; not of a card, which would wait to be asked."""
    if isinstance(condition, Tensor):
        return not condition.is_cuda and not bool(condition.any())
    return not condition


def _of_block(value: Any, block: slice) -> Any:
    return value[block] if isinstance(value, Tensor) and value.ndim else value
