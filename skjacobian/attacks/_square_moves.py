"""What the square attack proposes: which features it changes together, and how.

All samples of a batch share the draws of a step. Each of them searches by the law that it
would follow alone, so nothing is lost but the independence of their luck; in return a
change is a slice of the batch, taken back in place where it does not help.
"""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from skjacobian.geometry import Ball
from skjacobian.norms import rows

Place = tuple[slice | Tensor, ...]

ALL = slice(None)


class Moves:
    """Changes of the active samples, proposed one at a time.

    `cells` is a view of `X_adv`: (n, n_channels, height, width) for images, whose places
    are squares over all channels, and (n, n_features) for flat samples, whose places are
    random subsets of the features.
    """

    def __init__(self, ball: Ball) -> None:
        self.X_adv = ball.X.clone(memory_format=torch.contiguous_format)
        # On the CPU, where places are drawn.
        self.free = ball.free_features().cpu()
        self._take(ball)

    def _take(self, ball: Ball) -> None:
        """View the tensors of the ball, and of this, as cells."""
        self.X = as_cells(ball.X)
        self.cells = self.X_adv.view(self.X.shape)
        self.shape = tuple(self.X.shape[1:])
        self.is_flat = len(self.shape) == 1

    def start(self, generator: Generator) -> Tensor:
        """Return the first proposal, which is taken in any case."""
        raise NotImplementedError

    def propose(self, share: float, generator: Generator) -> Tensor:
        """Change about this share of the features in place, and return X_adv."""
        raise NotImplementedError

    def keep(self, better: Tensor) -> None:
        """Take the last proposal back in all samples but the `better`."""
        raise NotImplementedError

    def select(self, ball: Ball, kept: Tensor) -> None:
        """Keep the samples of these indices, around which `ball` now is."""
        self.X_adv = self.X_adv[kept]
        self._take(ball)


class CornerMoves(Moves):
    """Moves between the corners of the box that is linf ball and bounds in one."""

    # How often a single feature of a flat sample is put between its sides.
    IN_BETWEEN = 0.5

    def _take(self, ball: Ball) -> None:
        super()._take(ball)
        assert ball.box is not None
        self.box = ball.box.map(as_cells)

    def start(self, generator: Generator) -> Tensor:
        """Put each column of an image, or each feature, on a random side."""
        shape = self.shape if self.is_flat else (self.shape[0], 1, self.shape[2])
        up = random_signs(shape, generator).to(self.X) > 0
        self.cells.copy_(torch.where(up, self.box.high, self.box.low))
        return self.X_adv

    def propose(self, share: float, generator: Generator) -> Tensor:
        """Put a square on one side, or each feature of a subset on its other side."""
        self.place = place = draw_place(self.shape, share, generator, free=self.free)
        self.old = old = self.cells[place].clone()
        low, high = (side[place] for side in self.box)
        if self.is_flat:
            new = self._changed(old, low, high, generator)
        else:
            up = random_signs((self.shape[0], 1, 1), generator).to(self.X) > 0
            new = torch.where(up, high, low)
            # A square that is there already would waste the query.
            same = (new == old).flatten(1).all(1)
            new = torch.where(rows(same, new), torch.where(up, low, high), new)
        self.cells[place] = new
        return self.X_adv

    def _changed(self, old: Tensor, low: Tensor, high: Tensor, generator: Generator) -> Tensor:
        """Return the other side of each feature or, at times, a value in between.

        Between the sides the margin of trees may be larger than on both. For several
        features at once that leads networks away from the corners, where they are weakest.
        """
        if old.shape[1] == 1 and float(torch.rand((), generator=generator)) < self.IN_BETWEEN:
            middle = torch.rand(old.shape[1], generator=generator).to(old)
            return torch.clamp(low + (high - low) * middle, low, high)
        up = random_signs(old.shape[1:], generator).to(old) > 0
        side, other = torch.where(up, high, low), torch.where(up, low, high)
        return torch.where(old == side, other, side)

    def keep(self, better: Tensor) -> None:
        """Take the last proposal back in all samples but the `better`."""
        take_back(self.cells, self.place, self.old, better)


