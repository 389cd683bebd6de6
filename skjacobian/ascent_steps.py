"""Steps of an ascent in a ball: the steepest, what the box leaves of it, and how far it gets."""

import torch
from torch import Tensor

from skjacobian.geometry import FEW_FEATURES, Ball, is_nowhere
from skjacobian.norms import rows, unit_rows, vector_norm
from skjacobian.projections import best_l1_vertex

# Among many features, steps are lengthened of which the box lets follow less than this share.
HINDERED = 0.2


def ascend(ball: Ball, X_adv: Tensor, gradient: Tensor, step_size: float | Tensor) -> Tensor:
    """Return an ascent step of length α = `step_size` from x, which ends inside the set.

    Π(x + α·d) with the `steepest` d, for l2 and linf; for l2, in tables, α is the length of what
    the box lets follow of α·d. For l1 that d moves one feature at a time, and the
    projection takes from all others what a box makes it overshoot, so it stalls short of
    the optimum even of a linear model. So for l1 the step is that of conditional gradients,
    x + min(1, α / ‖v - x‖₁)(v - x), towards the best point v of the set to first order
    (Jaggi, ICML 2013, algorithm 1): exact for a linear model as soon as the steps have
    crossed the ball.

    Parameters
    ----------
    ball : Ball
    X_adv : Tensor of shape (n_samples, *features)
        Points inside the sets.
    gradient : Tensor of shape (n_samples, *features)
        ∂loss/∂x at `X_adv`. Overwritten, which saves an allocation of its size.
    step_size : float or Tensor of shape (n_samples, 1, ...)
    """
    if ball.norm == "linf":
        assert ball.box is not None
        d = _signs(ball, gradient)
        d = d if ball.scale is None else d.mul_(ball.scale)
        return torch.clamp(d.mul_(step_size).add_(X_adv), *ball.box, out=d)
    if ball.norm == "l2":
        return ball.in_blocks(_stepped_and_projected, X_adv, gradient, step_size)
    best = best_point(ball, gradient)
    length = ball.to_scaled(best - X_adv).abs_().sum(1)
    share = step_size / rows(length.clamp_(min=torch.finfo(length.dtype).tiny), X_adv)
    share = share.clamp_(max=1.0) * rows(gradient.flatten(1).abs().amax(1).sign_(), X_adv)
    return torch.lerp(X_adv, best, share)


def _stepped_and_projected(
    ball: Ball, X_adv: Tensor, gradient: Tensor, step_size: float | Tensor
) -> Tensor:
    step = steepest(ball, gradient).mul_(step_size)
    if ball.box is not None:
        step = _lengthened(ball, step, step_size, X_adv, gradient)
    return ball.project(step.add_(X_adv))


def _lengthened(
    ball: Ball, step: Tensor, step_size: float | Tensor, X_adv: Tensor, gradient: Tensor
) -> Tensor:
    """Return the step so long that what the box lets follow of it has the length meant.

    Of many features only a step longer than the radius of which the box lets little follow:
    images, whose pixels have one unit, pay no more than the question.
    """
    if ball.rules is not None or ball.X.shape[1:].numel() <= FEW_FEATURES:
        return step / rows(_open_share(ball, X_adv, gradient), step)
    assert ball.box is not None
    length = step_size.flatten() if isinstance(step_size, Tensor) else step_size
    is_long = length > ball.radii()
    if is_nowhere(is_long):
        return step
    followed = (step + X_adv).clamp_(*ball.box).sub_(X_adv)
    is_hindered = (ball.length_of(followed) < HINDERED * length) & is_long
    if is_nowhere(is_hindered):
        return step
    share = _open_share(ball, X_adv, gradient).where(is_hindered, 1.0)
    return step / rows(share, step)


def _open_share(ball: Ball, X_adv: Tensor, gradient: Tensor) -> Tensor:
    """Return the share of the length of each gradient that the box lets follow, 1 for none.

    A steep feature at its bound would take nearly all of each step's length. It is no part of
    the length, but of the step: without it the projection would take it back from there.
    """
    followed = dual_length(ball, open_part(ball, X_adv, gradient))
    return torch.where(followed > 0, followed / dual_length(ball, gradient), 1.0)


def best_point(ball: Ball, gradient: Tensor) -> Tensor:
    """Return argmax {gᵀx} over each l1 set: where a linear loss of this slope is largest."""
    scaled = gradient if ball.scale is None else gradient * ball.scale
    u = best_l1_vertex(scaled.flatten(1), ball.eps_within_rounding(), *(ball.u_box or ()))
    return ball.from_scaled(u)


