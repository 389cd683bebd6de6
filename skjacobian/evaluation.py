"""Robust accuracy with the signs by which it can be trusted, or not."""

import time
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from skjacobian._checks import Checks
from skjacobian._under_attack import Perturbed, UnderAttack
from skjacobian._validation import check_non_negative, check_option, check_weights, reject
from skjacobian.attacks import Attack, Cascade
from skjacobian.attacks._named import make_attack
from skjacobian.constraints import FeatureConstraints
from skjacobian.exceptions import AttackWarning
from skjacobian.geometry import BALL_NORMS
from skjacobian.report import RobustnessReport, StageResult


def evaluate_robustness(
    estimator: Any,
    X: Any,
    y: Any,
    *,
    norm: str = "linf",
    eps: float = 0.1,
    attack: str | Attack = "strong",
    feature_scale: Any = None,
    bounds: Any = None,
    mutable: Any = None,
    constraints: FeatureConstraints | None = None,
    n_queries: int | None = None,
    time_limit: float | None = None,
    batch_size: int | str = "auto",
    random_state: Any = 0,
    verbose: bool = False,
    sample_weight: Any = None,
) -> RobustnessReport:
    """Measure the accuracy of a classifier under attack, and look for reasons to doubt it.

    Parameters
    ----------
    estimator : fitted classifier, or trained nn.Module
        Anything that `skjacobian.differentiable.as_torch` knows; of others the scores or the
        decisions are attacked, which is weaker and is said.
    X : array-like of shape (n_samples, *features)
        Clean samples, in the units that the estimator receives.
    y : array-like of shape (n_samples,)
        True labels.
    norm : {"linf", "l2", "l1"}, default="linf"
        Norm of the perturbation.
    eps : float, default=0.1
        Radius: ‖(X_adv - X) / feature_scale‖ <= eps.
    attack : {"pgd", "fgsm", "strong"} or Attack, default="strong"
        How to search: "strong" is the cascade of `skjacobian.attacks.Cascade`; one attack alone
        is weak, which is said. An `Attack` object brings everything but the threat model.
    feature_scale : None, "std", "range" or array of shape (n_features,), default=None
        Unit of each feature; "std" and "range" are those of X.
    bounds : (low, high), optional
        Range of valid features, numbers or one value per feature. None is unbounded.
    mutable : str, int, or array-like of str, int or bool, optional
        Features that may change: column names of a DataFrame, indices, or a boolean mask. None
        is all.
    constraints : FeatureConstraints, optional
        What else makes a sample valid: immutable, whole, one-directional and one-hot columns,
        and scale and bounds by column.
    n_queries : int, optional
        How often "strong" shows a sample to the model at most; for l1 and l2 one query more may
        confirm the result.
    time_limit : float, optional
        Seconds after which "strong" ends with what it has; the checks take some more.
    batch_size : int or "auto", default="auto"
        Samples attacked at once.
    random_state : int, RandomState instance or None, default=0
        Seed of the random starts.
    verbose : bool, default=False
        Print a line for each batch, and for each stage of a cascade.
    sample_weight : array-like of shape (n_samples,), optional
        Weights of the samples in all accuracies. The confidence interval is that of (Σw)²/Σw²
        samples, as many as say as much of a mean (Kish). Flags look at the samples without.

    Returns
    -------
    RobustnessReport
        Print it. It has `robust_accuracy`, `confidence_interval`, `stages`,
        `class_accuracies`, `flags` and `to_frame()`.

    Raises
    ------
    ValueError
        For parameters, samples, labels or weights that make no sense or do not go together, and
        for clean samples that break `constraints`.
    TypeError
        If `estimator` is no classifier: without `predict` or `classes_`.
    NotDifferentiableError
        If it has no torch view and the attack needs gradients, as "pgd" does.

    Warns
    -----
    AttackWarning
        If a flag is raised.

    See Also
    --------
    RobustScorer : A number alone, for searches over parameters.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skjacobian import JacobianRegularizedClassifier, evaluate_robustness
    >>> X, y = load_iris(return_X_y=True)
    >>> model = JacobianRegularizedClassifier(random_state=0).fit(X, y)
    >>> report = evaluate_robustness(model, X, y, norm="linf", eps=0.2)  # centimetres
    >>> report.robust_accuracy <= report.accuracy
    True
    >>> report.raised
    ()
    """
    check_option("norm", norm, BALL_NORMS)
    check_non_negative("eps", eps)
    start = time.perf_counter()
    attack = _attack(attack, n_queries=n_queries, time_limit=time_limit)
    subject = UnderAttack(
        estimator,
        X,
        y,
        needs=attack.needs,
        batch_size=batch_size,
        random_state=random_state,
        verbose=verbose,
    )
    weight = None if sample_weight is None else check_weights(sample_weight, subject.y)
    columns, samples = subject.columns, subject.X_tensor
    attack = attack.with_threat(
        columns.threat_model(samples, norm, eps, feature_scale, bounds, mutable, constraints)
    )
    attack.check_params()
    attack.check_valid(samples, columns.columns)
    inside = ~attack.outside(samples).numpy()
    attacked = np.flatnonzero(subject.right & inside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)  # the flags say it
        attack = subject.where_defined(attack)
        perturbed = subject.perturb(attack, attacked)
        flags = Checks(subject, attack, attacked, perturbed).flags(
            inside,
            columns.unsaid_categories(mutable, constraints),
            columns.stuck(attack, samples, constraints),
        )
    robust = np.zeros(len(subject.y), dtype=bool)
    robust[attacked] = perturbed.right
    report = RobustnessReport(
        estimator_name=type(estimator).__name__,
        norm=norm,
        eps=float(eps),
        attack=type(attack).__name__,
        y=subject.y,
        right=subject.right,
        robust=robust,
        X_adv=subject.with_rows(attacked, perturbed.found.X_adv),
        stages=_stages(attack, attacked, perturbed, robust, weight),
        flags=flags,
        seconds=time.perf_counter() - start,
        view=subject.view_name,
        sample_weight=weight,
    )
    _warn_of_flags(report)
    return report


