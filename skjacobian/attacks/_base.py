"""The contract of every attack: it alone enforces the ball and decides success."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from skjacobian._rng import seeded
from skjacobian._validation import check_non_negative, check_option, reject
from skjacobian.exceptions import AttackWarning
from skjacobian.geometry import BALL_NORMS, Ball, rows
from skjacobian.losses import LEADS, LOSSES, margin
from skjacobian.model_modes import frozen
from skjacobian.threat_model import check_inside, resolve_bounds, resolve_feature_scale

PredictLogits = Callable[[Tensor], Tensor]
SampleLoss = Callable[[Tensor], Tensor]


class Found(NamedTuple):
    """What a search found.

    Attributes
    ----------
    X_adv : Tensor of shape (n_samples, *features)
    fooled : Tensor of bool of shape (n_samples,)
        Whether the logits at `X_adv` favour another class than the true one.
    """

    X_adv: Tensor
    fooled: Tensor


class Attack(BaseEstimator):
    """Base of all attacks: an adversary with a threat model, and a search that it uses.

    A subclass says how its iterate starts (`_start`) and moves (`_step`); this class runs
    it, keeps the best perturbation of each sample, drops the samples that are already
    fooled, and guarantees that nothing leaves the ball.

    An attack is a value object: `__init__` only stores, so `clone`, `repr`, pickling and
    nested search parameters work.
    """

    norm: str
    eps: Any
    feature_scale: Any
    bounds: Any
    loss: str
    n_restarts: int

    def _start(self, ball: Ball, generator: torch.Generator) -> Tensor:
        """Return the first iterate."""
        raise NotImplementedError

    def _step(self, X_adv: Tensor, gradient: Tensor, ball: Ball, step: int) -> Tensor:
        """Return the next iterate, inside the ball up to rounding; `step` counts from 0."""
        raise NotImplementedError

    def _reach(self, step: int) -> float:
        """Return how far the steps from `step` on can lead, in units of eps."""
        return 2.0  # across the ball

    def _n_steps(self) -> int:
        """Return the number of gradient steps of one restart, validated."""
        raise NotImplementedError

    def check_params(self) -> None:
        """Raise a ValueError that names the first parameter with a bad value."""
        check_option("norm", self.norm, BALL_NORMS)
        check_option("loss", self.loss, LOSSES)
        if not isinstance(self.eps, Tensor):
            check_non_negative("eps", self.eps)
        elif not bool((self.eps.isfinite() & (self.eps >= 0)).all()):
            reject("eps", self.eps, "non-negative finite numbers")
        self._n_steps()

    def __call__(
        self,
        predict_logits: PredictLogits,
        X: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Search for a perturbation of each sample that fools the model.

        Parameters
        ----------
        predict_logits : callable
            Maps X to logits of shape (n_samples, n_classes), differentiably. A module is
            attacked in eval mode with its parameters frozen, and left as it was.
        X : Tensor of shape (n_samples, *features)
        y : Tensor of shape (n_samples,)
            True class indices.
        generator : torch.Generator, optional
            A CPU generator for random starts; None draws a fresh, unpredictable seed.

        Returns
        -------
        Tensor of shape (n_samples, *features)
            For each sample the first perturbation found that fools the model, or else
            the point of largest margin max_{k != y} z_k - z_y at which a search for it
            ended. Exactly inside ball and box; `X` itself where eps=0.
        """
        return self.search(predict_logits, X, y, generator=generator).X_adv

    def search(
        self,
        predict_logits: PredictLogits,
        X: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> "Found":
        """Search as `__call__` does, and say of each sample whether the model is fooled.

        Returns
        -------
        Found
            With fields `X_adv` and `fooled`.
        """
        self.check_params()
        _check_tensors(X, y)
        X = X.detach()
        check_inside(X, resolve_bounds(self.bounds, X))
        ball = self.ball(X)
        with frozen(predict_logits), torch.enable_grad():
            evaluation = _Evaluation(predict_logits, ball, y, self.loss)
            for _ in range(self.n_restarts):
                if not evaluation.restart():
                    break
                if self.eps_is_zero:
                    evaluation.finish(X)
                    break
                self._ascend(evaluation, seeded(generator))
            found = evaluation.result()
        evaluation.warn_of_bad_gradients()
        return found

    @property
    def eps_is_zero(self) -> bool:
        """Whether the radius is 0 for every sample."""
        return bool((torch.as_tensor(self.eps) == 0).all())

    def maximize(self, loss: SampleLoss, ball: Ball, generator: torch.Generator) -> Tensor:
        """Return the last iterate of one ascent of `loss(X_adv) -> (n_samples,)`.

        What adversarial training needs: one start, all steps, no bookkeeping of success.
        """
        with torch.enable_grad():
            return ball.enforce(self._ascend(_Maximization(loss, ball), generator))

    def ball(self, X: Tensor) -> Ball:
        """Return the sets that this adversary may choose from, around the rows of `X`."""
        return Ball.around(
            X.detach(),
            norm=self.norm,
            eps=self.eps,
            scale=resolve_feature_scale(self.feature_scale, X),
            bounds=resolve_bounds(self.bounds, X),
        )

    def _ascend(self, problem: "_Evaluation | _Maximization", generator: torch.Generator) -> Tensor:
        X_adv = self._start(problem.ball, generator)
        for step in range(self._n_steps()):
            X_adv, gradient = problem.gradient(X_adv, step, self._reach(step))
            if len(X_adv) == 0:
                return X_adv
            X_adv = self._step(X_adv, gradient, problem.ball, step)
        problem.finish(X_adv)
        return X_adv


def input_gradient(loss: SampleLoss, X: Tensor) -> Tensor:
    """Return ∂(Σ_i loss_i)/∂X, shape of X, by `torch.autograd.grad`.

    Raises
    ------
    ValueError
        If the loss does not depend on X differentiably.
    """
    X = X.detach().requires_grad_()
    value = loss(X).sum()
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, X, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "Got predict_logits whose output does not depend on X differentiably, but "
            "expected a differentiable model: a gradient attack cannot run on it."
        )
    return gradient


