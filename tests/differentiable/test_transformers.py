"""The views of scikit-learn's transformers compute what their own transform computes."""

import pickle
from itertools import product

import numpy as np
import pytest
import torch
from scipy import special
from sklearn.datasets import make_classification
from sklearn.decomposition import (
    PCA,
    FactorAnalysis,
    FastICA,
    IncrementalPCA,
    KernelPCA,
    TruncatedSVD,
)
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.kernel_approximation import Nystroem, RBFSampler, SkewedChi2Sampler
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import pairwise_kernels
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    Normalizer,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    SplineTransformer,
    StandardScaler,
)
from sklearn.random_projection import GaussianRandomProjection, SparseRandomProjection
from torch import nn

from skjacobian import JacobianRegularizedClassifier, RobustScorer, robust_accuracy_score
from skjacobian.differentiable import TORCH_FUNCTIONS, as_torch
from skjacobian.differentiable._kernels import kernel_function
from skjacobian.differentiable._projections import transform_view
from skjacobian.exceptions import NotDifferentiableError

X, y = make_classification(60, 6, n_informative=4, n_classes=3, random_state=0)
X = X * [1.0, 0.5, 2.0, 1.0, 3.0, 1.0] + [0.0, 1.0, -2.0, 0.5, 0.0, 4.0]
# A third of the values of one feature is the same, and two thirds of another.
TIED = X.copy()
TIED[::3, 0], TIED[::3, 1], TIED[1::3, 1] = 0.0, X[:, 1].min(), X[:, 1].min()
# Past the range of the training data, on it, and on its ends.
SPREAD = np.concatenate([X.mean(0) + 1.7 * (X - X.mean(0)), X, [X.min(0)], [X.max(0)]])
SMOOTH = X.mean(0) + 0.37 * (X[:4] - X.mean(0))
OUTSIDE = np.stack([X.min(0) - 0.3, X.max(0) + 0.4])
POSITIVE = np.exp(X / 2)


# --- rows and features --------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_normalizer(assert_transformer_view, norm):
    values = np.concatenate([SPREAD, np.zeros((1, 6)), [[0, 0, -3, 0, 0, 0]]])
    assert_transformer_view(Normalizer(norm=norm).fit(X), values, SMOOTH)


@pytest.mark.parametrize("standardize", [True, False])
def test_yeo_johnson(assert_transformer_view, standardize):
    transformer = PowerTransformer(standardize=standardize).fit(X)
    assert_transformer_view(transformer, np.append(SPREAD, [[0.0] * 6], 0), SMOOTH)


@pytest.mark.parametrize("standardize", [True, False])
def test_box_cox(assert_transformer_view, standardize):
    transformer = PowerTransformer(method="box-cox", standardize=standardize).fit(POSITIVE)
    assert_transformer_view(transformer, 3 * POSITIVE, POSITIVE[:4])


@pytest.mark.parametrize("method", ["yeo-johnson", "box-cox"])
@pytest.mark.parametrize("lam", [0.0, 1e-17, 1.0, 2.0, -1.5, 3.5])
def test_powers_of_every_lambda(assert_transformer_view, method, lam):
    transformer = PowerTransformer(method=method, standardize=False).fit(POSITIVE)
    transformer.lambdas_[:] = lam
    sign = 1 if method == "box-cox" else np.where(np.arange(6) % 2, -1, 1)
    assert_transformer_view(transformer, sign * POSITIVE, sign * POSITIVE[:4])


def gradient(view, values):
    values = torch.tensor(values, requires_grad=True)
    (slopes,) = torch.autograd.grad(view(values).sum(), values)
    return slopes.numpy()


def test_the_gradient_of_yeo_johnson_is_finite_where_a_mirrored_branch_would_overflow():
    transformer = PowerTransformer(standardize=False).fit(X)
    transformer.lambdas_[:] = -200.0  # (1 + x)^202 of the branch that is not taken
    slopes = gradient(as_torch(transformer), np.full((1, 6), 1e3))
    assert np.isfinite(slopes).all()
    np.testing.assert_allclose(gradient(as_torch(transformer), np.zeros((1, 6))), 1.0)


