"""Where a model is defined: logarithms and roots of features end the range of these."""

from collections.abc import Callable

import torch
from torch import Tensor

from skjacobian.validity import without_missing

# Tells of points of shape (n_samples, n_features) at which the model is defined.
IsDefined = Callable[[Tensor], Tensor]

# How many features are looked at in one call of the model.
CHUNK = 256
# How far out is looked at most, in units of the largest value of a feature.
FARTHEST = 1e4
# Halvings of that, which leave a hundred-thousandth of a value, and far less at usual radii.
N_HALVINGS = 30
# A pole itself has no gradient: of the way to it so much is left.
MARGIN = 1e-6


def domain(
    is_defined: IsDefined, X: Tensor, reach: Tensor, bounds: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor] | None:
    """Return the range of each feature in which a model is defined; None if nothing ends it.

    Each feature is varied alone, from the sample that has its least (largest) value: the
    ranges of logarithms, roots and powers do not depend on the other features.

    Parameters
    ----------
    is_defined : callable
    X : Tensor of shape (n_samples, n_features)
        Samples, at which the model is defined.
    reach : Tensor of shape (n_features,)
        How far from the samples is asked about.
    bounds : pair of Tensor or None
        Beyond which is not asked.

    Examples
    --------
    >>> import torch
    >>> X = torch.tensor([[1.0, 5.0], [2.0, 6.0]])
    >>> reach = torch.full((2,), 3.0)
    >>> low, high = domain(lambda X: ~X.log().isnan().any(1), X, reach, None)
    >>> [f"{value:.0e}" for value in low.tolist()], high.tolist()
    (['1e-06', '-inf'], [inf, inf])
    """
    if X.ndim != 2 or X.numel() == 0:
        return None
    upward = downward = X
    missing = without_missing(X)[1]
    if missing is not None:
        upward, downward = (X.masked_fill(missing, side) for side in (torch.inf, -torch.inf))
    least, largest = upward.amin(0).double(), downward.amax(0).double()
    if missing is not None:
        # Where no sample has a value there is nothing to start from, and nothing changes.
        absent = missing.all(0)
        least, largest, reach = (v.masked_fill(absent, 0.0) for v in (least, largest, reach))
    size = torch.maximum(least.abs(), largest.abs())
    reach = reach.minimum(FARTHEST * size.where(size > 0, 1.0))
    ends = [least - reach, largest + reach]
    if bounds is not None:
        ends = [
            least.minimum(ends[0].maximum(bounds[0])),
            largest.maximum(ends[1].minimum(bounds[1])),
        ]
    if bool(is_defined(torch.stack(ends)).all()):
        return None
    rows = (upward.argmin(0), downward.argmax(0))  # the samples of these values
    limits = [torch.full_like(least, -torch.inf), torch.full_like(least, torch.inf)]
    for limit, start, end, row in zip(limits, (least, largest), ends, rows, strict=True):
        for features in torch.split(torch.arange(X.shape[1]), CHUNK):
            samples = X[row[features]].double()
            at_end = _defined_at(is_defined, samples, features, end[features])
            if len(ended := features[~at_end]):
                limit[ended] = _last_defined(
                    is_defined, samples[~at_end], ended, start[ended], end[ended]
                )
    low, high = limits
    return None if bool((low.isinf() & high.isinf()).all()) else (low, high)


def _defined_at(is_defined: IsDefined, X: Tensor, features: Tensor, values: Tensor) -> Tensor:
    """Tell of each row whether the model is defined with a value for one of its features."""
    changed = X.clone()
    changed[torch.arange(len(X)), features] = values
    return is_defined(changed)


def _last_defined(
    is_defined: IsDefined, X: Tensor, features: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """Return by bisection, less a margin, how far from `start` the model is defined."""
    inside, outside = start, end
    for _ in range(N_HALVINGS):
        middle = (inside + outside) / 2
        defined = _defined_at(is_defined, X, features, middle)
        inside, outside = middle.where(defined, inside), outside.where(defined, middle)
    return inside + MARGIN * (start - inside)
