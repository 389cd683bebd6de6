import re

import numpy as np
import pytest
import torch

from skjacobian.ascent_steps import ascend
from skjacobian.geometry import BALL_NORMS, Ball
from skjacobian.threat_model import (
    DataScale,
    check_inside,
    fit_feature_scale,
    resolve_bounds,
    resolve_feature_scale,
    resolve_mutable,
)

DOUBLE = torch.float64


def rand(shape, generator, dtype=DOUBLE):
    return torch.randn(shape, generator=generator, dtype=dtype)


def test_clean_samples_outside_the_bounds_are_counted_and_measured():
    X = torch.tensor([[0.5, 1.25], [0.0, 1.0], [-0.5, 0.0]])
    message = (
        "Got X with 2 of 3 samples outside bounds=(0.0, 1.0), by up to 0.5, but expected every "
        "clean sample inside its bounds."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_inside(X, resolve_bounds((0, 1), X))


def test_clean_samples_are_held_against_the_bounds_of_their_own_feature():
    X = torch.tensor([[0.5, 9.0], [0.5, 11.0]])
    check_inside(X[:1], resolve_bounds(([0, 0], [1, 10]), X))
    with pytest.raises(
        ValueError, match=r"1 of 2 samples outside the bounds of columns \(1\), by up to"
    ):
        check_inside(X, resolve_bounds(([0, 0], [1, 10]), X))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1 + 2.2e-16, DOUBLE), (-2.2e-16, DOUBLE), (1 + 1.2e-7, torch.float32)],
)
@pytest.mark.parametrize("norm", BALL_NORMS)
def test_a_sample_may_exceed_its_bounds_by_rounding_and_keeps_its_value(
    value, dtype, norm, generator
):
    X = torch.tensor([[value, 0.5]], dtype=dtype)
    bounds = resolve_bounds((0, 1), X)
    check_inside(X, bounds)
    assert torch.equal(Ball.around(X, norm=norm, eps=0.0, bounds=bounds).enforce(X + 1), X)
    ball = Ball.around(X, norm=norm, eps=0.5, bounds=bounds)
    assert ball.contains(X).all()
    X_adv = ball.enforce(X + rand(X.shape, generator, dtype))
    assert min(0.0, value) <= X_adv.min()
    assert X_adv.max() <= max(1.0, X.max())


@pytest.mark.parametrize(("excess", "dtype"), [(1e-12, DOUBLE), (1e-5, torch.float32)])
def test_more_than_rounding_outside_the_bounds_is_an_error(excess, dtype):
    X = torch.tensor([[1 + excess, 0.5]], dtype=dtype)
    with pytest.raises(ValueError, match=r"1 of 1 samples outside bounds=\(0\.0, 1\.0\)"):
        check_inside(X, resolve_bounds((0, 1), X))


@pytest.mark.parametrize("bounds", [None, (-torch.inf, torch.inf), (0, torch.inf)])
def test_nothing_is_outside_infinite_bounds(bounds):
    X = torch.full((2, 3), 1e30)
    check_inside(X, resolve_bounds(bounds, X))


def test_an_empty_batch_is_inside_any_bounds():
    check_inside(torch.empty(0, 2), resolve_bounds((0, 1), torch.empty(0, 2)))


