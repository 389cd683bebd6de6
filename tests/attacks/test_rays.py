import pytest
import torch
from torch.nn.functional import one_hot

from skjacobian.attacks import RayS
from skjacobian.attacks._search import Search
from skjacobian.threat_model import DataScale
from tests.attacks.problems import make_problem
from tests.seeds import seeded
from tests.slow import others_slow

NORMS = ["linf", "l2", "l1"]
DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}

every_norm = pytest.mark.parametrize("norm", NORMS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def labels_of(logits):
    """The same model, which tells only what class it predicts."""

    def decide(X):
        z = logits(X)
        return one_hot(z.argmax(1), z.shape[1]).to(X.dtype)

    return decide


class Counting:
    """A model that counts the rows about which it is asked, by their first feature."""

    def __init__(self, model):
        self.model, self.n_rows = model, 0

    def __call__(self, X):
        self.n_rows += len(X)
        return self.model(X)


# --- closed forms ------------------------------------------------------------------------


@pytest.mark.parametrize(("n_features", "scale"), [(2, "array"), (10, None)])
@every_norm
def test_it_finds_the_distance_to_a_plane_and_none_below_it(norm, n_features, scale):
    w, X = normal(n_features), normal(60, n_features, seed=1)
    unit = torch.ones(n_features).double() if scale is None else torch.linspace(0.5, 2, n_features)
    z = X @ w
    distance = z.abs() / torch.linalg.vector_norm(w * unit, DUAL[norm])

    def decide(X):
        return one_hot((X @ w > 0).long(), 2).double()

    def fooled(share, n_queries):
        attack = RayS(
            norm=norm,
            eps=share * distance,
            n_queries=n_queries,
            feature_scale=None if scale is None else unit.numpy(),
        )
        return attack.search(decide, X, (z > 0).long(), generator=seeded()).fooled

    assert not fooled(0.999, 300).any()
    assert fooled(1.15, 1500).double().mean() >= 0.95


@every_norm
def test_it_finds_the_threshold_of_a_stump(norm):
    # A tree with one node: moving one feature is all that is needed, in any norm.
    X = normal(100, 8)
    y = (X[:, 3] > 0.5).long()

    def decide(X):
        return one_hot((X[:, 3] > 0.5).long(), 2).double()

    for share, n_queries, expected in ((0.999, 300, 0.0), (1.15, 1000, 1.0)):
        attack = RayS(norm=norm, eps=share * (X[:, 3] - 0.5).abs(), n_queries=n_queries)
        fooled = attack.search(decide, X, y, generator=seeded()).fooled.double().mean()
        assert abs(fooled - expected) <= 0.03
        assert fooled == 0 or expected == 1


def grid_in_ball(norm, n=101):
    axis = torch.linspace(-1, 1, n, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    return grid[torch.linalg.vector_norm(grid, {"linf": torch.inf, "l2": 2, "l1": 1}[norm], 1) <= 1]


@pytest.mark.parametrize("norm", others_slow(["linf", "l2", "l1"], ["l2"]))
def test_it_finds_what_brute_force_finds(norm):
    net, X, y = make_problem(n=40, n_features=2, seed=1)
    grid, eps = grid_in_ball(norm), 0.25

    def there_are_fooling_points(radius):
        return torch.stack(
            [(net(x + radius * grid).argmax(1) != k).any() for x, k in zip(X, y, strict=True)]
        )

    attack = RayS(norm=norm, eps=eps, n_queries=1000)
    fooled = attack.search(labels_of(net), X, y, generator=seeded()).fooled
    easy, hard = there_are_fooling_points(0.85 * eps), ~there_are_fooling_points(1.05 * eps)
    assert easy.sum() >= 5
    assert hard.sum() >= 5
    assert fooled[easy].double().mean() >= 0.95
    assert not fooled[hard].any()


# --- decisions alone ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores",
    [labels_of, lambda f: lambda X: f(X).softmax(1), lambda f: lambda X: (f(X) / 2).sinh() + 7],
    ids=["labels", "probabilities", "monotone"],
)
@every_norm
def test_nothing_but_the_predicted_class_counts(norm, scores):
    net, X, y = make_problem(n=40)
    attack = RayS(norm=norm, eps=0.15, n_queries=100)
    expected = attack.search(net, X, y, generator=seeded())
    found = attack.search(scores(net), X, y, generator=seeded())
    assert 5 < expected.fooled.sum() < 35
    assert torch.equal(found.X_adv, expected.X_adv)
    assert torch.equal(found.fooled, expected.fooled)
    assert torch.equal(found.n_queries, expected.n_queries)


@pytest.mark.parametrize("n_classes", [2, 1000])
@every_norm
def test_there_may_be_any_number_of_classes(norm, n_classes):
    W, X = normal(n_classes, 5), normal(20, 5, seed=1)
    y = (X @ W.T).argmax(1)
    attack = RayS(norm=norm, eps=100.0, n_queries=200)
    assert attack.search(labels_of(lambda X: X @ W.T), X, y, generator=seeded()).fooled.all()


@pytest.mark.parametrize("bounds", [None, (-1, 1)])
@every_norm
def test_a_model_of_one_class_is_not_fooled(norm, bounds):
    _, X, _ = make_problem(n=40)
    attack = RayS(norm=norm, eps=0.2, bounds=bounds, n_queries=150)
    found = attack.search(
        lambda X: torch.eye(3).double()[torch.zeros(len(X), dtype=torch.long)],
        X,
        torch.zeros(40, dtype=torch.long),
        generator=seeded(),
    )
    assert not found.fooled.any()
    assert torch.equal(found.X_adv, X)
    assert (found.n_queries <= 150).all()


@every_norm
def test_misclassified_samples_stay_where_they_are(norm):
    net, X, y = make_problem(n=40)
    found = RayS(norm=norm).search(labels_of(net), X, (y + 1) % 3, generator=seeded())
    assert found.fooled.all()
    assert torch.equal(found.X_adv, X)
    assert (found.n_queries <= 2).all()


# --- queries -----------------------------------------------------------------------------


@pytest.mark.parametrize("n_queries", [1, 2, 3, 10, 300])
@every_norm
def test_queries_are_counted_and_never_exceed_the_budget(norm, n_queries):
    net, X, y = make_problem(n=40)
    model = Counting(labels_of(net))
    attack = RayS(norm=norm, eps=0.15, n_queries=n_queries)
    found = attack.search(model, X, y, generator=seeded())
    assert found.n_queries.sum() == model.n_rows
    # By those that stand; one query is kept to confirm them, which linf never needs.
    assert n_queries - (norm != "linf") <= found.n_queries.max() <= n_queries
    assert torch.equal(found.fooled, net(found.X_adv).argmax(1) != y)


@every_norm
def test_a_fooled_sample_is_not_asked_about_any_more(norm, monkeypatch):
    monkeypatch.setattr(Search, "DROP_SHARE", 0.0)
    net, X, y = make_problem(n=40)
    model = labels_of(net)
    found = RayS(norm=norm, eps=0.15, n_queries=500).search(model, X, y, generator=seeded())
    assert found.n_queries[found.fooled].double().median() < 200


@every_norm
def test_more_queries_fool_no_fewer(norm):
    net, X, y = make_problem(n=40)
    n_fooled = [
        RayS(norm=norm, eps=0.15, n_queries=n).search(net, X, y, generator=seeded()).fooled.sum()
        for n in (30, 100, 300)
    ]
    assert n_fooled == sorted(n_fooled)
    assert n_fooled[0] < n_fooled[-1]


# --- where it may go ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_norm
def test_features_held_fixed_never_move(norm, dtype):
    net, X, y = make_problem(n=40)
    net, X = net.to(dtype), X.to(dtype)
    seen = []

    def decide(X):
        seen.append(X[:, [0, 2]])
        return labels_of(net)(X)

    scale = DataScale(torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0, 1.0]))
    attack = RayS(norm=norm, eps=0.5, feature_scale=scale, n_queries=200)
    found = attack.search(decide, X[:1], y[:1], generator=seeded())
    assert found.X_adv.dtype == dtype
    assert all(torch.equal(fixed, X[:1, [0, 2]].expand_as(fixed)) for fixed in seen)


