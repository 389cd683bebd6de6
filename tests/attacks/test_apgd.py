"""APGD against the rule of the paper, a loop of its own, brute force and closed forms."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from skjacobian.attacks import APGD, FGSM, PGD
from skjacobian.attacks.apgd import checkpoints
from tests.attacks.problems import make_problem, margins
from tests.seeds import seeded

NORMS = ["linf", "l2"]


# --- checkpoints -------------------------------------------------------------------------


def test_a_hundred_steps_have_the_checkpoints_of_the_paper():
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("n_steps", [1, 2, 5, 10, 17, 40, 100, 300, 1000, 12345])
def test_checkpoints_follow_the_recursion_of_the_paper(n_steps):
    shares = [Fraction(0), Fraction(22, 100)]
    while True:
        step = max(shares[-1] - shares[-2] - Fraction(3, 100), Fraction(6, 100))
        if shares[-1] + step > 1:
            break
        shares.append(shares[-1] + step)
    assert checkpoints(n_steps) == {math.ceil(share * n_steps) for share in shares[1:]}


# --- the slow oracle ---------------------------------------------------------------------


def value_and_slope(net, x, label, loss):
    x = x.clone().requires_grad_()
    z = net(x.unsqueeze(0))[0]
    wrong = torch.cat([z[:label], z[label + 1 :]])
    if loss == "margin":
        value = wrong.max() - z[label]
    elif loss == "cross_entropy":
        value = z.logsumexp(0) - z[label]
    else:
        falling = z.sort(descending=True).values
        value = (wrong.max() - z[label]) / (falling[0] - falling[2])
    return value.item(), torch.autograd.grad(value, x)[0], (wrong.max() - z[label]).item()


def projected(z, x, norm, eps, box):
    if norm == "linf":
        return torch.minimum(torch.maximum(z, x - eps), x + eps).clamp(*box)
    delta = z - x
    length = delta.norm().item()
    return z if length <= eps else x + delta * (eps / length)


def plain_apgd(net, x, label, start, attack, box):
    """Algorithm 1 of the paper for one sample, which takes every step.

    Returns the first point that fools the net or None, and the two points where it ended.
    """
    norm, eps, n_steps = attack.norm, attack.eps, attack.n_steps
    step_size, best, was_halved = 2 * eps, -math.inf, False
    best_at_checkpoint, values, last = -math.inf, [], 0
    x_adv = x_before = start
    for step in range(n_steps):
        value, slope, found = value_and_slope(net, x_adv, label, attack.loss)
        if found > 0:
            return x_adv, None
        values.append(value)
        if value > best:
            best, x_best, slope_best = value, x_adv, slope
        if step in (math.ceil(Fraction(p, 100) * n_steps) for p in (22, 41, 57, 70, 80, 87, 93)):
            rises = sum(values[i + 1] > values[i] for i in range(last, step))
            stalled = rises < 0.75 * (step - last)
            stalled |= not was_halved and best_at_checkpoint == best
            if stalled:
                # Of the momentum there the paper says nothing; none is left.
                step_size, x_adv, x_before, slope = step_size / 2, x_best, x_best, slope_best
            was_halved, best_at_checkpoint, last = stalled, best, step
        direction = slope.sign() if norm == "linf" else slope / slope.norm()
        z = projected(x_adv + step_size * direction, x, norm, eps, box)
        if step == 0:
            moved = z
        else:
            moved = projected(
                x_adv + 0.75 * (z - x_adv) + 0.25 * (x_adv - x_before), x, norm, eps, box
            )
        x_before, x_adv = x_adv, moved
    return None, (x_adv, x_best)


@pytest.mark.parametrize("loss", ["margin", "cross_entropy", "dlr"])
@pytest.mark.parametrize(
    ("norm", "eps", "bounds", "n_steps"),
    [
        ("linf", 0.05, None, 30),
        ("linf", 0.1, (-1.0, 1.0), 12),
        ("l2", 0.12, None, 30),
        ("l2", 0.06, None, 50),
    ],
    ids=["linf", "linf in a box", "l2", "l2, many steps"],
)
def test_it_finds_what_the_plain_loop_finds(norm, eps, bounds, n_steps, loss):
    net, X, y = make_problem(n=20)
    y[::10] = (y[::10] + 1) % 3
    attack = APGD(norm=norm, eps=eps, bounds=bounds, n_steps=n_steps, loss=loss)
    found = attack.search(net, X, y, generator=seeded(5))
    starts = attack.ball(X).random_start(seeded(5))
    box = (-torch.inf, torch.inf) if bounds is None else bounds
    n_fooled = 0
    for i in range(len(X)):
        first, ends = plain_apgd(net, X[i], int(y[i]), starts[i], attack, box)
        if ends is not None:
            ends = torch.stack(ends)
            end_margins = margins(net, ends, y[i].expand(2))
            first = ends[end_margins.argmax()]
            fooled = end_margins.max() > 0
        else:
            fooled = True
        n_fooled += int(fooled)
        assert found.fooled[i] == fooled
        torch.testing.assert_close(found.X_adv[i], first, rtol=0, atol=1e-6)
    assert 3 < n_fooled < 18


# --- closed forms and brute force --------------------------------------------------------


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)], ids=["unbounded", "box"])
@pytest.mark.parametrize("mutable", [None, [0, 2, 5]], ids=["all", "some"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_optimum_of_a_linear_model_is_reached(norm, mutable, bounds):
    w = torch.randn(6, generator=seeded(), dtype=torch.float64)
    X = torch.rand(30, 6, generator=seeded(1), dtype=torch.float64)
    y = torch.zeros(30, dtype=torch.long)
    eps, low, high = 0.2, *((-np.inf, np.inf) if bounds is None else bounds)
    attack = APGD(norm=norm, eps=eps, bounds=bounds, mutable=mutable)
    X_adv = attack(lambda X: torch.stack([9 + 0 * X[:, 0], X @ w], 1), X, y, generator=seeded())
    free = np.isin(np.arange(6), range(6) if mutable is None else mutable)
    g = w.numpy() * free
    reached = ((X_adv - X) @ w).numpy()
    for x, value in zip(X.numpy(), reached, strict=True):
        if norm == "linf":
            best = g @ (np.clip(x + eps * np.sign(g), low, high) - x)
        else:  # clip(t g), by bisection
            near, far = 0.0, 1e6
            for _ in range(100):
                t = (near + far) / 2
                inside = np.linalg.norm(np.clip(x + t * g, low, high) - x) <= eps
                near, far = (t, far) if inside else (near, t)
            best = g @ (np.clip(x + near * g, low, high) - x)
        assert value == pytest.approx(best, rel=1e-4, abs=1e-6)
    assert torch.equal(X_adv[:, ~free], X[:, ~free])


@pytest.mark.parametrize("loss", ["soft_margin", "cross_entropy", "margin"])
@pytest.mark.parametrize("norm", NORMS)
def test_restarts_find_the_optimum_that_brute_force_finds(norm, loss):
    net, X, y = make_problem(n=40, n_features=2, n_classes=2, width=12, seed=1)
    eps = 0.2
    axis = torch.linspace(-eps, eps, 161, dtype=torch.float64)
    deltas = torch.cartesian_prod(axis, axis)
    deltas = deltas if norm == "linf" else deltas[deltas.norm(dim=1) <= eps]
    best = torch.stack(
        [margins(net, x + deltas, k.expand(len(deltas))).max() for x, k in zip(X, y, strict=True)]
    )
    attack = APGD(norm=norm, eps=eps, loss=loss, n_restarts=5)
    found = attack.search(net, X, y, generator=seeded())
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x).sum(0), X)
    tolerance = 2 * torch.linalg.matrix_norm(jacobian).max().item() * eps / 80
    margin = margins(net, found.X_adv, y)
    standing = ~found.fooled
    assert 5 < standing.sum() < 35
    assert (best[found.fooled] > -tolerance).all()
    assert (margin[standing] <= best[standing] + tolerance).all()
    reached = torch.where(standing, margin >= best - tolerance, True)
    assert reached.double().mean() >= 0.95


@pytest.mark.parametrize("norm", [*NORMS, "l1"])
def test_it_is_never_weaker_than_one_step(norm):
    net, X, y = make_problem(n=200)
    eps = {"linf": 0.05, "l2": 0.1, "l1": 0.2}[norm]
    one_step = FGSM(norm=norm, eps=eps).search(net, X, y).fooled
    many_steps = APGD(norm=norm, eps=eps).search(net, X, y, generator=seeded()).fooled
    assert 20 < one_step.sum() < 190
    assert many_steps.sum() >= one_step.sum()
    assert (one_step & ~many_steps).sum() <= 2  # of 200, from one start


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_find_no_less(norm):
    net, X, y = make_problem(n=200)
    rates = [
        APGD(norm=norm, eps=0.06, n_steps=n).search(net, X, y, generator=seeded()).fooled.sum()
        for n in (1, 5, 20, 100)
    ]
    assert rates[0] < rates[1] <= rates[2] + 1
    assert rates[2] <= rates[3] + 1


@pytest.mark.parametrize("norm", NORMS)
def test_more_restarts_are_never_worse(norm):
    net, X, y = make_problem(n=40)
    worst = torch.full((len(X),), -torch.inf, dtype=torch.float64)
    for n_restarts in (1, 2, 5):
        attack = APGD(norm=norm, eps=0.06, n_steps=4, n_restarts=n_restarts)
        margin = margins(net, attack(net, X, y, generator=seeded()), y).clamp(max=0)
        assert (margin >= worst - 1e-12).all()
        worst = margin


@pytest.mark.parametrize("norm", NORMS)
def test_towards_each_class_it_finds_what_pgd_finds(norm):
    net, X, y = make_problem(n=100, n_classes=6)
    threat = {"norm": norm, "eps": 0.05, "n_targets": 9}
    apgd = APGD(loss="dlr", n_steps=40, **threat).search(net, X, y, generator=seeded()).fooled
    pgd = PGD(n_steps=40, n_restarts=3, **threat).search(net, X, y, generator=seeded()).fooled
    assert 10 < pgd.sum() < 95
    assert (pgd & ~apgd).sum() <= 2
    assert (apgd & ~pgd).sum() <= 2


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_steps": 0}, "Got n_steps=0, but expected an integer of at least 1"),
        ({"n_restarts": 0}, "Got n_restarts=0, but expected an integer of at least 1"),
        ({"n_targets": 0}, "Got n_targets=0, but expected an integer of at least 1"),
        ({"n_targets": 1.5}, "Got n_targets=1.5, but expected an integer of at least 1"),
        ({"loss": "dlrr"}, "Got loss='dlrr', but expected one of"),
    ],
    ids=repr,
)
def test_bad_parameters_are_rejected(params, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        APGD(**params)(*make_problem(n=40))
