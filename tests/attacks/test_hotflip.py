"""HotFlip, and what ends with it, against the exact optimum over whole numbers and categories."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from skjacobian import FeatureConstraints
from skjacobian.attacks import APGD, FGSM, FMN, PGD, Cascade, HotFlip
from skjacobian.modules import MLP
from tests.seeds import seeded
from tests.slow import others_slow

pytestmark = pytest.mark.usefixtures("short_stages")

POWER = {"l1": 1, "l2": 2}
LEVELS = 6  # whole numbers are from 0 to 5


class Linear:
    """Two classes by the sign of w·x - b."""

    def __init__(self, w, b):
        self.w, self.b = torch.as_tensor(w), b

    def __call__(self, X):
        value = X.to(self.w.dtype) @ self.w - self.b
        return torch.stack([-value, value], 1)


def largest_gain_of_whole_numbers(x, w, norm, eps, scale):
    """By dynamic programming over what has been spent, w·δ at most; scale is whole."""
    power, fine = POWER[norm], int(np.prod(np.unique(scale))) ** POWER[norm]
    budget = math.floor(fine * eps**power * (1 + 1e-9))
    best = np.zeros(budget + 1)
    for value, weight, unit in zip(x, w, scale, strict=True):
        before, price = best.copy(), fine // int(unit) ** power
        for target in range(LEVELS):
            cost = price * abs(target - int(value)) ** power
            if 0 < cost <= budget:
                gained = before[: budget + 1 - cost] + weight * (target - value)
                best[cost:] = np.maximum(best[cost:], gained)
    return best.max()


def largest_gain_with_categories(x, w, norm, eps, groups, numbers):
    """By enumeration of all categories; the rest of the budget goes to the numbers."""
    power, most = POWER[norm], -np.inf
    for choice in itertools.product(*groups):
        gain = spent = 0.0
        for group, chosen in zip(groups, choice, strict=True):
            (now,) = [j for j in group if x[j] == 1]
            if now != chosen:
                gain, spent = gain + w[chosen] - w[now], spent + 2
        left = eps**power - spent
        if left >= 0:
            dual = np.abs(w[numbers]).max() if norm == "l1" else np.linalg.norm(w[numbers])
            most = max(most, gain + left ** (1 / power) * dual)
    return most


def whole_numbers(n_features, seed):
    rng = np.random.default_rng(seed)
    X = rng.integers(0, LEVELS, (60, n_features)).astype(float)
    w = rng.choice([-1.0, 1.0], n_features) * rng.uniform(0.5, 1.5, n_features)
    return X, Linear(w, float(np.median(X @ w)) + 1e-3)


def mixed(seed, sizes=(3, 4), n_numbers=2):
    rng = np.random.default_rng(seed)
    groups, start = [], n_numbers
    X = [rng.normal(size=(60, n_numbers))]
    for size in sizes:
        groups.append(list(range(start, start + size)))
        X.append(np.eye(size)[rng.integers(0, size, 60)])
        start += size
    X = np.hstack(X)
    w = rng.normal(size=X.shape[1])
    return X, Linear(w, float(np.median(X @ w)) + 1e-3), groups


def labelled(X, model):
    X = torch.from_numpy(X)
    return X, model(X).argmax(1)


def exactly_robust(X, y, model, gain_of):
    """Whether what the exact adversary gains does not reach over the boundary."""
    sign = np.where(y.numpy() == 1, 1.0, -1.0)
    value = sign * (X.numpy() @ model.w.numpy() - model.b)
    w = -sign[:, None] * model.w.numpy()
    return value > np.array([gain_of(x, w_of_x) for x, w_of_x in zip(X.numpy(), w, strict=True)])


@pytest.mark.parametrize(
    ("attack", "norm", "n_features", "eps", "units"),
    [
        (HotFlip, "l1", 4, 2.0, [1, 2]),
        (HotFlip, "l1", 12, 2.5, [1]),
        (HotFlip, "l1", 40, 3.0, [1]),
        (HotFlip, "l1", 120, 1.5, [1, 2]),
        (HotFlip, "l2", 4, 2.0, [1]),
        (HotFlip, "l2", 12, 2.5, [1, 2]),
        (HotFlip, "l2", 40, 3.0, [1, 2]),
        (HotFlip, "l2", 40, 3.0, [1]),
        (HotFlip, "l2", 120, 1.5, [1]),
        (Cascade, "l1", 12, 2.5, [1]),
        (Cascade, "l1", 120, 1.5, [1, 2]),
        (Cascade, "l2", 4, 2.0, [1]),
        (Cascade, "l2", 40, 3.0, [1, 2]),
    ],
    ids=str,
)
def test_whole_numbers_of_a_linear_model_are_changed_as_well_as_can_be(
    attack, norm, n_features, eps, units
):
    data, model = whole_numbers(n_features, seed=n_features)
    X, y = labelled(data, model)
    scale = np.resize(units, n_features)
    robust = exactly_robust(
        X, y, model, lambda x, w: largest_gain_of_whole_numbers(x, w, norm, eps, scale)
    )
    constraints = FeatureConstraints(integer=list(range(n_features)))
    threat = {"norm": norm, "eps": eps, "feature_scale": scale.astype(float), "bounds": (0, 5)}
    found = attack(**threat, constraints=constraints).search(model, X, y, generator=seeded())
    assert robust.mean() < 0.95
    np.testing.assert_array_equal(~found.fooled.numpy(), robust)
    assert (found.X_adv == found.X_adv.round()).all()


@pytest.mark.parametrize("attack", [HotFlip, Cascade])
@pytest.mark.parametrize(
    ("norm", "eps", "seed"),
    others_slow(
        [("l1", 2.2, 0), ("l1", 4.2, 1), ("l2", 1.5, 1), ("l2", 2.1, 0)],
        [("l1", 4.2, 1), ("l2", 2.1, 0)],
    ),
)
def test_categories_of_a_linear_model_are_changed_as_well_as_can_be(attack, norm, eps, seed):
    data, model, groups = mixed(seed)
    X, y = labelled(data, model)
    robust = exactly_robust(
        X, y, model, lambda x, w: largest_gain_with_categories(x, w, norm, eps, groups, [0, 1])
    )
    constraints = FeatureConstraints(one_hot=groups)
    found = attack(norm=norm, eps=eps, constraints=constraints).search(
        model, X, y, generator=seeded()
    )
    np.testing.assert_array_equal(~found.fooled.numpy(), robust)


@pytest.mark.parametrize(
    ("attack", "seed"), [(PGD, 0), (FGSM, 1), (APGD, 0), (Cascade, 1), (HotFlip, 0)]
)
def test_under_linf_each_category_becomes_the_worst_one(attack, seed):
    rng = np.random.default_rng(seed)
    groups = np.arange(40).reshape(8, 5)
    codes = np.eye(5)[rng.integers(5, size=(60, 8))].reshape(60, 40)
    X = np.hstack([codes, rng.normal(size=(60, 2))])
    w = rng.normal(size=42)
    clean = X @ w
    worst = (X[:, 40:] @ w[40:]) + np.abs(w[40:]).sum() + w[groups].max(1).sum()
    b = np.median(worst)
    X, worst = X[clean < b], worst[clean < b]
    armed = attack(norm="linf", eps=1.0, constraints=FeatureConstraints(one_hot=groups.tolist()))
    y = torch.zeros(len(X), dtype=torch.long)
    found = armed.search(Linear(w, b), torch.from_numpy(X), y, generator=seeded())
    assert 0.2 < (worst > b).mean() < 0.9
    np.testing.assert_array_equal(found.fooled.numpy(), worst > b)
    if attack is PGD:
        radii = FMN(norm="linf", constraints=armed.constraints).distances(
            Linear(w, b), torch.from_numpy(X), y, generator=seeded()
        )
        a_hair = 1e-3 * np.abs(w[40:]).sum()  # by which FMN goes beyond the boundary
        assert (worst[radii.numpy() <= 1.0] > b).all()
        assert (worst[radii.numpy() > 1.001] < b + a_hair).all()


@pytest.mark.parametrize("norm", POWER)
def test_the_smallest_perturbations_of_whole_numbers_and_categories_are_found(norm):
    data, model = whole_numbers(12, seed=1)
    X, y = labelled(data, model)
    constraints = FeatureConstraints(integer=list(range(12)))
    attack = FMN(norm=norm, bounds=(0, 5), constraints=constraints)
    distances = attack.distances(model, X, y, generator=seeded()).numpy()
    for eps in (1.0, 1.5, 2.0, 3.0):
        gain_of = partial(largest_gain_of_whole_numbers, norm=norm, eps=eps, scale=np.ones(12))
        robust = exactly_robust(X, y, model, gain_of)
        np.testing.assert_array_equal(distances > eps, robust)
    data, model, groups = mixed(0)
    X, y = labelled(data, model)
    attack = FMN(norm=norm, constraints=FeatureConstraints(one_hot=groups))
    distances = attack.distances(model, X, y, generator=seeded()).numpy()
    for eps in (0.3, 1.5, 2.2):
        gain_of = partial(
            largest_gain_with_categories, norm=norm, eps=eps, groups=groups, numbers=[0, 1]
        )
        robust = exactly_robust(X, y, model, gain_of)
        assert (distances > eps).sum() <= robust.sum() + 1


@pytest.mark.parametrize("norm", POWER)
def test_large_whole_numbers_change_together_with_categories(norm):
    data, model, groups = mixed(0)
    unit = 100  # of the two numbers, so that real ones would hardly do better
    data[:, :2] = (unit * data[:, :2]).round()
    scaled = Linear(model.w, model.b)
    model = Linear(model.w / torch.tensor([unit] * 2 + [1] * 7), model.b)
    X, y = labelled(data, model)
    constraints = FeatureConstraints(integer=[0, 1], one_hot=groups, scale={0: unit, 1: unit})
    attack = FMN(norm=norm, constraints=constraints)
    distances = attack.distances(model, X, y, generator=seeded()).numpy()
    X[:, :2] /= unit
    for eps in (0.5, 1.0, 1.5, 2.2, 2.6, 3.0):
        gain_of = partial(
            largest_gain_with_categories, norm=norm, eps=eps, groups=groups, numbers=[0, 1]
        )
        robust = exactly_robust(X, y, scaled, gain_of)
        assert not ((distances > 1.03 * eps) & ~robust).any()
        assert not ((distances <= eps) & robust).any()


@pytest.mark.parametrize("lead", [58.0, 58.5])  # 58 is on the boundary, which fools nobody
@pytest.mark.parametrize("norm", POWER)
def test_a_category_changes_beside_a_number_that_changes_far_beyond_its_size(norm, lead):
    w = torch.tensor([1.0, -40.5, -35.8, -73.0, 27.0, -106.0]).double()
    X, y = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]]).double(), torch.tensor([0])
    lead = lead + float(X @ w)

    def model(X):  # 59 without the other category of the first group, or 54 with it
        return torch.stack([torch.full((len(X),), lead).double(), X @ w], 1)

    constraints = FeatureConstraints(
        integer=[0],
        increasing=[0],
        immutable=[3],
        one_hot=[[1, 2], [3, 4, 5]],
        scale={0: 10, 1: 3, 2: 3},
    )
    found = FMN(norm=norm, constraints=constraints).distances(model, X, y, generator=seeded())
    assert found.item() == pytest.approx({"l1": 5.9, "l2": (5.4**2 + 2 / 3**2) ** 0.5}[norm])


def test_linf_distances_over_many_categories_are_those_of_a_linear_model():
    rng = np.random.default_rng(1)
    X = np.hstack([rng.normal(size=(60, 3)), np.eye(30)[rng.integers(0, 30, 60)]])
    W = rng.normal(size=(3, 33))
    b = -np.median(X @ W.T, axis=0)
    logits = X @ W.T + b
    y = logits.argmax(1)
    exact = np.full(60, np.inf)
    for k in range(3):
        w, missing = W[k] - W[y], logits[np.arange(60), y] - logits[:, k]
        total = np.abs(w[:, :3]).sum(1)
        category = w[:, 3:].max(1) - (w * X)[:, 3:].sum(1)  # at radius 1
        with np.errstate(invalid="ignore"):
            by_numbers, with_category = missing / total, (missing - category) / total
        radius = np.where(by_numbers < 1, by_numbers, np.maximum(with_category, 1.0))
        exact = np.where(k == y, exact, np.minimum(exact, radius))
    attack = FMN(norm="linf", constraints=FeatureConstraints(one_hot=[range(3, 33)]))
    weight, offset = torch.from_numpy(W), torch.from_numpy(b)
    found = attack.distances(
        lambda Z: Z @ weight.T + offset,
        torch.from_numpy(X),
        torch.from_numpy(y),
        generator=seeded(),
    )
    np.testing.assert_allclose(found.numpy(), exact, rtol=2e-3)


@pytest.mark.parametrize(("norm", "eps"), [("l1", 2.0), ("l2", 1.5)])
def test_few_whole_numbers_of_a_network_are_changed_nearly_as_well_as_by_enumeration(norm, eps):
    torch.manual_seed(0)
    net = MLP(4, 2, hidden_units=(16,)).double()
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.integers(0, LEVELS, (60, 4)).astype(float))
    y = net(X).argmax(1)
    steps = torch.tensor(list(itertools.product(range(-2, 3), repeat=4)), dtype=X.dtype)
    steps = steps[torch.linalg.vector_norm(steps, POWER[norm], dim=1) <= eps]
    around = X.unsqueeze(1) + steps
    inside = ((around >= 0) & (around < LEVELS)).all(2)
    fooled = net(around.flatten(0, 1)).argmax(1).reshape(inside.shape) != y.unsqueeze(1)
    robust = ~(fooled & inside).any(1)
    constraints = FeatureConstraints(integer=[0, 1, 2, 3])
    attack = HotFlip(norm=norm, eps=eps, bounds=(0, 5), constraints=constraints)
    found = attack.search(net, X, y, generator=seeded())
    assert not (found.fooled & robust).any()
    assert (~found.fooled).sum() <= robust.sum() + 1


def dips(X):
    """Two classes: wrong at category 1, behind a dip, and at 4 and more, behind a plateau."""
    value = (4 * X[:, 1] ** 2 - 3 * X[:, 1]).maximum(X[:, 3] ** 2 - 3.5 * X[:, 3]) - 0.25
    return torch.stack([-value, value], 1)


@pytest.mark.parametrize("attack", [HotFlip, Cascade, FMN])
@pytest.mark.parametrize(("norm", "unit"), [("l1", 0.25), ("l2", 4.0)])
def test_changes_that_promise_nothing_are_tried(attack, norm, unit):
    X, y = torch.tensor([[1.0, 0.0, 0.0, 2.0]], dtype=torch.float64), torch.tensor([0])
    constraints = FeatureConstraints(one_hot=[[0, 1, 2]], integer=[3], scale={3: unit})
    another = 2 ** (1 / POWER[norm])  # category
    distance = min(another, 2 / unit)
    found = attack(norm=norm, eps=1.01 * distance, bounds=(0, 5), constraints=constraints).search(
        dips, X, y, generator=seeded()
    )
    assert found.fooled.all()
    expected = [[0.0, 1.0, 0.0, 2.0]] if unit < 1 else [[1.0, 0.0, 0.0, 4.0]]
    assert found.X_adv.tolist() == expected
    nearer = attack(norm=norm, eps=0.99 * distance, bounds=(0, 5), constraints=constraints)
    assert not nearer.search(dips, X, y, generator=seeded()).fooled.any()


@pytest.mark.parametrize(
    ("attack", "norm"),
    others_slow(
        [(HotFlip, "l1"), (HotFlip, "l2"), (Cascade, "l2"), (FMN, "l1")],
        [(HotFlip, "l1"), (Cascade, "l2")],
    ),
)
def test_changes_that_promise_nothing_are_tried_among_many(attack, norm):
    rng = np.random.default_rng(0)
    groups = torch.arange(200).reshape(40, 5)
    codes = np.eye(5)[rng.integers(5, size=(60, 40))]
    codes[:, 17] = np.eye(5)[0]
    X = torch.from_numpy(codes.reshape(60, 200))
    constraints = FeatureConstraints(one_hot=groups.tolist())

    def dip(X):  # wrong at category 1 of the group 17 alone, behind a dip
        value = 4 * X[:, 86] ** 2 - 3 * X[:, 86] - 0.25 + 1e-3 * X[:, :85].sum(1)
        return torch.stack([-value, value], 1)

    y = torch.zeros(len(X), dtype=torch.long)
    assert (dip(X).argmax(1) == 0).all()
    another = 2 ** (1 / POWER[norm])
    found = attack(norm=norm, eps=1.01 * another, constraints=constraints).search(
        dip, X, y, generator=seeded()
    )
    assert found.fooled.all()
    assert (found.X_adv[:, 86] == 1).all()


def test_a_category_goes_back_if_another_pays_more():
    # The first change, of the group of large weights, leaves too little for both others.
    w = torch.tensor([0.0, 1.05, 0.0, 1.0, 0.0, 1.0])
    scale = np.array([1, 1, 2, 2, 2, 2.0])
    X = torch.tensor([[1.0, 0, 1, 0, 1, 0]])
    constraints = FeatureConstraints(one_hot=[[0, 1], [2, 3], [4, 5]])
    attack = HotFlip(norm="l1", eps=2.0, feature_scale=scale, constraints=constraints)
    found = attack.search(Linear(w, 1.5), X, torch.tensor([0]), generator=seeded())
    assert found.fooled.all()
    assert found.X_adv.tolist() == [[1, 0, 0, 1, 0, 1]]


def test_immutable_one_directional_and_missing_columns_are_left_alone():
    data, model = whole_numbers(6, seed=3)
    X, _ = labelled(data, model)
    X[::3, 0] = torch.nan
    model_of_present = lambda X: model(X.nan_to_num(0.0))  # noqa: E731
    constraints = FeatureConstraints(integer=list(range(6)), immutable=[1], increasing=[2])
    attack = HotFlip(norm="l2", eps=3.0, bounds=(0, 5), constraints=constraints)
    X_adv = attack(model_of_present, X, model_of_present(X).argmax(1), generator=seeded())
    assert torch.equal(X_adv.isnan(), X.isnan())
    moved = (X_adv - X).nan_to_num(0.0)
    assert (moved != 0).any()
    assert (moved[:, 1] == 0).all()
    assert (moved[:, 2] >= 0).all()


@pytest.mark.parametrize("name", ["n_steps", "n_restarts"])
def test_parameters_are_checked(name):
    with pytest.raises(ValueError, match=f"Got {name}=0, but expected"):
        HotFlip(**{name: 0}).check_params()


@pytest.mark.parametrize("attack", [HotFlip, FMN])
def test_a_group_changes_although_one_of_its_categories_is_immutable(attack):
    rng = np.random.default_rng(0)
    groups = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    X = torch.from_numpy(np.hstack([np.eye(3)[rng.integers(0, 2, 40)] for _ in groups]))
    model = Linear(torch.from_numpy(np.tile([0.0, 1.0, 9.0], 3)), 1.5)
    y = model(X).argmax(1)
    constraints = FeatureConstraints(one_hot=groups, immutable=[2, 5, 8])
    threat = {"norm": "l1", "eps": 6.0, "constraints": constraints}
    found = attack(**threat).search(model, X, y, generator=seeded())
    assert found.fooled.all()
    assert (found.X_adv[:, [2, 5, 8]] == 0).all()


@pytest.mark.parametrize(
    ("norm", "scale"),
    [
        ("l1", None),
        pytest.param("l2", [1.0, 1.0, 1.0, 9.0, 9.0, 9.0], marks=pytest.mark.slow),
    ],
)
def test_distances_do_not_depend_on_who_else_is_searched(norm, scale):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    net = MLP(6, 3, hidden_units=(16,)).double()
    X = torch.from_numpy(rng.integers(0, LEVELS, (20, 6)).astype(float))
    y = net(X).argmax(1)
    threat = {"norm": norm, "bounds": (0, 5), "feature_scale": scale}
    attack = FMN(
        **threat, constraints=FeatureConstraints(integer=list(range(6))), n_steps=5, n_restarts=1
    )
    whole = attack.distances(net, X, y, generator=seeded())
    parts = [
        attack.distances(net, X_part, y_part, generator=seeded())
        for X_part, y_part in zip(X.split([7, 13]), y.split([7, 13]), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=0)


def test_large_whole_numbers_are_left_to_the_gradient():
    X = torch.tensor([[30000.0, 2.0]])
    model = Linear(torch.tensor([1e-4, 1.0]), 5.0 + 0.5)
    constraints = FeatureConstraints(integer=[0, 1])
    threat = {"norm": "l1", "eps": 1.6, "feature_scale": [10000.0, 1.0], "constraints": constraints}
    found = HotFlip(**threat).search(model, X, model(X).argmax(1), generator=seeded())
    assert found.fooled.all()
    assert (found.X_adv == found.X_adv.round()).all()
    assert int(found.n_queries) < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steepness", [1.0, 1e2, 1e4])
def test_a_steep_feature_with_little_room_leaves_the_others_the_rest_of_the_budget(
    steepness, dtype
):
    w = torch.tensor([1.0, steepness, 1.0, 1.0, 1.0, 1.0], dtype=dtype)
    X, room, eps = torch.zeros(1, 6, dtype=dtype), 1e-3, 1.5
    constraints = FeatureConstraints(integer=[0], bounds={1: (0.0, room)})
    # The whole number by 1, the steep one to its bound, and four others alike.
    gain = 1 + steepness * room + 2 * (eps**2 - 1 - room**2) ** 0.5
    attack = HotFlip(norm="l2", eps=eps, constraints=constraints)
    for share, is_fooled in ((0.999, True), (1.001, False)):
        model = Linear(w, share * gain)
        found = attack.search(model, X, torch.tensor([0]), generator=seeded())
        assert bool(found.fooled) is is_fooled
