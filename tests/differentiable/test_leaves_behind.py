"""Leaves behind transformers against what the pipelines say."""

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer, make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_selection import SelectKBest
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    MinMaxScaler,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    StandardScaler,
    TargetEncoder,
)
from sklearn.tree import DecisionTreeClassifier

from skjacobian._table import Table
from tests.leaf_boxes import assert_same, known, scores

FOREST = RandomForestClassifier(7, max_depth=6, random_state=0)
NUMBERS, CATEGORIES = ["age", "income", "debt"], ["job", "home"]
IMPUTED = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder())


def people(n_samples=300, missing=0.0):
    rng = np.random.default_rng(0)
    X = pd.DataFrame(
        {
            "job": rng.choice(["clerk", "farm", "nurse"], n_samples),
            "age": rng.integers(18, 75, n_samples),
            "income": rng.lognormal(1, 0.5, n_samples),
            "home": rng.random(n_samples) < 0.5,
            "debt": rng.normal(size=n_samples),
        }
    )
    y = X.income + 0.02 * X.age + (X.job == "nurse") - X.home * X.debt > 4.2
    X["debt"] = X.debt.mask(rng.random(n_samples) < missing)
    return X, y.to_numpy()


def assert_the_leaves_add_up(pipeline, X, y):
    pipeline.fit(X[::2], y[::2])
    samples = X[1::2]
    leaves = known(pipeline, samples)
    assert_same(leaves.scores(Table(samples).tensor.numpy()), scores(pipeline, samples))
    return leaves


@pytest.mark.parametrize(
    "transformer",
    [
        make_column_transformer((OneHotEncoder(), CATEGORIES), remainder="passthrough"),
        make_column_transformer((OneHotEncoder(), CATEGORIES), remainder=StandardScaler()),
        make_column_transformer((OrdinalEncoder(), CATEGORIES), (MinMaxScaler(), NUMBERS)),
        make_column_transformer((OneHotEncoder(), ["job"]), ("passthrough", ["age", "income"])),
        make_column_transformer((StandardScaler(), NUMBERS), (IMPUTED, CATEGORIES)),
        make_column_transformer(
            (OneHotEncoder(), ["job"]),
            (StandardScaler(), NUMBERS),
            (FunctionTransformer(), ["age"]),
            (MinMaxScaler(), ["income", "age"]),
            ("drop", ["home"]),
        ),
        make_column_transformer(
            (make_pipeline(StandardScaler(), SelectKBest(k=2)), NUMBERS),
            (TargetEncoder(cv=2), ["job"]),
        ),
        make_column_transformer(
            (OneHotEncoder(sparse_output=False), ["job"]), ("passthrough", NUMBERS)
        ).set_output(transform="pandas"),
    ],
    ids=[
        *("passthrough", "remainder scaled", "ordinal", "dropped", "imputed categories"),
        *("columns twice", "selected", "pandas"),
    ],
)
def test_leaves_behind_encoders_add_up_to_the_scores(transformer):
    leaves = assert_the_leaves_add_up(make_pipeline(transformer, FOREST), *people())
    thresholds = leaves.low[:, 2][np.isfinite(leaves.low[:, 2])]
    assert (thresholds > 1).any()  # income, in its own unit
    assert np.isinf(leaves.low[:, [0, 3]]).all()  # of categories what encoders say is asked


@pytest.mark.parametrize("behind", [(), (StandardScaler(),), (SelectKBest(k=5),)], ids=str)
def test_steps_behind_encoders_are_gone_back_through(behind):
    encoded = make_column_transformer((OneHotEncoder(), CATEGORIES), remainder="passthrough")
    assert_the_leaves_add_up(make_pipeline(encoded, *behind, FOREST), *people())


@pytest.mark.parametrize(
    ("columns", "of_codes"),
    [
        ("passthrough", "from_dtype"),
        (make_column_transformer((OrdinalEncoder(), CATEGORIES), remainder="passthrough"), [0, 1]),
        (make_column_transformer(("passthrough", NUMBERS), (OrdinalEncoder(), CATEGORIES)), [3, 4]),
    ],
    ids=["from dtypes", "behind an encoder", "behind one, last"],
)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_histogram_boosting_splits_categories_by_sets(n_classes, columns, of_codes):
    X, y = people(1000)
    rng = np.random.default_rng(1)
    X["job"] = rng.choice(list("abcdefghijklmnopq"), len(X))
    y = y + (X.job.isin(list("adfkn")) ^ X.home)
    X.loc[::9, "job"] = np.nan
    X = X.astype({"job": "category", "home": "category"})
    boosting = HistGradientBoostingClassifier(
        max_iter=9, categorical_features=of_codes, random_state=0
    )
    leaves = assert_the_leaves_add_up(make_pipeline(columns, boosting), X, y % n_classes)
    assert not leaves.codes.all()


