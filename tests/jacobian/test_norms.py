import copy
import math
import re
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from skjacobian.jacobian import JACOBIAN_NORMS, OUTPUTS, jacobian_norm
from skjacobian.modules import CNN, MLP
from tests.seeds import seeded

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


def layer_norm_mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Softplus(), nn.Linear(7, N_CLASSES))


NETS = {
    "mlp": (mlp, (5,)),
    "relu mlp": (lambda: mlp("relu"), (5,)),
    "mlp of images": (mlp, (1, 5, 1)),
    "cnn": (cnn, (2, 4, 4)),
    "relu cnn": (lambda: cnn("relu"), (2, 4, 4)),
    "dropout": (lambda: MLP(5, N_CLASSES, hidden_units=(8,), dropout=0.5), (5,)),
    "batch norm mlp": (batch_norm_mlp, (5,)),
    "batch norm cnn": (batch_norm_cnn, (2, 4, 4)),
    "layer norm mlp": (layer_norm_mlp, (5,)),
}

# Every norm of the Jacobian of the logits, and of the gradient of the loss.
EXACT = {
    **{norm: {"norm": norm} for norm in JACOBIAN_NORMS},
    **{f"{norm} of the loss": {"norm": norm, "output": "loss"} for norm in ("l2", "l1")},
}
ESTIMATES = {
    "l2 by projections": {"norm": "l2", "n_projections": 2},
    "l21 by projections": {"norm": "l21", "n_projections": 2},
    "l2 by classes": {"norm": "l2", "class_samples": 2},
    "l1 by classes": {"norm": "l1", "class_samples": 2},
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


def labels(X):
    return torch.arange(len(X)) % N_CLASSES


def norms_of(jacobian, y):
    """The norms of an explicit Jacobian (..., n_samples, n_classes, n_features)."""
    own = jacobian[..., torch.arange(len(y)), y, :].unsqueeze(-2)
    return {
        "l2": (jacobian**2).sum((-2, -1)),
        "l1": abs(jacobian).sum((-2, -1)),
        "l21": ((jacobian**2).sum(-2) ** 0.5).sum(-1),
        "spectral": torch.linalg.svdvals(jacobian)[..., 0],
        "cross_lipschitz": abs(jacobian - own).sum(-1).amax(-1),
    }


def loss_norms_of(jacobian, logits, y):
    """The norms of the gradient of the cross-entropy by x."""
    residual = logits.softmax(-1) - F.one_hot(y, logits.shape[-1])
    gradient = torch.einsum("...c,...cd->...d", residual, jacobian)
    return {"l2": (gradient**2).sum(-1), "l1": abs(gradient).sum(-1)}


def expected_norm(jacobian, logits, y, norm, output="logits"):
    of_loss = output == "loss"
    return (loss_norms_of(jacobian, logits, y) if of_loss else norms_of(jacobian, y))[norm]


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


@cache
def explicit_jacobian(name, oracle):
    return oracle(*make(name))


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("oracle", [by_finite_differences, by_jacrev, by_a_loop])
@pytest.mark.parametrize("name", NETS)
def test_exact_norms_are_those_of_the_explicit_jacobian(name, oracle, options):
    net, X = make(name)
    jacobian = explicit_jacobian(name, oracle)
    expected = expected_norm(jacobian, net(X).detach(), labels(X), **options)
    tolerance = 1e-6 if oracle is by_finite_differences else 1e-10
    computed = jacobian_norm(net, X, labels(X), **options)
    assert computed.shape == (len(X),)
    torch.testing.assert_close(computed, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NETS)
def test_the_gradient_of_the_loss_is_the_one_that_an_attack_follows(name):
    net, X = make(name)
    y = labels(X)
    computed = {p: jacobian_norm(net, X, y, norm=p, output="loss") for p in ("l2", "l1")}
    loss = F.cross_entropy(net(X.requires_grad_()), y, reduction="sum")
    gradient = torch.autograd.grad(loss, X)[0].flatten(1)
    expected = {"l2": (gradient**2).sum(1), "l1": abs(gradient).sum(1)}
    torch.testing.assert_close(computed, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(("n_classes", "n_features"), [(4, 6), (6, 4), (1, 6), (4, 1), (1, 1)])
def test_norms_of_a_linear_model_are_those_of_its_weights(n_classes, n_features, options):
    W = torch.randn(n_classes, n_features, generator=seeded(), dtype=torch.float64)
    X = torch.randn(3, n_features, generator=seeded(1), dtype=torch.float64)
    y = torch.tensor([2, 0, 1]) % n_classes
    expected = expected_norm(W.expand(3, -1, -1), X @ W.T, y, **options)
    computed = jacobian_norm(lambda X: X @ W.T, X, y, **options)
    torch.testing.assert_close(computed, expected, rtol=1e-12, atol=1e-12)


def test_the_default_is_the_exact_squared_frobenius_norm():
    net, X = make("mlp")
    assert torch.equal(jacobian_norm(net, X), jacobian_norm(net, X, norm="l2", output="logits"))


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_labels_matter_only_where_they_are_asked_for(options):
    net, X = make("mlp")
    y = labels(X)
    norms = [jacobian_norm(net, X, k, **options) for k in (y, (y + 1) % N_CLASSES)]
    depends = "output" in options or options["norm"] == "cross_lipschitz"
    assert torch.equal(*norms) != depends
    if not depends:
        assert torch.equal(jacobian_norm(net, X, **options), norms[0])


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("name", ["mlp", "relu cnn", "layer norm mlp"])
def test_each_sample_is_treated_by_itself(name, options):
    net, X = make(name, n=5)
    y = labels(X)
    together = jacobian_norm(net, X, y, **options)
    alone = [jacobian_norm(net, X[[i]], y[[i]], **options) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [*EXACT.values(), *ESTIMATES.values()], ids=repr)
def test_norms_are_of_the_type_of_the_samples(options):
    net, X = make("cnn")
    exact = jacobian_norm(net, X, labels(X), generator=seeded(), **options)
    single = jacobian_norm(net.float(), X.float(), labels(X), generator=seeded(), **options)
    assert single.dtype == torch.float32
    if "n_projections" not in options:  # other types, other random numbers
        torch.testing.assert_close(single, exact.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [*EXACT.values(), *ESTIMATES.values()], ids=repr)
@pytest.mark.parametrize("name", ["mlp", "cnn", "layer norm mlp"])
def test_no_samples_have_no_norms(name, options):
    net, X = make(name)
    norms = jacobian_norm(net, X[:0], labels(X[:0]), create_graph=True, **options)
    assert norms.shape == (0,)
    norms.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in net.parameters())


# --- what they bound ---------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    n_classes=st.integers(1, 6),
    n_features=st.integers(1, 6),
    activation=st.sampled_from(["relu", "tanh", "gelu"]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
@settings(deadline=None, max_examples=60)
def test_the_norms_bound_the_gradient_of_the_loss(seed, n_classes, n_features, activation, scale):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MLP(n_features, n_classes, hidden_units=(7, 5), activation=activation).double()
        X = torch.randn(6, n_features, dtype=torch.float64)
        y = torch.randint(n_classes, (6,))
    with torch.no_grad():
        net[-1].weight.mul_(scale)
    of = {name: jacobian_norm(net, X, y, **options) for name, options in EXACT.items()}
    steepest_l2, steepest_l1 = of["l2 of the loss"].sqrt(), of["l1 of the loss"]
    root2 = math.sqrt(2)
    for smaller, larger in [
        (steepest_l2, root2 * of["spectral"]),
        (of["spectral"], of["l2"].sqrt()),
        (of["l2"].sqrt(), of["l21"]),
        (of["l2"], min(n_classes, n_features) * of["spectral"] ** 2),
        (of["l21"], of["l1"]),
        (steepest_l1, of["cross_lipschitz"]),
        (steepest_l1, root2 * of["l21"]),
        (steepest_l1, of["l1"]),
        (of["cross_lipschitz"], of["l1"]),
    ]:
        assert (smaller <= larger * (1 + 1e-9) + 1e-12).all()


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
            for _ in range(1000)
        ]
    )
    standard_error = draws.std(0) / math.sqrt(len(draws))
    exact = norms_of(jacobian, labels(X))[norm]
    assert ((draws.mean(0) - exact).abs() < 4 * standard_error).all()


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