@pytest.mark.parametrize("output", ["uniform", "normal"])
@pytest.mark.parametrize("n_quantiles", [1, 2, 7, 60])
@pytest.mark.parametrize("data", [X, TIED], ids=["distinct", "tied"])
def test_quantiles(assert_transformer_view, output, n_quantiles, data):
    transformer = QuantileTransformer(n_quantiles=n_quantiles, output_distribution=output)
    transformer.fit(np.column_stack([data, np.full(60, 3.0)]))
    spread = np.concatenate([SPREAD, data])
    spread = np.column_stack([spread, np.resize([2.0, 3.0, 4.0], len(spread))])
    smooth = np.column_stack([SMOOTH[:2] + 0.01, [1.0, 5.0]])
    assert_transformer_view(transformer, spread.astype(np.float32), smooth)


def test_the_gradient_on_a_quantile_is_the_mean_of_both_sides():
    transformer = QuantileTransformer(n_quantiles=3).fit([[0.0], [1.0], [5.0]])
    slopes = gradient(as_torch(transformer), [[-1.0], [0.5], [1.0], [2.0], [6.0]])
    np.testing.assert_allclose(slopes.ravel(), [0, 0.5, (0.5 + 0.125) / 2, 0.125, 0])


def test_the_gradient_on_repeated_quantiles_is_the_secant_across_the_step():
    data = np.array([[0.0], [1.0], [1.0], [1.0], [5.0]])
    data[2] += np.spacing(1.0)  # as scikit-learn's own rounding leaves them
    transformer = QuantileTransformer(n_quantiles=5).fit(np.sort(data, axis=0))
    slopes = gradient(as_torch(transformer), [[0.5], [1.0], [3.0]])
    np.testing.assert_allclose(slopes.ravel(), [0.25, 1 / 5, 0.25 / 4])


@pytest.mark.parametrize("output", ["uniform", "normal"])
def test_an_attack_sees_the_step_at_values_that_are_frequent(output):
    counts = np.where(np.arange(60) < 40, 0.0, np.arange(60) / 10)[:, None]  # two thirds are 0
    X, y = np.column_stack([counts, np.ones(60)]), np.arange(60) >= 40
    transformer = QuantileTransformer(n_quantiles=30, output_distribution=output)
    model = make_pipeline(transformer, LogisticRegression(C=100)).fit(X, y)
    zeros = X[:40]
    assert model.score(zeros, y[:40]) == 1.0
    assert model.predict([[1e-3, 1.0]])  # the least change makes the quantile 2/3
    for norm in ("linf", "l2", "l1"):
        robust = RobustScorer(norm=norm, eps=1e-2, bounds=(0, np.inf))
        assert robust(model, zeros, y[:40]) == 0.0


def test_training_samples_have_gradients_where_all_are_quantiles():
    transformer = QuantileTransformer(n_quantiles=60).fit(TIED)
    assert (gradient(as_torch(transformer), TIED) > 0).all()


def test_missing_values_stay_missing_in_powers_and_quantiles():
    values = np.array(X)
    values[2, 3] = np.nan
    for transformer in (PowerTransformer(), QuantileTransformer(n_quantiles=9)):
        seen = as_torch(transformer.fit(X))(torch.from_numpy(values))
        np.testing.assert_allclose(seen, transformer.transform(values), atol=1e-10)


# --- functions ----------------------------------------------------------------------------


UNIT = 0.02 + 0.96 * (X - X.min(0)) / np.ptp(X, axis=0)


@pytest.mark.parametrize(
    "func", [f for f in TORCH_FUNCTIONS if f is not np.clip], ids=lambda func: func.__name__
)
def test_functions(assert_transformer_view, func):
    values = UNIT + 1 if func is np.arccosh else UNIT
    assert_transformer_view(FunctionTransformer(func), values, values[:3])


@pytest.mark.parametrize(
    "kw_args",
    [{"a_min": 0, "a_max": 2}, {"a_min": None, "a_max": 2}, {"min": -1}, {"min": 0, "max": 1}],
    ids=str,
)
def test_clipping(assert_transformer_view, kw_args):
    assert_transformer_view(FunctionTransformer(np.clip, kw_args=kw_args), SPREAD, SMOOTH)


def test_no_function_is_the_identity(assert_transformer_view):
    assert_transformer_view(FunctionTransformer(validate=True).fit(X), SPREAD, SMOOTH)


