"""Jacobian norms as surrogates of what an attack can do: the chain of inequalities.

The mathematics, for cross-entropy ℓ = -log p_y with p = softmax(z), logits z(x), and their
Jacobian J = ∂z/∂x: ∇ₓℓ = Jᵀ(p - e_y) = Σ_k p_k (J_k - J_y). Under an l2 attack of radius ε

    ε‖∇ₓℓ‖₂ <= ε√2(1 - p_y) σ_max(J) <= ε√2 σ_max(J) <= ε√2‖J‖_F <= (ε/√2)(τ + ‖J‖_F²/τ),

and under a linf attack

    ε‖∇ₓℓ‖₁ <= ε(1 - p_y) max_k ‖J_k - J_y‖₁ <= ε max_k ‖J_k - J_y‖₁
             <= ε√2‖J‖_{2,1}  and  <= ε‖J‖_{1,1};

of the last two either may be the smaller one (‖J‖_{2,1} <= ‖J‖_{1,1}, but the √2 counts).

These inequalities are exact at each x, but the left end is the increase of the loss to first
order only. The surrogates without 1 - p_y do more: ‖p - e_y‖₂ <= √2 and Σ_{k≠y} p_k <= 1 at
every point, so for a network that is affine on the ball they bound the whole increase. What
they leave out is how J changes within the ball, and nothing here is a certificate.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skjacobian._validation import check_option
from skjacobian.jacobian import jacobian_norm
from skjacobian.model_modes import PredictLogits, frozen

SQRT2 = math.sqrt(2)

# A bound on the increase of the loss at each sample, of (predict_logits, X, y, eps).
Term = Callable[[PredictLogits, Tensor, Tensor, Any], Tensor]


def first_order_l2(predict_logits: PredictLogits, X: Tensor, y: Tensor, eps: Any) -> Tensor:
    """Return ε‖∇ₓℓ‖₂ = max {δᵀ∇ₓℓ : ‖δ‖₂ <= ε}.

    Proof: Cauchy-Schwarz, with equality at δ = ε∇ₓℓ/‖∇ₓℓ‖₂.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    >>> X, y = torch.zeros(1, 2), torch.tensor([0])
    >>> first_order_l2(lambda X: X @ W.T, X, y, eps=0.1)
    tensor([0.2500])
    """
    return eps * _norm(predict_logits, X, y, norm="l2", output="loss").sqrt()


def first_order_linf(predict_logits: PredictLogits, X: Tensor, y: Tensor, eps: Any) -> Tensor:
    """Return ε‖∇ₓℓ‖₁ = max {δᵀ∇ₓℓ : ‖δ‖_∞ <= ε}.

    Proof: Hölder, with equality at δ = ε sign(∇ₓℓ).

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    >>> X, y = torch.zeros(1, 2), torch.tensor([0])
    >>> first_order_linf(lambda X: X @ W.T, X, y, eps=0.1)
    tensor([0.3500])
    """
    return eps * _norm(predict_logits, X, y, norm="l1", output="loss")


def weighted_spectral(predict_logits: PredictLogits, X: Tensor, y: Tensor, eps: Any) -> Tensor:
    """Return ε√2(1 - p_y) σ_max(J) >= ε‖∇ₓℓ‖₂.

    Proof: ‖Jᵀ(p - e_y)‖₂ <= σ_max(J)‖p - e_y‖₂ and ‖p - e_y‖₂² = (1 - p_y)² + Σ_{k≠y} p_k²
    <= 2(1 - p_y)².

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    >>> X, y = torch.zeros(1, 2), torch.tensor([0])
    >>> weighted_spectral(lambda X: X @ W.T, X, y, eps=0.1)
    tensor([0.2828])
    """
    return wrong_probability(predict_logits, X, y) * spectral(predict_logits, X, y, eps)


def spectral(predict_logits: PredictLogits, X: Tensor, y: Tensor, eps: Any) -> Tensor:
    """Return ε√2 σ_max(J) >= ε√2(1 - p_y) σ_max(J).

    Proof: p_y >= 0.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    >>> X, y = torch.zeros(1, 2), torch.tensor([0])
    >>> spectral(lambda X: X @ W.T, X, y, eps=0.1)
    tensor([0.5657])
    """
    return eps * SQRT2 * _norm(predict_logits, X, y, norm="spectral")


def frobenius(predict_logits: PredictLogits, X: Tensor, y: Tensor, eps: Any) -> Tensor:
    """Return ε√2‖J‖_F >= ε√2 σ_max(J).

    Proof: ‖J‖_F² is the sum of the squares of all singular values.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    >>> X, y = torch.zeros(1, 2), torch.tensor([0])
    >>> frobenius(lambda X: X @ W.T, X, y, eps=0.1)
    tensor([0.7071])
    """
    return eps * SQRT2 * _norm(predict_logits, X, y, norm="l2").sqrt()


def squared_frobenius(
    predict_logits: PredictLogits, X: Tensor, y: Tensor, eps: Any, tau: float | None = None
) -> Tensor:
    """Return (ε/√2)(τ + ‖J‖_F²/τ) >= ε√2‖J‖_F; its slope in ‖J‖_F² is the λ = ε/(√2τ) of "l2".

    Proof: 2τ‖J‖_F <= τ² + ‖J‖_F², with equality at τ = ‖J‖_F. With one τ for all samples the
    mean is smallest at τ² = Σ ε‖J‖_F² / Σ ε (`optimal_tau`), which None takes.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    >>> X, y = torch.zeros(1, 2), torch.tensor([0])
    >>> squared_frobenius(lambda X: X @ W.T, X, y, eps=0.1, tau=1.0)
    tensor([1.8385])
    """
    squares = _norm(predict_logits, X, y, norm="l2")
    tau = optimal_tau(squares, eps) if tau is None else tau
    return eps / SQRT2 * (tau + squares / tau)


def optimal_tau(squares: Tensor, eps: Any = 1.0) -> float:
    """Return the τ that minimizes mean ε(τ + ‖J‖_F²/τ), √(Σ ε‖J‖_F² / Σ ε), for squares ‖J‖_F².

    Examples
    --------
    >>> import torch
    >>> round(optimal_tau(torch.tensor([9.0, 16.0])), 4)
    3.5355
    """
    share = torch.as_tensor(eps, dtype=squares.dtype, device=squares.device).expand_as(squares)
    if not bool(share.any()):  # nothing moves, and any τ will do
        share = torch.ones_like(squares)
    best = ((share @ squares) / share.sum()).sqrt()
    return max(float(best), torch.finfo(squares.dtype).tiny)


def weighted_cross_lipschitz(
    predict_logits: PredictLogits, X: Tensor, y: Tensor, eps: Any
) -> Tensor:
    """Return ε(1 - p_y) max_k ‖J_k - J_y‖₁ >= ε‖∇ₓℓ‖₁.

    Proof: ‖Σ_k p_k (J_k - J_y)‖₁ <= Σ_{k≠y} p_k ‖J_k - J_y‖₁, and Σ_{k≠y} p_k = 1 - p_y.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    >>> X, y = torch.zeros(1, 2), torch.tensor([0])
    >>> weighted_cross_lipschitz(lambda X: X @ W.T, X, y, eps=0.1)
    tensor([0.3500])
    """
    return wrong_probability(predict_logits, X, y) * cross_lipschitz(predict_logits, X, y, eps)


def cross_lipschitz(predict_logits: PredictLogits, X: Tensor, y: Tensor, eps: Any) -> Tensor:
    """Return ε max_k ‖J_k - J_y‖₁ >= ε(1 - p_y) max_k ‖J_k - J_y‖₁.

    Proof: p_y >= 0.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    >>> X, y = torch.zeros(1, 2), torch.tensor([0])
    >>> cross_lipschitz(lambda X: X @ W.T, X, y, eps=0.1)
    tensor([0.7000])
    """
    return eps * _norm(predict_logits, X, y, norm="cross_lipschitz")


def columns(predict_logits: PredictLogits, X: Tensor, y: Tensor, eps: Any) -> Tensor:
    """Return ε√2‖J‖_{2,1} = ε√2 Σ_j ‖J_·j‖₂ >= ε max_k ‖J_k - J_y‖₁.

    Proof: |J_kj - J_yj| = |(e_k - e_y)ᵀJ_·j| <= √2‖J_·j‖₂ in every column j.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    >>> X, y = torch.zeros(1, 2), torch.tensor([0])
    >>> columns(lambda X: X @ W.T, X, y, eps=0.1)
    tensor([0.9899])
    """
    return eps * SQRT2 * _norm(predict_logits, X, y, norm="l21")


def entrywise(predict_logits: PredictLogits, X: Tensor, y: Tensor, eps: Any) -> Tensor:
    """Return ε‖J‖_{1,1} = ε Σ_kj |J_kj| >= ε max_k ‖J_k - J_y‖₁.

    Proof: ‖J_k - J_y‖₁ <= ‖J_k‖₁ + ‖J_y‖₁, two of the rows that ‖J‖_{1,1} adds.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    >>> X, y = torch.zeros(1, 2), torch.tensor([0])
    >>> entrywise(lambda X: X @ W.T, X, y, eps=0.1)
    tensor([0.7000])
    """
    return eps * _norm(predict_logits, X, y, norm="l1")


def wrong_probability(predict_logits: PredictLogits, X: Tensor, y: Tensor) -> Tensor:
    """Return 1 - p_y = Σ_{k≠y} p_k of each sample, exact also where it is tiny.

    Examples
    --------
    >>> import torch
    >>> wrong_probability(lambda X: X, torch.zeros(1, 4), torch.tensor([0]))
    tensor([0.7500])
    """
    with frozen(predict_logits), torch.no_grad():
        p = predict_logits(X).softmax(1)
    return p.scatter(1, y.unsqueeze(1), 0.0).sum(1)


def _norm(predict_logits: PredictLogits, X: Tensor, y: Tensor | None = None, **how: Any) -> Tensor:
    """Return a norm of the Jacobian in eval mode, so that all terms are of one network."""
    with frozen(predict_logits):
        return jacobian_norm(predict_logits, X, y, **how)


# By the norm of the attack, from tight to loose.
TERMS: dict[str, dict[str, Term]] = {
    "l2": {
        "first_order": first_order_l2,
        "weighted_spectral": weighted_spectral,
        "spectral": spectral,
        "frobenius": frobenius,
        "squared_frobenius": squared_frobenius,
    },
    "linf": {
        "first_order": first_order_linf,
        "weighted_cross_lipschitz": weighted_cross_lipschitz,
        "cross_lipschitz": cross_lipschitz,
        "columns": columns,
        "entrywise": entrywise,
    },
}


# Which term is at most which; "columns" and "entrywise" have no order between them.
ORDER = {
    "l2": (
        ("first_order", "weighted_spectral"),
        ("weighted_spectral", "spectral"),
        ("spectral", "frobenius"),
        ("frobenius", "squared_frobenius"),
    ),
    "linf": (
        ("first_order", "weighted_cross_lipschitz"),
        ("weighted_cross_lipschitz", "cross_lipschitz"),
        ("cross_lipschitz", "columns"),
        ("cross_lipschitz", "entrywise"),
    ),
}


def surrogate_terms(
    predict_logits: PredictLogits, X: Tensor, y: Tensor, *, norm: str, eps: Any
) -> dict[str, Tensor]:
    """Return the first-order term and every surrogate above it, at each sample.

    Parameters
    ----------
    predict_logits : callable
        Maps X to logits, each row by itself. A module is put in eval mode meanwhile.
    X : Tensor of shape (n_samples, *features)
    y : Tensor of shape (n_samples,)
        Class indices.
    norm : {"l2", "linf"}
        Norm of the attack.
    eps : float or Tensor of shape (n_samples,)
        Its radius.

    Returns
    -------
    dict of Tensor of shape (n_samples,)
        Named and in the order of `TERMS[norm]`.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    >>> X, y = torch.zeros(1, 2), torch.tensor([0])
    >>> terms = surrogate_terms(lambda X: X @ W.T, X, y, norm="linf", eps=0.1)
    >>> {name: round(float(term), 3) for name, term in terms.items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'first_order': 0.35, 'weighted_cross_lipschitz': 0.35, 'cross_lipschitz': 0.7,
     'columns': 0.99, 'entrywise': 0.7}
    """
    check_option("norm", norm, TERMS)
    return {name: term(predict_logits, X, y, eps) for name, term in TERMS[norm].items()}
