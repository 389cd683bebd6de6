"""Where searches under l1 and l2 begin again among few features: where one alone has changed most.

These are the vertices of the l1 ball. The best perturbation often changes two or three features,
and from X or from a random point, where all change a little, the gradient may lead to others.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from skjacobian.attacks._search import Search
from skjacobian.geometry import Ball


def vertices_pay(ball: Ball) -> bool:
    """Tell whether searches are to begin again at vertices: of few features, but for linf."""
    return ball.norm != "linf" and ball.has_few_features


def vertex(ball: Ball, which: Tensor) -> Tensor:
    """Return the point of each set where one feature has changed as far as ball and box allow.

    Parameters
    ----------
    ball : Ball
    which : Tensor of int of shape (n_samples,)
        The place of the feature among those that may change; increased by their number if it is
        to fall rather than to rise.
    """
    free = ball.free_features()
    sign = (1 - 2 * (which // len(free))).to(ball.X)
    change = torch.zeros_like(ball.X.flatten(1))
    change.scatter_(1, free[which % len(free)].unsqueeze(1), sign.unsqueeze(1))
    change = change.reshape(ball.X.shape) * ball.eps
    X_adv = ball.X + (change if ball.scale is None else change * ball.scale)
    return X_adv if ball.box is None else X_adv.clamp_(*ball.box)


def ranked_vertices(
    search: Search, balls: Callable[[], Ball], keep: Callable[[Tensor, Tensor], None]
) -> Tensor:
    """Ask about all vertices; return of each sample their places, the most promising first.

    Parameters
    ----------
    search : Search
    balls : callable
        Returns the sets of the active samples.
    keep : callable
        Takes a vertex of each active sample, and the margins there.

    Returns
    -------
    Tensor of int of shape (n_samples, n_vertices)
        Of use for `vertex`, for the samples that still stand.
    """
    n_vertices = 2 * len(search.all_balls.free_features())
    margins = torch.full_like(search.best, -torch.inf).repeat(n_vertices, 1)
    for place, margin in enumerate(margins):
        if not search.restart():
            break
        X_adv = vertex(balls(), torch.full_like(search.y, place))
        found = search.margin(X_adv)
        margin[search.active] = found.where(~found.isnan(), -torch.inf)
        keep(X_adv, found)
    return margins.sort(dim=0, stable=True, descending=True).indices.T
