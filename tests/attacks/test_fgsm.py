import pytest
import torch

from skjacobian.attacks import FGSM, PGD
from skjacobian.modules import MLP
from tests.seeds import seeded

EPS = 0.125


@pytest.fixture
def problem():
    """A net, samples, its predictions there, and the gradient of the cross-entropy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MLP(6, 3, hidden_units=(16,), activation="tanh").double().requires_grad_(False)
    X = torch.rand(30, 6, generator=seeded(), dtype=torch.float64).requires_grad_()
    logits = net(X)
    y = logits.argmax(1)
    loss = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, X)
    return net, X.detach(), y, gradient


def test_the_linf_step_is_the_sign_of_the_gradient(problem):
    net, X, y, gradient = problem
    X_adv = FGSM(eps=EPS)(net, X, y)
    torch.testing.assert_close(X_adv, X + EPS * gradient.sign())


def test_the_l2_step_is_the_normalized_gradient(problem):
    net, X, y, gradient = problem
    X_adv = FGSM(norm="l2", eps=EPS)(net, X, y)
    step = EPS * gradient / gradient.norm(dim=1, keepdim=True)
    torch.testing.assert_close(X_adv, X + step)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_step_is_taken_in_the_units_of_the_features(problem, norm):
    net, X, y, gradient = problem
    scale = torch.tensor([0.1, 0.5, 1.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    X_adv = FGSM(norm=norm, eps=EPS, feature_scale=scale)(net, X, y)
    scaled = gradient * scale
    unit = scaled.sign() if norm == "linf" else scaled / scaled.norm(dim=1, keepdim=True)
    torch.testing.assert_close(X_adv, X + EPS * scale * unit)


def test_the_step_is_clipped_to_the_box_after_it_is_taken(problem):
    net, X, y, gradient = problem
    X_adv = FGSM(eps=EPS, bounds=(0, 1))(net, X, y)
    torch.testing.assert_close(X_adv, (X + EPS * gradient.sign()).clamp(0, 1))


def test_a_random_start_is_followed_by_a_step_of_five_quarters_of_the_radius(problem):
    net, X, y, _ = problem
    attack = FGSM(eps=EPS, random_start=True)
    start = attack.ball(X).random_start(seeded(3)).requires_grad_()
    logits = net(start)
    loss = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, start)
    ended = (start + 1.25 * EPS * gradient.sign()).clamp(X - EPS, X + EPS)
    standing = logits.argmax(1) == y  # the others are done where they start
    expected = torch.where(standing.unsqueeze(1), ended, start).detach()
    torch.testing.assert_close(attack(net, X, y, generator=seeded(3)), expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_sample_that_is_misclassified_already_is_returned_as_it_is(problem, norm):
    net, X, y, _ = problem
    found = FGSM(norm=norm, eps=EPS).search(net, X, (y + 1) % 3)
    assert found.fooled.all()
    torch.testing.assert_close(found.X_adv, X, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_one_step_of_projected_gradient_descent(problem, norm):
    net, X, y, _ = problem
    one_step = PGD(
        norm=norm, eps=EPS, n_steps=1, step_size=EPS, random_start=False, loss="cross_entropy"
    )
    torch.testing.assert_close(FGSM(norm=norm, eps=EPS)(net, X, y), one_step(net, X, y))


def test_the_margin_is_climbed_where_it_is_asked_for(problem):
    net, X, y, _ = problem
    Z = X.clone().requires_grad_()
    logits = net(Z)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    (gradient,) = torch.autograd.grad((others - logits[torch.arange(30), y]).sum(), Z)
    X_adv = FGSM(eps=EPS, loss="margin")(net, X, y)
    torch.testing.assert_close(X_adv, X + EPS * gradient.sign())
