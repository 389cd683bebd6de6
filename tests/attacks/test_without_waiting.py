"""The ways that attacks take on an accelerator, so as not to wait for it, taken on the CPU."""

import pytest
import torch

from skjacobian.attacks import APGD, FGSM, FMN, PGD, Cascade, Square
from skjacobian.geometry import Ball
from skjacobian.modules import MLP
from skjacobian.projections import project_l1_box, project_l2_box
from tests.seeds import seeded

EPS = {"linf": 0.1, "l2": 0.25, "l1": 0.5}
ATTACKS = {
    "FGSM": FGSM,
    "PGD": lambda **ball: PGD(n_steps=15, **ball),
    "APGD": lambda **ball: APGD(n_steps=10, **ball),
    "FMN": lambda **ball: FMN(n_steps=6, **ball),
    "Square": lambda **ball: Square(n_queries=100, **ball),
    "Cascade": Cascade,
}
every_norm = pytest.mark.parametrize("norm", EPS)


@pytest.fixture
def as_on_a_card(monkeypatch):
    """Make tensors say that they are on a card, which is all that these ways ask."""
    return lambda: monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))


def make_problem(n=80):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MLP(6, 3, hidden_units=(24, 24)).double().requires_grad_(False)
    X = torch.rand(n, 6, generator=seeded(), dtype=torch.float64)
    net[-1].bias -= net(X).mean(0)
    return net, X, net(X).argmax(1)


@pytest.mark.usefixtures("brief_stages")
@every_norm
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_find_what_they_find_on_the_cpu(name, norm, as_on_a_card):
    net, X, y = make_problem()
    attack = ATTACKS[name](norm=norm, eps=EPS[norm], bounds=(0.0, 1.0))
    expected = attack.search(net, X, y, generator=seeded())
    as_on_a_card()
    found = attack.search(net, X, y, generator=seeded())
    assert 5 < expected.fooled.sum() < len(X)
    assert (found.fooled != expected.fooled).sum() <= 1
    assert torch.equal(net(found.X_adv).argmax(1) != y, found.fooled)
    low, high = (torch.full((6,), side, dtype=X.dtype) for side in (0.0, 1.0))
    ball = Ball.around(X, norm=norm, eps=EPS[norm], bounds=(low, high))
    assert ball.contains(found.X_adv).all()


@pytest.mark.parametrize("project", [project_l2_box, project_l1_box])
def test_projections_are_those_of_the_cpu(project, as_on_a_card):
    Z = torch.randn(200, 30, generator=seeded(), dtype=torch.float64)
    low, high = (
        sign * torch.rand(200, 30, generator=seeded(k), dtype=torch.float64)
        for k, sign in enumerate((-1, 1))
    )
    expected = project(Z, 0.7, low, high)
    as_on_a_card()
    torch.testing.assert_close(project(Z, 0.7, low, high), expected, rtol=1e-9, atol=1e-12)
