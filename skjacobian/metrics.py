"""Accuracy under attack, as a scorer and as a function."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from skjacobian._under_attack import (
    UnderAttack,
    warn_of_black_box,
    warn_of_disagreement,
)
from skjacobian._validation import (
    check_count_or_auto,
    check_non_negative,
    check_option,
    check_weights,
    reject,
    unwrap_scalar,
)
from skjacobian.attacks import PGD, Attack
from skjacobian.attacks._named import make_attack
from skjacobian.averages import AVERAGES, average_accuracy
from skjacobian.constraints import FeatureConstraints
from skjacobian.evaluation import evaluate_robustness
from skjacobian.geometry import BALL_NORMS
from skjacobian.report import RobustnessReport

SEARCH = ("n_steps", "step_size", "n_restarts")


class RobustScorer(BaseEstimator):
    """Scorer of the accuracy under attack: the share of samples that no attack fools.

    Pass it as `scoring` to `GridSearchCV`, `cross_validate` and the like, or call it. A
    sample counts where the estimator's own `predict` is right about it, and still is at
    the perturbation that the attack found. The figure is an upper bound on the true
    robust accuracy, as tight as the attack is strong.

    The attack happens in the units of the X that the estimator receives: of a `Pipeline`,
    the raw features. It goes through the scalers, exactly (`as_torch`). In a DataFrame,
    columns of an integer type stay whole numbers, and those of categories or bool fixed.

    Parameters
    ----------
    norm : {"linf", "l2", "l1"}, default="linf"
        Norm of the perturbation.
    eps : float or sequence of float, default=0.1
        Radius: ‖(X_adv - X) / feature_scale‖ <= eps. Of several, each gets an entry of the
        dict that is then returned. `cross_validate`, `GridSearchCV` and `RandomizedSearchCV` take
        such a scorer as the only `scoring`, not in a dict, and `refit` names an entry. What wants
        one score, as `HalvingGridSearchCV`, `cross_val_score`, `learning_curve` and
        `validation_curve`, needs one radius: of several, some of these notice it late
        (docs/user_guide.md).
    attack : {"pgd", "fgsm", "strong"} or Attack, default="pgd"
        How to search. "pgd" is quick, as a search over parameters needs; "strong" is a
        cascade of attacks for a figure to report (`skjacobian.attacks.Cascade`), and for whole
        numbers and categories, where gradients alone lead astray. The threat model (`norm`,
        `eps`, `feature_scale`, `bounds`, `mutable`, `constraints`) is the scorer's; an
        `Attack` object brings the rest.
    n_steps : int, default=40
        Gradient steps of "pgd", which climbs the soft margin.
    step_size : float, optional
        Step of "pgd"; None lets it fall as 2·eps·(1 - step/n_steps)², for l1 as
        1.5·eps·(1 - step/n_steps).
    n_restarts : int or "auto", default="auto"
        Searches of "pgd". "auto" is 1, but where at most 100 features may change it is 3 under l1,
        from the best changes of single features, and where there are more than two classes, with a
        brief search towards each of the 9 likeliest wrong ones: there gradients may lead to the
        wrong feature or class, and one search overstated robust accuracy by up to 27 points
        (docs/benchmarks.md).
    feature_scale : None, "std", "range" or array of shape (n_features,), default=None
        Unit of each feature; "std" and "range" are those of the X that is scored. A feature
        that is constant there is held fixed.
    bounds : (low, high), optional
        Range of valid features, numbers or one value per feature. None is unbounded; there
        is no implicit clip.
    mutable : str, int, or array-like of str, int or bool, optional
        Features that may change: column names of a DataFrame, indices, or a boolean mask. None
        is all.
    constraints : FeatureConstraints, optional
        What else makes a sample valid: immutable, whole, one-directional and one-hot columns,
        and scale and bounds by column.
    average : {"mean", "worst_class", "tail30", "disparity"}, default="mean"
        Over what the accuracy is taken: all samples; the class where it is lowest; the
        worst 30 % of the classes, rounded up; or minus the difference between the best class
        and the worst, so that more is better here too. Robust models are often unfair to
        hard and rare classes. The difference is no bound, is also 0 for a classifier that is
        right about nothing, so look at it beside another, and is NaN for a single class.
    batch_size : int or "auto", default="auto"
        Samples attacked at once. "auto" fits them to the caches of the CPU, or to the card.
        It does not change the result beyond rounding.
    random_state : int, RandomState instance or None, default=0
        Seed of the random starts.
    verbose : bool, default=False
        Print a line for each batch, and for each stage of a cascade.

    Returns
    -------
    float, or dict of float when `eps` is a sequence
        Calling the scorer returns the robust accuracy; with several `eps` the keys are
        "accuracy" (clean) and "robust_accuracy_eps0.1" and so on, behind `average` unless that
        is "mean" ("worst_class_accuracy"), and what fools at a smaller radius counts at the
        larger ones.

    Raises
    ------
    ValueError
        For parameters, samples, labels or weights that make no sense or do not go together, and
        for clean samples outside `bounds` or `constraints`.
    TypeError
        If `estimator` is no classifier: without `predict` or `classes_`.
    NotDifferentiableError
        If it has no torch view and the attack needs gradients, as "pgd" does.

    Warns
    -----
    AttackWarning
        If gradients are zero or not finite, `predict` disagrees with the torch view, Square
        fools samples that all gradients of "strong" have not, or columns cannot change: those
        of categories, those of an integer type at a radius too small for them, those whose
        changes rounding takes back.

    See Also
    --------
    robust_accuracy_score : The same as a function.
    evaluate_robustness : A figure to report; `RobustScorer.report` is that of a scorer.

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
        n_restarts: int | str = "auto",
        feature_scale: Any = None,
        bounds: Any = None,
        mutable: Any = None,
        constraints: FeatureConstraints | None = None,
        average: str = "mean",
        batch_size: int | str = "auto",
        random_state: Any = 0,
        verbose: bool = False,
    ) -> None:
        self.norm = norm
        self.eps = eps
        self.attack = attack
        self.n_steps = n_steps
        self.step_size = step_size
        self.n_restarts = n_restarts
        self.feature_scale = feature_scale
        self.bounds = bounds
        self.mutable = mutable
        self.constraints = constraints
        self.average = average
        self.batch_size = batch_size
        self.random_state = random_state
        self.verbose = verbose

    def __call__(
        self, estimator: Any, X: Any, y: Any, sample_weight: Any = None
    ) -> float | dict[str, float]:
        """Return the accuracy of `estimator` under attack.

        Parameters
        ----------
        estimator : fitted classifier, or trained nn.Module
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
        estimator : fitted classifier, or trained nn.Module
        X : array-like of shape (n_samples, *features)
        y : array-like of shape (n_samples,)
        sample_weight : array-like of shape (n_samples,), optional

        Returns
        -------
        float, or dict of float when `eps` is a sequence
        """
        radii, attack = self._check_params()
        subject = UnderAttack(
            estimator,
            X,
            y,
            needs=attack.needs,
            batch_size=self.batch_size,
            random_state=self.random_state,
            verbose=self.verbose,
        )
        weight = None if sample_weight is None else check_weights(sample_weight, subject.y)
        attacks = {eps: subject.arm(attack, **self._threat_model(eps)) for eps in sorted(radii)}
        right = subject.right.copy()
        kind = self._kind
        scores = {f"{kind}accuracy": average_accuracy(right, subject.y, weight, self.average)}
        for eps, attack in attacks.items():
            standing = np.flatnonzero(right)
            if eps > 0 and len(standing):
                perturbed = subject.perturb(attack, standing)
                right[standing] = perturbed.right
                warn_of_disagreement(perturbed)
                warn_of_black_box(perturbed)
            score = average_accuracy(right, subject.y, weight, self.average)
            scores[f"{kind}{_key(eps)}"] = score
        return scores if _is_sequence(self.eps) else score

    def report(
        self, estimator: Any, X: Any, y: Any, sample_weight: Any = None
    ) -> "RobustnessReport | dict[str, RobustnessReport]":
        """Return how far the figure of this scorer can be trusted, by its own attack.

        What `evaluate_robustness` says of the scorer's threat model and attack: a confidence
        interval, the accuracy of each class, and flags. Of "pgd" one is that it is a weak attack.
        `average` does not matter.

        Parameters
        ----------
        estimator : fitted classifier, or trained nn.Module
        X : array-like of shape (n_samples, *features)
        y : array-like of shape (n_samples,)
        sample_weight : array-like of shape (n_samples,), optional

        Returns
        -------
        RobustnessReport, or dict of RobustnessReport when `eps` is a sequence

        Warns
        -----
        AttackWarning
            If a flag is raised.

        Examples
        --------
        >>> from sklearn.datasets import load_iris
        >>> from skjacobian import JacobianRegularizedClassifier, RobustScorer
        >>> X, y = load_iris(return_X_y=True)
        >>> model = JacobianRegularizedClassifier(random_state=0).fit(X, y)
        >>> scorer = RobustScorer(eps=0.2, attack="strong")  # centimetres
        >>> report = scorer.report(model, X, y)
        >>> report.robust_accuracy == scorer(model, X, y)
        True
        """
        radii, attack = self._check_params()
        reports = {
            _key(eps): evaluate_robustness(
                estimator,
                X,
                y,
                **self._threat_model(eps),
                attack=attack,
                batch_size=self.batch_size,
                random_state=self.random_state,
                verbose=self.verbose,
                sample_weight=sample_weight,
            )
            for eps in radii
        }
        return reports if _is_sequence(self.eps) else reports[_key(radii[0])]

    @property
    def __name__(self) -> str:
        # What the displays of scikit-learn call a scorer by, once all is fitted and scored.
        return f"{self._kind}robust_accuracy"

    @property
    def _kind(self) -> str:
        """What the name of an accuracy begins with."""
        return "" if self.average == "mean" else f"{self.average}_"

    def _threat_model(self, eps: float) -> dict[str, Any]:
        """Return what the adversary may do at one of the radii, by parameter."""
        return {**{name: getattr(self, name) for name in Attack.THREAT_MODEL}, "eps": eps}

    def _accept_sample_weight(self) -> bool:
        """Tell scikit-learn's search objects that `sample_weight` may be passed."""
        return True

    def _check_params(self) -> tuple[list[float], Attack]:
        """Validate before anything is computed; return the radii and the attack."""
        check_option("norm", self.norm, BALL_NORMS)
        values = list(self.eps) if _is_sequence(self.eps) else [self.eps]  # type: ignore[arg-type]
        if not values:
            reject("eps", self.eps, "at least one radius")
        check_option("average", self.average, AVERAGES)
        check_count_or_auto("batch_size", self.batch_size)
        search = {name: unwrap_scalar(getattr(self, name)) for name in SEARCH}
        attack = make_attack(self.attack, "RobustScorer", **search)
        if not (isinstance(self.attack, str) and self.attack == "pgd"):
            self._check_search_is_unset()
        PGD(**search).check_params()
        return [check_non_negative("eps", value) for value in values], attack

    def _check_search_is_unset(self) -> None:
        """Raise where the scorer says how "pgd" searches, which is not the attack."""
        own = RobustScorer().get_params(deep=False)
        for name in SEARCH:
            if getattr(self, name) != own[name]:
                expected = "left alone: it is a parameter of attack='pgd'"
                if isinstance(self.attack, Attack):
                    expected = f"set on the object: attack={type(self.attack).__name__}({name}=...)"
                raise ValueError(
                    f"Got {name}={getattr(self, name)!r} and attack={self.attack!r}, but expected "
                    f"{name} to be {expected}."
                )


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
    n_restarts: int | str = "auto",
    feature_scale: Any = None,
    bounds: Any = None,
    mutable: Any = None,
    constraints: FeatureConstraints | None = None,
    average: str = "mean",
    batch_size: int | str = "auto",
    random_state: Any = 0,
    verbose: bool = False,
    sample_weight: Any = None,
) -> float | dict[str, float]:
    """Return the accuracy of a fitted classifier under attack.

    Parameters
    ----------
    estimator : fitted classifier, or trained nn.Module
        Anything that `skjacobian.differentiable.as_torch` knows.
    X : array-like of shape (n_samples, *features)
        Clean samples, in the units that the estimator receives.
    y : array-like of shape (n_samples,)
        True labels.
    norm, eps, attack, n_steps, step_size, n_restarts, feature_scale, bounds, mutable, \
constraints, average, batch_size, random_state, verbose
        As in `RobustScorer`.
    sample_weight : array-like of shape (n_samples,), optional

    Returns
    -------
    float, or dict of float when `eps` is a sequence

    Raises
    ------
    ValueError, TypeError, NotDifferentiableError
        As `RobustScorer` does.

    Warns
    -----
    AttackWarning
        As `RobustScorer` does.

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
        mutable=mutable,
        constraints=constraints,
        average=average,
        batch_size=batch_size,
        random_state=random_state,
        verbose=verbose,
    )
    return scorer(estimator, X, y, sample_weight)


def _key(eps: float) -> str:
    # What is typed: 0.3 of np.linspace(0, 0.3, 4) too, whose third is 0.19999999999999998.
    shown = np.format_float_positional(eps, precision=12, fractional=False, trim="-")
    return f"robust_accuracy_eps{shown}"


def _is_sequence(eps: Any) -> bool:
    # A list of whatever is one: numpy refuses what is ragged.
    return isinstance(eps, list | tuple) or (not isinstance(eps, str) and np.ndim(eps) > 0)
