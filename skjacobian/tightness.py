"""How tight the surrogates of adversarial loss are on a model: what an attack gains beside them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skjacobian._under_attack import UnderAttack
from skjacobian._validation import check_count, check_non_negative, check_option, reject
from skjacobian.attacks import PGD
from skjacobian.losses import LOSSES, cross_entropy
from skjacobian.model_modes import PredictLogits, frozen
from skjacobian.model_outputs import input_gradient
from skjacobian.theory import TERMS, surrogate_terms


@dataclass(frozen=True, eq=False, repr=False)
class SurrogateGap:
    """What an attack gained in loss, and the surrogates of it, sample by sample.

    Made by `surrogate_gap`; printing it gives a table of means.

    Attributes
    ----------
    norm : str
    eps : float
    loss : array of shape (n_samples,)
        ℓ(x), the clean cross-entropy.
    increase : array of shape (n_samples,)
        ℓ(x + δ) - ℓ(x) at the worst δ found, a lower bound on the largest there is.
    linear : array of shape (n_samples,)
        δᵀ∇ₓℓ(x), the part of that increase which is first order.
    terms : dict of array of shape (n_samples,)
        ε‖∇ₓℓ‖_q and the surrogates above it, as `surrogate_terms` returns them.
    """

    norm: str
    eps: float
    loss: np.ndarray
    increase: np.ndarray
    linear: np.ndarray
    terms: dict[str, np.ndarray]

    @property
    def adversarial_loss(self) -> np.ndarray:
        """ℓ(x + δ) of each sample."""
        return self.loss + self.increase

    @property
    def second_order_share(self) -> float:
        """Share of the mean increase that is not first order, 1 - Σδᵀ∇ₓℓ / Σ increase.

        Near 0 the first order holds at this radius, near 1 it says nothing; nan without
        any increase.
        """
        return float(1 - _ratio(self.linear.sum(), self.increase.sum()))

    @property
    def ratios(self) -> dict[str, float]:
        """Mean of each term over the mean increase found: how loose it is; below 1, too small."""
        return {name: _ratio(t.mean(), self.increase.mean()) for name, t in self.terms.items()}

    @property
    def exceeded(self) -> dict[str, float]:
        """Share of samples whose increase is larger than the term, which so fails to bound it."""
        rounding = 1e-6 * (1 + self.loss)
        return {
            name: float((self.increase > term + rounding).mean())
            for name, term in self.terms.items()
        }

    def to_frame(self) -> Any:
        """Return mean, ratio and share of samples exceeded of each term. Needs pandas."""
        import pandas as pd

        return pd.DataFrame(
            {
                "mean": {name: float(term.mean()) for name, term in self.terms.items()},
                "ratio": self.ratios,
                "exceeded": self.exceeded,
            }
        ).rename_axis("term")

    def __repr__(self) -> str:
        return (
            f"<SurrogateGap: loss {self.loss.mean():.4g} rises by {self.increase.mean():.4g} at "
            f"{self.norm} eps={self.eps:g}, {self.second_order_share:.0%} of it second order>"
        )

    def __str__(self) -> str:
        lines = [f"{'term':<26}{'mean':>12}{'ratio':>12}{'exceeded':>12}"]
        for name, term in self.terms.items():
            numbers = f"{term.mean():>12.4g}{self.ratios[name]:>12.4g}{self.exceeded[name]:>12.1%}"
            lines.append(f"{name:<26}{numbers}")
        return "\n".join([repr(self).strip("<>"), "", *lines])


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else math.nan


def surrogate_gap(
    estimator: Any,
    X: Any,
    y: Any,
    *,
    norm: str = "linf",
    eps: float = 0.1,
    bounds: Any = None,
    n_steps: int = 40,
    n_restarts: int = 1,
    batch_size: int | str = "auto",
    random_state: Any = 0,
) -> SurrogateGap:
    """Compare what an attack gains in cross-entropy with the surrogates of that gain.

    The gain is searched for by projected gradient descent that climbs to the end (the attacks
    of this package stop where a sample is fooled), once on the cross-entropy and once on the
    soft margin, which has a gradient also where a network is very confident.

    Parameters
    ----------
    estimator : fitted classifier, or trained nn.Module
        Anything that `skjacobian.differentiable.as_torch` knows. Jacobians and radius are in
        the units of the X that it receives: of a `Pipeline`, the raw features.
    X : array-like of shape (n_samples, *features)
        Numbers, none missing; whole ones are taken as continuous, too.
    y : array-like of shape (n_samples,)
        Labels.
    norm : {"linf", "l2"}, default="linf"
        Norm of the attack.
    eps : float, default=0.1
        Its radius.
    bounds : (low, high), optional
        Range of valid features for the attack, numbers or one value per feature. The
        surrogates know of no bounds, so bounds make them looser.
    n_steps : int, default=40
        Gradient steps of one climb.
    n_restarts : int, default=1
        Pairs of such climbs, each from random points.
    batch_size : int or "auto", default="auto"
        Samples attacked at once.
    random_state : int, RandomState instance or None, default=0
        Seed of the random starts.

    Returns
    -------
    SurrogateGap
        Print it. It has the arrays `loss`, `increase`, `linear` and `terms`, and the
        summaries `second_order_share`, `ratios`, `exceeded` and `to_frame()`.

    Raises
    ------
    ValueError
        For parameters that make no sense, samples with categories or missing values or outside
        `bounds`, and labels that the classifier does not know.
    TypeError
        If `estimator` is no classifier: without `predict` or `classes_`.
    NotDifferentiableError
        If no torch view of it is known.

    See Also
    --------
    generalization_gap : Training against test score, clean and under attack.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skjacobian import JacobianRegularizedClassifier, surrogate_gap
    >>> X, y = load_iris(return_X_y=True)
    >>> model = JacobianRegularizedClassifier(random_state=0).fit(X, y)
    >>> gap = surrogate_gap(model, X, y, norm="l2", eps=0.01)  # centimetres
    >>> bool(gap.second_order_share < 0.1)
    True
    >>> list(gap.terms)
    ['first_order', 'weighted_spectral', 'spectral', 'frobenius', 'squared_frobenius']
    """
    check_option("norm", norm, TERMS)
    eps = check_non_negative("eps", eps)
    attack = PGD(norm=norm, eps=eps, bounds=bounds, n_steps=check_count("n_steps", n_steps))
    n_restarts = check_count("n_restarts", n_restarts)
    subject = UnderAttack(
        estimator, X, y, needs="gradients", batch_size=batch_size, random_state=random_state
    )
    if subject.columns.categories or bool(subject.X_tensor.isnan().any()):
        raise ValueError(
            "Got X with missing values or columns of categories, but expected numbers alone: the "
            "theory is about vectors. Pass what the preprocessing makes of X, and the classifier."
        )
    attack.check_clean(subject.X_tensor, subject.columns.columns)
    parts = [
        _gap_of(subject.logits_view, attack, X_batch, y_batch, n_restarts, subject.seed)
        for X_batch, y_batch in _batches(subject)
    ]
    whole = [
        {n: np.concatenate([part[i][n] for part in parts]) for n in parts[0][i]} for i in (0, 1)
    ]
    found, terms = whole
    if norm == "l2":
        terms["squared_frobenius"] = _squared_form(terms["frobenius"])
    return SurrogateGap(norm, eps, **found, terms=terms)


def _batches(subject: UnderAttack) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield samples and class indices, batch by batch, on the device of the model."""
    unknown = np.setdiff1d(subject.y, subject.estimator.classes_)
    if len(unknown):
        reject("y", unknown.tolist(), f"labels in classes_: {subject.estimator.classes_.tolist()}")
    y = subject.class_indices(subject.y)
    for start in range(0, len(y), subject.batch_size):
        rows = slice(start, start + subject.batch_size)
        yield subject.X_tensor[rows].to(subject.device), y[rows].to(subject.device)