def weighted_square(values, weight=1.0):
    return weight * values**2


def test_a_function_is_taught_with_its_own_arguments(assert_transformer_view, monkeypatch):
    transformer = FunctionTransformer(weighted_square, kw_args={"weight": 3.0})
    with pytest.raises(
        NotDifferentiableError,
        match=r"\(func=weighted_square\), but expected a function .*\.TORCH_FUNCTIONS\[func\]",
    ):
        as_torch(transformer)
    monkeypatch.setitem(TORCH_FUNCTIONS, weighted_square, weighted_square)
    assert_transformer_view(transformer, SPREAD, SMOOTH)


@pytest.mark.parametrize("func", [np.sign, np.floor, np.cbrt], ids=lambda func: func.__name__)
def test_a_function_without_a_useful_gradient_is_named(func):
    with pytest.raises(NotDifferentiableError, match=rf"func={func.__name__}\), but expected"):
        as_torch(FunctionTransformer(func))


def test_arguments_of_a_numpy_ufunc_are_rejected():
    transformer = FunctionTransformer(special.expit, kw_args={"where": True})
    with pytest.raises(NotDifferentiableError, match=r"func=expit, kw_args=\{'where': True\}\)"):
        as_torch(transformer)


# --- missing values -----------------------------------------------------------------------

GAPS = np.where(np.random.default_rng(0).random(X.shape) < 0.2, np.nan, np.round(X, 1))


@pytest.mark.parametrize("strategy", ["mean", "median", "most_frequent", "constant", np.nanmax])
@pytest.mark.parametrize("add_indicator", [False, True])
@pytest.mark.parametrize("missing", [np.nan, -1, 0.1])
def test_imputation(assert_transformer_view, strategy, add_indicator, missing):
    imputer = SimpleImputer(
        strategy=strategy, add_indicator=add_indicator, missing_values=missing, fill_value=2.5
    )
    values = np.where(np.isnan(GAPS), missing, GAPS)
    values[:, 2] = X[:, 2]
    imputer.fit(values)
    view = as_torch(imputer)
    for dtype in (np.float32, np.float64):
        some = values.astype(dtype)
        seen = view(torch.from_numpy(some))
        assert str(seen.dtype) == f"torch.{some.dtype}"
        np.testing.assert_allclose(seen, imputer.transform(some), rtol=1e-7)
    assert_transformer_view(imputer, SPREAD, SMOOTH)
    is_missing = np.isnan(values) | (values == missing)
    np.testing.assert_array_equal(gradient(view, values), ~is_missing)


@pytest.mark.filterwarnings("ignore:Skipping features without any observed values")
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("strategy", ["mean", "constant"])
def test_imputation_of_an_empty_feature(assert_transformer_view, keep, strategy):
    values = np.array(GAPS)
    values[:, 1] = np.nan
    imputer = SimpleImputer(strategy=strategy, keep_empty_features=keep, add_indicator=True)
    assert_transformer_view(imputer.fit(values), values, SMOOTH)


@pytest.mark.parametrize(
    ("imputer", "values", "match"),
    [
        (
            SimpleImputer(missing_values=None, strategy="most_frequent"),
            [[1, None], [2, 3]],
            r"SimpleImputer\(missing_values=None\), but expected a number or NaN",
        ),
        (
            SimpleImputer(strategy="most_frequent"),
            np.array([["a", "b"], ["a", np.nan]], object),
            r"statistics are array\(\['a', 'b'\].*expected numbers",
        ),
    ],
)
def test_imputation_of_what_is_no_number_is_rejected(imputer, values, match):
    imputer.fit(np.array(values, object))
    with pytest.raises(NotDifferentiableError, match=match):
        as_torch(imputer)


# --- polynomials and splines --------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 5, (0, 2), (2, 3), (3, 3)])
@pytest.mark.parametrize("interaction_only", [False, True])
@pytest.mark.parametrize("include_bias", [False, True])
def test_polynomials(assert_transformer_view, degree, interaction_only, include_bias):
    if degree == 0 and not include_bias:
        pytest.skip("scikit-learn rejects it")
    features = PolynomialFeatures(
        degree, interaction_only=interaction_only, include_bias=include_bias, order="F"
    )
    values = np.append(SPREAD[::9, :4], [[0.0, 0.0, 1.0, -1.0]], 0)
    assert_transformer_view(features.fit(X[:, :4]), values, values[-2:])


