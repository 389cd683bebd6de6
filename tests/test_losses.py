import math

import pytest
import torch

from skjacobian.losses import (
    LOSSES,
    TARGETED_LOSSES,
    cross_entropy,
    dlr,
    margin,
    soft_margin,
    targeted_dlr,
    value_and_slope,
)


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


@pytest.mark.parametrize("n_classes", [2, 3, 10])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_slope_of_a_loss_is_its_gradient_by_the_logits(name, targeted, n_classes):
    logits, y = random_logits(n_classes=n_classes)
    loss, params = LOSSES[name], {"y": y}
    if targeted:
        loss, params = TARGETED_LOSSES[name], {"y": y, "target": (y + 1) % n_classes}
    leaf = logits.clone().requires_grad_()
    expected = loss(leaf, **params)
    expected.sum().backward()
    value, slope = value_and_slope(loss, logits, **params)
    assert not value.requires_grad
    assert not logits.requires_grad
    assert torch.equal(value, expected)
    torch.testing.assert_close(slope, leaf.grad)


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


# --- soft margin -------------------------------------------------------------------------


def gradient_of(loss, logits, *labels, **params):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(logits, *labels, **params).sum(), logits)[0]


@pytest.mark.parametrize("n_classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("temperature", [1.0, 1 / 15, 1 / 100])
def test_the_soft_margin_is_its_formula(temperature, n_classes):
    logits, y = random_logits(n_classes=n_classes)
    expected = []
    for z, label in zip(logits.tolist(), y.tolist(), strict=True):
        middle = sorted(z)[(n_classes - 1) // 2]
        T = temperature * (max(z) - min(z))
        if n_classes > 3:
            T = min(T, temperature * 3 * (max(z) - middle))
        best = max(v for k, v in enumerate(z) if k != label)
        total = sum(math.exp((v - best) / T) for k, v in enumerate(z) if k != label)
        expected.append(best + T * math.log(total) - z[label])
    value = soft_margin(logits, y, temperature)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_the_lowest_logits_do_not_matter_to_the_soft_margin():
    logits, y = random_logits(n_classes=10)
    logits[:, 0], y = logits[:, 1:].amin(1) - 1000, y.clamp(min=1)
    usual = soft_margin(logits, y), gradient_of(soft_margin, logits, y)
    for masked in (-1e9, -torch.inf):
        logits[:, 0] = masked
        torch.testing.assert_close(soft_margin(logits, y), usual[0])
        torch.testing.assert_close(gradient_of(soft_margin, logits, y), usual[1])


@pytest.mark.parametrize("n_classes", [2, 3, 10, 1000])
def test_the_gradient_of_the_soft_margin_is_that_of_cross_entropy_over_what_is_missed(n_classes):
    # ∂ cross-entropy(z/T)/∂(z/T) = p - e_y, and ∂ soft margin/∂z = (p - e_y) / (1 - p_y).
    logits, y = random_logits(n_classes=n_classes)
    temperature = 0.2
    ordered = logits.sort(1).values
    T = ordered[:, -1:] - ordered[:, :1]
    if n_classes > 3:
        T = T.minimum(3 * (ordered[:, -1:] - ordered[:, [(n_classes - 1) // 2]]))
    T = temperature * T
    p = (logits / T).softmax(1)
    one_hot = torch.eye(n_classes, dtype=torch.float64)[y]
    missed = (p * (1 - one_hot)).sum(1, keepdim=True)
    torch.testing.assert_close(
        gradient_of(soft_margin, logits, y, temperature=temperature), (p - one_hot) / missed
    )
    by_cross_entropy = gradient_of(cross_entropy, logits / T, y) / missed
    torch.testing.assert_close((p - one_hot) / missed, by_cross_entropy)


@pytest.mark.parametrize("n_classes", [2, 3, 10, 1000])
def test_the_soft_margin_is_negative_only_where_the_prediction_is_right(n_classes):
    logits, y = random_logits(n_samples=500, n_classes=n_classes)
    y[::2] = logits[::2].argmax(1)
    logits[range(500), y] += 3
    is_negative = soft_margin(logits, y) < 0
    assert is_negative.sum() > 10
    assert (logits.argmax(1) == y)[is_negative].all()
    # From above, and by no more than T log of the number of wrong classes.
    gap = soft_margin(logits, y) - margin(logits, y)
    spread = logits.amax(1) - logits.amin(1)
    assert (gap >= -1e-12).all()
    assert (gap <= spread / 15 * math.log(n_classes - 1) + 1e-12).all()


# --- dlr ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [3, 4, 10, 1000])
def test_dlr_is_its_formula(n_classes):
    logits, y = random_logits(n_classes=n_classes)
    expected = []
    for z, label in zip(logits.tolist(), y.tolist(), strict=True):
        falling = sorted(z, reverse=True)
        best = max(v for k, v in enumerate(z) if k != label)
        expected.append((best - z[label]) / (falling[0] - falling[2]))
    torch.testing.assert_close(dlr(logits, y), torch.tensor(expected, dtype=torch.float64))


def test_dlr_of_two_classes_is_the_margin():
    logits, y = random_logits(n_classes=2)
    assert torch.equal(dlr(logits, y), margin(logits, y))


@pytest.mark.parametrize("n_classes", [2, 3, 4, 10])
def test_dlr_has_a_gradient_wherever_the_prediction_is_right(n_classes):
    logits, _ = random_logits(n_samples=500, n_classes=n_classes)
    slope = gradient_of(dlr, logits, logits.argmax(1))
    assert (slope.abs().amax(1) > 1e-3 / (logits.amax(1) - logits.amin(1))).all()


# --- targeted losses ---------------------------------------------------------------------


def random_targets(y, n_classes):
    generator = torch.Generator().manual_seed(1)
    return (y + torch.randint(1, n_classes, y.shape, generator=generator)) % n_classes


@pytest.mark.parametrize("n_classes", [2, 3, 4, 10, 1000])
def test_targeted_losses_are_their_formulas(n_classes):
    logits, y = random_logits(n_classes=n_classes)
    target = random_targets(y, n_classes)
    expected = {"cross_entropy": [], "margin": [], "dlr": [], "soft_margin": []}
    for z, label, aim in zip(logits.tolist(), y.tolist(), target.tolist(), strict=True):
        falling = sorted(z, reverse=True)
        ahead = z[aim] - z[label]
        expected["margin"].append(ahead)
        expected["soft_margin"].append(ahead)
        expected["cross_entropy"].append(z[aim] - math.log(sum(math.exp(v) for v in z)))
        spread = falling[0] - (falling[2] + falling[3]) / 2 if n_classes >= 4 else 1.0
        expected["dlr"].append(ahead / spread)
    assert TARGETED_LOSSES.keys() == LOSSES.keys()
    for name, loss in TARGETED_LOSSES.items():
        value = loss(logits, y, target)
        torch.testing.assert_close(value, torch.tensor(expected[name], dtype=torch.float64))


@pytest.mark.parametrize("n_classes", [3, 4, 5, 10])
def test_the_targeted_dlr_has_a_gradient_everywhere(n_classes):
    # With three classes (z_t - z_y) / (z_1 - z_3) is ±1 wherever t and y are first and last.
    logits, y = random_logits(n_samples=2000, n_classes=n_classes)
    slope = gradient_of(targeted_dlr, logits, y, random_targets(y, n_classes))
    assert (slope.abs().amax(1) > 1e-3 / (logits.amax(1) - logits.amin(1))).all()


@pytest.mark.parametrize("n_classes", [2, 3, 4, 10])
@pytest.mark.parametrize("name", TARGETED_LOSSES)
def test_the_gradient_of_a_targeted_loss_matches_finite_differences(name, n_classes):
    logits, y = random_logits(n_samples=5, n_classes=n_classes)
    inputs = logits.requires_grad_(), y, random_targets(y, n_classes)
    assert torch.autograd.gradcheck(TARGETED_LOSSES[name], inputs)


# --- scale and ties ----------------------------------------------------------------------


def unit(gradient):
    # Where the true class is third, dlr is 1, and flat.
    length = gradient.norm(dim=1, keepdim=True)
    return gradient / length.where(length > 1e-12, torch.inf)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 100.0, 1e6])
@pytest.mark.parametrize("n_classes", [2, 3, 4, 10, 1000])
def test_multiplying_the_logits_turns_no_gradient(n_classes, factor):
    logits, y = random_logits(n_classes=n_classes)
    target = random_targets(y, n_classes)
    for name in ("soft_margin", "margin", "dlr"):
        for loss, labels in ((LOSSES[name], (y,)), (TARGETED_LOSSES[name], (y, target))):
            plain, scaled = (
                gradient_of(loss, multiple * logits, *labels) for multiple in (1.0, factor)
            )
            torch.testing.assert_close(unit(scaled), unit(plain))
    if n_classes >= 3:
        torch.testing.assert_close(dlr(factor * logits, y), dlr(logits, y))
    if n_classes >= 4:
        value = targeted_dlr(factor * logits, y, target)
        torch.testing.assert_close(value, targeted_dlr(logits, y, target))


def test_multiplying_the_logits_turns_the_gradient_of_cross_entropy():
    logits, y = random_logits()
    plain, scaled = (gradient_of(cross_entropy, c * logits, y) for c in (1.0, 20.0))
    assert (unit(plain) * unit(scaled)).sum(1).min() < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_classes", [2, 3, 4, 10])
@pytest.mark.parametrize("size", [0.0, 1.0, 5.0, 1e6])
def test_ties_give_finite_losses_and_gradients(size, n_classes, dtype):
    constant = torch.full((1, n_classes), size, dtype=dtype)
    all_but_one = constant.clone()
    all_but_one[0, 0] -= 5.0
    only_one = torch.zeros_like(constant)
    only_one[0, -1] = size
    logits = torch.cat([constant, all_but_one, only_one])
    for label in (0, n_classes - 1):
        y = torch.full((3,), label)
        target = (y + 1) % n_classes
        for name in LOSSES:
            for loss, labels in ((LOSSES[name], (y,)), (TARGETED_LOSSES[name], (y, target))):
                assert loss(logits, *labels).isfinite().all()
                assert gradient_of(loss, logits, *labels).isfinite().all()
    assert (margin(constant, torch.tensor([0])) == 0).all()
    assert (dlr(constant, torch.tensor([0])) == 0).all()


def test_dlr_has_a_gradient_where_a_class_is_masked():
    logits = torch.tensor([[3.0, 1.0, -torch.inf]], requires_grad=True)
    value = dlr(logits, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.item() == -2.0
    assert gradient[0, :2].tolist() == [-1.0, 1.0]
