"""Drawing what an attack does to images."""

import math
import operator
from dataclasses import KW_ONLY, dataclass
from typing import Any, Self

import numpy as np
from sklearn.utils._optional_dependencies import check_matplotlib_support

from skjacobian._under_attack import UnderAttack
from skjacobian._validation import check_count, check_non_negative, reject
from skjacobian.attacks import Attack
from skjacobian.attacks._named import make_attack
from skjacobian.constraints import FeatureConstraints
from skjacobian.threat_model import resolve_bounds

ROWS = ("clean", "perturbation", "adversarial")

# Fewer flat features are those of a table rather than of a square image.
SMALLEST_SIDE = 8


@dataclass(eq=False, repr=False)
class AdversarialExamplesDisplay:
    """Plot of images, what an attack adds to them, and the sums; a column for each.

    `plot_adversarial_examples` makes it.

    Parameters
    ----------
    X, X_adv : array of shape (n_samples, *features)
        Clean and perturbed samples.
    y : array of shape (n_samples,)
        True labels.
    y_clean, y_adv : array of shape (n_samples,)
        Predicted labels of both.
    image_shape : tuple of int, optional
        (H, W), (1, H, W) or (3, H, W). None takes that of the features, or a square for flat
        ones of 64 pixels or more: fewer are taken for a table, which is no image.
    limits : (float, float), optional
        Values that are drawn black and white. None takes the least and the largest drawn.

    Attributes
    ----------
    images_ : list of list of matplotlib AxesImage
        By row (clean, perturbation, adversarial) and column.
    axes_ : array of matplotlib Axes of shape (3, n_samples)
    figure_ : matplotlib Figure

    Examples
    --------
    >>> import numpy as np
    >>> from skjacobian.adversarial_examples import AdversarialExamplesDisplay
    >>> X = np.array([[[0.0, 1.0], [0.5, 1.0]]])
    >>> display = AdversarialExamplesDisplay(X, X + 0.1, y=["a"], y_clean=["a"], y_adv=["b"])
    >>> display.plot().axes_.shape
    (3, 1)
    """

    X: Any
    X_adv: Any
    _: KW_ONLY
    y: Any
    y_clean: Any
    y_adv: Any
    image_shape: tuple[int, ...] | None = None
    limits: tuple[float, float] | None = None

    def plot(self, axes: Any = None) -> Self:
        """Draw the images.

        All images share one grey scale. The perturbations share a scale of their own, symmetric
        about 0, which is white (grey in colour images); its ends are written beside the row.

        Parameters
        ----------
        axes : array of matplotlib Axes of shape (3, n_samples), optional
            Where to draw; None makes a new figure.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If the samples are no images, or `axes` has another shape.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        X, X_adv = np.asarray(self.X, dtype=float), np.asarray(self.X_adv, dtype=float)
        shape = _image_shape(X.shape[1:], self.image_shape)
        X, X_adv = X.reshape(-1, *shape), X_adv.reshape(-1, *shape)
        axes = self._axes(axes, len(X))
        low, high = self.limits or (min(X.min(), X_adv.min()), max(X.max(), X_adv.max()))
        reach = float(np.abs(X_adv - X).max()) or 1.0
        self.images_ = [
            _show(axes[0], X, "gray", low, high),
            _show(axes[1], X_adv - X, "RdBu_r", -reach, reach),
            _show(axes[2], X_adv, "gray", low, high),
        ]
        labels = (ROWS[0], f"{ROWS[1]}\n(-{reach:.3g} to {reach:.3g})", ROWS[2])
        for ax, label in zip(axes[:, 0], labels, strict=True):
            ax.set_ylabel(label)
        for k, label in enumerate(self.y):
            axes[0, k].set_title(f"true: {label}\npredicted: {self.y_clean[k]}", fontsize="small")
            axes[2, k].set_title(f"predicted: {self.y_adv[k]}", fontsize="small")
        self.axes_, self.figure_ = axes, axes[0, 0].figure
        return self

    def _axes(self, axes: Any, n_samples: int) -> np.ndarray:
        if axes is None:
            import matplotlib.pyplot as plt

            size = (1.5 * n_samples + 0.5, 5.2)
            return plt.subplots(3, n_samples, squeeze=False, layout="constrained", figsize=size)[1]
        axes = np.asarray(axes)
        if axes.shape == (3,):
            axes = axes[:, np.newaxis]
        if axes.shape != (3, n_samples):
            raise ValueError(
                f"Got axes of shape {axes.shape}, but expected (3, {n_samples}), a column for "
                "each sample."
            )
        return axes


def plot_adversarial_examples(
    estimator: Any,
    X: Any,
    y: Any,
    *,
    norm: str = "linf",
    eps: float = 0.1,
    attack: str | Attack = "pgd",
    feature_scale: Any = None,
    bounds: Any = None,
    mutable: Any = None,
    constraints: FeatureConstraints | None = None,
    n_samples: int = 5,
    image_shape: tuple[int, ...] | None = None,
    axes: Any = None,
    random_state: Any = 0,
) -> AdversarialExamplesDisplay:
    """Attack images, and draw them clean, what was added, and the sum.

    Parameters
    ----------
    estimator : fitted classifier
        Anything that `RobustScorer` can attack.
    X : array-like of shape (n_samples, *features)
        Images, flat or not, in the units that the estimator receives.
    y : array-like of shape (n_samples,)
        True labels.
    norm, eps, attack, feature_scale, bounds, mutable, constraints
        As in `RobustScorer`; one radius. Finite `bounds` are drawn black and white.
    n_samples : int, default=5
        How many to draw: the first that are classified right.
    image_shape : tuple of int, optional
        (H, W), (1, H, W) or (3, H, W). None takes that of the features, or a square for flat
        ones of 64 pixels or more: fewer are taken for a table, which is no image.
    axes : array of matplotlib Axes of shape (3, n_samples), optional
        Where to draw; None makes a new figure.
    random_state : int, RandomState instance or None, default=0
        Seed of the random starts.

    Returns
    -------
    AdversarialExamplesDisplay
        With `X`, `X_adv`, `y`, `y_adv`, `figure_` and `axes_`.

    Raises
    ------
    ValueError
        For parameters, samples or labels that make no sense or do not go together, and for clean
        samples outside `bounds` or `constraints`; if X holds no images, or none of them is
        classified right.
    TypeError
        If `estimator` is no classifier: without `predict` or `classes_`.
    NotDifferentiableError
        If it has no torch view and the attack needs gradients, as "pgd" does.

    Warns
    -----
    AttackWarning
        As `RobustScorer` does of gradients and of columns that cannot change.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skjacobian import JacobianRegularizedClassifier, plot_adversarial_examples
    >>> X, y = load_digits(return_X_y=True)
    >>> model = JacobianRegularizedClassifier(max_epochs=5, random_state=0).fit(X, y)
    >>> display = plot_adversarial_examples(model, X, y, eps=3, bounds=(0, 16), n_samples=4)
    >>> display.axes_.shape
    (3, 4)
    >>> bool(abs(display.X_adv - display.X).max() <= 3)
    True
    """
    check_matplotlib_support("plot_adversarial_examples")
    n_samples = check_count("n_samples", n_samples)
    check_non_negative("eps", eps)
    attack = make_attack(attack, "plot_adversarial_examples")
    subject = UnderAttack(estimator, X, y, needs=attack.needs, random_state=random_state)
    image_shape = _image_shape(tuple(subject.X_tensor.shape[1:]), image_shape)
    attack = subject.arm(
        attack,
        norm=norm,
        eps=eps,
        feature_scale=feature_scale,
        bounds=bounds,
        mutable=mutable,
        constraints=constraints,
    )
    chosen = np.flatnonzero(subject.right)[:n_samples]
    if len(chosen) == 0:
        raise ValueError(
            "Got an estimator that is wrong about every sample of X, but expected some that an "
            "attack could change."
        )
    perturbed = subject.perturb(attack, chosen)
    limits = None
    resolved = resolve_bounds(bounds, subject.X_tensor)
    if resolved is not None:
        low, high = float(resolved[0].min()), float(resolved[1].max())
        limits = (low, high) if math.isfinite(high - low) else None
    return AdversarialExamplesDisplay(
        subject.X_tensor[chosen].numpy(),
        perturbed.found.X_adv.numpy(),
        y=subject.y[chosen],
        y_clean=subject.y[chosen],
        y_adv=np.asarray(subject.estimator.predict(perturbed.X_adv)),
        image_shape=image_shape,
        limits=limits,
    ).plot(axes)


def _show(row: Any, images: np.ndarray, cmap: str, low: float, high: float) -> list[Any]:
    """Draw images of shape (channels, H, W) without ticks, one on each axes of a row."""
    if images.shape[1] == 1:
        pixels, scale = images[:, 0], {"cmap": cmap, "vmin": low, "vmax": high}
    else:
        pixels = np.clip((images.transpose(0, 2, 3, 1) - low) / ((high - low) or 1.0), 0, 1)
        scale = {}
    for ax in row:
        ax.set(xticks=[], yticks=[])
    return [ax.imshow(image, **scale) for ax, image in zip(row, pixels, strict=True)]


def _image_shape(features: tuple[int, ...], image_shape: Any) -> tuple[int, ...]:
    """Return the shape (channels, H, W) of an image with features of this shape."""
    n_pixels = math.prod(features)
    expected = "(H, W), (1, H, W) or (3, H, W)"
    if image_shape is not None:
        try:
            shape = tuple(map(operator.index, image_shape))
        except TypeError:  # no sequence of integers
            shape = ()
        if not _is_image(shape) or min(shape) < 1 or math.prod(shape) != n_pixels:
            reject("image_shape", image_shape, f"{expected} of the {n_pixels} features")
    elif _is_image(features):
        shape = features
    else:
        side = math.isqrt(n_pixels)
        if len(features) != 1 or side**2 != n_pixels or side < SMALLEST_SIDE:
            raise ValueError(
                f"Got X with features of shape {features}, but expected images: {expected}, or a "
                f"square number of pixels, {SMALLEST_SIDE**2} at least. Set image_shape for other "
                "flat images. Of tables, evaluate_robustness(...).X_adv has the samples."
            )
        shape = (side, side)
    return shape if len(shape) == 3 else (1, *shape)


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))
