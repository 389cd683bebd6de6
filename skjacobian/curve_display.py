"""Drawing robustness curves, in the way of scikit-learn's displays."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Self

import numpy as np
from sklearn.utils import _safe_indexing, check_consistent_length
from sklearn.utils._optional_dependencies import check_matplotlib_support

from skjacobian._columns import in_the_order_of_fit
from skjacobian._table import Table, as_pandas
from skjacobian._validation import check_axes, check_option, check_radii, check_weights, reject
from skjacobian.constraints import FeatureConstraints
from skjacobian.curve import adversarial_distances, curve_of_distances
from skjacobian.geometry import BALL_NORMS
from skjacobian.intervals import effective_n_samples, wilson_interval
from skjacobian.threat_model import fit_feature_scale

SEARCH_PARAMS = ("n_steps", "n_restarts", "n_queries", "batch_size", "random_state", "verbose")
SYMBOLS = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$", "l1": r"$\ell_1$"}


@dataclass(eq=False, repr=False)
class RobustnessCurveDisplay:
    """Plot of robust accuracy over the radius of the perturbation.

    Make it by `from_estimator`, `from_predictions` or `from_cv_results`. Several estimators
    share axes by passing `ax`.

    Parameters
    ----------
    eps : array-like of shape (n_radii,), or list of them
        Radii in rising order, of one curve or of several.
    robust_accuracy : array-like of shape (n_radii,), or list of them
        As `robustness_curve` returns it.
    n_samples : int, float or list of them, optional
        Of how many samples each curve is the mean; None draws no confidence band.
    norm : {"linf", "l2", "l1"}, default="linf"
        Norm of the perturbation; the axis says so.
    name : str or list of str, optional
        Label in the legend, of a curve or of all curves together; a list labels each.

    Attributes
    ----------
    line_ : matplotlib Line2D or list of them
        The curve, or the curves.
    band_ : matplotlib artist, list of them, or None
        The confidence band of each curve.
    ax_, figure_ : matplotlib Axes and Figure

    See Also
    --------
    robustness_curve : The numbers without the plot.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skjacobian import JacobianRegularizedClassifier, RobustnessCurveDisplay
    >>> X, y = load_iris(return_X_y=True)
    >>> ax = None
    >>> for lam in (0.0, 0.1):
    ...     model = JacobianRegularizedClassifier(lam=lam, max_epochs=20, random_state=0).fit(X, y)
    ...     display = RobustnessCurveDisplay.from_estimator(model, X, y, name=f"λ={lam}", ax=ax)
    ...     ax = display.ax_
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['λ=0.0', 'λ=0.1']
    """

    eps: Any
    robust_accuracy: Any
    _: KW_ONLY
    n_samples: Any = None
    norm: str = "linf"
    name: Any = None

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any,
        *,
        norm: str = "linf",
        eps: Any = None,
        feature_scale: Any = None,
        bounds: Any = None,
        mutable: Any = None,
        constraints: FeatureConstraints | None = None,
        sample_weight: Any = None,
        name: str | None = None,
        ax: Any = None,
        confidence: float | None = 0.95,
        curve_kwargs: Any = None,
        **search_params: Any,
    ) -> Self:
        """Attack a fitted classifier, and plot its curve.

        Parameters
        ----------
        estimator : fitted classifier
        X : array-like of shape (n_samples, *features)
        y : array-like of shape (n_samples,)
        norm, eps, feature_scale, bounds, mutable, constraints, sample_weight
            As in `robustness_curve`.
        name : str, optional
            Label in the legend; None takes the class of the estimator.
        ax, confidence, curve_kwargs
            As in `plot`.
        **search_params
            `n_steps`, `n_restarts`, `n_queries`, `batch_size`, `random_state` and `verbose` of
            `robustness_curve`.

        Returns
        -------
        RobustnessCurveDisplay

        Raises
        ------
        ValueError, TypeError
            As `robustness_curve` and `plot` do, before the search.

        Warns
        -----
        AttackWarning
            As `robustness_curve` does.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        _check_search_params(search_params)
        _check_plot_params(1, eps, name, ax, confidence, curve_kwargs)
        if sample_weight is not None:
            check_weights(sample_weight, X)
        distances = adversarial_distances(
            estimator,
            X,
            y,
            norm=norm,
            radii=eps,
            feature_scale=feature_scale,
            bounds=bounds,
            mutable=mutable,
            constraints=constraints,
            **search_params,
        )
        return cls.from_predictions(
            distances,
            norm=norm,
            eps=eps,
            sample_weight=sample_weight,
            name=type(estimator).__name__ if name is None else name,
            ax=ax,
            confidence=confidence,
            curve_kwargs=curve_kwargs,
        )

    @classmethod
    def from_predictions(
        cls,
        distances: Any,
        *,
        norm: str = "linf",
        eps: Any = None,
        sample_weight: Any = None,
        name: str | None = None,
        ax: Any = None,
        confidence: float | None = 0.95,
        curve_kwargs: Any = None,
    ) -> Self:
        """Plot the curve of distances that were computed before.

        Parameters
        ----------
        distances : array-like of shape (n_samples,)
            As `adversarial_distances` returns them.
        norm : {"linf", "l2", "l1"}, default="linf"
            Norm that they are measured in.
        eps : array-like of float, optional
            Radii; None takes 0 and every finite distance.
        sample_weight : array-like of shape (n_samples,), optional
            The band is that of (Σw)²/Σw² samples, as many as say as much of a mean (Kish).
        name : str, optional
            Label in the legend.
        ax, confidence, curve_kwargs
            As in `plot`.

        Returns
        -------
        RobustnessCurveDisplay

        Raises
        ------
        ValueError
            For distances, radii or weights that make no sense.
        ValueError, TypeError
            As `plot` does.
        """
        check_matplotlib_support(f"{cls.__name__}.from_predictions")
        radii, accuracy = curve_of_distances(distances, eps=eps, sample_weight=sample_weight)
        n_samples: float = len(distances)
        if np.ndim(sample_weight):
            n_samples = effective_n_samples(sample_weight)
        display = cls(radii, accuracy, n_samples=n_samples, norm=norm, name=name)
        return display.plot(ax, confidence=confidence, curve_kwargs=curve_kwargs)

    @classmethod
    def from_cv_results(
        cls,
        cv_results: Mapping[str, Any],
        X: Any,
        y: Any,
        *,
        norm: str = "linf",
        eps: Any = None,
        feature_scale: Any = None,
        bounds: Any = None,
        mutable: Any = None,
        constraints: FeatureConstraints | None = None,
        name: Any = None,
        ax: Any = None,
        confidence: float | None = None,
        curve_kwargs: Any = None,
        **search_params: Any,
    ) -> Self:
        """Plot the curve of each fold of a cross-validation, on the samples it was tested on.

        Parameters
        ----------
        cv_results : dict
            As `sklearn.model_selection.cross_validate` returns it with
            ``return_estimator=True, return_indices=True``.
        X : array-like of shape (n_samples, *features)
        y : array-like of shape (n_samples,)
            What was cross-validated.
        norm, eps, feature_scale, bounds, mutable, constraints
            As in `robustness_curve`; the "std" and "range" of `feature_scale` are those of
            all of X.
        name : str or list of str, optional
            Label in the legend: of all curves together, or of each, which needs a list of
            `curve_kwargs` too.
        ax, curve_kwargs
            As in `plot`.
        confidence : float, optional
            Confidence of a band around each curve; None draws none, for the spread of the
            curves shows.
        **search_params
            As in `from_estimator`.

        Returns
        -------
        RobustnessCurveDisplay

        Raises
        ------
        ValueError, TypeError
            As `from_estimator` does; and a ValueError if `cv_results` lack the estimators or the
            indices, or are those of more samples.

        Warns
        -----
        AttackWarning
            As `robustness_curve` does.
        """
        check_matplotlib_support(f"{cls.__name__}.from_cv_results")
        _check_search_params(search_params)
        _check_cv_results(cv_results, X, y)
        _check_plot_params(len(cv_results["estimator"]), eps, name, ax, confidence, curve_kwargs)
        X = in_the_order_of_fit(cv_results["estimator"][0], as_pandas(X))
        scale = fit_feature_scale(feature_scale, Table(X).tensor)
        curves = []
        for estimator, test in zip(
            cv_results["estimator"], cv_results["indices"]["test"], strict=True
        ):
            distances = adversarial_distances(
                estimator,
                _safe_indexing(X, test),
                _safe_indexing(y, test),
                norm=norm,
                radii=eps,
                feature_scale=scale,
                bounds=bounds,
                mutable=mutable,
                constraints=constraints,
                **search_params,
            )
            curves.append((*curve_of_distances(distances, eps=eps), len(distances)))
        radii, accuracies, n_samples = map(list, zip(*curves, strict=True))
        display = cls(radii, accuracies, n_samples=n_samples, norm=norm, name=name)
        return display.plot(ax, confidence=confidence, curve_kwargs=curve_kwargs)

    def plot(
        self,
        ax: Any = None,
        *,
        name: Any = None,
        confidence: float | None = 0.95,
        curve_kwargs: Any = None,
    ) -> Self:
        """Draw the curves as steps: each value holds from its radius to the next.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; None makes a new figure.
        name : str or list of str, optional
            In place of `name` of the display.
        confidence : float, optional
            Confidence of the band around each curve, Wilson's interval at each radius: it is
            about the sample, not about the strength of the attack. None draws no band.
        curve_kwargs : dict or list of dict, optional
            Passed to `Axes.plot`: for all curves, or for each.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For curves whose arrays do not go together, a confidence that is not between 0 and 1,
            and names or keywords of lines that do not fit the curves.
        TypeError
            If `ax` is not one Axes.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        check_option("norm", self.norm, BALL_NORMS)
        check_axes(ax)
        curves = self._checked_curves()
        bands = [_band(accuracy, n, confidence) for _, accuracy, n in curves]
        styles = _styles(len(curves), self.name if name is None else name, curve_kwargs)
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots(layout="constrained")
        lines: list[Any] = []
        for (eps, accuracy, _), style in zip(curves, styles, strict=True):
            if lines and not isinstance(curve_kwargs, list):
                style.setdefault("color", lines[0].get_color())
            lines.extend(ax.plot(eps, accuracy, **style))
        drawn = [
            ax.fill_between(curve[0], *band, step="post", color=line.get_color(), alpha=0.2, lw=0)
            for curve, band, line in zip(curves, bands, lines, strict=True)
            if band is not None
        ]
        self.line_ = lines[0] if len(lines) == 1 else lines
        self.band_ = drawn[0] if len(drawn) == 1 else drawn or None
        ax.set(
            xlabel=f"Radius of the perturbation ({SYMBOLS[self.norm]})",
            ylabel="Robust accuracy",
            ylim=(-0.01, 1.01),
        )
        if ax.get_legend_handles_labels()[1]:
            ax.legend()
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _checked_curves(self) -> list[tuple[np.ndarray, np.ndarray, int | None]]:
        """Return radii, accuracies and number of samples of each curve."""
        radii, accuracies = _as_list(self.eps), _as_list(self.robust_accuracy)
        counts = self.n_samples if isinstance(self.n_samples, list) else [self.n_samples]
        counts = counts * len(radii) if counts == [None] else counts
        if not len(radii) == len(accuracies) == len(counts) > 0:
            raise ValueError(
                f"Got eps of {len(radii)} curves, robust_accuracy of {len(accuracies)} and "
                f"n_samples of {len(counts)}, but expected as many of each."
            )
        curves = []
        for eps, accuracy, n_samples in zip(radii, accuracies, counts, strict=True):
            eps, accuracy = np.asarray(eps, dtype=float), np.asarray(accuracy, dtype=float)
            if eps.ndim != 1 or eps.shape != accuracy.shape or len(eps) == 0:
                raise ValueError(
                    f"Got eps of shape {eps.shape} and robust_accuracy of shape "
                    f"{accuracy.shape}, but expected (n_radii,) of both."
                )
            curves.append((eps, accuracy, n_samples))
        return curves


def _as_list(values: Any) -> list[Any]:
    """Return the arrays of several curves, or that of one in a list."""
    several = isinstance(values, list) and len(values) > 0 and np.ndim(values[0]) > 0
    return values if several else [values]


def _band(accuracy: np.ndarray, n_samples: int | None, confidence: float | None) -> Any:
    if confidence is None or n_samples is None:
        return None
    return wilson_interval(accuracy * n_samples, n_samples, confidence)


def _styles(n_curves: int, name: Any, curve_kwargs: Any) -> list[dict[str, Any]]:
    """Return keywords of `Axes.plot` for each curve, as scikit-learn's displays choose them."""
    each = isinstance(curve_kwargs, list)
    if each and len(curve_kwargs) != n_curves:
        reject("curve_kwargs", curve_kwargs, f"a dict or a list of {n_curves}, one per curve")
    if isinstance(name, list) and len(name) != 1 and (not each or len(name) != n_curves):
        reject(
            "name",
            name,
            f"None, a str, or a list of {n_curves} with a list of curve_kwargs: curves of one "
            "look cannot be told apart",
        )
    names = name if isinstance(name, list) else [name]
    if len(names) == 1:
        # Curves of one look share one entry of the legend.
        names = names * n_curves if each else names + [None] * (n_curves - 1)
    default: dict[str, Any] = {"drawstyle": "steps-post"}
    if n_curves > 1:
        default |= {"alpha": 0.5, "linestyle": "--"}
    given = curve_kwargs if each else [curve_kwargs or {}] * n_curves
    from matplotlib.cbook import normalize_kwargs
    from matplotlib.lines import Line2D

    try:
        styles = [normalize_kwargs(style, Line2D) for style in given]
        for style in styles:
            Line2D([], [], **style)
    except (AttributeError, TypeError, ValueError) as error:
        reject("curve_kwargs", curve_kwargs, f"keywords of a line of matplotlib ({error})")
    return [
        {**default, "label": label, **style} for label, style in zip(names, styles, strict=True)
    ]


