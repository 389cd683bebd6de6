"""Properties that every attack has. A new attack is one more entry of ATTACKS."""

import copy
import itertools
import pickle
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from skjacobian.attacks import APGD, FGSM, FMN, PGD, Cascade, HotFlip, RayS, Square
from skjacobian.constraints import FeatureConstraints
from skjacobian.exceptions import AttackWarning
from skjacobian.modules import CNN, MLP
from tests.attacks.problems import greedy
from tests.seeds import seeded

ATTACKS = {
    "FGSM": FGSM(),
    "FGSM, random start": FGSM(random_start=True),
    "FGSM, margin": FGSM(loss="margin"),
    "PGD": PGD(),
    "PGD, cross-entropy": PGD(loss="cross_entropy"),
    "PGD, margin, no random start": PGD(loss="margin", random_start=False),
    "PGD, DLR, momentum": PGD(loss="dlr", momentum=0.5),
    "PGD, targeted": PGD(n_targets=9, n_steps=20),
    "PGD, fixed steps and restarts": PGD(step_size=0.1, n_steps=15, n_restarts=3),
    "APGD": APGD(n_steps=40),
    "APGD, targeted DLR": APGD(loss="dlr", n_targets=9, n_steps=20),
    "FMN": FMN(),
    "HotFlip": HotFlip(),
    "RayS": RayS(n_queries=150),
    "RayS, minimal": RayS(n_queries=150, minimal=True),
    "Square": Square(n_queries=100, n_restarts=2),
    "Cascade": Cascade(n_queries=150),
}
GRADIENT_ATTACKS = [name for name, attack in ATTACKS.items() if attack.needs == "gradients"]
# One step of 1.25 eps from a random start ends anywhere between clean sample and optimum.
OPTIMAL_ON_LINEAR_MODELS = [name for name in GRADIENT_ATTACKS if name != "FGSM, random start"]
NORMS = ["linf", "l2", "l1"]


def brief(attack):
    """The same attack with few steps or queries, for what has nothing to do with strength."""
    given, few = attack.get_params(), {"n_steps": 6, "n_queries": 40}
    few = {name: min(n, given[name]) for name, n in few.items() if name in given}
    return clone(attack).set_params(**few)


BRIEF = {name: brief(attack) for name, attack in ATTACKS.items()}

every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
every_brief_attack = pytest.mark.parametrize("attack", BRIEF.values(), ids=BRIEF)
every_gradient_attack = pytest.mark.parametrize("name", GRADIENT_ATTACKS)
every_norm = pytest.mark.parametrize("norm", NORMS)
# For what has little to do with the norm.
every_brief_attack_in_some_norm = pytest.mark.parametrize(
    ("attack", "norm"),
    list(zip(BRIEF.values(), itertools.cycle(NORMS), strict=False)),
    ids=BRIEF,
)


def with_loss(loss):
    return [name for name, attack in ATTACKS.items() if getattr(attack, "loss", None) == loss]


def with_threat(attack, **threat):
    return clone(attack).set_params(**threat)


