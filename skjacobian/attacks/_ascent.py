"""What the attacks share that climb a loss by its gradient."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from skjacobian._validation import check_count, check_flag, check_option, unwrap_scalar
from skjacobian.attacks._base import Attack
from skjacobian.attacks._outlook import Outlook
from skjacobian.attacks._search import LossAndSlope, Search
from skjacobian.attacks._single_features import ranked_vertices, vertex, vertices_pay
from skjacobian.geometry import Ball
from skjacobian.losses import LOSSES, TARGETED_LOSSES, value_and_slope
from skjacobian.model_outputs import SampleLoss, input_gradient
from skjacobian.norms import rows, vector_norm


class LossAttack(Attack):
    """Base of the attacks that climb a loss, from several starts or towards several classes.

    A subclass says how it climbs (`_ascend`).
    """

    loss: str
    n_restarts: Any
    n_targets: int | None

    def _ascend(self, search: Search, X_adv: Tensor) -> None:
        """Climb once with the samples that are active, from points of their sets."""
        raise NotImplementedError

    def _start(self, ball: Ball, generator: torch.Generator, restart: int = 0) -> Tensor:
        """Return where a search begins; `restart` counts from 0."""
        return ball.random_start(generator)

    def _n_steps(self) -> int:
        """Return the number of gradient steps of one restart, validated."""
        raise NotImplementedError

    def check_params(self) -> None:
        """Raise a ValueError that names the first parameter with a bad value."""
        super().check_params()
        check_option("loss", self.loss, LOSSES)
        self._check_n_restarts()
        if self.n_targets is not None:
            check_count("n_targets", self.n_targets)
        self._n_steps()

    def _search(self, search: Search, generator: torch.Generator) -> None:
        restart, vertices = 0, search.all_y.new_empty((len(search.all_y), 0))
        while restart < self._n_restarts(search):
            if restart == 1 and vertices_pay(search.all_balls):
                vertices = ranked_vertices(search, lambda: search.ball, search.keep)
            for rank in self._ranks(search):
                if not search.restart(rank):
                    return
                if 1 <= restart <= vertices.shape[1]:
                    X_adv = vertex(search.ball, vertices[search.active, restart - 1])
                else:
                    X_adv = self._start(search.ball, generator, restart)
                self._ascend(search, X_adv)
            restart += 1

    def _check_n_restarts(self) -> None:
        check_count("n_restarts", self.n_restarts)

    def _n_restarts(self, search: Search) -> int:
        """Return how many searches there are; asked again after each."""
        return int(self.n_restarts)

    def _ranks(self, search: Search) -> list[int | None]:
        """Return the ranks of the wrong classes to aim at, or [None] for any class."""
        if self.n_targets is None:
            return [None]
        return list(range(min(int(self.n_targets), search.n_wrong_classes())))

    def _loss(self, search: Search) -> LossAndSlope:
        """Return what is climbed, as a function of the logits of the active samples."""
        if search.target is None:
            return partial(value_and_slope, LOSSES[self.loss], y=search.y)
        targeted = TARGETED_LOSSES[self.loss]
        return partial(value_and_slope, targeted, y=search.y, target=search.target)


class GradientAscent(LossAttack):
    """Base of the attacks whose next iterate follows from the present one.

    A subclass says how the iterate moves (`_step`); this class runs it, and drops the samples
    that need no more of it (`Outlook`).
    """

    momentum: float
    random_start: bool

    def check_params(self) -> None:
        """Raise a ValueError that names the first parameter with a bad value."""
        super().check_params()
        check_flag("random_start", self.random_start)

    def _start(self, ball: Ball, generator: torch.Generator, restart: int = 0) -> Tensor:
        at_random = self.random_start or restart > 0
        return ball.random_start(generator) if at_random else ball.X

    def _step(self, X_adv: Tensor, direction: Tensor, ball: Ball, step: int) -> Tensor:
        """Return the next iterate, inside the ball up to rounding; `step` counts from 0.

        `direction` is a gradient, or its average over the steps; it may be overwritten.
        """
        raise NotImplementedError

    def _reach(self, step: int) -> float | None:
        """Return how far the steps from `step` on can lead, in units of eps, 2 at most.

        None where the steps before it may have been too short to cross the ball.
        """
        return None

    def maximize(self, loss: SampleLoss, ball: Ball, generator: torch.Generator) -> Tensor:
        """Return the last iterate of one ascent of `loss(X_adv) -> (n_samples,)`.

        What adversarial training needs: one start, all steps, no bookkeeping of success.
        """
        with torch.enable_grad():
            X_adv, velocity = self._start(ball, generator), None
            for step in range(self._n_steps()):
                gradient = ball.of_free(input_gradient(loss, X_adv))
                velocity = self._velocity(velocity, gradient)
                X_adv = self._step(X_adv, self._direction(velocity), ball, step)
            return ball.valid(ball.enforce(X_adv))

    def _velocity(self, velocity: Tensor | None, gradient: Tensor) -> Tensor:
        """Return μ·velocity + g/‖g‖₁ (Dong et al., arXiv 1710.06081), or g without momentum."""
        if self.momentum == 0:
            return gradient
        length = rows(vector_norm(gradient, "l1"), gradient)
        unit = gradient / length.where(length > 0, 1.0)
        momentum = float(unwrap_scalar(self.momentum))
        return unit if velocity is None else velocity.mul_(momentum).add_(unit)

    def _direction(self, velocity: Tensor) -> Tensor:
        return velocity if self.momentum == 0 else velocity.clone()

    def _ascend(self, search: Search, X_adv: Tensor) -> None:
        velocity, previous = None, X_adv
        outlook = Outlook(search, self.loss, self._n_steps(), self._reach)
        for step in range(self._n_steps()):
            found, value, gradient = search.gradient(X_adv, self._loss(search))
            done = found > 0
            if self.momentum == 0:  # of where a velocity leads, one gradient says nothing
                done |= outlook.is_hopeless(X_adv, previous, value, gradient, step)
            search.end(X_adv, found, done)
            velocity = self._velocity(velocity, gradient)
            kept = search.drop(step)
            if kept is not None:
                X_adv, velocity = X_adv[kept], velocity[kept]
                outlook.keep(kept)
            if len(X_adv) == 0:
                return
            previous = X_adv
            X_adv = self._step(X_adv, self._direction(velocity), search.ball, step)
        search.record(X_adv, search.margin(X_adv), ~search.done)
