import copy
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from skjacobian.jacobian import JACOBIAN_NORMS, jacobian_norm
from skjacobian.modules import CNN, MLP

N_CLASSES = 3


def mlp(activation="tanh"):
    return MLP(5, N_CLASSES, hidden_units=(7, 6), activation=activation)


def cnn(activation="tanh"):
    shape = (2, 4, 4)
    return CNN(
        shape,
        N_CLASSES,
        channels=(3,),
        kernel_size=3,
        hidden_units=(5,),
        activation=activation,
    )


def batch_norm_mlp():
    return nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.BatchNorm1d(7), nn.Linear(7, N_CLASSES)
    )


def batch_norm_cnn():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.SiLU(), nn.Flatten(), nn.Linear(12, N_CLASSES)
    )


NETS = {
    "mlp": (mlp, (5,)),
    "relu mlp": (lambda: mlp("relu"), (5,)),
    "mlp of images": (mlp, (1, 5, 1)),
    "cnn": (cnn, (2, 4, 4)),
    "relu cnn": (lambda: cnn("relu"), (2, 4, 4)),
    "dropout": (lambda: MLP(5, N_CLASSES, hidden_units=(8,), dropout=0.5), (5,)),
    "batch norm mlp": (batch_norm_mlp, (5,)),
    "batch norm cnn": (batch_norm_cnn, (2, 4, 4)),
}


def make(name, n=4, seed=0):
    """Return a float64 net in eval mode with used running statistics, and samples."""
    make_net, shape = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make_net().double().train()
        for _ in range(3):
            net(2 * torch.randn(16, *shape, dtype=torch.float64) + 1)
        return net.eval(), torch.randn(n, *shape, dtype=torch.float64)


def norms_of(jacobian):
    """The three norms of an explicit Jacobian (n_samples, n_classes, n_features)."""
    return {
        "l2": (jacobian**2).sum((1, 2)),
        "l1": abs(jacobian).sum((1, 2)),
        "l21": ((jacobian**2).sum(1) ** 0.5).sum(1),
    }


def by_finite_differences(predict_logits, X, step=1e-6):
    columns = []
    with torch.no_grad():
        for j in range(X[0].numel()):
            delta = torch.zeros_like(X).flatten(1)
            delta[:, j] = step
            delta = delta.reshape(X.shape)
            columns.append((predict_logits(X + delta) - predict_logits(X - delta)) / (2 * step))
    return torch.stack(columns, 2)


def by_jacrev(predict_logits, X):
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: predict_logits(x.unsqueeze(0))[0]))(X)
    return jacobian.detach().flatten(2)


def by_a_loop(predict_logits, X):
    jacobians = [
        torch.autograd.functional.jacobian(lambda x: predict_logits(x.unsqueeze(0))[0], x)
        for x in X
    ]
    return torch.stack(jacobians).flatten(2)


@pytest.mark.parametrize("norm", JACOBIAN_NORMS)
@pytest.mark.parametrize("oracle", [by_finite_differences, by_jacrev, by_a_loop])
@pytest.mark.parametrize("name", NETS)
def test_exact_norms_are_those_of_the_explicit_jacobian(name, oracle, norm):
    net, X = make(name)
    expected = norms_of(oracle(net, X))[norm]
    tolerance = 1e-6 if oracle is by_finite_differences else 1e-10
    computed = jacobian_norm(net, X, norm=norm)
    assert computed.shape == (len(X),)
    torch.testing.assert_close(computed, expected, rtol=tolerance, atol=tolerance)


def test_norms_of_a_linear_model_are_those_of_its_weights(generator):
    W = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    X = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    for norm, value in norms_of(W.unsqueeze(0)).items():
        torch.testing.assert_close(jacobian_norm(lambda X: X @ W.T, X, norm=norm), value.expand(3))


def test_the_default_is_the_exact_squared_frobenius_norm():
    net, X = make("mlp")
    assert torch.equal(jacobian_norm(net, X), jacobian_norm(net, X, norm="l2"))


def test_a_single_class_has_a_jacobian_too(generator):
    w = torch.randn(1, 6, generator=generator)
    norm = jacobian_norm(lambda X: X @ w.T, torch.zeros(2, 6))
    torch.testing.assert_close(norm, w.square().sum().expand(2))