def _attack(attack: str | Attack, **budgets: Any) -> Attack:
    """Return the attack, if nothing is said twice."""
    named = make_attack(attack, "evaluate_robustness")
    if not isinstance(attack, Attack) and attack == "strong":
        return Cascade(**budgets)
    for name, value in budgets.items():
        if value is not None:
            reject(name, value, f"None: it is a budget of 'strong', and attack={attack!r}")
    return named


def _stages(
    attack: Attack,
    attacked: np.ndarray,
    perturbed: Perturbed,
    robust: np.ndarray,
    weight: np.ndarray | None,
) -> tuple[StageResult, ...]:
    """Return what each stage left standing, judged by the search, and by predict at the end."""
    found = perturbed.found
    standing = np.zeros(len(robust), dtype=bool)
    standing[attacked] = True
    rows = [("clean", standing, 1.0, 0.0)]
    for stage in found.stages[1:]:
        standing = standing.copy()
        standing[attacked[stage.fooled.numpy()]] = False
        rows.append((stage.name, standing, _mean_of_asked(stage.n_queries), stage.seconds))
    if len(rows) == 1:
        n_queries = _mean_of_asked(found.n_queries)
        rows.append((type(attack).__name__, robust, n_queries, perturbed.seconds))
    elif not np.array_equal(standing, robust):
        rows.append(("judged by predict", robust, 0.0, 0.0))
    counts = [len(robust), *(int(standing.sum()) for _, standing, *_ in rows)]
    return tuple(
        StageResult(
            name, float(np.average(standing, weights=weight)), before - after, n_queries, seconds
        )
        for (name, standing, n_queries, seconds), (before, after) in zip(
            rows, pairwise(counts), strict=True
        )
    )


def _mean_of_asked(n_queries: Tensor) -> float:
    """Return the queries per sample, of those that the model was asked about."""
    asked = n_queries[n_queries > 0].double()
    return float(asked.mean()) if len(asked) else 0.0


def _warn_of_flags(report: RobustnessReport) -> None:
    names = [flag.name for flag in report.raised]
    if names:
        flags = "1 flag is" if len(names) == 1 else f"{len(names)} flags are"
        warnings.warn(
            f"{flags} raised over this robust accuracy: {', '.join(names)}. Print the report "
            "for what they mean.",
            AttackWarning,
            stacklevel=3,
        )
