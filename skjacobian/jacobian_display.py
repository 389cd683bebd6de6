"""Drawing Jacobian norms, in the way of scikit-learn's displays."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, Self

import numpy as np
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils.validation import check_is_fitted, column_or_1d

from skjacobian._estimator import RobustClassifier
from skjacobian._validation import check_axes, check_number_per_sample, check_option, reject
from skjacobian.losses import margin

KINDS = ("distribution", "margin")
FORMULAS = {  # by `output` and `norm`, for the axis of the norm
    "logits": {
        "l2": r"$\|\,J\|_F^2$",
        "l1": r"$\|\,J\|_{1,1}$",
        "l21": r"$\Sigma_j\, \|\,J_{\cdot j}\|_2$",
        "spectral": r"$\sigma_{\mathrm{max}}(J)$",
        "cross_lipschitz": r"$\mathrm{max}_k\, \|\,J_k - J_y\|_1$",
    },
    "loss": {"l2": r"$\|\nabla_x \ell\|_2^2$", "l1": r"$\|\nabla_x \ell\|_1$"},
}


@dataclass(eq=False, repr=False)
class JacobianNormDisplay:
    """Plot of the Jacobian norms of a classifier, by class or against the margin.

    Parameters
    ----------
    norms : array-like of shape (n_samples,)
        As `jacobian_norm` of a classifier returns them.
    y : array-like of shape (n_samples,), optional
        True labels; None draws all samples as one.
    margins : array-like of shape (n_samples,), optional
        Logit of the true class (of the predicted one, where `y` is None) minus the largest
        other logit. Needed by ``kind="margin"``.
    norm : {"l2", "l1", "l21", "spectral", "cross_lipschitz"}, default="l2"
    output : {"logits", "loss"}, default="logits"
        Which norm it is, and of what; the axis says so.
    estimator_name : str, optional
        Title of axes that have none, and label of the samples in a legend.

    Attributes
    ----------
    boxplot_ : dict of matplotlib artists
        After ``plot(kind="distribution")``, as `Axes.boxplot` returns it.
    scatter_, line_ : matplotlib PathCollection and Line2D
        After ``plot(kind="margin")``: the samples, and the line of margin 0.
    ax_, figure_ : matplotlib Axes and Figure

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skjacobian import JacobianNormDisplay, JacobianRegularizedClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> model = JacobianRegularizedClassifier(random_state=0).fit(X, y)
    >>> display = JacobianNormDisplay.from_estimator(model, X, y, norm="spectral")
    >>> bool((display.margins > 0).mean() == model.score(X, y))
    True
    """

    norms: Any
    _: KW_ONLY
    y: Any = None
    margins: Any = None
    norm: str = "l2"
    output: str = "logits"
    estimator_name: str | None = None

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any = None,
        *,
        norm: str = "l2",
        output: str = "logits",
        kind: str = "distribution",
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Compute the exact norms of a fitted classifier, and plot them.

        Parameters
        ----------
        estimator : fitted classifier of this package
            Or a `Pipeline`, search object or `FrozenEstimator` that ends in one. The norm is in
            the units of what the classifier itself receives: behind a scaler, scaled units.
        X : array-like of shape (n_samples, *features)
        y : array-like of shape (n_samples,), optional
            True labels. None draws all samples as one, and takes the predicted labels where
            the norm or the margin depends on them.
        norm, output
            As in `jacobian_norm` of the classifier.
        kind, ax, **kwargs
            As in `plot`.

        Returns
        -------
        JacobianNormDisplay

        Raises
        ------
        TypeError
            If the estimator does not end in a classifier of this package, or `ax` is not one Axes.
        ValueError
            As `jacobian_norm` of the classifier and `plot` do.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        check_option("kind", kind, KINDS)
        check_axes(ax)
        classifier, X = _final_classifier(estimator, X)
        norms = classifier.jacobian_norm(X, y, norm=norm, output=output)
        margins = _margins(classifier, X, y)
        name = type(classifier).__name__
        display = cls(norms, y=y, margins=margins, norm=norm, output=output, estimator_name=name)
        return display.plot(ax, kind=kind, **kwargs)

    @classmethod
    def from_predictions(
        cls,
        norms: Any,
        *,
        y: Any = None,
        margins: Any = None,
        norm: str = "l2",
        output: str = "logits",
        estimator_name: str | None = None,
        kind: str = "distribution",
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Plot norms that were computed before.

        Parameters
        ----------
        norms, y, margins, norm, output, estimator_name
            As in `JacobianNormDisplay`.
        kind, ax, **kwargs
            As in `plot`.

        Returns
        -------
        JacobianNormDisplay

        Raises
        ------
        ValueError, TypeError
            As `plot` does.
        """
        return cls(
            norms, y=y, margins=margins, norm=norm, output=output, estimator_name=estimator_name
        ).plot(ax, kind=kind, **kwargs)

    def plot(self, ax: Any = None, *, kind: str = "distribution", **kwargs: Any) -> Self:
        """Draw the norms, on a logarithmic axis where all of them are positive.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; None makes a new figure.
        kind : {"distribution", "margin"}, default="distribution"
            "distribution" draws a box for each class, "margin" the norm over the margin: left
            of the line of margin 0 are the samples that are misclassified.
        **kwargs
            Passed to `Axes.boxplot` or `Axes.scatter`.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If the arrays are of different lengths or not finite, margins are missing with
            ``kind="margin"``, or a name is unknown.
        TypeError
            If `ax` is not one Axes.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        check_option("kind", kind, KINDS)
        check_option("output", self.output, FORMULAS)
        check_option("norm", self.norm, FORMULAS[self.output])
        check_axes(ax)
        norms, y, margins = self._checked_arrays(kind)
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots(layout="constrained")
        style = {"label": self.estimator_name, **kwargs}
        if kind == "distribution":
            self._draw_boxes(ax, norms, y, style)
        else:
            self._draw_points(ax, norms, margins, style)
        ax.set_ylabel(f"Norm {FORMULAS[self.output][self.norm]}")
        if (norms > 0).all():
            ax.set_yscale("log")
        ax.set_title(ax.get_title() or self.estimator_name or "")
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _checked_arrays(self, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return norms, y and margins as arrays of one length."""
        norms = _finite("norms", self.norms)
        y = np.full(len(norms), "all samples") if self.y is None else column_or_1d(self.y)
        margins = None if self.margins is None else _finite("margins", self.margins)
        for name, values in (("y", y), ("margins", margins)):
            if values is not None and len(values) != len(norms):
                reject(f"len({name})", len(values), f"{len(norms)}, the number of norms")
        if kind == "margin" and margins is None:
            reject("margins", None, "the margin of each sample with kind='margin'")
        return norms, y, margins

    def _draw_boxes(self, ax: Any, norms: np.ndarray, y: np.ndarray, style: dict[str, Any]) -> None:
        labels, of_sample = np.unique(y, return_inverse=True)
        groups = [norms[of_sample == k] for k in range(len(labels))]
        default = {"tick_labels": [*map(str, labels)], "flierprops": {"marker": "."}}
        self.boxplot_ = ax.boxplot(groups, **{**default, **style})
        ax.set_xlabel("" if self.y is None else "Class")

    def _draw_points(self, ax: Any, norms: np.ndarray, margins: Any, style: dict[str, Any]) -> None:
        default = {"s": 10, "alpha": 0.5}
        self.scatter_ = ax.scatter(margins, norms, **{**default, **style})
        self.line_ = ax.axvline(0, color="black", linewidth=1)
        of = "predicted class" if self.y is None else "true class (misclassified below 0)"
        ax.set_xlabel(f"Margin of the {of}")