# --- estimates ---------------------------------------------------------------------------


@pytest.mark.parametrize("n_projections", [1, 3])
@pytest.mark.parametrize("norm", ["l2", "l21"])
def test_random_estimates_are_unbiased(norm, n_projections, generator):
    net, X = make("relu mlp", n=3)
    with torch.no_grad():
        jacobian = by_finite_differences(net, X)
    draws = torch.stack(
        [
            # The Jacobian of a linear map is the same at less cost than that of the net.
            jacobian_norm(
                lambda Z: torch.einsum("ncd,nd->nc", jacobian, Z),
                X,
                norm=norm,
                n_projections=n_projections,
                generator=generator,
            )
            for _ in range(2000)
        ]
    )
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - norms_of(jacobian)[norm]).abs() < 4 * standard_error).all()


@pytest.mark.parametrize("norm", ["l2", "l21"])
def test_many_projections_come_close_to_the_exact_norm(norm, generator):
    net, X = make("cnn")
    estimate = jacobian_norm(net, X, norm=norm, n_projections=2000, generator=generator)
    torch.testing.assert_close(estimate, jacobian_norm(net, X, norm=norm), rtol=0.15, atol=0)


@pytest.mark.parametrize("norm", ["l2", "l21"])
def test_each_sample_has_directions_of_its_own(norm, generator):
    net, X = make("mlp")
    repeated = X[:1].repeat(2000, 1)
    estimates = jacobian_norm(net, repeated, norm=norm, n_projections=1, generator=generator)
    assert len(estimates.unique()) > 1900
    standard_error = estimates.std() / math.sqrt(len(estimates))
    exact = jacobian_norm(net, X[:1], norm=norm)
    assert (estimates.mean() - exact).abs() < 4 * standard_error


