"""Confidence intervals of an accuracy."""

from typing import Any

import numpy as np
from scipy.special import ndtri

from skjacobian._validation import check_number, reject


def effective_n_samples(sample_weight: Any) -> float:
    """Return (Σw)²/Σw², of how many equal samples a weighted mean says as much (Kish).

    Parameters
    ----------
    sample_weight : array-like of shape (n_samples,)
        Not negative, not all zero.

    References
    ----------
    L. Kish, Survey Sampling, Wiley 1965, section 11.7.

    Examples
    --------
    >>> from skjacobian.intervals import effective_n_samples
    >>> effective_n_samples([2.0, 2.0, 0.0])
    2.0
    """
    weight = np.asarray(sample_weight, dtype=float)
    weight = weight / weight.max()  # whose square would be 0 or infinite
    return max(1.0, float(weight.sum() ** 2 / (weight**2).sum()))


def wilson_interval(n_right: Any, n_samples: Any, confidence: float = 0.95) -> tuple[Any, Any]:
    """Return Wilson's score interval of an accuracy.

    The true accuracies p for which the one observed is no further than z standard errors
    √(p(1 - p)/n) away. It stays inside [0, 1], and is no point where all samples are right.

    Parameters
    ----------
    n_right : int or array of int
        How many samples are right.
    n_samples : int or array of int
        Of how many, independently drawn.
    confidence : float, default=0.95
        Between 0 and 1, both excluded.

    Returns
    -------
    low, high : float or array of float
        In the common shape of `n_right` and `n_samples`.

    Raises
    ------
    ValueError
        If `n_samples` is below 1, `n_right` not between 0 and that, or `confidence` not between 0
        and 1.

    References
    ----------
    E. B. Wilson, Probable inference, the law of succession, and statistical inference,
    JASA 22 (1927), 209-212.

    Examples
    --------
    >>> from skjacobian.intervals import wilson_interval
    >>> low, high = wilson_interval(8, 10)
    >>> print(f"{low:.4f} to {high:.4f}")
    0.4902 to 0.9433
    """
    right, n = np.asarray(n_right, dtype=float), np.asarray(n_samples, dtype=float)
    if not (n >= 1).all():
        reject("n_samples", n_samples, "at least 1")
    if not ((right >= 0) & (right <= n)).all():
        reject("n_right", n_right, f"numbers between 0 and n_samples={n_samples!r}")
    confidence = check_number(
        "confidence", confidence, lambda value: 0 < value < 1, "a number between 0 and 1"
    )
    z = ndtri((1 + confidence) / 2)
    center = (right + z**2 / 2) / (n + z**2)
    reach = z / (n + z**2) * np.sqrt(right * (n - right) / n + z**2 / 4)
    # Exactly 0 and 1 at the ends, which rounding may miss.
    low = np.where(right == 0, 0.0, center - reach)[()]
    high = np.where(right == n, 1.0, center + reach)[()]
    return low, high