def _finite(name: str, values: Any) -> np.ndarray:
    """Return `values` as an array of shape (n_samples,) of finite floats."""
    array = check_number_per_sample(name, values)
    if n_bad := int((~np.isfinite(array)).sum()):
        raise ValueError(f"Got {name} with {n_bad} NaN or infinite, but expected finite numbers.")
    return array


def _final_classifier(estimator: Any, X: Any) -> tuple[RobustClassifier, Any]:
    """Return the classifier that an estimator ends in, and X as that classifier receives it."""
    if isinstance(estimator, RobustClassifier):
        return estimator, X
    if isinstance(estimator, BaseSearchCV):
        check_is_fitted(estimator, "best_estimator_")
        return _final_classifier(estimator.best_estimator_, X)
    if isinstance(estimator, FrozenEstimator):
        return _final_classifier(estimator.estimator, X)
    if isinstance(estimator, Pipeline):
        before = estimator[:-1]
        return _final_classifier(estimator[-1], before.transform(X) if len(before) else X)
    raise TypeError(
        f"Got an estimator of type {type(estimator).__name__}, but expected a fitted classifier "
        "of skjacobian, or a Pipeline, search object or FrozenEstimator that ends in one."
    )


def _margins(classifier: RobustClassifier, X: Any, y: Any) -> np.ndarray:
    """Return the logit of the class y, or of the predicted one, minus the largest other."""
    scores = classifier.decision_function(X)  # of two classes the second logit minus the first
    logits = scores if scores.ndim == 2 else np.stack([0 * scores, scores], axis=1)
    target = logits.argmax(1) if y is None else np.searchsorted(classifier.classes_, np.ravel(y))
    return -margin(torch.from_numpy(logits), torch.from_numpy(target)).numpy()
