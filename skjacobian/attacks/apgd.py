"""Auto-PGD: projected gradient ascent that sets its own step size (Croce & Hein)."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from skjacobian._validation import check_count
from skjacobian.ascent_steps import ascend
from skjacobian.attacks._ascent import LossAttack
from skjacobian.attacks._search import Search
from skjacobian.constraints import FeatureConstraints
from skjacobian.geometry import Ball
from skjacobian.norms import rows


class APGD(LossAttack):
    """Auto-PGD: momentum, and a step size that is halved where progress has stalled.

    Croce & Hein (arXiv 2003.01690, algorithm 1): at checkpoints that come ever closer, a
    sample whose loss rose in fewer than three of four steps since the last one, or whose
    best loss and step size have not changed, halves its step and returns to its best point,
    without its momentum. For l1 the steps are those of `PGD`, not the sparse ones of l1-APGD.

    Parameters
    ----------
    norm : {"linf", "l2", "l1"}, default="linf"
        Norm of the ball.
    eps : float or Tensor of shape (n_samples,), default=0.1
        Radius: ‖(X_adv - X) / feature_scale‖ <= eps. A tensor has one value per sample.
    feature_scale : None, "std", "range" or array of shape (n_features,), default=None
        Unit of each feature; None is 1, "std" and "range" are those of the X attacked.
    bounds : (low, high), optional
        Numbers or one value per feature. None means unbounded; there is no implicit clip.
    mutable : int, or array-like of int or bool, optional
        Features that may change: indices, or a boolean mask. None is all.
    constraints : FeatureConstraints, optional
        What else makes a sample valid, columns given by index.
    n_steps : int, default=100
        Gradient steps of one restart.
    n_restarts : int, default=1
        Searches: the first from a random point of the ball, the others from where those of `PGD`
        begin.
    loss : {"soft_margin", "cross_entropy", "margin", "dlr"}, default="soft_margin"
        What the search climbs, see `skjacobian.losses`. The default finds as much as the
        stronger of cross-entropy and margin, whatever the scale of the logits.
    n_targets : int, optional
        Search towards each of this many wrong classes in turn, the likeliest first, by the
        targeted form of the loss; with "dlr" and 9 the APGD-T of AutoAttack. None searches
        towards none in particular. Any wrong class counts as success.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> X, y = torch.tensor([[1.0, 0.5]]), torch.tensor([0])
    >>> attack = APGD(norm="linf", eps=0.2)
    >>> attack(lambda X: X @ W.T, X, y, generator=torch.Generator().manual_seed(0))
    tensor([[0.8000, 0.7000]])
    """

    # α of the paper: share of the gradient step; the rest is the last move once more.
    STEP_SHARE = 0.75
    # ρ of the paper: a step size is kept if the loss rose in this share of the steps.
    RISING_SHARE = 0.75

    def __init__(
        self,
        *,
        norm: str = "linf",
        eps: Any = 0.1,
        feature_scale: Any = None,
        bounds: Any = None,
        mutable: Any = None,
        constraints: FeatureConstraints | None = None,
        n_steps: int = 100,
        n_restarts: int = 1,
        loss: str = "soft_margin",
        n_targets: int | None = None,
    ) -> None:
        self.norm = norm
        self.eps = eps
        self.feature_scale = feature_scale
        self.bounds = bounds
        self.mutable = mutable
        self.constraints = constraints
        self.n_steps = n_steps
        self.n_restarts = n_restarts
        self.loss = loss
        self.n_targets = n_targets

    def _n_steps(self) -> int:
        return check_count("n_steps", self.n_steps)

    def _ascend(self, search: Search, X_adv: Tensor) -> None:
        state = _State.at(X_adv)
        last_checkpoint = 0
        for step in range(self._n_steps()):
            found, value, gradient = search.gradient(state.X_adv, self._loss(search))
            search.end(state.X_adv, found, found > 0)
            state = state.observe(value, gradient)
            kept = search.drop(step)
            if kept is not None:
                state, gradient = state[kept], gradient[kept]
            if len(state.X_adv) == 0:
                return
            if step in checkpoints(self._n_steps()):
                state, gradient = self._adapt(state, gradient, step - last_checkpoint)
                last_checkpoint = step
            state = self._move(state, gradient, search.ball, share=self.STEP_SHARE if step else 1.0)
        for X_adv in (state.X_adv, state.X_best):
            search.record(X_adv, search.margin(X_adv), ~search.done)

    def _adapt(self, state: "_State", gradient: Tensor, n_steps: int) -> tuple["_State", Tensor]:
        """Halve the step of the samples that have stalled, and put them at their best point."""
        stalled = state.n_rises < self.RISING_SHARE * n_steps
        stalled |= ~state.was_halved & (state.best <= state.best_at_checkpoint)
        at = rows(stalled, gradient)
        back = replace(
            state,
            X_adv=torch.where(at, state.X_best, state.X_adv),
            X_previous=torch.where(at, state.X_best, state.X_previous),
            step_size=torch.where(stalled, state.step_size / 2, state.step_size),
            n_rises=torch.zeros_like(state.n_rises),
            best_at_checkpoint=state.best,
            was_halved=stalled,
        )
        return back, torch.where(at, state.gradient_best, gradient)

    def _move(self, state: "_State", gradient: Tensor, ball: Ball, share: float) -> "_State":
        """Return the next iterate: x + α (z - x) + (1 - α) (x - x_previous), z = Π(x + η d)."""
        X = state.X_adv
        step_size = rows(state.step_size, X) * ball.eps
        Z = ascend(ball, X, gradient.clone(), step_size)
        moved = X + share * (Z - X) + (1 - share) * (X - state.X_previous)
        return replace(state, X_adv=ball.project(moved), X_previous=X)


def checkpoints(n_steps: int) -> set[int]:
    """Return the steps after which step sizes are reconsidered (section 3.1 of the paper)."""
    percents = [0, 22]  # integers, whose multiples ceil does not round up
    while percents[-1] < 100:
        percents.append(percents[-1] + max(percents[-1] - percents[-2] - 3, 6))
    return {-(-percent * n_steps // 100) for percent in percents[1:] if percent < 100}


@dataclass(frozen=True)
class _State:
    """What APGD knows of each active sample; `step_size` is in units of eps."""

    X_adv: Tensor
    X_previous: Tensor
    X_best: Tensor
    gradient_best: Tensor
    best: Tensor
    previous: Tensor
    best_at_checkpoint: Tensor
    step_size: Tensor
    n_rises: Tensor
    was_halved: Tensor

    @classmethod
    def at(cls, X: Tensor) -> "_State":
        """Return the state before the first query, at the start X."""
        lowest = torch.full((len(X),), -torch.inf, dtype=X.dtype, device=X.device)
        return cls(
            X_adv=X,
            X_previous=X,
            X_best=X,
            gradient_best=torch.zeros_like(X),
            best=lowest,
            previous=-lowest,  # to which the first loss is no rise
            best_at_checkpoint=lowest,
            step_size=torch.full_like(lowest, 2.0),
            n_rises=torch.zeros_like(lowest),
            was_halved=torch.zeros_like(lowest, dtype=torch.bool),
        )

    def observe(self, value: Tensor, gradient: Tensor) -> "_State":
        """Take note of loss and gradient at the iterate."""
        better = value > self.best
        at = rows(better, gradient)
        return replace(
            self,
            X_best=torch.where(at, self.X_adv, self.X_best),
            gradient_best=torch.where(at, gradient, self.gradient_best),
            best=torch.where(better, value, self.best),
            n_rises=self.n_rises + (value > self.previous),
            previous=value,
        )

    def __getitem__(self, index: Tensor) -> "_State":
        return _State(**{field.name: getattr(self, field.name)[index] for field in fields(self)})
