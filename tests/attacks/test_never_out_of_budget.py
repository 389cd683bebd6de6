"""The promise that everything else rests on: no attack ever leaves its threat model.

Ten thousand small generated problems, each judged in numpy, with no code of the package. A tenth of
them runs in every suite, the other parts are marked slow.
"""

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch

from skjacobian.attacks import APGD, FGSM, FMN, PGD, Cascade, HotFlip, RayS, Square
from tests.slow import others_slow

ATTACKS = {
    "FGSM": FGSM(),
    "FGSM, random start": FGSM(random_start=True, loss="margin"),
    "PGD": PGD(n_steps=4),
    "PGD, restarts": PGD(n_steps=3, n_restarts=2, loss="cross_entropy"),
    "PGD, huge steps": PGD(n_steps=3, step_size=1e4, momentum=0.9),
    "PGD, targeted": PGD(n_steps=2, n_targets=3),
    "APGD": APGD(n_steps=8),
    "APGD, targeted": APGD(n_steps=4, n_targets=2, loss="dlr"),
    "FMN": FMN(n_steps=6),
    "HotFlip": HotFlip(n_steps=6, n_restarts=2),
    "Square": Square(n_queries=15),
    "Square, restarts": Square(n_queries=6, n_restarts=2),
    "RayS": RayS(n_queries=60),
    "RayS, minimal": RayS(n_queries=60, minimal=True),
    "Cascade": Cascade(n_queries=60),
}
SHAPES = [(1,), (2,), (7,), (40,), (3, 4), (1, 5, 5), (3, 4, 4), (3, 6, 5)]
N_SAMPLES = 3
N_PARTS = 10
# Of the four of 30 a case takes up to twenty times as long as of the others.
N_CASES_OF_A_PART = dict.fromkeys(ATTACKS, 86) | dict.fromkeys(
    ["FMN", "RayS", "RayS, minimal", "Cascade"], 30
)


