"""Wilson's interval has its published values, its ends, and its coverage."""

import re

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom, binomtest

from skjacobian.intervals import effective_n_samples, wilson_interval


@pytest.mark.parametrize(
    ("n_right", "n_samples", "low", "high"),
    # All but the first: Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [
        (8, 10, 0.4902, 0.9433),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_has_published_values(n_right, n_samples, low, high):
    np.testing.assert_allclose(wilson_interval(n_right, n_samples), (low, high), atol=5e-5)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("n_samples", [1, 7, 1000])
def test_agrees_with_scipy(n_samples, confidence):
    for n_right in {0, 1, n_samples // 3, n_samples - 1, n_samples}:
        expected = binomtest(n_right, n_samples).proportion_ci(confidence, method="wilson")
        low, high = wilson_interval(n_right, n_samples, confidence)
        np.testing.assert_allclose((low, high), tuple(expected), atol=1e-14)


def test_its_ends_are_where_the_score_test_begins_to_reject():
    def z_of(p):
        return (0.3 - p) / np.sqrt(p * (1 - p) / 50)

    low, high = wilson_interval(15, 50)
    assert brentq(lambda p: z_of(p) - 1.959964, 1e-6, 0.3) == pytest.approx(low, abs=1e-6)
    assert brentq(lambda p: z_of(p) + 1.959964, 0.3, 1 - 1e-6) == pytest.approx(high, abs=1e-6)


def test_stays_inside_0_and_1_and_reaches_them_exactly():
    n_samples = np.arange(1, 500)
    low, high = wilson_interval(np.zeros(499), n_samples)
    assert (low == 0).all()
    assert (high > 0).all()
    low, high = wilson_interval(n_samples, n_samples)
    assert (high == 1).all()
    assert (low < 1).all()


def test_covers_the_truth_about_as_often_as_it_says():
    n_right = np.arange(201)
    low, high = wilson_interval(n_right, 200)
    for p in (0.05, 0.3, 0.5, 0.9):
        coverage = binom.pmf(n_right, 200, p)[(low <= p) & (p <= high)].sum()
        assert 0.93 < coverage < 0.97


def test_numbers_give_numbers_and_arrays_arrays():
    low, high = wilson_interval(3, 10)
    assert np.ndim(low) == np.ndim(high) == 0
    lows, highs = wilson_interval([[3, 4]], [[10], [20]])
    assert lows.shape == highs.shape == (2, 2)
    assert (lows[0, 0], highs[0, 0]) == (low, high)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 0), "Got n_samples=0, but expected at least 1."),
        ((11, 10), "Got n_right=11, but expected numbers between 0 and n_samples=10."),
        ((-1, 10), "Got n_right=-1, but expected numbers between 0 and n_samples=10."),
        ((np.nan, 10), "Got n_right=nan, but expected numbers between 0 and n_samples=10."),
        ((1, 10, 1.0), "Got confidence=1.0, but expected a number between 0 and 1."),
        ((1, 10, 95), "Got confidence=95, but expected a number between 0 and 1."),
    ],
)
def test_errors_say_what_was_got_and_what_was_expected(args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        wilson_interval(*args)


def test_the_effective_number_of_samples_is_that_of_the_variance_of_a_weighted_mean():
    rng = np.random.default_rng(0)
    weight = rng.exponential(size=50)
    means = rng.normal(size=(20_000, 50)) @ (weight / weight.sum())
    assert effective_n_samples(weight) == pytest.approx(1 / means.var(), rel=0.05)


@pytest.mark.parametrize(
    ("weight", "n_samples"),
    [([0.1] * 7, 7.0), ([0, 3, 3], 2.0), ([0.1], 1.0), ([1, 1e-17, 1e-17], 1.0)],
)
def test_equal_weights_count_in_full_and_none_count_as_one(weight, n_samples):
    assert effective_n_samples(weight) == pytest.approx(n_samples)
    assert effective_n_samples(weight) >= 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("unit", [1e-300, 1e-170, 1.0, 1e160, 1e300])
def test_the_effective_number_of_samples_does_not_depend_on_the_unit_of_the_weights(unit):
    weight = np.random.default_rng(0).exponential(size=50)
    expected = weight.sum() ** 2 / (weight**2).sum()
    assert effective_n_samples(unit * weight) == pytest.approx(expected)