@pytest.mark.parametrize(
    "bounds",
    [
        (0, 1),
        [0.0, 1.0],
        (np.float32(0), np.array(1.0)),
        (np.zeros(6), 1),
        (np.zeros((2, 3)), torch.ones(6)),
        (-np.inf, [1.0] * 6),
    ],
)
def test_bounds_broadcast_over_the_samples(bounds):
    X = torch.rand(4, 2, 3)
    low, high = resolve_bounds(bounds, X)
    assert low.dtype == high.dtype == X.dtype
    assert torch.broadcast_shapes(X.shape, low.shape, high.shape) == X.shape
    assert (low <= X).all()
    assert (high == 1).all()


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (5, "Got bounds=5, but expected None or a tuple (low, high)"),
        ("01", "Got bounds='01', but expected None or a tuple (low, high)"),
        ((0, 1, 2), "Got bounds=(0, 1, 2), but expected None or a tuple (low, high)"),
        ((1, 0), "Got bounds=(1, 0), but expected None or a tuple (low, high)"),
        ((0, [1, -1]), "with low <= high"),
        ((0, float("nan")), "with low <= high"),
        (("a", 1), "Got bounds='a', but expected numbers"),
        ((0, None), "with low <= high"),
        ((0, [1, 2, 3]), "Got bounds with 3 values, but expected one number or one value for"),
    ],
    ids=repr,
)
def test_bad_bounds_are_rejected(bounds, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_bounds(bounds, torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (0, "Got feature_scale=0, but expected positive finite numbers"),
        (-1.0, "Got feature_scale=-1.0, but expected positive finite numbers"),
        ([1.0, 0.0], "Got feature_scale=[1.0, 0.0], but expected positive finite numbers"),
        ([1.0, float("nan")], "Got feature_scale=[1.0, nan], but expected positive finite numbers"),
        (float("inf"), "Got feature_scale=inf, but expected positive finite numbers"),
        ([1, 2, 3], "Got feature_scale with 3 values, but expected one number or one value for"),
        ([[1], [1, 2]], "but expected numbers"),
        (slice(None), "but expected numbers"),
        (["1", "2"], "but expected numbers, not strings"),
        (
            "sdt",
            "Got feature_scale='sdt', but expected one of 'std', 'range' (did you mean 'std'?)",
        ),
        ("rang", "(did you mean 'range'?)"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("resolve", [resolve_feature_scale, fit_feature_scale])
def test_a_bad_feature_scale_is_rejected(resolve, scale, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(scale, torch.zeros(3, 2))


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_std_and_range_are_those_of_numpy(shape, generator):
    X = rand((20, *shape), generator)
    X[:, 0] = 7.0
    expected = {"std": X.numpy().std(0), "range": np.ptp(X.numpy(), axis=0)}
    for name, values in expected.items():
        np.testing.assert_allclose(resolve_feature_scale(name, X), values, atol=1e-14)
        np.testing.assert_allclose(fit_feature_scale(name, X).values, values, atol=1e-14)


def test_a_fitted_scale_no_longer_depends_on_the_data_at_hand(generator):
    X = rand((20, 5), generator)
    fitted = fit_feature_scale("std", X)
    assert isinstance(fitted, DataScale)
    torch.testing.assert_close(resolve_feature_scale(fitted, X[:2]), X.std(0, correction=0))
    assert resolve_feature_scale(fitted, X[:2].float()).dtype == torch.float32
    assert fit_feature_scale(fitted, X[:2]) is fitted


@pytest.mark.parametrize("scale", [None, 2.0, [1.0, 2.0], np.array([1.0, 2.0])], ids=repr)
def test_a_given_scale_is_checked_and_returned_as_it_is(scale):
    assert fit_feature_scale(scale, torch.zeros(3, 2)) is scale


@pytest.mark.parametrize("scale", [[1, 2, 3, 4, 5, 6], torch.arange(1, 7), [[1, 2, 3], [4, 5, 6]]])
def test_a_scale_takes_the_shape_of_a_sample(scale):
    resolved = resolve_feature_scale(scale, torch.zeros(3, 2, 3))
    assert torch.equal(resolved, torch.arange(1.0, 7.0).reshape(2, 3))
    assert resolve_feature_scale(None, torch.zeros(3, 2)) is None


# --- mutable features --------------------------------------------------------------------

IMAGES = torch.zeros(4, 2, 3)


@pytest.mark.parametrize(
    "mutable",
    [
        [True, False, False, False, True, True],
        np.array([[True, False, False], [False, True, True]]),
        torch.tensor([True, False, False, False, True, True]),
        [0, 4, 5],
        [-1, 4, 0],
        np.array([5, 4, 0], dtype=np.uint8),
        torch.tensor([0, 4, -1]),
        (0, np.int64(4), 5),
    ],
    ids=repr,
)
def test_mutable_features_become_a_mask_of_a_sample(mutable):
    mask = resolve_mutable(mutable, IMAGES)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, False, False], [False, True, True]]
    assert torch.equal(resolve_mutable(mutable, IMAGES[:0]), mask)


def test_no_word_on_mutable_features_means_all():
    assert resolve_mutable(None, IMAGES) is None


COLUMNS_OF_X = "columns of X: indices from -6 to 5 or a boolean mask of shape (2, 3)"


@pytest.mark.parametrize(
    ("mutable", "message"),
    [
        ([True, False], f"Got mutable=[True, False], but expected {COLUMNS_OF_X}"),
        ([[True, False]] * 3, f"but expected {COLUMNS_OF_X}"),
        ([0, 6], f"Got mutable=[0, 6], but expected {COLUMNS_OF_X}; 6 is none."),
        ([-7], "; -7 is none."),
        ([[0, 1]], f"{COLUMNS_OF_X}, all of one kind."),
        ([0.5, 1.0], f"{COLUMNS_OF_X}, all of one kind."),
        ([0, None], f"{COLUMNS_OF_X}, all of one kind."),
        ([[0], [1, 2]], f"Got mutable=[[0], [1, 2]], but expected {COLUMNS_OF_X}"),
        (True, f"Got mutable=True, but expected {COLUMNS_OF_X}"),
        ([], "Got mutable=[], but expected at least one column of X, or None for all."),
        ([False] * 6, "but expected at least one column of X, or None for all."),
        (["age"], f"Got mutable=['age'], but expected {COLUMNS_OF_X}; names need a DataFrame, wh"),
        ("age", "names need a DataFrame, which a step of a pipeline"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("resolve", [resolve_mutable, resolve_feature_scale])
def test_bad_mutable_features_are_rejected(resolve, mutable, message):
    arguments = {"mutable": mutable, "X": IMAGES}
    if resolve is not resolve_mutable:
        arguments["feature_scale"] = None
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(**arguments)


@pytest.mark.parametrize("feature_scale", [None, 2.0, [1.0, 2.0, 3.0], "std", "range"], ids=repr)
def test_an_immutable_feature_has_scale_zero(feature_scale, generator):
    X = rand((20, 3), generator)
    plain = resolve_feature_scale(feature_scale, X)
    plain = torch.ones(3, dtype=DOUBLE) if plain is None else plain
    expected = plain * torch.tensor([1.0, 0.0, 1.0], dtype=DOUBLE)
    for mutable in ([0, 2], [True, False, True]):
        scale = resolve_feature_scale(feature_scale, X, mutable)
        assert scale.dtype == X.dtype
        assert torch.equal(scale, expected)
        fitted = fit_feature_scale(feature_scale, X)
        assert torch.equal(resolve_feature_scale(fitted, X[:2], mutable), expected)


@pytest.mark.parametrize("norm", BALL_NORMS)
@pytest.mark.parametrize("bounds", [None, (-5.0, 5.0)])
def test_an_adversary_leaves_immutable_features_alone(norm, bounds, generator):
    X = rand((10, 4), generator)
    scale = resolve_feature_scale(None, X, mutable=[1, 2])
    ball = Ball.around(X, norm=norm, eps=0.5, scale=scale, bounds=resolve_bounds(bounds, X))
    X_adv = ball.random_start(generator)
    for _ in range(3):
        X_adv = ascend(ball, X_adv, rand(X.shape, generator), 0.4)
        enforced = ball.enforce(X_adv)
        assert torch.equal(enforced[:, [0, 3]], X[:, [0, 3]])
        assert (enforced[:, [1, 2]] != X[:, [1, 2]]).any(1).all()


def test_bounds_that_float32_cannot_hold_are_rounded_inward():
    X = torch.zeros(3, 2)
    low, high = resolve_bounds(([-0.1, -0.3], [0.1, 0.3]), X)
    assert low.dtype == torch.float32
    assert (low.double() >= torch.tensor([-0.1, -0.3], dtype=DOUBLE)).all()
    assert (high.double() <= torch.tensor([0.1, 0.3], dtype=DOUBLE)).all()
    torch.testing.assert_close(high, torch.tensor([0.1, 0.3]))
    assert torch.equal(resolve_bounds((-0.5, 1.0), X)[0], torch.tensor(-0.5))


def test_values_of_channels_are_those_of_their_pixels():
    X = torch.zeros(2, 3, 4, 5)
    channels = np.array([0.1, 0.2, 0.3]).reshape(3, 1, 1)
    scale = resolve_feature_scale(channels, X)
    assert torch.equal(scale, torch.tensor(np.broadcast_to(channels, (3, 4, 5)), dtype=X.dtype))
    low, high = resolve_bounds((-channels, 1), X)
    torch.testing.assert_close(low, -scale)
    assert high == 1
    message = r"for each of the 60 features, or a shape that broadcasts to \(3, 4, 5\)"
    with pytest.raises(ValueError, match=message):
        resolve_feature_scale([0.1, 0.2, 0.3], X)
