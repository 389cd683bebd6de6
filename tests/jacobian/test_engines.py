import copy
import gc
import itertools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from skjacobian.attacks import PGD
from skjacobian.jacobian import JACOBIAN_NORMS, _chain, _cost, jacobian_norm
from skjacobian.jacobian._cost import gram_pays
from skjacobian.jacobian._stack import chain_of
from skjacobian.layers import ACTIVATIONS
from skjacobian.modules import CNN, MLP
from tests.seeds import seeded

N_CLASSES = 3
ENGINES = ("closed_form", "batched", "loop")
OPTIONS = {
    **{norm: {"norm": norm} for norm in JACOBIAN_NORMS},
    **{f"{norm} of the loss": {"norm": norm, "output": "loss"} for norm in ("l2", "l1")},
    "l2 by projections": {"norm": "l2", "n_projections": 2},
    "l21 by projections": {"norm": "l21", "n_projections": 2},
    "l2 by classes": {"norm": "l2", "class_samples": 2},
    "l1 by classes": {"norm": "l1", "class_samples": 1},
}
FEW_OPTIONS = {
    name: OPTIONS[name]
    for name in ("l2", "l1", "l21", "spectral", "l1 of the loss", "l1 by classes")
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
few_options = pytest.mark.parametrize("options", FEW_OPTIONS.values(), ids=FEW_OPTIONS)


def dense_net(make_activation=nn.Tanh, *between):
    return nn.Sequential(
        nn.Linear(5, 7),
        make_activation(),
        *between,
        nn.Linear(7, 6),
        make_activation(),
        nn.Linear(6, N_CLASSES),
    )


def head(shape, *layers, activation=nn.Tanh):
    """Layers on samples of a shape, then a dense layer on whatever they leave."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        n_flat = nn.Sequential(*layers).eval()(torch.zeros(2, *shape)).flatten(1).shape[1]
    return nn.Sequential(*layers, activation(), nn.Flatten(), nn.Linear(n_flat, N_CLASSES))


def of_shape(shape, *layers, **kwargs):
    return lambda: head(shape, *copy.deepcopy(layers), **kwargs), shape


def twice_the_same_layer():
    layer = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(5, 6), layer, nn.Tanh(), layer, nn.ELU(), nn.Linear(6, 3))


def tied_weights():
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
    net[4].weight = net[0].weight
    return net


IMAGE = (2, 6, 5)

NETS = {
    # dense
    "MLP": (lambda: MLP(5, N_CLASSES, hidden_units=(7, 6), activation="tanh"), (5,)),
    "relu MLP": (lambda: MLP(5, N_CLASSES, hidden_units=(7, 6)), (5,)),
    "relu MLP of images": (lambda: MLP(6, N_CLASSES, hidden_units=(7, 6)), (2, 3, 1)),
    "shallow MLP": (lambda: MLP(5, N_CLASSES, hidden_units=(7,), activation="gelu"), (5,)),
    "deep MLP": (lambda: MLP(5, N_CLASSES, hidden_units=(6,) * 5, activation="silu"), (5,)),
    "deep relu MLP": (lambda: MLP(5, N_CLASSES, hidden_units=(16,) * 5), (5,)),
    "narrow MLP": (lambda: MLP(40, N_CLASSES, hidden_units=(2, 2), activation="tanh"), (40,)),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, N_CLASSES)), (2, 3)),
    "two linear": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, N_CLASSES)), (5,)),
    "three linear": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, N_CLASSES)),
        (5,),
    ),
    "nn.Linear": (lambda: nn.Linear(5, N_CLASSES), (5,)),
    "no bias": (
        lambda: nn.Sequential(
            nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, N_CLASSES, bias=False)
        ),
        (5,),
    ),
    "nested": (
        lambda: nn.Sequential(
            nn.Identity(),
            nn.Sequential(nn.Sequential(nn.Linear(5, 6)), nn.Sequential(), nn.Tanh()),
            MLP(6, 7, hidden_units=(4,)),
            nn.Sequential(nn.Identity(), nn.Sigmoid(), nn.Linear(7, N_CLASSES)),
        ),
        (5,),
    ),
    "the same layer twice": (twice_the_same_layer, (5,)),
    "tied weights": (tied_weights, (5,)),
    "dense layer along the last axis": of_shape((4, 5), nn.Linear(5, 3)),
    "dense layers along the last axis": of_shape(
        (2, 4, 5), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)
    ),
    "flattened and unflattened": of_shape(
        (2, 6),
        *(nn.Flatten(), nn.Unflatten(1, (3, 4)), nn.Linear(4, 4), nn.Flatten()),
        *(nn.Unflatten(1, (2, 2, 3)), nn.Conv2d(2, 2, 2)),
    ),
    # the last layer is another
    "ends in tanh": (lambda: nn.Sequential(nn.Linear(5, N_CLASSES), nn.Tanh()), (5,)),
    "ends in relu": (lambda: nn.Sequential(nn.Linear(5, N_CLASSES), nn.ReLU()), (5,)),
    "ends in batch norm": (
        lambda: nn.Sequential(nn.Linear(5, N_CLASSES), nn.ELU(), nn.BatchNorm1d(N_CLASSES)),
        (5,),
    ),
    "ends in convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, (4, 3)), nn.Flatten()),
        IMAGE,
    ),
    "ends in max pooling": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.MaxPool2d((5, 4)), nn.Flatten()),
        IMAGE,
    ),
    "ends in average pooling": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.AvgPool2d((5, 4)), nn.Flatten()),
        IMAGE,
    ),
    "ends in identity": (lambda: nn.Sequential(nn.Linear(5, N_CLASSES), nn.Identity()), (5,)),
    # convolutions
    "CNN": (
        lambda: CNN((2, 8, 8), N_CLASSES, channels=(3, 4), hidden_units=(5,), kernel_size=3),
        (2, 8, 8),
    ),
    "smooth CNN": (
        lambda: CNN((7, 6), N_CLASSES, channels=(3,), hidden_units=(), activation="tanh"),
        (7, 6),
    ),
    "CNN of flat images": (
        lambda: CNN((36,), N_CLASSES, image_shape=(6, 6), channels=(3,), hidden_units=(5,)),
        (36,),
    ),
    "conv1d": of_shape((2, 9), nn.Conv1d(2, 3, 3)),
    "conv1d, all settings": of_shape(
        (4, 12), nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=False)
    ),
    "conv1d, same": of_shape((2, 9), nn.Conv1d(2, 3, 5, padding="same", dilation=2)),
    "conv2d": of_shape(IMAGE, nn.Conv2d(2, 3, 3)),
    "conv2d, kernel 1": of_shape(IMAGE, nn.Conv2d(2, 3, 1)),
    "conv2d, stride 2": of_shape(IMAGE, nn.Conv2d(2, 3, 3, stride=2)),
    "conv2d, stride 2 and padding": of_shape((2, 7, 6), nn.Conv2d(2, 3, 3, stride=2, padding=1)),
    "conv2d, stride 3, columns unused": of_shape(IMAGE, nn.Conv2d(2, 3, 2, stride=3)),
    "conv2d, stride of one axis": of_shape(IMAGE, nn.Conv2d(2, 3, 3, stride=(1, 2), padding=1)),
    "conv2d, dilation 2": of_shape(IMAGE, nn.Conv2d(2, 3, 2, dilation=2)),
    "conv2d, two dilations": of_shape(IMAGE, nn.Conv2d(2, 3, (2, 3), dilation=(3, 2))),
    "conv2d, groups": of_shape((4, 5, 5), nn.Conv2d(4, 6, 3, groups=2)),
    "conv2d, depthwise": of_shape((4, 5, 5), nn.Conv2d(4, 8, 3, groups=4, stride=2, padding=1)),
    "conv2d, same": of_shape(IMAGE, nn.Conv2d(2, 3, (3, 5), padding="same")),
    "conv2d, same, even kernel, dilation 2": of_shape(
        IMAGE, nn.Conv2d(2, 3, 2, padding="same", dilation=2)
    ),
    "conv2d, valid": of_shape(IMAGE, nn.Conv2d(2, 3, (3, 2), padding="valid")),
    "conv2d, even kernel": of_shape(IMAGE, nn.Conv2d(2, 3, (4, 2), padding=1)),
    "conv2d, rectangular padding": of_shape(IMAGE, nn.Conv2d(2, 3, 3, padding=(2, 0))),
    "conv2d, padding beyond the kernel": of_shape(IMAGE, nn.Conv2d(2, 3, 2, padding=3)),
    "conv2d, kernel larger than the image": of_shape(IMAGE, nn.Conv2d(2, 3, 7, padding=2)),
    "conv2d, many channels from few": of_shape((1, 7, 6), nn.Conv2d(1, 16, (3, 2), padding=1)),
    "conv2d, many channels, rectangular": of_shape(
        (2, 5, 6), nn.Conv2d(2, 24, (2, 5), padding=(0, 2))
    ),
    "conv3d": of_shape((2, 4, 3, 4), nn.Conv3d(2, 3, 2)),
    "conv3d, all settings": of_shape(
        (2, 5, 4, 5),
        nn.Conv3d(2, 4, (2, 3, 2), stride=(2, 1, 2), padding=1, dilation=(2, 1, 1), groups=2),
    ),
    "conv3d, same": of_shape((1, 3, 4, 3), nn.Conv3d(1, 2, 3, padding="same")),
    "deep convolutions": of_shape(
        IMAGE,
        *(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1, stride=2)),
        *(nn.SiLU(), nn.Conv2d(4, 2, 2)),
    ),
    # batch normalization
    "batch norm": (
        lambda: nn.Sequential(
            nn.BatchNorm1d(5), nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)
        ),
        (5,),
    ),
    "batch norm 1d of sequences": of_shape((3, 6), nn.BatchNorm1d(3), nn.Conv1d(3, 2, 3)),
    "batch norm 2d": of_shape(IMAGE, nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)),
    "batch norm 2d first": of_shape(IMAGE, nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3)),
    "batch norm 3d": of_shape((2, 4, 3, 4), nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)),
    "batch norm without affine": of_shape(
        IMAGE, nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False, eps=0.1)
    ),
    # pooling
    "max pooling without channels": of_shape((6, 4), nn.ReLU(), nn.MaxPool2d(2)),
    "max pooling": of_shape((2, 6, 4), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    "max pooling that leaves a rest": of_shape(
        (2, 7, 5), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    ),
    "max pooling by rectangles": of_shape(
        (2, 6, 7), nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d((2, 3))
    ),
    "max pooling along one axis": of_shape(
        (2, 6, 7), nn.Conv2d(2, 3, 3), nn.SiLU(), nn.MaxPool2d((1, 2), stride=(1, 2))
    ),
    "max pooling without activation": of_shape(
        IMAGE, nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(2), activation=nn.Identity
    ),
    "max pooling before the activation": of_shape(
        IMAGE, nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(2), activation=nn.ReLU
    ),
    "max pooling of the samples": of_shape((2, 6, 4), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2)),
    "max pooling twice": of_shape(
        (2, 8, 8), nn.Tanh(), nn.MaxPool2d(2), nn.MaxPool2d(2), activation=nn.Identity
    ),
    "max pooling, identity between": of_shape(
        IMAGE, nn.Conv2d(2, 3, 3), nn.GELU(), nn.Identity(), nn.MaxPool2d(2)
    ),
    "max pooling behind batch norm": of_shape(
        IMAGE, nn.Conv2d(2, 3, 3), nn.Tanh(), nn.BatchNorm2d(3), nn.MaxPool2d(2)
    ),
    "max pooling of single pixels": of_shape(IMAGE, nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d(1)),
    "average pooling": of_shape((2, 6, 4), nn.Conv2d(2, 3, 3, padding=1), nn.AvgPool2d(2)),
    "average pooling that leaves a rest": of_shape(
        (2, 7, 5), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d((3, 2))
    ),
    "average pooling of the samples": of_shape(IMAGE, nn.AvgPool2d(2), nn.Conv2d(2, 3, 2)),
    "both poolings": of_shape(
        (2, 12, 13), nn.Conv2d(2, 3, 3), nn.ELU(), nn.MaxPool2d(2), nn.AvgPool2d((2, 1))
    ),
}
for kind in ACTIVATIONS:
    NETS[f"{kind.__name__} MLP"] = (lambda kind=kind: dense_net(kind), (5,))
    NETS[f"{kind.__name__} CNN"] = of_shape(
        IMAGE, nn.Conv2d(2, 3, 3, padding=1), kind(), nn.MaxPool2d(2), activation=kind
    )
for name, activation in {
    "PReLU for each unit": nn.PReLU(7),
    "LeakyReLU turned": nn.LeakyReLU(-0.5),
    "ELU, alpha": nn.ELU(0.3),
    "CELU, alpha": nn.CELU(2.0),
    "Softplus, beta and threshold": nn.Softplus(beta=3.0, threshold=1.0),
    "GELU, tanh": nn.GELU(approximate="tanh"),
}.items():
    NETS[name] = (
        lambda a=activation: nn.Sequential(nn.Linear(5, 7), copy.deepcopy(a), nn.Linear(7, 3)),
        (5,),
    )
NETS["PReLU for each channel"] = of_shape(IMAGE, nn.Conv2d(2, 3, 2), nn.PReLU(3), nn.MaxPool2d(2))
NETS["PReLU of the samples"] = of_shape((2, 5), nn.PReLU(2))


def randomize(net):
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.6)
    return net


def made(make_net, shape, n=4, seed=0, dtype=torch.float64):
    """Return a net in eval mode with batch statistics of its own, samples and labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = randomize(make_net().double()).eval()
        X = torch.randn(n, *shape, dtype=torch.float64)
        with torch.no_grad():
            n_classes = net(X).shape[1]
    return net.to(dtype), X.to(dtype), torch.arange(n) % n_classes


def norms_and_gradients(net, X, y, **options):
    """Norms, and the gradients by all parameters of their sum with unequal weights."""
    norms = jacobian_norm(net, X, y, create_graph=True, generator=seeded(3), **options)
    weights = torch.linspace(0.5, 2.0, len(X), dtype=X.dtype, device=X.device)
    gradients = torch.autograd.grad(
        weights @ norms, list(net.parameters()), materialize_grads=True, allow_unused=True
    )
    return norms.detach(), gradients


def agree(one, other, **tolerance):
    torch.testing.assert_close(one, other, **({"rtol": 1e-9, "atol": 1e-10} | tolerance))


def check_that_engines_agree(name, options):
    net, X, y = made(*NETS[name])
    assert chain_of(net) is not None
    expected = norms_and_gradients(net, X, y, engine="loop", **options)
    assert expected[0].min() >= 0
    for engine in ("closed_form", "batched"):
        agree(norms_and_gradients(net, X, y, engine=engine, **options), expected)


def on_net(i, name, j, option):
    """Of each net one half of the options is tried in every suite, of the next net the other."""
    marks = pytest.mark.slow if (i + j) % 2 else ()
    return pytest.param(name, FEW_OPTIONS[option], marks=marks, id=f"{name}-{option}")


ON_ALL_NETS = [
    on_net(i, name, j, option)
    for (i, name), (j, option) in itertools.product(enumerate(NETS), enumerate(FEW_OPTIONS))
]


@pytest.mark.parametrize(("name", "options"), ON_ALL_NETS)
def test_engines_agree_on_norms_and_gradients(name, options):
    check_that_engines_agree(name, options)


@every_option
@pytest.mark.parametrize(
    "name",
    [
        *("MLP", "relu MLP", "deep relu MLP", "linear", "nn.Linear", "ends in tanh", "batch norm"),
        *("ends in convolution", "ends in max pooling", "CNN", "smooth CNN", "batch norm 2d"),
        *("conv1d", "conv3d", "both poolings", "nested", "tied weights", "PReLU for each unit"),
    ],
)
def test_engines_agree_on_every_norm(name, options):
    check_that_engines_agree(name, options)


@every_option
@pytest.mark.parametrize("engine", ["closed_form", "batched", "loop"])
@pytest.mark.parametrize("name", ["MLP", "relu MLP", "CNN", "smooth CNN", "batch norm 2d"])
def test_norms_are_the_same_without_a_graph(name, engine, options):
    net, X, y = made(*NETS[name])
    options = {"engine": engine, **options}
    expected = jacobian_norm(net, X, y, create_graph=True, generator=seeded(), **options)
    computed = jacobian_norm(net, X, y, generator=seeded(), **options)
    agree(computed, expected.detach(), rtol=1e-12, atol=1e-12)


@few_options
@pytest.mark.parametrize("name", ["relu MLP", "deep MLP", "CNN", "both poolings", "batch norm 2d"])
def test_engines_agree_in_single_precision(name, options):
    net, X, y = made(*NETS[name], dtype=torch.float32)
    expected = norms_and_gradients(net, X, y, engine="loop", **options)
    computed = norms_and_gradients(net, X, y, engine="closed_form", **options)
    assert computed[0].dtype == torch.float32
    agree(computed, expected, rtol=1e-3, atol=1e-4)


# --- wide networks and large batches take other products ---------------------------------

WIDE = {
    "relu": lambda: MLP(600, 4, hidden_units=(160,)),
    "tanh": lambda: MLP(600, 4, hidden_units=(160,), activation="tanh"),
    "two relu layers": lambda: MLP(600, 4, hidden_units=(160, 30)),
    "two tanh layers": lambda: MLP(600, 4, hidden_units=(160, 30), activation="tanh"),
    "dropout": lambda: nn.Sequential(
        nn.Linear(600, 160), nn.Dropout(0.5), nn.Linear(160, 30), nn.ReLU(), nn.Linear(30, 4)
    ),
    "linear": lambda: nn.Sequential(nn.Linear(600, 160), nn.Linear(160, 4)),
    "images first": lambda: nn.Sequential(
        nn.Flatten(), nn.Unflatten(1, (600,)), nn.Linear(600, 161), nn.ReLU(), nn.Linear(161, 4)
    ),
}


@few_options
@pytest.mark.parametrize("n", [8, 42])
@pytest.mark.parametrize("name", WIDE)
def test_engines_agree_on_wide_networks(name, n, options):
    net, X, y = made(WIDE[name], (600,), n)
    # The batch of 42 takes the Gram form and masks products, that of 8 does not.
    assert gram_pays(n * 4, 160, 600) == (n == 42)
    expected = norms_and_gradients(net, X, y, engine="loop", **options)
    computed = norms_and_gradients(net, X, y, engine="closed_form", **options)
    agree(computed, expected)


@few_options
@pytest.mark.parametrize("numbers_in_block", [2**17, 40])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "name", ["relu MLP", "deep relu MLP", "MLP", "narrow MLP", "linear", "two linear", "CNN"]
)
def test_engines_agree_on_large_batches(name, masked, numbers_in_block, options, monkeypatch):
    monkeypatch.setattr(_chain, "masked_product_pays", lambda n_samples, W: masked)
    monkeypatch.setattr(_cost, "NUMBERS_IN_BLOCK", numbers_in_block)
    net, X, y = made(*NETS[name], n=33)
    expected = norms_and_gradients(net, X, y, engine="loop", **options)
    agree(norms_and_gradients(net, X, y, engine="closed_form", **options), expected)


