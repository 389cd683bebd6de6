import re
from fractions import Fraction
from numbers import Real

import numpy as np
import pytest
import torch

from skjacobian._validation import (
    ScalarInterval,
    check_axes,
    check_count,
    check_flag,
    check_non_negative,
    check_number,
    check_number_per_sample,
    check_option,
    check_positive,
    check_weights,
    did_you_mean,
    reject,
    unwrap_scalar,
)

NOT_FINITE_NUMBERS = [
    float("nan"),
    float("inf"),
    -float("inf"),
    "1",
    None,
    [1.0],
    np.ones(1),
    np.ones((1, 1)),
    torch.ones(1),
    1j,
    True,
    np.bool_(True),
    np.array(True),
    torch.tensor(True),
]


def test_an_error_says_what_it_got_and_what_it_expected():
    with pytest.raises(ValueError, match=re.escape("Got eps=-1, but expected a positive number.")):
        reject("eps", -1, "a positive number")


@pytest.mark.parametrize("value", NOT_FINITE_NUMBERS, ids=repr)
@pytest.mark.parametrize("check", [check_non_negative, check_positive, check_count])
def test_what_is_no_finite_number_is_rejected(check, value):
    with pytest.raises(ValueError, match=re.escape(f"Got eps={value!r}, but expected a")):
        check("eps", value)


@pytest.mark.parametrize(
    "value",
    [2, 2.0, np.int64(2), np.float32(2), np.float64(2), Fraction(2), np.array(2), torch.tensor(2)],
    ids=repr,
)
@pytest.mark.parametrize("check", [check_non_negative, check_positive])
def test_any_kind_of_real_scalar_becomes_a_python_float(check, value):
    checked = check("eps", value)
    assert type(checked) is float
    assert checked == 2.0


@pytest.mark.parametrize("value", [3, np.int32(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_any_kind_of_integer_scalar_becomes_a_python_int(value):
    checked = check_count("n_steps", value)
    assert type(checked) is int
    assert checked == 3


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, np.float64(2.0), np.array(2.0)], ids=repr)
def test_a_count_is_an_integer_of_at_least_one(value):
    with pytest.raises(ValueError, match=r"Got n_steps=.*, but expected an integer of at least 1"):
        check_count("n_steps", value)


def test_zero_is_non_negative_and_not_positive():
    assert check_non_negative("eps", 0) == 0.0
    with pytest.raises(ValueError, match=r"Got lr=0, but expected a positive finite number"):
        check_positive("lr", 0)
    with pytest.raises(ValueError, match=r"Got eps=-0.5, but expected a non-negative finite"):
        check_non_negative("eps", -0.5)


def test_check_number_accepts_what_its_condition_accepts():
    assert check_number("p", 0.5, lambda v: v < 1, "a number below 1") == 0.5
    with pytest.raises(ValueError, match=r"Got p=1.5, but expected a number below 1\."):
        check_number("p", 1.5, lambda v: v < 1, "a number below 1")


def test_an_option_is_returned_if_it_exists():
    assert check_option("norm", "l2", iter(["l1", "l2"])) == "l2"


@pytest.mark.parametrize(
    ("value", "suggestion"), [("lin", " (did you mean 'linf'?)"), ("zzz", ""), (2, ""), (None, "")]
)
def test_an_unknown_option_names_all_options_and_the_closest(value, suggestion):
    expected = f"Got norm={value!r}, but expected one of 'l2', 'linf'{suggestion}."
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        check_option("norm", value, ["l2", "linf"])


@pytest.mark.parametrize(
    ("word", "answer"),
    [("margn", " (did you mean 'margin'?)"), ("xyz", ""), (3, ""), (None, "")],
)
def test_a_suggestion_is_given_only_for_a_close_word(word, answer):
    assert did_you_mean(word, ["margin", "cross_entropy"]) == answer


@pytest.mark.parametrize(("word", "option"), [("Relu", "relu"), ("PGD", "pgd"), ("age", "Age")])
def test_a_suggestion_may_differ_in_capitals(word, option):
    options = ["elu", "relu", "pgd", "Age", 7]  # labels of columns need not be names
    assert did_you_mean(word, options) == f" (did you mean {option!r}?)"


@pytest.mark.parametrize("value", ["text", None, [1], (1, 2)])
def test_unwrapping_leaves_what_is_no_0d_array_alone(value):
    assert unwrap_scalar(value) is value


def test_unwrapping_keeps_arrays_with_dimensions():
    array, tensor = np.ones(1), torch.ones(1)
    assert unwrap_scalar(array) is array
    assert unwrap_scalar(tensor) is tensor
    assert unwrap_scalar(np.array(0.5)) == 0.5
    assert unwrap_scalar(torch.tensor(0.5)) == 0.5
    assert type(unwrap_scalar(np.float32(0.5))) is float
    assert type(unwrap_scalar(np.int8(1))) is int


def test_a_scalar_interval_looks_inside_0d_arrays():
    interval = ScalarInterval(Real, 0, None, closed="left")
    for value in (0, 0.5, np.float32(1), np.array(0.5)):
        assert interval.is_satisfied_by(value)
    for value in (-1, np.array(-1.0), "1", np.ones(1), True, np.array(True), np.bool_(True)):
        assert not interval.is_satisfied_by(value)


@pytest.mark.parametrize("value", [True, np.bool_(True), np.array(True), torch.tensor(True)])
def test_a_flag_is_any_kind_of_bool(value):
    assert check_flag("minimal", value) is True


@pytest.mark.parametrize("value", ["False", 0, 1, None, [], np.ones(2, dtype=bool)], ids=repr)
def test_what_is_no_bool_is_no_flag(value):
    message = f"Got minimal={value!r}, but expected True or False."
    with pytest.raises(ValueError, match=re.escape(message)):
        check_flag("minimal", value)


@pytest.mark.parametrize("given", [2.0, [2, 2, 2], np.full(3, 2.0), np.array(2.0)], ids=repr)
def test_weights_are_one_for_each_sample(given):
    np.testing.assert_array_equal(check_weights(given, np.zeros((3, 1))), [2.0, 2.0, 2.0])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("typo", "Got sample_weight of type str, but expected a number for each sample"),
        ({}, "Got sample_weight of type dict, but expected a number for each sample"),
        ([[1, 2], [3]], "Got sample_weight of type list, but expected a number for each sample"),
        (np.nan, "Got sample_weight from nan to nan, but expected finite numbers"),
        (np.inf, "Got sample_weight from inf to inf, but expected finite numbers"),
        (-1, "Negative values in data passed to `sample_weight`"),
        ([1, np.nan, 1], "sample_weight contains NaN"),
        ([1, 1], r"sample_weight\.shape == \(2,\), expected \(3,\)"),
    ],
)
def test_what_is_no_weight_is_rejected(weight, message):
    with pytest.raises(ValueError, match=message):
        check_weights(weight, np.zeros((3, 1)))


@pytest.mark.parametrize("values", ["a", {}, [[1], [1, 2]], [None, object()]])
def test_what_is_no_array_of_numbers_is_named(values):
    with pytest.raises(ValueError, match="Got norms that are no array of numbers: "):
        check_number_per_sample("norms", values)
    np.testing.assert_array_equal(check_number_per_sample("norms", [1, "2"]), [1.0, 2.0])


@pytest.mark.parametrize("ax", ["a", 3, [], np.empty((2, 2), dtype=object)])
def test_what_is_no_axes_is_named(ax):
    message = f"Got ax of type {type(ax).__name__}, but expected one matplotlib Axes or None."
    with pytest.raises(TypeError, match=re.escape(message)):
        check_axes(ax)