@pytest.mark.parametrize("extrapolation", ["constant", "linear", "continue", "periodic"])
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("include_bias", [False, True])
def test_splines(assert_transformer_view, extrapolation, degree, include_bias):
    if degree == 1 and extrapolation == "linear":
        pytest.skip("scikit-learn takes the wrong range")
    splines = SplineTransformer(
        n_knots=6, degree=degree, extrapolation=extrapolation, include_bias=include_bias
    )
    splines.fit(np.column_stack([X, np.full(60, 3.0)]))  # of no range is the last
    values = np.column_stack([SPREAD, np.resize([3.0, 2.0, 5.0], len(SPREAD))])
    smooth = np.column_stack([np.append(SMOOTH[:2], OUTSIDE, 0), [2.9, 3.1, 1.0, 5.0]])
    assert_transformer_view(splines, values, smooth)


@pytest.mark.parametrize("extrapolation", ["constant", "linear", "continue", "periodic", "error"])
@pytest.mark.parametrize("knots", ["quantile", np.cumsum(np.ones((5, 6)), 0) - 3])
def test_splines_of_other_knots(assert_transformer_view, extrapolation, knots):
    splines = SplineTransformer(knots=knots, extrapolation=extrapolation).fit(X)
    low, high = np.array([spline.t[[3, -4]] for spline in splines.bsplines_]).T
    inside = low + np.linspace(0.01, 0.99, 9)[:, None] * (high - low)
    values = inside if extrapolation == "error" else np.append(SPREAD, inside, 0)
    assert_transformer_view(splines, values, inside[[1, 6]])


def test_linear_splines_of_one_feature(assert_transformer_view):
    splines = SplineTransformer(degree=1, extrapolation="linear").fit(X[:, :1])
    assert_transformer_view(splines, SPREAD[:, :1], SMOOTH[:, :1])


def test_splines_of_many_equal_values(assert_transformer_view):
    splines = SplineTransformer(knots="quantile").fit(TIED)
    assert_transformer_view(splines, np.concatenate([SPREAD, TIED]), SMOOTH + 0.01)


def test_splines_of_missing_values_are_zero(assert_transformer_view):
    splines = SplineTransformer(handle_missing="zeros").fit(GAPS)
    assert_transformer_view(splines, GAPS, SMOOTH)
    assert (gradient(as_torch(splines), GAPS)[np.isnan(GAPS)] == 0).all()


@pytest.mark.parametrize("extrapolation", ["error", "constant"])
def test_splines_of_what_transform_rejects_are_nan(extrapolation):
    splines = SplineTransformer(extrapolation=extrapolation).fit(X)
    values = SMOOTH[:2].copy()
    values[1, 2] = 1e3 if extrapolation == "error" else np.nan
    with pytest.raises(ValueError, match=r"beyond the limits|contains NaN"):
        splines.transform(values)
    is_nan = as_torch(splines)(torch.from_numpy(values)).isnan().numpy()
    assert np.array_equal(is_nan.reshape(2, 6, -1).all(2), [[False] * 6, np.arange(6) == 2])


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"sparse_output": True}, r"SplineTransformer\(sparse_output=True\), but expected"),
        (
            {"degree": 1, "extrapolation": "linear"},
            r"\(degree=1, extrapolation='linear'\) of several features, .* expected .*'continue'",
        ),
        ({"degree": 0}, r"SplineTransformer\(degree=0\), .* but expected degree >= 1"),
    ],
)
def test_splines_that_have_no_view(params, match):
    with pytest.raises(NotDifferentiableError, match=match):
        as_torch(SplineTransformer(**params).fit(X))


# --- kernels ------------------------------------------------------------------------------

