"""The views of transformers that map each value by a function: powers, quantiles, imputers."""

from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from scipy import special
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import FunctionTransformer, PowerTransformer, QuantileTransformer
from torch import Tensor, nn

from skjacobian.differentiable._registry import View, as_precise_as, module_of, view_of
from skjacobian.exceptions import NotDifferentiableError

# --- powers -------------------------------------------------------------------------------


class Power(View):
    """The Yeo-Johnson or Box-Cox transform of each feature, in its own dtype.

    Box-Cox is NaN at negative values, for which `transform` raises.

    Parameters
    ----------
    lambdas : array of shape (n_features,)
    is_signed : bool
        Whether it is the Yeo-Johnson transform.
    scale : nn.Module
        What comes after.
    """

    lambdas: Tensor

    def __init__(self, lambdas: np.ndarray, is_signed: bool, scale: nn.Module) -> None:
        super().__init__()
        self.hold(lambdas=lambdas.astype(float))
        self.is_signed = is_signed
        self.scale = scale

    def forward(self, X: Tensor) -> Tensor:
        """Return the transformed `X`."""
        values = as_precise_as(X, self.lambdas)
        transform = _yeo_johnson if self.is_signed else _box_cox
        return self.scale(transform(values, self.lambdas)).to(X.dtype)


def _yeo_johnson(X: Tensor, lam: Tensor) -> Tensor:
    """That of negative values is the mirror image, with 2 - λ."""
    sign = torch.where(X >= 0, 1.0, -1.0).to(X.dtype)
    return sign * _power_of_exp(torch.log1p(sign * X), torch.where(X >= 0, lam, 2 - lam))


def _box_cox(X: Tensor, lam: Tensor) -> Tensor:
    return _power_of_exp(torch.log(X), lam.expand_as(X))


def _power_of_exp(log: Tensor, lam: Tensor) -> Tensor:
    """Return (exp(log)^λ - 1) / λ, which becomes the logarithm as λ goes to 0."""
    is_log = lam.abs() < torch.finfo(lam.dtype).eps
    return torch.where(is_log, log, torch.expm1(lam * log) / torch.where(is_log, 1.0, lam))


@view_of(PowerTransformer, settings=("method", "standardize", "copy"))
def _(transformer: PowerTransformer) -> View:
    scale = module_of(transformer._scaler) if transformer.standardize else nn.Identity()
    return Power(transformer.lambdas_, transformer.method == "yeo-johnson", scale)


# --- quantiles ----------------------------------------------------------------------------


