"""Jacobian regularization (Wu & Li, arXiv 2412.12449; Hoffman et al., arXiv 1908.02729)."""

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from skjacobian._rng import replayed_rng
from skjacobian._validation import check_count, check_number, check_strength
from skjacobian.jacobian._chosen import Index, at, n_chosen, spread
from skjacobian.jacobian._cost import Sample, affordable_sample
from skjacobian.jacobian._engines import closed_form, linearize
from skjacobian.jacobian._joint import joint_pass, joint_pass_fits
from skjacobian.jacobian._linearization import Linearization
from skjacobian.jacobian._norms import CLASSWISE_NORMS, JacobianNorm, checked_norm
from skjacobian.jacobian._sizes import Sizes, sizes_of
from skjacobian.jacobian._stack import Stack
from skjacobian.losses import cross_entropy
from skjacobian.model_modes import (
    PredictLogits,
    normalized_inputs,
    statistics_following,
    trains_norms,
)
from skjacobian.norms import rows
from skjacobian.objectives._base import Objective, ObjectiveValue
from skjacobian.objectives.cross_entropy import CrossEntropy


class JacobianRegularization(Objective):
    """Cross-entropy plus λ times a norm of the Jacobian of the logits.

    ℓ(x) + λ‖J(x)‖, following Wu & Li (arXiv 2412.12449). To first order that is an upper
    bound on the adversarial loss at radius ε under linf for λ >= ε ("l1", "cross_lipschitz") or
    √2ε ("l21"), and under l2 for λ >= √2ε ("spectral") or, up to the constant ετ/√2, for
    λ = ε/(√2τ) with any τ > 0 ("l2"); see `skjacobian.theory`. A smaller λ, as trains well, makes
    it a surrogate, not a bound.

    The penalty is a mean over the batch, and for "l1" and "l2" a sum over classes, so its
    value on a random part of the samples and classes, scaled up, is unbiased for the norm
    and for its gradient alike.

    Parameters
    ----------
    lam : float, default=0.005
        λ. Also a tensor with one value per sample.
    norm, output, n_projections
        See `skjacobian.jacobian.jacobian_norm`; "l2" penalizes the square.
    penalty_samples : int, float, "auto" or None, default=None
        Samples of each batch that the penalty is taken on, as a number or a share, drawn
        anew each time. Of m samples among n the penalty is scaled up by n/m; that of the
        others is 0. None takes all. "auto" takes what costs about a sixth of the operations of
        plain training. For very small networks that is one batch in three, drawn at random, with
        all or many of its samples and scaled up by 3; for small ones it is all samples where the
        batch has few; on an accelerator it is all where that takes no longer
        (`skjacobian.jacobian._cost.affordable_sample` is the rule).
    class_samples : int, "auto" or None, default="auto"
        Classes of each of these samples, for "l1" and "l2". None takes all. "auto" takes
        all, except together with ``penalty_samples="auto"``, which then takes as many
        samples and of each as few classes as possible.
    interpolation : float, default=0.0
        The norm is taken at x + u·(x' - x), x' another sample of the batch and u uniform
        between 0 and this, at most 0.5, so that x is the nearer of the two and its label holds.
        0 takes it at the samples. These points draw dropout masks of their own.
    engine : {"auto", "closed_form", "batched", "loop"}, default="auto"
        See `skjacobian.jacobian.jacobian_norm`.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[3.0], [-4.0]])
    >>> objective = JacobianRegularization(lam=0.1, norm="l2")
    >>> value = objective(
    ...     lambda X: X @ W.T, torch.zeros(1, 1), torch.tensor([0]), generator=torch.Generator()
    ... )
    >>> value.penalty, value.loss.detach()
    (tensor([25.]), tensor([3.1931]))
    """

    def __init__(
        self,
        *,
        lam: Any = 0.005,
        norm: str = "l2",
        output: str = "logits",
        n_projections: int | None = None,
        penalty_samples: int | float | str | None = None,
        class_samples: int | str | None = "auto",
        interpolation: float = 0.0,
        engine: str = "auto",
    ) -> None:
        self.lam = lam
        self.norm = norm
        self.output = output
        self.n_projections = n_projections
        self.penalty_samples = penalty_samples
        self.class_samples = class_samples
        self.interpolation = interpolation
        self.engine = engine

    def __call__(
        self,
        predict_logits: PredictLogits,
        X: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator,
    ) -> ObjectiveValue:
        """Return the regularized cross-entropy of each sample.

        Raises
        ------
        ValueError
            For parameters that make no sense, and those of the norm that do not go together.
        """
        interpolation = check_number(
            "interpolation", self.interpolation, lambda a: 0 <= a <= 0.5, "a number from 0 to 0.5"
        )
        sizes = sizes_of(predict_logits, X) if self.penalty_samples == "auto" else None
        norm, part = self._plan(len(X), sizes, X.is_cuda)
        if part.every > 1 and int(torch.randint(part.every, (1,), generator=generator)) > 0:
            plain = CrossEntropy()(predict_logits, X, y, generator=generator)
            return plain._replace(penalty=torch.zeros_like(plain.loss))
        index = None
        if part.n_samples < len(X):
            index = torch.randperm(len(X), generator=generator)[: part.n_samples]
            index = index.to(X.device, non_blocking=True)
        labels = at(y, index) if norm.needs_labels else y
        scale = part.every * len(X) / part.n_samples
        how = (norm, labels, self.engine, generator, scale)
        if interpolation == 0:
            logits, penalty = _logits_and_penalty(predict_logits, X, index, *how)
        else:
            points = interpolated(X, index, interpolation, generator)
            logits, penalty = _logits_and_penalty_at(predict_logits, X, points, index, *how)
        loss = _penalized(cross_entropy(logits, y), penalty, self.lam)
        return ObjectiveValue(loss, penalty.detach(), logits)

    def _plan(
        self, n_samples: int, sizes: Sizes | None, accelerated: bool
    ) -> tuple[JacobianNorm, Sample]:
        """Return the norm to take, and the part of a batch to take it on."""
        norm = (self.norm, self.output, self.n_projections, self.class_samples)
        known = (*norm, self.penalty_samples, n_samples, sizes, accelerated)
        try:
            return _cached_plan(*known)
        except TypeError:  # of what has no hash; it may be fine, or wrong in a way to be named
            return _plan(*known)

    def checked(self) -> "JacobianRegularization":
        """Return the same; raise unless the parameters of the norm go together."""
        _norm(self.norm, self.output, self.n_projections, self.class_samples)
        return self