@few_options
@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("n", [4, 42])
def test_some_weights_may_be_frozen(n, frozen, options):
    net, X, y = made(WIDE["two relu layers"], (600,), n)
    for i, layer in enumerate(m for m in net.modules() if isinstance(m, nn.Linear)):
        layer.weight.requires_grad_(i != frozen)

    def gradients(engine):
        norms = jacobian_norm(
            net, X, y, create_graph=True, generator=seeded(), engine=engine, **options
        )
        weights = [p for p in net.parameters() if p.requires_grad]
        return torch.autograd.grad(norms.sum(), weights, materialize_grads=True)

    agree(gradients("closed_form"), gradients("loop"))


# --- dropout -----------------------------------------------------------------------------

DROPOUT_NETS = {
    "dropout": (lambda: MLP(5, N_CLASSES, hidden_units=(9, 8), dropout=0.4), (5,)),
    "smooth": (
        lambda: MLP(5, N_CLASSES, hidden_units=(9,), activation="tanh", dropout=0.4),
        (5,),
    ),
    "dropout of the samples": (lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(5, 3)), (5,)),
    "dropout of the logits": (lambda: nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.3)), (5,)),
    "dropout behind the weights": (
        lambda: nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.3), nn.Linear(9, 3)),
        (5,),
    ),
    "in place": (
        lambda: nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.3, inplace=True), nn.Linear(9, 3)),
        (5,),
    ),
    "nothing dropped": (lambda: MLP(5, N_CLASSES, dropout=1e-12, hidden_units=(6,)), (5,)),
    "p=0": (lambda: nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.0), nn.Linear(9, 3)), (5,)),
    "all dropped": (lambda: nn.Sequential(nn.Linear(5, 9), nn.Dropout(1.0), nn.Linear(9, 3)), (5,)),
    "dropout of channels, 1d": of_shape((3, 8), nn.Conv1d(3, 6, 2), nn.Dropout1d(0.5)),
    "dropout of channels, 2d": of_shape(IMAGE, nn.Conv2d(2, 6, 2), nn.Dropout2d(0.5)),
    "dropout of channels, 3d": of_shape((2, 3, 4, 3), nn.Conv3d(2, 6, 2), nn.Dropout3d(0.5)),
    "dropout before pooling": of_shape(
        IMAGE, nn.Conv2d(2, 6, 2), nn.Tanh(), nn.Dropout(0.5), nn.MaxPool2d(2)
    ),
    "dropout behind pooling": of_shape(
        IMAGE, nn.Conv2d(2, 6, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Dropout(0.5)
    ),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Tanh(), nn.Linear(9, 3)
        ),
        (5,),
    ),
}