def _gap_of(
    predict_logits: PredictLogits, attack: PGD, X: Tensor, y: Tensor, n_restarts: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return what the attack found on a batch, and the terms."""
    with frozen(predict_logits):
        X_adv, adversarial_loss = _climb(predict_logits, attack, X, y, n_restarts, seed)
        loss = cross_entropy(predict_logits(X), y)
        gradient = input_gradient(lambda X: cross_entropy(predict_logits(X), y), X)
        found = {
            "loss": loss,
            "increase": adversarial_loss - loss,
            "linear": ((X_adv - X) * gradient).flatten(1).sum(1),
        }
        terms = surrogate_terms(predict_logits, X, y, norm=attack.norm, eps=attack.eps)
    return _arrays(found), _arrays(terms)


def _climb(
    predict_logits: PredictLogits, attack: PGD, X: Tensor, y: Tensor, n_restarts: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the points of largest cross-entropy found, the clean ones included, and it."""
    generator = torch.Generator().manual_seed(seed)
    ball = attack.ball(X)
    with torch.no_grad():
        best, highest = X.clone(), cross_entropy(predict_logits(X), y)
    for climbed in n_restarts * ("cross_entropy", "soft_margin"):
        X_adv = attack.maximize(
            lambda X, climbed=climbed: LOSSES[climbed](predict_logits(X), y),  # type: ignore[misc]
            ball,
            generator,
        )
        with torch.no_grad():
            loss = cross_entropy(predict_logits(X_adv), y)
        higher = loss > highest
        best[higher], highest[higher] = X_adv[higher], loss[higher]
    return best, highest


def _squared_form(frobenius: np.ndarray) -> np.ndarray:
    """Return (m + f²/m)/2 with m² = mean f², the squared form of f = ε√2‖J‖_F at optimal τ."""
    m = max(float(np.sqrt(np.mean(frobenius**2))), np.finfo(frobenius.dtype).tiny)
    return (m + frobenius**2 / m) / 2


def _arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().double().cpu().numpy() for name, value in tensors.items()}
