"""Attacks stay where a model is defined, and are as strong there as inside bounds that say so."""

import warnings
from itertools import cycle

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import logit
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import make_column_transformer
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.kernel_approximation import SkewedChi2Sampler
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import FixedThresholdClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    PolynomialFeatures,
    PowerTransformer,
    StandardScaler,
)
from torch import nn

from skjacobian import (
    AdversarialClassifier,
    FeatureConstraints,
    RobustScorer,
    evaluate_robustness,
    robustness_curve,
)
from skjacobian._domain import domain
from skjacobian.attacks import APGD, PGD, Square
from skjacobian.exceptions import AttackWarning
from tests.slow import others_slow

pytestmark = pytest.mark.usefixtures("short_stages")

RNG = np.random.default_rng(0)
X = np.c_[RNG.exponential(1, (160, 2)), RNG.gamma(2, 1, (160, 2))]
y = (np.log(X).sum(1) > np.median(np.log(X).sum(1))).astype(int)
EPS = {"linf": 0.5, "l2": 0.8, "l1": 1.0}


def fitted(*steps):
    return make_pipeline(*steps, StandardScaler(), LogisticRegression()).fit(X, y)


# --- the range --------------------------------------------------------------------------------


def defined(function):
    return lambda X: ~function(X).isnan().any(1)


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [
        (torch.log, 0.0, np.inf),
        (torch.sqrt, 0.0, np.inf),
        (torch.log1p, -1.0, np.inf),
        (lambda X: (3 - X).log(), -np.inf, 3.0),
        (torch.arcsin, -1.0, 1.0),
        (lambda X: ((X + 2) / 3).logit(), -2.0, 1.0),
    ],
)
def test_the_range_ends_where_the_function_does(function, low, high, generator):
    samples = 0.8 * torch.rand(20, 3, generator=generator, dtype=torch.float64)
    samples[:, 1] = 0.5
    found = domain(defined(function), samples, torch.full((3,), 5.0), None)
    for side, limit, extreme in zip(
        found, (low, high), (samples.amin(0), samples.amax(0)), strict=True
    ):
        if np.isinf(limit):
            assert side.tolist() == [limit] * 3
        else:
            inward = torch.sign(extreme - limit)
            assert ((side - limit) * inward > 0).all()
            torch.testing.assert_close(side, torch.full_like(side, limit), atol=1e-5, rtol=0)


def test_only_the_features_that_end_somewhere_are_narrowed_and_only_where_it_matters():
    samples = torch.tensor([[1.0, 1.0], [3.0, -2.0]], dtype=torch.float64)
    is_defined = defined(lambda X: X[:, :1].log())
    low, high = domain(is_defined, samples, torch.full((2,), 2.0), None)
    assert 0 < low[0] < 1e-5
    assert low[1] == -torch.inf
    assert high.tolist() == [torch.inf, torch.inf]
    assert domain(is_defined, samples, torch.tensor([0.5, 2.0]), None) is None
    bounds = (torch.tensor(0.5), torch.tensor(torch.inf))
    assert domain(is_defined, samples[:1], torch.full((2,), 2.0), bounds) is None


# --- attacks ----------------------------------------------------------------------------------

STEPS = {
    "log": FunctionTransformer(np.log),
    "sqrt": FunctionTransformer(np.sqrt),
    "box-cox": PowerTransformer("box-cox"),
    "skewed chi2": SkewedChi2Sampler(skewedness=0.01, random_state=0),
    "log of scaled": make_pipeline(StandardScaler(with_mean=False), FunctionTransformer(np.log)),
    "log of one": make_column_transformer(
        (FunctionTransformer(np.log), [0]), remainder="passthrough"
    ),
    "logit": FunctionTransformer(logit),
}


@pytest.mark.parametrize(("step", "norm"), list(zip(STEPS, cycle(EPS), strict=False)))
def test_attacks_are_as_strong_as_with_bounds_that_say_where(step, norm):
    scale = 0.04 if step == "logit" else 1.0
    samples = X * scale
    model = make_pipeline(STEPS[step], StandardScaler(), LogisticRegression()).fit(samples, y)
    eps = EPS[norm] * scale
    bounds = (1e-6 * scale, 1 - 1e-6 if step == "logit" else np.inf)
    kwargs = {"norm": norm, "eps": eps}
    unsaid = RobustScorer(**kwargs)(model, samples, y)
    said = RobustScorer(**kwargs, bounds=bounds)(model, samples, y)
    assert unsaid <= said + 0.02 < model.score(samples, y)
    train = FeatureConstraints(bounds="train").fit(samples)
    assert unsaid <= RobustScorer(**kwargs, constraints=train)(model, samples, y) + 0.02


def test_the_report_and_the_curve_stay_there_too():
    model = fitted(FunctionTransformer(np.log))
    report = evaluate_robustness(model, X, y, eps=0.5)
    assert (report.X_adv > 0).all()
    raised = [flag.name for flag in report.raised]
    assert not {"gradients", "huge radius"} & set(raised)
    _, (accuracy,) = robustness_curve(model, X, y, eps=[0.5])
    assert report.robust_accuracy <= accuracy <= report.robust_accuracy + 0.05