@pytest.mark.parametrize("options", ESTIMATES.values(), ids=ESTIMATES)
def test_the_same_seed_gives_the_same_estimate(options):
    net, X = make("mlp")
    estimates = [jacobian_norm(net, X, generator=seeded(k), **options) for k in (0, 0, 1, 2, 3)]
    assert torch.equal(estimates[0], estimates[1])
    assert any(not torch.equal(estimates[0], other) for other in estimates[2:])


@pytest.mark.parametrize("options", ESTIMATES.values(), ids=ESTIMATES)
def test_without_a_generator_each_estimate_is_another(options):
    net, X = make("mlp")
    estimates = torch.stack([jacobian_norm(net, X, **options) for _ in range(30)])
    assert len(estimates.unique(dim=0)) > 1


def test_the_estimate_is_exact_for_a_jacobian_with_orthonormal_rows(generator):
    # ‖Jᵀv̂‖ = 1 for every direction, so the l2 estimate has no variance.
    J = torch.linalg.qr(torch.randn(6, 3, generator=generator, dtype=torch.float64))[0].T
    estimate = jacobian_norm(
        lambda X: X @ J.T, torch.zeros(2, 6, dtype=torch.float64), norm="l2", n_projections=1
    )
    torch.testing.assert_close(estimate, torch.full((2,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("engine", ["closed_form", "loop"])
@pytest.mark.parametrize("class_samples", [1, 2])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_drawn_classes_average_to_the_exact_norm_and_its_gradient(norm, class_samples, engine):
    net, X = make("relu mlp", n=5)

    def estimate(**options):
        value = jacobian_norm(net, X, norm=norm, engine=engine, create_graph=True, **options)
        gradient = torch.autograd.grad(value.sum(), net[3].weight)[0]
        return torch.cat([value.detach(), gradient.flatten()])

    draws = torch.stack(
        [estimate(class_samples=class_samples, generator=seeded(seed)) for seed in range(60)]
    )
    outcomes, counts = draws.unique(dim=0, return_counts=True)
    assert len(outcomes) == N_CLASSES
    assert counts.min() >= 8
    torch.testing.assert_close(outcomes.mean(0), estimate(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_drawn_classes_are_scaled_up_to_all(norm):
    # Row k of J has the norm 10ᵏ, so the sum of a draw tells which classes are in it.
    W = (
        torch.diag(10.0 ** torch.arange(5)).sqrt()
        if norm == "l2"
        else torch.diag(10.0 ** torch.arange(5))
    )
    for class_samples in (1, 2, 3, 4):
        norms = jacobian_norm(
            lambda X: X @ W.T, torch.zeros(20, 5), norm=norm, class_samples=class_samples
        )
        sums = (norms * class_samples / 5).round().long()
        drawn = torch.stack([sums // 10**k % 10 for k in range(5)], 1)
        assert (drawn <= 1).all()
        assert (drawn.sum(1) == class_samples).all()
        assert (drawn.sum(0) == 4 * class_samples).all()


@pytest.mark.parametrize("class_samples", [N_CLASSES, N_CLASSES + 1, 100, np.int64(3)])
@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("name", ["mlp", "relu cnn", "layer norm mlp"])
def test_as_many_classes_as_there_are_is_the_exact_norm(name, norm, class_samples):
    net, X = make(name)
    estimate = jacobian_norm(net, X, norm=norm, class_samples=class_samples)
    torch.testing.assert_close(estimate, jacobian_norm(net, X, norm=norm), rtol=1e-14, atol=0)


# --- gradients by the weights ------------------------------------------------------------


def weight_gradient(net, X, y=None, **options):
    total = jacobian_norm(net, X, y, create_graph=True, **options).sum()
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


@cache
def jacobians_around(name, n=2, step=1e-5):
    """Logits and explicit Jacobians with each weight moved up and moved down in turn."""
    net, X = make(name, n)
    sizes = {key: (p.shape, p.numel()) for key, p in net.named_parameters()}
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    moves = step * torch.eye(len(flat), dtype=torch.float64)

    def logits_and_jacobian(weights):
        parts = weights.split([numel for _, numel in sizes.values()])
        parameters = {
            key: part.reshape(shape)
            for (key, (shape, _)), part in zip(sizes.items(), parts, strict=True)
        }

        def logits(x):
            return torch.func.functional_call(net, parameters, (x.unsqueeze(0),))[0]

        return torch.vmap(logits)(X), torch.vmap(torch.func.jacrev(logits))(X).flatten(2)

    with torch.no_grad():
        return [torch.vmap(logits_and_jacobian)(flat + sign * moves) for sign in (1, -1)]


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("name", [name for name in NETS if name != "mlp of images"])
def test_the_gradient_by_the_weights_matches_finite_differences(name, options, engine):
    net, X = make(name, n=2)
    up, down = (
        expected_norm(jacobian, logits, labels(X), **options).sum(1)
        for logits, jacobian in jacobians_around(name)
    )
    gradient = weight_gradient(net, X, labels(X), engine=engine, **options)
    torch.testing.assert_close(gradient, (up - down) / 2e-5, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", ESTIMATES.values(), ids=ESTIMATES)
@pytest.mark.parametrize("name", ["mlp", "relu mlp"])
def test_the_gradient_of_an_estimate_matches_finite_differences(name, options):
    net, X = make(name, n=2)
    torch.testing.assert_close(
        weight_gradient(net, X, generator=seeded(4), **options),
        weight_gradient_by_differences(
            net, lambda: jacobian_norm(net, X, generator=seeded(4), **options)
        ),
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize("options", [*EXACT.values(), *ESTIMATES.values()], ids=repr)
@pytest.mark.parametrize("name", ["mlp", "cnn", "layer norm mlp"])
def test_without_create_graph_nothing_can_be_differentiated(name, options):
    net, X = make(name)
    assert not jacobian_norm(net, X, labels(X), **options).requires_grad
    assert jacobian_norm(net, X, labels(X), create_graph=True, **options).requires_grad


def kill_all_units(net):
    net[1].bias.fill_(-1e3)


def unuse_a_feature(net):
    net[1].weight[:, 2] = 0.0


def zero_the_row_of_a_class(net):
    net[-1].weight[1] = 0.0


def make_the_classes_equal(net):
    net[-1].weight.copy_(net[-1].weight[:1].expand_as(net[-1].weight))
    net[-1].bias.fill_(0.0)


def zero_the_last_layer(net):
    net[-1].weight.fill_(0.0)


@pytest.mark.parametrize("engine", ["closed_form", "batched", "loop"])
@pytest.mark.parametrize("options", [*EXACT.values(), *ESTIMATES.values()], ids=repr)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize(
    "degenerate",
    [
        kill_all_units,
        unuse_a_feature,
        zero_the_row_of_a_class,
        make_the_classes_equal,
        zero_the_last_layer,
    ],
)
def test_gradients_are_finite_where_norms_have_kinks(degenerate, activation, options, engine):
    net, X = make("mlp" if activation == "tanh" else "relu mlp")
    with torch.no_grad():
        degenerate(net)
    options = {"engine": engine, "generator": seeded(), **options}
    norm = jacobian_norm(net, X, labels(X), **options)
    jacobian, logits = by_jacrev(net, X), net(X).detach()
    if "n_projections" not in options and "class_samples" not in options:
        known = {key: options[key] for key in ("norm", "output") if key in options}
        expected = expected_norm(jacobian, logits, labels(X), **known)
        torch.testing.assert_close(norm, expected, rtol=1e-10, atol=1e-12)
    if degenerate in (kill_all_units, zero_the_last_layer):
        assert (norm == 0).all()
    assert torch.isfinite(weight_gradient(net, X, labels(X), **options)).all()


@pytest.mark.parametrize("engine", ["closed_form", "batched", "loop"])
@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_network_that_has_diverged_has_norms_that_are_not_finite(value, options, engine):
    net, X = make("mlp")
    with torch.no_grad():
        net[-1].weight[1, 2] = value
    norms = jacobian_norm(net, X, labels(X), **options, engine=engine, create_graph=True)
    assert not norms.isfinite().any()


def test_the_largest_singular_value_beside_a_sample_that_is_not_finite_is_its_own():
    W = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    X = torch.tensor([[1.0, 1.0], [math.nan, 1.0], [2.0, 1.0]])
    norms = jacobian_norm(lambda X: X.square() @ W.T / 2, X, norm="spectral")
    torch.testing.assert_close(norms, torch.tensor([4.0, math.nan, 6.0]), equal_nan=True)


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_a_feature_that_is_not_used_does_not_stop_the_gradient(options):
    net, X = make("mlp")
    with torch.no_grad():
        net[1].weight[:, 2] = 0.0
    assert weight_gradient(net, X, labels(X), **options).abs().max() > 0


# --- what it leaves alone ----------------------------------------------------------------


@pytest.mark.parametrize("options", [*EXACT.values(), *ESTIMATES.values()], ids=repr)
@pytest.mark.parametrize("engine", ["auto", "closed_form", "loop"])
@pytest.mark.parametrize("name", ["batch norm mlp", "batch norm cnn"])
def test_batch_normalization_in_training_mode_changes_nothing(name, engine, options):
    net, X = make(name)

    def norm():
        return jacobian_norm(
            net, X, labels(X), engine=engine, generator=seeded(), create_graph=True, **options
        )

    in_eval_mode = norm()
    net.train()
    net[0].eval()
    modes = [module.training for module in net.modules()]
    state = copy.deepcopy(net.state_dict())
    torch.testing.assert_close(norm(), in_eval_mode, rtol=1e-12, atol=1e-12)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_modes_are_restored_after_an_error():
    net, X = make("batch norm mlp")
    net.train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        jacobian_norm(net, X[:, :3])
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("options", [*EXACT.values(), *ESTIMATES.values()], ids=repr)
@pytest.mark.parametrize("name", ["mlp", "cnn", "layer norm mlp"])
def test_gradients_samples_and_global_random_states_are_left_alone(name, options, create_graph):
    net, X = make(name)
    X.requires_grad_()
    clean, y = X.detach().clone(), labels(X)
    weights = copy.deepcopy(net.state_dict())
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    norms = jacobian_norm(net, X, y, create_graph=create_graph, **options)
    if create_graph:
        torch.autograd.grad(norms.sum(), list(net.parameters()), allow_unused=True)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert X.grad is None
    assert X.requires_grad
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    assert torch.equal(X, clean)
    assert torch.equal(y, labels(X))


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("options", [*EXACT.values(), *ESTIMATES.values()], ids=repr)
@pytest.mark.parametrize("name", ["mlp", "cnn", "layer norm mlp"])
def test_it_works_where_gradients_are_switched_off(name, options, create_graph):
    net, X = make(name)

    def norm():
        return jacobian_norm(
            net, X, labels(X), create_graph=create_graph, generator=seeded(), **options
        )

    expected = norm()
    with torch.no_grad():
        computed = norm()
        assert not torch.is_grad_enabled()
    assert torch.equal(computed, expected)
    assert computed.requires_grad == create_graph


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("options", [*EXACT.values(), *ESTIMATES.values()], ids=repr)
@pytest.mark.parametrize("name", ["mlp", "relu cnn", "layer norm mlp"])
def test_frozen_weights_change_nothing(name, options, create_graph):
    net, X = make(name)
    expected = jacobian_norm(net, X, labels(X), generator=seeded(), **options)
    net.requires_grad_(False)
    computed = jacobian_norm(
        net, X, labels(X), generator=seeded(), create_graph=create_graph, **options
    )
    torch.testing.assert_close(computed.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [*EXACT.values(), *ESTIMATES.values()], ids=repr)
@pytest.mark.parametrize("name", ["mlp", "relu mlp", "relu cnn"])
def test_the_gradient_by_some_of_the_weights_is_that_part_of_the_whole(name, options):
    net, X = make(name)
    y = labels(X)
    weights = [p for p in net.parameters() if p.ndim > 1]

    def gradients(of):
        norms = jacobian_norm(net, X, y, create_graph=True, generator=seeded(), **options)
        return torch.autograd.grad(norms.sum(), of)

    whole = gradients(weights)
    for parameter, expected in zip(weights, whole, strict=True):
        net.requires_grad_(False)
        parameter.requires_grad_()
        torch.testing.assert_close(gradients([parameter])[0], expected, rtol=1e-10, atol=1e-12)


# --- errors ------------------------------------------------------------------------------


NEEDS_LABELS = (
    "Got y=None, but expected class indices of shape (n_samples,): norm={!r} with output={!r} "
    "depends on the label."
)
NO_ESTIMATE = "Got {}, but expected None with norm={!r}: only {} have an unbiased random estimate."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"norm": "l3"},
            "Got norm='l3', but expected one of 'l1', 'l2', 'l21', 'spectral', 'cross_lipschitz'.",
        ),
        ({"norm": "l22"}, "'cross_lipschitz' (did you mean 'l2'?)."),
        ({"norm": "spectrum"}, "'cross_lipschitz' (did you mean 'spectral'?)."),
        ({"norm": ["l2"]}, "Got norm=['l2'], but expected one of 'l1', 'l2', 'l21', 'spectral', "),
        (
            {"output": "logit"},
            "Got output='logit', but expected one of 'logits', 'loss' (did you mean 'logits'?).",
        ),
        (
            {"engine": "closed"},
            "Got engine='closed', but expected one of 'auto', 'closed_form', 'batched', 'loop' "
            "(did you mean 'closed_form'?).",
        ),
        (
            {"norm": "l1", "n_projections": 1},
            NO_ESTIMATE.format("n_projections=1", "l1", "'l2' and 'l21'"),
        ),
        (
            {"norm": "spectral", "n_projections": 2},
            NO_ESTIMATE.format("n_projections=2", "spectral", "'l2' and 'l21'"),
        ),
        (
            {"norm": "cross_lipschitz", "n_projections": 2},
            NO_ESTIMATE.format("n_projections=2", "cross_lipschitz", "'l2' and 'l21'"),
        ),
        (
            {"norm": "l21", "class_samples": 2},
            NO_ESTIMATE.format("class_samples=2", "l21", "'l2' and 'l1'"),
        ),
        (
            {"norm": "spectral", "class_samples": 2},
            NO_ESTIMATE.format("class_samples=2", "spectral", "'l2' and 'l1'"),
        ),
        (
            {"norm": "cross_lipschitz", "class_samples": 2},
            NO_ESTIMATE.format("class_samples=2", "cross_lipschitz", "'l2' and 'l1'"),
        ),
        (
            {"norm": "l2", "n_projections": 1, "class_samples": 2},
            "Got class_samples=2, but expected None with n_projections, which mix all classes.",
        ),
        *(
            (
                {"norm": norm, "output": "loss"},
                f"Got norm={norm!r}, but expected 'l1' or 'l2' with output='loss', a gradient.",
            )
            for norm in ("l21", "spectral", "cross_lipschitz")
        ),
        *(
            (
                {"norm": "l2", "output": "loss", name: 1},
                f"Got {name}=1, but expected None with output='loss', a gradient.",
            )
            for name in ("n_projections", "class_samples")
        ),
        *(
            ({name: value}, f"Got {name}={value!r}, but expected an integer of at least 1.")
            for name in ("n_projections", "class_samples")
            for value in (0, -1, 1.5, 1.0, True, "2", math.nan)
        ),
        ({"norm": "cross_lipschitz"}, NEEDS_LABELS.format("cross_lipschitz", "logits")),
        ({"output": "loss"}, NEEDS_LABELS.format("l2", "loss")),
        ({"norm": "l1", "output": "loss"}, NEEDS_LABELS.format("l1", "loss")),
    ],
    ids=repr,
)
def test_bad_parameters_are_rejected(options, message):
    net, X = make("mlp")
    with pytest.raises(ValueError, match=re.escape(message) + ("$" if message[-1] == "." else "")):
        jacobian_norm(net, X, **options)


@pytest.mark.parametrize("name", ["n_projections", "class_samples"])
@pytest.mark.parametrize("value", [1.0, True])
def test_bad_parameters_are_rejected_even_if_equal_to_good_ones_before(value, name):
    net, X = make("mlp")
    jacobian_norm(net, X, **{name: 1})
    with pytest.raises(ValueError, match=f"Got {name}={value}, but expected an integer"):
        jacobian_norm(net, X, **{name: value})


@pytest.mark.parametrize("name", ["n_projections", "class_samples"])
@pytest.mark.parametrize("value", [np.int64(2), np.array(2), torch.tensor(2)], ids=repr)
def test_numbers_may_come_from_arrays(value, name):
    net, X = make("mlp")
    expected = jacobian_norm(net, X, generator=seeded(), **{name: 2})
    assert torch.equal(jacobian_norm(net, X, generator=seeded(), **{name: value}), expected)


def test_the_names_are_complete():
    assert JACOBIAN_NORMS == ("l1", "l2", "l21", "spectral", "cross_lipschitz")
    assert OUTPUTS == ("logits", "loss")


@pytest.mark.parametrize("options", [*EXACT.values(), *ESTIMATES.values()], ids=repr)
@pytest.mark.parametrize(
    "detached",
    [lambda X: X.detach() * 2, nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))],
    ids=["no graph", "a graph of the weights only"],
)
def test_logits_that_do_not_depend_on_the_samples_are_an_error(detached, options):
    with pytest.raises(ValueError, match="Got logits that do not depend on X differentiably"):
        jacobian_norm(
            lambda X: detached(X.detach()), torch.zeros(2, 5), torch.tensor([0, 1]), **options
        )


@pytest.mark.parametrize("engine", ["auto", "closed_form", "batched", "loop"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_normalization_without_running_statistics_is_an_error(training, engine):
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ValueError, match=r"track_running_stats=False.*nn\.LayerNorm"):
        jacobian_norm(net.train(training), torch.zeros(3, 5), engine=engine)


def test_arrays_are_for_estimators():
    with pytest.raises(TypeError, match=r"Got X of type ndarray, .* method jacobian_norm"):
        jacobian_norm(nn.Linear(2, 3), np.zeros((4, 2)))


NEED_LABELS = [{"norm": "cross_lipschitz"}, {"norm": "l2", "output": "loss"}]


@pytest.mark.parametrize("options", NEED_LABELS, ids=str)
@pytest.mark.parametrize(
    ("y", "got"),
    [
        (torch.zeros(1, dtype=int), r"y of shape \(1,\) and torch.int64"),
        (torch.zeros(7, dtype=int), r"y of shape \(7,\) and torch.int64"),
        (torch.zeros(6, 3, dtype=int), r"y of shape \(6, 3\) and torch.int64"),
        (torch.zeros(6), r"y of shape \(6,\) and torch.float32"),
        (torch.tensor([0, 1, 2, 3, 0, 1]), r"y from 0 to 3"),
        (torch.tensor([0, 1, 2, -1, 0, 1]), r"y from -1 to 2"),
    ],
)
def test_labels_are_one_class_index_for_each_sample(options, y, got):
    message = f"Got {got}, but expected one class index from 0 to 2 for each of 6 samples"
    with pytest.raises(ValueError, match=message):
        jacobian_norm(MLP(4, 3), torch.ones(6, 4), y, **options)


@pytest.mark.parametrize("options", NEED_LABELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_may_be_of_any_type_of_whole_numbers(options, dtype):
    net, X, y = MLP(4, 3), torch.rand(6, 4), torch.arange(6) % 3
    torch.testing.assert_close(
        jacobian_norm(net, X, y.to(dtype), **options), jacobian_norm(net, X, y, **options)
    )


def test_the_spectral_norm_of_a_network_in_half_precision_is_that_of_its_weights():
    torch.manual_seed(0)
    half, X = MLP(4, 3).bfloat16(), torch.rand(6, 4).bfloat16()
    expected = jacobian_norm(copy.deepcopy(half).float(), X.float(), norm="spectral")
    found = jacobian_norm(half, X, norm="spectral")
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0)


class Mixing(nn.Module):
    """A module whose samples depend on each other."""

    def __init__(self, mixed):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.mixed = mixed

    def forward(self, X):
        return self.linear(self.mixed(X))


MIXTURES = {
    "mean": lambda X: X - X.mean(0),
    "sum": lambda X: X + X.sum(),
    "statistics": lambda X: F.batch_norm(X, None, None, training=True),
}


@pytest.mark.parametrize("mixed", MIXTURES.values(), ids=MIXTURES)
def test_a_model_that_mixes_samples_has_no_jacobian(mixed, generator):
    X = torch.randn(5, 6, generator=generator)
    with pytest.raises(ValueError, match="Got a model whose answer to a sample depends on"):
        jacobian_norm(Mixing(mixed), X)


def test_a_model_that_answers_at_random_is_not_taken_for_one_that_mixes(generator):
    X = torch.randn(5, 6, generator=generator)
    net = Mixing(lambda X: X + torch.randn(X.shape))
    with torch.random.fork_rng(devices=[]):
        norms = jacobian_norm(net, X)
    expected = net.linear.weight.square().sum()
    torch.testing.assert_close(norms, expected.expand(5).detach())


def test_recurrent_layers_take_samples_for_steps_unless_told_otherwise(generator):
    class Recurrent(nn.Module):
        def __init__(self, **how):
            super().__init__()
            self.layer = nn.RNN(6, 3, **how)

        def forward(self, X):
            return self.layer(X)[0].reshape(len(X), -1)

    with pytest.raises(ValueError, match="attention without batch_first=True"):
        jacobian_norm(Recurrent(), torch.randn(5, 6, generator=generator))
    X = torch.randn(5, 2, 6, generator=generator)
    assert jacobian_norm(Recurrent(batch_first=True), X, engine="loop").shape == (5,)


def test_a_model_that_cannot_be_batched_is_said_to_want_a_loop(generator):
    net = nn.Sequential(nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 3))
    X = torch.randn(5, 4, 6, 6, generator=generator)
    with pytest.raises(ValueError, match="Got engine='batched', but expected 'loop' or 'auto'"):
        jacobian_norm(net, X, engine="batched", create_graph=True)
    assert jacobian_norm(net, X, create_graph=True).requires_grad


def test_whole_numbers_have_no_jacobian():
    with pytest.raises(ValueError, match=r"Got X of torch\.int64, but expected floating"):
        jacobian_norm(torch.nn.Linear(3, 2), torch.zeros(2, 3, dtype=torch.int64))
