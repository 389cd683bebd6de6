import numpy as np
import pytest
import torch

from skjacobian.ascent_steps import ascend, ascent_left, best_point, dual_length, steepest
from skjacobian.geometry import BALL_NORMS, Ball
from skjacobian.norms import rows, vector_norm
from tests.balls import DOUBLE, all_kinds_of_ball, case_of, kinds_of_ball, rand

DUAL = {"l1": "linf", "l2": "l2", "linf": "l1"}


@pytest.mark.parametrize("norm", BALL_NORMS)
@pytest.mark.parametrize("scaled", [None, True])
@pytest.mark.parametrize("shape", [(6,), (2, 3, 3)])
def test_the_steepest_step_has_unit_length_and_attains_the_dual_norm(
    norm, scaled, shape, generator
):
    case = case_of(norm, scale=scaled, shape=shape)
    gradient = rand(case.X.shape, generator)
    step = steepest(case.ball, gradient)
    scale = torch.ones(shape, dtype=DOUBLE) if case.scale is None else case.scale
    one = torch.ones(len(step), dtype=DOUBLE)
    torch.testing.assert_close(vector_norm(step / scale, norm), one)
    climbed = (gradient * step).flatten(1).sum(1)
    torch.testing.assert_close(climbed, vector_norm(gradient * scale, DUAL[norm]))


@pytest.mark.parametrize("norm", BALL_NORMS)
@pytest.mark.parametrize("scaled", [None, True])
def test_a_zero_gradient_gives_no_step(norm, scaled):
    ball = case_of(norm, scale=scaled).ball
    zero = torch.zeros_like(ball.X)
    assert torch.equal(steepest(ball, zero), zero)
    torch.testing.assert_close(ascend(ball, ball.X, zero, 1.0), ball.X, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-42])
@pytest.mark.parametrize("norm", BALL_NORMS)
def test_a_tiny_gradient_gives_a_full_step(norm, size, generator):
    X = torch.zeros(3, 5)
    ball = Ball.around(X, norm=norm, eps=1.0)
    step = steepest(ball, size * (1 + torch.rand(3, 5, generator=generator)))
    torch.testing.assert_close(vector_norm(step, norm), torch.ones(3))


@all_kinds_of_ball
def test_ascending_is_a_steepest_step_and_a_projection(kind, generator):
    case = case_of(**kind)
    ball = case.ball
    start, gradient = ball.random_start(generator), rand(ball.X.shape, generator)
    if kind["norm"] == "l1":  # towards the best point of the set, which is inside by itself
        step = best_point(ball, gradient) - start
        length = rows(ball.distance(ball.X + step), step)
        expected = start + (0.2 / length).clamp(max=1.0) * step
    else:
        step = 0.2 * steepest(ball, gradient)
        if kind["norm"] == "l2" and case.bounds is not None:
            # What the box does not let follow is no part of the length of a step.
            scaled = gradient if case.scale is None else case.scale * gradient
            follows = torch.where(gradient > 0, start < 1, start > 0)
            assert not follows.all()
            share = vector_norm(follows * scaled, "l2") / vector_norm(scaled, "l2")
            step = step / rows(share, step)
        expected = ball.project(start + step)
    torch.testing.assert_close(ascend(ball, start, gradient.clone(), 0.2), expected)


@pytest.mark.parametrize("norm", BALL_NORMS)
@pytest.mark.parametrize("scaled", [None, True])
def test_the_dual_length_is_the_most_that_a_unit_step_climbs(norm, scaled, generator):
    ball = case_of(norm, scale=scaled).ball
    gradient = rand(ball.X.shape, generator)
    climbed = (gradient * steepest(ball, gradient)).sum(1)
    torch.testing.assert_close(dual_length(ball, gradient), climbed)


@all_kinds_of_ball
def test_no_point_of_the_set_climbs_more_than_the_ascent_left(kind, generator):
    case = case_of(**kind, n=3)
    gradient = rand(case.X.shape, generator)
    start = case.ball.random_start(generator)
    left = ascent_left(case.ball, start, gradient.clone())
    assert (left >= 0).all()
    for size in (0.3, 3.0, 100.0):
        for _ in range(100):
            direction = gradient + size * rand(case.X.shape, generator)
            other = case.ball.project(case.X + size * direction)
            climbed = (gradient * (other - start)).flatten(1).sum(1)
            assert (climbed <= left + 1e-9).all()


@pytest.mark.parametrize("norm", BALL_NORMS)
@pytest.mark.parametrize("scaled", [None, True])
def test_no_ascent_is_left_at_the_best_point(norm, scaled, generator):
    ball = case_of(norm, scale=scaled).ball
    gradient = rand(ball.X.shape, generator)
    best = ball.project(ball.X + ball.eps * steepest(ball, gradient))
    assert (ascent_left(ball, best, gradient.clone()) <= 1e-9).all()
    there = ascent_left(ball, ball.X, gradient.clone())
    torch.testing.assert_close(there, (gradient * (best - ball.X)).flatten(1).sum(1))


def greedy_optimum(case, g):
    """max gᵀ(x - X) over each l1 set: features filled to their bounds in order of |scale g|."""
    scale = np.ones(g.shape) if case.scale is None else case.scale.numpy()
    low, high = (-np.inf, np.inf) if case.bounds is None else (b.numpy() for b in case.bounds)
    optimum = []
    for x in case.X.numpy():
        left, climbed = case.eps, 0.0
        room = np.where(g > 0, high - x, x - low) / scale
        for j in np.argsort(-np.abs(scale * g)):
            length = min(left, room[j])
            left, climbed = left - length, climbed + abs(scale[j] * g[j]) * length
        optimum.append(climbed)
    return torch.tensor(optimum, dtype=DOUBLE)


@pytest.mark.parametrize("n_steps", [20, 100])
@pytest.mark.parametrize("eps", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("scaled", [None, True])
def test_l1_ascent_reaches_the_optimum_of_a_linear_function(
    scaled, bounds, eps, n_steps, generator
):
    case = case_of("l1", eps=eps, scale=scaled, bounds=bounds, shape=(12,))
    case.X[:, ::3] = case.X[:, ::3].round()  # a third of the features lie on the box
    case.ball = Ball.around(case.X, norm="l1", eps=eps, scale=case.scale, bounds=case.bounds)
    g = rand((12,), generator)
    X_adv = case.ball.random_start(generator)
    for step in range(n_steps):
        step_size = 2 * eps * (1 - step / n_steps) ** 2
        X_adv = ascend(case.ball, X_adv, g.expand_as(X_adv).clone(), step_size)
    X_adv = case.ball.enforce(X_adv)
    assert case.ball.contains(X_adv).all()
    climbed = (X_adv - case.X) @ g
    torch.testing.assert_close(climbed, greedy_optimum(case, g.numpy()), rtol=0, atol=1e-9)


@kinds_of_ball("l1")
def test_the_best_point_of_an_l1_ball_is_inside_and_best(kind, generator):
    case = case_of(**kind, n=3)
    gradient = rand(case.X.shape, generator)
    best = best_point(case.ball, gradient.clone())
    assert (case.ball.distance(best) <= case.eps * (1 + 1e-12)).all()
    climbed = (gradient * (best - case.X)).flatten(1).sum(1)
    for _ in range(200):
        other = case.ball.enforce(case.X + 0.3 * rand(case.X.shape, generator))
        assert ((gradient * (other - case.X)).flatten(1).sum(1) <= climbed + 1e-12).all()