def interpolated(X: Tensor, index: Index, largest: float, generator: torch.Generator) -> Tensor:
    """Return points on the way from samples, all or those of `index`, to others of the batch.

    x + u·(x' - x), u uniform between 0 and `largest`: where Gulrajani et al. (arXiv 1704.00028,
    section 4) take the penalty on the gradient of a critic.

    Examples
    --------
    >>> import torch
    >>> X = torch.tensor([[0.0], [1.0], [2.0]])
    >>> points = interpolated(X, None, 0.5, torch.Generator().manual_seed(0))
    >>> bool(((points - X).abs() <= 0.5 * 2).all())
    True
    """
    own = at(torch.arange(len(X), device=X.device), index)
    start = at(X, index)
    partner = torch.randperm(len(X), generator=generator)[: len(start)]
    partner = partner.to(X.device, non_blocking=True)
    partner = torch.where(partner == own, (partner + 1) % len(X), partner)
    share = largest * torch.rand(len(start), generator=generator, dtype=X.dtype)
    share = share.to(X.device, non_blocking=True)
    return torch.lerp(start, X[partner], rows(share, X))


def _penalized(loss: Tensor, penalty: Tensor, lam: Any) -> Tensor:
    """Return ℓ + λ‖J‖."""
    strength = check_strength("lam", lam)
    if isinstance(strength, Tensor):
        return loss + strength * penalty
    # With the factor inside: a product of its own is a kernel, and a node for autograd.
    return loss.add(penalty, alpha=strength)


def _norm(
    norm: str, output: str, n_projections: int | None, class_samples: int | str | None
) -> JacobianNorm:
    """Return the norm, of all classes where their number is to be found."""
    given = None if class_samples == "auto" else cast("int | None", class_samples)
    return checked_norm(norm, output, n_projections, given)


def _plan(
    norm: str,
    output: str,
    n_projections: int | None,
    class_samples: int | str | None,
    penalty_samples: int | float | str | None,
    n_samples: int,
    sizes: Sizes | None,
    accelerated: bool,
) -> tuple[JacobianNorm, Sample]:
    """Return the norm of the samples penalized, and how many these are of `n_samples`.

    `sizes` are the model's, wanted where ``penalty_samples="auto"``.
    """
    measure = _norm(norm, output, n_projections, class_samples)
    if penalty_samples is None:
        return measure, Sample(n_samples, measure.class_samples)
    if sizes is None:
        n_penalized = min(_number(penalty_samples, n_samples), n_samples)
        return measure, Sample(n_penalized, measure.class_samples)
    rows_add = (
        class_samples == "auto"
        and norm in CLASSWISE_NORMS
        and output == "logits"
        and n_projections is None
    )
    rows_of_one = measure.n_rows(sizes.n_classes)
    part = affordable_sample(n_samples, sizes, rows_of_one, rows_add, accelerated)
    if rows_add:
        measure = replace(measure, class_samples=part.class_samples)
    return measure, part


