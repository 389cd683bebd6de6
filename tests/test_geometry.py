import math
import re
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from skjacobian.ascent_steps import ascend
from skjacobian.geometry import BALL_NORMS, Ball
from skjacobian.norms import vector_norm
from skjacobian.threat_model import resolve_bounds
from skjacobian.validity import Box
from tests.balls import DOUBLE, all_kinds_of_ball, case_of, rand

SHAPES = [(1,), (5,), (40,), (3, 4), (2, 3, 3)]


def is_inside(X_adv, case):
    """Membership in ball and box in plain numpy float64, with no tolerance."""
    X, X_adv = (np.asarray(value.double()).reshape(len(value), -1) for value in (case.X, X_adv))
    delta = np.abs(X_adv - X)
    if case.scale is not None:
        scale = np.asarray(case.scale.double()).ravel()
        assert (delta[:, scale == 0] == 0).all()
        delta = delta[:, scale > 0] / scale[scale > 0]
    length = {
        "linf": delta.max(1, initial=0.0),
        "l2": np.sqrt((delta**2).sum(1)),
        "l1": delta.sum(1),
    }[case.norm]
    eps = np.asarray(case.eps, dtype=np.float64)
    inside = (length <= eps) & np.isfinite(X_adv).all(1)
    if case.bounds is not None:
        low, high = (np.asarray(side.double()).ravel() for side in case.bounds)
        inside &= ((X_adv >= low) & (X_adv <= high)).all(1)
    return inside


