"""Fast gradient sign method (Goodfellow, Shlens & Szegedy, arXiv 1412.6572)."""

from typing import Any

from torch import Tensor

from skjacobian.ascent_steps import ascend
from skjacobian.attacks._ascent import GradientAscent
from skjacobian.constraints import FeatureConstraints
from skjacobian.geometry import Ball


class FGSM(GradientAscent):
    """Fast gradient sign method: one steepest step of length eps.

    x + eps·sign(∇ₓℓ) (Goodfellow, Shlens & Szegedy, arXiv 1412.6572, section 4), and for
    l2 the fast gradient method x + eps·∇ₓℓ/‖∇ₓℓ‖₂. Cheap, and weak: robustness against
    it alone says little.

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
    random_start : bool, default=False
        Start at a random point of the ball and step by 1.25·eps, as fast adversarial
        training does (Wong, Rice & Kolter, arXiv 2001.03994, algorithm 3).
    loss : {"cross_entropy", "soft_margin", "margin", "dlr"}, default="cross_entropy"
        What the step climbs.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> X, y = torch.tensor([[1.0, 0.5]]), torch.tensor([0])
    >>> FGSM(norm="linf", eps=0.5)(lambda X: X @ W.T, X, y)
    tensor([[0.5000, 1.0000]])
    """

    n_restarts = 1
    n_targets = None
    momentum = 0.0

    def __init__(
        self,
        *,
        norm: str = "linf",
        eps: Any = 0.1,
        feature_scale: Any = None,
        bounds: Any = None,
        mutable: Any = None,
        constraints: FeatureConstraints | None = None,
        random_start: bool = False,
        loss: str = "cross_entropy",
    ) -> None:
        self.norm = norm
        self.eps = eps
        self.feature_scale = feature_scale
        self.bounds = bounds
        self.mutable = mutable
        self.constraints = constraints
        self.random_start = random_start
        self.loss = loss

    def _n_steps(self) -> int:
        return 1

    def _step(self, X_adv: Tensor, direction: Tensor, ball: Ball, step: int) -> Tensor:
        step_size = 1.25 * ball.eps if self.random_start else ball.eps
        return ascend(ball, X_adv, direction, step_size)
