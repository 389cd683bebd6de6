"""Exact algorithms on ball ∩ box: the nearest point for l2 and l1, the best vertex for l1.

All work on rows of shape (n_samples, n_features) around the origin, with low <= 0 <= high.
They use arithmetic where a mask would do: on the CPU boolean masks cost ten times as much.
"""

import torch
from torch import Tensor


def project_l2_box(Z: Tensor, eps: float | Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Project the rows of `Z` on {u : ‖u‖₂ <= eps, low <= u <= high}, exactly.

    By the KKT conditions the projection is u = clip(t Z, low, high) with the largest t in
    [0, 1] that keeps the norm within eps. As a function of s = t² the squared norm of u is
    concave and piecewise linear, with the slope Σ z_j² over the features that are not clipped.
    So Newton's method from the left climbs to the root in finitely many steps (two or three
    in practice) and every iterate is feasible.

    Parameters
    ----------
    Z, low, high : Tensor of shape (n_samples, n_features)
        Points, and the box around the origin: low <= 0 <= high.
    eps : float or Tensor of shape (n_samples, 1)
        Radius of the ball.

    Returns
    -------
    Tensor of shape (n_samples, n_features)

    Examples
    --------
    >>> import torch
    >>> one = torch.ones(1, 2)
    >>> project_l2_box(torch.tensor([[3.0, 4.0]]), 1.25, -one, one)
    tensor([[0.7500, 1.0000]])
    """
    tiny = torch.finfo(Z.dtype).tiny
    budget = _like(Z, eps).square()
    tolerance = 16 * torch.finfo(Z.dtype).eps * budget
    s = (budget / _squared_length(Z).clamp_(min=tiny)).clamp_(max=1.0)
    u, scaled = torch.empty_like(Z), torch.empty_like(Z)
    for _ in range(16 if Z.is_cuda else Z.shape[1] + 1):
        torch.mul(s.sqrt(), Z, out=scaled)
        torch.clamp(scaled, low, high, out=u)
        room = budget - _squared_length(u)
        # Waiting for an accelerator to tell whether all rows have converged costs more
        # than the remaining steps, so only the CPU looks.
        if not Z.is_cuda and bool(((room <= tolerance) | (s >= 1)).all()):
            break
        free = scaled.eq_(u)  # 1 where nothing is clipped, else 0
        s = (s + room.clamp_(min=0.0) / _squared_length(free.mul_(Z)).clamp_(min=tiny)).clamp_(
            max=1
        )
    return u


def _like(Z: Tensor, eps: float | Tensor) -> Tensor:
    """Return eps as a tensor; a number is filled in, for copies wait for an accelerator."""
    if isinstance(eps, Tensor):
        return eps.to(Z)
    return torch.full((), float(eps), dtype=Z.dtype, device=Z.device)


def _squared_length(Z: Tensor) -> Tensor:
    """Return Σ_j z_j² of each row, to a few units in the last place."""
    if Z.shape[1] > 4096:  # where a norm, which adds up one by one, loses twenty
        return Z.square().sum(1, keepdim=True)
    return torch.linalg.vector_norm(Z, dim=1, keepdim=True).square_()


def project_l1(Z: Tensor, eps: float | Tensor) -> Tensor:
    """Project the rows of `Z` on the l1 ball {u : ‖u‖₁ <= eps}, exactly.

    The projection is the soft threshold sign(z) max(|z| - t, 0). Its norm is convex in t
    and piecewise linear, so Newton's method from the left climbs to the root in finitely
    many steps (Michelot, J. Optim. Theory Appl. 50, 1986); 5 to 10 for 784 features, which
    is ten times faster than sorting them.

    Parameters
    ----------
    Z : Tensor of shape (n_samples, n_features)
    eps : float or Tensor of shape (n_samples, 1)
        Radius of the ball.

    Returns
    -------
    Tensor of shape (n_samples, n_features)

    Examples
    --------
    >>> import torch
    >>> project_l1(torch.tensor([[3.0, -4.0, 1.0]]), 2.0)
    tensor([[ 0.5000, -1.5000,  0.0000]])
    """
    budget = _like(Z, eps)
    tolerance = 8 * torch.finfo(Z.dtype).eps * budget
    # |z| - t is kept, not t: it is small where it matters, so its rounding errors are too.
    excess = Z.abs()
    outside = (excess.sum(1, keepdim=True) - budget).sign_().relu_()
    for step in range(Z.shape[1] + 1):
        u = excess.relu()
        over = outside * (u.sum(1, keepdim=True) - budget)
        if _is_looked_at(step, Z) and not bool((over.abs() > tolerance).any()):
            break
        excess -= over / u.sign_().sum(1, keepdim=True).clamp_(min=1.0)
    return torch.minimum(excess.relu_(), budget).mul_(Z.sign())


def project_l1_box(Z: Tensor, eps: float | Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Project the rows of `Z` on {u : ‖u‖₁ <= eps, low <= u <= high}, exactly.

    The projection is sign(z) min(max(|z| - t, 0), b) with b_j the bound on z_j's side and
    the t >= 0 that brings the norm to eps, 0 if it is less already (Croce & Hein, arXiv
    2103.01208, proposition 2.1). The norm falls with t, but is not convex. So t solves
    Σ_free (|z_j| - t) + Σ_full b_j = eps where all features are free at first; if the norm
    is then above eps, t must grow and the zeros stay zero; else t must fall and those at
    their bound stay there; and again with the free ones that are left (variable fixing:
    Bitran & Hax, Management Science 27, 1981). Every round fixes a feature, so it ends; 6
    to 12 rounds for 784 features, faster than sorting the 2 · 784 breakpoints.

    Parameters
    ----------
    Z, low, high : Tensor of shape (n_samples, n_features)
        Points, and the box around the origin: low <= 0 <= high. Infinities are allowed.
    eps : float or Tensor of shape (n_samples, 1)
        Radius of the ball.

    Returns
    -------
    Tensor of shape (n_samples, n_features)

    Examples
    --------
    >>> import torch
    >>> one = torch.ones(1, 3)
    >>> project_l1_box(torch.tensor([[3.0, -0.75, 0.5]]), 1.75, -one, one)
    tensor([[ 1.0000, -0.5000,  0.2500]])
    """
    budget = _like(Z, eps)
    tolerance = 8 * torch.finfo(Z.dtype).eps * budget
    most = torch.minimum(Z.clamp(low, high).abs_(), budget)
    outside = (most.sum(1, keepdim=True) - budget).sign_().relu_()
    excess = Z.abs()  # |z| - t, see `project_l1`
    free, work = torch.ones_like(excess), torch.empty_like(excess)
    total, n_free, room = excess.sum(1, keepdim=True), free.sum(1, keepdim=True), budget
    for step in range(Z.shape[1] + 1):
        excess -= outside * (total - room) / n_free.clamp_(min=1.0)
        u = torch.minimum(excess, most, out=work).relu_()
        over = outside * (u.sum(1, keepdim=True) - budget)
        if _is_looked_at(step, Z) and not bool((over.abs() > tolerance).any()):
            break
        grow = over.sign().relu_()
        fall = 1 - grow
        # Still free: above zero where t must grow, below the bound where it must fall.
        still = torch.mul(fall, most, out=work).addcmul_(grow - fall, excess)
        still.relu_().sign_().mul_(free)
        room = room - fall * free.sub_(still).mul_(most).sum(1, keepdim=True)
        free, work = still, free
        n_free = free.sum(1, keepdim=True)
        total = torch.mul(free, excess, out=work).sum(1, keepdim=True)
    return u.mul_(Z.sign())