@few_options
@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.parametrize("name", DROPOUT_NETS)
def test_engines_draw_the_same_dropout_masks(name, n, options):
    net, X, y = made(*DROPOUT_NETS[name], n)
    net.train()
    results = []
    for engine in ENGINES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            results.append(norms_and_gradients(net, X, y, engine=engine, **options))
    agree(results[0], results[2])
    agree(results[1], results[2])


@pytest.mark.parametrize("name", DROPOUT_NETS)
def test_engines_draw_as_many_random_numbers_as_the_model(name):
    net, X, y = made(*DROPOUT_NETS[name])
    net.train()
    states = []
    for run in (net, *(lambda X, e=e: jacobian_norm(net, X, y, engine=e) for e in ENGINES)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            run(X)
            states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


# --- samples and weights of all kinds ----------------------------------------------------


@few_options
@pytest.mark.parametrize("name", ["MLP", "relu MLP", "CNN", "both poolings", "ReLU CNN"])
def test_engines_agree_where_activations_have_kinks_and_maxima_ties(name, options):
    net, X, y = made(*NETS[name])
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if key.endswith("bias"):
                parameter.zero_()
    for samples in (torch.zeros_like(X), torch.ones_like(X), X.round()):
        expected = norms_and_gradients(net, samples, y, engine="loop", **options)
        computed = norms_and_gradients(net, samples, y, engine="closed_form", **options)
        assert all(torch.isfinite(gradient).all() for gradient in computed[1])
        if options["norm"] != "spectral":  # of equal singular values either may be taken
            agree(computed, expected)
        else:
            agree(computed[0], expected[0])


@few_options
@pytest.mark.parametrize("name", ["CNN", "conv2d, all", "both poolings", "batch norm 2d"])
def test_channels_may_come_last_in_memory(name, options):
    net, X, y = made(*NETS.get(name, NETS["conv2d, groups"]))
    expected = norms_and_gradients(net, X, y, engine="closed_form", **options)
    net, X = net.to(memory_format=torch.channels_last), X.to(memory_format=torch.channels_last)
    agree(norms_and_gradients(net, X, y, engine="closed_form", **options), expected)


@few_options
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["relu MLP of images", "CNN", "both poolings"])
def test_samples_need_not_be_contiguous(name, engine, options):
    net, X, y = made(*NETS[name])
    strided = torch.stack([X, X], -1)[..., 0]
    assert not strided.is_contiguous()
    repeated = X[:1].expand_as(X)
    options = {"engine": engine, **options}
    agree(
        norms_and_gradients(net, strided, y, **options), norms_and_gradients(net, X, y, **options)
    )
    expected = norms_and_gradients(net, repeated.clone(), y, **options)
    agree(norms_and_gradients(net, repeated, y, **options), expected)