@pytest.mark.parametrize(
    "last",
    [LogisticRegression(), pytest.param(KNeighborsClassifier(), marks=pytest.mark.slow)],
    ids=repr,
)
def test_the_check_at_a_huge_radius_stays_there_whatever_the_radius_of_the_report(last):
    """There categories are looked up, and no model is blamed for what it is not defined for."""
    table = pd.DataFrame(X, columns=list("abcd")).assign(job=np.where(y == 0, "clerk", "pilot"))
    table.loc[::3, "job"] = "nurse"
    columns = (FunctionTransformer(np.log), list("abcd")), (OneHotEncoder(), ["job"])
    model = make_pipeline(make_column_transformer(*columns), last).fit(table, y)
    constraints = FeatureConstraints(immutable="job")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)  # of flags
        small, large = (
            evaluate_robustness(model, table, y, eps=eps, n_queries=50, constraints=constraints)
            for eps in (X.min() / 2, X.max())
        )
    for report in (small, large):
        flag = next(flag for flag in report.flags if flag.name == "huge radius")
        assert not flag.raised, flag.detail


@pytest.mark.parametrize("bounds", ["train", {0: (-5.0, 5.0)}, None])
def test_constraints_are_kept_beside_the_range(bounds):
    model = fitted(FunctionTransformer(np.log))
    constraints = FeatureConstraints(bounds=bounds, increasing=[1]).fit(X)
    report = evaluate_robustness(model, X, y, eps=0.5, constraints=constraints)
    assert (report.X_adv > 0).all()
    assert (report.X_adv[:, 1] >= X[:, 1]).all()
    if bounds == "train":
        assert (report.X_adv <= X.max(0)).all()
    elif bounds:
        assert (report.X_adv[:, 0] <= 5).all()