@every_norm
def test_with_all_features_held_fixed_nothing_moves(norm):
    net, X, y = make_problem(n=40)
    attack = RayS(norm=norm, eps=0.5, feature_scale=DataScale(torch.zeros(6)))
    found = attack.search(labels_of(net), X, y, generator=seeded())
    assert torch.equal(found.X_adv, X)
    assert not found.fooled.any()


@every_norm
def test_the_model_is_never_asked_about_points_out_of_bounds(norm):
    net, X, y = make_problem(n=40)

    def decide(X):
        assert ((X >= -1) & (X <= 1)).all()
        return labels_of(net)(X)

    attack = RayS(norm=norm, eps=0.2, bounds=(-1, 1), n_queries=300)
    found = attack.search(decide, X, y, generator=seeded())
    assert 0 < found.fooled.sum() < 40


def test_in_a_box_it_fools_no_more_than_without():
    net, X, y = make_problem(n=40)
    attack = RayS(norm="l2", eps=0.2, n_queries=300)
    free, boxed = (
        attack.set_params(bounds=bounds).search(net, X, y, generator=seeded()).fooled.sum()
        for bounds in (None, (-1, 1))
    )
    assert boxed <= free


@pytest.mark.parametrize("n_queries", [0, -5, 2.5, "many", None])
def test_bad_parameters_are_rejected(n_queries):
    net, X, y = make_problem(n=40)
    message = f"^Got n_queries={n_queries!r}, but expected an integer of at least 1"
    with pytest.raises(ValueError, match=message):
        RayS(n_queries=n_queries)(net, X, y)


def test_the_smallest_radius_is_wanted_or_not():
    with pytest.raises(ValueError, match="Got minimal='no', but expected True or False"):
        RayS(minimal="no").check_params()