KERNELS = {
    "linear": {},
    "poly": {"gamma": 0.1, "degree": 2, "coef0": 0.5},
    "polynomial": {"degree": 3},
    "rbf": {"gamma": 0.2},
    "sigmoid": {"gamma": 0.05, "coef0": -0.5},
    "cosine": {},
    "laplacian": {},
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shift", [0, 100])
def test_a_kernel_is_that_of_scikit_learn(name, dtype, shift):
    values, Z = (SPREAD + shift).astype(dtype), X + shift
    values[0] = Z[0]
    kernel = pickle.loads(pickle.dumps(kernel_function(name, **KERNELS[name])))
    wanted = pairwise_kernels(values.astype(float), Z, metric=name, **KERNELS[name])
    seen = kernel(torch.from_numpy(values), torch.from_numpy(Z))
    np.testing.assert_allclose(seen, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KERNELS)
def test_the_gradients_of_a_kernel_are_those_of_finite_differences(name):
    values, Z = torch.from_numpy(SMOOTH).requires_grad_(), torch.from_numpy(X[:5])
    kernel = kernel_function(name, **KERNELS[name])
    assert torch.autograd.gradcheck(kernel, (values, Z))
    if name != "laplacian":  # of which torch has no second derivative
        assert torch.autograd.gradgradcheck(kernel, (values, Z))


@pytest.mark.parametrize("name", KERNELS)
def test_the_gradient_of_a_kernel_is_finite_at_its_own_point_and_at_zero(name):
    Z = torch.from_numpy(np.append(X[:3], np.zeros((1, 6)), 0))
    slopes = gradient(lambda values: kernel_function(name)(values, Z), Z.numpy())
    assert np.isfinite(slopes).all()
    if name == "rbf":
        single = gradient(lambda values: kernel_function(name)(values, Z[:1]), X[:1])
        np.testing.assert_array_equal(single, 0)


@pytest.mark.parametrize("name", ["chi2", "precomputed", pairwise_kernels])
def test_an_unknown_kernel_is_named(name):
    with pytest.raises(NotDifferentiableError, match=r"kernel=.*, but expected one of cosine, lap"):
        kernel_function(name)


@pytest.mark.parametrize(
    ("kernel", "n_components"),
    # The kernel "sigmoid" is not positive, and more components raise.
    [*product(["linear", "poly", "rbf", "cosine"], [3, 8, None]), ("sigmoid", 3)],
)
def test_kernel_pca(assert_transformer_view, kernel, n_components):
    pca = KernelPCA(n_components, kernel=kernel, **KERNELS[kernel]).fit(X[:40] / 9)
    assert_transformer_view(pca, SPREAD / 9, SMOOTH / 9)


def test_a_component_of_kernel_pca_of_eigenvalue_zero_is_zero(assert_transformer_view):
    pca = KernelPCA(4).fit(X[:3])
    assert (pca.eigenvalues_ == 0).any()
    assert_transformer_view(pca, SPREAD, SMOOTH)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kernel_params", [None, {"gamma": 0.3, "unknown": 1}])
def test_nystroem(assert_transformer_view, kernel, kernel_params):
    nystroem = Nystroem(
        kernel, n_components=5, random_state=0, kernel_params=kernel_params, **KERNELS[kernel]
    )
    assert_transformer_view(nystroem.fit(X / 3), SPREAD / 3, SMOOTH / 3)


@pytest.mark.parametrize(
    ("transformer", "match"),
    [
        (KernelPCA(kernel="precomputed"), r"kernel='precomputed', but expected one of"),
        (Nystroem("chi2", n_components=3), r"kernel='chi2', but expected one of"),
    ],
    ids=str,
)
def test_a_feature_map_of_an_unknown_kernel_is_rejected(transformer, match):
    with pytest.raises(NotDifferentiableError, match=match):
        as_torch(transformer.fit(POSITIVE @ POSITIVE.T))


@pytest.mark.parametrize("gamma", [0.1, "scale"])
def test_random_fourier_features(assert_transformer_view, gamma):
    sampler = RBFSampler(gamma=gamma, n_components=7, random_state=0).fit(X)
    assert_transformer_view(sampler, SPREAD, SMOOTH)


def test_skewed_chi2_features(assert_transformer_view):
    sampler = SkewedChi2Sampler(skewedness=0.5, n_components=7, random_state=0).fit(POSITIVE)
    assert_transformer_view(sampler, POSITIVE - 0.3, POSITIVE[:3])


# --- linear maps --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transformer",
    [
        TruncatedSVD(3, random_state=0),
        TruncatedSVD(3, algorithm="arpack", random_state=0),
        IncrementalPCA(3, batch_size=20),
        IncrementalPCA(3, whiten=True),
        FactorAnalysis(2),
        FactorAnalysis(2, rotation="varimax", svd_method="lapack"),
        FastICA(3, random_state=0, tol=0.1),
        FastICA(3, random_state=0, tol=0.1, whiten="arbitrary-variance"),
        GaussianRandomProjection(4, random_state=0),
        SparseRandomProjection(4, random_state=0),
        SparseRandomProjection(4, random_state=0, dense_output=True, density=0.5),
    ],
    ids=str,
)
def test_linear_maps(assert_transformer_view, transformer):
    assert_transformer_view(transformer.fit(X), SPREAD, SMOOTH)


