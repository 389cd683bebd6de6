"""Robust accuracy at every radius, from one search for the smallest perturbations."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from skjacobian._under_attack import UnderAttack, warn_of_disagreement
from skjacobian._validation import (
    check_count,
    check_number_per_sample,
    check_radii,
    check_weights,
)
from skjacobian.attacks import FMN, Attack, LeafSearch, RayS
from skjacobian.constraints import FeatureConstraints
from skjacobian.exceptions import AttackWarning, NoGradientError
from skjacobian.geometry import LARGEST_RADIUS, Ball
from skjacobian.norms import rows

# How far to look, in units of the largest radius asked about: a search that may wander far beyond
# loses its way; at the radius itself it needs room.
ROOM = 2.0
# How much farther than the boundary of the view that of predict is looked for, as rounding may
# part them; shares of the distance.
BEYOND_ROUNDING = 1e-3, 1e-2, 0.1
# To how many other samples the way is looked at where there are few features, and how precisely.
N_OTHERS = 1000
N_HALVINGS = 12


def adversarial_distances(
    estimator: Any,
    X: Any,
    y: Any,
    *,
    norm: str = "linf",
    eps: float = np.inf,
    radii: Any = None,
    n_steps: int = 14,
    n_restarts: int = 2,
    n_queries: int = 1000,
    feature_scale: Any = None,
    bounds: Any = None,
    mutable: Any = None,
    constraints: FeatureConstraints | None = None,
    batch_size: int | str = "auto",
    random_state: Any = 0,
    verbose: bool = False,
) -> np.ndarray:
    """Return the norm of the smallest perturbation found that makes `predict` wrong.

    The search is the minimum-norm attack `skjacobian.attacks.FMN`, in the units of the X that
    the estimator receives: of a `Pipeline`, the raw features. A classifier without gradients,
    such as nearest neighbours, is asked for its decisions alone, by `skjacobian.attacks.RayS`; of
    trees, their leaves are searched too, by `skjacobian.attacks.LeafSearch`. With at most
    100 features, the line to the nearest sample that `predict` gives another class (among at most
    1,000 of X) is searched too: kernel machines have plateaus, on which gradients say nothing. A
    distance is an upper bound on the true one.

    Parameters
    ----------
    estimator : fitted classifier, or trained nn.Module
    X : array-like of shape (n_samples, *features)
        Clean samples, in the units that the estimator receives.
    y : array-like of shape (n_samples,)
        True labels.
    norm : {"linf", "l2", "l1"}, default="linf"
        Norm of the perturbation.
    eps : float, default=numpy.inf
        Largest radius that is looked at.
    radii : array-like of float, optional
        What the distances will be compared with, if not with everything: which of these they
        exceed is found as well in less time, and what lies beyond is not looked for.
    n_steps : int, default=14
        Gradient steps of one restart.
    n_restarts : int, default=2
        Searches: the first from X, the second from the other side of X than the first ended,
        the others from random points.
    n_queries : int, default=1000
        How often a classifier without gradients is asked about each sample.
    feature_scale : None, "std", "range" or array of shape (n_features,), default=None
        Unit of each feature; "std" and "range" are those of X. A feature that is constant
        there is held fixed.
    bounds : (low, high), optional
        Range of valid features, numbers or one value per feature. None is unbounded; there
        is no implicit clip.
    mutable : str, int, or array-like of str, int or bool, optional
        Features that may change: column names of a DataFrame, indices, or a boolean mask. None
        is all.
    constraints : FeatureConstraints, optional
        What else makes a sample valid: immutable, whole, one-directional and one-hot columns,
        and scale and bounds by column.
    batch_size : int or "auto", default="auto"
        Samples attacked at once.
    random_state : int, RandomState instance or None, default=0
        Seed of all that is drawn at random: the starts of all restarts but the first two, and
        the rays.
    verbose : bool, default=False
        Print a line for each batch.

    Returns
    -------
    array of float64 of shape (n_samples,)
        ‖(X_adv - X) / feature_scale‖; 0 where `predict` is wrong about the clean sample, inf
        where no perturbation was found.

    Raises
    ------
    ValueError
        For parameters, samples or labels that make no sense or do not go together, and for clean
        samples outside `bounds` or `constraints`.
    TypeError
        If `estimator` is no classifier: without `predict` or `classes_`.

    Warns
    -----
    AttackWarning
        If the classifier has no gradients, and no leaves that are known; if gradients are zero
        or not finite; if `predict` is right where the torch view is fooled, and up to a tenth
        farther out (such a distance counts as inf); or if columns of categories are held fixed.

    See Also
    --------
    robustness_curve : The share of samples that are farther away than each radius.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skjacobian import JacobianRegularizedClassifier, adversarial_distances
    >>> X, y = load_iris(return_X_y=True)
    >>> model = JacobianRegularizedClassifier(random_state=0).fit(X, y)
    >>> distances = adversarial_distances(model, X, y, norm="l2")  # centimetres
    >>> bool((distances > 0).mean() == model.score(X, y))
    True
    """
    attack: Attack = FMN(norm=norm, eps=eps, n_steps=n_steps, n_restarts=n_restarts, radii=radii)
    attack.check_params()
    largest = eps if radii is None else min(eps, float(check_radii("radii", radii)[-1]))
    if radii is not None:
        eps = min(eps, ROOM * largest or np.inf)
    check_count("n_queries", n_queries)
    rays, finite_eps = RayS(n_queries=n_queries, minimal=True), min(eps, LARGEST_RADIUS)
    subject = UnderAttack(
        estimator,
        X,
        y,
        needs=RayS.needs,
        batch_size=batch_size,
        random_state=random_state,
        verbose=verbose,
    )
    if subject.is_black_box:
        attack, eps = rays, finite_eps
    attack = subject.arm(
        attack,
        largest=min(eps, largest),
        norm=norm,
        eps=eps,
        feature_scale=feature_scale,
        bounds=bounds,
        mutable=mutable,
        constraints=constraints,
    )
    if subject.is_black_box and not subject.leaves_decide(attack):
        _warn_of_decisions(estimator)
    distances = np.zeros(len(subject.y))
    right = np.flatnonzero(subject.right)
    if len(right):
        try:
            distances[right] = _distances_of(subject, attack, right)
        except NoGradientError:  # of a module that computes without them
            _warn_of_decisions(estimator)
            attack = rays.with_threat({**attack.threat_model, "eps": finite_eps})
            distances[right] = _distances_of(subject, attack, right)
        if subject.leaves is not None:
            nearest = LeafSearch(minimal=True).with_threat(attack.threat_model)
            among_leaves = _distances_of(subject, nearest, right)
            distances[right] = np.minimum(distances[right], among_leaves)
        if attack.ball(subject.X_tensor[:1]).has_few_features:
            distances[right] = _on_the_way_to_others(subject, attack, right, distances[right])
    return distances


def _warn_of_decisions(estimator: Any) -> None:
    warnings.warn(
        f"Got an estimator of type {type(estimator).__name__} without gradients, so the smallest "
        "perturbations are searched for by its decisions alone (RayS), which is weaker: "
        "robustness may be overstated.",
        AttackWarning,
        stacklevel=3,
    )


def _distances_of(subject: UnderAttack, attack: Attack, index: np.ndarray) -> np.ndarray:
    perturbed = subject.perturb(attack, index)
    ball, right = attack.ball(subject.X_tensor[index]), perturbed.right.copy()
    X_adv = perturbed.found.X_adv.nan_to_num(nan=0.0)
    distances = np.where(right, np.inf, ball.distance(X_adv).numpy())
    for share in BEYOND_ROUNDING:
        of = np.flatnonzero(perturbed.found.fooled.numpy() & right)
        if len(of) == 0:
            break
        here = ball[torch.from_numpy(of)]
        points = torch.lerp(here.X, X_adv[of], 1 + share)
        points = here.valid(here.enforce(here.project(points)))
        predicted = subject.estimator.predict(subject.table.rows(index[of], points.numpy()))
        right[of] = predicted == subject.y[index[of]]
        distances[of] = np.where(right[of], np.inf, here.distance(points).numpy())
    warn_of_disagreement(replace(perturbed, right=right))
    return distances


def _on_the_way_to_others(
    subject: UnderAttack, attack: Attack, index: np.ndarray, distances: np.ndarray
) -> np.ndarray:
    """Return the distances, or those of points between samples where they are smaller.

    Another sample that is predicted otherwise is a perturbation that fools, if a large one, where
    gradients see a plateau. The boundary on the way there is found by bisection.
    """
    X, y, ball = subject.X_tensor, subject.y, attack.ball(subject.X_tensor[index])
    X_other = X[_nearest_other(subject, ball, index)].nan_to_num(nan=0.0)
    X_other = ball.enforce(ball.project(X_other))

    def at(share: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return at which of some samples points between fool `predict`, and how far they are."""
        shares = rows(torch.from_numpy(share).to(X), X)
        here = ball[torch.from_numpy(of)]
        points = here.valid(here.enforce(torch.lerp(here.X, X_other[of], shares)))
        wrong = subject.estimator.predict(subject.table.rows(index[of], points.numpy()))
        return np.asarray(wrong != y[index[of]]), here.distance(points).numpy()

    fooled, length = at(np.ones(len(index)), np.arange(len(index)))
    of = np.flatnonzero(fooled & (length < distances))
    spared, needed, best = np.zeros(len(of)), np.ones(len(of)), length[of]
    for _ in range(N_HALVINGS if len(of) else 0):
        share = (spared + needed) / 2
        fooled, length = at(share, of)
        spared, needed = np.where(fooled, spared, share), np.where(fooled, share, needed)
        best = np.where(fooled, np.minimum(best, length), best)
    nearer = distances.copy()
    nearer[of] = best
    return nearer


