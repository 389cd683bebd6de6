"""Changes of one category or whole number: which there are, what they promise and cost."""

from typing import NamedTuple

import torch
from torch import Tensor

from skjacobian.geometry import Ball

# How many single changes are tried at most, whatever they promise.
MOST_TRIALS = 256


def flips_pay(ball: Ball) -> bool:
    """Tell whether whole numbers or categories depend on each other, or on a shared budget."""
    if ball.rules is None:
        return False
    return bool(ball.rules.groups) or (ball.norm != "linf" and bool(ball.rules.is_whole.any()))


def _radii(ball: Ball) -> Tensor:
    """Return the radius of each sample, in float64."""
    radii = torch.as_tensor(ball.radii(), dtype=torch.float64, device=ball.X.device)
    return radii.expand(len(ball.X))


class Changes(NamedTuple):
    """Single changes: what of a sample they set to 0, and what they add to it then.

    Of shape (n_changes, n_features) both.
    """

    cleared: Tensor
    added: Tensor

    def __len__(self) -> int:
        return len(self.added)


class Moves:
    """All changes of one category, and of one whole number by 1, in the order of columns.

    A change of a whole number is a column; its direction is that of the gradient. A change of
    a category is a pair of a group and the column that becomes 1.

    Parameters
    ----------
    ball : Ball
    """

    # Prices are at least this, in units of the budget: what is free or pays back comes first.
    LEAST_PRICE = 1e-6
    # Whole numbers that can change by more than this are left to the gradient.
    MOST_STEPS = 20

    def __init__(self, ball: Ball) -> None:
        rules, n_features = ball.rules, ball.X.shape[1:].numel()
        scale = ball.X.new_ones(()) if ball.scale is None else ball.scale
        self.scale = scale.expand(ball.X.shape[1:]).flatten().double()
        self.power = {"l1": 1, "l2": 2, "linf": 0}[ball.norm]
        groups = () if rules is None else rules.groups
        self.whole = torch.zeros(n_features, dtype=torch.bool, device=ball.X.device)
        if rules is not None:
            self.whole = rules.is_whole.expand(ball.X.shape[1:]).flatten().clone()
        self.in_group = torch.zeros_like(self.whole)
        for group in groups:
            self.in_group[group] = True
        self.is_free = self.scale > 0
        # Samples with radii of their own must not decide which moves there are for others.
        has_own_radii = isinstance(ball.eps, Tensor)
        single = self.whole if has_own_radii else self.one_by_one(ball).any(0)
        self.columns = (single & ~self.in_group & self.is_free).nonzero().squeeze(1)
        self.groups = [group for group in groups if int(self.is_free[group].sum()) > 1]

    def __len__(self) -> int:
        return len(self.columns) + sum(map(len, self.groups))

    def one_by_one(self, ball: Ball) -> Tensor:
        """Tell of each sample which of its features are changed one by one.

        Where many steps fit into the radius, real numbers that are rounded do as well.
        """
        few = _radii(ball).unsqueeze(1) * self.scale <= self.MOST_STEPS
        return self.whole & (self.in_group | few)

    def trials(self) -> Changes:
        """Return the changes to try whatever they promise; none where there are many.

        Of a category to any other, of a whole number by 1 or 2.
        """
        steps = [(column, step) for column in self.columns for step in (1, -1, 2, -2)]
        entries = [(group, column) for group in self.groups for column in group]
        if len(steps) + len(entries) > MOST_TRIALS:
            steps, entries = [], []
        added = self.scale.new_zeros(len(steps) + len(entries), len(self.scale))
        cleared = torch.zeros_like(added, dtype=torch.bool)
        for place, (column, step) in enumerate(steps):
            added[place, column] = step
        for place, (group, column) in enumerate(entries, len(steps)):
            cleared[place, group] = True
            added[place, column] = 1
        return Changes(cleared, added)

    def tried(self, ball: Ball, changes: Changes, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return samples, each with one of the changes made, and which of them the sets allow."""
        flat = ball.X.flatten(1)
        changed = torch.where(changes.cleared[which], 0.0, flat) + changes.added[which].to(flat)
        moved = changed != flat
        allowed = moved.any(1) & ~(moved & ~(self.one_by_one(ball) & self.is_free)).any(1)
        changed = changed.reshape(ball.X.shape)
        if ball.box is not None:
            allowed &= ball.box.contains(changed)
        if self.power:
            allowed &= self.spent(ball, changed) <= (1 + 1e-12) * self.budget(ball)
        return changed, allowed

    def spent(self, ball: Ball, X_adv: Tensor) -> Tensor:
        """Return what whole numbers and categories have used up of the budget."""
        delta = (X_adv - ball.X).flatten(1).double()
        counted = self.one_by_one(ball) & (delta != 0)
        return torch.where(counted, delta.abs() / self.scale, 0.0).pow(self.power).sum(1)

    def budget(self, ball: Ball) -> Tensor:
        """Return the radius, to the power that adds up over features."""
        return _radii(ball).pow(self.power)

    def rest(self, ball: Ball, X_adv: Tensor) -> Ball | None:
        """Return the sets that are left for the other features; None if there are none."""
        free = ~self.one_by_one(ball) & self.is_free
        if not bool(free.any()):
            return None
        eps = _radii(ball)
        if self.power:
            rounding = 16 * torch.finfo(X_adv.dtype).eps
            left = (1 - rounding) * self.budget(ball) - self.spent(ball, X_adv)
            eps = left.clamp(min=0.0).pow(1 / self.power)
        scale = (self.scale * ~self.in_group).to(X_adv.dtype).reshape(X_adv.shape[1:])
        box = ball.box
        if box is not None:
            box = box.map(lambda side: torch.where(free.reshape(X_adv.shape), side, X_adv))
        return Ball.around(X_adv, norm=ball.norm, eps=eps, scale=scale, bounds=box)

    def offers(self, ball: Ball, X_adv: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each change promises, -inf where it is not allowed, and its price."""
        infinite = torch.full_like(X_adv, torch.inf)
        sides = ball.box or (-infinite, infinite)
        flat = [values.flatten(1).double() for values in (X_adv, ball.X, gradient, *sides)]
        offers = []
        if len(self.columns):
            gain, price, allowed = self._offers_of_columns(*flat)
            offers = [(gain, price, allowed & self.one_by_one(ball)[:, self.columns])]
        offers += [self._offers_of_group(group, *flat) for group in self.groups]
        gain, price, allowed = (torch.cat(values, 1) for values in zip(*offers, strict=True))
        budget = self.budget(ball).unsqueeze(1)
        left = budget - self.spent(ball, X_adv).unsqueeze(1)
        fits = price <= left + 1e-12 * budget
        if self.power == 0:  # the box alone says how far each may go
            price, fits = torch.ones_like(price), torch.ones_like(fits)
        gain = gain.where(allowed & fits, -torch.inf)
        return gain, price.maximum(self.LEAST_PRICE * budget)

    def _offers_of_columns(
        self, now: Tensor, was: Tensor, g: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return gain and price of each change of a whole number, and whether it is allowed."""
        j = self.columns
        now, was, g = now[:, j], was[:, j], g[:, j]
        moved = now + g.sign()
        price = self._price(moved - was, j) - self._price(now - was, j)
        return g.abs(), price, (moved >= low[:, j]) & (moved <= high[:, j])

    def _offers_of_group(
        self, j: Tensor, now: Tensor, was: Tensor, g: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same of each category that a group may change to."""
        now, was, g = now[:, j], was[:, j], g[:, j]
        gain = g - (now * g).sum(1, keepdim=True)
        one = self._price(torch.ones_like(was), j)
        origin = (was * one).sum(1, keepdim=True)
        after = torch.where(was > 0, 0.0, one + origin)
        price = after - (now * after).sum(1, keepdim=True)
        stays = (now > 0) & ((low[:, j] > 0) | ~self.is_free[j])
        enters = (now == 0) & (high[:, j] >= 1) & self.is_free[j]
        return gain, price, enters & ~stays.any(1, keepdim=True)

    def _price(self, delta: Tensor, columns: Tensor) -> Tensor:
        """Return what changes of columns cost."""
        scale = self.scale[columns]
        return (delta.abs() / scale.where(scale > 0, 1.0)).pow(self.power)

    def made(self, X_adv: Tensor, gradient: Tensor, chosen: Tensor, wanted: Tensor) -> Tensor:
        """Return the samples with the chosen change made, where it is wanted."""
        flat, g = X_adv.flatten(1).clone(), gradient.flatten(1)
        sample = torch.arange(len(flat), device=flat.device)
        start = len(self.columns)
        is_single = wanted & (chosen < start)
        if bool(is_single.any()):
            i, j = sample[is_single], self.columns[chosen[is_single]]
            flat[i, j] += g[i, j].sign()
        for group in self.groups:
            here = wanted & (chosen >= start) & (chosen < start + len(group))
            if bool(here.any()):
                category = torch.zeros(int(here.sum()), len(group), dtype=flat.dtype).to(flat)
                category.scatter_(1, (chosen[here] - start).unsqueeze(1), 1.0)
                flat[sample[here].unsqueeze(1), group] = category
            start += len(group)
        return flat.reshape(X_adv.shape)