class Case:
    """One generated problem: a model, samples, and what may be done to them."""

    def __init__(self, number):
        rng = np.random.default_rng(number)
        self.norm = ("linf", "l2", "l1")[number % 3]
        self.dtype = (torch.float32, torch.float64)[number // 3 % 2]
        self.shape = SHAPES[rng.integers(len(SHAPES))]
        self.n_features = math.prod(self.shape)
        self.n_classes = int(rng.integers(2, 13))
        self._draw_samples(rng)
        self._draw_bounds(rng)
        self._draw_features(rng)
        self.X = torch.from_numpy(self.values).to(self.dtype)
        self.values = self.X.double().numpy()
        self._draw_radius(rng)
        self._draw_model(rng)

    def _draw_samples(self, rng):
        self.offset = rng.choice([0.0, 0.0, -3.0, 1e3])
        self.width = rng.choice([1.0, 1.0, 1e-3, 50.0])
        size = (N_SAMPLES, *self.shape)
        self.values = self.offset + self.width * rng.random(size)

    def _draw_bounds(self, rng):
        low, high = self.offset, self.offset + self.width
        kind = rng.choice(["none", "scalar", "per feature", "half open", "tight"])
        self.bounds = None
        if kind == "scalar":
            # A third of the features lies on the bounds.
            self.values = np.clip(
                self.offset + 1.5 * (self.values - low) - self.width / 4, low, high
            )
            self.bounds = (float(low), float(high))
        elif kind == "half open":
            self.bounds = (float(low), np.inf)
        elif kind != "none":
            flat = self.values.reshape(N_SAMPLES, -1)
            self.bounds = (flat.min(0), flat.max(0) + (kind == "per feature"))
        if self.bounds is not None:  # in numbers that float32 can represent
            self.bounds = tuple(np.asarray(b, dtype=np.float32).astype(float) for b in self.bounds)
            box = [np.broadcast_to(b, self.n_features).reshape(self.shape) for b in self.bounds]
            self.values = np.clip(np.float32(self.values).astype(float), *box)

    def _draw_features(self, rng):
        kind = rng.choice(["none", "array", "array", "range"])
        self.scale, self.unit = None, np.ones(self.n_features)
        if kind == "array":
            self.unit = np.exp(rng.normal(size=self.n_features)).astype(np.float32).astype(float)
            self.scale = self.unit
        elif kind == "range":
            self.values.reshape(N_SAMPLES, -1)[:, 0] = self.values.flat[0]
            flat = self.values.reshape(N_SAMPLES, -1)
            flat = flat.astype(np.float32 if self.dtype == torch.float32 else float)
            self.scale, self.unit = "range", (flat.max(0) - flat.min(0)).astype(float)
        free = rng.random(self.n_features) < 0.6
        free[rng.integers(self.n_features)] = True
        self.mutable = [None, free, free.nonzero()[0], free.reshape(self.shape)][rng.integers(4)]
        self.free = np.ones_like(free) if self.mutable is None else free
        self.free = self.free & (self.unit > 0)

    def _draw_radius(self, rng):
        typical = 1.0 if isinstance(self.scale, str) else self.width
        size = {"linf": 0.3, "l2": 0.6, "l1": 1.5}[self.norm] * typical
        size *= rng.choice([1e-4, 0.1, 1.0, 1.0, 10.0])
        self.radius = np.full(N_SAMPLES, size)
        self.eps = float(size)
        if rng.random() < 0.25:  # one radius for each sample, some of them 0
            self.radius = np.float32(size * rng.integers(0, 4, N_SAMPLES) / 3).astype(float)
            self.eps = torch.from_numpy(self.radius).to(self.dtype)

    def _draw_model(self, rng):
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        hidden = int(rng.choice([0, 8]))
        sizes = [self.n_features, *([hidden] if hidden else []), self.n_classes]
        self.weights = [
            torch.randn(b, a, generator=generator, dtype=torch.float64).to(self.dtype) / a**0.5
            for a, b in itertools.pairwise(sizes)
        ]
        self.factor = float(rng.choice([1.0, 1.0, 50.0])) / self.width
        logits = self(self.X)
        self.shift = logits.mean(0)
        self.y = self(self.X).argmax(1)
        wrong = torch.from_numpy(rng.random(N_SAMPLES) < 0.1)
        self.y = torch.where(wrong, (self.y + 1) % self.n_classes, self.y)

    def __call__(self, X):
        Z = (X - self.offset).flatten(1) * self.factor
        for weight in self.weights[:-1]:
            Z = (Z @ weight.T).relu()
        return Z @ self.weights[-1].T - getattr(self, "shift", 0.0)

    def attacked_by(self, attack):
        attack.set_params(
            norm=self.norm,
            eps=self.eps,
            feature_scale=self.scale,
            bounds=self.bounds,
            mutable=self.mutable,
        )
        return attack.search(self, self.X, self.y, generator=torch.Generator().manual_seed(0))


make_case = cache(Case)


def lengths(case, X_adv):
    """‖(X_adv - X) / scale‖, in more digits than the package computes it with."""
    delta = (X_adv.astype(np.longdouble) - case.values.astype(np.longdouble)).reshape(N_SAMPLES, -1)
    u = np.abs(delta[:, case.free] / case.unit[case.free])
    if case.norm == "linf":
        return u.max(1, initial=0.0)
    return u.sum(1) if case.norm == "l1" else np.sqrt((u**2).sum(1))


def check(case, found):
    X_adv = found.X_adv.double().numpy()
    assert found.X_adv.dtype == case.dtype
    assert found.X_adv.shape == case.X.shape
    assert np.isfinite(X_adv).all()

    assert (lengths(case, X_adv) <= case.radius).all()
    flat = X_adv.reshape(N_SAMPLES, -1)
    if case.bounds is not None:
        assert (flat >= case.bounds[0]).all()
        assert (flat <= case.bounds[1]).all()
    clean = case.values.reshape(N_SAMPLES, -1)
    assert np.array_equal(flat[:, ~case.free], clean[:, ~case.free])
    assert np.array_equal(flat[case.radius == 0], clean[case.radius == 0])

    logits = case(found.X_adv).double().numpy()
    y = case.y.numpy()
    own = logits[np.arange(N_SAMPLES), y]
    logits[np.arange(N_SAMPLES), y] = -np.inf
    margin = logits.max(1) - own
    fooled = found.fooled.numpy()
    assert (margin[fooled] > 0).all()
    rounding = 64 * torch.finfo(case.dtype).eps * (np.abs(own) + np.abs(margin))
    assert (margin[~fooled] <= rounding[~fooled]).all()
    return (np.abs(flat - clean).max(1) > 0).sum(), fooled.sum()


@pytest.mark.filterwarnings("ignore:The loss gradient was:skjacobian.exceptions.AttackWarning")
@pytest.mark.parametrize("part", others_slow(range(N_PARTS), [0]))
@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_ever_leaves_its_threat_model(name, part):
    n_moved = n_fooled = 0
    size = N_CASES_OF_A_PART[name]
    for number in range(part * size, (part + 1) * size):
        case = make_case(number)
        try:
            moved, fooled = check(case, case.attacked_by(ATTACKS[name]))
        except AssertionError as error:
            raise AssertionError(f"in Case({number})") from error
        n_moved += moved
        n_fooled += fooled
    # It is no empty promise: the attacks do move and fool samples.
    assert n_moved > 0.2 * size * N_SAMPLES
    assert n_fooled > 0.1 * size * N_SAMPLES


def test_there_are_more_than_ten_thousand_cases_of_every_kind():
    assert N_PARTS * sum(N_CASES_OF_A_PART.values()) >= 10_000
    # The part of each attack that runs in every suite begins with these.
    cases = [make_case(number) for number in range(min(N_CASES_OF_A_PART.values()))]
    assert {(case.norm, case.dtype) for case in cases} == set(
        itertools.product(["linf", "l2", "l1"], [torch.float32, torch.float64])
    )
    assert {case.shape for case in cases} == set(SHAPES)
    assert {case.n_classes for case in cases} >= {2, 3, 12}
    assert sum(case.bounds is None for case in cases) >= 5
    on_bounds = [
        case.bounds is not None and (case.values == np.min(case.bounds[0])).mean() > 0.05
        for case in cases
    ]
    assert sum(on_bounds) >= 5
    assert sum(case.mutable is not None for case in cases) >= 10
    assert sum(isinstance(case.eps, torch.Tensor) for case in cases) >= 5


# --- larger sets of perturbations --------------------------------------------------------


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)], ids=["unbounded", "box"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "attack",
    [
        PGD(loss="margin"),
        PGD(loss="margin", n_targets=5),
        APGD(loss="margin"),
        Cascade(n_queries=100),
    ],
    ids=["PGD", "PGD, targeted", "APGD", "Cascade"],
)
def test_on_a_linear_model_who_falls_stays_fallen_as_the_radius_grows(attack, norm, bounds):
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    X = torch.rand(60, 6, generator=generator, dtype=torch.float64)
    b = (X @ W.T).mean(0)
    y = (X @ W.T - b).argmax(1)
    fallen, counts = torch.zeros(60, dtype=torch.bool), []
    unit = {"linf": 1.0, "l2": 2.0, "l1": 4.0}[norm]
    for eps in (0.0, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4):
        attack.set_params(norm=norm, eps=eps * unit, bounds=bounds)
        fooled = attack.search(
            lambda X: X @ W.T - b, X, y, generator=torch.Generator().manual_seed(0)
        ).fooled
        assert not (fallen & ~fooled).any()
        fallen = fooled
        counts.append(int(fooled.sum()))
    assert counts[0] == 0
    assert 10 < counts[3] < counts[-1]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_smallest_perturbation_found_lies_in_every_larger_ball(norm):
    case = Case(3)
    net, X, y = case, case.X, case.y
    distances = FMN(norm=norm).distances(net, X, y, generator=torch.Generator().manual_seed(0))
    rates = [(distances > eps).double().mean().item() for eps in np.geomspace(1e-4, 1e3, 30)]
    assert rates == sorted(rates, reverse=True)
    assert torch.equal(distances == 0, net(X).argmax(1) != y)