@pytest.mark.parametrize("norm", others_slow(EPS, ["l2"]))
def test_the_range_of_training_and_of_categories_of_a_black_box_may_both_be_kept(norm):
    table = pd.get_dummies(pd.DataFrame({"a": X[:, 0], "job": np.where(y, "pilot", "clerk")}))
    forest = RandomForestClassifier(10, random_state=0).fit(table, y)
    constraints = FeatureConstraints(one_hot=[["job_clerk", "job_pilot"]], bounds="train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)  # of flags
        report = evaluate_robustness(
            forest, table, y, norm=norm, eps=2, n_queries=200, constraints=constraints.fit(table)
        )
    assert report.robust_accuracy < report.accuracy
    assert report.X_adv.a.between(table.a.min(), table.a.max()).all()


def test_missing_values_and_whole_numbers_are_no_obstacle():
    table = pd.DataFrame(X, columns=list("abcd")).assign(d=np.ceil(X[:, 3]).astype(int))
    table.loc[::7, "a"] = np.nan
    log = FunctionTransformer(np.log)
    model = make_pipeline(SimpleImputer(), log, StandardScaler(), LogisticRegression())
    model.fit(table, y)
    report = evaluate_robustness(model, table, y, eps=2)
    assert (report.X_adv.d >= 1).all()
    assert (report.X_adv[["b", "c"]] > 0).all(axis=None)
    assert report.X_adv.a.isna().sum() == table.a.isna().sum()
    assert report.robust_accuracy < 0.5 * report.accuracy


class LogOfDifference(nn.Module):
    """Not defined where one feature exceeds another, which is no range of either."""

    def forward(self, X):
        log = (X[:, 0] - X[:, 1]).log()
        return torch.stack([torch.ones_like(log), -0.01 * log], dim=1)


@pytest.mark.parametrize("attack", [PGD(eps=1.0), APGD(eps=1.0), PGD(norm="l2", eps=1.0)], ids=str)
def test_an_attack_that_meets_nan_says_so(attack, generator):
    samples = torch.tensor([[3.0, 1.0], [4.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(LogOfDifference(), samples[1:], labels[1:], generator=generator)
    samples[0, 1] = 1.7
    with pytest.warns(AttackWarning, match="The model returned NaN for 1 of 2 samples"):
        found = attack.search(LogOfDifference(), samples, labels, generator=generator)
    assert found.no_gradient.tolist() == [True, False]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("attack", [PGD(n_steps=10), APGD(n_steps=10)], ids=str)
def test_an_attack_that_meets_nan_beside_an_encoder_says_so(attack, missing):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(3, 1, (80, 2)).clip(0.1), columns=["a", "b"])
    table["job"] = rng.choice(["clerk", "nurse"], 80)
    table["home"] = np.where(np.arange(80) % 9 == 0, None, "own") if missing else "own"
    labels = (table.a > table.b).astype(int)
    log_of_products = make_pipeline(PolynomialFeatures(), FunctionTransformer(np.log1p))
    encoded = (OneHotEncoder(), ["job", "home"])
    columns = make_column_transformer((log_of_products, ["a", "b"]), encoded)
    model = make_pipeline(columns, LogisticRegression()).fit(table, labels)
    constraints = FeatureConstraints(immutable=["job", "home"])
    scorer = RobustScorer(norm="l2", eps=20, attack=attack, constraints=constraints)
    with pytest.warns(AttackWarning, match="NaN"):
        assert scorer(model, table, labels) <= model.score(table, labels)


@pytest.mark.usefixtures("brief_stages")
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", ["fgsm", "pgd", "strong"])
def test_an_infinite_gradient_at_a_feature_that_cannot_change_is_no_matter(attack, norm):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(4 * np.abs(rng.normal(size=(120, 3))), columns=list("abk"))
    table["k"] = rng.integers(0, 3, 120).astype(float)  # whose root has no slope at 0
    labels = (np.sqrt(table.a) + 0.5 * np.sqrt(table.k) > np.sqrt(table.b) + 0.3).astype(int)
    roots = make_pipeline(FunctionTransformer(np.sqrt), StandardScaler(), LogisticRegression())
    roots.fit(table, labels)
    for threat in ({"mutable": ["a", "b"]}, {"constraints": FeatureConstraints(immutable=["k"])}):
        scorer = RobustScorer(norm=norm, eps=0.5, attack=attack, **threat)
        beside = scorer(roots, table.assign(k=table.k.clip(1e-12)), labels)
        assert scorer(roots, table, labels) == beside


def test_a_black_box_that_refuses_to_predict_is_not_asked():
    trees = GradientBoostingClassifier(n_estimators=20, random_state=0)  # know no NaN
    model = make_pipeline(FunctionTransformer(np.log), StandardScaler(), trees)
    model.fit(X, y)
    scorer = RobustScorer(eps=0.5, attack=Square(n_queries=100))
    unsaid, said = scorer(model, X, y), scorer.set_params(bounds=(1e-6, np.inf))(model, X, y)
    assert unsaid <= said + 0.05 < model.score(X, y)


def test_whole_columns_of_a_black_box_are_asked_about_in_whole_numbers():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"a": rng.integers(0, 50, 200), "b": rng.normal(size=200)})
    labels = (table.a > 25).astype(int)
    forest = RandomForestClassifier(10, random_state=0).fit(table, labels)
    near = (table.a >= 26) & (table.a <= 28)
    attack = Square(n_queries=100)
    constraints = FeatureConstraints(integer=["a"])
    for dtype in ("int64", "Int64"):
        samples = table[near].astype({"a": dtype})
        scorer = RobustScorer(eps=3.5, attack=attack, constraints=constraints)
        assert scorer(forest, samples, labels[near]) == 0


def test_a_pipeline_of_transformers_that_learn_nothing_is_asked_as_it_is():
    class Double(TransformerMixin, BaseEstimator):
        def fit(self, X, y=None):
            return self

        def transform(self, X):
            return 2 * np.asarray(X)

    forest = RandomForestClassifier(10, random_state=0)
    attack = Square(n_queries=50)
    for last in (forest, FixedThresholdClassifier(forest, threshold=0.4)):
        model = make_pipeline(Double(), "passthrough", last).fit(X, y)
        assert RobustScorer(eps=0.3, attack=attack)(model, X, y) < model.score(X, y)


def test_features_held_fixed_and_any_radius_are_no_obstacle():
    constant = np.c_[X, np.ones(len(X))]
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(constant, y)
    _, accuracy = robustness_curve(model, constant, y, feature_scale="std")
    assert accuracy[-1] == 0
    model = fitted(FunctionTransformer(np.log))
    _, accuracy = robustness_curve(model, X, y, mutable=[0, 1])
    assert accuracy[-1] < 0.05


@pytest.mark.parametrize(
    ("function", "norm"),
    others_slow([(np.log, "linf"), (np.sqrt, "l2"), (np.log, "l1")], [(np.sqrt, "l2")]),
)
def test_training_attacks_stay_where_the_preprocessor_is_defined(function, norm):
    threat_model = {"norm": norm, "eps": EPS[norm] / 2}
    preprocessor = make_pipeline(FunctionTransformer(function), StandardScaler())

    scorer = RobustScorer(**threat_model)

    def trained(**params):
        model = AdversarialClassifier(
            preprocessor=preprocessor, max_epochs=20, random_state=0, **params
        )
        return model.fit(X, y)

    robust = trained(**threat_model)
    assert scorer(robust, X, y) > scorer(trained(eps=0), X, y)


def test_a_column_without_a_single_value_limits_nothing():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 3))
    y = (X[:, 0] > 0).astype(int)
    model = make_pipeline(SimpleImputer(), LogisticRegression()).fit(X, y)
    X[:, 2] = np.nan
    score = RobustScorer(eps=0.1)(model, X, y)
    assert 0 < score <= model.score(X, y)
    one = RobustScorer(eps=0.1)(model, X[:1], y[:1])
    assert one in (0, 1)
