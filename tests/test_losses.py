import pytest
import torch

from skjacobian.losses import LOSSES, cross_entropy, margin


def random_logits(n_samples=50, n_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n_samples, n_classes, generator=generator, dtype=torch.float64)
    y = torch.randint(0, n_classes, (n_samples,), generator=generator)
    return logits, y


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_a_loss_gives_one_value_for_each_sample_by_itself(name, n_classes):
    logits, y = random_logits(n_classes=n_classes)
    loss = LOSSES[name](logits, y)
    assert loss.shape == (50,)
    alone = torch.cat([LOSSES[name](logits[i : i + 1], y[i : i + 1]) for i in range(50)])
    torch.testing.assert_close(loss, alone)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_does_not_change_when_all_logits_of_a_sample_shift(name):
    logits, y = random_logits()
    shift = torch.linspace(-100, 100, 50, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(LOSSES[name](logits + shift, y), LOSSES[name](logits, y))


# The soft margin takes its temperature for a constant.
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "soft_margin"])
def test_the_gradient_of_a_loss_matches_finite_differences(name):
    logits, y = random_logits(n_samples=5)
    assert torch.autograd.gradcheck(LOSSES[name], (logits.requires_grad_(), y))


def test_cross_entropy_is_minus_the_log_of_the_softmax():
    logits, y = random_logits()
    probability = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = -probability[torch.arange(50), y].log()
    torch.testing.assert_close(cross_entropy(logits, y), expected)


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_the_margin_is_the_best_wrong_logit_minus_the_true_one(n_classes):
    logits, y = random_logits(n_classes=n_classes)
    expected = [
        max(z for k, z in enumerate(row) if k != label) - row[label]
        for row, label in zip(logits.tolist(), y.tolist(), strict=True)
    ]
    assert margin(logits, y).tolist() == expected


def test_the_margin_is_positive_exactly_where_the_prediction_is_wrong():
    logits, y = random_logits(n_samples=500)
    assert ((margin(logits, y) > 0) == (logits.argmax(1) != y)).all()


def test_the_margin_of_a_tie_is_zero():
    assert margin(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([0])).item() == 0.0


def test_the_margin_keeps_its_gradient_where_cross_entropy_loses_it():
    logits = torch.tensor([[1e6, 0.0]], requires_grad=True)
    y = torch.tensor([0])
    (saturated,) = torch.autograd.grad(cross_entropy(logits, y).sum(), logits)
    (alive,) = torch.autograd.grad(margin(logits, y).sum(), logits)
    assert saturated.abs().max() == 0
    assert alive.tolist() == [[-1.0, 1.0]]


def test_a_loss_does_not_change_its_arguments():
    logits, y = random_logits()
    before = logits.clone(), y.clone()
    for loss in LOSSES.values():
        loss(logits, y)
    assert torch.equal(logits, before[0])
    assert torch.equal(y, before[1])