def make_net(kind="mlp", dtype=torch.float64, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = {
            "mlp": lambda: MLP(6, 3, hidden_units=(16,)),
            "cnn": lambda: CNN((1, 4, 4), 3, channels=(4,), kernel_size=3, hidden_units=(8,)),
        }[kind]()
    return net.to(dtype).eval()


def samples(shape=(6,), n=20, dtype=torch.float64, seed=0):
    return torch.rand(n, *shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def predicted(net, X):
    with torch.no_grad():
        return net(X).argmax(1)


def wrong(net, X, y):
    return predicted(net, X) != y


class LinearProblem:
    """Two classes, logits linear in x, so that the worst margin has a closed form."""

    def __init__(self, scale=None, bounds=None, seed=0):
        generator = seeded(seed)
        self.W = torch.randn(2, 6, generator=generator, dtype=torch.float64)
        # With a box, a third of the features lie on it.
        width = 1.0 if bounds is None else 1.4
        X = torch.rand(40, 6, generator=generator, dtype=torch.float64)
        self.X = (0.5 + width * (X - 0.5)).clamp(0, 1)
        self.b = -(self.W @ self.X.mean(0))
        self.y = predicted(self.logits, self.X)
        self.scale = scale
        self.bounds = bounds

    def logits(self, X):
        return X @ self.W.T + self.b

    def margin(self, X):
        z = self.logits(X)
        rows = torch.arange(len(z))
        return z[rows, 1 - self.y] - z[rows, self.y]

    def worst_margin(self, norm, eps):
        g = (self.W[1 - self.y] - self.W[self.y]).numpy()
        scale = np.ones(6) if self.scale is None else np.asarray(self.scale)
        low, high = (-np.inf, np.inf) if self.bounds is None else self.bounds
        X = self.X.numpy()
        if norm == "linf":
            delta = np.clip(X + np.sign(g) * eps * scale, low, high) - X
        else:
            best = best_step if norm == "l2" else greedy
            delta = [
                scale * best(gi, eps, u_low, u_high)
                for gi, u_low, u_high in zip(
                    g * scale, (low - X) / scale, (high - X) / scale, strict=True
                )
            ]
        return self.margin(self.X) + torch.from_numpy((g * delta).sum(1))


def best_step(g, eps, low, high):
    """argmax gᵀu on ball and box: clip(t g) with the t whose norm is eps, by bisection."""
    near, far = 0.0, 1e9
    if np.linalg.norm(np.clip(far * g, low, high)) <= eps:
        return np.clip(far * g, low, high)
    for _ in range(200):
        t = (near + far) / 2
        near, far = (t, far) if np.linalg.norm(np.clip(t * g, low, high)) <= eps else (near, t)
    return np.clip(near * g, low, high)


# --- what it finds -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eps", "scale"),
    [(0.05, None), (0.2, [0.2, 0.5, 1.0, 1.5, 2.0, 3.0])],
    ids=["plain", "scaled"],
)
@every_norm
@pytest.mark.parametrize("name", OPTIMAL_ON_LINEAR_MODELS)
def test_the_optimum_of_a_linear_model_is_reached(name, norm, scale, eps, generator):
    problem = LinearProblem(scale)
    attack = with_threat(ATTACKS[name], norm=norm, eps=eps, feature_scale=scale)
    found = attack.search(problem.logits, problem.X, problem.y, generator=generator)
    worst = problem.worst_margin(norm, eps)
    assert torch.equal(found.fooled, worst > 0)
    assert 0 < found.fooled.sum() < len(problem.X)
    margin, worst = (value[~found.fooled] for value in (problem.margin(found.X_adv), worst))
    torch.testing.assert_close(margin, worst, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "scale"),
    [("linf", None), ("l2", [0.2, 0.5, 1.0, 1.5, 2.0, 3.0]), ("l1", None)],
    ids=["linf", "l2, scaled", "l1"],
)
@pytest.mark.parametrize("name", [name for name in OPTIMAL_ON_LINEAR_MODELS if "PGD" in name])
def test_the_optimum_of_a_linear_model_inside_a_box_is_reached(name, norm, scale, generator):
    problem = LinearProblem(scale, bounds=(0.0, 1.0))
    eps = {"linf": 0.1, "l2": 0.3, "l1": 0.6}[norm]
    attack = with_threat(
        ATTACKS[name], norm=norm, eps=eps, feature_scale=scale, bounds=(0, 1), n_steps=100
    )
    found = attack.search(problem.logits, problem.X, problem.y, generator=generator)
    worst = problem.worst_margin(norm, eps)
    standing = ~found.fooled
    assert 0 < standing.sum() < len(problem.X)
    assert (worst[standing] < 1e-4).all()
    margin = problem.margin(found.X_adv)
    torch.testing.assert_close(margin[standing], worst[standing], rtol=0, atol=1e-4)


@every_attack
@every_norm
def test_on_a_linear_model_success_never_falls_with_the_radius(attack, norm):
    problem = LinearProblem()
    rates = [
        with_threat(attack, norm=norm, eps=eps)
        .search(problem.logits, problem.X, problem.y, generator=seeded())
        .fooled.double()
        .mean()
        .item()
        for eps in (0.0, 0.1, 3.0)
    ]
    assert rates == sorted(rates)
    assert rates[0] == 0.0
    # Fifteen steps of 0.1 do not lead across the widest l1 ball.
    assert rates[-1] >= (0.95 if norm == "l1" else 1.0)


@pytest.mark.parametrize(
    ("norm", "eps"),
    [("linf", [0.0, 0.3] * 10), ("linf", 0.05), ("l2", 0.3), ("l2", 0.05), ("l1", [0.0, 0.3] * 10)],
    ids=str,
)
@every_brief_attack
def test_fooled_says_what_the_logits_say(attack, norm, eps, generator):
    net, X = make_net(), samples()
    y = torch.arange(20) % 3  # some samples are misclassified from the outset
    eps = torch.tensor(eps) if isinstance(eps, list) else eps
    found = with_threat(attack, norm=norm, eps=eps).search(net, X, y, generator=generator)
    assert torch.equal(found.fooled, wrong(net, found.X_adv, y))


