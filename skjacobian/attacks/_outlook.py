"""Which samples the steps left of a gradient ascent will not fool."""

from collections.abc import Callable

import torch
from torch import Tensor

from skjacobian.attacks._search import Search
from skjacobian.losses import LEADS


class Outlook:
    """What the samples of one ascent may still hope for.

    It holds where steps follow from the present iterate alone and never grow. A sample is
    hopeless once it has come to rest, and once even a slope STEEPER times as steep would not
    fool it. Of a slope that has grown or shrunk more than STEADY times since the start that
    says little: kernel machines have plateaus, which the first steps must cross. ReLU networks
    have none.

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
    STEADY = 2.0
    # Nobody is given up before. Of few features, as of tables, gradients miss more, and queries
    # are cheap.
    FEWEST_STEPS = 8
    SHARE_OF_STEPS = 0.2
    SHARE_OF_FEW_FEATURES = 0.5

    def __init__(
        self, search: Search, loss: str, n_steps: int, reach: Callable[[int], float | None]
    ) -> None:
        self.search = search
        self.reach = reach
        is_few = search.ball.has_few_features
        share = self.SHARE_OF_FEW_FEATURES if is_few else self.SHARE_OF_STEPS
        self.patience = max(self.FEWEST_STEPS, share * n_steps)
        # Cross-entropy towards one class does not tell who is ahead.
        self.tells = search.target is None or loss != "cross_entropy"
        self.lead = LEADS[loss]
        self.least = torch.full_like(search.y, torch.inf, dtype=search.best.dtype)
        self.greatest = torch.zeros_like(self.least)

    def keep(self, kept: Tensor) -> None:
        """Forget all samples but these."""
        self.least, self.greatest = self.least[kept], self.greatest[kept]

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
        reach = self.reach(step)
        if step % 2 == 0 and self.tells and reach is not None:
            hopeless |= self._is_out_of_reach(X_adv, value, gradient, step, reach)
        return hopeless

    def _is_out_of_reach(
        self, X_adv: Tensor, value: Tensor, gradient: Tensor, step: int, reach: float
    ) -> Tensor:
        """Tell which samples could not be fooled even on a far steeper slope.

        `lead` is positive only where the model is right. To first order it falls by no more
        than `derivative` times what the loss can climb in the set, or along the steps left; in
        l2 balls also not by less than what the slope climbs over a radius.
        """
        ball = self.search.ball
        lead, derivative = self.lead(value)
        length = ball.dual_length(gradient)
        slope = derivative * length
        self.least = torch.minimum(self.least, slope)
        self.greatest = torch.maximum(self.greatest, slope)
        if step < self.patience:
            return torch.zeros_like(self.search.done)
        climb = ball.ascent_left(X_adv, gradient)
        along_steps = min(1.0, reach) * ball.radii() * length
        if reach < 1:
            climb = torch.minimum(climb, along_steps)
        if ball.norm == "l2":
            # On a sphere the gap is of second order in the angle to the gradient: next to nothing
            # where a search turns with it, past a saddle say, however far it is going to get.
            climb = torch.maximum(climb, along_steps / self.STEEPER)
        is_steady = self.greatest <= self.STEADY * self.least
        return is_steady & (lead > self.STEEPER * derivative * climb)


def _has_settled(X_adv: Tensor, previous: Tensor) -> Tensor:
    """Tell which samples the last step left where they were: so will all others.

    A fifth of the samples come to rest in a corner of a linf ball within ten steps.
    """
    return (X_adv - previous).flatten(1).abs().amax(1) == 0