def _is_looked_at(step: int, Z: Tensor) -> bool:
    """Tell whether to ask after `step` if all rows are done, for which a GPU must wait."""
    return not Z.is_cuda or step % 4 == 3


def best_l1_vertex(
    G: Tensor, eps: float | Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    """Return argmax {gᵀu : ‖u‖₁ <= eps, low <= u <= high} for each row g of `G`.

    A linear function is largest where the features are filled up to their bounds, in the
    order of |g|, until eps is used up. A feature with g_j = 0 stays 0.

    Parameters
    ----------
    G : Tensor of shape (n_samples, n_features)
    eps : float or Tensor of shape (n_samples, 1)
        Radius of the ball.
    low, high : Tensor of shape (n_samples, n_features) or None
        The box around the origin, low <= 0 <= high; None is unbounded.

    Returns
    -------
    Tensor of shape (n_samples, n_features)

    Examples
    --------
    >>> import torch
    >>> G, one = torch.tensor([[3.0, -4.0, 1.0]]), torch.ones(1, 3)
    >>> best_l1_vertex(G, 1.5)
    tensor([[ 0.0000, -1.5000,  0.0000]])
    >>> best_l1_vertex(G, 1.5, -one, one)
    tensor([[ 0.5000, -1.0000,  0.0000]])
    """
    budget = _like(G, eps)
    full = G.sign() * budget
    size = G.abs()
    if low is None or high is None:
        largest = size.argmax(1, keepdim=True)
        return torch.zeros_like(G).scatter_(1, largest, full.gather(1, largest))
    full = full.clamp_(low, high)
    fits = (budget - full.abs().sum(1, keepdim=True)).sign_().relu_()
    wanted = (1 - fits) * budget * (1 - 8 * torch.finfo(G.dtype).eps)
    n_features = G.shape[1]
    # Few features use up eps, and finding the largest few is faster than sorting all; on
    # the CPU most of all up to a 64th of them. An accelerator would wait to be asked.
    k = n_features if G.is_cuda else min(max(8, n_features // 64), n_features)
    while True:
        largest = size.topk(k, dim=1).indices
        filled = full.gather(1, largest)
        used = filled.abs().cumsum(1)
        if k == n_features or not bool((used[:, -1:] < wanted).any()):
            break
        k = min(4 * k, n_features)
    left = (budget - used + filled.abs()).clamp_(min=0.0)
    return (fits * full).scatter_(1, largest, filled.clamp_(-left, left))
