"""Jacobians without the units that no sample activates."""

import pytest
import torch
from torch import nn

from skjacobian.jacobian import _chain, jacobian_norm
from skjacobian.jacobian._cost import leaving_out_pays
from skjacobian.jacobian._dead_units import Live, without_dead_units
from skjacobian.jacobian._engines import closed_form
from skjacobian.jacobian._stack import Stack
from skjacobian.objectives import JacobianRegularization

N_SAMPLES, N_FEATURES, N_CLASSES = 200, 12, 5
HIDDEN = (32, 28)


def network(n_dead: tuple[int, int], dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Return a ReLU network, so many units of whose two hidden layers no sample activates."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(N_FEATURES, HIDDEN[0]), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Linear(*HIDDEN), nn.ReLU(), nn.Linear(HIDDEN[1], N_CLASSES)),
    ).double()
    with torch.no_grad():
        model[0].bias[: n_dead[0]] = -1e3
        model[3].bias[: n_dead[1]] = -1e3
    return model


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(N_SAMPLES, N_FEATURES, generator=generator, dtype=torch.float64)
    return X, torch.arange(N_SAMPLES) % N_CLASSES


def n_left(model: nn.Module, X: torch.Tensor) -> list[int]:
    """Return the numbers of units that are left, from the last layer to the first."""
    layers = closed_form(model, "auto")
    assert layers is not None
    maps, _ = without_dead_units(Stack(layers, X).linearize().maps, n_rows=10**6)
    return [layer.input_shape[0] for layer in maps if "weight" in vars(layer)]


@pytest.mark.parametrize("n_dead", [(0, 0), (13, 0), (0, 14), (13, 14), HIDDEN])
@pytest.mark.parametrize("norm", ["l2", "l1", "l21", "spectral", "cross_lipschitz"])
def test_norms_and_gradients_are_those_by_autograd(norm, n_dead):
    X, y = samples()
    found = {}
    for engine in ("closed_form", "loop"):
        model = network(n_dead)
        norms = jacobian_norm(model, X, y, norm=norm, engine=engine, create_graph=True)
        norms.sum().backward()
        by_weights = [layer.weight.grad for layer in model if isinstance(layer, nn.Linear)]
        found[engine] = [norms.detach(), *by_weights]
    for fast, slow in zip(*found.values(), strict=True):
        torch.testing.assert_close(fast, torch.zeros_like(fast) if slow is None else slow)


@pytest.mark.parametrize("n_dead", [(13, 14), HIDDEN])
@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("part", [{}, {"penalty_samples": 0.5}, {"class_samples": 2}])
def test_objective_and_gradients_are_those_by_autograd(norm, n_dead, part):
    X, y = samples()
    found = {}
    for engine in ("auto", "loop"):
        model = network(n_dead)
        objective = JacobianRegularization(lam=0.1, norm=norm, engine=engine, **part)
        value = objective(model, X, y, generator=torch.Generator().manual_seed(0))
        value.loss.mean().backward()
        found[engine] = [value.penalty, *(p.grad for p in model.parameters())]
    for fast, slow in zip(*found.values(), strict=True):
        torch.testing.assert_close(fast, slow)


def by_eights(active: torch.Tensor) -> int:
    """Return the least multiple of 8, or all, that holds the units that some sample activates."""
    n_active = int((active > 0).any(0).sum())
    return min(active.shape[1], -(-n_active // 8) * 8)


@pytest.mark.parametrize("n_dead", [(0, 0), (9, 0), (13, 14), HIDDEN])
def test_what_is_left_is_what_some_sample_activates(n_dead):
    X, _ = samples()
    model = network(n_dead).eval()
    assert n_left(model, X) == [by_eights(model[:5](X)), by_eights(model[:2](X)), N_FEATURES]


def test_dropout_masks_leave_out_what_they_hide():
    X, _ = samples()
    model = network((0, 0), dropout=0.9).train()
    _, first, _ = n_left(model, X[:2])
    assert first < by_eights(model[:2](X[:2]))


def test_smooth_units_are_all_left():
    X, _ = samples()
    hidden = nn.Linear(N_FEATURES, 32)
    model = nn.Sequential(hidden, nn.Softplus(), nn.Linear(32, N_CLASSES)).double()
    with torch.no_grad():
        hidden.bias[:16] = -1e3  # slopes that round to 0, and depend on the weights all the same
    assert not model[:2](X)[:, :16].any()
    assert n_left(model, X) == [32, N_FEATURES]


def test_whole_matrix_is_zero_where_nothing_is_left():
    matrix = torch.arange(12.0).reshape(3, 4)
    live = Live(torch.tensor([0, 2]), torch.tensor([1]))
    part = live.of(matrix)
    assert part.tolist() == [[1.0], [9.0]]
    assert live.whole(part, like=matrix).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 9, 0, 0]]


def test_few_rows_keep_all_units():
    assert not leaving_out_pays(n_rows=20, n_left=220, n_units=256)
    assert leaving_out_pays(n_rows=1280, n_left=220, n_units=256)
    assert not leaving_out_pays(n_rows=1280, n_left=256, n_units=256)


def test_products_of_many_rows_are_without_dead_units(monkeypatch):
    asked = []

    def recorded(maps, n_rows):
        asked.append(without_dead_units(maps, n_rows)[1] is not None)
        return without_dead_units(maps, n_rows)

    monkeypatch.setattr(_chain, "without_dead_units", recorded)
    X, y = samples()
    for norm in ("l1", "l2"):
        objective = JacobianRegularization(norm=norm)
        objective(network((16, 14)), X, y, generator=torch.Generator())
    assert asked == [True, True]