class _Maximization:
    """Ascent for training: every sample takes every step."""

    def __init__(self, loss: SampleLoss, ball: Ball) -> None:
        self.loss = loss
        self.ball = ball

    def gradient(self, X_adv: Tensor, step: int, reach: float) -> tuple[Tensor, Tensor]:
        return X_adv, input_gradient(self.loss, X_adv)

    def finish(self, X_adv: Tensor) -> None:
        pass


class _Evaluation:
    """Ascent for evaluation: the best perturbation so far, and who is still in the search.

    `X_best` and `best` hold, for all samples, the first perturbation that fooled the model
    or else the point of largest margin where a search ended. `active` are the indices in
    the search, `ball` and `y` belong to them, and `done` tells which need no more of it.
    """

    # Dropping samples copies the others, so it waits until a few can go.
    DROP_SHARE = 0.02
    LATE = 0.5
    STEEPER = 2.0

    def __init__(self, model: PredictLogits, ball: Ball, y: Tensor, loss: str) -> None:
        self.model = model
        self.loss, self.lead = LOSSES[loss], LEADS[loss]
        self.all_balls, self.all_y = ball, y
        self.X_best = ball.X.clone()
        self.best = torch.full((len(y),), -torch.inf, dtype=ball.X.dtype, device=y.device)
        self.inspected = False
        self.n_zero = self.n_not_finite = 0

    def restart(self) -> bool:
        """Turn to all samples that still stand; tell whether there are any."""
        self.active = (self.best <= 0).nonzero().squeeze(1)
        everyone = len(self.active) == len(self.all_y)
        self.ball = self.all_balls if everyone else self.all_balls[self.active]
        self.y = self.all_y[self.active]
        self.done = torch.zeros_like(self.y, dtype=torch.bool)
        return len(self.active) > 0

    def gradient(self, X_adv: Tensor, step: int, reach: float) -> tuple[Tensor, Tensor]:
        """Record who is done at the iterate; return iterate and gradient of the others."""
        seen: list[Tensor] = []

        def loss(X: Tensor) -> Tensor:
            logits = self.model(X)
            value = self.loss(logits, self.y)
            seen.extend((logits.detach(), value.detach()))
            return value

        gradient = input_gradient(loss, X_adv)
        if not self.inspected:
            self._inspect(gradient)
        found = self._margin(seen[0])
        done = found > 0
        if step > 0 and step % 4 == 0:
            done |= self._settled(X_adv)
        if reach <= self.LATE and step % 2 == 0:
            done |= self._out_of_reach(seen[1], gradient, reach)
        self._record(X_adv, found, done & ~self.done)
        self.done |= done
        # To drop, the CPU must wait for an accelerator, which is then done after steps 0,
        # 1, 3, 7, 15, …: often enough, and log2(n_steps) times.
        if not X_adv.is_cuda or step & (step + 1) == 0:
            X_adv, gradient = self._drop(X_adv, gradient)
        self.previous = X_adv
        return X_adv, gradient

    def _settled(self, X_adv: Tensor) -> Tensor:
        """Tell which samples the last step left where they were: so will all others.

        The next iterate depends on the present one alone, and steps never grow. A fifth of
        the samples come to rest in a corner of a linf ball within ten steps.
        """
        return (X_adv - self.previous).flatten(1).abs().amax(1) == 0

    def _out_of_reach(self, loss: Tensor, gradient: Tensor, reach: float) -> Tensor:
        """Tell which samples the steps left could not fool even on a far steeper slope.

        `lead` is positive only where the model is right, and falls at most by `slope`
        times the distance to first order; curvature may make that `STEEPER` times more.
        Asked only late, when the steps left are together shorter than `LATE` times eps.
        """
        lead, derivative = self.lead(loss)
        slope = derivative * self.ball.dual_length(gradient)
        distance = reach * self.ball.eps
        distance = distance.flatten() if isinstance(distance, Tensor) else distance
        return lead > self.STEEPER * distance * slope

    def _drop(self, X_adv: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        keep = (~self.done).nonzero().squeeze(1)
        if len(X_adv) - len(keep) <= self.DROP_SHARE * len(X_adv):
            return X_adv, gradient
        self.active, self.ball, self.y = self.active[keep], self.ball[keep], self.y[keep]
        self.done = self.done[keep]
        return X_adv[keep], gradient[keep]

    def finish(self, X_adv: Tensor) -> None:
        """Record the end points that are better than what was found before."""
        with torch.no_grad():
            found = self._margin(self.model(X_adv))
        self._record(X_adv, found, ~self.done)

    def _margin(self, logits: Tensor) -> Tensor:
        """Return the margin less what rounding may make of it in a batch of another size."""
        rounding = 16 * torch.finfo(logits.dtype).eps * logits.abs().amax(1)
        return (margin(logits, self.y) - rounding).to(self.best.dtype)

    def result(self) -> Found:
        """Return what was found, exactly inside the sets."""
        X_adv, best = self.all_balls.enforce(self.X_best), self.best
        if self.all_balls.norm == "l2":  # which moves the points by a rounding error
            self.y = self.all_y
            with torch.no_grad():
                best = self._margin(self.model(X_adv))
        return Found(X_adv, best > 0)

    def _record(self, X_adv: Tensor, found: Tensor, ended: Tensor) -> None:
        """Keep the iterate of those that `ended` here, if it beats what is kept."""
        better = ended & (found > self.best[self.active])
        if X_adv.is_cuda:  # without waiting for the device
            better_row = rows(better, X_adv)
            self.best[self.active] = torch.where(better, found, self.best[self.active])
            self.X_best[self.active] = torch.where(better_row, X_adv, self.X_best[self.active])
            return
        chosen = better.nonzero().squeeze(1)
        if len(chosen):
            target = self.active[chosen]
            self.best[target] = found[chosen]
            self.X_best[target] = X_adv[chosen]

    def _inspect(self, gradient: Tensor) -> None:
        """Count the samples whose gradient gives the attack nothing to follow."""
        largest = gradient.abs().flatten(1).amax(1)
        self.n_zero = int((largest == 0).sum())
        self.n_not_finite = int((~torch.isfinite(largest)).sum())
        self.inspected = True

    def warn_of_bad_gradients(self) -> None:
        """Warn if the first gradients were zero or not finite: a sign of masking."""
        for count, kind in ((self.n_zero, "zero"), (self.n_not_finite, "NaN or infinite")):
            if count:
                warnings.warn(
                    f"The loss gradient was {kind} at the first step of {count} of "
                    f"{len(self.all_y)} samples, so the attack could not search there and "
                    "robustness may be overstated. Very large logits do this to "
                    "cross-entropy; loss='margin' does not suffer from it.",
                    AttackWarning,
                    stacklevel=3,
                )


def _check_tensors(X: Tensor, y: Tensor) -> None:
    for name, value in (("X", X), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"Got {name} of type {type(value).__name__}, but expected a torch.Tensor. "
                "To attack an estimator with arrays, use RobustScorer."
            )
    if len(X) != len(y):
        raise ValueError(
            f"Got X with {len(X)} samples and y with {len(y)}, but expected as many of each."
        )
