"""Projected gradient descent on the negative loss (Madry et al., arXiv 1706.06083)."""

from typing import Any

import torch
from torch import Tensor

from skjacobian._validation import (
    check_count,
    check_count_or_auto,
    check_non_negative,
    check_positive,
    unwrap_scalar,
)
from skjacobian.ascent_steps import ascend
from skjacobian.attacks._ascent import GradientAscent
from skjacobian.attacks._search import AIMED_CLASSES, Search
from skjacobian.attacks._single_features import vertices_pay
from skjacobian.constraints import FeatureConstraints
from skjacobian.geometry import Ball

# In how many searches "auto" looks for what one leads past, where few features may change.
RESTARTS_OF_FEW = 3
# And how briefly it aims then at the likeliest wrong classes.
AIMED_STEPS = 10


class PGD(GradientAscent):
    """Projected gradient descent: steepest ascent of the loss, projected on the ball.

    x ← Π(x + α·argmax_{‖d‖<=1} dᵀ∇ₓℓ) (Madry et al., arXiv 1706.06083, section 2.1). For l1
    that moves one feature at a time; there the step is one of conditional gradients, towards the
    best point of ball and box (`skjacobian.ascent_steps.ascend`).

    With the default steps and no momentum, samples are given up that even a slope five times as
    steep would not fool, from a fifth of the steps on, where the slope has been steady and the last
    steps led nowhere. That spares a quarter to a third of the time (docs/benchmarks.md says what
    it misses); a `step_size` takes every sample through all steps.

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
    n_steps : int, default=40
        Gradient steps of one restart.
    step_size : float, optional
        α, in the units of `eps`. None lets it fall as 2·eps·(1 - step/n_steps)², for l1 as
        1.5·eps·(1 - step/n_steps): large steps fool most samples early, small ones finish the
        rest (docs/benchmarks.md).
    random_start : bool, default=True
        Begin the first search at a random point of the ball rather than at X.
    n_restarts : int or "auto", default=1
        Searches, each of the samples that no search before it fooled. All but the first begin at
        random points; under l1 and l2, where at most 100 features may change, at the best changes
        of single features. "auto" is 1, but where at most 100 features may change it is 3 under
        l1, and where there are more than two classes, with a brief search towards each of the 9
        likeliest wrong ones: there the gradient may lead towards the wrong features, or the wrong
        class even of a linear model. One search left up to 27 % of the samples standing that more
        fooled (docs/benchmarks.md), and where bounds kept the class that leads out of reach, 68 %.
    loss : {"soft_margin", "cross_entropy", "margin", "dlr"}, default="soft_margin"
        What the search climbs, see `skjacobian.losses`. The default finds as much as the
        stronger of cross-entropy and margin, whatever the scale of the logits.
    n_targets : int, optional
        Search towards each of this many wrong classes in turn, the likeliest first, by the
        targeted form of the loss (Gowal et al., arXiv 1910.09338). None searches towards
        none in particular. Any wrong class counts as success.
    momentum : float, default=0.0
        μ of the average of gradients that is followed (Dong et al., arXiv 1710.06081).

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> X, y = torch.tensor([[1.0, 0.5]]), torch.tensor([0])
    >>> attack = PGD(norm="linf", eps=0.2)
    >>> attack(lambda X: X @ W.T, X, y, generator=torch.Generator().manual_seed(0))
    tensor([[0.8000, 0.7000]])
    """

    # The factor c and the power p of the default step size α = c·eps·(1 - step/n_steps)^p. Under
    # l1 a step that crosses the ball ends at a vertex, whatever the start.
    STEP_SIZES = {"linf": (2, 2), "l2": (2, 2), "l1": (1.5, 1)}

    def __init__(
        self,
        *,
        norm: str = "linf",
        eps: Any = 0.1,
        feature_scale: Any = None,
        bounds: Any = None,
        mutable: Any = None,
        constraints: FeatureConstraints | None = None,
        n_steps: int = 40,
        step_size: float | None = None,
        random_start: bool = True,
        n_restarts: int | str = 1,
        loss: str = "soft_margin",
        n_targets: int | None = None,
        momentum: float = 0.0,
    ) -> None:
        self.norm = norm
        self.eps = eps
        self.feature_scale = feature_scale
        self.bounds = bounds
        self.mutable = mutable
        self.constraints = constraints
        self.n_steps = n_steps
        self.step_size = step_size
        self.random_start = random_start
        self.n_restarts = n_restarts
        self.loss = loss
        self.n_targets = n_targets
        self.momentum = momentum

    def check_params(self) -> None:
        """Raise a ValueError that names the first parameter with a bad value."""
        super().check_params()
        check_non_negative("momentum", self.momentum)
        if self.step_size is not None:
            check_positive("step_size", self.step_size)

    def _check_n_restarts(self) -> None:
        check_count_or_auto("n_restarts", self.n_restarts)

    def _search(self, search: Search, generator: torch.Generator) -> None:
        super()._search(search, generator)
        if self._may_be_misled(search) and search.restart():
            self._aimed()._search(search, generator)

    def _may_be_misled(self, search: Search) -> bool:
        """Tell whether gradients may lead to the wrong class of several; known after a query."""
        has_few = search.all_balls.has_few_features
        return self.n_restarts == "auto" and has_few and search.n_classes > 2

    def _aimed(self) -> "PGD":
        """Return a brief search towards each wrong class in turn: exact if linear.

        The class that leads near a sample may be one that bounds keep out of reach.
        """
        n_steps = min(self._n_steps(), AIMED_STEPS)
        brief = PGD(n_steps=n_steps, n_targets=AIMED_CLASSES, random_start=False)
        return brief.with_threat(self.threat_model)

    def _n_restarts(self, search: Search) -> int:
        if self.n_restarts != "auto":
            return super()._n_restarts(search)
        at_vertices = self.norm == "l1" and vertices_pay(search.all_balls)
        return RESTARTS_OF_FEW if at_vertices or self._may_be_misled(search) else 1

    def _n_steps(self) -> int:
        return check_count("n_steps", self.n_steps)

    def _reach(self, step: int) -> float | None:
        if self.step_size is not None:
            return None
        n_steps = self._n_steps()
        return min(2.0, sum(self._falling(later, n_steps) for later in range(step, n_steps)))

    def _step(self, X_adv: Tensor, direction: Tensor, ball: Ball, step: int) -> Tensor:
        if self.step_size is None:
            step_size = ball.eps * self._falling(step, self._n_steps())
        else:
            step_size = unwrap_scalar(self.step_size)
        return ascend(ball, X_adv, direction, step_size)

    def _falling(self, step: int, n_steps: int) -> float:
        """Return the default step size, in units of eps."""
        factor, power = self.STEP_SIZES[self.norm]
        return float(factor * (1 - step / n_steps) ** power)