class MassMoves(Moves):
    """Moves of the perturbation's mass, ‖u‖_q^q, from one place to another (l1 and l2).

    `u` is (X_adv - X) / scale in the shape of `cells`, inside ball and box.
    """

    # Squares have a middle, and features of a subset share one sign only by chance.
    LEAST_SIDE = 3
    LEAST_FEATURES = 2
    # How often the mass of a subset of features is moved within it: where the best of a
    # table of few features spreads over all of them, emptying any of them cannot be better.
    WITHIN = 0.25

    def __init__(self, ball: Ball) -> None:
        self.q = 1 if ball.norm == "l1" else 2
        self.u = torch.zeros_like(as_cells(ball.X), memory_format=torch.contiguous_format)
        super().__init__(ball)

    def _take(self, ball: Ball) -> None:
        super()._take(ball)
        radii = ball.radii()
        self.eps = rows(radii, self.X) if isinstance(radii, Tensor) else radii
        self.scale = None if ball.scale is None else ball.scale.reshape(1, *self.shape)
        shape, u_box = self.X.shape, ball.u_box
        self.u_box = None if u_box is None else u_box.map(lambda side: side.reshape(shape))

    def select(self, ball: Ball, kept: Tensor) -> None:
        """Keep the samples of these indices, around which `ball` now is."""
        self.u = self.u[kept]
        super().select(ball, kept)

    def start(self, generator: Generator) -> Tensor:
        """Spread the mass evenly: random normals, or a mosaic of small patterns."""
        if self.is_flat:
            pattern = torch.randn((1, *self.shape), generator=generator)
        else:
            pattern = mosaic(self.shape, generator).unsqueeze(0)
        whole = (ALL,) * self.X.ndim
        pattern = self._mutable(pattern.to(self.X), whole)
        self._set(whole, (self._unit(pattern) * self.eps).expand_as(self.u))
        return self.X_adv

    def propose(self, share: float, generator: Generator) -> Tensor:
        """Give the mass of two places to the first, changed by a random pattern."""
        target, source, pattern = self._draw(share, generator)
        old = self.u[target].clone()
        self.undo = [(source, self.u[source].clone()), (target, old)]
        self.u[source] = 0.0
        self.u[target] = 0.0
        elsewhere = self._mass(self.u)
        room = (self.eps**self.q - elsewhere).clamp(min=0.0) ** (1 / self.q)
        pattern = self._mutable(pattern.to(self.X).unsqueeze(0), target)
        self._show(source)
        self._set(target, self._unit(pattern + self._unit(old)) * room)
        return self.X_adv

    def _draw(self, share: float, generator: Generator) -> tuple[Place, Place, Tensor]:
        """Draw where mass goes, where it comes from, and the pattern that is added."""
        if self.is_flat:
            return self._draw_flat(share, generator)
        least = min(self.LEAST_SIDE, *self.shape[1:])
        target = draw_place(self.shape, share, generator, least)
        source = draw_place(self.shape, share, generator, least)
        side = target[-1].stop - target[-1].start  # type: ignore[union-attr]
        signs = random_signs((self.shape[0], 1, 1), generator)
        pattern = two_halves(side, generator) * signs
        return target, source, pattern / pattern.norm(self.q)

    def _draw_flat(self, share: float, generator: Generator) -> tuple[Place, Place, Tensor]:
        """Draw subsets, at times one only, whose own mass is then redistributed."""
        n = len(self.free)
        size = min(n, max(round(share * n), self.LEAST_FEATURES))
        order = self.free[torch.randperm(n, generator=generator)]
        target, source = (ALL, order[:size]), (ALL, order[-size:])
        if float(torch.rand((), generator=generator)) < self.WITHIN:
            source = target
        pattern = torch.randn(size, generator=generator)
        return target, source, pattern / pattern.norm(self.q)

    def _mass(self, u: Tensor) -> Tensor:
        powers = u.abs() if self.q == 1 else u.square()
        return rows(powers.flatten(1).sum(1), u)

    def _unit(self, u: Tensor) -> Tensor:
        """Divide each row by its norm; a zero row stays zero."""
        length = rows(torch.linalg.vector_norm(u.flatten(1), self.q, dim=1), u)
        return u / length.where(length > 0, 1.0)

    def _mutable(self, pattern: Tensor, place: Place) -> Tensor:
        """Return the pattern without the features of scale 0, where mass would be lost."""
        return pattern if self.scale is None else pattern * (self.scale[(ALL, *place[1:])] > 0)

    def _set(self, place: Place, u: Tensor) -> None:
        if self.u_box is not None:
            u = torch.clamp(u, *(side[place] for side in self.u_box))
        self.u[place] = u
        self._show(place)

    def _show(self, place: Place) -> None:
        """Let `cells` follow `u`."""
        u = self.u[place]
        delta = u if self.scale is None else u * self.scale[(ALL, *place[1:])]
        self.cells[place] = self.X[place] + delta

    def keep(self, better: Tensor) -> None:
        """Take the last proposal back in all samples but the `better`."""
        for place, old in self.undo:
            take_back(self.u, place, old, better)
            self._show(place)