def test_independent_components_of_white_data(assert_transformer_view):
    white = PCA(3, whiten=True).fit_transform(X)
    ica = FastICA(whiten=False, random_state=0, tol=0.5).fit(white)
    assert_transformer_view(ica, white, white[:3])


DISCRIMINANTS = [
    LinearDiscriminantAnalysis(),
    LinearDiscriminantAnalysis(n_components=1),
    LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto"),
]


@pytest.mark.parametrize("analysis", DISCRIMINANTS, ids=str)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda analysis: make_pipeline(analysis, StandardScaler()),
        lambda analysis: FeatureUnion([("discriminants", analysis), ("X", "passthrough")]),
        lambda analysis: make_pipeline(make_pipeline(StandardScaler(), analysis), "passthrough"),
        lambda analysis: FeatureUnion([("search", GridSearchCV(analysis, {"tol": [1e-4]}))]),
        lambda analysis: FeatureUnion([("frozen", FrozenEstimator(analysis.fit(X, y)))]),
    ],
    ids=["pipeline", "union", "nested pipeline", "search", "frozen"],
)
def test_discriminants_inside_are_a_transformer(assert_transformer_view, analysis, wrap):
    assert_transformer_view(wrap(analysis).fit(X, y), SPREAD, SMOOTH)


class OwnDiscriminants(LinearDiscriminantAnalysis):
    def transform(self, X):
        return 2 * super().transform(X)


@pytest.mark.parametrize(
    ("estimator", "match"),
    [
        (OwnDiscriminants(), r"OwnDiscriminants, which has its own transform, but expected"),
        (LinearDiscriminantAnalysis(solver="lsqr"), r"\(solver='lsqr'\), which has no transform"),
        (
            VotingClassifier([("model", LogisticRegression())], voting="hard"),
            r"classifier of type VotingClassifier as a transformer",
        ),
    ],
)
def test_a_transform_of_a_classifier_that_has_no_view(estimator, match):
    with pytest.raises(NotDifferentiableError, match=match):
        transform_view(estimator.fit(X, y))


def test_discriminants_inside_must_be_fitted():
    with pytest.raises(NotFittedError):
        transform_view(LinearDiscriminantAnalysis())


# --- unions and pipelines -----------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, {"powers": 2.0, "X": -0.5}, {"powers": None, "X": 3}])
def test_a_union(assert_transformer_view, weights):
    union = FeatureUnion(
        [
            ("powers", PowerTransformer()),
            ("nothing", "drop"),
            ("X", "passthrough"),
            ("deep", make_pipeline(PCA(2), FeatureUnion([("squares", PolynomialFeatures())]))),
        ],
        transformer_weights=weights,
    )
    assert_transformer_view(union.fit(X), SPREAD, SMOOTH)


def test_a_union_of_nothing(assert_transformer_view):
    union = FeatureUnion([("nothing", "drop")]).fit(X)
    assert as_torch(union)(torch.from_numpy(X)).shape == (60, 0)


def test_a_part_of_a_union_that_has_no_view_is_named():
    union = FeatureUnion([("x", "passthrough"), ("f", FunctionTransformer(np.sign))]).fit(X)
    model = Pipeline([("all", union), ("scale", StandardScaler())]).fit(X)
    with pytest.raises(
        NotDifferentiableError,
        match=r"In step 'all' of the pipeline: In 'f' of the feature union: .*func=sign",
    ):
        as_torch(model)


