"""The view of a ColumnTransformer: numbers are followed, categories are looked up."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import ColumnTransformer, make_column_transformer
from sklearn.decomposition import PCA
from sklearn.ensemble import BaggingClassifier, RandomForestClassifier, VotingClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    OneHotEncoder,
    OrdinalEncoder,
    StandardScaler,
    TargetEncoder,
)

from skjacobian import FeatureConstraints, RobustScorer, evaluate_robustness
from skjacobian._table import Table
from skjacobian.attacks import PGD
from skjacobian.differentiable import as_torch, bind_samples, encoded_columns
from skjacobian.exceptions import NotDifferentiableError

RNG = np.random.default_rng(0)
N = 60
FRAME = pd.DataFrame(
    {
        "age": RNG.integers(18, 80, N),
        "job": RNG.choice(["clerk", "cook", "smith"], N),
        "income": RNG.normal(3, 1, N),
        "town": RNG.choice(["here", "there"], N),
        "debt": RNG.normal(0, 2, N),
        "floor": RNG.integers(0, 3, N),
    }
)
FRAME.loc[::5, "debt"] = np.nan
FRAME.loc[3, "job"] = None
Y = np.where(FRAME.age / 40 + FRAME.income + (FRAME.job == "cook") > 4.5, "yes", "no")
NUMBERS = ["income", "debt"]

COLUMN_TRANSFORMERS = {
    "one-hot": make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), NUMBERS),
        (OneHotEncoder(), ["job", "town"]),
        remainder="passthrough",
    ),
    "one-hot that drops, and ignores what it does not know": make_column_transformer(
        (OneHotEncoder(drop="first", handle_unknown="ignore"), ["town"]),
        (SimpleImputer(), NUMBERS),
    ),
    "ordinal": make_column_transformer(
        (OrdinalEncoder(), ["job", "town", "floor"]), (SimpleImputer(), NUMBERS)
    ),
    "imputed, then encoded": make_column_transformer(
        (make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder()), ["job"]),
        (StandardScaler(), ["age"]),
        (SimpleImputer(add_indicator=True), NUMBERS),
    ),
    "target encoder": make_column_transformer(
        (TargetEncoder(), ["job"]), (StandardScaler(), ["income", "age"])
    ),
    "weights, drop and slices": ColumnTransformer(
        [
            ("scaled", StandardScaler(), slice(2, 3)),
            ("none", "drop", ["town"]),
            ("kept", "passthrough", [0]),
            ("words", OneHotEncoder(sparse_output=False), [1]),
        ],
        transformer_weights={"scaled": 3.0, "words": 0.5},
    ),
    "text": make_column_transformer(
        (CountVectorizer(), "town"), (StandardScaler(), ["income", "age"])
    ),
    "nothing to encode": make_column_transformer(
        (OneHotEncoder(), []), (StandardScaler(), ["age", "income"])
    ),
    "no encoder": make_column_transformer((PCA(2), ["age", "income"]), remainder="drop"),
}


@pytest.mark.parametrize("name", COLUMN_TRANSFORMERS)
def test_the_view_of_a_column_transformer_is_its_transform(name):
    transformer = COLUMN_TRANSFORMERS[name].fit(FRAME, Y)
    table, view = Table(FRAME), as_torch(transformer)
    bind_samples(view, table)
    values = table.tensor.numpy().copy()
    values[:, [0, 2, 4]] += 7
    moved = table.decode(values)
    wanted = transformer.transform(moved)
    wanted = wanted.toarray() if hasattr(wanted, "toarray") else wanted
    seen = view(torch.from_numpy(values))
    np.testing.assert_allclose(seen, wanted.astype(float), rtol=1e-10, atol=1e-10)
    assert set(encoded_columns(transformer)) <= {1, 3, 5}


def test_numbers_have_the_gradient_of_finite_differences_and_categories_none():
    transformer = COLUMN_TRANSFORMERS["one-hot"].fit(FRAME, Y)
    view = as_torch(transformer)
    bind_samples(view, FRAME)
    X = Table(FRAME).tensor[1:4].requires_grad_()
    assert torch.autograd.gradcheck(lambda numbers: view(_with_income(X, numbers)), X[:, 2])
    (gradient,) = torch.autograd.grad(view(X).nansum(), X)
    assert (gradient[:, [1, 3]] == 0).all()


def _with_income(X, income):
    return torch.cat(
        [X[:, :2], income[:, None], X[:, 3:]], dim=1
    ).detach() + torch.nn.functional.pad((income - income.detach())[:, None], (2, 3))


def test_an_array_of_codes_is_looked_up_too():
    X = np.column_stack([RNG.integers(0, 4, N), RNG.normal(size=N)]).astype(float)
    transformer = make_column_transformer((OneHotEncoder(), [0]), (StandardScaler(), [1])).fit(X)
    view = as_torch(transformer)
    bind_samples(view, X)
    np.testing.assert_allclose(view(torch.from_numpy(X)), transformer.transform(X), atol=1e-10)
    assert encoded_columns(transformer) == [0]


def test_a_view_of_categories_must_know_its_samples():
    transformer = COLUMN_TRANSFORMERS["one-hot"].fit(FRAME, Y)
    X = Table(FRAME).tensor
    with pytest.raises(ValueError, match="knows no samples yet, but expected bind_samples"):
        as_torch(transformer)(X)
    view = as_torch(transformer)
    bind_samples(view, FRAME)
    X[0, 1] = 7.0
    with pytest.raises(ValueError, match=r"Got values in columns \[1, 3\] that are not those"):
        view(X)


def test_encoded_columns_are_found_wherever_they_are():
    columns = COLUMN_TRANSFORMERS["one-hot"]
    pipe = make_pipeline(columns, LogisticRegression())
    vote = VotingClassifier([("a", pipe), ("b", pipe)], voting="soft").fit(FRAME, Y)
    assert encoded_columns(pipe.fit(FRAME, Y)) == [1, 3]
    assert encoded_columns(vote) == [1, 3]
    assert encoded_columns(RandomForestClassifier(3).fit(FRAME[["age"]], Y)) == []


@pytest.mark.parametrize(
    ("last", "view", "norm"),
    [
        (LogisticRegression(), "torch view", "l2"),
        (RandomForestClassifier(3, random_state=0), "leaves of trees", "l1"),
        (KNeighborsClassifier(), "black box", "linf"),
        pytest.param(LogisticRegression(), "torch view", "l1", marks=pytest.mark.slow),
        pytest.param(
            RandomForestClassifier(3, random_state=0),
            "leaves of trees",
            "linf",
            marks=pytest.mark.slow,
        ),
        pytest.param(KNeighborsClassifier(), "black box", "l2", marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::skjacobian.exceptions.AttackWarning")
def test_a_mixed_table_is_attacked_in_its_numbers_alone(last, view, norm):
    model = make_pipeline(COLUMN_TRANSFORMERS["one-hot"], last).fit(FRAME, Y)
    report = evaluate_robustness(model, FRAME, Y, norm=norm, eps=2.5, n_queries=60)
    assert report.robust_accuracy < report.accuracy
    fixed = ["job", "town"]
    pd.testing.assert_frame_equal(report.X_adv[fixed], FRAME[fixed])
    assert (report.X_adv.dtypes == FRAME.dtypes).all()
    assert "categories" in [flag.name for flag in report.raised]
    assert report.view.startswith(view)
    np.testing.assert_array_equal(model.predict(report.X_adv) == Y, report.robust)


def test_categories_cannot_be_asked_for():
    model = make_pipeline(COLUMN_TRANSFORMERS["one-hot"], LogisticRegression()).fit(FRAME, Y)
    with pytest.raises(ValueError, match=r"mutable with the columns \['job'\], but expected"):
        RobustScorer(mutable=["age", "job"])(model, FRAME, Y)


@pytest.mark.filterwarnings("ignore::skjacobian.exceptions.AttackWarning")
def test_who_says_that_categories_are_fixed_is_not_told():
    model = make_pipeline(COLUMN_TRANSFORMERS["one-hot"], LogisticRegression()).fit(FRAME, Y)
    report = evaluate_robustness(model, FRAME, Y, eps=0.1, mutable=["income"], attack=PGD())
    assert "categories" not in [flag.name for flag in report.raised]


def test_bins_of_numbers_are_no_categories_but_a_black_box():
    bins = KBinsDiscretizer(3, quantile_method="averaged_inverted_cdf", encode="ordinal")
    model = make_pipeline(
        make_column_transformer((bins, ["income"]), (OneHotEncoder(), ["town"])),
        LogisticRegression(),
    ).fit(FRAME, Y)
    with pytest.raises(NotDifferentiableError, match=r"In columns of numbers \(income\): In 'kbi"):
        RobustScorer()(model, FRAME, Y)
    with pytest.warns(match="categories, weak attack"):
        report = evaluate_robustness(model, FRAME, Y, eps=1.0, n_queries=50)
    assert report.view == "black box, predict_proba"


def squared(X):
    return X**2


BINS = KBinsDiscretizer(3, quantile_method="averaged_inverted_cdf")
UNKNOWN_BRANCHES = {
    "a pipeline": (
        make_pipeline(SimpleImputer(), BINS),
        NUMBERS,
        r"In columns of numbers \(income, debt\): In 'pipeline' of the column transformer: In step "
        r"'kbinsdiscretizer' of the pipeline: Got an estimator of type KBinsDiscretizer, of .*",
    ),
    "a function": (
        FunctionTransformer(squared),
        ["age"],
        r"In columns of numbers \(age\): In 'functiontransformer' of the column transformer: Got "
        r"FunctionTransformer\(func=squared\), but .*TORCH_FUNCTIONS\[func\] = .* ",
    ),
    "a single column": (
        FunctionTransformer(pd.Series.to_frame),
        "age",
        r"In columns of numbers \(age\): In 'functiontransformer' of the column transformer: Got "
        r"the column 'age', but expected \['age'\]\. ",
    ),
    "a column transformer": (
        make_column_transformer((BINS, ["age"])),
        ["age", "income"],
        r"In 'columntransformer' of the column transformer: In 'kbinsdiscretizer' of the column "
        r"transformer: Got an estimator of type KBinsDiscretizer, of .*",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN_BRANCHES)
def test_what_no_view_is_known_of_is_named_with_its_columns_and_why(name):
    transformer, columns, match = UNKNOWN_BRANCHES[name]
    branches = make_column_transformer((transformer, columns), (OneHotEncoder(), ["town"]))
    model = make_pipeline(branches, SimpleImputer(), LogisticRegression()).fit(FRAME, Y)
    hint = "RobustScorer and evaluate_robustness with attack='strong', .* do without gradients"
    with pytest.raises(NotDifferentiableError, match=match + hint):
        RobustScorer()(model, FRAME, Y)
    strong = RobustScorer(eps=0.0, attack="strong")(model, FRAME, Y)
    assert strong == model.score(FRAME, Y)


def test_columns_of_arrays_are_named_by_place_and_not_all_where_they_are_many():
    X = RNG.normal(size=(N, 12))
    model = make_pipeline(
        make_column_transformer((BINS, list(range(12)))), LogisticRegression()
    ).fit(X, Y)
    with pytest.raises(NotDifferentiableError, match=r"numbers \(0, 1, .*, 8, 9, …\): In 'kbins"):
        RobustScorer()(model, X, Y)


def test_columns_may_be_encoded_in_the_first_step_alone():
    twice = make_pipeline(
        make_union("passthrough"), make_column_transformer((OneHotEncoder(), [0]))
    ).fit(FRAME[["floor", "age"]])
    with pytest.raises(NotDifferentiableError, match="encoder inside a step of a pipeline behind"):
        as_torch(twice)


def as_boolean(column):
    return column > column.median()


def as_category(column):
    return (column > column.median()).astype(float).astype("category")


def as_objects(column):
    return column.astype(object)


@pytest.mark.parametrize("change", [as_boolean, as_category, as_objects])
@pytest.mark.filterwarnings("ignore::skjacobian.exceptions.AttackWarning")
def test_a_scaler_of_what_is_no_number_by_type_is_attacked_like_one_of_numbers(change):
    X = FRAME[["age", "income"]].astype(float).assign(last=FRAME.debt.fillna(0.0))
    y = (X["last"] + X.income + X.age / 40 > 4.5).astype(int)
    typed = X.assign(last=change(X["last"]))
    numbers = typed.astype(float)
    model = make_pipeline(StandardScaler(), LogisticRegression())
    mutable = ["age", "income"]
    threat = {"eps": 0.3, "mutable": mutable, "n_queries": 300}
    plain = evaluate_robustness(model.fit(numbers, y), numbers, y, **threat)
    report = evaluate_robustness(model.fit(typed, y), typed, y, **threat)
    assert report.robust.tolist() == plain.robust.tolist()
    assert report.view == ("black box, predict_proba" if change is as_category else "torch view")
    assert (report.X_adv.dtypes == typed.dtypes).all()


def test_a_view_that_computes_with_codes_is_refused():
    X = FRAME[["income"]].assign(level=pd.Categorical(FRAME.floor))
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y)
    with pytest.raises(NotDifferentiableError, match=r"Got columns \['level'\] of categories that"):
        RobustScorer()(model, X, Y)


def test_columns_in_another_order_than_in_fit_are_put_in_its_order():
    model = make_pipeline(
        make_column_transformer((StandardScaler(), ["age", "income"]), (OneHotEncoder(), ["town"])),
        LogisticRegression(),
    ).fit(FRAME, Y)
    said = FeatureConstraints(integer=["age", "floor"], immutable=["job", "town"])
    scorer = RobustScorer(norm="l2", eps=0.5, constraints=said)
    expected = scorer(model, FRAME, Y)
    assert scorer(model, FRAME[FRAME.columns[::-1]], Y) == expected < model.score(FRAME, Y)
    assert scorer(model, FRAME.assign(extra=1.0), Y) == expected
    with pytest.raises(ValueError, match=r"Got X without the columns \['age'\]"):
        scorer(model, FRAME.drop(columns="age"), Y)


def test_encoders_in_inner_column_transformers_are_refused_but_their_columns_known():
    inner = make_column_transformer((OneHotEncoder(), ["town"]), (StandardScaler(), ["income"]))
    outer = make_column_transformer((StandardScaler(), ["age"]), (inner, ["income", "town"]))
    outer.fit(FRAME)
    assert encoded_columns(outer) == [3]
    with pytest.raises(NotDifferentiableError, match="Got an encoder inside"):
        as_torch(outer)
    union = make_union(OneHotEncoder(handle_unknown="ignore"), StandardScaler())
    assert encoded_columns(union.fit(FRAME[["floor", "age"]])) == [0, 1]


def test_a_bag_of_pipelines_with_encoders_is_attacked():
    columns = make_column_transformer((OneHotEncoder(), [0]), (StandardScaler(), [1]))
    X = FRAME[["floor", "income"]].to_numpy()
    bag = BaggingClassifier(make_pipeline(columns, LogisticRegression()), 3, random_state=0)
    assert encoded_columns(bag.fit(X, Y)) == [0]
    assert RobustScorer(eps=0.5, mutable=[1])(bag, X, Y) < bag.score(X, Y)