def test_categories_that_histogram_boosting_has_not_seen_go_where_missing_ones_go():
    X, y = people()
    X = X[["age", "debt"]].to_numpy()
    boosting = HistGradientBoostingClassifier(max_iter=9, categorical_features=[0], max_bins=60)
    boosting.fit(X[:150], y[:150])
    leaves = known(boosting, X)  # with ages that it has not seen
    decisions = leaves.scores(X)[:, 1]
    np.testing.assert_allclose(decisions, boosting.decision_function(X))


@pytest.mark.parametrize("scaler", [None, StandardScaler()])
@pytest.mark.parametrize("add_indicator", [False, True], ids=["filled", "and indicated"])
def test_missing_values_are_where_they_are_filled(add_indicator, scaler):
    imputer = SimpleImputer(strategy="median", add_indicator=add_indicator)
    numbers = make_pipeline(imputer, scaler)
    transformer = make_column_transformer((numbers, NUMBERS), (OneHotEncoder(), CATEGORIES))
    X, y = people(missing=0.3)
    y = y ^ X.debt.isna().to_numpy()
    assert_the_leaves_add_up(make_pipeline(transformer, FOREST), X, y)
    assert_the_leaves_add_up(make_pipeline(numbers, FOREST), X[NUMBERS], y)


def test_a_column_without_values_is_left_out_by_imputers():
    X, y = people(missing=0.3)
    X.insert(1, "nothing", np.nan)
    with pytest.warns(UserWarning, match="without any observed values"):
        assert_the_leaves_add_up(
            make_pipeline(SimpleImputer(), FOREST), X[["nothing", *NUMBERS]], y
        )


@pytest.mark.parametrize(
    "steps",
    [
        (ColumnTransformer([("n", StandardScaler(), NUMBERS)], transformer_weights={"n": 2.0}),),
        (make_column_transformer((KBinsDiscretizer(quantile_method="linear"), NUMBERS)),),
        (make_column_transformer((PolynomialFeatures(), NUMBERS)),),
        (make_column_transformer((FunctionTransformer(np.log1p), ["age", "income"])),),
        (
            make_column_transformer(("passthrough", ["income", "age"])),
            make_column_transformer((OneHotEncoder(handle_unknown="ignore"), [1])),
        ),
        (
            make_column_transformer(("passthrough", NUMBERS)),
            SimpleImputer(missing_values=1.0),
        ),
    ],
    ids=["weights", "bins", "products", "bent", "encoder behind a step", "1 is missing"],
)
def test_no_leaves_are_known_behind_what_makes_no_boxes_of_them(steps):
    X, y = people()
    assert known(make_pipeline(*steps, FOREST).fit(X, y), X) is None


def test_a_number_that_may_change_must_not_be_taken_for_a_category():
    X, y = people()
    X = X[NUMBERS].round()
    boosting = HistGradientBoostingClassifier(max_iter=9, categorical_features=[0])
    kept = make_column_transformer(("passthrough", NUMBERS))
    assert known(boosting.fit(X, y), X) is not None  # whose columns it is known to encode
    assert known(make_pipeline(kept, boosting).fit(X, y), X) is None


def test_leaves_of_samples_that_no_encoder_knows_are_those_of_the_classifier():
    X, y = people()
    encoder = OneHotEncoder(handle_unknown="ignore")
    transformer = make_column_transformer((encoder, ["job"]), ("passthrough", ["income"]))
    tree = make_pipeline(transformer, DecisionTreeClassifier(max_depth=4, random_state=0))
    tree.fit(X, y)
    strangers = X.assign(job=np.where(np.arange(len(X)) % 2, "pilot", "nurse"))
    leaves = known(tree, strangers)
    ours = leaves.scores(Table(strangers).tensor.numpy())
    np.testing.assert_allclose(ours, tree.predict_proba(strangers))
