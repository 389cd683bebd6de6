import pytest
import torch
from sklearn import config_context
from torch import nn

from skjacobian.jacobian import jacobian_norm
from skjacobian.jacobian._joint import joint_pass, joint_pass_fits
from skjacobian.jacobian._norms import JacobianNorm
from skjacobian.jacobian._relu_pass import relu_pass_fits
from skjacobian.jacobian._stack import chain_of
from skjacobian.modules import CNN, MLP
from tests.seeds import seeded

DOUBLE = torch.float64
N_CLASSES = 4


def shared_layer():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, N_CLASSES))


NETS = {
    "relu": lambda: MLP(6, N_CLASSES, hidden_units=(7, 5)),
    "shallow": lambda: MLP(6, N_CLASSES, hidden_units=(7,)),
    "wide": lambda: MLP(6, N_CLASSES, hidden_units=(200, 3, 130)),
    "deep": lambda: MLP(6, N_CLASSES, hidden_units=(9,) * 5),
    "linear": lambda: nn.Sequential(nn.Linear(6, N_CLASSES)),
    "two linear": lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, N_CLASSES)),
    "leaky relu": lambda: nn.Sequential(
        nn.Linear(6, 7), nn.LeakyReLU(0.3), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, N_CLASSES)
    ),
    "some biases": lambda: nn.Sequential(
        nn.Linear(6, 7, bias=False), nn.ReLU(), nn.Linear(7, 5), nn.Linear(5, N_CLASSES, bias=False)
    ),
    "layers before the first dense one": lambda: nn.Sequential(
        nn.Flatten(), nn.ReLU(), nn.Identity(), nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, 4)
    ),
    "a shared layer": shared_layer,
    "dropout": lambda: MLP(6, N_CLASSES, hidden_units=(9, 8), dropout=0.4),
    "dropout of the samples": lambda: nn.Sequential(
        nn.Dropout(0.3), nn.Linear(6, 9), nn.Dropout(0.3), nn.ReLU(), nn.Linear(9, N_CLASSES)
    ),
}
NORMS = {
    "l2": {"norm": "l2"},
    "l1": {"norm": "l1"},
    "l21": {"norm": "l21"},
    "spectral": {"norm": "spectral"},
    "cross_lipschitz": {"norm": "cross_lipschitz"},
    "l2 by projections": {"norm": "l2", "n_projections": 2},
    "l21 by projections": {"norm": "l21", "n_projections": 1},
    "l2 by one class": {"norm": "l2", "class_samples": 1},
    "l1 by one class": {"norm": "l1", "class_samples": 1},
    "l1 by classes": {"norm": "l1", "class_samples": 3},
}
every_norm = pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)


def made(name, n):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, X = NETS[name]().double().train(), torch.randn(n, 6, dtype=DOUBLE)
    return net, X, torch.arange(n) % N_CLASSES


def jointly(net, X, y, index, **options):
    norm = JacobianNorm(**options)
    layers = chain_of(net)
    assert joint_pass_fits(layers, norm, len(X))
    return joint_pass(layers, X, index, norm, y if index is None else y[index], seeded(1))


def apart(net, X, y, index, **options):
    """The same by a forward pass and the Jacobian at the samples chosen, by autograd."""
    logits = net(X)
    places = torch.arange(len(X)) if index is None else torch.arange(len(X))[index]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if index is None:
            norms = jacobian_norm(
                net, X, y, engine="loop", generator=seeded(1), create_graph=True, **options
            )
        else:
            # With the masks of the whole batch, at the samples chosen.
            def chosen(Z):
                return net(X.index_copy(0, places, Z))[places]

            norms = jacobian_norm(
                chosen,
                X[places],
                y[places],
                engine="loop",
                generator=seeded(1),
                create_graph=True,
                **options,
            )
    return logits, torch.zeros(len(X), dtype=DOUBLE).index_copy(0, places, norms)


