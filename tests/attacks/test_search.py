"""What a search notes of gradients that mislead, and says."""

import warnings

import pytest
import torch
from torch import nn

from skjacobian.attacks import APGD, FGSM, FMN, PGD, Cascade
from skjacobian.exceptions import AttackWarning
from skjacobian.modules import CNN, MLP

ATTACKS = {
    "FGSM": FGSM(eps=0.3),
    "PGD": PGD(eps=0.3),
    "PGD, l2": PGD(norm="l2", eps=0.3),
    "APGD": APGD(eps=0.3, n_steps=5),
    "FMN": FMN(norm="linf", eps=1.0, n_steps=5),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


class Partly(nn.Module):
    """A linear model behind something that takes the gradient from the last feature."""

    def __init__(self, spoilt, n_features=4):
        super().__init__()
        self.spoilt = spoilt
        self.linear = nn.Linear(n_features, 3)
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, X):
        return self.linear(torch.cat([X[:, :-1], self.spoilt(X[:, -1:])], dim=1))


def embedded(x):
    table = torch.tensor([[3.0], [-2.0], [1.0], [-4.0], [2.0]])
    return table[x[:, 0].clamp(0, 4).long()]


def searched(attack, model, n_samples=50, n_features=4):
    X = torch.rand(n_samples, n_features, generator=torch.Generator().manual_seed(1))
    X[:, -1] = torch.arange(n_samples) % 5
    with torch.no_grad():
        y = model(X).argmax(1)
    return attack(model, X, y, generator=torch.Generator().manual_seed(2))


@every_attack
@pytest.mark.parametrize("spoilt", [torch.round, torch.detach, embedded])
def test_features_without_a_gradient_that_matter_are_said(attack, spoilt):
    if spoilt is torch.round and not isinstance(attack, FMN):
        attack = type(attack)(**{**attack.get_params(), "eps": 0.6})
    message = r"zero at 1 of 4 features for all samples, but the answers to \d\d of 50 samples"
    with pytest.warns(AttackWarning, match=message):
        searched(attack, Partly(spoilt))


@every_attack
@pytest.mark.parametrize(
    ("model", "more"),
    [
        (Partly(torch.zeros_like), {}),  # it does not matter
        (Partly(torch.detach), {"mutable": [0, 1, 2]}),  # it may not change
        (Partly(lambda x: torch.rand_like(x)), {}),  # the answers differ anyway
        (nn.Sequential(nn.Unflatten(1, (1, 4, 4)), CNN((1, 4, 4), 3, channels=(4,))), {}),
        (nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.MaxPool2d(2), nn.Flatten(), MLP(4, 3)), {}),
    ],
    ids=["unused", "immutable", "random", "CNN", "max pooling"],
)
def test_others_are_not(attack, model, more):
    attack = type(attack)(**{**attack.get_params(), **more})
    n_features = 4 if isinstance(model, Partly) else 16
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("error", AttackWarning)
        searched(attack, model, n_features=n_features)


def test_a_search_that_is_taken_up_again_knows_and_does_not_repeat_it():
    model = Partly(torch.detach)
    X = torch.rand(50, 4, generator=torch.Generator().manual_seed(1))
    y = model(X).argmax(1)
    attack = Cascade(eps=0.01, n_queries=30)
    with pytest.warns(AttackWarning, match="zero at 1 of 4 features"):
        found = attack.search(model, X, y, generator=torch.Generator().manual_seed(2))
    assert found.is_blind.sum() > 40
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttackWarning)
        again = Cascade(eps=0.01, n_queries=60).search(
            model, X, y, generator=torch.Generator().manual_seed(2), resume=found
        )
    assert torch.equal(again.is_blind, found.is_blind)


def test_of_few_samples_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttackWarning)
        searched(PGD(eps=0.3), Partly(torch.detach), n_samples=20)