@every_option
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["MLP", "relu MLP", "smooth CNN", "ends in tanh", "nn.Linear"])
def test_the_gradient_can_be_taken_twice(name, engine, options):
    net, X, y = made(*NETS[name])
    norms = jacobian_norm(net, X, y, create_graph=True, engine=engine, **options)
    weights = [p for p in net.parameters() if p.ndim > 1]
    first = torch.autograd.grad(norms.sum(), weights, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(norms.sum(), weights, retain_graph=True)
    torch.testing.assert_close(second, tuple(kept), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(first, tuple(kept), rtol=0, atol=0)


@pytest.fixture
def new_tensors():
    """A function that counts the tensors made since and alive."""
    gc.collect()
    gc.freeze()
    yield lambda: sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    gc.unfreeze()
    gc.enable()


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_memory_is_held_when_the_norms_are_gone(engine, backward, new_tensors):
    net, X, y = made(*NETS["relu MLP"])

    def run():
        norms = jacobian_norm(net, X, y, create_graph=True, engine=engine)
        if backward:
            torch.autograd.grad(norms.sum(), list(net.parameters()), allow_unused=True)

    run()
    gc.collect()
    before = new_tensors()
    run()
    gc.collect()
    assert new_tensors() == before
    # Nor is there anything that had to wait for the garbage collector.
    gc.disable()
    run()
    assert new_tensors() == before


@pytest.mark.parametrize("engine", ["auto", "closed_form", "batched", "loop"])
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(), 3.0),
        (nn.Identity(), 3.0),
        (nn.Sequential(nn.Flatten(), nn.Identity()), 3.0),
        (nn.Tanh(), 3.0),
        (nn.ReLU(), 0.0),
    ],
    ids=repr,
)
def test_a_model_may_have_no_weights(model, expected, engine):
    X = torch.zeros(2, 3, dtype=torch.float64)
    norms = jacobian_norm(model, X, engine=engine)
    torch.testing.assert_close(norms, torch.full((2,), expected, dtype=torch.float64))
    total = jacobian_norm(model, X, engine=engine, create_graph=True).sum()
    assert total.item() == 2 * expected