def _nearest_other(subject: UnderAttack, ball: Ball, index: np.ndarray) -> np.ndarray:
    """Return the nearest sample predicted as another class, among at most N_OTHERS.

    Any sample if there is none.
    """
    flat, n_samples = ball.to_scaled(subject.X_tensor.nan_to_num(nan=0.0)), len(subject.y)
    others = np.linspace(0, n_samples - 1, min(n_samples, N_OTHERS)).astype(int)
    order = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}[ball.norm]
    nearest = []
    for part in np.array_split(index, -(-len(index) // N_OTHERS)):
        same = subject.predicted[others] == subject.y[part][:, None]
        length = torch.cdist(flat[part], flat[others], p=order)
        length = length.masked_fill(torch.from_numpy(same), torch.inf)
        nearest.append(others[length.argmin(1).numpy()])
    return np.concatenate(nearest)


def robustness_curve(
    estimator: Any,
    X: Any,
    y: Any,
    *,
    norm: str = "linf",
    eps: Any = None,
    n_steps: int = 14,
    n_restarts: int = 2,
    n_queries: int = 1000,
    feature_scale: Any = None,
    bounds: Any = None,
    mutable: Any = None,
    constraints: FeatureConstraints | None = None,
    batch_size: int | str = "auto",
    random_state: Any = 0,
    verbose: bool = False,
    sample_weight: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the accuracy under attack as a function of the radius.

    The smallest perturbation of each sample is searched for once, and serves all radii. The
    curve is an upper bound on the true one, as tight as the search is strong. Gradients that
    mislead leave it far too high, and only the flags of `evaluate_robustness` tell: report its
    figure beside the curve.

    Parameters
    ----------
    estimator : fitted classifier, or trained nn.Module
    X : array-like of shape (n_samples, *features)
        Clean samples, in the units that the estimator receives.
    y : array-like of shape (n_samples,)
        True labels.
    norm : {"linf", "l2", "l1"}, default="linf"
        Norm of the perturbation.
    eps : array-like of float, optional
        Radii. None takes 0 and every radius at which the curve falls, so that all of it is
        returned.
    n_steps, n_restarts, n_queries, feature_scale, bounds, mutable, constraints, batch_size, \
random_state, verbose
        As in `adversarial_distances`.
    sample_weight : array-like of shape (n_samples,), optional

    Returns
    -------
    eps : array of shape (n_radii,)
        The radii, in rising order.
    robust_accuracy : array of shape (n_radii,)
        Share of samples that no perturbation found of norm at most `eps` fools; at 0 the
        clean accuracy.

    Raises
    ------
    ValueError, TypeError
        As `adversarial_distances` does, and for radii or weights that make no sense.

    Warns
    -----
    AttackWarning
        As `adversarial_distances` does.

    See Also
    --------
    RobustnessCurveDisplay : Plots it.
    RobustScorer : Robust accuracy at one radius or several, by an attack for each.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skjacobian import JacobianRegularizedClassifier, robustness_curve
    >>> X, y = load_iris(return_X_y=True)
    >>> model = JacobianRegularizedClassifier(random_state=0).fit(X, y)
    >>> eps, robust_accuracy = robustness_curve(model, X, y, eps=[0, 0.1, 0.3])
    >>> bool(robust_accuracy[0] == model.score(X, y))
    True
    >>> bool((robust_accuracy[1:] <= robust_accuracy[:-1]).all())
    True
    """
    if sample_weight is not None:
        check_weights(sample_weight, X)
    distances = adversarial_distances(
        estimator,
        X,
        y,
        norm=norm,
        radii=None if eps is None else check_radii("eps", eps),
        n_steps=n_steps,
        n_restarts=n_restarts,
        n_queries=n_queries,
        feature_scale=feature_scale,
        bounds=bounds,
        mutable=mutable,
        constraints=constraints,
        batch_size=batch_size,
        random_state=random_state,
        verbose=verbose,
    )
    return curve_of_distances(distances, eps=eps, sample_weight=sample_weight)


def curve_of_distances(
    distances: Any, *, eps: Any = None, sample_weight: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of `distances` above each radius.

    Parameters
    ----------
    distances : array-like of shape (n_samples,)
        As `adversarial_distances` returns them.
    eps : array-like of float, optional
        Radii; None takes 0 and every finite distance.
    sample_weight : array-like of shape (n_samples,), optional

    Returns
    -------
    eps, robust_accuracy : arrays of shape (n_radii,)

    Raises
    ------
    ValueError
        For distances, radii or weights that make no sense.

    Examples
    --------
    >>> from skjacobian.curve import curve_of_distances
    >>> eps, robust_accuracy = curve_of_distances([0.0, 0.5, 0.25, 0.5])
    >>> eps.tolist(), robust_accuracy.tolist()
    ([0.0, 0.25, 0.5], [0.75, 0.5, 0.0])
    """
    distances = _check_distances(distances)
    finite = distances[np.isfinite(distances)]
    eps = np.unique([0.0, *finite]) if eps is None else check_radii("eps", eps)
    weight = np.ones(len(distances))
    if sample_weight is not None:
        weight = check_weights(sample_weight, distances).astype(float)
    order = np.argsort(distances)
    # What the samples up to each place weigh; with no weights these are counts, so exact.
    up_to = np.concatenate([[0.0], np.cumsum(weight[order])])
    n_fooled = np.searchsorted(distances[order], eps, side="right")
    return eps, (up_to[-1] - up_to[n_fooled]) / up_to[-1]


def _check_distances(distances: Any) -> np.ndarray:
    array = check_number_per_sample("distances", distances)
    if n_bad := int((~(array >= 0)).sum()):
        raise ValueError(
            f"Got distances with {n_bad} NaN or negative, but expected 0, positive numbers or inf."
        )
    return array