def steepest(ball: Ball, gradient: Tensor) -> Tensor:
    """Return the unit step that climbs the first-order loss most, for ∂loss/∂x.

    argmax {gᵀd : ‖d / scale‖ <= 1}: sign(g) for linf, g / ‖g‖₂ for l2, the sign of the
    largest |g_j| alone for l1, in scaled coordinates. A zero gradient gives a zero step.
    For linf the columns of a category point at the best one: it can be one alone.
    """
    if ball.norm == "linf":
        step = _signs(ball, gradient.clone())
        return step if ball.scale is None else step * ball.scale
    if ball.norm == "l1":
        scaled = gradient if ball.scale is None else gradient * ball.scale
        step = best_l1_vertex(scaled.flatten(1), 1.0).reshape(gradient.shape)
        return step if ball.scale is None else step * ball.scale
    if ball.scale is None:
        return unit_rows(gradient)
    return ball.scale * unit_rows(ball.scale * gradient)


def _signs(ball: Ball, gradient: Tensor) -> Tensor:
    """Return sign(g), in the place of g; of a category 1 where g is largest, else -1."""
    groups = () if ball.rules is None else ball.rules.groups
    flat = gradient.flatten(1)
    of_groups = [flat[:, group] for group in groups]
    signs = gradient.sign_()
    for group, g in zip(groups, of_groups, strict=True):
        assert ball.box is not None
        reachable = ball.box.high.flatten(1)[:, group] >= 1
        best = g.where(reachable, -torch.inf).argmax(1, keepdim=True)
        toward = torch.full_like(g, -1.0).scatter_(1, best, 1.0)
        signs.flatten(1)[:, group] = toward * (g != 0).any(1, keepdim=True)
    return signs


def dual_length(ball: Ball, gradient: Tensor) -> Tensor:
    """Return max {gᵀd : ‖d / scale‖ <= 1} of each row, shape (n_samples,)."""
    scaled = gradient if ball.scale is None else gradient * ball.scale
    return vector_norm(scaled, {"linf": "l1", "l2": "l2", "l1": "linf"}[ball.norm])


def open_part(ball: Ball, X_adv: Tensor, gradient: Tensor) -> Tensor:
    """Return a copy of a gradient, 0 at the features that the box does not let follow it."""
    if ball.box is None:
        return gradient.clone()
    return open_features(ball, X_adv, gradient).mul_(gradient)


def open_features(ball: Ball, X_adv: Tensor, gradient: Tensor) -> Tensor:
    """Return 1 at the features that the box lets follow a gradient, 0 at the others."""
    room = _room(ball, X_adv, gradient)
    if ball.norm != "linf":  # whose iterates reach their bounds exactly
        rounding = (X_adv.abs() + ball.X.abs()).mul_(8 * torch.finfo(gradient.dtype).eps)
        room = room.abs_().sub_(rounding).relu_()
    return room.sign_().abs_()


def _room(ball: Ball, X_adv: Tensor, gradient: Tensor) -> Tensor:
    """Return how far, and which way, the box lets each feature follow a gradient."""
    # Arithmetic, because on the CPU comparisons cost ten times as much.
    assert ball.box is not None
    far = torch.add(X_adv, gradient, alpha=torch.finfo(gradient.dtype).max / 2)
    return far.clamp_(*ball.box).sub_(X_adv)


def ascent_left(ball: Ball, X_adv: Tensor, gradient: Tensor) -> Tensor:
    """Return how much a linear loss of slope `gradient` can still climb from `X_adv`.

    The Frank-Wolfe gap max {gᵀ(x - X_adv)} over each set (Jaggi, ICML 2013, equation 2): 0
    where a search has come to rest. For l2 and l1 with a box it is a bound from above, the
    ball alone for the features that the box lets move from X.

    Parameters
    ----------
    ball : Ball
    X_adv : Tensor of shape (n_samples, *features)
        Points inside the sets.
    gradient : Tensor of shape (n_samples, *features)

    Returns
    -------
    Tensor of shape (n_samples,)

    Examples
    --------
    >>> import torch
    >>> ball = Ball.around(torch.zeros(1, 2), norm="l2", eps=1.0)
    >>> ascent_left(ball, torch.tensor([[0.0, 0.5]]), torch.tensor([[0.0, 2.0]]))
    tensor([1.])
    """
    if ball.norm == "linf":
        assert ball.box is not None
        down, up = (gradient * (side - X_adv) for side in ball.box)
        return torch.maximum(up, down).flatten(1).sum(1)
    climbed = (gradient * (X_adv - ball.X)).flatten(1).sum(1)
    if ball.box is not None:
        gradient = _room(ball, ball.X, gradient).sign_().mul_(gradient)
    return (ball.radii() * dual_length(ball, gradient) - climbed).clamp_(min=0.0)
