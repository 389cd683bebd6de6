"""The state of a search for short fooling rays, and its moves, each by decisions alone."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from skjacobian.attacks._search import Search
from skjacobian.norms import rows, unit_rows, vector_norm
from skjacobian.validity import Box, valid_range


class Rays:
    """The shortest fooling ray known of each active sample, in scaled coordinates.

    Attributes
    ----------
    u : Tensor of shape (n_active, n_free)
        Its direction, of norm 1, over the features that may move.
    r : Tensor of shape (n_active, 1)
        A radius at which it fools; infinite while none is known.
    lo : Tensor of shape (n_active, 1)
        A radius at which it does not; 0 while none is known.
    goal : Tensor of shape (n_active, 1)
        A radius at which it is short enough: eps, or 0 for the shortest.
    left : int
        Queries left to each sample. All samples spend theirs in the same steps and by the
        same random numbers, so that none depends on what else is in its batch.
    """

    # Radii are searched to this relative precision; a new direction must gain as much.
    TOLERANCES: ClassVar[dict[str, float]] = {"linf": 0.002, "l2": 0.02, "l1": 0.01}
    # Queries about random directions alone, before the best of them is improved.
    N_STARTS = 25
    # Radii of the first directions: from eps, or a share of the norm of the sample where the
    # shortest ray is looked for, to 1.5⁴⁷ = 2e8 times as much, then again.
    GROWTH, N_GROWTHS = 1.5, 48
    FIRST = 1 / 256
    # For linf: of so many features all 1,024 corners are soon tried.
    FEW_FOR_CORNERS = 10
    # For l2: queries before the first estimate of a normal, and between two of them, of many
    # features and of few: trees are looked at along few features in between.
    FIRST_CLIMB, REST, REST_OF_FEW = 80, 3, 30
    # Decisions in the first estimate; √t times as many in the t-th, as HopSkipJump has it.
    N_DECISIONS, N_BISECTIONS = 30, 8

    PER_SAMPLE = ("start", "eps", "goal", "first", "u", "r", "lo", "stride", "noise", "n_probes")

    def __init__(
        self,
        search: Search,
        bounds: tuple[Tensor, Tensor] | None,
        generator: torch.Generator,
        budget: int,
        *,
        minimal: bool = False,
    ) -> None:
        self.search, self.generator, self.left = search, generator, budget
        self.tolerance = self.TOLERANCES[search.ball.norm]
        X, scale = search.ball.X, search.ball.scale
        scale = torch.ones(X.shape[1:]).to(X) if scale is None else scale.expand(X.shape[1:])
        self.free = search.ball.free_features()
        self.scale = scale.flatten()[self.free]
        self.start = X.flatten(1)[:, self.free]
        box = valid_range(X, bounds, search.ball.rules, search.ball.missing)
        box = box or Box(X - torch.inf, X + torch.inf)
        self.box = box.map(lambda side: side.flatten(1)[:, self.free])
        eps = torch.as_tensor(search.ball.eps, dtype=X.dtype, device=X.device)
        self.eps = eps.reshape(-1, 1).expand(len(X), 1)
        self.goal = self.first = self.eps
        if minimal and len(self.free) > 0:
            size = self._length(self.start / self.scale)
            self.goal = torch.zeros_like(self.eps)
            self.first = self.FIRST * size.where(size > 0, 1.0)
        self.u = torch.zeros_like(self.start)
        self.r = torch.full_like(self.eps, torch.inf)
        self.lo = torch.zeros_like(self.r)
        # The share of r by which the next query along the ray is nearer, while lo is 0.
        self.stride = torch.full_like(self.r, 0.5)
        self.noise = torch.full_like(self.r, 0.5)
        self.n_probes = torch.zeros_like(self.r, dtype=torch.long)
        self.blocks = _halved_blocks(len(self.free)).to(X.device)
        self.has_few = search.ball.has_few_features
        self.n_steps = self.n_climbs = 0
        self.next_climb = self.FIRST_CLIMB if search.ball.norm == "l2" else budget

    def drop(self) -> bool:
        """Drop the samples that are done; tell whether any are left, and can move."""
        kept = self.search.drop(self.n_steps)
        if kept is not None:
            for name in self.PER_SAMPLE:
                setattr(self, name, getattr(self, name)[kept])
            self.box = self.box.of(kept)
        return self.start.numel() > 0

    def ask_clean(self) -> None:
        """Ask about the clean samples: there is nothing to search for those misclassified."""
        X = self.search.ball.X
        found = self.search.margin(X)
        self.search.done |= (found > 0) | (self.eps.squeeze(1) == 0)
        self.search.record(X, found, self.search.done)
        self.left -= 1

    def finish(self) -> None:
        """Record where the shortest rays fool, or leave the ball, for the samples not done."""
        fooling = self.r <= self.eps
        X_adv, found, _ = self._margin(self.u * torch.where(fooling, self.r, self.eps))
        self.search.record(X_adv, found, ~self.search.done)

    def _ask(self, U: Tensor) -> tuple[Tensor, Tensor]:
        """Tell at which of the points X + scale·U, clipped to the box, the model is fooled.

        Returns
        -------
        Tensor of bool of shape (n_active, 1)
        Tensor of shape (n_active, n_free)
            U, clipped.
        """
        X_adv, found, U = self._margin(U)
        fools = (found > 0).unsqueeze(1)
        success = (fools & self._is_within(self.goal, U)).squeeze(1) & ~self.search.done
        self.search.record(X_adv, found, success)
        self.search.done |= success
        return fools, U

    def _margin(self, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return points X + scale·U, clipped to the box, their margins and U, clipped.

        Points inside the ball, up to rounding, are put exactly inside before it is asked.
        """
        ball = self.search.ball
        moved = (self.start + U * self.scale).clamp(*self.box).to(ball.X.dtype)
        X_adv = ball.X.flatten(1).index_copy(1, self.free, moved).reshape(ball.X.shape)
        U = (moved - self.start) / self.scale
        inside = rows(self._is_within(self.eps, U).squeeze(1), X_adv)
        X_adv = torch.where(inside, ball.enforce(X_adv), X_adv)
        self.left -= 1
        return X_adv, self.search.margin(X_adv), U

    def _is_within(self, radius: Tensor, U: Tensor) -> Tensor:
        return self._length(U) <= radius * (1 + 1e-5)

    def _length(self, U: Tensor) -> Tensor:
        return vector_norm(U, self.search.ball.norm).unsqueeze(1)

    def step(self) -> None:
        """Ask once about each sample: start, search along its ray, or probe another ray."""
        known = self.r < torch.inf
        starting = ~known | (self.n_steps < self.N_STARTS)
        probing = ~starting & (self.r - self.lo <= self.tolerance * self.r)
        along = ~starting & ~probing
        proposed, probed = self._proposed_ray()
        u = torch.where(probing, proposed, self.u)
        u = torch.where(starting, self._random_direction(), u)
        radius = torch.where(probing, probed, self._radius(known, starting))
        radius = torch.maximum(radius, self.goal)
        fools, U = self._ask(u * radius)

        fresh = fools & ~along
        self._move(fools, u, radius, U)
        self.lo = torch.where(fresh, 0.0, torch.where(along & ~fools, radius, self.lo))
        first = torch.where(starting, 0.5, 2 * self.tolerance)
        further = torch.where(along & fools, (2 * self.stride).clamp(max=0.5), self.stride)
        self.stride = torch.where(fresh, first, further)
        adapted = torch.where(fools, 1.5 * self.noise, 0.97 * self.noise).clamp(0.01, 1.0)
        self.noise = torch.where(probing, adapted, self.noise)
        self.n_probes += probing
        self.n_steps += 1

    def _radius(self, known: Tensor, starting: Tensor) -> Tensor:
        """Return where to ask along a ray, or in a first direction."""
        nearer = torch.where(self.lo > 0, (self.lo + self.r) / 2, self.r * (1 - self.stride))
        growing = self.first * self.GROWTH ** (self.n_steps % self.N_GROWTHS)
        return torch.where(starting, torch.where(known, 0.8 * self.r, growing), nearer)

    def _move(self, chosen: Tensor, u: Tensor, radius: Tensor, U: Tensor) -> None:
        """Make the points U, which radius·u was clipped to, the rays of the chosen samples."""
        if self.search.ball.norm != "linf":  # whose clipped features keep their size, to be flipped
            radius = self._length(U)
            u = U / radius.clamp(min=torch.finfo(U.dtype).tiny)
        self.u, self.r = torch.where(chosen, u, self.u), torch.where(chosen, radius, self.r)

    def _random(self) -> Tensor:
        """Draw a normal number for each feature, on the CPU for every device."""
        draws = torch.randn(len(self.free), generator=self.generator, dtype=torch.float64)
        return draws.to(self.u)

    def _random_direction(self) -> Tensor:
        """Return a direction of norm 1 for each sample, which may lean to one side.

        A feature at its bound points away from it, where it can move.
        """
        lean = torch.randn((), generator=self.generator, dtype=torch.float64).to(self.u)
        u = (self._random() + lean).expand_as(self.u)
        if self.search.ball.norm == "linf" or self.n_steps % 2:
            u = u.sign()
        stuck = torch.where(u > 0, self.box.high <= self.start, self.box.low >= self.start)
        u = torch.where(stuck, -u, u)
        return u / self._length(u).clamp(min=torch.finfo(u.dtype).tiny)

    def _proposed_ray(self) -> tuple[Tensor, Tensor]:
        """Return another direction and a smaller radius for each sample, in one of the ways."""
        radius = self.r * (1 - self.tolerance)
        if self.search.ball.norm == "linf":
            return self._proposed_in_box(radius)
        n_ways = 4 if self.has_few else 2
        way, turn = self.n_probes % n_ways, self.n_probes // n_ways
        block = self._block(turn)
        length = torch.linalg.vector_norm(self.u, dim=1, keepdim=True)
        noisy = self.u + self.noise * length * unit_rows(self._random() * block)
        u = torch.where(way == 0, torch.where(block, 0.0, self.u), noisy)
        if self.has_few:
            shrunk = torch.where(block, self._share() * self.u, self.u)
            u = torch.where(way == 2, self._sparse_direction(), torch.where(way == 3, shrunk, u))
            # The others stay where they are: beyond the thresholds of a tree.
            alone = torch.minimum(radius, self.r * self._length(shrunk))
            radius = torch.where(way == 3, alone, radius)
        return u / self._length(u).clamp(min=torch.finfo(u.dtype).tiny), radius

    def _proposed_in_box(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same for linf: other corners, and of few features what lies between them.

        There neighbours have pockets, that all corners pass by.
        """
        if len(self.free) > self.FEW_FOR_CORNERS:
            return torch.where(self._block(self.n_probes), -self.u, self.u), radius
        way, turn = self.n_probes % 4, self.n_probes // 2
        corner = torch.where(self.u < 0, -1.0, 1.0).to(self.u)
        stays = (way == 2) & (corner != self.u).any(1, keepdim=True)
        flipped = torch.where(self._block(turn) & ~stays, -corner, corner)
        between = torch.where(way == 1, self._random(), self._sparse_direction())
        u = torch.where(way % 2 == 0, flipped, between / self._length(between))
        return u, torch.where(way == 1, self._share() * radius, radius)

    def _share(self) -> Tensor:
        """Draw a number from 0 to 1, on the CPU for every device."""
        return torch.rand((), generator=self.generator, dtype=torch.float64)

    def _sparse_direction(self) -> Tensor:
        """Return a direction in which few features change, which trees are weakest against."""
        share = self._share() ** 3
        order = torch.randperm(len(self.free), generator=self.generator).to(self.u.device)
        n_changed = max(1, math.ceil(float(share) * len(self.free)))
        return self._random() * (order < n_changed)

    def _block(self, turn: Tensor) -> Tensor:
        """Return the features of a block for each sample: ever smaller ones, then random sets."""
        n_features = len(self.free)
        share = self._share() ** 3
        uniform = torch.rand(n_features, generator=self.generator, dtype=torch.float64)
        at_random = (uniform < share.clamp(min=1.5 / n_features)).to(self.u.device)
        first, last = self.blocks[turn.clamp(max=len(self.blocks) - 1).squeeze(1)].unbind(1)
        index = torch.arange(n_features, device=self.u.device)
        in_turn = (index >= first.unsqueeze(1)) & (index < last.unsqueeze(1))
        return torch.where(turn < len(self.blocks), in_turn, at_random)

    def is_time_to_climb(self) -> bool:
        """Tell whether to estimate the normal of the boundary now, and queries suffice."""
        n_queries = self._n_decisions() + self.N_BISECTIONS + 1
        return self.n_steps >= self.next_climb and n_queries < self.left

    def _n_decisions(self) -> int:
        return int(self.N_DECISIONS * math.sqrt(self.n_climbs + 1))

    def climb(self) -> None:
        """Estimate the normal v of the boundary at r·u, and follow a circle towards it.

        The points r·cos(θ)·(cos(θ)·u + sin(θ)·v), v orthogonal to u, lie on the circle
        whose diameter is the ray. Where the boundary is a plane, the nearest of its points
        that is in the plane of u and v is where the circle crosses it.
        """
        known = self.r < torch.inf
        r = torch.where(known, self.r, 1.0)
        v = self._normal(r * self.u, r / math.sqrt(len(self.free)))
        v = unit_rows(v - (v * self.u).sum(1, keepdim=True) * self.u)

        near, far = torch.zeros_like(r), (self.goal / r).clamp(max=1.0).acos()
        nearest, angle = r * self.u, far
        for _ in range(self.N_BISECTIONS + 1):
            fools, U = self._ask(r * angle.cos() * (angle.cos() * self.u + angle.sin() * v))
            nearest = torch.where(fools, U, nearest)
            near, far = torch.where(fools, angle, near), torch.where(fools, far, angle)
            angle = (near + far) / 2
        turned = known & (near > 0)
        self._move(turned, self.u, self.r, nearest)
        self.lo = torch.where(turned, 0.0, self.lo)
        self.stride = torch.where(turned, 2 * self.tolerance, self.stride)
        self.n_climbs += 1
        self.next_climb = self.n_steps + (self.REST_OF_FEW if self.has_few else self.REST)

    def _normal(self, U: Tensor, distance: Tensor) -> Tensor:
        """Estimate the normal at U from decisions at a distance, up to its length.

        Σ (φ_b - mean φ) w_b over random directions w_b, with φ_b = ±1 as the model is fooled
        or not (HopSkipJump, arXiv 1904.02144).
        """
        weighted, unweighted, total = torch.zeros_like(U), torch.zeros_like(U), 0.0 * distance
        n_decisions = self._n_decisions()
        for _ in range(n_decisions):
            fools, moved = self._ask(U + distance * unit_rows(self._random().unsqueeze(0)))
            step, sign = moved - U, torch.where(fools, 1.0, -1.0).to(U.dtype)
            weighted, unweighted, total = weighted + sign * step, unweighted + step, total + sign
        one_sided = total.abs() == n_decisions
        return weighted - torch.where(one_sided, 0.0, total / n_decisions) * unweighted


def _halved_blocks(n_features: int) -> Tensor:
    """Return the (first, last + 1) of blocks: both halves of the features, then quarters, …"""
    size, blocks = -(-n_features // 2), []
    while size >= 1:
        blocks += [(i, min(i + size, n_features)) for i in range(0, n_features, size)]
        size = 0 if size == 1 else -(-size // 2)
    return torch.tensor(blocks, dtype=torch.long).reshape(-1, 2)