# The same for every batch but the last; found anew it takes a fiftieth of a small step.
_cached_plan = lru_cache(typed=True)(_plan)


def _number(penalty_samples: Any, n_samples: int) -> int:
    """Return a number of samples, given as such or as a share of `n_samples`."""
    if isinstance(penalty_samples, int | np.integer):
        return check_count("penalty_samples", penalty_samples)
    expected = "a number of samples, a share of them between 0 and 1, 'auto' or None"
    share = check_number("penalty_samples", penalty_samples, lambda v: 0 < v <= 1, expected)
    return max(1, round(share * n_samples))


def _logits_and_penalty(
    predict_logits: PredictLogits,
    X: Tensor,
    index: Index,
    norm: JacobianNorm,
    y: Tensor,
    engine: str,
    generator: torch.Generator,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the logits of X, and `scale` times the norm at the samples of `index`, else 0.

    `y` are the labels of these samples.
    """
    layers = _layers(predict_logits, engine)
    if layers is not None and joint_pass_fits(layers, norm, n_chosen(len(X), index)):
        return joint_pass(layers, X, index, norm, y, generator, scale)
    with ExitStack() as meanwhile:
        logits, linearization = _forward(predict_logits, layers, X, index, engine, meanwhile)
        norms = norm(linearization, y, generator=generator, create_graph=True)
    return logits, spread(scale * norms, index, len(X))


def _logits_and_penalty_at(
    predict_logits: PredictLogits,
    X: Tensor,
    points: Tensor,
    index: Index,
    norm: JacobianNorm,
    y: Tensor,
    engine: str,
    generator: torch.Generator,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the same, the norm taken at other points in place of these samples."""
    layers = _layers(predict_logits, engine)
    if layers is not None and joint_pass_fits(layers, norm, len(points)):
        behind = torch.arange(len(points), device=X.device) + len(X)
        logits, norms = joint_pass(
            layers, torch.cat([X, points]), behind, norm, y, generator, scale
        )
        return logits[: len(X)], spread(norms[len(X) :], index, len(X))
    with normalized_inputs(predict_logits) as inputs:
        logits = predict_logits(X)
    with statistics_following(inputs):
        linearization = linearize(predict_logits, points, engine=engine, create_graph=True)
        norms = norm(linearization, y, generator=generator, create_graph=True)
    return logits, spread(scale * norms, index, len(X))


def _layers(predict_logits: PredictLogits, engine: str) -> list[nn.Module] | None:
    """Return the layers of a model whose Jacobian has a closed form; else None."""
    # Batch normalization in training mode has none for the loss, and one for the penalty.
    has_none = engine == "closed_form" and trains_norms(predict_logits)
    return None if has_none else closed_form(predict_logits, engine)


def _forward(
    predict_logits: PredictLogits,
    layers: list[nn.Module] | None,
    X: Tensor,
    index: Index,
    engine: str,
    meanwhile: ExitStack,
) -> tuple[Tensor, Linearization]:
    """Run a model on X for the loss and for the Jacobian at `index`, once if possible.

    The closed form needs nothing but the one forward pass. By autograd the samples
    penalized take a pass of their own, unless they are all. So they do where normalization
    keeps running statistics: the loss sees those of the batch, or of the instance, the
    Jacobian the running ones, and both the same dropout masks if all are penalized. The
    running ones then follow the weights until `meanwhile`, in which norms are taken, ends.
    """
    if layers is not None:
        stack = Stack(layers, X)
        return stack.logits, stack.linearize(index)
    if index is None and not trains_norms(predict_logits):
        linearization = linearize(predict_logits, X, engine=engine, create_graph=True)
        return linearization.logits, linearization
    with replayed_rng(X.device) as replay:
        with normalized_inputs(predict_logits) as inputs:
            logits = predict_logits(X)
        meanwhile.enter_context(statistics_following(inputs))
        part, again = (X, replay()) if index is None else (at(X, index), nullcontext())
        with again:
            linearization = linearize(predict_logits, part, engine=engine, create_graph=True)
    return logits, linearization
