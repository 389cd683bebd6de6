import numpy as np
import pytest
import torch

from skjacobian.attacks import FGSM, PGD
from skjacobian.attacks._ascent import GradientAscent
from skjacobian.modules import MLP

NORMS = ["linf", "l2"]
EPS = 0.2


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_problem(n=60, n_features=6, n_classes=3, width=24, seed=0):
    """A ReLU net that is bent inside the balls, samples in [-1, 1], and its predictions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MLP(n_features, n_classes, hidden_units=(width, width)).double()
    X = 2 * torch.rand(n, n_features, generator=seeded(), dtype=torch.float64) - 1
    with torch.no_grad():
        for layer in net[1:4:2]:
            layer.weight *= 3
        net[-1].bias -= net(X).mean(0)  # all classes occur
    net.requires_grad_(False)
    return net, X, net(X).argmax(1)


def margins(net, X, y):
    logits = net(X)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    return others - logits.gather(1, y.unsqueeze(1)).squeeze(1)


# --- the slow oracle ---------------------------------------------------------------------


def plain_projection(Z, X, norm, eps, bounds):
    if norm == "linf":
        return (X + (Z - X).clamp(-eps, eps)).clamp(*bounds)
    delta = Z - X
    length = delta.norm(dim=1, keepdim=True)
    return X + delta * (eps / length).clamp(max=1.0)


def plain_gradient(net, X_adv, y, loss):
    X_adv = X_adv.clone().requires_grad_()
    if loss == "margin":
        value = margins(net, X_adv, y)
    else:
        value = torch.nn.functional.cross_entropy(net(X_adv), y, reduction="none")
    return torch.autograd.grad(value.sum(), X_adv)[0]


def plain_pgd(net, X, y, attack, generator, bounds):
    """The textbook loop: every sample takes every step of every restart.

    Returns for each sample whether any iterate fooled the net, the first one that did, and
    the largest margin of an end point.
    """
    eps, norm = attack.eps, attack.norm
    fooled = torch.zeros(len(X), dtype=torch.bool)
    first = X.clone()
    best_end = torch.full((len(X),), -torch.inf, dtype=torch.float64)
    for _ in range(attack.n_restarts):
        X_adv = X
        if attack.random_start:
            X_adv = attack.ball(X).random_start(generator)
        for step in range(attack.n_steps + 1):
            found = margins(net, X_adv, y) > 0
            first[found & ~fooled] = X_adv[found & ~fooled]
            fooled |= found
            if step == attack.n_steps:
                break
            falling = 2 * eps * (1 - step / attack.n_steps) ** 2
            step_size = attack.step_size or falling
            gradient = plain_gradient(net, X_adv, y, attack.loss)
            if norm == "linf":
                direction = gradient.sign()
            else:
                direction = gradient / gradient.norm(dim=1, keepdim=True)
            X_adv = plain_projection(X_adv + step_size * direction, X, norm, eps, bounds)
        best_end = torch.maximum(best_end, margins(net, X_adv, y))
    return fooled, first, best_end


@pytest.mark.parametrize("gives_up", [True, False], ids=["gives up", "to the end"])
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"n_steps": 7},
        {"n_restarts": 3, "n_steps": 15},
        {"step_size": 0.05, "n_steps": 20},
        {"random_start": False},
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    ("norm", "eps", "bounds"),
    [("linf", 0.05, None), ("linf", 0.1, (-1.0, 1.0)), ("l2", 0.12, None)],
    ids=["linf", "linf in a box", "l2"],
)
def test_retiring_samples_finds_what_the_plain_loop_finds(
    norm, eps, bounds, params, loss, gives_up, monkeypatch
):
    if not gives_up:
        monkeypatch.setattr(GradientAscent, "LATE", 0.0)
    net, X, y = make_problem(n=120)
    y[::10] = (y[::10] + 1) % 3
    attack = PGD(norm=norm, eps=eps, bounds=bounds, loss=loss, **params)
    found = attack.search(net, X, y, generator=seeded(5))
    box = (-torch.inf, torch.inf) if bounds is None else bounds
    fooled, first, best_end = plain_pgd(net, X, y, attack, seeded(5), box)
    assert 20 < fooled.sum() < 115
    assert torch.equal(found.fooled, fooled)
    torch.testing.assert_close(found.X_adv[fooled], first[fooled], rtol=0, atol=1e-9)
    end, best_end = margins(net, found.X_adv, y)[~fooled], best_end[~fooled]
    if gives_up:
        # What the search gave up on stays where it was, short of the end of the plain loop.
        assert ((end < 0) & (end > 1.2 * best_end)).all()
    else:
        torch.testing.assert_close(end, best_end, rtol=0, atol=1e-9)


# --- brute force -------------------------------------------------------------------------


def grid_in_ball(norm, eps, n=161):
    axis = torch.linspace(-eps, eps, n, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    return grid if norm == "linf" else grid[grid.norm(dim=1) <= eps]


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("norm", NORMS)
def test_restarts_find_the_optimum_that_brute_force_finds(norm, loss):
    # With two classes cross-entropy grows with the margin, so both losses have one optimum.
    net, X, y = make_problem(n=40, n_features=2, n_classes=2, width=12, seed=1)
    deltas = grid_in_ball(norm, EPS)
    best = torch.stack(
        [margins(net, x + deltas, k.expand(len(deltas))).max() for x, k in zip(X, y, strict=True)]
    )
    attack = PGD(norm=norm, eps=EPS, loss=loss, n_restarts=8)
    found = attack.search(net, X, y, generator=seeded())
    # Between the points of the grid the margin can be larger by Lipschitz constant × spacing.
    slope = torch.linalg.matrix_norm(
        torch.autograd.functional.jacobian(lambda x: net(x).sum(0), X)
    ).max()
    tolerance = 2 * slope.item() * EPS / 80
    margin = margins(net, found.X_adv, y)
    assert (margin[found.fooled] > 0).all()
    assert (best[found.fooled] > -tolerance).all()
    standing = ~found.fooled
    assert 5 < standing.sum() < 35
    assert (margin[standing] <= best[standing] + tolerance).all()
    reached = torch.where(standing, margin >= best - tolerance, True)
    assert reached.double().mean() >= 0.95


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_more_restarts_are_never_worse(norm, loss):
    net, X, y = make_problem()
    attack = PGD(norm=norm, eps=0.06, n_steps=5, loss=loss)
    worst = margins(net, attack(net, X, y, generator=seeded()), y).clamp(max=0)
    for n_restarts in (2, 5, 10):
        attack.set_params(n_restarts=n_restarts)
        margin = margins(net, attack(net, X, y, generator=seeded()), y).clamp(max=0)
        assert (margin >= worst - 1e-12).all()
        worst = margin


@pytest.mark.parametrize("norm", NORMS)
def test_success_never_falls_with_the_radius(norm):
    net, X, y = make_problem()
    rates = [
        PGD(norm=norm, eps=eps, n_restarts=3).search(net, X, y, generator=seeded()).fooled.sum()
        for eps in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
    ]
    assert rates == sorted(rates)
    assert rates[0] < rates[2] < rates[-1]


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_never_weaker_than_one_step(norm):
    net, X, y = make_problem()
    one_step = FGSM(norm=norm, eps=0.1).search(net, X, y).fooled.sum()
    many_steps = PGD(norm=norm, eps=0.1).search(net, X, y, generator=seeded()).fooled.sum()
    assert many_steps >= one_step


def test_without_a_random_start_nothing_is_drawn():
    net, X, y = make_problem()
    attack = PGD(random_start=False)
    generator = seeded()
    before = generator.get_state()
    X_adv = attack(net, X, y, generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(attack(net, X, y, generator=seeded(1)), X_adv)


def test_another_seed_is_another_start():
    net, X, y = make_problem()
    attack = PGD(norm="l2", n_steps=1)
    first, second = (attack(net, X, y, generator=seeded(seed)) for seed in (0, 1))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_steps": 0}, "Got n_steps=0, but expected an integer of at least 1"),
        ({"n_steps": 2.5}, "Got n_steps=2.5, but expected an integer of at least 1"),
        ({"n_restarts": 0}, "Got n_restarts=0, but expected an integer of at least 1"),
        ({"step_size": 0}, "Got step_size=0, but expected a positive finite number"),
        ({"step_size": -1.0}, "Got step_size=-1.0, but expected a positive finite number"),
        ({"step_size": "auto"}, "Got step_size='auto', but expected a positive finite number"),
    ],
    ids=repr,
)
def test_bad_parameters_are_rejected(params, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PGD(**params)(*make_problem())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("n_steps", 8), ("n_restarts", 2), ("step_size", 0.0625)],
)
@pytest.mark.parametrize(
    "kind",
    [np.array, torch.tensor, lambda value: np.asarray(value)[()]],
    ids=["array", "tensor", "numpy scalar"],
)
def test_parameters_may_be_any_kind_of_scalar(norm, name, value, kind):
    net, X, y = make_problem()
    X_adv = PGD(norm=norm, **{name: kind(value)})(net, X, y, generator=seeded())
    expected = PGD(norm=norm, **{name: value})(net, X, y, generator=seeded())
    torch.testing.assert_close(X_adv, expected)
