"""The norms of networks that bounds hold, against matrices, papers and Jacobians."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from skjacobian.capacity import (
    adversarial_rademacher_linear,
    linear_maps,
    network_norms,
    path_norm,
    spectral_complexity,
)
from skjacobian.jacobian import jacobian_norm
from skjacobian.modules import CNN, MLP


def dense_matrix(layer_map):
    """The matrix of a layer, column by column."""
    n = math.prod(layer_map.input_shape)
    eye = torch.eye(n, dtype=torch.float64).reshape(n, *layer_map.input_shape)
    layer = layer_map.layer.double()
    with torch.no_grad():
        origin = layer(torch.zeros(1, *layer_map.input_shape, dtype=torch.float64))
        return (layer(eye) - origin).flatten(1).T


LAYERS = [
    (nn.Linear(5, 3), (5,)),
    (nn.Conv2d(1, 1, 2, bias=False), (1, 2, 2)),
    (nn.Conv2d(2, 3, 3, padding="same"), (2, 5, 4)),
    (nn.Conv2d(2, 4, 3, stride=2, groups=2), (2, 7, 7)),
    (nn.Conv1d(2, 3, 3, bias=False), (2, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value))
def test_the_norms_of_a_layer_are_those_of_its_matrix(layer, shape):
    (layer_map,) = linear_maps(nn.Sequential(layer), shape)
    A = dense_matrix(layer_map)
    assert layer_map.spectral_norm() == pytest.approx(
        float(torch.linalg.matrix_norm(A, 2)), rel=1e-6
    )
    for p in (1, 2):
        torch.testing.assert_close(
            layer_map.row_norms(p), torch.linalg.vector_norm(A, p, dim=1).detach()
        )


def networks():
    return [
        MLP(n_features=6, n_classes=3, hidden_units=(5, 4), activation="tanh"),
        CNN((1, 6, 6), 3, channels=(2, 3), kernel_size=3, hidden_units=(5,)),
        nn.Sequential(nn.Linear(4, 4, bias=False), nn.LeakyReLU(), nn.ELU(), nn.Linear(4, 2)),
    ]


SHAPES = [(6,), (1, 6, 6), (4,)]


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(0.1, 5))
def test_products_and_path_norm_bound_every_jacobian(seed, scale):
    torch.manual_seed(seed)
    for network, shape in zip(networks(), SHAPES, strict=True):
        network.double()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(scale)
        X = torch.randn(8, *shape, dtype=torch.float64)
        norms = network_norms(network, X)
        spectral = jacobian_norm(network, X, norm="spectral")
        assert bool((spectral <= norms["spectral_product"] * (1 + 1e-9)).all())
        assert norms["spectral_product"] <= norms["frobenius_product"] * (1 + 1e-9)
        assert norms["spectral_product"] <= norms["spectral_complexity"]
        entrywise = jacobian_norm(network, X, norm="l1")
        assert bool((entrywise <= norms["path_norm_1"] * (1 + 1e-9)).all())
        assert norms["path_norm_2"] <= norms["path_norm_1"] * (1 + 1e-9)


def test_the_path_norm_counts_every_path():
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    W, v = network[0].weight.data, network[2].weight.data
    paths = [abs(v[0, k] * W[k, j]) for k in range(2) for j in range(2)]
    assert path_norm(network, (2,), 1) == pytest.approx(float(sum(paths)))
    assert path_norm(network, (2,), 2) == pytest.approx(math.sqrt(sum(p**2 for p in paths)))


def test_the_spectral_complexity_is_that_of_the_paper():
    A, B = np.diag([2.0, 1.0]), np.array([[3.0, 4.0]])
    sigma, rows = np.array([2.0, 5.0]), np.array([3.0, 5.0])
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    for layer, weight in ((network[0], A), (network[2], B)):
        layer.weight.data.copy_(torch.from_numpy(weight))
    expected = 10 * (1.5 ** (2 / 3) + 1) ** 1.5
    assert spectral_complexity(sigma, rows) == pytest.approx(expected)
    assert network_norms(network, torch.ones(1, 2))["spectral_complexity"] == pytest.approx(
        expected, rel=1e-6
    )
    assert spectral_complexity(np.array([0.0, 1.0]), rows) == 0


def test_the_attack_enlarges_the_inputs():
    network = nn.Sequential(nn.Linear(4, 2))
    X = torch.ones(3, 4)
    l2, linf = (network_norms(network, X, norm=norm, eps=0.5) for norm in ("l2", "linf"))
    assert l2["radius"] == 2
    assert l2["adversarial_radius"] == 2.5
    assert linf["adversarial_radius"] == 3.0
    assert linf["adversarial_product"] == pytest.approx(3 * linf["frobenius_product"])


def test_the_margin_is_a_low_quantile_of_the_lead():
    network = nn.Sequential(nn.Linear(1, 2, bias=False))
    network[0].weight.data.copy_(torch.tensor([[1.0], [0.0]]))
    X = torch.arange(11.0).unsqueeze(1)
    norms = network_norms(network, X, torch.zeros(11, dtype=torch.long))
    assert norms["margin"] == pytest.approx(1.0)
    assert "margin" not in network_norms(network, X)


def test_a_network_is_left_as_it_was():
    network = MLP(n_features=4, n_classes=2, dropout=0.5)
    before = [parameter.clone() for parameter in network.parameters()]
    network_norms(network, torch.ones(2, 4), torch.tensor([0, 1]))
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    for old, new in zip(before, network.parameters(), strict=True):
        torch.testing.assert_close(old, new.detach())


@pytest.mark.parametrize(
    "layer",
    [
        *(nn.BatchNorm1d(4), nn.GELU(), nn.ELU(2.0), nn.MaxPool2d(3, stride=1)),
        nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    ],
)
def test_a_layer_that_the_bounds_do_not_cover_is_named(layer):
    with pytest.raises(TypeError, match=f"Got a layer {type(layer).__name__}"):
        network_norms(nn.Sequential(nn.Linear(4, 4), layer), torch.ones(1, 4))


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), norm=st.sampled_from(["l2", "linf"]))
def test_the_linear_bound_is_above_the_complexity_itself(seed, norm):
    rng = np.random.RandomState(seed)
    X, eps, W = rng.normal(size=(20, 3)), 0.4, 2.0
    bound = adversarial_rademacher_linear(torch.from_numpy(X), radius=W, norm=norm, eps=eps)
    directions = rng.normal(size=(500, 3))
    w = W * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    sigma = rng.choice([-1, 1], size=(200, 20))
    y = rng.choice([-1, 1], size=20)
    shrink = eps * np.linalg.norm(w, 2 if norm == "l2" else 1, axis=1)
    worst = y * (w @ X.T) - shrink[:, None]  # the smallest margin under attack, by w
    complexity = (sigma @ worst.T / 20).max(1).mean()
    assert complexity <= bound


def test_a_convolution_of_zeros_has_norm_0():
    layer = nn.Conv2d(2, 3, 3)
    nn.init.zeros_(layer.weight)
    assert network_norms(nn.Sequential(layer), torch.ones(1, 2, 6, 6))["spectral_product"] == 0.0


def test_a_sequence_with_a_forward_of_its_own_is_not_bounded():
    class Skip(nn.Sequential):
        def forward(self, X):
            return X + super().forward(X)

    with pytest.raises(TypeError, match=r"Got a layer Skip"):
        network_norms(Skip(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.ones(2, 4))


def test_pooling_of_a_window_that_reaches_over_the_edge_is_not_bounded():
    network = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(18, 2)
    )
    with pytest.raises(TypeError, match=r"Got a layer MaxPool2d"):
        network_norms(network, torch.ones(2, 1, 6, 6))