# --- relu in place -----------------------------------------------------------------------


@every_option
def test_relu_in_place_makes_no_difference(options):
    plain, X, y = made(lambda: dense_net(nn.ReLU), (5,))
    in_place = copy.deepcopy(plain)
    for layer in in_place:
        if isinstance(layer, nn.ReLU):
            layer.inplace = True
    assert chain_of(in_place) is not None
    expected = norms_and_gradients(plain, X, y, engine="loop", **options)
    clean, weights = X.clone(), copy.deepcopy(in_place.state_dict())
    for engine in ("auto", *ENGINES):
        agree(norms_and_gradients(in_place, X, y, engine=engine, **options), expected)
    assert torch.equal(X, clean)
    assert all(torch.equal(v, weights[k]) for k, v in in_place.state_dict().items())


def test_relu_in_place_leaves_the_samples_alone():
    net, X, _ = made(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 3)), (5,))
    clean = X.clone()
    norms = jacobian_norm(net, X)
    assert torch.equal(X, clean)
    expected = (net[1].weight.detach() * (X > 0).unsqueeze(1)).square().sum((1, 2))
    agree(norms, expected)


# --- models without a closed form --------------------------------------------------------


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = dense_net()

    def forward(self, X):
        return self.net(X) + self.net(2 * X)


class CustomSequential(nn.Sequential):
    def forward(self, X):
        return super().forward(X) * X.sum(1, keepdim=True)


