"""Which samples the steps left of a gradient ascent will not fool."""

from collections.abc import Callable

import torch
from torch import Tensor

from skjacobian.ascent_steps import ascent_left, dual_length
from skjacobian.attacks._search import Search
from skjacobian.losses import LEADS


class Slopes:
    """Between what bounds the slope of each active sample has been."""

    # By what factor a steady slope may have changed.
    STEADY = 2.0

    def __init__(self, search: Search) -> None:
        self.least = torch.full_like(search.y, torch.inf, dtype=search.best.dtype)
        self.greatest = torch.zeros_like(self.least)

    def observe(self, slope: Tensor) -> None:
        """Take note of the slopes of one step."""
        self.least = torch.minimum(self.least, slope)
        self.greatest = torch.maximum(self.greatest, slope)

    def are_steady(self) -> Tensor:
        """Tell whose slope has hardly changed: to first order a steady one tells what is near."""
        return self.greatest <= self.STEADY * self.least

    def keep(self, kept: Tensor) -> None:
        """Forget all samples but these."""
        self.least, self.greatest = self.least[kept], self.greatest[kept]


class Outlook:
    """What the samples of one ascent may still hope for.

    It holds where steps follow from the present iterate alone and never grow. A sample is
    hopeless once it has come to rest; and where, looking back, the slope has been steady and the
    last steps have led nowhere, once even a slope STEEPER times as steep would not fool it. Of a
    slope that changes, that says little: kernel machines have plateaus, which the first steps
    must cross. Nor does it where a search gets on: turning with the gradient, past a saddle of an
    l2 ball, it has next to nothing to climb to first order.

    Parameters
    ----------
    search : Search
    loss : str
        Name of the loss climbed, in `skjacobian.losses.LOSSES`.
    n_steps : int
    reach : callable
        Returns how far the steps from one on can lead, in units of eps, at most 2; None where
        nobody can tell.
    """

    STEEPER = 5.0
    # What share of the lead a search may have closed in the last steps.
    PROGRESS = 0.01
    # Nobody is given up before these; and which steps are the last.
    FEWEST_STEPS = 8
    SHARE_OF_STEPS = 0.2
    SHARE_OF_LAST_STEPS = 0.1

    def __init__(
        self, search: Search, loss: str, n_steps: int, reach: Callable[[int], float | None]
    ) -> None:
        self.search = search
        self.reach = reach
        self.patience = max(self.FEWEST_STEPS, self.SHARE_OF_STEPS * n_steps)
        # Cross-entropy towards one class does not tell who is ahead.
        self.tells = search.target is None or loss != "cross_entropy"
        self.lead = LEADS[loss]
        self.slopes = Slopes(search)
        # Of every other step, the last ones and the one before these.
        self.leads: list[Tensor] = []
        self.n_last = max(2, round(self.SHARE_OF_LAST_STEPS * n_steps / 2))

    def keep(self, kept: Tensor) -> None:
        """Forget all samples but these."""
        self.slopes.keep(kept)
        self.leads = [lead[kept] for lead in self.leads]

    def is_hopeless(
        self, X_adv: Tensor, previous: Tensor, value: Tensor, gradient: Tensor, step: int
    ) -> Tensor:
        """Tell which samples the steps from this one on will not fool; looked at in some steps.

        Parameters
        ----------
        X_adv, previous : Tensor of shape (n_active, *features)
            The iterates of this step and of the one before.
        value : Tensor of shape (n_active,)
            The loss.
        gradient : Tensor of shape (n_active, *features)
        step : int
            From 0.
        """
        hopeless = torch.zeros_like(self.search.done)
        if step > 0 and step % 4 == 0:
            hopeless |= _has_settled(X_adv, previous)
        if step % 2 == 0 and self.tells:
            reach = self.reach(step)
            if reach is not None:
                hopeless |= self._is_out_of_reach(X_adv, value, gradient, step, reach)
        return hopeless

    def _is_out_of_reach(
        self, X_adv: Tensor, value: Tensor, gradient: Tensor, step: int, reach: float
    ) -> Tensor:
        """Tell which samples could not be fooled even on a far steeper slope.

        `lead` is positive only where the model is right. To first order it falls by no more
        than `derivative` times what the loss can climb in the set, or along the steps left.
        """
        ball = self.search.ball
        lead, derivative = self.lead(value)
        length = dual_length(ball, gradient)
        self.slopes.observe(derivative * length)
        self.leads = [*self.leads[-self.n_last :], lead]
        if step < self.patience or len(self.leads) <= self.n_last:
            return torch.zeros_like(self.search.done)
        climb = ascent_left(ball, X_adv, gradient)
        if reach < 1:
            climb = torch.minimum(climb, reach * ball.radii() * length)
        leads_nowhere = self.leads[0] - lead < self.PROGRESS * lead
        is_far = lead > self.STEEPER * derivative * climb
        return self.slopes.are_steady() & leads_nowhere & is_far


def _has_settled(X_adv: Tensor, previous: Tensor) -> Tensor:
    """Tell which samples the last step left where they were: so will all others.

    A fifth of the samples come to rest in a corner of a linf ball within ten steps.
    """
    return (X_adv - previous).flatten(1).abs().amax(1) == 0
