"""The square attack against closed forms, brute force and a count of its own."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_wine
from sklearn.ensemble import RandomForestClassifier

from skjacobian.attacks import Square
from skjacobian.attacks._square_moves import (
    CornerMoves,
    MassMoves,
    draw_place,
    mosaic,
    pyramid,
    two_halves,
)
from skjacobian.geometry import Ball
from skjacobian.modules import MLP
from tests.attacks.problems import margins
from tests.seeds import seeded

NORMS = ["linf", "l2", "l1"]
every_norm = pytest.mark.parametrize("norm", NORMS)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed), dtype=torch.float64)


def make_net(n_features=6, n_classes=3, width=24, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MLP(n_features, n_classes, hidden_units=(width, width)).double().eval()
    with torch.no_grad():
        for layer in net[1:4:2]:
            layer.weight *= 3
        net[-1].bias -= net(uniform(100, n_features)).mean(0)  # all classes occur
    return net.requires_grad_(False)


class Counting:
    """A model that counts how often it sees each sample, which its first feature names."""

    def __init__(self, net, n):
        self.net, self.seen = net, torch.zeros(n, dtype=torch.long)

    def __call__(self, X):
        self.seen[X.flatten(1)[:, 0].round().long()] += 1
        return self.net(X.flatten(1)[:, 1:])


def dual_norm(w, norm):
    return torch.linalg.vector_norm(w, {"linf": 1, "l2": 2, "l1": torch.inf}[norm])


# --- what it finds -----------------------------------------------------------------------


def linear_problem(w):
    """Logits (5, wᵀx): far from the boundary, so that the attack runs to its end."""
    return lambda X: torch.stack([5 + 0 * X.flatten(1)[:, 0], X.flatten(1) @ w], 1)


# Patterns of images cannot be composed to any direction, as the best for l1 and l2 may be.
@pytest.mark.parametrize(
    ("norm", "shape", "scale", "bounds"),
    [
        ("linf", (6,), None, (0.0, 1.0)),
        ("linf", (2, 3), [0.2, 0.5, 1.0, 1.5, 2.0, 3.0], None),
        ("linf", (1, 2, 3), None, (0.0, 1.0)),
        ("l2", (6,), [0.2, 0.5, 1.0, 1.5, 2.0, 3.0], None),
        ("l1", (6,), None, (0.0, 1.0)),
        ("l1", (6,), [0.2, 0.5, 1.0, 1.5, 2.0, 3.0], None),
    ],
    ids=str,
)
def test_it_comes_near_the_optimum_of_a_linear_model_and_not_beyond(norm, bounds, scale, shape):
    X, eps = 0.3 + 0.4 * uniform(15, *shape), 0.1  # no bound within reach: one closed form
    w = torch.tensor([0.9, -0.4, 0.6, 0.1, -0.2, 0.5], dtype=torch.float64)
    s = torch.tensor([1.0] * 6 if scale is None else scale, dtype=torch.float64)
    most = eps * dual_norm(w * s, norm)
    attack = Square(norm=norm, eps=eps, feature_scale=scale, bounds=bounds, n_queries=1000)
    y = torch.zeros(15, dtype=torch.long)
    found = attack.search(linear_problem(w), X, y, generator=seeded(5))
    gain = (found.X_adv - X).flatten(1) @ w
    assert not found.fooled.any()
    assert (gain <= most * (1 + 1e-9)).all()
    assert (gain >= {"linf": 0.999, "l2": 0.95, "l1": 0.9}[norm] * most).all()


@every_norm
def test_it_fools_a_linear_model_just_where_something_in_the_ball_does(norm):
    X, w = uniform(20, 6), torch.randn(6, generator=seeded(9), dtype=torch.float64)
    X -= (X @ w)[:, None] * w / (w @ w)  # all at the same distance
    attack = Square(norm=norm, eps=0.2, n_queries=500)
    for share, is_fooled in ((1.001, False), (0.9, True)):
        lead = share * 0.2 * dual_norm(w, norm)
        found = attack.search(
            lambda Z, lead=lead: torch.stack([lead + 0 * Z[:, 0], Z @ w], 1),
            X,
            torch.zeros(20, dtype=torch.long),
            generator=seeded(),
        )
        assert (found.fooled == is_fooled).all()


@every_norm
def test_it_comes_near_the_optimum_that_brute_force_finds(norm):
    eps, net, X = 0.2, make_net(2, 2, 12, seed=1), uniform(40, 2)
    y = net(X).argmax(1)
    axis = torch.linspace(-eps, eps, 201, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    grid = grid[
        torch.linalg.vector_norm(grid, {"linf": torch.inf, "l2": 2, "l1": 1}[norm], 1) <= eps
    ]
    best = torch.stack(
        [margins(net, x + grid, k.expand(len(grid))).max() for x, k in zip(X, y, strict=True)]
    )
    found = Square(norm=norm, eps=eps, n_queries=500).search(net, X, y, generator=seeded())
    slope = torch.linalg.matrix_norm(
        torch.autograd.functional.jacobian(lambda x: net(x).sum(0), X)
    ).max()
    spacing = 2 * slope.item() * eps / 100
    assert (best[found.fooled] > -spacing).all()
    standing = ~found.fooled
    assert 3 < standing.sum() < 37
    margin = margins(net, found.X_adv, y)
    assert (margin[standing] <= best[standing] + spacing).all()
    assert (margin[standing] >= best[standing] - 0.2).double().mean() >= 0.9
    assert (best[standing] < 0.1).all()


@every_norm
def test_it_runs_on_a_step_function(norm):
    X = uniform(30, 4) * 0.5

    def net(Z):  # class 1 where at least two features exceed 0.5, counted in steps
        count = (Z > 0.5).double().sum(1)
        return torch.stack([torch.full_like(count, 1.5), count], 1)

    y = torch.zeros(30, dtype=torch.long)
    eps = {"linf": 0.3, "l2": 0.4, "l1": 0.55}[norm]
    need = (0.5 - X).clamp(min=0).sort(1).values[:, :2]
    reach = {"linf": need.amax(1), "l2": need.norm(dim=1), "l1": need.sum(1)}[norm]
    found = Square(norm=norm, eps=eps, n_queries=500).search(net, X, y, generator=seeded())
    assert not found.fooled[reach >= eps].any()
    assert found.fooled[reach < 0.8 * eps].all()
    assert 5 < found.fooled.sum() < 30


@every_norm
def test_it_fools_a_forest_through_its_probabilities(norm):
    X, y = load_wine(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    forest = RandomForestClassifier(10, random_state=0).fit(X[::2], y[::2])

    def net(Z):
        return torch.from_numpy(forest.predict_proba(Z.numpy()))

    X, y = torch.from_numpy(X[1::4]), torch.from_numpy(y[1::4])
    eps = {"linf": 0.5, "l2": 1.0, "l1": 1.5}[norm]
    found = Square(norm=norm, eps=eps, n_queries=100).search(net, X, y, generator=seeded())
    wrong = torch.from_numpy(forest.predict(found.X_adv.numpy())) != y
    # A tie of two classes is a decision by order, and no success of the attack.
    assert wrong[found.fooled].all()
    clean_wrong = torch.from_numpy(forest.predict(X.numpy())) != y
    assert found.fooled.sum() > clean_wrong.sum() + 5


@every_norm
def test_more_queries_find_more(norm):
    net, X = make_net(), uniform(100, 6)
    y = net(X).argmax(1)
    rates = [
        Square(norm=norm, eps={"linf": 0.1, "l2": 0.2, "l1": 0.3}[norm], n_queries=n)
        .search(net, X, y, generator=seeded())
        .fooled.sum()
        for n in (1, 5, 300)
    ]
    assert rates[0] == 0
    assert rates[0] < rates[1] < rates[2]


# --- what it needs of a model ------------------------------------------------------------


@every_norm
def test_probabilities_and_logits_give_the_same_result(norm):
    net, X = make_net(), uniform(50, 6)
    y = net(X).argmax(1)
    attack = Square(norm=norm, eps=0.1, n_queries=100)
    from_logits = attack.search(net, X, y, generator=seeded())
    from_probabilities = attack.search(lambda Z: net(Z).softmax(1), X, y, generator=seeded())
    assert torch.equal(from_logits.fooled, from_probabilities.fooled)
    torch.testing.assert_close(from_logits.X_adv, from_probabilities.X_adv)


@pytest.mark.parametrize("factor", [2.0**-10, 1e-3, 7.0, 1e6])
@every_norm
def test_the_size_of_the_logits_does_not_matter(norm, factor):
    net, X = make_net(), uniform(50, 6)
    y = net(X).argmax(1)
    attack = Square(norm=norm, eps=0.1, n_queries=100)
    expected = attack.search(net, X, y, generator=seeded())
    found = attack.search(lambda Z: factor * net(Z), X, y, generator=seeded())
    assert torch.equal(found.fooled, expected.fooled)
    torch.testing.assert_close(found.X_adv, expected.X_adv)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_scores_that_are_not_numbers_leave_the_samples_where_they_are(norm):
    X = uniform(5, 6)
    attack = Square(norm=norm, n_queries=20)
    found = attack.search(lambda Z: Z[:, :2] * torch.nan, X, torch.zeros(5, dtype=torch.long))
    assert torch.equal(found.X_adv, X)
    assert not found.fooled.any()


def test_a_sample_that_is_wrong_from_the_outset_is_left_where_it_is():
    net, X = make_net(), uniform(10, 6)
    y = (net(X).argmax(1) + 1) % 3
    found = Square(n_queries=50).search(net, X, y)
    assert torch.equal(found.X_adv, X)
    assert found.fooled.all()
    assert (found.n_queries == 1).all()


# --- the budget --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (1, 1, 7)], ids=["vectors", "images"])
@pytest.mark.parametrize("n_restarts", [1, 3])
@pytest.mark.parametrize("n_queries", [1, 2, 3, 40])
@every_norm
def test_queries_are_counted_and_kept_within_the_budget(norm, n_queries, n_restarts, shape):
    net, X = make_net(), torch.cat([torch.arange(30.0)[:, None], uniform(30, 6)], 1)
    y = net(X[:, 1:]).argmax(1)
    counting = Counting(net, 30)
    attack = Square(norm=norm, eps=0.05, n_queries=n_queries, n_restarts=n_restarts)
    X = X.double().reshape(30, *shape)
    found = attack.search(counting, X, y, generator=seeded())
    assert torch.equal(found.n_queries, counting.seen)
    extra = 0 if norm == "linf" else 1  # l1 and l2 may confirm what they found
    assert 0 <= found.n_queries.max() - n_queries * n_restarts <= extra
    if n_queries == 40:
        assert (found.n_queries[found.fooled] < 40).any()


def test_the_share_follows_the_schedule_of_the_paper():
    # p is halved at iterations 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000 of 10,000.
    expected = {
        0: 1, 10: 1, 11: 2, 50: 2, 51: 4, 200: 4, 201: 8, 500: 8, 501: 16, 1000: 16, 1001: 32,
        2000: 32, 2001: 64, 4000: 64, 4001: 128, 6000: 128, 6001: 256, 8000: 256, 8001: 512,
        9999: 512,
    }  # fmt: skip
    for n_queries in (10_000, 20_000):
        attack = Square(n_queries=n_queries, p_init=0.5)
        for step, divisor in expected.items():
            assert attack.share(step * n_queries // 10_000) == 0.5 / divisor
    short = [Square(n_queries=100, p_init=0.8).share(step) for step in range(100)]
    assert short == sorted(short, reverse=True)
    # Step i of 100 stands for 100 i of 10,000.
    assert short[:4] == [0.8, 0.2, 0.2, 0.1]
    assert short[-1] == 0.8 / 512


# --- what it proposes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "side"), [(1.0, 28), (0.8, 25), (0.4, 18), (0.1, 9), (0.8 / 512, 1), (1e-9, 1)]
)
def test_an_image_is_changed_in_a_square_of_the_share(share, side):
    # round(sqrt(share · 28²)) pixels to a side.
    ball = Ball.around(uniform(2, 3, 28, 28), norm="linf", eps=0.1)
    moves, generator = CornerMoves(ball), seeded()
    moves.X_adv.zero_()  # so that any square differs
    places = set()
    for _ in range(50):
        X_adv = moves.propose(share, generator)
        rows, columns = ((X_adv != 0).any(0).any(0).any(dim).nonzero() for dim in (1, 0))
        assert len(rows) == rows[-1] - rows[0] + 1 == side
        assert len(columns) == columns[-1] - columns[0] + 1 == side
        block = X_adv[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        low, high = (
            bound[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] for bound in ball.box
        )
        up, down = (block == high).flatten(2).all(2), (block == low).flatten(2).all(2)
        assert (up ^ down).all()  # one side of the ball to a channel
        places.add((int(rows[0]), int(columns[0])))
        moves.keep(torch.zeros(2, dtype=torch.bool))
        assert (X_adv == 0).all()
    assert len(places) > min(10, (29 - side) ** 2 - 1)


@pytest.mark.parametrize(("share", "size"), [(1.0, 20), (0.8, 16), (0.1, 2), (1e-9, 1)])
def test_a_flat_sample_is_changed_in_a_subset_of_the_share(share, size):
    places = [draw_place((20,), share, generator)[1] for generator in [seeded()] for _ in range(99)]
    assert {len(place.unique()) for place in places} == {size}
    assert len(torch.cat(places).unique()) == 20


def test_every_place_of_an_image_is_drawn():
    generator = seeded()
    places = [draw_place((1, 3, 4), 0.3, generator)[2:] for _ in range(300)]
    assert len({(rows.start, columns.start) for rows, columns in places}) == 2 * 3


@pytest.mark.parametrize("moves", [CornerMoves, MassMoves])
@pytest.mark.parametrize("shape", [(9,), (2, 6, 6)], ids=["vectors", "images"])
def test_only_what_is_better_is_kept(moves, shape):
    norm = "linf" if moves is CornerMoves else "l2"
    moves = moves(Ball.around(uniform(6, *shape), norm=norm, eps=0.3))
    generator = seeded()
    moves.start(generator)
    better = torch.arange(6) % 2 == 0
    for share in (0.8, 0.3, 0.05) * 5:
        before = moves.X_adv.clone()
        after = moves.propose(share, generator).clone()
        assert not torch.equal(after, before)
        moves.keep(better)
        torch.testing.assert_close(moves.X_adv[better], after[better], rtol=0, atol=0)
        torch.testing.assert_close(moves.X_adv[~better], before[~better], rtol=0, atol=1e-15)


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)], ids=["unbounded", "box"])
@pytest.mark.parametrize("shape", [(9,), (2, 6, 6)], ids=["vectors", "images"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_mass_is_moved_and_none_is_made(norm, shape, bounds):
    if bounds is not None:
        bounds = tuple(torch.tensor(side, dtype=torch.float64) for side in bounds)
    ball = Ball.around(uniform(6, *shape), norm=norm, eps=0.3, bounds=bounds)
    moves, generator = MassMoves(ball), seeded()
    moves.start(generator)
    for share in (0.8, 0.3, 0.05) * 5:
        distance = ball.distance(moves.propose(share, generator))
        assert (distance <= 0.3 * (1 + 1e-12)).all()
        if bounds is None:
            torch.testing.assert_close(distance, torch.full_like(distance, 0.3))
        moves.keep(torch.ones(6, dtype=torch.bool))


def test_the_pattern_is_the_sum_of_the_rectangles_of_the_paper():
    height, width = 5, 7
    expected = np.zeros((height, width))
    for k in range(4):  # around the middle (2, 3), clipped to the window
        expected[max(2 - k, 0) : 3 + k, max(3 - k, 0) : 4 + k] += 1 / (k + 1) ** 2
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(pyramid(height, width).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_the_pattern_has_two_halves_of_opposite_sign(side):
    generator = seeded()
    for _ in range(10):
        pattern = two_halves(side, generator)
        assert pattern.shape == (side, side)
        if side > 1:
            across = side // 2
            upright = (pattern[:across] > 0).all() and (pattern[across:] < 0).all()
            lying = (pattern[:, :across] > 0).all() and (pattern[:, across:] < 0).all()
            assert upright != lying


@pytest.mark.parametrize(("norm", "q"), [("l2", 2), ("l1", 1)])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 8), (9,)])
def test_what_is_added_is_of_unit_norm(norm, q, shape):
    moves, generator = MassMoves(Ball.around(uniform(2, *shape), norm=norm, eps=0.3)), seeded()
    moves.start(generator)
    for share in (0.8, 0.3, 0.05) * 5:
        pattern = moves._draw(share, generator)[-1]
        assert float(pattern.norm(q)) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 5), (2, 2, 3), (1, 1, 1)])
def test_the_mosaic_covers_the_image_but_for_a_rim(shape):
    image = mosaic(shape, seeded())
    side = max(min(shape[1:]) // 5, 1)
    assert (image != 0).float().mean() >= (1 - side / shape[1]) * (1 - side / shape[2])
    assert image.abs().sum() > 0


# --- where it stays ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3), (2, 3)], ids=str)
@every_norm
def test_features_that_are_not_mutable_never_move(norm, shape):
    net, X = make_net(), uniform(30, *shape)
    seen = []

    def watched(Z):
        seen.append(Z.flatten(1)[:, [1, 4]].clone())
        return net(Z.flatten(1))

    y = net(X.flatten(1)).argmax(1)
    attack = Square(norm=norm, eps=0.3, mutable=[0, 2, 3, 5], n_queries=60)
    X_adv = attack(watched, X, y, generator=seeded())
    assert (X_adv != X).flatten(1)[:, [0, 2, 3, 5]].any()
    held = X.flatten(1)[:, [1, 4]]
    assert torch.equal(X_adv.flatten(1)[:, [1, 4]], held)
    allowed = {tuple(row) for row in held.tolist()}
    assert all(tuple(row) in allowed for Z in seen for row in Z.tolist())


@every_norm
def test_images_in_channels_last_order_are_attacked_like_others(norm):
    net, X = make_net(24), uniform(10, 2, 3, 4)
    y = net(X.flatten(1)).argmax(1)
    attack = Square(norm=norm, eps=0.2, n_queries=30)
    expected = attack(lambda Z: net(Z.flatten(1)), X, y, generator=seeded())
    X = X.to(memory_format=torch.channels_last)
    assert torch.equal(attack(lambda Z: net(Z.flatten(1)), X, y, generator=seeded()), expected)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_queries": 0}, "Got n_queries=0, but expected an integer of at least 1"),
        ({"n_queries": 2.5}, "Got n_queries=2.5, but expected an integer of at least 1"),
        ({"n_restarts": 0}, "Got n_restarts=0, but expected an integer of at least 1"),
        ({"p_init": 0}, r"Got p_init=0, but expected a number in \(0, 1\]"),
        ({"p_init": 1.5}, r"Got p_init=1.5, but expected a number in \(0, 1\]"),
        ({"p_init": "0.8"}, r"Got p_init='0.8', but expected a number in \(0, 1\]"),
        ({"norm": "l3"}, "Got norm='l3', but expected one of "),
    ],
    ids=repr,
)
def test_bad_parameters_are_rejected(params, message):
    net, X = make_net(), uniform(5, 6)
    with pytest.raises(ValueError, match=f"^{message}"):
        Square(**params)(net, X, net(X).argmax(1))


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["array", "tensor"])
@pytest.mark.parametrize(("name", "value"), [("n_queries", 20), ("n_restarts", 2), ("p_init", 0.5)])
def test_parameters_may_be_any_kind_of_scalar(name, value, kind):
    net, X = make_net(), uniform(20, 6)
    y = net(X).argmax(1)
    defaults = {"n_queries": 30, name: value}
    expected = Square(**defaults)(net, X, y, generator=seeded())
    X_adv = Square(**{**defaults, name: kind(value)})(net, X, y, generator=seeded())
    torch.testing.assert_close(X_adv, expected)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_features_that_cannot_change_do_not_dilute_the_search(norm):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, generator=generator, dtype=torch.float64)
    X = torch.randn(150, 8, generator=generator, dtype=torch.float64)
    idle = torch.zeros(150, 300, dtype=torch.float64)

    def logits(X):
        score = X[:, :8] @ w
        return torch.stack([-score, score], dim=1)

    y = logits(X).argmax(1)
    attack = Square(norm=norm, eps={"linf": 0.3, "l2": 0.8, "l1": 1.0}[norm], n_queries=150)
    alone = attack.search(logits, X, y, generator=torch.Generator().manual_seed(1)).fooled
    attack.set_params(mutable=range(8))
    beside = torch.cat([X, idle], dim=1)
    found = attack.search(logits, beside, y, generator=torch.Generator().manual_seed(1)).fooled
    assert 40 < alone.sum() < 140
    assert abs(int(found.sum()) - int(alone.sum())) <= 4