@every_norm
@every_brief_attack
def test_fooled_says_what_the_logits_say_where_rounding_is_coarse(attack, norm, generator):
    # At an offset of 1e5 the spacing of float32 numbers is 0.008, a sixtieth of the radius.
    W = torch.randn(3, 5, generator=generator)
    X = 1e5 + torch.randn(2000, 5, generator=generator)

    def logits(X):
        return (X - 1e5) @ W.T

    y = predicted(logits, X)
    found = with_threat(attack, norm=norm, eps=0.5).search(logits, X, y, generator=generator)
    assert torch.equal(found.fooled, wrong(logits, found.X_adv, y))


@every_brief_attack_in_some_norm
def test_a_model_may_compute_in_more_precision_than_its_samples_have(attack, norm):
    net, X = make_net(), samples(dtype=torch.float32)
    y = predicted(net, X.double())
    attack = with_threat(attack, norm=norm, eps=0.4)
    found = attack.search(lambda X: net(X.double()), X, y, generator=seeded())
    assert found.X_adv.dtype == torch.float32
    assert torch.equal(found.fooled, wrong(net, found.X_adv.double(), y))
    exact = attack.search(net, X.double(), y, generator=seeded())
    assert (found.fooled != exact.fooled).sum() <= 1


@every_brief_attack_in_some_norm
def test_calling_the_attack_returns_what_the_search_found(attack, norm):
    net, X = make_net(), samples()
    y = predicted(net, X)
    attack = with_threat(attack, norm=norm)
    X_adv = attack(net, X, y, generator=seeded())
    assert torch.equal(X_adv, attack.search(net, X, y, generator=seeded()).X_adv)


# --- where it stays ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "shape", "dtype", "scale", "bounds"),
    [
        ("l1", (6,), torch.float64, None, None),
        ("l2", (6,), torch.float64, "array", "per feature"),
        ("linf", (6,), torch.float32, "array", None),
        ("l1", (6,), torch.float32, "std", "per feature"),
        ("l2", (1, 4, 4), torch.float32, "std", None),
        ("linf", (1, 4, 4), torch.float32, None, "per feature"),
    ],
    ids=str,
)
@every_attack
def test_nothing_leaves_ball_and_box(attack, norm, shape, dtype, scale, bounds, generator):
    net = make_net("mlp" if len(shape) == 1 else "cnn", dtype)
    X = samples(shape, n=8, dtype=dtype)
    X.flatten(1)[:, 0] = 0.25  # "std" holds a constant feature fixed
    n_features = X[0].numel()
    if scale == "array":
        scale = np.linspace(0.5, 2.0, n_features, dtype=np.float32)
    if bounds == "per feature":
        bounds = (np.zeros(n_features), np.linspace(1.0, 2.0, n_features, dtype=np.float32))
    attack = with_threat(attack, norm=norm, eps=0.37, feature_scale=scale, bounds=bounds)
    X_adv = attack(net, X, predicted(net, X), generator=generator)
    assert X_adv.dtype == dtype
    assert X_adv.shape == X.shape

    clean, moved = (value.double().numpy().reshape(8, -1) for value in (X, X_adv))
    unit = np.ones(n_features) if scale is None else scale
    if isinstance(scale, str):
        unit = X.std(0, correction=0).double().numpy().ravel()
    delta = np.abs(moved - clean)
    assert (delta[:, unit == 0] == 0).all()
    delta = delta[:, unit > 0] / unit[unit > 0]
    length = {"linf": delta.max(1), "l2": np.sqrt((delta**2).sum(1)), "l1": delta.sum(1)}[norm]
    assert (length <= 0.37).all()
    assert (length > 0).any()
    if bounds is not None:
        assert ((moved >= bounds[0]) & (moved <= bounds[1])).all()


@pytest.mark.parametrize("scale", [None, "std"])
@every_norm
@every_brief_attack
def test_a_radius_of_zero_changes_nothing(attack, norm, scale, generator):
    net, X = make_net(dtype=torch.float32), samples(dtype=torch.float32)
    attack = with_threat(attack, norm=norm, eps=0, feature_scale=scale, bounds=(0, 1))
    assert torch.equal(attack(net, X, predicted(net, X), generator=generator), X)


@every_brief_attack_in_some_norm
def test_each_sample_may_have_its_own_radius(attack, norm):
    net, X = make_net(), samples(n=4)
    y = predicted(net, X)
    radii = [0.0, 0.0625, 0.25, 0.5]
    together = with_threat(attack, norm=norm, eps=torch.tensor(radii, dtype=torch.float64))
    X_adv = together(net, X, y, generator=seeded())
    for i, eps in enumerate(radii):
        alone = with_threat(attack, norm=norm, eps=eps)
        row = slice(i, i + 1)
        torch.testing.assert_close(X_adv[row], alone(net, X[row], y[row], generator=seeded()))