@pytest.mark.parametrize("norm", ["l2", "l21"])
def test_the_same_seed_gives_the_same_estimate(norm):
    net, X = make("mlp")
    estimates = [
        jacobian_norm(
            net, X, norm=norm, n_projections=2, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(estimates[0], estimates[1])
    assert not torch.equal(estimates[0], estimates[2])


def test_the_estimate_is_exact_for_a_jacobian_with_orthonormal_rows(generator):
    # ‖Jᵀv̂‖ = 1 for every direction, so the l2 estimate has no variance.
    J = torch.linalg.qr(torch.randn(6, 3, generator=generator, dtype=torch.float64))[0].T
    estimate = jacobian_norm(
        lambda X: X @ J.T, torch.zeros(2, 6, dtype=torch.float64), norm="l2", n_projections=1
    )
    torch.testing.assert_close(estimate, torch.full((2,), 3.0, dtype=torch.float64))


# --- gradients by the weights ------------------------------------------------------------


def weight_gradient(net, X, **options):
    total = jacobian_norm(net, X, create_graph=True, **options).sum()
    gradients = torch.autograd.grad(total, list(net.parameters()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def weight_gradient_by_differences(net, value, step=1e-5):
    differences = []
    with torch.no_grad():
        for parameter in net.parameters():
            flat = parameter.view(-1)
            for j in range(len(flat)):
                original = flat[j].item()
                ends = []
                for end in (original + step, original - step):
                    flat[j] = end
                    ends.append(value().sum().item())
                flat[j] = original
                differences.append((ends[0] - ends[1]) / (2 * step))
    return torch.tensor(differences, dtype=torch.float64)


@pytest.mark.parametrize("norm", JACOBIAN_NORMS)
@pytest.mark.parametrize("name", ["mlp", "relu mlp", "batch norm mlp"])
def test_the_gradient_by_the_weights_matches_finite_differences(name, norm):
    net, X = make(name, n=2)
    torch.testing.assert_close(
        weight_gradient(net, X, norm=norm),
        weight_gradient_by_differences(net, lambda: norms_of(by_jacrev(net, X))[norm]),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("norm", ["l2", "l21"])
def test_the_gradient_of_an_estimate_matches_finite_differences(norm):
    net, X = make("mlp", n=2)

    def seeded():
        return {
            "norm": norm,
            "n_projections": 2,
            "generator": torch.Generator().manual_seed(4),
        }

    torch.testing.assert_close(
        weight_gradient(net, X, **seeded()),
        weight_gradient_by_differences(net, lambda: jacobian_norm(net, X, **seeded())),
        rtol=1e-5,
        atol=1e-6,
    )


def test_without_create_graph_nothing_can_be_differentiated():
    net, X = make("mlp")
    for norm in JACOBIAN_NORMS:
        assert not jacobian_norm(net, X, norm=norm).requires_grad
        assert jacobian_norm(net, X, norm=norm, create_graph=True).requires_grad


@pytest.mark.parametrize("norm", JACOBIAN_NORMS)
def test_a_zero_jacobian_has_a_finite_gradient(norm):
    net, X = make("relu mlp")
    with torch.no_grad():
        net.layers[1].bias.fill_(-1e3)  # every unit of the first layer is dead
    assert (jacobian_norm(net, X, norm=norm) == 0).all()
    assert torch.isfinite(weight_gradient(net, X, norm=norm)).all()


@pytest.mark.parametrize("norm", JACOBIAN_NORMS)
def test_a_feature_that_is_not_used_has_a_finite_gradient(norm):
    net, X = make("mlp")
    with torch.no_grad():
        net.layers[1].weight[:, 2] = 0.0
    gradient = weight_gradient(net, X, norm=norm)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


# --- what it leaves alone ----------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"norm": norm} for norm in JACOBIAN_NORMS]
    + [{"norm": "l2", "n_projections": 1}, {"norm": "l21", "n_projections": 1}],
)
@pytest.mark.parametrize("name", ["batch norm mlp", "batch norm cnn"])
def test_batch_normalization_in_training_mode_changes_nothing(name, options):
    net, X = make(name)

    def norm():
        return jacobian_norm(net, X, generator=torch.Generator().manual_seed(0), **options)

    in_eval_mode = norm()
    net.train()
    net[0].eval()
    modes = [module.training for module in net.modules()]
    state = copy.deepcopy(net.state_dict())
    torch.testing.assert_close(norm(), in_eval_mode)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_modes_are_restored_after_an_error():
    net, X = make("batch norm mlp")
    net.train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        jacobian_norm(net, X[:, :3])
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("n_projections", [None, 2])
def test_gradients_samples_and_global_random_states_are_left_alone(n_projections, create_graph):
    net, X = make("mlp")
    X.requires_grad_()
    clean = X.detach().clone()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    jacobian_norm(net, X, n_projections=n_projections, create_graph=create_graph)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert X.grad is None
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(X, clean)


def test_it_works_where_gradients_are_switched_off():
    net, X = make("mlp")
    expected = jacobian_norm(net, X)
    with torch.no_grad():
        assert torch.equal(jacobian_norm(net, X), expected)
        assert not torch.is_grad_enabled()


# --- errors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l3"}, "Got norm='l3', but expected one of 'l1', 'l2', 'l21'"),
        ({"norm": "l22"}, "(did you mean 'l2'?)"),
        (
            {"norm": "l1", "n_projections": 1},
            "Got n_projections=1, but expected None with norm='l1': only 'l2' and 'l21' have an "
            "unbiased random estimate.",
        ),
        ({"n_projections": 0}, "Got n_projections=0, but expected an integer of at least 1"),
        ({"n_projections": 1.5}, "Got n_projections=1.5, but expected an integer of at least 1"),
    ],
    ids=repr,
)
def test_bad_parameters_are_rejected(options, message):
    net, X = make("mlp")
    with pytest.raises(ValueError, match=re.escape(message)):
        jacobian_norm(net, X, **options)


@pytest.mark.parametrize("n_projections", [None, 1])
@pytest.mark.parametrize(
    "detached",
    [lambda X: X.detach() * 2, nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))],
    ids=["no graph", "a graph of the weights only"],
)
def test_logits_that_do_not_depend_on_the_samples_are_an_error(detached, n_projections):
    with pytest.raises(ValueError, match="Got logits that do not depend on X differentiably"):
        jacobian_norm(
            lambda X: detached(X.detach()), torch.zeros(2, 5), n_projections=n_projections
        )


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalization_without_running_statistics_is_an_error(training):
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ValueError, match=r"track_running_stats=False.*nn\.LayerNorm"):
        jacobian_norm(net.train(training), torch.zeros(3, 5))
