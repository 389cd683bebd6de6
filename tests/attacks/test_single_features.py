import pytest
import torch

from skjacobian.attacks import APGD, FMN, PGD
from skjacobian.attacks._search import Search
from skjacobian.attacks._single_features import ranked_vertices, vertex
from skjacobian.geometry import Ball
from tests.balls import DOUBLE, case_of, kinds_of_ball
from tests.seeds import seeded

N_FEATURES = 12


@kinds_of_ball("l1", "l2")
def test_at_a_vertex_one_feature_alone_has_changed_as_far_as_it_may(kind):
    ball = case_of(**kind).ball
    n_features = ball.X.shape[1:].numel()
    for which in range(2 * n_features):
        point = vertex(ball, torch.full((len(ball.X),), which))
        delta = (point - ball.X).flatten(1)
        others = torch.arange(n_features) != which % n_features
        assert (delta[:, others] == 0).all()
        assert ball.contains(ball.enforce(point)).all()
        rises = which < n_features
        assert ((delta >= 0) if rises else (delta <= 0)).all()
        at_side = torch.zeros(len(delta), dtype=torch.bool)
        if ball.box is not None:
            side = (ball.box.high if rises else ball.box.low).flatten(1)[:, which % n_features]
            at_side = (point.flatten(1)[:, which % n_features] - side).abs() < 1e-9
        is_full = (ball.length_of(point - ball.X) - ball.eps).abs() < 1e-9
        assert (at_side | is_full).all()


def test_features_that_may_not_change_have_no_vertex():
    scale = torch.tensor([1.0, 0.0, 2.0, 0.0])
    ball = Ball.around(torch.zeros(1, 4), norm="l1", eps=1.0, scale=scale)
    points = torch.cat([vertex(ball, torch.tensor([which])) for which in range(4)])
    expected = [[1, 0, 0, 0], [0, 0, 2, 0], [-1, 0, 0, 0], [0, 0, -2, 0]]
    torch.testing.assert_close(points, torch.tensor(expected).to(points))


def bowls(n_samples=60, seed=0):
    """A model that is wrong where the sum of w_j x_j² is above 1, and samples around 0.

    The largest sum in an l1 ball is at a vertex, and each vertex is a local optimum.
    """
    generator = seeded(seed)
    w = 0.5 + torch.rand(N_FEATURES, generator=generator, dtype=DOUBLE)
    X = 0.02 * torch.randn(n_samples, N_FEATURES, generator=generator, dtype=DOUBLE)

    def model(X):
        lead = X.square() @ w - 1
        return torch.stack([torch.zeros_like(lead), lead], dim=1)

    return model, X, torch.zeros(n_samples, dtype=torch.long), w


def distance_to_bowl(X, w):
    """The exact l1 distance: by one feature alone, as the level sets are convex."""
    level = X.square() @ w
    rest = level.unsqueeze(1) - w * X.square()
    return (((1 - rest) / w).sqrt() - X.abs()).amin(1)


def test_vertices_are_ranked_by_their_margins():
    model, X, y, w = bowls()
    ball = Ball.around(X, norm="l1", eps=0.5)
    search = Search(model, ball, y)
    seen = []

    def keep(X_adv, found):
        search.keep(X_adv, found)
        seen.append(X_adv.square() @ w - 1)

    ranked = ranked_vertices(search, lambda: search.ball, keep)
    margins = torch.stack(seen, dim=1)
    torch.testing.assert_close(margins.gather(1, ranked), margins.sort(1, descending=True).values)
    assert (search.best <= 0).all()
    torch.testing.assert_close(search.best, margins.amax(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attack", [PGD(n_restarts="auto"), PGD(n_restarts=2), APGD(n_restarts=2)])
def test_attacks_find_the_feature_that_alone_fools(attack):
    model, X, y, w = bowls()
    exact = distance_to_bowl(X, w)
    for share, fooled in ((1.001, True), (0.999, False)):
        attack = attack.set_params(norm="l1", eps=share * exact)
        found = attack.search(model, X, y, generator=seeded())
        assert (found.fooled == fooled).all()


def test_one_search_from_a_random_point_misses_the_feature_that_alone_fools():
    model, X, y, w = bowls()
    attack = PGD(norm="l1", eps=1.001 * distance_to_bowl(X, w))
    assert attack.search(model, X, y, generator=seeded()).fooled.double().mean() < 0.7


def test_distances_are_those_by_single_features():
    model, X, y, w = bowls()
    distances = FMN(norm="l1").distances(model, X, y, generator=seeded())
    torch.testing.assert_close(distances, distance_to_bowl(X, w), rtol=1e-3, atol=0)
