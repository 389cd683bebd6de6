"""Accuracy under attack, as a scorer and as a function."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.utils import check_array, check_consistent_length, check_random_state
from sklearn.utils.validation import _check_sample_weight, column_or_1d
from torch import Tensor, nn

from skjacobian._rng import own_entropy
from skjacobian._validation import (
    check_count,
    check_non_negative,
    check_option,
    check_positive,
    reject,
    unwrap_scalar,
)
from skjacobian.attacks import FGSM, PGD, Attack
from skjacobian.differentiable import TensorFunction, as_torch
from skjacobian.exceptions import AttackWarning
from skjacobian.geometry import BALL_NORMS
from skjacobian.threat_model import check_inside, fit_feature_scale, resolve_bounds

THREAT_MODEL = ("norm", "eps", "feature_scale", "bounds")
SEARCH = ("n_steps", "step_size", "n_restarts")

# Least and most samples of a batch, and how many numbers it should hold: on the CPU what
# its caches can, on CUDA what keeps the card busy.
_AUTO_BATCH = {"cpu": (64, 1024, 2**20), "cuda": (256, 8192, 2**25)}


class RobustScorer(BaseEstimator):
    """Scorer of the accuracy under attack: the share of samples that no attack fools.

    Pass it as `scoring` to `GridSearchCV`, `cross_validate` and the like, or call it. A
    sample counts where the estimator's own `predict` is right about it, and still is at
    the perturbation that the attack found. The figure is an upper bound on the true
    robust accuracy, as tight as the attack is strong.

    The attack happens in the units of the X that the estimator receives: of a `Pipeline`,
    the raw features. It goes through the scalers, exactly (`as_torch`).

    Parameters
    ----------
    norm : {"linf", "l2"}, default="linf"
        Norm of the perturbation.
    eps : float or sequence of float, default=0.1
        Radius: ‖(X_adv - X) / feature_scale‖ <= eps. Of several, each gets an entry of the
        dict that is then returned.
    attack : {"pgd", "fgsm"} or Attack, default="pgd"
        How to search. The threat model (`norm`, `eps`, `feature_scale`, `bounds`) is the
        scorer's; an `Attack` object brings the rest.
    n_steps : int, default=40
        Gradient steps of "pgd".
    step_size : float, optional
        Step of "pgd"; None lets it fall as 2·eps·(1 - step/n_steps)².
    n_restarts : int, default=1
        Random restarts of "pgd".
    feature_scale : None, "std", "range" or array of shape (n_features,), default=None
        Unit of each feature; "std" and "range" are those of the X that is scored. A feature
        that is constant there is held fixed.
    bounds : (low, high), optional
        Range of valid features, numbers or one value per feature. None is unbounded; there
        is no implicit clip.
    batch_size : int or "auto", default="auto"
        Samples attacked at once. "auto" fits them to the caches of the CPU, or to the card.
        It does not change the result beyond rounding.
    random_state : int, RandomState instance or None, default=0
        Seed of the random starts.

    Returns
    -------
    float, or dict of float when `eps` is a sequence
        Calling the scorer returns the robust accuracy; with several `eps` the keys are
        "accuracy" (clean) and "robust_accuracy_eps0.1" and so on, and what fools at a
        smaller radius counts at the larger ones.

    Warns
    -----
    AttackWarning
        If gradients are zero or not finite, or `predict` disagrees with the torch view.

    See Also
    --------
    robust_accuracy_score : The same as a function.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from skjacobian import JacobianRegularizedClassifier, RobustScorer
    >>> X, y = load_iris(return_X_y=True)
    >>> model = make_pipeline(StandardScaler(), JacobianRegularizedClassifier(random_state=0))
    >>> scorer = RobustScorer(norm="linf", eps=[0.1, 0.3])  # centimetres
    >>> sorted(scorer(model.fit(X, y), X, y))
    ['accuracy', 'robust_accuracy_eps0.1', 'robust_accuracy_eps0.3']
    """

    def __init__(
        self,
        *,
        norm: str = "linf",
        eps: float | Sequence[float] = 0.1,
        attack: str | Attack = "pgd",
        n_steps: int = 40,
        step_size: float | None = None,
        n_restarts: int = 1,
        feature_scale: Any = None,
        bounds: Any = None,
        batch_size: int | str = "auto",
        random_state: Any = 0,
    ) -> None:
        self.norm = norm
        self.eps = eps
        self.attack = attack
        self.n_steps = n_steps
        self.step_size = step_size
        self.n_restarts = n_restarts
        self.feature_scale = feature_scale
        self.bounds = bounds
        self.batch_size = batch_size
        self.random_state = random_state

    def __call__(
        self, estimator: Any, X: Any, y: Any, sample_weight: Any = None
    ) -> float | dict[str, float]:
        """Return the accuracy of `estimator` under attack.

        Parameters
        ----------
        estimator : fitted classifier
            Anything that `skjacobian.differentiable.as_torch` knows.
        X : array-like of shape (n_samples, *features)
            Clean samples, in the units that the estimator receives.
        y : array-like of shape (n_samples,)
            True labels.
        sample_weight : array-like of shape (n_samples,), optional

        Returns
        -------
        float, or dict of float when `eps` is a sequence
        """
        return self.score(estimator, X, y, sample_weight)

    def score(
        self, estimator: Any, X: Any, y: Any, sample_weight: Any = None
    ) -> float | dict[str, float]:
        """Return the accuracy of `estimator` under attack; the same as calling the scorer.

        Parameters
        ----------
        estimator : fitted classifier
        X : array-like of shape (n_samples, *features)
        y : array-like of shape (n_samples,)
        sample_weight : array-like of shape (n_samples,), optional

        Returns
        -------
        float, or dict of float when `eps` is a sequence
        """
        radii = self._check_params()
        view = as_torch(estimator)
        values = check_array(X, dtype=[np.float64, np.float32], allow_nd=True, input_name="X")
        y = column_or_1d(y)
        check_consistent_length(values, y)
        weight = None if sample_weight is None else _check_sample_weight(sample_weight, values)
        X_tensor = torch.from_numpy(np.array(values))
        check_inside(X_tensor, resolve_bounds(self.bounds, X_tensor))
        attacks = {eps: self._make_attack(eps, X_tensor) for eps in sorted(radii)}
        right = estimator.predict(X) == y
        scores = {"accuracy": _share(right, weight)}
        for eps, attack in attacks.items():
            standing = np.flatnonzero(right)
            if eps > 0 and len(standing):
                labels = np.searchsorted(estimator.classes_, y[standing])
                X_adv, fooled = self._search(attack, view, X_tensor[standing], labels)
                X_adv = _in_container_of(X, standing, X_adv)
                right[standing] = estimator.predict(X_adv) == y[standing]
                _warn_of_disagreement(fooled, right[standing])
            scores[_key(eps)] = _share(right, weight)
        return scores if _is_sequence(self.eps) else scores[_key(radii[0])]

    def _accept_sample_weight(self) -> bool:
        """Tell scikit-learn's search objects that `sample_weight` may be passed."""
        return True

    def _check_params(self) -> list[float]:
        """Validate what the attack does not, before anything is computed; return the radii."""
        check_option("norm", self.norm, BALL_NORMS)
        values = list(self.eps) if _is_sequence(self.eps) else [self.eps]  # type: ignore[arg-type]
        if not values:
            reject("eps", self.eps, "at least one radius")
        if self.batch_size != "auto":
            check_count("batch_size", self.batch_size)
        if isinstance(self.attack, Attack):
            self._check_attack(self.attack)
        else:
            check_option("attack", self.attack, ["pgd", "fgsm"])
            check_count("n_steps", self.n_steps)
            check_count("n_restarts", self.n_restarts)
            if self.step_size is not None:
                check_positive("step_size", self.step_size)
        return [check_non_negative("eps", value) for value in values]

    def _check_attack(self, attack: Attack) -> None:
        """Raise where attack object and scorer say different things of the same matter."""
        defaults = type(attack)().get_params()
        for name in THREAT_MODEL:
            value = getattr(attack, name)
            if not np.array_equal(value, defaults[name]):
                raise ValueError(
                    f"Got attack={attack!r}, but expected its {name} to be left alone: the "
                    f"threat model is the scorer's. Set RobustScorer({name}=...)."
                )
        own = RobustScorer().get_params(deep=False)
        for name in SEARCH:
            if getattr(self, name) != own[name]:
                raise ValueError(
                    f"Got {name}={getattr(self, name)!r} and an attack object, but expected "
                    f"{name} to be set on the object: attack={type(attack).__name__}({name}=...)."
                )

    def _make_attack(self, eps: float, X: Tensor) -> Attack:
        """Return the attack at `eps`, with what depends on the data taken from all of `X`."""
        threat_model = {
            "norm": self.norm,
            "eps": eps,
            "feature_scale": fit_feature_scale(self.feature_scale, X),
            "bounds": self.bounds,
        }
        if isinstance(self.attack, Attack):
            attack = clone(self.attack).set_params(**threat_model)
        elif self.attack == "fgsm":
            attack = FGSM(**threat_model)
        else:
            attack = PGD(
                **threat_model,
                n_steps=unwrap_scalar(self.n_steps),
                step_size=unwrap_scalar(self.step_size),
                n_restarts=unwrap_scalar(self.n_restarts),
            )
        attack.check_params()
        return attack

    def _search(
        self, attack: Attack, view: TensorFunction, X: Tensor, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the perturbed samples, and which of them fool the view, batch by batch."""
        device = _device_of(view)
        batch_size = self._batch_size(X, device)
        seed = int(check_random_state(own_entropy(self.random_state)).randint(2**31 - 1))
        X_adv, fooled = [], []
        for X_batch, y_batch in zip(
            torch.split(X, batch_size),
            torch.split(torch.from_numpy(labels), batch_size),
            strict=True,
        ):
            # The same starts for every batch: the result does not depend on their size.
            generator = torch.Generator().manual_seed(seed)
            found = attack.search(view, X_batch.to(device), y_batch.to(device), generator=generator)
            X_adv.append(found.X_adv.cpu())
            fooled.append(found.fooled.cpu())
        return torch.cat(X_adv).numpy(), torch.cat(fooled).numpy()

    def _batch_size(self, X: Tensor, device: torch.device) -> int:
        if self.batch_size != "auto":
            return check_count("batch_size", self.batch_size)
        low, high, n_numbers = _AUTO_BATCH[device.type]
        return int(np.clip(n_numbers // X[0].numel(), low, high))


def robust_accuracy_score(
    estimator: Any,
    X: Any,
    y: Any,
    *,
    norm: str = "linf",
    eps: float | Sequence[float] = 0.1,
    attack: str | Attack = "pgd",
    n_steps: int = 40,
    step_size: float | None = None,
    n_restarts: int = 1,
    feature_scale: Any = None,
    bounds: Any = None,
    batch_size: int | str = "auto",
    random_state: Any = 0,
    sample_weight: Any = None,
) -> float | dict[str, float]:
    """Return the accuracy of a fitted classifier under attack.

    Parameters
    ----------
    estimator : fitted classifier
        Anything that `skjacobian.differentiable.as_torch` knows.
    X : array-like of shape (n_samples, *features)
        Clean samples, in the units that the estimator receives.
    y : array-like of shape (n_samples,)
        True labels.
    norm, eps, attack, n_steps, step_size, n_restarts, feature_scale, bounds, batch_size, \
random_state
        As in `RobustScorer`.
    sample_weight : array-like of shape (n_samples,), optional

    Returns
    -------
    float, or dict of float when `eps` is a sequence

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skjacobian import JacobianRegularizedClassifier, robust_accuracy_score
    >>> X, y = load_iris(return_X_y=True)
    >>> model = JacobianRegularizedClassifier(random_state=0).fit(X, y)
    >>> robust_accuracy_score(model, X, y, eps=0.0) == model.score(X, y)
    True
    """
    scorer = RobustScorer(
        norm=norm,
        eps=eps,
        attack=attack,
        n_steps=n_steps,
        step_size=step_size,
        n_restarts=n_restarts,
        feature_scale=feature_scale,
        bounds=bounds,
        batch_size=batch_size,
        random_state=random_state,
    )
    return scorer(estimator, X, y, sample_weight)


def _key(eps: float) -> str:
    return f"robust_accuracy_eps{np.format_float_positional(eps, trim='-')}"


def _is_sequence(eps: Any) -> bool:
    return not isinstance(eps, str) and np.ndim(eps) > 0


def _share(right: np.ndarray, weight: np.ndarray | None) -> float:
    return float(np.average(right, weights=weight))


def _device_of(view: TensorFunction) -> torch.device:
    """Return where the weights of a view are, so that samples are moved there once."""
    weight = next(view.parameters(), None) if isinstance(view, nn.Module) else None
    return torch.device("cpu") if weight is None else weight.device


def _in_container_of(X: Any, index: np.ndarray, X_adv: np.ndarray) -> Any:
    """Give perturbed samples the column names and the index of a DataFrame `X`."""
    if not hasattr(X, "iloc"):
        return X_adv
    return type(X)(X_adv, columns=X.columns, index=X.index[index])


def _warn_of_disagreement(fooled: np.ndarray, right: np.ndarray) -> None:
    """Warn where the torch view is fooled by a perturbation and `predict` is not."""
    n_different = int((fooled & right).sum())
    if n_different:
        warnings.warn(
            f"The torch view of the estimator is fooled by {n_different} perturbed samples of "
            f"{len(right)} that its predict gets right. predict decides, so robustness may be "
            "overstated by as much.",
            AttackWarning,
            stacklevel=4,
        )