@every_brief_attack
def test_the_arguments_are_left_as_they_were(attack, generator):
    net, X = make_net(), samples()
    y = predicted(net, X)
    before = X.clone(), y.clone()
    attack(net, X, y, generator=generator)
    assert torch.equal(X, before[0])
    assert torch.equal(y, before[1])


@every_brief_attack_in_some_norm
def test_samples_that_require_a_gradient_are_attacked_like_any_other(attack, norm):
    net, X = make_net(), samples()
    y = predicted(net, X)
    attack = with_threat(attack, norm=norm)
    expected = attack(net, X, y, generator=seeded())
    X_adv = attack(net, X.requires_grad_(), y, generator=seeded())
    assert torch.equal(X_adv, expected)
    assert not X_adv.requires_grad
    assert X.grad is None


@every_brief_attack
def test_an_empty_batch_is_returned_empty(attack):
    net, X = make_net(), samples()
    found = attack.search(net, X[:0], torch.zeros(0, dtype=torch.long))
    assert found.X_adv.shape == (0, 6)
    assert found.fooled.shape == (0,)


@pytest.mark.parametrize(
    ("norm", "kind", "scale", "bounds"),
    [
        ("linf", "mask", "std", (0, 1)),
        ("l2", "mask in the shape of a sample", None, None),
        ("l1", "indices", None, (0, 1)),
    ],
)
@every_brief_attack
def test_features_that_may_not_change_do_not(attack, norm, kind, scale, bounds):
    net, X = make_net("cnn"), samples((1, 4, 4))
    y = torch.arange(20) % 3
    free = torch.zeros(16, dtype=torch.bool)
    free[[0, 3, 4, 5, 9, 15]] = True
    mutable = {"indices": [0, 3, 4, 5, 9, -1], "mask": free.numpy()}.get(kind, free.view(1, 4, 4))
    attack = with_threat(
        attack, norm=norm, eps=0.4, mutable=mutable, feature_scale=scale, bounds=bounds
    )
    X_adv = attack(net, X, y, generator=seeded())
    moved = (X_adv != X).flatten(1)
    assert not moved[:, ~free].any()
    assert moved[:, free].any()


@every_norm
@pytest.mark.parametrize("name", [n for n in ATTACKS if n not in ("FGSM, random start", "RayS")])
def test_features_that_may_not_change_leave_the_optimum_over_the_others(name, norm):
    problem, free = LinearProblem(), [0, 2, 3, 5]
    eps = {"linf": 0.15, "l2": 0.25, "l1": 0.5}[norm]
    g = (problem.W[1 - problem.y] - problem.W[problem.y])[:, free]
    worst = problem.margin(problem.X) + eps * torch.linalg.vector_norm(
        g, {"linf": 1, "l2": 2, "l1": torch.inf}[norm], dim=1
    )
    attack = with_threat(ATTACKS[name], norm=norm, eps=eps, mutable=free)
    found = attack.search(problem.logits, problem.X, problem.y, generator=seeded())
    assert 5 < (worst > 0).sum() < 35
    assert not (found.fooled & (worst <= 0)).any()
    missed = (worst > 0) & ~found.fooled
    assert missed.sum() <= (3 if "Square" in name else 0)


@every_norm
@pytest.mark.parametrize("name", OPTIMAL_ON_LINEAR_MODELS)
def test_a_feature_whose_bounds_leave_one_value_does_not_stand_in_the_way(name, norm):
    problem, shut = LinearProblem(), [1, 4]
    problem.W[:, shut] *= 1000
    problem.X[:, shut] = 0.5
    problem.b = -(problem.W @ problem.X.mean(0))
    problem.y = problem.logits(problem.X).argmax(1)
    low, high = np.full(6, -5.0), np.full(6, 5.0)
    low[shut] = high[shut] = 0.5
    g = (problem.W[1 - problem.y] - problem.W[problem.y])[:, [0, 2, 3, 5]]
    slope = torch.linalg.vector_norm(g, {"linf": 1, "l2": 2, "l1": torch.inf}[norm], dim=1)
    distances = -problem.margin(problem.X) / slope
    eps = float(distances.median()) * 1.001
    attack = with_threat(ATTACKS[name], norm=norm, eps=eps, bounds=(low, high))
    found = attack.search(problem.logits, problem.X, problem.y, generator=seeded())
    assert torch.equal(found.fooled, distances < eps)
    assert (found.X_adv[:, shut] == 0.5).all()