PREPROCESSING = {
    "quantiles": QuantileTransformer(n_quantiles=60, output_distribution="normal"),
    "powers and products": make_pipeline(PowerTransformer(), PolynomialFeatures()),
    "splines": SplineTransformer(extrapolation="linear"),
    "kernel features": make_pipeline(StandardScaler(), Nystroem(n_components=20, random_state=0)),
    "union": FeatureUnion([("pca", PCA(2)), ("discriminants", LinearDiscriminantAnalysis())]),
    "imputer": make_pipeline(SimpleImputer(), FunctionTransformer(np.arctan), Normalizer()),
}


@pytest.mark.parametrize("name", PREPROCESSING)
def test_a_classifier_behind_transformers_is_differentiable(assert_classifier_view, name):
    network = JacobianRegularizedClassifier(
        module__hidden_units=(8,),
        module__activation="tanh",
        max_epochs=3,
        random_state=0,
        dtype="float64",
    )
    model = make_pipeline(PREPROCESSING[name], StandardScaler(), network).fit(X, y)
    assert_classifier_view(model, SPREAD, SMOOTH)
    assert 0 <= robust_accuracy_score(model, X[:10], y[:10], eps=0.1, random_state=0) <= 1


@pytest.mark.parametrize(
    "unfitted",
    [
        PowerTransformer(),
        QuantileTransformer(),
        SimpleImputer(),
        PolynomialFeatures(),
        SplineTransformer(),
        KernelPCA(),
        Nystroem(),
        RBFSampler(),
        TruncatedSVD(),
        FeatureUnion([("scale", StandardScaler())]),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_an_unfitted_transformer_is_rejected(unfitted):
    with pytest.raises(NotFittedError):
        as_torch(unfitted)


@pytest.mark.parametrize(
    "transformer",
    [
        Normalizer(),
        PowerTransformer(),
        QuantileTransformer(n_quantiles=9),
        SimpleImputer(),
        PolynomialFeatures(),
        SplineTransformer(),
        FunctionTransformer(np.arctan),
    ],
    ids=lambda transformer: type(transformer).__name__,
)
def test_a_view_keeps_the_dtype_as_transform_does(transformer):
    values = X.astype(np.float32)
    wanted = transformer.fit(X).transform(values)
    seen = as_torch(transformer)(torch.from_numpy(values))
    assert str(seen.dtype) == f"torch.{wanted.dtype}"
    assert isinstance(as_torch(transformer), nn.Module)


@pytest.mark.parametrize(
    "transformer",
    [
        PCA(3),
        TruncatedSVD(3, random_state=0),
        PowerTransformer(),
        QuantileTransformer(n_quantiles=9, output_distribution="normal"),
        SplineTransformer(extrapolation="linear"),
        KernelPCA(3, kernel="rbf"),
        Nystroem("cosine", n_components=5, random_state=0),
        Nystroem("laplacian", n_components=5, random_state=0),
        RBFSampler(n_components=5, random_state=0),
    ],
    ids=str,
)
def test_what_was_fitted_on_float32_takes_both_precisions(transformer):
    transformer.fit(X.astype(np.float32))
    for dtype in (np.float32, np.float64):
        values = SPREAD.astype(dtype)
        seen = as_torch(transformer)(torch.from_numpy(values))
        np.testing.assert_allclose(seen, transformer.transform(values), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_takes_tensors_of_two_types(name):
    values, Z = torch.from_numpy(X[:5]).float(), torch.from_numpy(X[5:9])
    kernel = kernel_function(name)
    wanted = kernel(values.double(), Z.float().double())
    torch.testing.assert_close(kernel(values.double(), Z.float()), wanted, rtol=1e-12, atol=1e-12)
    assert kernel(values, Z).dtype == torch.float64


@pytest.mark.parametrize(
    "transformer",
    [
        Normalizer("l1"),
        PowerTransformer(),
        QuantileTransformer(n_quantiles=60, output_distribution="normal"),
        PolynomialFeatures(4),
        SplineTransformer(extrapolation="linear"),
        SplineTransformer(extrapolation="continue"),
        SplineTransformer(extrapolation="periodic"),
        Nystroem(n_components=9, random_state=0),
        FactorAnalysis(2),
    ],
    ids=str,
)
def test_a_view_is_exact_far_past_the_training_range(assert_transformer_view, transformer):
    far = np.random.default_rng(0).normal(X.mean(0), 100 * X.std(0), size=(200, 6))
    assert_transformer_view(transformer.fit(X), far, SMOOTH)