class Quantiles(View):
    """The empirical distribution function, piecewise linear, of each feature.

    On a quantile the gradient is the mean of those on both sides, so that there is one on the
    training samples, all of which are quantiles if they are few. On repeated ones, and at the ends
    of a normal distribution, the function has a step, of which slopes say nothing; there it is the
    slope of the secant between the quantiles on both sides.

    Parameters
    ----------
    quantiles : array of shape (n_quantiles, n_features)
    references : array of shape (n_quantiles,)
        The distribution function at the quantiles.
    is_normal : bool
        Whether the output is spread as a normal distribution.
    """

    # scikit-learn's BOUNDS_THRESHOLD: so near to an end of the range is past it.
    EDGE = 1e-7

    quantiles: Tensor
    references: Tensor
    slopes: Tensor
    secants: Tensor

    def __init__(self, quantiles: np.ndarray, references: np.ndarray, is_normal: bool) -> None:
        super().__init__()
        if len(references) == 1:
            quantiles, references = np.repeat(quantiles, 2, 0), np.repeat(references, 2)
        quantiles = np.ascontiguousarray(quantiles.T, float)
        widths = np.diff(quantiles)
        rises = np.broadcast_to(np.diff(references), widths.shape)
        # Repeated quantiles of scikit-learn may differ by rounding.
        is_wide = widths > 8 * np.spacing(np.abs(quantiles).max(1, keepdims=True))
        slopes = np.divide(rises, widths, out=np.zeros(widths.shape), where=is_wide)
        outputs = np.array(references, float)
        if is_normal:
            outputs = _normal_quantile(torch.from_numpy(outputs), self.EDGE).numpy()
        secants = np.array(
            [_secants(*of, outputs, is_normal) for of in zip(quantiles, is_wide, strict=True)]
        )
        self.hold(quantiles=quantiles, references=references, slopes=slopes, secants=secants)
        self.is_normal = is_normal

    def forward(self, X: Tensor) -> Tensor:
        """Return the quantile of each value, in the dtype of `X`."""
        values = as_precise_as(X, self.quantiles).T.contiguous()
        inside = values.clamp(self.quantiles[:, :1], self.quantiles[:, -1:])
        # They differ on repeated quantiles, where the function has a step.
        share = (self._interpolate(inside, True) + self._interpolate(inside, False)) / 2
        share = self._with_ends(share, values)
        output = _normal_quantile(share, self.EDGE) if self.is_normal else share
        return self._with_secants(output, values).T.to(X.dtype)

    def _with_secants(self, output: Tensor, values: Tensor) -> Tensor:
        """Give the output, where it steps, the gradient of the secant across the step."""
        given = values.detach()
        place = torch.searchsorted(self.quantiles, given, right=True) - 1
        place = place.clamp(min=0)
        secant = self.secants.gather(1, place)
        at_step = (self.quantiles.gather(1, place) == given) & (secant > 0)
        return torch.where(at_step, output.detach() + secant * (values - given), output)

    def _interpolate(self, values: Tensor, from_left: bool) -> Tensor:
        """Follow from the nearest quantile on one side the slope to the next."""
        place = torch.searchsorted(self.quantiles, values.detach(), right=from_left) - 1
        place = place.clamp(0, self.slopes.shape[1] - 1)
        base = place if from_left else place + 1
        step = values - self.quantiles.gather(1, base)
        return self.slopes.gather(1, place) * step + self.references[base]

    def _with_ends(self, share: Tensor, values: Tensor) -> Tensor:
        """Put 0 and 1 at the ends of the range, which repeated quantiles keep them from."""
        edge = self.EDGE if self.is_normal else 0.0
        low, high = self.quantiles[:, :1], self.quantiles[:, -1:]
        top = torch.ones_like(share) if self.is_normal else self.references[-1]
        ends = torch.where(values + edge >= high, top, share)
        ends = torch.where(values - edge <= low, 0.0, ends)
        return share + (ends - share).detach()


def _secants(
    quantiles: np.ndarray, is_wide: np.ndarray, outputs: np.ndarray, at_ends: bool
) -> np.ndarray:
    """Return, where quantiles are repeated, the slope between those before and after.

    0 elsewhere. `is_wide` tells which quantiles differ from the next.
    """
    group = np.concatenate([[0], np.cumsum(is_wide)])
    first = np.searchsorted(group, group)
    last = np.searchsorted(group, group, side="right") - 1
    before, after = np.maximum(first - 1, 0), np.minimum(last + 1, len(group) - 1)
    is_step = last > first
    if at_ends:
        is_step |= (first == 0) | (last == len(group) - 1)
    width = quantiles[after] - quantiles[before]
    rise = outputs[after] - outputs[before]
    return np.divide(rise, width, out=np.zeros(len(group)), where=is_step & (width > 0))


def _normal_quantile(share: Tensor, edge: float) -> Tensor:
    lowest = edge - np.spacing(1)
    return torch.special.ndtri(share.clamp(lowest, 1 - lowest))


@view_of(
    QuantileTransformer,
    settings=(
        *("n_quantiles", "output_distribution", "ignore_implicit_zeros", "subsample"),
        *("random_state", "copy"),
    ),
)
def _(transformer: QuantileTransformer) -> View:
    is_normal = transformer.output_distribution == "normal"
    return Quantiles(transformer.quantiles_, transformer.references_, is_normal)


# --- functions ----------------------------------------------------------------------------


def _clip(
    X: Tensor, a_min: Any = None, a_max: Any = None, *, min: Any = None, max: Any = None
) -> Tensor:
    """Clip as np.clip does, which has two names for each end."""
    low = a_min if min is None else min
    high = a_max if max is None else max
    return X if low is None and high is None else torch.clamp(X, low, high)


# Missing because a gradient of zero tells an attack nothing: sign, floor, rint and their like.
_UFUNCS = {
    **{
        getattr(np, name): getattr(torch, name)
        for name in (
            *("absolute", "negative", "positive", "reciprocal", "sqrt", "square"),
            *("exp", "exp2", "expm1", "log", "log10", "log1p", "log2"),
            *("sin", "cos", "tan", "arcsin", "arccos", "arctan", "deg2rad", "rad2deg"),
            *("sinh", "cosh", "tanh", "arcsinh", "arccosh", "arctanh"),
        )
    },
    np.fabs: torch.absolute,
    special.expit: torch.sigmoid,
    special.logit: torch.logit,
}