@pytest.mark.parametrize(
    ("scale", "said_by"),
    [(None, "constraints"), ([0.2, 0.5, 1.0, 1.5, 2.0, 3.0], "bounds")],
    ids=["plain", "scaled"],
)
@every_norm
@pytest.mark.parametrize("name", OPTIMAL_ON_LINEAR_MODELS)
def test_a_steep_feature_that_may_not_fall_does_not_stand_in_the_way(name, norm, scale, said_by):
    problem, steep = LinearProblem(), [1, 4]
    problem.W[:, steep] = torch.tensor([[1000.0], [-1000.0]], dtype=torch.float64)
    problem.X[:, steep] = 0.5
    problem.b = -(problem.W @ problem.X.mean(0))
    y = problem.logits(problem.X).argmax(1)
    problem.X, problem.y = problem.X[y == 0], y[y == 0]
    g = (problem.W[1] - problem.W[0])[[0, 2, 3, 5]]
    unit = torch.ones(6) if scale is None else torch.tensor(scale)
    order = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
    slope = torch.linalg.vector_norm(g * unit[[0, 2, 3, 5]], order)
    distances = -problem.margin(problem.X) / slope
    eps = float(distances.median()) * 1.001
    low = np.full(6, -5.0)
    low[steep] = 0.5
    threat = {
        "constraints": {"constraints": FeatureConstraints(increasing=steep)},
        "bounds": {"bounds": (low, np.full(6, 5.0))},
    }[said_by]
    attack = with_threat(ATTACKS[name], norm=norm, eps=eps, feature_scale=scale, **threat)
    found = attack.search(problem.logits, problem.X, problem.y, generator=seeded())
    assert 0 < found.fooled.sum() < len(problem.X)
    assert torch.equal(found.fooled, distances < eps)
    assert (found.X_adv[:, steep] >= 0.5).all()


@pytest.mark.parametrize(
    ("attack", "steepness"),
    [
        *((PGD(), steepness) for steepness in (1.0, 30.0, 300.0)),
        *((APGD(), steepness) for steepness in (1.0, 30.0, 300.0)),
        *((FMN(), steepness) for steepness in (1.0, 30.0, 300.0)),
        (Cascade(), 30.0),
    ],
    ids=repr,
)
def test_steep_features_at_their_bounds_do_not_stand_in_the_way_of_many(attack, steepness):
    rng, n, n_bounded, n_free = np.random.default_rng(0), 30, 120, 30
    w = np.r_[steepness * rng.normal(size=n_bounded), rng.normal(size=n_free)]
    X = np.c_[rng.integers(0, 2, (n, n_bounded)).astype(float), rng.normal(size=(n, n_free))]
    low, high = np.r_[np.zeros(n_bounded), np.full(n_free, -np.inf)], np.full(150, np.inf)
    high[:n_bounded] = 1.0
    # All of the steep features that can follow come to their other bound.
    distances = 10 * np.r_[np.linspace(0.85, 0.99, 15), np.linspace(1.01, 1.15, 15)]
    lead = [
        w @ (x + best_step(w, distance, low - x, high - x))
        for x, distance in zip(X, distances, strict=True)
    ]
    # The last feature, which may not change, is the logit of the true class.
    data, weight = torch.from_numpy(np.c_[X, lead]), torch.from_numpy(w)
    found = with_threat(
        attack,
        norm="l2",
        eps=10.0,
        bounds=(np.r_[low, -np.inf], np.r_[high, np.inf]),
        mutable=list(range(150)),
    ).search(
        lambda X: torch.stack([X[:, -1], X[:, :-1] @ weight], 1),
        data,
        torch.zeros(n, dtype=torch.int64),
        generator=seeded(),
    )
    np.testing.assert_array_equal(found.fooled.numpy(), distances < 10)


# --- value objects and randomness --------------------------------------------------------


@every_brief_attack
def test_an_attack_is_a_value_object(attack):
    attack = with_threat(attack, eps=0.25, bounds=(0, 1))
    for copied in (clone(attack), pickle.loads(pickle.dumps(attack)), copy.deepcopy(attack)):
        assert copied.get_params() == attack.get_params()
        assert repr(copied) == repr(attack)
    assert "eps=0.25" in repr(attack)
    assert "bounds=(0, 1)" in repr(attack)


@every_brief_attack
def test_running_an_attack_leaves_no_state_in_it(attack, generator):
    net, X = make_net(), samples()
    before = dict(vars(attack))
    attack(net, X, predicted(net, X), generator=generator)
    assert vars(attack) == before


@every_brief_attack
@pytest.mark.parametrize("generator", [None, seeded()], ids=["no generator", "generator"])
def test_global_random_states_are_left_alone(attack, generator):
    net, X = make_net(), samples()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    attack(net, X, predicted(net, X), generator=generator)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@every_brief_attack_in_some_norm
def test_the_same_seed_gives_the_same_result(attack, norm):
    net, X = make_net(), samples()
    y = predicted(net, X)
    attack = with_threat(attack, norm=norm)
    first, second = (attack(net, X, y, generator=seeded(7)) for _ in range(2))
    assert torch.equal(first, second)