def _check_plot_params(
    n_curves: int, eps: Any, name: Any, ax: Any, confidence: float | None, curve_kwargs: Any
) -> None:
    """Raise for what the plot would reject, before the search."""
    check_axes(ax)
    if eps is not None:
        check_radii("eps", eps)
    if confidence is not None:
        wilson_interval(0, 1, confidence)
    _styles(n_curves, name, curve_kwargs)


def _check_search_params(params: dict[str, Any]) -> None:
    """Raise for parameters that the search has not, like those of lines."""
    for name, value in params.items():
        if name not in SEARCH_PARAMS:
            raise TypeError(
                f"Got {name}={value!r}, but expected only {', '.join(SEARCH_PARAMS)} besides the "
                "named parameters; those of lines go into curve_kwargs."
            )


def _check_cv_results(cv_results: Mapping[str, Any], X: Any, y: Any) -> None:
    """Raise unless `cv_results` are of this X, with what is needed to go on from there."""
    if missing := [key for key in ("estimator", "indices") if key not in cv_results]:
        raise ValueError(
            f"Got cv_results without {' and '.join(map(repr, missing))}, but expected those of "
            "cross_validate(..., return_estimator=True, return_indices=True)."
        )
    check_consistent_length(X, y)
    indices = cv_results["indices"]
    last = max(int(np.max(part)) for kind in ("train", "test") for part in indices[kind])
    if last >= len(X):
        raise ValueError(
            f"Got X with {len(X)} samples, but expected what was cross-validated: cv_results "
            f"have indices up to {last}."
        )