def outcome(function, net, *args, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        logits, norms = function(net, *args, **options)
    delta = torch.randn(logits.shape, generator=seeded(2), dtype=DOUBLE)
    weight = torch.randn(norms.shape, generator=seeded(3), dtype=DOUBLE)
    wanted = [p for p in net.parameters() if p.requires_grad]
    both = (delta * logits).sum() + weight @ norms
    gradients = torch.autograd.grad(both, wanted, materialize_grads=True, allow_unused=True)
    return logits.detach(), norms.detach(), gradients


def agree(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@every_norm
@pytest.mark.parametrize("index", [None, [4, 0, 2]], ids=repr)
@pytest.mark.parametrize("name", NETS)
def test_one_pass_gives_logits_norms_and_their_gradients(name, index, options):
    net, X, y = made(name, n=6)
    index = None if index is None else torch.tensor(index)
    agree(
        outcome(jointly, net, X, y, index, **options), outcome(apart, net, X, y, index, **options)
    )


@every_norm
@pytest.mark.parametrize("name", ["relu", "wide", "leaky relu"])
def test_so_it_does_for_large_batches(name, options):
    net, X, y = made(name, n=50)
    for index in (None, torch.arange(7, 47)):
        agree(
            outcome(jointly, net, X, y, index, **options),
            outcome(apart, net, X, y, index, **options),
        )


@pytest.mark.parametrize("options", [{}, {"class_samples": 1}], ids=repr)
@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("frozen", range(6))
def test_some_weights_and_biases_may_be_frozen(frozen, norm, options):
    net, X, y = made("relu", n=6)
    arguments = (net, X, y, torch.tensor([5, 2]))
    for i, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(i != frozen)
    agree(
        outcome(jointly, *arguments, norm=norm, **options),
        outcome(apart, *arguments, norm=norm, **options),
    )
    for i, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(i == frozen)
    agree(
        outcome(jointly, *arguments, norm=norm, **options),
        outcome(apart, *arguments, norm=norm, **options),
    )


@pytest.mark.parametrize("wanted", ["logits", "norms"])
def test_either_result_may_be_left_unused(wanted):
    net, X, y = made("relu", n=6)
    which = ("logits", "norms").index(wanted)

    def gradients(function):
        total = function(net, X, y, None, norm="l2")[which].sum()
        return torch.autograd.grad(
            total, list(net.parameters()), materialize_grads=True, allow_unused=True
        )

    agree(gradients(jointly), gradients(apart))


@every_norm
def test_samples_may_have_any_shape(options):
    net, X, y = made("relu", n=6)
    images = X.reshape(6, 2, 3)
    agree(
        outcome(jointly, net, images, y, None, **options),
        outcome(jointly, net, X, y, None, **options),
    )


def test_it_is_for_piecewise_linear_dense_networks_and_norms_of_the_logits():
    def fits(net, **options):
        layers = chain_of(net)
        return layers is not None and joint_pass_fits(layers, JacobianNorm(**options), 4)

    assert fits(MLP(6, 3))
    assert not fits(MLP(6, 3), output="loss")
    assert not fits(MLP(6, 3, activation="tanh"))
    assert not fits(CNN((1, 8, 8), 3))
    assert not fits(nn.Sequential(nn.Linear(6, 3), nn.ReLU()))
    assert not fits(nn.Sequential(nn.Flatten()))
    assert not fits(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval())
    with config_context(working_memory=1e-3):
        assert not fits(MLP(6, 3))


@every_norm
@pytest.mark.parametrize("name", ["relu", "leaky relu"])
def test_the_norms_may_be_scaled(name, options):
    net, X, y = made(name, n=6)
    layers, norm, index = chain_of(net), JacobianNorm(**options), torch.tensor([4, 0, 2])

    def scaled(scale):
        _, norms = joint_pass(layers, X, index, norm, y[index], seeded(1), scale)
        return norms, torch.autograd.grad(norms.sum(), list(net.parameters())[::2])

    norms, gradients = scaled(1.0)
    agree(scaled(2.5), (2.5 * norms, tuple(2.5 * gradient for gradient in gradients)))


def test_the_pass_of_relu_networks_is_written_out_where_no_trick_pays():
    def written_out(net, n_samples=2, shape=(6,), **options):
        norm = JacobianNorm(**{"norm": "l1", **options})
        return relu_pass_fits(chain_of(net), torch.zeros(2, *shape), norm, n_samples)

    assert written_out(MLP(6, 3))
    assert written_out(MLP(6, 3), norm="l21")
    assert written_out(MLP(6, 3), class_samples=2)
    assert written_out(MLP(6, 3, hidden_units=(9,)), shape=(2, 3))
    assert not written_out(nn.Sequential(nn.Linear(6, 3)))
    narrow = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 3))
    assert not written_out(narrow, shape=(2, 3))
    assert not written_out(MLP(6, 3), norm="spectral")
    assert not written_out(MLP(6, 3), n_projections=1)
    assert not written_out(MLP(6, 1))
    assert not written_out(MLP(6, 3, dropout=0.5))
    assert not written_out(nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, 3)))
    assert not written_out(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)))
    assert not written_out(nn.Sequential(nn.ReLU(), nn.Linear(6, 3)))
    wide = MLP(400, 3, hidden_units=(10,))
    assert written_out(wide, n_samples=600, class_samples=1)
    assert not written_out(wide, n_samples=600)
    assert written_out(wide, n_samples=4, norm="l2", class_samples=1)
    assert not written_out(wide, n_samples=600, norm="l2", class_samples=1)
    deep = MLP(6, 3, hidden_units=(200, 200))
    assert written_out(deep, n_samples=100, class_samples=1)
    assert not written_out(deep, n_samples=100)


@pytest.mark.parametrize("options", [{}, {"class_samples": 1}], ids=repr)
def test_a_second_backward_pass_gives_the_same(options):
    net, X, y = made("relu", n=6)
    logits, norms = jointly(net, X, y, torch.tensor([4, 1]), norm="l1", **options)
    total = logits.square().sum() + norms.sum()
    weights = list(net.parameters())
    first = torch.autograd.grad(total, weights, retain_graph=True)
    agree(first, torch.autograd.grad(total, weights))


@pytest.mark.parametrize("options", [{}, {"class_samples": 1}], ids=repr)
def test_a_weight_changed_before_the_backward_pass_is_an_error(options):
    net, X, y = made("relu", n=6)
    _, norms = jointly(net, X, y, torch.tensor([4, 1]), norm="l1", **options)
    with torch.no_grad():
        net[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        norms.sum().backward()


@pytest.mark.parametrize("options", [{}, {"class_samples": 1}], ids=repr)
def test_a_module_may_be_changed_between_two_passes(options):
    net, X, y = made("relu", n=6)
    outcome(jointly, net, X, y, None, norm="l1", **options)
    net[3] = nn.Linear(7, 5).double()
    net[4] = nn.LeakyReLU(0.3)
    net.insert(5, nn.Dropout(0.5))
    for mode in (True, False):
        net.train(mode)
        agree(
            outcome(jointly, net, X, y, None, norm="l1", **options),
            outcome(apart, net, X, y, None, norm="l1", **options),
        )
