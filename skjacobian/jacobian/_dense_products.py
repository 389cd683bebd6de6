"""Two matrix products of dense layers that save operations, with their gradients."""

import torch
from torch import Tensor


def gram_product(A: Tensor, W: Tensor) -> Tensor:
    """Return A (W Wᵀ), from which ‖a W‖² = ⟨a (W Wᵀ), a⟩ without forming A W.

    Parameters
    ----------
    A : Tensor of shape (..., n_hidden)
    W : Tensor of shape (n_hidden, n_features)
    """
    return A @ symmetric_product(W.T, W.T)


def gram_gradient(A: Tensor, weight: Tensor, W: Tensor) -> Tensor:
    """Return the gradient of Σ w_a ‖a W‖² by W, which is 2 Aᵀ diag(w) A W.

    Parameters
    ----------
    A : Tensor of shape (n_samples, n_rows, n_hidden)
    weight : Tensor of shape (n_samples,)
        w, the same for all rows of a sample.
    W : Tensor of shape (n_hidden, n_features)
    """
    flat = A.flatten(0, 1)
    # Not worth waiting for an accelerator to tell.
    if not weight.is_cuda and bool((weight == weight[0]).all()):
        return symmetric_product(flat, flat) @ (2 * weight[0] * W)
    weighted = (weight.reshape(-1, 1, 1) * A).flatten(0, 1)
    return symmetric_product(flat, weighted) @ (2 * W)


def symmetric_product(A: Tensor, B: Tensor) -> Tensor:
    """Return Aᵀ B where it is known to be symmetric, at three quarters of the work.

    One of the two blocks off the diagonal is the transpose of the other.

    Examples
    --------
    >>> import torch
    >>> A = torch.tensor([[1.0, 2.0]])
    >>> symmetric_product(A, A)
    tensor([[1., 2.],
            [2., 4.]])
    """
    half = A.shape[1] // 2
    if half < 64:
        return A.T @ B
    product = A.new_empty(A.shape[1], A.shape[1])
    product[:half] = A[:, :half].T @ B
    product[half:, :half] = product[:half, half:].T
    product[half:, half:] = A[:, half:].T @ B[:, half:]
    return product


def masked_product(V: Tensor, slope: Tensor, W: Tensor) -> Tensor:
    """Return B_icj = Σ_h V_ch s_ih W_hj: from the same rows V at each sample i.

    Parameters
    ----------
    V : Tensor of shape (n_rows, n_hidden)
    slope : Tensor of shape (n_samples, n_hidden)
    W : Tensor of shape (n_hidden, n_in)

    Returns
    -------
    Tensor of shape (n_samples, n_rows, n_in)

    Examples
    --------
    >>> import torch
    >>> masked_product(torch.ones(1, 2), torch.tensor([[0.0, 3.0]]), torch.eye(2))
    tensor([[[0., 3.]]])
    """
    return (V * slope.unsqueeze(1)) @ W


def masked_gradients(V: Tensor, slope: Tensor, W: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `masked_product` by V and W, for the gradient D by B.

    Both are sums over T_hcj = Σ_i s_ih D_icj, one product of the size of the forward one, where
    the chain rule for V∘s and W would take two. Class by class, so that T stays in the caches.
    """
    by_V, by_W, T = torch.empty_like(V), torch.zeros_like(W), torch.empty_like(W)
    for c, v in enumerate(V):
        torch.mm(slope.T, D[:, c], out=T)
        by_W.addcmul_(T, v.unsqueeze(1))
        torch.sum(T.mul_(W), 1, out=by_V[c])
    return by_V, by_W