def as_cells(X: Tensor) -> Tensor:
    """View samples as (n, n_features) or (n, n_channels, height, width)."""
    return X if X.ndim == 2 else X.reshape(len(X), math.prod(X.shape[1:-2]), *X.shape[-2:])


def take_back(cells: Tensor, place: Place, old: Tensor, better: Tensor) -> None:
    """Restore the old values of a place in all rows but the `better`."""
    cells[place] = torch.where(rows(better, old), cells[place], old)


def random_signs(shape: Sequence[int], generator: Generator) -> Tensor:
    """Draw ±1, on the CPU."""
    return 2.0 * torch.randint(2, tuple(shape), generator=generator) - 1.0


def draw_place(
    shape: Sequence[int],
    share: float,
    generator: Generator,
    least: int = 1,
    free: Tensor | None = None,
) -> Place:
    """Draw the place of a share of the cells: a subset of the free features, or a square."""
    if len(shape) == 1:
        n = shape[0] if free is None else len(free)
        size = min(n, max(round(share * n), least))
        order = torch.randperm(n, generator=generator)[:size]
        return ALL, order if free is None else free[order]
    height, width = shape[-2:]
    side = min(height, width, max(round(math.sqrt(share * height * width)), least))
    top, left = (
        int(torch.randint(room + 1, (), generator=generator))
        for room in (height - side, width - side)
    )
    return ALL, ALL, slice(top, top + side), slice(left, left + side)


def two_halves(side: int, generator: Generator) -> Tensor:
    """Return a square, one half up and one down, equally heavy (algorithm 3, figure 3)."""
    if side == 1:
        return torch.ones(1, 1)
    pattern = torch.cat([pyramid(side // 2, side), -pyramid(side - side // 2, side)])
    return pattern.T if torch.randint(2, (), generator=generator) else pattern


def pyramid(height: int, width: int) -> Tensor:
    """Return a rectangle of unit l2 norm whose values fall from the middle outwards.

    Rectangles around the middle, of half width k = 0, 1, …, have height 1 / (k + 1)² and lie
    on each other, so that a cell at distance k from the middle holds the sum from k on.
    """
    down = (torch.arange(height) - height // 2).abs()
    across = (torch.arange(width) - width // 2).abs()
    heights = 1 / torch.arange(1, max(height, width) // 2 + 2).square()
    sums = heights.flip(0).cumsum(0).flip(0)
    values = sums[torch.maximum(down[:, None], across)]
    return values / values.norm()


def mosaic(shape: Sequence[int], generator: Generator) -> Tensor:
    """Return an image of patterns a fifth as high as it, each of random sign."""
    n_channels, height, width = shape
    side = max(min(height, width) // 5, 1)
    image = torch.zeros(n_channels, height, width)
    for top in range(height % side // 2, height - side + 1, side):
        for left in range(width % side // 2, width - side + 1, side):
            signs = random_signs((n_channels, 1, 1), generator)
            place = ALL, slice(top, top + side), slice(left, left + side)
            image[place] = two_halves(side, generator) * signs
    return image
