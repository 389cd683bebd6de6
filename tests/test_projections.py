import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linprog

from skjacobian.projections import best_l1_vertex, project_l1, project_l1_box, project_l2_box

DOUBLE = torch.float64


def rand(shape, generator, dtype=DOUBLE):
    return torch.randn(shape, generator=generator, dtype=dtype)


@st.composite
def points_and_boxes(draw):
    n_features = draw(st.integers(1, 12))
    values = st.just(0.0) | st.floats(1e-3, 1e3)

    def arrays(elements):
        return draw(hnp.arrays(np.float64, n_features, elements=elements))

    z = arrays(values) * arrays(st.sampled_from([-1.0, 1.0]))
    bounds = values | st.just(np.inf)
    return z, draw(values), -arrays(bounds), arrays(bounds)


def rows_of_one(*arrays):
    return [torch.from_numpy(array).unsqueeze(0) for array in arrays]


def feasible_points(rng, eps, low, high, order):
    """Points of ball ∩ box, many of them on its boundary."""
    Q = rng.normal(size=(50, len(low))) * 10.0 ** rng.uniform(-3, 3, (50, 1))
    Q = np.clip(Q, low, high)
    length = np.linalg.norm(Q, order, axis=1, keepdims=True)
    return Q * np.minimum(1.0, eps / np.where(length > 0, length, 1.0))


# --- l2 ----------------------------------------------------------------------------------


def bisected_projection(z, eps, low, high):
    """Slow oracle: clip(t z) with the largest t in [0, 1] that the ball allows."""

    def clipped(t):
        return np.clip(t * z, low, high)

    if np.linalg.norm(clipped(1.0)) <= eps:
        return clipped(1.0)
    inside, outside = 0.0, 1.0
    for _ in range(200):
        middle = (inside + outside) / 2
        if np.linalg.norm(clipped(middle)) <= eps:
            inside = middle
        else:
            outside = middle
    return clipped(inside)


@given(points_and_boxes())
@settings(deadline=None, max_examples=150)
def test_l2_projection_on_ball_and_box_agrees_with_bisection(case):
    z, eps, low, high = case
    Z, lower, upper = rows_of_one(z, low, high)
    projected = project_l2_box(Z, eps, lower, upper)[0].numpy()
    expected = bisected_projection(z, eps, low, high)
    np.testing.assert_allclose(projected, expected, rtol=1e-6, atol=1e-9)
    assert np.linalg.norm(projected) <= eps * (1 + 1e-12)
    assert ((low <= projected) & (projected <= high)).all()


