"""The views of transformers that make more features of X: polynomials and splines."""

from collections.abc import Iterator
from itertools import combinations, combinations_with_replacement
from math import factorial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.preprocessing import PolynomialFeatures, SplineTransformer
from torch import Tensor

from skjacobian.differentiable._registry import View, as_precise_as, view_of
from skjacobian.exceptions import NotDifferentiableError

# --- polynomials --------------------------------------------------------------------------


class Monomials(View):
    """The products of features up to a degree, in the dtype of `X`.

    Each is one of the degree below (`parent`) times a feature (`factor`).

    Parameters
    ----------
    n_features : int
    degrees : tuple of int
        The lowest and the highest.
    interaction_only : bool
        Whether a product has a feature only once.
    include_bias : bool
        Whether the constant 1 comes first.
    """

    def __init__(
        self, n_features: int, degrees: tuple[int, int], interaction_only: bool, include_bias: bool
    ) -> None:
        super().__init__()
        self.lowest, self.highest = degrees
        self.include_bias = include_bias
        levels = _products(n_features, self.highest, interaction_only)
        for degree, (parent, factor) in enumerate(levels, start=1):
            self.hold(**{f"parent{degree}": parent, f"factor{degree}": factor})

    def forward(self, X: Tensor) -> Tensor:
        """Return the products, those of lower degree first."""
        level = X.new_ones(len(X), 1)
        levels = [level] if self.include_bias else []
        for degree in range(1, self.highest + 1):
            parent = self.get_buffer(f"parent{degree}").to(X.device)
            factor = self.get_buffer(f"factor{degree}").to(X.device)
            level = level[:, parent] * X[:, factor]
            if degree >= self.lowest:
                levels.append(level)
        return torch.cat(levels, dim=1)


def _products(
    n_features: int, highest: int, interaction_only: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield of each degree which product of the degree below to multiply by which feature."""
    combine = combinations if interaction_only else combinations_with_replacement
    place: dict[tuple[int, ...], int] = {(): 0}
    for degree in range(1, highest + 1):
        products = list(combine(range(n_features), degree))
        parents = [place[product[:-1]] for product in products]
        yield np.array(parents, np.int64), np.array([last for *_, last in products], np.int64)
        place = {product: i for i, product in enumerate(products)}


@view_of(PolynomialFeatures, settings=("degree", "interaction_only", "include_bias", "order"))
def _(features: PolynomialFeatures) -> View:
    degree: Any = features.degree
    return Monomials(
        features.n_features_in_,
        degrees=(0, int(degree)) if isinstance(degree, Integral) else degree,
        interaction_only=features.interaction_only,
        include_bias=features.include_bias,
    )


# --- splines ------------------------------------------------------------------------------


class Splines(View):
    """The B-splines of each feature, in the dtype of `X`.

    With extrapolation="error" they are NaN past the knots, for which `transform` raises.

    Parameters
    ----------
    transformer : fitted SplineTransformer
    """

    knots: Tensor
    coefficients: Tensor
    edge_slopes: Tensor

    def __init__(self, transformer: SplineTransformer) -> None:
        super().__init__()
        splines, degree = transformer.bsplines_, transformer.degree
        knots = np.array([spline.t[degree : len(spline.t) - degree] for spline in splines])
        self.hold(
            knots=knots,
            coefficients=_taylor_coefficients(splines, knots, degree),
            edge_slopes=np.array(
                [spline(t[[0, -1]], nu=1) for spline, t in zip(splines, knots, strict=True)]
            ),
        )
        self.extrapolation = transformer.extrapolation
        self.zeros_missing = getattr(transformer, "handle_missing", "error") == "zeros"
        self.n_kept = self.coefficients.shape[-1] - (not transformer.include_bias)

    def forward(self, X: Tensor) -> Tensor:
        """Return the splines, those of the first feature first."""
        values = as_precise_as(X, self.knots)
        is_missing = values.isnan()
        # No NaN may reach a gradient, not even one that is multiplied by zero.
        values = torch.where(is_missing, self.knots[:, 0], values)
        splines = self._extrapolated(values)
        filler = 0.0 if self.zeros_missing else torch.nan
        splines = torch.where(is_missing[..., None], filler, splines)
        return splines[..., : self.n_kept].flatten(1).to(X.dtype)

    def _extrapolated(self, X: Tensor) -> Tensor:
        """Return the splines of shape (n_samples, n_features, n_splines), past the knots too."""
        low, high = self.knots[:, 0], self.knots[:, -1]
        if self.extrapolation == "continue":
            return self._piecewise(X)
        if self.extrapolation == "periodic":
            # scikit-learn puts a feature of no range at 0.
            period = (high - low).where(high > low, 1.0)
            return self._piecewise(torch.where(high > low, low + (X - low) % period, 0.0))
        inside = X.clamp(low, high)
        splines = self._piecewise(inside)
        if self.extrapolation == "linear":
            below, above = self.edge_slopes[:, 0], self.edge_slopes[:, 1]
            slopes = torch.where((low > X)[..., None], below, above)
            return splines + (X - inside)[..., None] * slopes
        if self.extrapolation == "error":
            return torch.where((inside != X)[..., None], torch.nan, splines)
        return splines

    def _piecewise(self, X: Tensor) -> Tensor:
        """Evaluate the polynomials of the interval of each value; at the ends the nearest."""
        piece = torch.searchsorted(self.knots, X.detach().T.contiguous(), right=True).T - 1
        piece = piece.clamp(0, self.knots.shape[1] - 2)
        feature = torch.arange(X.shape[1], device=X.device)
        step = (X - self.knots[feature, piece])[..., None]
        # Horner's scheme, from the highest power on.
        splines = self.coefficients[0][feature, piece]
        for coefficient in self.coefficients[1:]:
            splines = splines * step + coefficient[feature, piece]
        return splines


def _taylor_coefficients(splines: list[Any], knots: np.ndarray, degree: int) -> np.ndarray:
    """Return the polynomials around the left end of each interval, highest power first.

    Of shape (degree + 1, n_features, n_intervals, n_splines).
    """
    return np.array(
        [
            [
                spline(t[:-1], nu=power) / factorial(power)
                for spline, t in zip(splines, knots, strict=True)
            ]
            for power in range(degree, -1, -1)
        ]
    )


@view_of(
    SplineTransformer,
    settings=(
        *("n_knots", "degree", "knots", "extrapolation", "include_bias", "order"),
        *("handle_missing", "sparse_output"),
    ),
)
def _(transformer: SplineTransformer) -> View:
    if transformer.sparse_output:
        raise NotDifferentiableError(
            "Got SplineTransformer(sparse_output=True), but expected sparse_output=False: "
            "torch views are dense."
        )
    if transformer.degree == 0:
        raise NotDifferentiableError(
            "Got SplineTransformer(degree=0), which is constant between knots and has no "
            "gradient, but expected degree >= 1."
        )
    is_linear = transformer.degree == 1 and transformer.extrapolation == "linear"
    if is_linear and transformer.n_features_in_ > 1:
        # Its transform takes other knots for the range of all features but the first.
        raise NotDifferentiableError(
            "Got SplineTransformer(degree=1, extrapolation='linear') of several features, which "
            "scikit-learn extrapolates from within the range, but expected "
            "extrapolation='continue', which goes on linearly as well."
        )
    return Splines(transformer)