@st.composite
def threat_models(draw, norms=BALL_NORMS):
    """Any ball: dtype, shape, offset, radius, scale with zeros, box; `points` to enforce."""
    dtype = draw(st.sampled_from([torch.float32, DOUBLE]))
    shape = draw(st.sampled_from(SHAPES))
    norm = draw(st.sampled_from(norms))
    eps = draw(st.just(0.0) | st.floats(-25, 12).map(lambda power: 10.0**power))
    offset = draw(st.sampled_from([0.0, 1.0, 1e3, 1e6]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    X = (offset * torch.randn(shape, generator=generator) + rand((4, *shape), generator)).to(dtype)
    scale = bounds = None
    if draw(st.booleans()):
        scale = (10 ** rand(shape, generator)).to(dtype)
        scale *= torch.rand(shape, generator=generator) > 0.2
    if draw(st.booleans()):
        width = [10 ** rand(shape, generator).to(dtype) for _ in range(2)]
        on_bound = [(torch.rand(shape, generator=generator) > 0.3).to(dtype) for _ in range(2)]
        bounds = X.amin(0) - width[0] * on_bound[0], X.amax(0) + width[1] * on_bound[1]
        if draw(st.booleans()):
            bounds = bounds[0], torch.full_like(bounds[1], torch.inf)
    spread = min(eps, 1e6) * draw(st.sampled_from([0.0, 0.1, 1.0, 1e3]))
    points = X + (spread * rand(X.shape, generator)).to(dtype)
    ball = Ball.around(X, norm=norm, eps=eps, scale=scale, bounds=bounds)
    return SimpleNamespace(
        X=X, norm=norm, eps=eps, scale=scale, bounds=bounds, ball=ball, points=points
    )


# --- the ball ----------------------------------------------------------------------------


@all_kinds_of_ball
def test_projection_leaves_points_inside_alone(kind, generator):
    case = case_of(**kind)
    X_adv = case.ball.enforce(case.X + 0.05 * rand(case.X.shape, generator))
    torch.testing.assert_close(case.ball.project(X_adv), X_adv, rtol=1e-14, atol=1e-14)


@all_kinds_of_ball
def test_projecting_twice_is_projecting_once(kind, generator):
    ball = case_of(**kind).ball
    once = ball.project(ball.X + rand(ball.X.shape, generator))
    torch.testing.assert_close(ball.project(once), once, rtol=1e-12, atol=1e-12)


@all_kinds_of_ball
def test_projection_lands_inside_up_to_rounding(kind, generator):
    case = case_of(**kind)
    X_adv = case.ball.project(case.X + rand(case.X.shape, generator))
    assert (case.ball.distance(X_adv) <= case.eps * (1 + 1e-12)).all()
    if case.bounds is not None:
        assert X_adv.min() >= -1e-15
        assert X_adv.max() <= 1 + 1e-15


@all_kinds_of_ball
def test_projection_finds_the_nearest_point_in_scaled_coordinates(kind, generator):
    case = case_of(**kind)
    Z = case.X + rand(case.X.shape, generator)
    P = case.ball.project(Z)
    scale = 1.0 if case.scale is None else case.scale
    for _ in range(100):
        Q = case.ball.enforce(case.X + 0.3 * rand(case.X.shape, generator))
        obtuse = ((Z - P) / scale * (Q - P) / scale).flatten(1).sum(1)
        assert (obtuse <= 1e-10).all()


@given(threat_models())
@settings(deadline=None, max_examples=200)
def test_enforced_points_are_inside_with_no_tolerance(case):
    X_adv = case.ball.enforce(case.points)
    assert case.ball.contains(X_adv).all()
    assert is_inside(X_adv, case).all()
    assert X_adv.dtype == case.X.dtype


@given(threat_models(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=200)
def test_iterates_are_inside_once_enforced(case, seed):
    ball, generator = case.ball, torch.Generator().manual_seed(seed)
    start = ball.random_start(generator)
    gradient = rand(case.X.shape, generator, case.X.dtype)
    for X_adv in (start, ball.project(case.points), ascend(ball, start, gradient, 2 * case.eps)):
        enforced = ball.enforce(X_adv)
        assert ball.contains(enforced).all()
        assert is_inside(enforced, case).all()


@given(threat_models())
@settings(deadline=None, max_examples=100)
def test_enforcing_moves_points_inside_by_rounding_errors_at_most(case):
    X_adv = case.ball.enforce(case.points)
    ulp = torch.finfo(X_adv.dtype).eps
    moved = (case.ball.enforce(X_adv) - X_adv).abs()
    assert (moved <= 8 * ulp * (case.X.abs() + (X_adv - case.X).abs())).all()


@given(threat_models())
@settings(deadline=None, max_examples=100)
def test_the_ball_contains_its_center(case):
    assert case.ball.contains(case.X).all()
    assert (case.ball.distance(case.X) == 0).all()


@pytest.mark.parametrize("norm", BALL_NORMS)
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("eps", [1e19, 1e30, 1e38])
def test_a_huge_radius_gives_finite_points(norm, bounds, eps, generator):
    X = torch.rand(4, 6, generator=generator)
    ball = Ball.around(X, norm=norm, eps=eps, bounds=resolve_bounds(bounds, X))
    X_adv = ball.enforce(ball.random_start(generator))
    assert torch.isfinite(X_adv).all()
    assert ball.contains(X_adv).all()


@all_kinds_of_ball
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_ball_of_radius_zero_holds_the_center_only(kind, dtype, generator):
    case = case_of(**kind, eps=0.0)
    X = case.X.to(dtype)
    scale = None if case.scale is None else case.scale.to(dtype)
    bounds = None if case.bounds is None else tuple(side.to(dtype) for side in case.bounds)
    ball = Ball.around(X, norm=case.norm, eps=0.0, scale=scale, bounds=bounds)
    moved = X + rand(X.shape, generator, dtype)
    assert torch.equal(ball.enforce(moved), X)
    assert torch.equal(ball.project(moved), X)
    assert torch.equal(ball.enforce(ball.random_start(generator)), X)
    assert torch.equal(ascend(ball, X, moved.clone(), 1.0), X)
    assert not ball.contains(moved).any()


@all_kinds_of_ball
def test_contains_tells_inside_from_outside(kind, generator):
    case = case_of(**kind)
    for size in (0.02, 0.1, 0.3, 1.0):
        X_adv = case.X + size * rand(case.X.shape, generator)
        assert np.array_equal(case.ball.contains(X_adv), is_inside(X_adv, case))


@pytest.mark.parametrize("norm", BALL_NORMS)
def test_a_feature_of_scale_zero_is_held_fixed(norm, generator):
    X = rand((6, 4), generator)
    scale = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=DOUBLE)
    ball = Ball.around(X, norm=norm, eps=0.7, scale=scale)
    moved = X + rand(X.shape, generator)
    for X_adv in (
        ball.project(moved),
        ball.enforce(ball.project(moved)),
        ball.random_start(generator),
        ascend(ball, X, moved.clone(), 0.5),
    ):
        assert torch.equal(X_adv[:, [1, 3]], X[:, [1, 3]])
        assert ((X_adv - X)[:, [0, 2]] != 0).any(1).all()
    assert ball.distance(moved).isinf().all()


@pytest.mark.parametrize("norm", BALL_NORMS)
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("scaled", [None, True])
def test_one_radius_per_sample_equals_separate_balls(norm, bounds, scaled, generator):
    radii = [0.0, 0.25, 0.5, 2.0]
    case = case_of(norm, scale=scaled, bounds=bounds, n=4)
    ball = Ball.around(
        case.X,
        norm=norm,
        eps=torch.tensor(radii, dtype=DOUBLE),
        scale=case.scale,
        bounds=case.bounds,
    )
    points = case.X + rand(case.X.shape, generator)
    for i, eps in enumerate(radii):
        alone = Ball.around(
            case.X[i : i + 1], norm=norm, eps=eps, scale=case.scale, bounds=case.bounds
        )
        for method in ("project", "enforce"):
            together = getattr(ball, method)(points)[i : i + 1]
            torch.testing.assert_close(together, getattr(alone, method)(points[i : i + 1]))
        starts = [b.random_start(torch.Generator().manual_seed(3)) for b in (ball, alone)]
        torch.testing.assert_close(starts[0][i : i + 1], starts[1])
        assert ball.contains(points)[i] == alone.contains(points[i : i + 1])[0]


@pytest.mark.parametrize("norm", BALL_NORMS)
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("scaled", [None, True])
@pytest.mark.parametrize("eps", [0.5, torch.linspace(0, 2, 8, dtype=DOUBLE)], ids=["one", "each"])
def test_chosen_rows_of_a_ball_are_the_ball_of_the_chosen_rows(norm, bounds, scaled, eps):
    case = case_of(norm, eps=eps, scale=scaled, bounds=bounds)
    index = torch.tensor([5, 0, 3])
    chosen = case.ball[index]
    rebuilt = Ball.around(
        case.X[index],
        norm=norm,
        eps=eps[index] if isinstance(eps, torch.Tensor) else eps,
        scale=case.scale,
        bounds=case.bounds,
    )
    for field in fields(Ball):
        one, other = getattr(chosen, field.name), getattr(rebuilt, field.name)
        if isinstance(other, torch.Tensor):
            assert torch.equal(one, other), field.name
        elif isinstance(other, Box):
            assert all(map(torch.equal, one, other)), field.name
        else:
            assert one == other, field.name


@pytest.mark.parametrize("eps", [-1, float("nan"), float("inf"), "a"])
def test_a_bad_radius_is_rejected(eps):
    message = re.escape(f"Got eps={eps!r}, but expected a non-negative finite number")
    with pytest.raises(ValueError, match=message):
        Ball.around(torch.zeros(1, 2), norm="l2", eps=eps)


@pytest.mark.parametrize("norm", ["l0", "l3", 2])
def test_an_unknown_ball_is_rejected(norm):
    message = rf"Got norm={norm!r}, but expected one of 'l2', 'linf', 'l1'"
    with pytest.raises(ValueError, match=message):
        Ball.around(torch.zeros(1, 2), norm=norm, eps=1.0)


@pytest.mark.parametrize("n_features", [10, 1000, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_an_enforced_l1_length_is_within_eps_however_it_is_summed(dtype, n_features, generator):
    X = rand((3, n_features), generator, dtype)
    ball = Ball.around(X, norm="l1", eps=1.0)
    for spread in (2 / n_features, 1.0):
        X_adv = ball.enforce(ball.project(X + spread * rand(X.shape, generator, dtype)))
        delta = (X_adv.double() - X.double()).abs().numpy()
        for row in delta:
            orders = row, row[::-1], np.sort(row), np.sort(row)[::-1]
            assert all(sum(order.tolist()) <= 1.0 for order in orders)
            assert math.fsum(row) <= 1.0
            assert math.fsum(row) > 0.95


@all_kinds_of_ball
def test_a_random_start_is_inside_up_to_rounding(kind, generator):
    case = case_of(**kind)
    for _ in range(20):
        start = case.ball.random_start(generator)
        assert (case.ball.distance(start) <= case.eps * (1 + 1e-12)).all()
        torch.testing.assert_close(case.ball.enforce(start), start, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", BALL_NORMS)
@pytest.mark.parametrize("scaled", [None, True])
def test_equal_rows_get_equal_starts_and_others_do_not(norm, scaled, generator):
    case = case_of(norm, scale=scaled)
    X = case.X[[0, 1, 0, 2, 1]]
    ball = Ball.around(X, norm=norm, eps=case.eps, scale=case.scale)
    delta = ball.random_start(generator) - X
    assert torch.equal(delta[0], delta[2])
    assert torch.equal(delta[1], delta[4])
    for i, j in ((0, 1), (0, 3), (1, 3)):
        assert (delta[i] - delta[j]).abs().max() > 1e-3


@pytest.mark.parametrize("order", ["rows first", "features first"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("norm", BALL_NORMS)
def test_the_start_of_a_row_does_not_depend_on_its_batch(norm, dtype, offset, order, generator):
    X = (offset + rand((33, 300), generator)).to(dtype)
    if order == "features first":  # the memory layout of what pandas hands out
        X = X.T.contiguous().T

    def starts(X):
        ball = Ball.around(X, norm=norm, eps=0.5)
        return ball.random_start(torch.Generator().manual_seed(1))

    together = starts(X)
    for rows_of_batch in ([5], [5, 6], list(range(32, -1, -1))):
        expected = together[rows_of_batch]
        torch.testing.assert_close(starts(X[rows_of_batch]), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(starts(X[rows_of_batch].clone()), expected, rtol=1e-6, atol=1e-6)


@all_kinds_of_ball
def test_the_same_seed_gives_the_same_start(kind):
    ball = case_of(**kind).ball
    starts = [ball.random_start(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def draw_starts(norm, eps, n_features, among, generator):
    """1000 starts: of one sample in many draws, or of many samples in one draw."""
    n_samples, n_draws = {"draws": (1, 1000), "samples": (1000, 1)}[among]
    X = rand((n_samples, n_features), generator)
    ball = Ball.around(X, norm=norm, eps=eps)
    return torch.cat([ball.random_start(generator) - X for _ in range(n_draws)]).numpy()


among_draws_and_samples = pytest.mark.parametrize("among", ["draws", "samples"])


@among_draws_and_samples
def test_random_starts_fill_the_linf_ball_uniformly(among, generator):
    starts = draw_starts("linf", 0.5, 3, among, generator)
    for column in starts.T:
        assert stats.kstest(column, stats.uniform(-0.5, 1.0).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(starts.T) - np.eye(3)).max() < 4 / np.sqrt(1000)


@among_draws_and_samples
@pytest.mark.parametrize("n_features", [1, 2, 5])
def test_random_starts_fill_the_l2_ball_uniformly(n_features, among, generator):
    starts = draw_starts("l2", 2.0, n_features, among, generator)
    share_of_volume = (np.linalg.norm(starts, axis=1) / 2.0) ** n_features
    assert stats.kstest(share_of_volume, "uniform").pvalue > 1e-3
    standard_error = starts.std(0) / np.sqrt(1000)
    assert (np.abs(starts.mean(0)) < 4 * standard_error).all()


@among_draws_and_samples
@pytest.mark.parametrize("n_features", [1, 2, 5])
def test_random_starts_fill_the_l1_ball_uniformly(n_features, among, generator):
    starts = draw_starts("l1", 2.0, n_features, among, generator)
    share_of_volume = (np.abs(starts).sum(1) / 2.0) ** n_features
    assert stats.kstest(share_of_volume, "uniform").pvalue > 1e-3
    for column in starts.T:
        # The slice at |u_j| = t is an l1 ball of radius eps - t in one dimension less, so
        # P(|u_j| > t) = (1 - t / eps)^n, of mean eps / (n + 1).
        size = np.abs(column) / 2.0
        assert stats.kstest(size, stats.beta(1, n_features).cdf).pvalue > 1e-3
        assert abs(size.mean() - 1 / (n_features + 1)) < 4 * size.std() / np.sqrt(1000)
    standard_error = starts.std(0) / np.sqrt(1000)
    assert (np.abs(starts.mean(0)) < 4 * standard_error).all()
    signs = np.sign(starts)
    assert np.abs(np.corrcoef(signs.T).reshape(n_features, -1) - np.eye(n_features)).max() < 0.13


@pytest.mark.parametrize("norm", BALL_NORMS)
def test_a_scale_only_changes_the_units(norm, generator):
    # A ball with a scale is the ball without one around the samples in units of the scale.
    case = case_of(norm, scale=True)
    plain = Ball.around(case.X / case.scale, norm=norm, eps=case.eps)
    points = case.X + rand(case.X.shape, generator)
    torch.testing.assert_close(
        case.ball.project(points), plain.project(points / case.scale) * case.scale
    )
    torch.testing.assert_close(case.ball.distance(points), plain.distance(points / case.scale))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_starts_are_as_far_out_as_the_features_that_may_move_allow(norm, generator):
    X = torch.rand(500, 40, generator=generator, dtype=torch.float64)
    scale = torch.zeros(40, dtype=torch.float64)
    scale[[3, 17]] = 2.0
    ball = Ball.around(X, norm=norm, eps=1.0, scale=scale)
    moved = (ball.random_start(generator) - X)[:, [3, 17]] / 2
    size = vector_norm(moved, norm)
    # Uniform in a ball of two dimensions: the share inside radius r is r².
    for radius in (0.3, 0.5, 0.8):
        assert abs((size < radius).double().mean() - radius**2) < 0.08
    assert ball.free_features().tolist() == [3, 17]
