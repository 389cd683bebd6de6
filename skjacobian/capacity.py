"""Norms of feed-forward networks that bounds on their generalization hold."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn
from torch.func import functional_call

from skjacobian._validation import check_non_negative, check_option
from skjacobian.layers import CONVOLUTIONS, is_changed, is_plain_sequence, pair, pools_disjointly
from skjacobian.losses import margin
from skjacobian.model_modes import frozen
from skjacobian.norms import vector_norm

LINEAR = (nn.Linear, *CONVOLUTIONS)

# Layers that change no norm and no distance by more than the factor 1, and keep 0: what the
# bounds ask of the nonlinearities. Softplus, GELU and SiLU are not among them.
LIPSCHITZ_ONE = (nn.ReLU, nn.Tanh, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)


def network_norms(
    network: nn.Module,
    X: Tensor,
    y: Tensor | None = None,
    *,
    norm: str = "l2",
    eps: float = 0.0,
) -> dict[str, float]:
    """Return norms of a feed-forward network that bounds on its generalization hold.

    For z(x) = A_L φ(… φ(A_1 x)) with biases left out, as the bounds do:

    ======================  ==============================================================
    "spectral_product"      Π_l σ_max(A_l), at least σ_max(J(x)) at every x
    "frobenius_product"     Π_l ‖A_l‖_F (Neyshabur, Tomioka & Srebro, arXiv 1503.00036)
    "spectral_complexity"   (Π_l σ_l)(Σ_l (‖A_lᵀ‖_{2,1}/σ_l)^{2/3})^{3/2}, σ_l = σ_max(A_l)
                            (Bartlett, Foster & Telgarsky, arXiv 1706.08498, equation 1.2,
                            with reference matrices 0)
    "path_norm_1"           Σ over paths of Π |w|, at least ‖J(x)‖_{1,1} at every x
    "path_norm_2"           √Σ over paths of Π w² (Neyshabur, Tomioka & Srebro)
    "radius"                B = max_i ‖x_i‖₂, the size of the inputs
    "adversarial_radius"    B + ε for l2, B + ε√d for linf: that of the attacked inputs
    "adversarial_product"   (adversarial radius)·Π_l ‖A_l‖_F, how norms and radius of the
                            attack enter bounds on the adversarial Rademacher complexity of
                            deep networks (Xiao et al., arXiv 2211.14966); constants and
                            widths are left out
    "margin"                10 % quantile of z_y - max_{k≠y} z_k, where y is given
    ======================  ==============================================================

    These are relative indicators, to compare networks of one architecture; divide by the
    margin where the scale of the logits differs. As absolute bounds they are **vacuous** at
    the size of any network of practice, above 1 by orders of magnitude.

    Parameters
    ----------
    network : nn.Module
        An `nn.Sequential` of linear, convolution and non-overlapping max pooling layers, and
        activations that are 1-Lipschitz and keep 0, as `module_` of our classifiers without
        a `preprocessor` is.
    X : Tensor of shape (n_samples, *features)
    y : Tensor of shape (n_samples,), optional
        Class indices.
    norm : {"l2", "linf"}, default="l2"
        Norm of the attack.
    eps : float, default=0.0
        Its radius.

    Returns
    -------
    dict of float

    Raises
    ------
    TypeError
        For a layer that the bounds do not cover.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(2, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    >>> norms = network_norms(torch.nn.Sequential(layer), torch.ones(1, 2))
    >>> norms["spectral_product"], norms["frobenius_product"], norms["path_norm_1"]
    (4.0, 5.0, 7.0)
    """
    check_option("norm", norm, ("l2", "linf"))
    eps = check_non_negative("eps", eps)
    X = X.detach().to(next(network.parameters()))
    with frozen(network), torch.no_grad():
        maps = list(linear_maps(network, X.shape[1:]))
        sigma = np.array([m.spectral_norm() for m in maps])
        rows = np.array([m.row_norms(2).sum().item() for m in maps])
        lengths = np.array([m.row_norms(2).norm().item() for m in maps])
        radius = float(vector_norm(X, "l2").max())
        attacked = radius + eps * (1 if norm == "l2" else math.sqrt(X[0].numel()))
        norms = {
            "spectral_product": sigma.prod(),
            "frobenius_product": lengths.prod(),
            "spectral_complexity": spectral_complexity(sigma, rows),
            "path_norm_1": path_norm(network, X.shape[1:], 1),
            "path_norm_2": path_norm(network, X.shape[1:], 2),
            "radius": radius,
            "adversarial_radius": attacked,
            "adversarial_product": attacked * lengths.prod(),
        }
        if y is not None:
            norms["margin"] = torch.quantile(-margin(network(X), y.to(X.device)).double(), 0.1)
    return {name: float(value) for name, value in norms.items()}


def spectral_complexity(sigma: np.ndarray, rows: np.ndarray) -> float:
    """Return (Π σ_l)(Σ (r_l/σ_l)^{2/3})^{3/2}, r_l = ‖A_lᵀ‖_{2,1} the sum of the row lengths.

    Bartlett, Foster & Telgarsky (arXiv 1706.08498), equation 1.2, for 1-Lipschitz
    nonlinearities and reference matrices 0.
    """
    if not (sigma > 0).all():
        return 0.0
    return float(sigma.prod() * ((rows / sigma) ** (2 / 3)).sum() ** 1.5)


def path_norm(network: nn.Module, input_shape: tuple[int, ...], p: int) -> float:
    """Return (Σ over all paths from an input to an output of Π |w|^p)^{1/p}.

    Neyshabur, Tomioka & Srebro (arXiv 1503.00036): the network itself with weights |w|^p,
    without biases and nonlinearities, on inputs of 1. A path leads through every input of a
    max pooling. With p = 1 it is at least ‖J(x)‖_{1,1} at every x, for
    |J_kj| = |Σ_paths Π w φ'| <= Σ_paths Π |w|.
    """
    weight = next(network.parameters())
    values = torch.ones(1, *input_shape, dtype=torch.float64, device=weight.device)
    for layer in _layers(network):
        if isinstance(layer, LINEAR):
            values = _with_powers(layer, values, p)
        elif isinstance(layer, nn.MaxPool2d):
            area = math.prod(pair(layer.kernel_size))
            values = area * nn.functional.avg_pool2d(values, layer.kernel_size, layer.stride)
        elif isinstance(layer, nn.Flatten | nn.Unflatten):
            values = layer(values)
    return float(values.sum() ** (1 / p))


def adversarial_rademacher_linear(
    X: Tensor, *, radius: float, norm: str = "linf", eps: float = 0.1
) -> float:
    """Return a bound on the adversarial Rademacher complexity of linear classifiers.

    For {x ↦ ⟨w, x⟩ : ‖w‖₂ <= W} under attack the worst margin is y⟨w, x⟩ - ε‖w‖_q, so that
    the complexity is at most W max_i ‖x_i‖₂/√n + ε sup‖w‖_q/√n, because E|Σσ_i| <= √n; sup‖w‖_q
    is W under l2 and W√d under linf attacks. The dependence on d is the point of Yin,
    Ramchandran & Bartlett (arXiv 1810.11914), who show that it cannot be avoided.

    Parameters
    ----------
    X : Tensor of shape (n_samples, *features)
    radius : float
        W.
    norm : {"linf", "l2"}, default="linf"
        Norm of the attack.
    eps : float, default=0.1
        Its radius.

    Returns
    -------
    float

    Examples
    --------
    >>> import torch
    >>> X = torch.eye(4)
    >>> adversarial_rademacher_linear(X, radius=1.0, norm="linf", eps=0.5)
    1.0
    """
    check_option("norm", norm, ("l2", "linf"))
    dimension = 1.0 if norm == "l2" else math.sqrt(X[0].numel())
    clean = float(vector_norm(X, "l2").max())
    return radius * (clean + check_non_negative("eps", eps) * dimension) / math.sqrt(len(X))


@dataclass(frozen=True)
class LinearMap:
    """A linear or convolution layer without its bias, as the matrix A that it is.

    Attributes
    ----------
    layer : nn.Module
    input_shape : tuple of int
        Of one sample, without the batch.
    """

    layer: Any
    input_shape: tuple[int, ...]

    def row_norms(self, p: int) -> Tensor:
        """Return ‖A_i·‖_p of every row: A with entries |a|^p, applied to ones."""
        ones = torch.ones(1, *self.input_shape, dtype=torch.float64).to(self.layer.weight.device)
        return _with_powers(self.layer, ones, p).flatten() ** (1 / p)

    def spectral_norm(self) -> float:
        """Return σ_max(A): exact for a dense layer, by Lanczos on the map of a convolution."""
        if isinstance(self.layer, nn.Linear):
            return float(torch.linalg.matrix_norm(self.layer.weight.detach().double(), 2))
        if not bool(self.layer.weight.any()):
            return 0.0
        operator = self._operator()
        if min(operator.shape) < 3:
            return float(np.linalg.norm(operator @ np.eye(operator.shape[1]), 2))
        # A fixed start, so that the figure is the same each time.
        start = np.random.default_rng(0).normal(size=min(operator.shape))
        return float(svds(operator, k=1, v0=start, return_singular_vectors=False)[0])

    def _operator(self) -> LinearOperator:
        weights = _weights(self.layer)
        device = self.layer.weight.device
        zeros = torch.zeros(1, *self.input_shape, dtype=torch.float64, device=device)

        def forward(x: Tensor) -> Tensor:
            return functional_call(self.layer, weights, (x,))

        pulled: Any = torch.func.vjp(forward, zeros)
        output, pull_back = pulled

        def of(function: Any, like: Tensor) -> Any:
            def apply(v: np.ndarray) -> np.ndarray:
                image = function(torch.from_numpy(v.reshape(like.shape)).to(device))
                image = image[0] if isinstance(image, tuple) else image
                return image.detach().flatten().cpu().numpy()

            return apply

        return LinearOperator(
            (output.numel(), zeros.numel()),
            matvec=of(forward, zeros),
            rmatvec=of(pull_back, output),
            dtype=np.float64,
        )


def linear_maps(network: nn.Module, input_shape: tuple[int, ...]) -> Iterator[LinearMap]:
    """Yield the linear and convolution layers of a network, with the shapes they receive."""
    values = torch.zeros(1, *input_shape).to(next(network.parameters()))
    for layer in _layers(network):
        if isinstance(layer, LINEAR):
            yield LinearMap(layer, tuple(values.shape[1:]))
        values = layer(values)


def _with_powers(layer: nn.Module, values: Tensor, p: int) -> Tensor:
    """Apply a layer with weights |w|^p and no bias."""
    weights = {name: weight.abs() ** p for name, weight in _weights(layer).items()}
    return functional_call(layer, weights, (values,))


def _weights(layer: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a layer in float64, the bias as zeros."""
    weights = {name: weight.detach().double() for name, weight in layer.named_parameters()}
    if "bias" in weights:
        weights["bias"] = torch.zeros_like(weights["bias"])
    return weights


def _layers(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of nested sequences; raise for one that the bounds do not cover."""
    if is_plain_sequence(network):
        for part in network:
            yield from _layers(part)
        return
    if is_changed(network) or not _is_bounded(network):
        raise TypeError(
            f"Got a layer {network!r}, but expected linear layers, convolutions padded with zeros, "
            "activation layers that are 1-Lipschitz and keep 0, and max pooling without overlap, "
            "without hooks and parametrizations: the bounds hold for those."
        )
    yield network


def _is_bounded(layer: Any) -> bool:
    """Tell whether the bounds hold for a layer, by its type, not a subclass, and settings."""
    kind = type(layer)
    if kind in CONVOLUTIONS:
        return bool(layer.padding_mode == "zeros")
    if kind is nn.MaxPool2d:
        return pools_disjointly(layer)
    if kind is nn.LeakyReLU:
        return bool(abs(layer.negative_slope) <= 1)
    if kind is nn.ELU:
        return bool(0 <= layer.alpha <= 1)
    return kind is nn.Linear or kind in LIPSCHITZ_ONE