@given(points_and_boxes(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_no_feasible_point_is_nearer_than_the_l2_projection(case, seed):
    # The variational inequality: a projection p of z on a convex set has (z - p)(q - p) <= 0
    # for every q of the set. It does not rest on the form of the solution, as bisection does.
    z, eps, low, high = case
    p = project_l2_box(*rows_of_one(z), eps, *rows_of_one(low, high))[0].numpy()
    Q = feasible_points(np.random.default_rng(seed), eps, low, high, 2)
    size = max(1.0, np.linalg.norm(z))
    assert ((Q - p) @ (z - p) <= 1e-6 * size * max(1.0, eps)).all()


def test_l2_projection_on_ball_and_box_is_exact_for_each_of_many_rows(generator):
    Z = rand((200, 30), generator) * 10 ** rand((200, 1), generator)
    low, high = -rand((200, 30), generator).abs(), rand((200, 30), generator).abs()
    eps = torch.rand(200, 1, generator=generator, dtype=DOUBLE) * 5
    projected = project_l2_box(Z, eps, low, high)
    arguments = (value.numpy() for value in (Z, eps, low, high))
    expected = [bisected_projection(*row) for row in zip(*arguments, strict=True)]
    np.testing.assert_allclose(projected, np.stack(expected), rtol=1e-6, atol=1e-9)


def test_l2_projection_is_exact_where_newtons_method_needs_many_steps():
    # Features of all magnitudes that are clipped one after the other, each a new slope.
    n_features = 40
    z = 2.0 ** -np.arange(n_features) * 2.0**n_features
    box, eps = np.ones(n_features), np.sqrt(0.95 * n_features)
    projected = project_l2_box(*rows_of_one(z), eps, *rows_of_one(-box, box))[0].numpy()
    np.testing.assert_allclose(projected, bisected_projection(z, eps, -box, box), rtol=1e-6)


def test_l2_projection_without_a_binding_box_is_the_radial_one(generator):
    Z = rand((20, 6), generator) * 3
    far = torch.full_like(Z, torch.inf)
    expected = Z * (1.5 / Z.norm(dim=1, keepdim=True)).clamp(max=1.0)
    torch.testing.assert_close(project_l2_box(Z, 1.5, -far, far), expected)


@given(points_and_boxes())
@settings(deadline=None, max_examples=50)
def test_l2_projection_on_ball_and_box_leaves_points_inside_alone(case):
    z, eps, low, high = case
    Z, lower, upper = rows_of_one(bisected_projection(z, eps, low, high) * (1 - 1e-9), low, high)
    torch.testing.assert_close(project_l2_box(Z, eps, lower, upper), Z, rtol=1e-12, atol=0)


# --- l1 ----------------------------------------------------------------------------------


def bisected_soft_threshold(z, eps, low, high):
    """Slow oracle: clip(sign(z) max(|z| - t, 0)) with the least t >= 0 that the ball allows."""

    def clipped(t):
        return np.clip(np.sign(z) * np.maximum(np.abs(z) - t, 0.0), low, high)

    if np.abs(clipped(0.0)).sum() <= eps:
        return clipped(0.0)
    outside, inside = 0.0, np.abs(z).max()
    for _ in range(200):
        middle = (inside + outside) / 2
        if np.abs(clipped(middle)).sum() <= eps:
            inside = middle
        else:
            outside = middle
    return clipped(inside)


def sorted_soft_threshold(z, eps):
    """Duchi et al. (ICML 2008, figure 1): the projection on the l1 ball, by sorting."""
    if np.abs(z).sum() <= eps:
        return z
    largest = np.sort(np.abs(z))[::-1]
    t = (np.cumsum(largest) - eps) / np.arange(1, len(z) + 1)
    t = t[np.flatnonzero(largest > t)[-1]] if eps > 0 else largest[0]
    return np.sign(z) * np.maximum(np.abs(z) - t, 0.0)


def projected_l1(z, eps, low, high):
    return project_l1_box(*rows_of_one(z), eps, *rows_of_one(low, high))[0].numpy()


@given(points_and_boxes())
@settings(deadline=None, max_examples=300)
def test_l1_projection_on_ball_and_box_agrees_with_bisection(case):
    z, eps, low, high = case
    projected = projected_l1(z, eps, low, high)
    expected = bisected_soft_threshold(z, eps, low, high)
    np.testing.assert_allclose(projected, expected, rtol=1e-9, atol=1e-11)
    assert np.abs(projected).sum() <= eps * (1 + 1e-14)
    assert ((low <= projected) & (projected <= high)).all()


@given(points_and_boxes(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=100)
def test_no_feasible_point_is_nearer_than_the_l1_projection(case, seed):
    # The variational inequality, which does not rest on the form of the solution.
    z, eps, low, high = case
    p = projected_l1(z, eps, low, high)
    Q = feasible_points(np.random.default_rng(seed), eps, low, high, 1)
    size = max(1.0, np.abs(z).max())
    assert ((Q - p) @ (z - p) <= 1e-11 * size * max(1.0, eps)).all()


@given(points_and_boxes())
@settings(deadline=None, max_examples=100)
def test_l1_projection_on_the_ball_alone_agrees_with_sorting(case):
    z, eps, _, _ = case
    expected = sorted_soft_threshold(z, eps)
    projected = project_l1(*rows_of_one(z), eps)[0].numpy()
    np.testing.assert_allclose(projected, expected, rtol=1e-9, atol=1e-11)
    assert np.abs(projected).sum() <= eps * (1 + 1e-14)
    far = np.full_like(z, np.inf)
    np.testing.assert_allclose(projected_l1(z, eps, -far, far), expected, rtol=1e-9, atol=1e-11)


@given(points_and_boxes())
@settings(deadline=None, max_examples=50)
def test_projecting_twice_on_the_l1_ball_and_box_is_projecting_once(case):
    z, eps, low, high = case
    once = projected_l1(z, eps, low, high)
    twice = projected_l1(once, eps, low, high)
    # To the rounding of the sum, which a small number next to large ones feels.
    np.testing.assert_allclose(twice, once, rtol=1e-13, atol=1e-15 * np.abs(once).sum())


@given(points_and_boxes())
@settings(deadline=None, max_examples=50)
def test_l1_projection_leaves_points_inside_alone(case):
    z, eps, low, high = case
    inside = bisected_soft_threshold(z, eps, low, high) * (1 - 1e-9)
    assert np.array_equal(projected_l1(inside, eps, low, high), inside)
    assert np.array_equal(project_l1(*rows_of_one(inside), eps)[0], inside)


@pytest.mark.parametrize("n_features", [3, 30, 784])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0], ids=["even", "uneven", "all magnitudes"])
def test_l1_projection_is_exact_for_each_of_many_rows(n_features, spread, generator):
    shape = 60, n_features
    Z = rand(shape, generator).sign() * 10 ** (spread * rand(shape, generator))
    low, high = (10 ** (rand(shape, generator) - 1) for _ in range(2))
    low *= -(torch.rand(shape, generator=generator) > 0.5).double()
    high[torch.rand(shape, generator=generator) > 0.8] = torch.inf
    eps = 10 ** rand((60, 1), generator)
    eps[0] = 0.0
    Z[1] = 0.0
    Z[2] = Z[2].sign()  # ties
    arguments = [value.numpy() for value in (Z, eps, low, high)]
    # The oracles round t like a number of the size of the largest |z|.
    atol = 1e-10 + 4 * np.finfo(float).eps * np.abs(arguments[0]).max(1, keepdims=True)
    projected = project_l1_box(Z, eps, low, high)
    expected = [bisected_soft_threshold(*row) for row in zip(*arguments, strict=True)]
    assert (np.abs(projected.numpy() - np.stack(expected)) <= atol).all()
    expected = [sorted_soft_threshold(z, e) for z, e in zip(*arguments[:2], strict=True)]
    # Whose sums round like Σ|z|.
    assert (np.abs(project_l1(Z, eps).numpy() - np.stack(expected)) <= atol * n_features).all()
    length = projected.abs().sum(1, keepdim=True)
    assert (length <= eps * (1 + 1e-13)).all()
    assert (projected[0] == 0).all()
    assert (project_l1(Z, eps)[0] == 0).all()


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("boxed", [False, True])
def test_l1_projection_in_float32_rounds_like_its_result_not_like_the_point(size, boxed, generator):
    # Sums of numbers of the point's size would put the result off by their own rounding.
    Z = size * rand((50, 300), generator, torch.float32)
    box = torch.rand(50, 300, generator=generator) if boxed else torch.full_like(Z, torch.inf)
    projected = project_l1_box(Z, 2.0, -box, box) if boxed else project_l1(Z, 2.0)
    arguments = [value.double().numpy() for value in (Z, -box, box)]
    expected = np.stack(
        [
            bisected_soft_threshold(z, 2.0, low, high)
            for z, low, high in zip(*arguments, strict=True)
        ]
    )
    np.testing.assert_allclose(projected, expected, rtol=0, atol=2e-6)
    assert max(math.fsum(row) for row in projected.abs().tolist()) <= 2 + 4e-6


def test_l1_projection_of_a_row_does_not_depend_on_the_others(generator):
    Z, one = rand((40, 20), generator), torch.ones(40, 20, dtype=DOUBLE)
    together = project_l1_box(Z, 2.0, -one, one)
    for i in (0, 7):
        alone = project_l1_box(Z[i : i + 1], 2.0, -one[:1], one[:1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-14)


def test_l1_projection_of_nothing_or_of_nan_ends():
    empty, nan = torch.empty(0, 5), torch.full((2, 300), torch.nan)
    assert project_l1(empty, 1.0).shape == project_l1_box(empty, 1.0, empty, empty).shape == (0, 5)
    one = torch.ones_like(nan)
    assert project_l1(nan, 1.0).isnan().all()
    assert project_l1_box(nan, 1.0, -one, one).isnan().all()


# --- the best vertex ---------------------------------------------------------------------


def programmed_optimum(g, eps, low, high):
    """max {gᵀu : ‖u‖₁ <= eps, low <= u <= high} by linear programming in (u⁺, u⁻)."""
    sides = [(0.0, side if np.isfinite(side) else None) for side in (*high, *-low)]
    solved = linprog(np.r_[-g, g], A_ub=np.ones((1, 2 * len(g))), b_ub=[eps], bounds=sides)
    assert solved.success
    return -solved.fun


@given(points_and_boxes())
@settings(deadline=None, max_examples=150)
def test_the_best_vertex_agrees_with_linear_programming(case):
    g, eps, low, high = case
    u = best_l1_vertex(*rows_of_one(g), eps, *rows_of_one(low, high))[0].numpy()
    assert np.abs(u).sum() <= eps * (1 + 1e-14)
    assert ((low <= u) & (u <= high)).all()
    assert (u[g == 0] == 0).all()
    np.testing.assert_allclose(g @ u, programmed_optimum(g, eps, low, high), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("eps", [0.0, 0.3, 5.0, 60.0, 1e4])
def test_the_best_vertex_is_found_however_many_features_it_fills(eps, generator):
    G = rand((20, 500), generator)
    low, high = -torch.rand(20, 500, generator=generator), torch.rand(20, 500, generator=generator)
    low, high = low.double(), high.double()
    U = best_l1_vertex(G, eps, low, high)
    for g, u, lower, upper in zip(*(v.numpy() for v in (G, U, low, high)), strict=True):
        assert np.abs(u).sum() <= eps * (1 + 1e-12)
        assert ((lower <= u) & (u <= upper)).all()
        expected = programmed_optimum(g, eps, lower, upper)
        np.testing.assert_allclose(g @ u, expected, rtol=1e-9, atol=1e-9)


def test_without_a_box_the_best_vertex_is_the_steepest_feature(generator):
    G = rand((30, 7), generator)
    eps = torch.rand(30, 1, generator=generator, dtype=DOUBLE)
    U = best_l1_vertex(G, eps)
    assert ((U != 0).sum(1) == 1).all()
    torch.testing.assert_close((G * U).sum(1), eps[:, 0] * G.abs().amax(1))
    assert (best_l1_vertex(torch.zeros(2, 3), 1.0) == 0).all()


def test_l2_projection_is_exact_between_bounds_that_nearly_agree():
    Z = torch.tensor([[1e4, 1e3, 1e3, 0.1]], dtype=torch.float64)
    high = torch.tensor([[1.0, 1.0, 1 + 2e-7, torch.inf]], dtype=torch.float64)
    u = project_l2_box(Z, (3 + 7e-7) ** 0.5, -high, high)
    free = 3 + 7e-7 - high[0, :3].square().sum()
    assert u[0, 3].item() == pytest.approx(free.sqrt().item(), rel=1e-3)
