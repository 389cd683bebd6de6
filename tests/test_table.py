"""A table becomes a tensor, and what comes back has its columns and types."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from skjacobian import FeatureConstraints, RobustScorer
from skjacobian._table import Table

FRAME = pd.DataFrame(
    {
        "age": [30, 50, 41],
        "income": [1.5, np.nan, 2.5],
        "small": np.float32([0.1, 0.2, 0.3]),
        "children": pd.array([1, None, 3], dtype="Int64"),
        "job": ["clerk", None, "cook"],
        "size": pd.Categorical(["s", "l", "s"], categories=["s", "m", "l"], ordered=True),
        "member": [True, False, True],
        "since": pd.to_datetime(["2020-01-01", "2021-01-01", "2020-01-01"]),
    },
    index=[7, 8, 9],
)


def test_what_is_encoded_is_decoded_with_all_types_and_the_index():
    table = Table(FRAME)
    back = table.rows(np.arange(3), table.tensor.numpy())
    pd.testing.assert_frame_equal(back, FRAME)


def test_chosen_rows_keep_their_index():
    table = Table(FRAME)
    chosen = np.array([2, 0])
    back = table.rows(chosen, table.tensor[chosen].numpy())
    pd.testing.assert_frame_equal(back, FRAME.iloc[chosen])


def test_numbers_stay_numbers_and_the_rest_becomes_codes():
    table = Table(FRAME)
    assert table.tensor.dtype == torch.float64
    assert table.integer == [0, 3]
    assert sorted(table.categories) == [4, 5, 6, 7]
    assert table.tensor[:, 0].tolist() == [30, 50, 41]
    assert table.tensor[:, 6].tolist() == [1, 0, 1]  # by value
    assert table.tensor[1, [1, 3]].isnan().all()


def test_a_number_that_float32_cannot_hold_makes_the_column_float64():
    table = Table(FRAME)
    values = table.tensor.numpy().copy()
    values[:, 2] += 1e-12
    assert table.decode(values).dtypes["small"] == np.float64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_frame_of_one_floating_type_has_that_type(dtype):
    table = Table(pd.DataFrame(np.eye(3, dtype=dtype)))
    assert str(table.tensor.dtype) == f"torch.{np.dtype(dtype)}"


@pytest.mark.parametrize(("large", "dtype"), [(2**24 - 1, "float32"), (2**24, "float64")])
def test_whole_numbers_do_not_widen_float32_unless_they_must(large, dtype):
    frame = pd.DataFrame({"a": np.float32([0.1, 0.2]), "b": [1, large], "c": ["x", "y"]})
    table = Table(frame)
    assert str(table.tensor.dtype) == f"torch.{dtype}"
    pd.testing.assert_frame_equal(table.decode(table.tensor.numpy()), frame)


def test_an_array_is_its_own_table():
    X = np.random.default_rng(0).normal(size=(4, 2, 3))
    table = Table(X)
    assert table.columns is None
    assert not table.categories
    assert not table.integer
    np.testing.assert_array_equal(table.rows(np.array([1, 3]), X[[1, 3]]), X[[1, 3]])


@pytest.mark.parametrize("value", [True, False])
def test_truth_is_1_also_where_it_is_all_there_is(value):
    table = Table(pd.DataFrame({"a": [value, value], "b": [1.0, 2.0]}))
    assert table.tensor[:, 0].tolist() == [value, value]
    assert table.decode(table.tensor.numpy()).a.tolist() == [value, value]


def test_objects_that_are_numbers_are_numbers():
    frame = pd.DataFrame({"a": [1.5, 2]}, dtype=object)
    table = Table(frame)
    assert table.tensor.tolist() == [[1.5], [2.0]]
    assert not table.categories
    assert table.decode(table.tensor.numpy()).dtypes["a"].kind == "O"
    assert Table(np.array([[1.5], [2]], dtype=object)).tensor.tolist() == [[1.5], [2.0]]


def test_numbers_that_are_written_out_are_no_numbers():
    frame = pd.DataFrame({"zip": pd.Series(["10115", "80331"], dtype=object), "b": [1.0, 2.0]})
    table = Table(frame)
    assert sorted(table.categories) == [0]
    assert table.decode(table.tensor.numpy()).zip.tolist() == ["10115", "80331"]
    assert sorted(Table(pd.DataFrame({"a": [True, None]}, dtype=object)).categories) == [0]


def test_values_without_a_hash_are_categories():
    tags = [["a", "b"], ["a", "b"], {"c": 1}, None, np.zeros(2)]
    frame = pd.DataFrame({"age": [20.0, 30.0, 40.0, 50.0, 60.0], "tags": tags})
    table = Table(frame)
    assert sorted(table.categories) == [1]
    for chosen in ([0, 1, 2, 3, 4], [3, 2]):
        rows = table.rows(np.array(chosen), table.tensor[chosen].numpy())
        assert all(rows.tags.iloc[i] is tags[j] for i, j in enumerate(chosen))
        assert rows.index.tolist() == chosen
    is_missing = FunctionTransformer(lambda frame: frame.isna().to_numpy(dtype=float))
    columns = make_column_transformer((StandardScaler(), ["age"]), (is_missing, ["tags"]))
    model = make_pipeline(columns, LogisticRegression()).fit(frame, [0, 0, 0, 1, 1])
    scorer = RobustScorer(eps=5, constraints=FeatureConstraints(immutable="tags"))
    assert scorer(model, frame, [0, 0, 0, 1, 1]) == 1
    assert scorer.set_params(eps=50)(model, frame, [0, 0, 0, 1, 1]) == 0


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [("uint8", "int64"), ("int8", "int64"), ("UInt8", "Int64"), ("Int8", "Int64")],
)
def test_whole_numbers_that_a_narrow_type_cannot_hold_widen_it(dtype, wide):
    table = Table(pd.DataFrame({"a": pd.Series([1, 100], dtype=dtype)}))
    assert table.decode(np.array([[5.0], [6.0]])).dtypes["a"] == dtype
    assert table.decode(np.array([[-200.0], [6.0]])).dtypes["a"] == wide


def test_what_float16_cannot_hold_widens_it():
    table = Table(pd.DataFrame({"a": np.array([1000, 1001], dtype=np.float16)}))
    assert table.decode(np.array([[1000.3], [1.0]])).a.tolist() == [1000.3, 1.0]


def test_columns_of_equal_names_stay_apart():
    frame = pd.DataFrame([[1.0, 2.0], [3.0, 4.0]], columns=["a", "a"])
    pd.testing.assert_frame_equal(Table(frame).decode(frame.to_numpy()), frame)


def random_columns(rng, n):
    """Columns of every type that tables hold."""
    numbers, whole = rng.normal(size=n) * 10, rng.integers(0, 100, n)
    present = rng.random(n) < 0.8
    missing = np.where(present, numbers, np.nan)
    floats = [pd.Series(missing).astype(dtype) for dtype in ("float16", "float32", "float64")]
    integers = [pd.Series(whole).astype(dtype) for dtype in ("uint8", "int32", "int64")]
    nullable = [
        pd.Series(whole, dtype=dtype).where(present) for dtype in ("Int8", "Int64", "Float32")
    ]
    truths = [pd.Series(whole > 50), pd.Series(whole > 50, dtype="boolean").where(present)]
    texts = np.where(present, rng.choice(["s", "l"], n), None)
    categories = [
        pd.Series(texts, dtype=object),
        pd.Series(rng.choice(["s", "l"], n)),
        pd.Series(pd.Categorical(texts, categories=["s", "m", "l"], ordered=True)),
        pd.Series(pd.Categorical(whole)),
        pd.Series(pd.Timestamp("2020-01-01") + pd.to_timedelta(whole, unit="D")),
    ]
    return [*floats, *integers, *nullable, *truths, *categories, pd.Series(numbers, dtype=object)]


def random_frame(rng):
    n = int(rng.integers(1, 9))
    known = random_columns(rng, n)
    chosen = rng.integers(0, len(known), rng.integers(1, 12))
    names = [
        [f"c{j}" for j in range(len(chosen))],
        ["same"] * len(chosen),
        pd.MultiIndex.from_product([["pair"], range(len(chosen))], names=["u", "v"]),
        [j if j % 2 else str(j) for j in range(len(chosen))],
    ]
    frame = pd.concat([known[j] for j in chosen], axis=1)
    frame.columns = pd.Index(names[rng.integers(len(names))])
    return frame.set_axis(rng.permutation(n) + 5)


def column_by_column(table, values):
    """What `decode` returns, one Series after another."""
    columns = []
    for j, dtype in enumerate(table.X.dtypes):
        if j in table.categories:
            column = pd.Series(table.categories[j].take(values[:, j].astype(int)))
        elif isinstance(dtype, np.dtype) and dtype.kind == "f":
            narrow = pd.Series(values[:, j]).astype(dtype)
            is_held = np.array_equal(narrow.astype(values.dtype), values[:, j], equal_nan=True)
            column = narrow if is_held else pd.Series(values[:, j])
        else:
            column = pd.Series(values[:, j]).astype(dtype)
        columns.append(column)
    return pd.concat(columns, axis=1).set_axis(table.X.columns, axis=1)


@pytest.mark.parametrize("seed", range(60))
def test_random_frames_come_back_and_are_made_as_column_by_column(seed):
    rng = np.random.default_rng(seed)
    frame = random_frame(rng)
    table = Table(frame)
    values = table.tensor.numpy().copy()
    pd.testing.assert_frame_equal(table.decode(values, frame.index), frame)
    chosen = rng.integers(0, len(frame), 5)
    pd.testing.assert_frame_equal(table.rows(chosen, values[chosen]), frame.iloc[chosen])
    floats = [j for j, dtype in enumerate(frame.dtypes) if dtype in ("f2", "f4", "f8")]
    for moved in (floats, floats[::2]):
        values[:, moved] += rng.normal(size=(len(values), len(moved))).astype(values.dtype)
        decoded = table.decode(values)
        pd.testing.assert_frame_equal(decoded, column_by_column(table, values), check_exact=True)


@pytest.mark.parametrize("frame", [FRAME, FRAME[["income"]], FRAME[["small"]]])
def test_who_writes_into_what_comes_back_changes_no_numbers(frame):
    table = Table(frame)
    values = table.tensor.numpy()
    kept = values.copy()
    decoded = table.decode(values)
    decoded.iloc[:, :] = decoded.iloc[[2, 1, 0]].to_numpy()
    np.testing.assert_array_equal(values, kept)


def test_what_is_no_whole_number_in_a_column_of_integers_is_an_error():
    table = Table(pd.DataFrame({"a": [1, 2], "b": [3, 4], "c": [0.5, 1.5]}))
    with pytest.raises(ValueError, match="Trying to coerce float values to integers"):
        table.decode(table.tensor.numpy() + np.array([0.0, 0.5, 0.5]))
    with pytest.raises(ValueError, match="Cannot convert non-finite values"):
        table.decode(table.tensor.numpy() * np.array([np.nan, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("X", "match"),
    [
        (pd.DataFrame({"a": []}), r"0 sample\(s\)"),
        (pd.DataFrame(index=[0, 1]), r"0 feature\(s\)"),
        (pd.DataFrame({"a": [1.0, np.inf]}), "Input X contains infinity"),
        (
            np.array([["a"], ["b"]]),
            r"Got X with .*'a'.*, which is no number, but expected numbers, or a Data",
        ),
        (np.array([["a"], [1]], dtype=object), "which is no number"),
    ],
)
def test_what_is_no_table_is_rejected(X, match):
    with pytest.raises(ValueError, match=match):
        Table(X)


def test_none_and_nan_stay_what_they_were():
    # Encoders know them as two categories.
    column = pd.Series(["a", None, np.nan, "a", None], dtype=object)
    table = Table(pd.DataFrame({"job": column, "age": 1.0}))
    back = table.rows(np.array([4, 2, 0]), table.tensor[[4, 2, 0]].numpy())
    assert back.job.iloc[0] is None
    assert np.isnan(back.job.iloc[1])
    assert back.job.iloc[2] == "a"


def test_a_column_of_integers_that_are_all_missing_is_read():
    frame = pd.DataFrame({"a": [0.5, 1.5], "n": pd.array([None, None], dtype="Int64")})
    assert Table(frame.astype({"a": "float32"})).tensor[:, 1].isnan().all()
    least = pd.DataFrame({"a": np.float32([0.5]), "n": [-(2**63)]})
    assert Table(least).tensor.dtype == torch.float64


def test_decimals_are_numbers():
    frame = pd.DataFrame({"price": [Decimal("1.25"), Decimal("3"), None], "n": [1, 2, 3]})
    table = Table(frame)
    assert not table.categories
    np.testing.assert_array_equal(table.tensor[:, 0], [1.25, 3.0, np.nan])
    assert table.decode(table.tensor.numpy())["price"].tolist()[:2] == [1.25, 3.0]