@every_norm
# Where a budget ends the cascade it does depend on them: a batch stops at the same step.
@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "Cascade"])
def test_the_result_does_not_depend_on_how_samples_are_batched(name, norm):
    net, X = make_net(), samples(n=30)
    y = predicted(net, X)
    y[::7] = (y[::7] + 1) % 3
    attack = with_threat(BRIEF[name], norm=norm, eps=0.2, bounds=(0, 1))
    whole = attack.search(net, X, y, generator=seeded())
    parts = [
        attack.search(net, X[part], y[part], generator=seeded())
        for part in torch.arange(30).split([1, 12, 17])
    ]
    assert torch.equal(torch.cat([part.fooled for part in parts]), whole.fooled)
    torch.testing.assert_close(torch.cat([part.X_adv for part in parts]), whole.X_adv)
    order = torch.randperm(30, generator=seeded())
    shuffled = attack.search(net, X[order], y[order], generator=seeded())
    torch.testing.assert_close(shuffled.X_adv, whole.X_adv[order])


# --- the model it attacks ----------------------------------------------------------------


def trained_looking_net():
    """A net in mixed modes, with used running statistics and one frozen parameter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
        )
        net.double()(samples())
    net[3].eval()
    net[0].bias.requires_grad_(False)
    return net


def snapshot(net):
    return (
        [module.training for module in net.modules()],
        [(p.requires_grad, p.grad) for p in net.parameters()],
        {key: value.tolist() for key, value in net.state_dict().items()},
    )


@every_brief_attack
def test_the_module_is_left_as_it_was(attack, generator):
    net, X = trained_looking_net(), samples()
    before = snapshot(net)
    attack(net, X, torch.zeros(20, dtype=torch.long), generator=generator)
    assert snapshot(net) == before


@every_brief_attack
def test_the_module_is_left_as_it_was_after_an_error(attack, generator):
    net, X = trained_looking_net(), samples()
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        attack(net, X[:, :4], torch.zeros(20, dtype=torch.long), generator=generator)
    assert snapshot(net) == before


@every_brief_attack
def test_a_module_is_attacked_in_eval_mode(attack):
    net, X = trained_looking_net(), samples()
    y = torch.zeros(20, dtype=torch.long)
    in_training_mode = attack(net, X, y, generator=seeded())
    assert torch.equal(in_training_mode, attack(net.eval(), X, y, generator=seeded()))


@every_brief_attack
def test_a_function_is_attacked_like_the_module_in_it(attack):
    net, X = make_net(), samples()
    y = predicted(net, X)
    X_adv = attack(lambda X: net(X), X, y, generator=seeded())
    assert torch.equal(X_adv, attack(net, X, y, generator=seeded()))
    assert all(p.grad is None for p in net.parameters())


@every_brief_attack
def test_it_runs_where_gradients_are_switched_off(attack):
    net, X = make_net(), samples()
    y = predicted(net, X)
    expected = attack(net, X, y, generator=seeded())
    with torch.no_grad():
        assert torch.equal(attack(net, X, y, generator=seeded()), expected)
        assert not torch.is_grad_enabled()


@every_brief_attack_in_some_norm
def test_probabilities_are_attacked_like_the_logits_they_come_from(attack, norm):
    net, X = make_net(), samples(n=50)
    y = predicted(net, X)
    y[::7] = (y[::7] + 1) % 3
    attack = with_threat(attack, norm=norm, eps={"linf": 0.1, "l2": 0.2, "l1": 0.4}[norm])
    by_logits = attack.search(net, X, y, generator=seeded())
    by_probabilities = attack.search(lambda X: net(X).softmax(1), X, y, generator=seeded())
    assert 8 < by_logits.fooled.sum() < 50
    assert torch.equal(by_probabilities.fooled, by_logits.fooled)
    at = by_logits.fooled
    torch.testing.assert_close(by_probabilities.X_adv[at], by_logits.X_adv[at], rtol=0, atol=1e-6)


# --- warnings and errors -----------------------------------------------------------------


@pytest.mark.parametrize("count", [8, 3])
@pytest.mark.parametrize("name", with_loss("cross_entropy"))
def test_saturated_cross_entropy_is_warned_of(name, count, generator):
    net = make_net(dtype=torch.float32)
    X = samples(n=8, dtype=torch.float32)
    X[:, 0] = (torch.arange(8) < count).float()  # marks the samples with huge logits
    y = predicted(net, X)

    def logits(X):
        return net(X) * torch.where(X[:, :1] > 0.5, 1e6, 1.0)

    message = f"zero at the first step of {count} of 8 samples.*loss='soft_margin'"
    with pytest.warns(AttackWarning, match=message):
        with_threat(ATTACKS[name], eps=1e-3)(logits, X, y, generator=generator)


@pytest.mark.parametrize("name", with_loss("margin") + with_loss("soft_margin"))
def test_the_margin_does_not_saturate(name, generator):
    net = make_net(dtype=torch.float32)
    X = samples(n=8, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ATTACKS[name](lambda X: 1e6 * net(X), X, predicted(net, X), generator=generator)


@every_gradient_attack
def test_gradients_that_are_not_finite_are_warned_of(name, generator):
    net, X = make_net(), samples(n=8)
    y = predicted(net, X)
    with pytest.warns(AttackWarning, match=r"NaN or infinite at the first step of 8 of 8 samples"):
        X_adv = ATTACKS[name](lambda X: net(X) * torch.nan, X, y, generator=generator)
    assert torch.equal(X_adv, X)


@pytest.mark.parametrize("frozen", [True, False], ids=["no graph", "a graph of the weights only"])
@every_gradient_attack
def test_a_model_that_is_not_differentiable_is_an_error(name, frozen, generator):
    net, X = make_net(), samples()
    net.requires_grad_(not frozen)
    with pytest.raises(ValueError, match="does not depend on X differentiably"):
        ATTACKS[name](lambda X: net(X.detach()), X, predicted(net, X), generator=generator)


@every_brief_attack
def test_arrays_are_refused_and_the_way_out_is_named(attack):
    net, X = make_net(), samples()
    y = predicted(net, X)
    message = r"Got {} of type ndarray, but expected a torch\.Tensor.*RobustScorer"
    with pytest.raises(TypeError, match=message.format("X")):
        attack(net, X.numpy(), y)
    with pytest.raises(TypeError, match=message.format("y")):
        attack(net, X, y.numpy())


@every_brief_attack
def test_samples_and_labels_must_be_as_many(attack):
    net, X = make_net(), samples()
    with pytest.raises(ValueError, match="Got X with 20 samples and y with 19, but expected as"):
        attack(net, X, predicted(net, X)[1:])


@every_brief_attack
def test_clean_samples_outside_their_bounds_are_an_error(attack):
    net, X = make_net(), samples()
    X[3, 2] = 1.5
    message = r"Got X with 1 of 20 samples outside bounds=\(0\.0, 1\.0\), by up to 0\.5"
    with pytest.raises(ValueError, match=message):
        with_threat(attack, bounds=(0, 1))(net, X, predicted(net, X))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"eps": -1}, "Got eps=-1, but expected a non-negative finite number"),
        ({"eps": float("nan")}, "Got eps=nan, but expected a non-negative finite number"),
        ({"eps": "0.1"}, "Got eps='0.1', but expected a non-negative finite number"),
        ({"norm": "l3"}, "Got norm='l3', but expected one of 'l2', 'linf'"),
        ({"norm": "inf"}, "(did you mean 'linf'?)"),
        ({"bounds": (1, 0)}, "Got bounds=(1, 0), but expected None or a tuple (low, high)"),
        ({"bounds": (0, [1, 1])}, "Got bounds with 2 values, but expected"),
        ({"feature_scale": "sdt"}, "(did you mean 'std'?)"),
        ({"feature_scale": [1, 2]}, "Got feature_scale with 2 values, but expected"),
        ({"feature_scale": -1}, "Got feature_scale=-1, but expected positive finite numbers"),
    ],
    ids=repr,
)
@every_brief_attack
def test_bad_parameters_are_rejected(attack, params, message):
    net, X = make_net(), samples()
    with pytest.raises(ValueError, match=re.escape(message)):
        with_threat(attack, **params)(net, X, predicted(net, X))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"loss": "foo"},
            "Got loss='foo', but expected one of 'soft_margin', 'cross_entropy', 'margin', 'dlr'",
        ),
        ({"loss": "cross-entropy"}, "(did you mean 'cross_entropy'?)"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", [n for n in GRADIENT_ATTACKS if hasattr(ATTACKS[n], "loss")])
def test_an_unknown_loss_is_rejected(name, params, message):
    net, X = make_net(), samples()
    with pytest.raises(ValueError, match=re.escape(message)):
        with_threat(ATTACKS[name], **params)(net, X, predicted(net, X))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("one_each", [True, False], ids=["one each", "one for all"])
@every_brief_attack
def test_a_bad_radius_in_a_tensor_is_rejected(attack, one_each, bad):
    net, X = make_net(), samples()
    eps = torch.full((20,), 0.1) if one_each else torch.tensor(bad)
    if one_each:
        eps[4] = bad
    with pytest.raises(ValueError, match=r"(?s)Got eps=.*, but expected"):
        with_threat(attack, eps=eps)(net, X, predicted(net, X))


@pytest.mark.parametrize(
    ("norm", "eps"),
    [
        ("linf", np.float32(0.25)),
        ("l2", np.float64(0.25)),
        ("l1", np.array(0.25)),
        ("linf", torch.tensor(0.25)),
    ],
    ids=repr,
)
@every_brief_attack
def test_the_radius_may_be_any_kind_of_scalar(attack, norm, eps):
    net, X = make_net(), samples()
    y = predicted(net, X)
    X_adv = with_threat(attack, norm=norm, eps=eps)(net, X, y, generator=seeded())
    expected = with_threat(attack, norm=norm, eps=0.25)(net, X, y, generator=seeded())
    torch.testing.assert_close(X_adv, expected)


# --- logits that do not matter -----------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "masked"),
    [
        ("linf", -1e4),
        ("l2", -1e9),
        ("l1", -torch.inf),
    ],
)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_class_that_is_masked_changes_nothing(name, norm, masked, generator):
    problem = LinearProblem(seed=3)
    others = torch.randn(3, 6, generator=generator) - 1.0

    def logits(X, value):
        X = X.float()
        seen = torch.cat([problem.logits(X.double()).float(), X @ others.T - 1.0], dim=1)
        return torch.cat([seen, torch.full_like(seen[:, :1], value)], dim=1)

    X = problem.X.float()
    y = logits(X, -100.0).argmax(1)
    attack = with_threat(BRIEF[name], norm=norm, eps={"linf": 0.2, "l2": 0.4, "l1": 0.8}[norm])
    usual, found = (
        attack.search(partial(logits, value=value), X, y, generator=seeded(1))
        for value in (-100.0, masked)
    )
    is_wrong = logits(found.X_adv, masked).argmax(1) != y
    assert torch.equal(found.fooled, is_wrong)
    assert found.fooled.sum() >= usual.fooled.sum() - 1
    assert usual.fooled.sum() > 5


@every_brief_attack_in_some_norm
def test_where_nothing_may_change_nothing_does(attack, norm, generator):
    problem = LinearProblem()
    constraints = FeatureConstraints(immutable=range(6))
    attack = with_threat(attack, norm=norm, eps=0.5, constraints=constraints)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = attack.search(problem.logits, problem.X, problem.y, generator=generator)
    assert not found.fooled.any()
    assert torch.equal(found.X_adv, problem.X)


@pytest.mark.parametrize("shape", [(2,), (3, 1)])
def test_radii_are_one_for_each_sample(shape):
    with pytest.raises(ValueError, match="expected one radius, or one for each of 3 samples"):
        PGD(eps=torch.ones(shape))(nn.Linear(3, 2), torch.zeros(3, 3), torch.tensor([0, 1, 0]))


@pytest.mark.parametrize(
    ("X", "y", "match"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]), "Got X of torch.int64, but"),
        (torch.zeros(2, 3), torch.tensor([0.0, 0.9]), "Got y of torch.float32, but expected class"),
        (torch.zeros(2, 3), torch.tensor([True, False]), "Got y of torch.bool, but expected class"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "Got y from -1, but expected class indices"),
        (
            torch.zeros(2, 3),
            torch.eye(2, dtype=int),
            r"y of shape \(2, 2\), but expected one class",
        ),
        (torch.tensor(0.5), torch.tensor([0]), r"X of shape \(\), but expected \(n_samples, "),
        (torch.zeros(2, 3), torch.tensor([0, 2]), "Got y up to 2 and a model of 2 classes, but"),
    ],
)
def test_tensors_of_another_type_are_named(X, y, match):
    with pytest.raises(ValueError, match=match):
        PGD()(nn.Linear(3, 2), X, y)


@every_gradient_attack
def test_inference_mode_has_no_gradients(name):
    X, y = torch.rand(3, 4), torch.tensor([0, 1, 0])
    with torch.inference_mode():
        made_there = X.clone()
        with pytest.raises(RuntimeError, match=r"Got torch.inference_mode\(\), but expected"):
            BRIEF[name](nn.Linear(4, 2), X, y)
    net = nn.Linear(4, 2)
    ends = (BRIEF[name](net, samples, y, generator=seeded(0)) for samples in (made_there, X))
    assert torch.equal(*ends)


@every_brief_attack_in_some_norm
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_inside_and_half_precision(attack, norm, dtype):
    torch.manual_seed(0)
    net, X = nn.Linear(4, 3).to(dtype), torch.rand(8, 4, dtype=dtype)
    attack = with_threat(attack, norm=norm, eps=0.3)
    X_adv = attack(net, X, net(X).argmax(1), generator=seeded(0))
    assert X_adv.dtype == dtype
    assert attack.ball(X).contains(X_adv).all()
