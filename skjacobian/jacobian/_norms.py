"""Norms of the Jacobian J = ∂logits/∂x of each sample, exact or estimated."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skjacobian._rng import seeded
from skjacobian._validation import check_count, check_floating, check_option, check_tensor, reject
from skjacobian.jacobian._cost import rows_at_once
from skjacobian.jacobian._engines import linearize
from skjacobian.jacobian._linearization import Linearization
from skjacobian.jacobian._parts import cut, reduced_in_parts
from skjacobian.jacobian._reductions import (
    COLUMNS,
    ENTRIES,
    LENGTH,
    SQUARED_LENGTH,
    Reduction,
)
from skjacobian.model_modes import PredictLogits
from skjacobian.model_outputs import check_samples_apart

JACOBIAN_NORMS = ("l1", "l2", "l21", "spectral", "cross_lipschitz")
OUTPUTS = ("logits", "loss")

# Norms that the gradient of the loss has; norms that are sums over classes; norms that have
# an unbiased random estimate; norms that need the label.
LOSS_NORMS = ("l1", "l2")
CLASSWISE_NORMS = ("l2", "l1")
ESTIMATED = {"n_projections": ("l2", "l21"), "class_samples": CLASSWISE_NORMS}
LABELLED_NORMS = ("cross_lipschitz",)

# Norms that are the maximum over directions, and so the length of one row.
MAXIMA = ("spectral", "cross_lipschitz")

REDUCTIONS = {
    "l2": SQUARED_LENGTH,
    "l1": ENTRIES,
    "l21": COLUMNS,
    "spectral": LENGTH,
    "cross_lipschitz": ENTRIES,
}

Choice = Callable[[Tensor, Tensor | None], Tensor]


def jacobian_norm(
    predict_logits: PredictLogits,
    X: Tensor,
    y: Tensor | None = None,
    *,
    norm: str = "l2",
    output: str = "logits",
    n_projections: int | None = None,
    class_samples: int | None = None,
    engine: str = "auto",
    generator: torch.Generator | None = None,
    create_graph: bool = False,
) -> Tensor:
    """Return a norm of the Jacobian of the logits, or of the loss, at each sample.

    To first order in δ the loss ℓ(x + δ) rises by δᵀ∇ₓℓ at most, ∇ₓℓ = Jᵀ(p - e_y), so
    by ε‖∇ₓℓ‖₂ under an l2 attack of radius ε and by ε‖∇ₓℓ‖₁ under a linf attack. With
    ‖p - e_y‖₂ <= √2 and Σ_{k≠y} p_k <= 1 each of these bounds that rise:

    =================  ========================  ===========================================
    `norm`             value                     bounds the first-order rise of the loss
    =================  ========================  ===========================================
    "l2"               ‖J‖_F², **squared**       l2: ε√2 σ_max(J) <= ε√2 ‖J‖_F
    "spectral"         σ_max(J)                  l2, tightly: ‖Jᵀv‖₂ <= σ_max(J) ‖v‖₂
    "l1"               ‖J‖_{1,1} = Σ_kj |J_kj|   linf: ‖Jᵀ(p-e_y)‖₁ <= ‖p-e_y‖_∞ ‖J‖_{1,1}
    "l21"              Σ_j ‖J_·j‖₂               linf: |J_·jᵀ(p-e_y)| <= √2 ‖J_·j‖₂
    "cross_lipschitz"  max_k ‖J_k - J_y‖₁        linf, tightly: ∇ₓℓ = Σ_k p_k (J_k - J_y)
    =================  ========================  ===========================================

    "l2" and "l1" are the penalties of Wu & Li (arXiv 2412.12449). With ``output="loss"``
    the norm is that of the gradient ∇ₓℓ of the cross-entropy itself: "l2" is ‖∇ₓℓ‖₂²,
    double backpropagation (Drucker & LeCun, 1992; Ross & Doshi-Velez, arXiv 1711.09404),
    and "l1" is ‖∇ₓℓ‖₁.

    Parameters
    ----------
    predict_logits : callable
        Maps X of shape (n_samples, *features) to logits of shape (n_samples, n_classes),
        each row by itself. The batch normalization of an `nn.Module` is put in eval mode
        meanwhile, because in training mode it mixes the samples.
    X : Tensor of shape (n_samples, *features)
    y : Tensor of shape (n_samples,), optional
        Class indices, needed by "cross_lipschitz" and by ``output="loss"``.
    norm : {"l2", "l1", "l21", "spectral", "cross_lipschitz"}, default="l2"
    output : {"logits", "loss"}, default="logits"
        What is differentiated by x; "loss" knows the norms "l2" and "l1".
    n_projections : int, optional
        None computes the norm exactly. A number k estimates it without bias from k random
        directions v of each sample: "l2" by C·mean ‖Jᵀv‖₂², v uniform on the sphere
        (Hoffman, Roberts & Yaida, arXiv 1908.02729, who report half of it), and "l21" by
        √(π/2)·mean ‖Jᵀv‖₁, v normal. No such estimate of "l1" is known.
    class_samples : int, optional
        None takes all classes. A number k takes k classes drawn for each sample, times
        C/k, which is unbiased for "l1" and "l2". The samples take turns, so a mean over them is
        as precise as it can be where they stand in random order.
    engine : {"auto", "closed_form", "batched", "loop"}, default="auto"
        "closed_form" multiplies weights and slopes, for an `nn.Sequential` of linear,
        convolution, pooling, batch normalization and activation layers; "batched" and
        "loop" take a backward pass per class of any model, all at once or one by one.
        "auto" takes the first of these that the model allows and that pays.
    generator : torch.Generator, optional
        Source of the random directions and classes; None draws a fresh, unpredictable seed.
    create_graph : bool, default=False
        Whether the result can be differentiated, by the parameters say. Jacobians that
        take more than scikit-learn's `working_memory` are then taken part by part. The running
        statistics of batch normalization are constants: trained on that gradient, a network
        shrinks the weights before them without end. Train with
        `skjacobian.objectives.JacobianRegularization`, in which they follow the weights.

    Returns
    -------
    Tensor of shape (n_samples,)

    Raises
    ------
    ValueError
        For parameters that are unknown or do not go together, a missing `y`, logits that do not
        depend on X differentiably, and a model that mixes the samples of a batch.
    TypeError
        If X or y is no tensor, or the model does not return a row of logits for each sample.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    >>> X = torch.zeros(1, 2)
    >>> jacobian_norm(lambda X: X @ W.T, X, norm="l2")
    tensor([25.])
    >>> jacobian_norm(lambda X: X @ W.T, X, norm="l1")
    tensor([7.])
    >>> jacobian_norm(lambda X: X @ W.T, X, norm="spectral")
    tensor([4.])
    """
    measure = checked_norm(norm, output, n_projections, class_samples)
    check_tensor("X", X, "Estimators have a method jacobian_norm, which takes arrays.")
    check_floating("X", X)
    linearization = linearize(predict_logits, X, engine=engine, create_graph=create_graph)
    check_samples_apart(predict_logits, X)
    return measure(
        linearization,
        _class_indices(y, linearization.shape) if measure.needs_labels else None,
        generator=seeded(generator),
        create_graph=create_graph,
    )


def _class_indices(y: Any, shape: tuple[int, int]) -> Tensor | None:
    """Return labels as indices of classes; raise unless there is one for each sample."""
    if y is None:
        return None
    check_tensor("y", y, "Estimators have a method jacobian_norm, which takes arrays.")
    n_samples, n_classes = shape
    expected = f"one class index from 0 to {n_classes - 1} for each of {n_samples} samples"
    if y.shape != (n_samples,) or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"Got y of shape {tuple(y.shape)} and {y.dtype}, but expected {expected}.")
    if n_samples and not bool(((y >= 0) & (y < n_classes)).all()):
        raise ValueError(f"Got y from {int(y.min())} to {int(y.max())}, but expected {expected}.")
    return y.long()


def checked_norm(
    norm: str, output: str, n_projections: int | None, class_samples: int | None
) -> "JacobianNorm":
    """Return the norm of these parameters; raise unless they exist and go together."""
    check_option("norm", norm, JACOBIAN_NORMS)
    check_option("output", output, OUTPUTS)
    random = {"n_projections": n_projections, "class_samples": class_samples}
    given = {name: check_count(name, k) for name, k in random.items() if k is not None}
    if output == "loss":
        if norm not in LOSS_NORMS:
            reject("norm", norm, "'l1' or 'l2' with output='loss', a gradient")
        for name, value in given.items():
            reject(name, value, "None with output='loss', a gradient")
    for name, value in given.items():
        if norm not in ESTIMATED[name]:
            allowed = " and ".join(map(repr, ESTIMATED[name]))
            reject(
                name,
                value,
                f"None with norm={norm!r}: only {allowed} have an unbiased random estimate",
            )
    if len(given) == 2:
        reject("class_samples", class_samples, "None with n_projections, which mix all classes")
    return JacobianNorm(norm, output, n_projections, class_samples)


@dataclass(frozen=True)
class JacobianNorm:
    """Which norm is taken, of what, and from which rows; the parameters of `jacobian_norm`."""

    norm: str = "l2"
    output: str = "logits"
    n_projections: int | None = None
    class_samples: int | None = None

    @property
    def needs_labels(self) -> bool:
        """Tell whether the norm depends on y."""
        return self.output == "loss" or self.norm in LABELLED_NORMS

    def n_rows(self, n_classes: int) -> float:
        """Return how many rows vJ of each sample cost as much as the norm."""
        if self.output == "loss":
            return 1
        if self.norm in MAXIMA:
            # All rows without their gradients, a third of the cost, and one with.
            return n_classes / 3 + 1
        return self.n_projections or min(self.class_samples or n_classes, n_classes)

    def __call__(
        self,
        linearization: Linearization,
        y: Tensor | None,
        *,
        generator: torch.Generator,
        create_graph: bool,
    ) -> Tensor:
        """Return the norm at each sample, shape (n_samples,), part by part if need be."""
        at_once = rows_at_once(linearization)
        with torch.set_grad_enabled(create_graph):
            V, reduction, factor = self.rows_wanted(linearization, y, generator)
            n_samples, n_classes = linearization.shape
            # A row that attains a maximum over all rows is taken on the parts that they were:
            # layers that draw at random draw for each part.
            n_rows = n_classes if V is None or self.norm in MAXIMA else V.shape[1]
            at_a_time = n_samples * n_rows <= at_once
            if at_a_time or not _can_be_parted(linearization, V, create_graph):
                norms = linearization.reduced(V, reduction)
            else:
                parts = cut(n_samples, n_rows, V, at_once, rows_add=reduction.adds_rows)
                norms = reduced_in_parts(reduction, linearization, parts, create_graph=create_graph)
            norms = norms if factor == 1 else factor * norms
        return norms if create_graph else norms.detach()

    def rows_wanted(
        self, linearization: Linearization, y: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor | None, Reduction, float]:
        """Return the cotangents V of the rows wanted, how the rows reduce, and a factor."""
        if self.needs_labels and y is None:
            raise ValueError(
                f"Got y=None, but expected class indices of shape (n_samples,): "
                f"norm={self.norm!r} with output={self.output!r} depends on the label."
            )
        n_samples, n_classes = linearization.shape
        of_norm = REDUCTIONS[self.norm]
        if self.output == "loss":
            assert y is not None
            return _loss_cotangents(linearization.logits, y).unsqueeze(1), of_norm, 1
        if self.n_projections is not None:
            # Each sample has directions of its own: with one for the whole batch, training
            # at λ=0.05 on MNIST lost three points of accuracy to the noise.
            V = torch.randn(
                n_samples,
                self.n_projections,
                n_classes,
                generator=generator,
                dtype=linearization.dtype,
            ).to(linearization.device, non_blocking=True)
            if self.norm == "l21":
                # E|vᵀa| = √(2/π) ‖a‖₂ for normal v.
                return V, ENTRIES, math.sqrt(math.pi / 2) / self.n_projections
            # E v̂v̂ᵀ = I/C for v̂ uniform on the sphere.
            return V / V.norm(dim=2, keepdim=True), of_norm, n_classes / self.n_projections
        if self.class_samples is not None and self.class_samples < n_classes:
            V = draw_classes(n_samples, n_classes, self.class_samples, generator)
            V = V.to(linearization.device, non_blocking=True)
            return V, of_norm, n_classes / self.class_samples
        if self.norm == "spectral":
            return _by_sample(_leading_direction, linearization, y), of_norm, 1
        if self.norm == "cross_lipschitz":
            return _by_sample(_steepest_difference, linearization, y), of_norm, 1
        return None, of_norm, 1


def draw_classes(
    n_samples: int, n_classes: int, class_samples: int, generator: torch.Generator
) -> Tensor:
    """Draw classes for each sample without replacement, each as often as any other.

    The samples take turns, from a random first class on: uniform for every sample, and over
    samples in random order less variable than independent draws.
    """
    first = int(torch.randint(n_classes, (1,), generator=generator))
    turns = torch.arange(first, first + n_samples * class_samples)
    return turns.remainder_(n_classes).reshape(n_samples, class_samples)


def _can_be_parted(linearization: Linearization, V: Tensor | None, create_graph: bool) -> bool:
    """Tell whether gradients find all that they depend on when taken part by part."""
    if not create_graph:
        return True
    cotangents_depend_on_weights = V is not None and V.requires_grad
    return not cotangents_depend_on_weights and bool(linearization.tensors())


# --- the row that attains a maximum; its gradient is that of the maximum (Danskin) -------


def _by_sample(choose: Choice, linearization: Linearization, y: Tensor | None) -> Tensor:
    """Return the cotangent that `choose` picks for each sample, shape (n_samples, 1, C)."""
    n_samples, n_classes = linearization.shape
    tensors = linearization.tensors()
    picked = [torch.zeros(0, n_classes, dtype=linearization.dtype, device=linearization.device)]
    parts = cut(n_samples, n_classes, None, rows_at_once(linearization), rows_add=False)
    for samples, _ in parts:
        part = linearization if len(parts) == 1 else linearization.part(samples, tensors)
        with torch.no_grad():
            picked.append(choose(part.rows(None), None if y is None else y[samples]))
    return torch.cat(picked).unsqueeze(1)


def _leading_direction(rows: Tensor, y: Tensor | None) -> Tensor:
    """Return the left singular vector of the largest singular value of each J; else NaN.

    `eigh` raises an error for one matrix that is not finite, as of a network that diverges.
    """
    exact = rows if rows.dtype == torch.float64 else rows.float()
    gram = exact @ exact.transpose(1, 2)
    is_finite = gram.isfinite().all(2, keepdim=True).all(1, keepdim=True)
    _, vectors = torch.linalg.eigh(gram.where(is_finite, 0.0))
    return vectors[..., -1].where(is_finite.squeeze(2), torch.nan).to(rows.dtype)


def _steepest_difference(rows: Tensor, y: Tensor | None) -> Tensor:
    """Return e_k - e_y for the class k whose ‖J_k - J_y‖₁ is largest."""
    assert y is not None
    own = rows[torch.arange(len(rows), device=rows.device), y].unsqueeze(1)
    k = (rows - own).abs().sum(2).argmax(1)
    return _one_hot(k, rows[..., 0]) - _one_hot(y, rows[..., 0])


def _loss_cotangents(logits: Tensor, y: Tensor) -> Tensor:
    """Return p - e_y, with -Σ_{k≠y} p_k for p_y - 1, which cancels where the model is sure."""
    index = y.unsqueeze(1)
    wrong = logits.softmax(1).scatter(1, index, 0.0)
    return wrong.scatter(1, index, -wrong.sum(1, keepdim=True))


def _one_hot(k: Tensor, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(k, like.shape[1]).to(like.dtype)