class CustomLinear(nn.Linear):
    def forward(self, X):
        return super().forward(X) ** 2


class SameLinear(nn.Linear):
    pass


def with_(change, make_net=dense_net):
    def make_changed():
        net = make_net()
        change(net)
        return net

    return make_changed


def replace_forward(module):
    forward = module.forward
    module.forward = lambda X: forward(X).sin()


def triple_output(module, inputs, output):
    return 3 * output


def triple_input(module, inputs):
    return (3 * inputs[0],)


WITHOUT_CLOSED_FORM = {
    "custom module": (Custom, (5,)),
    "custom module inside": (lambda: nn.Sequential(Custom(), nn.Linear(3, 3)), (5,)),
    "subclass of nn.Sequential": (lambda: CustomSequential(*dense_net()), (5,)),
    "subclass of nn.Sequential inside": (
        lambda: nn.Sequential(CustomSequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 3)),
        (5,),
    ),
    "subclass of nn.Linear": (lambda: nn.Sequential(CustomLinear(5, 4), nn.Linear(4, 3)), (5,)),
    "trivial subclass of nn.Linear": (lambda: SameLinear(5, 3), (5,)),
    "forward of the model replaced": (with_(replace_forward), (5,)),
    "forward of a layer replaced": (with_(lambda net: replace_forward(net[1])), (5,)),
    "forward hook": (with_(lambda net: net.register_forward_hook(triple_output)), (5,)),
    "forward hook of a layer": (
        with_(lambda net: net[2].register_forward_hook(triple_output)),
        (5,),
    ),
    "forward hook of a part": (
        with_(
            lambda net: net[0].register_forward_hook(triple_output),
            lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)),
        ),
        (5,),
    ),
    "forward pre-hook": (with_(lambda net: net.register_forward_pre_hook(triple_input)), (5,)),
    "forward pre-hook of a layer": (
        with_(lambda net: net[4].register_forward_pre_hook(triple_input)),
        (5,),
    ),
    "backward hook of a layer": (
        with_(
            lambda net: net[2].register_full_backward_hook(lambda m, g_in, g_out: (2 * g_in[0],))
        ),
        (5,),
    ),
    "backward pre-hook of a layer": (
        with_(lambda net: net[2].register_full_backward_pre_hook(lambda m, g: (2 * g[0],))),
        (5,),
    ),
    "spectral norm": (
        with_(lambda net: parametrizations.spectral_norm(net[0])),
        (5,),
    ),
    "weight norm": (with_(lambda net: parametrizations.weight_norm(net[2])), (5,)),
    "orthogonal": (with_(lambda net: parametrizations.orthogonal(net[2])), (5,)),
    "old spectral norm": (with_(lambda net: nn.utils.spectral_norm(net[0])), (5,)),
    "layer norm": (lambda: dense_net(nn.Tanh, nn.LayerNorm(7)), (5,)),
    "softmax": (lambda: dense_net(nn.Tanh, nn.Softmax(1)), (5,)),
    "in-place leaky relu": (lambda: dense_net(lambda: nn.LeakyReLU(0.2, inplace=True)), (5,)),
    "in-place elu": (lambda: dense_net(lambda: nn.ELU(inplace=True)), (5,)),
    "in-place silu": (lambda: dense_net(lambda: nn.SiLU(inplace=True)), (5,)),
    "overlapping max pooling": of_shape((2, 7, 7), nn.Conv2d(2, 3, 2), nn.MaxPool2d(3, stride=2)),
    "overlapping average pooling": of_shape((2, 7, 7), nn.Conv2d(2, 3, 2), nn.AvgPool2d(3, 2)),
    "max pooling with gaps": of_shape((2, 7, 7), nn.Conv2d(2, 3, 2), nn.MaxPool2d(2, stride=3)),
    "max pooling, dilated": of_shape((2, 8, 8), nn.MaxPool2d(2, dilation=2)),
    "max pooling, padded": of_shape((2, 7, 7), nn.Conv2d(2, 3, 2), nn.MaxPool2d(2, padding=1)),
    "average pooling, padded": of_shape((2, 7, 7), nn.AvgPool2d(2, padding=1)),
    "average pooling, other divisor": of_shape((2, 6, 6), nn.AvgPool2d(2, divisor_override=3)),
    "max pooling, ceil mode": of_shape((2, 7, 7), nn.MaxPool2d(2, ceil_mode=True)),
    "average pooling, ceil mode": of_shape((2, 7, 7), nn.AvgPool2d(2, ceil_mode=True)),
    "circular padding": of_shape(IMAGE, nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")),
    "reflected padding": of_shape(IMAGE, nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")),
    "transposed convolution": of_shape(IMAGE, nn.ConvTranspose2d(2, 3, 3)),
    "one-dimensional pooling": of_shape((2, 8), nn.MaxPool1d(2)),
    "flattening in part": of_shape((2, 3, 4), nn.Flatten(2), nn.Linear(12, 3)),
    "flattening from the middle": of_shape((2, 3, 4), nn.Flatten(1, 2), nn.Linear(4, 3)),
    "unflattening from the end": of_shape((12,), nn.Unflatten(-1, (3, 4)), nn.Linear(4, 3)),
}
NO_CLOSED_FORM = (
    "Got engine='closed_form', but expected 'auto', 'batched' or 'loop' for this model: it is not "
    "an nn.Sequential of layers that have a closed form."
)


@few_options
@pytest.mark.filterwarnings("ignore:.*nn.utils.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("name", WITHOUT_CLOSED_FORM)
def test_models_without_a_closed_form_go_through_autograd(name, options):
    net, X, y = made(*WITHOUT_CLOSED_FORM[name])
    expected = norms_and_gradients(net, X, y, engine="loop", **options)
    agree(norms_and_gradients(net, X, y, **options), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*nn.utils.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("name", WITHOUT_CLOSED_FORM)
def test_models_without_a_closed_form_are_told_so(name):
    net, X, _ = made(*WITHOUT_CLOSED_FORM[name])
    assert chain_of(net) is None
    with pytest.raises(ValueError, match="^" + re.escape(NO_CLOSED_FORM) + "$"):
        jacobian_norm(net, X, engine="closed_form")


@pytest.mark.parametrize("make_pooling", [nn.MaxPool2d, nn.AvgPool2d])
def test_images_without_channels_may_be_pooled(make_pooling):
    net, X, y = made(lambda: head((4, 6), make_pooling(2), nn.Flatten()), (4, 6))
    agree(norms_and_gradients(net, X, y), norms_and_gradients(net, X, y, engine="loop"))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_same_padding_that_differs_between_sides_has_no_closed_form():
    net, X, y = made(*of_shape(IMAGE, nn.Conv2d(2, 3, 2, padding="same")))
    assert chain_of(net) is None
    agree(norms_and_gradients(net, X, y), norms_and_gradients(net, X, y, engine="loop"))


@pytest.mark.parametrize("register", ["forward", "forward_pre", "full_backward"])
def test_hooks_of_all_modules_are_heeded(register):
    net, X, y = made(*NETS["MLP"])
    modules = torch.nn.modules.module
    hook = {
        "forward": triple_output,
        "forward_pre": triple_input,
        "full_backward": lambda m, g_in, g_out: (2 * g_in[0],),
    }[register]
    name = f"register_module_{register}_hook"
    handle = getattr(modules, name)(
        lambda module, *rest: hook(module, *rest) if isinstance(module, nn.Tanh) else None
    )
    try:
        assert chain_of(net) is None
        agree(norms_and_gradients(net, X, y), norms_and_gradients(net, X, y, engine="loop"))
    finally:
        handle.remove()


def test_batch_normalization_in_training_mode_has_no_closed_form_until_it_is_in_eval_mode():
    net, X, y = made(*NETS["batch norm"])
    in_eval_mode = norms_and_gradients(net, X, y, engine="closed_form")
    net.train()
    assert chain_of(net) is None
    agree(norms_and_gradients(net, X, y, engine="closed_form"), in_eval_mode)


def test_autocast_has_no_closed_form():
    net, X, _ = made(*NETS["MLP"], dtype=torch.float32)
    assert chain_of(net) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chain_of(net) is None
        with pytest.raises(ValueError, match=re.escape(NO_CLOSED_FORM)):
            jacobian_norm(net, X, engine="closed_form")
        computed = jacobian_norm(net, X)
        expected = jacobian_norm(net, X, engine="loop")
    agree(computed.float(), expected.float(), rtol=1e-2, atol=1e-2)
    exact = jacobian_norm(net, X)
    agree(computed.float(), exact, rtol=0.05, atol=0.05)
    assert chain_of(net) is not None


@every_option
@pytest.mark.parametrize("name", ["MLP", "relu MLP", "CNN"])
def test_functions_go_through_autograd(name, options):
    net, X, y = made(*NETS[name])
    expected = norms_and_gradients(net, X, y, engine="loop", **options)

    def function(X):
        return net(X)

    assert chain_of(function) is None
    for engine in ("auto", "batched", "loop"):
        norms = jacobian_norm(
            function, X, y, create_graph=True, generator=seeded(3), engine=engine, **options
        )
        weights = torch.linspace(0.5, 2.0, len(X), dtype=X.dtype)
        gradients = torch.autograd.grad(
            weights @ norms, list(net.parameters()), materialize_grads=True
        )
        agree((norms.detach(), gradients), expected)
        plain = jacobian_norm(function, X, y, generator=seeded(3), engine=engine, **options)
        agree(plain, expected[0])
    with pytest.raises(ValueError, match=re.escape(NO_CLOSED_FORM)):
        jacobian_norm(function, X, y, engine="closed_form", **options)


OTHER_LAYERS = {
    "group norm": of_shape((4, 3, 3), nn.GroupNorm(2, 4)),
    "instance norm": of_shape((4, 3, 3), nn.InstanceNorm2d(4)),
    "local response norm": of_shape((4, 3, 3), nn.LocalResponseNorm(3)),
    "rms norm": of_shape((5,), nn.RMSNorm(5)),
    "one-dimensional poolings": of_shape((2, 8), nn.MaxPool1d(2), nn.AvgPool1d(2)),
    "three-dimensional pooling": of_shape((2, 4, 4, 4), nn.MaxPool3d(2)),
    "overlapping max pooling": of_shape((2, 7, 7), nn.MaxPool2d(3, stride=2)),
    "adaptive poolings": of_shape((2, 7, 7), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(2)),
    "upsampling": of_shape((2, 3, 3), nn.Upsample(scale_factor=2, mode="bilinear")),
    "pixel shuffle": of_shape((4, 3, 3), nn.PixelShuffle(2)),
    "zero padding": of_shape((2, 3, 3), nn.ZeroPad2d(1), nn.ReflectionPad2d(1)),
    "unfolding": of_shape((2, 3, 3), nn.Unfold(2)),
    "softmax": of_shape((5,), nn.Linear(5, 4), nn.Softmax(1)),
    "log softmax": of_shape((5,), nn.Linear(5, 4), nn.LogSoftmax(1)),
    "gated": of_shape((6,), nn.Linear(6, 8), nn.GLU()),
    "hard activations": of_shape(
        (6,), nn.Hardtanh(), nn.Linear(6, 6), nn.Hardswish(), nn.Linear(6, 6), nn.ReLU6()
    ),
    "shrinking activations": of_shape((6,), nn.Softshrink(0.1), nn.Linear(6, 6), nn.Tanhshrink()),
    "randomized relu": of_shape((6,), nn.Linear(6, 6), nn.RReLU()),
}


@pytest.mark.parametrize("norm", ["l2", "spectral"])
@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_auto_works_for_the_other_layers_of_torch(name, norm):
    net, X, y = made(*OTHER_LAYERS[name])
    expected = norms_and_gradients(net, X, y, norm=norm, engine="loop")
    agree(norms_and_gradients(net, X, y, norm=norm), expected)


class Recurrent(nn.Module):
    def __init__(self, make_cells):
        super().__init__()
        self.cells = make_cells(4, 6, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, X):
        return self.out(self.cells(X)[0][:, -1])


@pytest.mark.parametrize("make_cells", [nn.RNN, nn.GRU, nn.LSTM])
def test_auto_works_for_recurrent_networks(make_cells):
    net, X, y = made(lambda: Recurrent(make_cells), (3, 4))
    agree(norms_and_gradients(net, X, y), norms_and_gradients(net, X, y, engine="loop"))


@pytest.mark.cuda
@pytest.mark.parametrize("make_cells", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_networks_have_both_derivatives_on_a_card(make_cells):
    net, X, y = made(lambda: Recurrent(make_cells), (3, 4))
    attack = PGD(eps=0.3, n_steps=4, random_start=False)
    expected, X_adv = norms_and_gradients(net, X, y), attack(net, X, y)
    norms, gradients = norms_and_gradients(net.cuda(), X.cuda(), y.cuda())
    agree((norms.cpu(), tuple(gradient.cpu() for gradient in gradients)), expected)
    agree(attack(net, X.cuda(), y.cuda()).cpu(), X_adv)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5, track_running_stats=False)
        self.linear = nn.Linear(5, 3)

    def forward(self, X):
        return self.linear(self.norm(X))


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize(
    "make_net",
    [
        Mixing,
        lambda: nn.Sequential(Mixing(), nn.Tanh()),
        lambda: nn.Sequential(*Mixing().children()),
    ],
    ids=["module", "part", "chain"],
)
def test_modules_that_mix_samples_stay_errors(make_net, engine):
    with pytest.raises(ValueError, match="such a layer mixes the samples of a batch"):
        jacobian_norm(make_net(), torch.zeros(3, 5), engine=engine)


def test_the_gradient_of_the_logits_themselves_is_left_to_the_caller():
    net, X, y = made(*NETS["relu MLP"])
    norms = jacobian_norm(net, X, y, create_graph=True)
    loss = F.cross_entropy(net(X), y) + norms.mean()
    together = torch.autograd.grad(loss, list(net.parameters()))
    apart = [
        torch.autograd.grad(part, list(net.parameters()), materialize_grads=True, allow_unused=True)
        for part in (
            F.cross_entropy(net(X), y),
            jacobian_norm(net, X, y, create_graph=True).mean(),
        )
    ]
    agree(together, tuple(one + other for one, other in zip(*apart, strict=True)))


class StraightThrough(torch.autograd.Function):
    """A sign whose backward pass looks at numbers, which vmap cannot."""

    @staticmethod
    def forward(ctx, X):
        ctx.save_for_backward(X)
        return X.sign()

    @staticmethod
    def backward(ctx, gradient):
        (X,) = ctx.saved_tensors
        return gradient * (X.abs() < 1) if gradient.abs().max() > 0 else gradient


class WithFunction(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 8), nn.Linear(8, 3), function

    def forward(self, X):
        return self.last(self.function(self.first(X)))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    "function", [StraightThrough.apply, lambda h: F.group_norm(h, 4)], ids=["sign", "group norm"]
)
def test_rows_are_taken_one_by_one_where_they_cannot_be_taken_at_once(function, create_graph):
    net, X = WithFunction(function).double(), torch.rand(5, 4, dtype=torch.float64)
    auto, loop = (
        jacobian_norm(net, X, engine=engine, create_graph=create_graph)
        for engine in ("auto", "loop")
    )
    torch.testing.assert_close(auto, loop)
    assert auto.requires_grad == create_graph


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X):
        ctx.save_for_backward(X)
        return X**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (X,) = ctx.saved_tensors
        return 3 * X.square() * gradient


@few_options
@pytest.mark.parametrize("engine", ["auto", "batched", "loop"])
def test_functions_that_say_they_have_one_derivative_are_not_for_penalties(engine, options):
    net, y = WithFunction(Cube.apply).double(), torch.tensor([0, 1, 2])
    X = torch.rand(3, 4, dtype=torch.float64)
    norms = jacobian_norm(net, X, y, engine=engine, **options)
    if "class_samples" not in options:
        agree(norms, jacobian_norm(lambda X: net.last(net.first(X) ** 3), X, y, **options))
    with pytest.raises(ValueError, match="the function Cube, marked @once_differentiable, but"):
        jacobian_norm(net, X, y, engine=engine, create_graph=True, **options)


def test_attention_can_be_regularized():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Unflatten(1, (3, 4)),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=True),
        nn.Flatten(),
        nn.Linear(12, 3),
    ).double()
    X = torch.rand(2, 12, dtype=torch.float64)
    norms = jacobian_norm(net, X, create_graph=True)
    weight = net[1].self_attn.in_proj_weight
    (gradient,) = torch.autograd.grad(norms.sum(), weight)
    step = torch.randn_like(weight)
    with torch.no_grad():
        weight.add_(1e-6 * step)
        above = jacobian_norm(net, X).sum()
        weight.sub_(2e-6 * step)
        below = jacobian_norm(net, X).sum()
    slope = (above - below) / 2e-6
    torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-5, atol=1e-8)
