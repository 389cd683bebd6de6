"""What models return, and models that return something else or change what they are given."""

import numpy as np
import pytest
import torch
from torch import nn

from skjacobian import JacobianRegularizedClassifier
from skjacobian.attacks import FGSM, FMN, PGD, RayS, Square
from skjacobian.jacobian import jacobian_norm
from skjacobian.losses import margin
from skjacobian.model_outputs import (
    check_samples_apart_in_training,
    log_of_probabilities,
    output_kind,
    outputs,
)
from tests.seeds import seeded

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (LOGITS, "logits"),
        (LOGITS.log_softmax(1), "logits"),
        (-LOGITS.softmax(1), "logits"),
        (2 * LOGITS.softmax(1), "logits"),
        (LOGITS.softmax(1), "probabilities"),
        (torch.tensor([[0.25, 0.75], [1.0, 0.0]]), "probabilities"),
        (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "decisions"),
        (torch.tensor([[0.0, 1.0], [1.0, 1.0]]), "logits"),
        (torch.tensor([[0.25, 0.75], [1.0, -0.5]]), "logits"),
        (torch.tensor([[-0.5, 1.5]]), "logits"),
        (torch.zeros(3, 4), "logits"),
        (torch.ones(3, 1), "logits"),
        (torch.zeros(0, 3), "logits"),
        (torch.full((2, 3), torch.nan), "logits"),
        (torch.tensor([[torch.inf, 0.0]]), "logits"),
    ],
)
def test_what_a_model_returns_is_told_from_its_rows(output, kind, dtype):
    if dtype == torch.float16 and kind == "probabilities":
        output = torch.tensor([[0.25, 0.75], [0.5, 0.5]])  # others do not sum to 1 so precisely
    assert output_kind(output.to(dtype)) == kind


def test_a_batch_of_rounded_probabilities_is_told_from_all_of_it():
    output = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.4, 0.6]])
    assert (output_kind(output[:2]), output_kind(output)) == ("decisions", "probabilities")


def test_the_logarithm_of_probabilities_has_the_margins_of_the_logits():
    y = torch.tensor([0, 2])
    probabilities = LOGITS.softmax(1)
    turned = log_of_probabilities(probabilities)
    torch.testing.assert_close(margin(turned, y), margin(LOGITS, y))
    torch.testing.assert_close(turned.softmax(1), probabilities)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_0_have_finite_logits(dtype):
    sure = torch.tensor([[1.0, 0.0]], dtype=dtype)
    turned = log_of_probabilities(sure)
    assert turned.isfinite().all()
    assert turned.dtype == dtype
    assert turned[0, 0] == 0 > turned[0, 1]


# --- asking -------------------------------------------------------------------------------


class Shifting(nn.Sequential):
    def forward(self, X):
        X -= 0.5
        return super().forward(X)


def shifting(n_features=4, n_classes=3):
    return Shifting(nn.Linear(n_features, 5), nn.ReLU(), nn.Linear(5, n_classes))


CHANGES = "Got a model that changes its input in place, but expected one that leaves X as it is"


@pytest.mark.parametrize("attack", [FGSM, PGD, FMN, Square, RayS])
def test_an_attack_on_a_model_that_changes_its_input_is_an_error(attack):
    with pytest.raises(ValueError, match=CHANGES):
        attack(norm="linf", eps=0.1)(shifting(), torch.rand(6, 4), torch.zeros(6, dtype=int))


def test_the_jacobian_of_a_model_that_changes_its_input_is_an_error():
    with pytest.raises(ValueError, match=CHANGES):
        jacobian_norm(shifting(), torch.rand(6, 4))


@pytest.mark.parametrize("lam", [0, 0.1])
def test_a_module_that_changes_its_input_cannot_be_trained(lam):
    X = np.random.default_rng(0).random((30, 4))
    before = X.copy()
    with pytest.raises(ValueError, match=CHANGES):
        JacobianRegularizedClassifier(shifting, lam=lam).fit(X, np.arange(30) % 3)
    np.testing.assert_array_equal(X, before)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda X: (X, X), "type tuple"),
        (lambda X: X[:, 0], r"shape \(6,\)"),
        (lambda X: X[:2], r"shape \(2, 4\)"),
    ],
)
def test_what_is_no_row_of_logits_for_each_sample_is_an_error(output, got):
    X, y = torch.rand(6, 4), torch.zeros(6, dtype=int)
    message = f"Got a model whose output for 6 samples has {got}, but expected a tensor of logits"
    for ask in (outputs, jacobian_norm, lambda model, X: PGD(eps=0.1)(model, X, y)):
        with pytest.raises(TypeError, match=message):
            ask(output, X)


def test_inference_mode_has_no_jacobian():
    with torch.inference_mode():
        net, X = nn.Sequential(nn.Linear(4, 3)), torch.rand(5, 4)
        assert outputs(net, X).shape == (5, 3)
        with pytest.raises(RuntimeError, match=r"Got torch.inference_mode\(\), but expected"):
            jacobian_norm(net, X, engine="loop")


def test_outputs_are_brought_to_the_device_of_the_samples():
    X = torch.zeros(4, 5, device="meta")
    assert outputs(lambda X: torch.zeros(len(X), 3), X).device == X.device


@pytest.mark.parametrize("attack", [FGSM, PGD, FMN])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_gradient_behind_a_sum_of_features_may_be_overwritten(attack, norm):
    def model(X):  # the gradient at all features is one number in memory
        return X.sum(1, keepdim=True) * torch.tensor([1.0, -1.0])

    X, y = torch.full((3, 4), 0.25), torch.zeros(3, dtype=int)
    nearest = {"linf": 0.25, "l2": 0.5, "l1": 1.0}[norm]
    for eps, fooled in ((0.99 * nearest, False), (1.01 * nearest, True)):
        found = attack(norm=norm, eps=eps).search(model, X, y, generator=seeded())
        assert (found.fooled == fooled).all()


def test_asking_whether_samples_are_apart_leaves_module_and_random_state_as_they_were():
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    X, drawn = torch.rand(5, 3), torch.get_rng_state()
    check_samples_apart_in_training(module, X)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not any(layer.training for layer in module.modules())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


class AuxiliaryInTraining(nn.Module):
    def __init__(self, n_features, n_classes):
        super().__init__()
        self.layer = nn.Linear(n_features, n_classes)

    def forward(self, X):
        return (self.layer(X), X) if self.training else self.layer(X)


@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_a_module_that_returns_more_in_training_mode_is_named(lam):
    X, y = np.random.default_rng(0).random((20, 3)), np.arange(20) % 2
    with pytest.raises(TypeError, match="has type tuple, but expected a tensor of logits"):
        JacobianRegularizedClassifier(AuxiliaryInTraining, lam=lam).fit(X, y)