# What `func` of a FunctionTransformer is in torch. Teach it a function of yours with
# TORCH_FUNCTIONS[func] = function_of_a_tensor, or = func itself if it takes tensors too; it
# gets the `kw_args`.
TORCH_FUNCTIONS: dict[Callable[..., Any], Callable[..., Tensor]] = {**_UFUNCS, np.clip: _clip}


class Mapped(View):
    """The torch function that stands for a function of arrays.

    Parameters
    ----------
    func : callable
        A key of `TORCH_FUNCTIONS`; it pickles where its torch function may not.
    kw_args : dict
    """

    def __init__(self, func: Callable[..., Any], kw_args: dict[str, Any]) -> None:
        super().__init__()
        self.func = func
        self.kw_args = kw_args

    def forward(self, X: Tensor) -> Tensor:
        """Return what the function does."""
        return TORCH_FUNCTIONS[self.func](X, **self.kw_args)


@view_of(
    FunctionTransformer,
    settings=(
        *("func", "inverse_func", "validate", "accept_sparse", "check_inverse"),
        *("feature_names_out", "kw_args", "inv_kw_args"),
    ),
)
def _(transformer: FunctionTransformer) -> nn.Module:
    func, kw_args = transformer.func, dict(transformer.kw_args or {})
    if func is None:
        return nn.Identity()
    name = getattr(func, "__name__", repr(func))
    if func not in TORCH_FUNCTIONS:
        raise NotDifferentiableError(
            f"Got FunctionTransformer(func={name}), but expected a function that is known in "
            "torch. Teach it with skjacobian.differentiable.TORCH_FUNCTIONS[func] = its torch "
            "version, or = func if it takes tensors too."
        )
    if kw_args and func in _UFUNCS:
        raise NotDifferentiableError(
            f"Got FunctionTransformer(func={name}, kw_args={kw_args!r}), but expected no "
            "kw_args: torch has others."
        )
    return Mapped(func, kw_args)


# --- missing values -----------------------------------------------------------------------


class Fill(View):
    """x ↦ x, or where it is missing the statistic of the feature; and which were missing.

    Parameters
    ----------
    missing : float
        The value that stands for a missing one; may be NaN.
    statistics : array of shape (n_features,)
        NaN leaves out the feature.
    indicated : array of int
        The features whose indicator of missing values is appended.
    """

    statistics: Tensor
    kept: Tensor
    indicated: Tensor

    def __init__(self, missing: float, statistics: np.ndarray, indicated: np.ndarray) -> None:
        super().__init__()
        kept = np.flatnonzero(~np.isnan(statistics))
        self.hold(statistics=statistics[kept], kept=kept, indicated=indicated)
        self.missing = missing

    def forward(self, X: Tensor) -> Tensor:
        """Return `X` without missing values, in its own dtype."""
        is_missing = X.isnan() if np.isnan(self.missing) else X.eq(self.missing)
        kept, indicated = self.kept.to(X.device), self.indicated.to(X.device)
        filled = torch.where(is_missing[:, kept], self.statistics.to(X), X[:, kept])
        return torch.cat([filled, is_missing[:, indicated].to(X.dtype)], dim=1)


@view_of(
    SimpleImputer,
    settings=(
        *("missing_values", "strategy", "fill_value", "copy", "add_indicator"),
        "keep_empty_features",
    ),
)
def _(imputer: SimpleImputer) -> View:
    if not isinstance(imputer.missing_values, Real):
        raise NotDifferentiableError(
            f"Got SimpleImputer(missing_values={imputer.missing_values!r}), but expected a "
            "number or NaN."
        )
    try:
        statistics = imputer.statistics_.astype(float)
    except ValueError as error:
        raise NotDifferentiableError(
            f"Got SimpleImputer whose statistics are {imputer.statistics_!r}, but expected numbers."
        ) from error
    indicated = imputer.indicator_.features_ if imputer.add_indicator else np.zeros(0, int)
    return Fill(float(imputer.missing_values), statistics, indicated.astype(np.int64))
