import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import config_context
from torch import nn

from skjacobian.jacobian import JACOBIAN_NORMS, jacobian_norm
from skjacobian.jacobian._cost import COPIES_OF_ROWS
from skjacobian.jacobian._engines import linearize
from skjacobian.jacobian._parts import cut
from skjacobian.modules import CNN, MLP
from tests.seeds import seeded

DOUBLE = torch.float64
N, N_CLASSES = 5, 4
ENGINES = ("closed_form", "batched", "loop")
OPTIONS = {
    **{norm: {"norm": norm} for norm in JACOBIAN_NORMS},
    **{f"{norm} of the loss": {"norm": norm, "output": "loss"} for norm in ("l2", "l1")},
    "l2 by projections": {"norm": "l2", "n_projections": 3},
    "l21 by projections": {"norm": "l21", "n_projections": 3},
    "l2 by classes": {"norm": "l2", "class_samples": 2},
    "l1 by classes": {"norm": "l1", "class_samples": 3},
}
# Norms that are sums over rows, so that the rows of one sample may be parted.
ADDITIVE = {name: o for name, o in OPTIONS.items() if o["norm"] in ("l2", "l1")} | {
    "l21 by projections": OPTIONS["l21 by projections"]
}
WEIGHTS = {
    "equal": torch.full((N,), 0.7, dtype=DOUBLE),
    "unequal": torch.tensor([0.5, -1.0, 2.0, 0.0, 1.5], dtype=DOUBLE),
    "zero": torch.zeros(N, dtype=DOUBLE),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_engine = pytest.mark.parametrize("engine", ENGINES)
# Parts are the same with and without vmap.
both_engines = pytest.mark.parametrize("engine", ["closed_form", "loop"])

IMAGE = (2, 5, 4)


def batch_norm_cnn():
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(12, N_CLASSES)),
    )


NETS = {
    "MLP": (lambda: MLP(6, N_CLASSES, hidden_units=(7, 5), activation="tanh"), (6,)),
    "relu MLP": (lambda: MLP(6, N_CLASSES, hidden_units=(7, 5)), (6,)),
    "ends in tanh": (lambda: nn.Sequential(nn.Linear(6, N_CLASSES), nn.Tanh()), (6,)),
    "relu CNN": (
        lambda: CNN(IMAGE, N_CLASSES, channels=(3,), kernel_size=3, hidden_units=(5,)),
        IMAGE,
    ),
    "smooth CNN": (
        lambda: CNN(
            IMAGE, N_CLASSES, channels=(3,), kernel_size=3, hidden_units=(), activation="silu"
        ),
        IMAGE,
    ),
    "batch norm CNN": (batch_norm_cnn, IMAGE),
}


class Tied(nn.Module):
    """Two layers that share a weight, and one that is used twice under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        block = nn.Linear(6, 6)
        self.blocks = nn.ModuleList([block, block])
        self.head = nn.Linear(6, N_CLASSES)

    def forward(self, X):
        for layer in (self.first, self.second, *self.blocks):
            X = layer(X).tanh()
        return self.head(X)


TIED = (Tied, (6,))


def made(make_net, shape, n=N, n_classes=N_CLASSES):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make_net().double().train()
        X = torch.randn(n, *shape, dtype=DOUBLE)
        with torch.no_grad():
            net(2 * X + 1)  # for the running statistics
        return net.eval(), X, torch.arange(n) % n_classes


def room_for(rows, net, X, engine, create_graph=True):
    """Memory for so many rows of Jacobians."""
    linearization = linearize(net, X, engine=engine, create_graph=create_graph)
    numbers = linearization.numbers_per_row() + linearization.shape[1]
    row = COPIES_OF_ROWS * numbers * X.element_size()
    return config_context(working_memory=(rows + 0.5) * row / 2**20)


def norms_and_gradients(net, X, y, weight, **options):
    norms = jacobian_norm(net, X, y, create_graph=True, generator=seeded(1), **options)
    parameters = [p for p in net.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        weight @ norms, parameters, materialize_grads=True, allow_unused=True
    )
    return norms.detach(), gradients


def agree(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


class Spy:
    """Records how many rows of how many samples are in flight at a time."""

    def __init__(self, monkeypatch, kind):
        self.seen = []
        for name in ("reduced", "rows"):
            monkeypatch.setattr(kind, name, self.recording(getattr(kind, name)))

    def recording(self, method):
        def recorded(linearization, V, *rest):
            n_samples, n_classes = linearization.shape
            self.seen.append((n_samples, n_classes if V is None else V.shape[1]))
            return method(linearization, V, *rest)

        return recorded


@pytest.fixture
def spy_on(monkeypatch):
    return lambda linearization: Spy(monkeypatch, type(linearization))


# --- values and gradients ----------------------------------------------------------------


@every_option
@both_engines
@pytest.mark.parametrize("name", NETS)
def test_parts_give_the_values_and_gradients_of_the_whole(name, engine, options):
    net, X, y = made(*NETS[name])
    options = {"engine": engine, **options}
    for rows, weight in ((1, WEIGHTS["unequal"]), (2 * N_CLASSES + 1, WEIGHTS["equal"])):
        expected = norms_and_gradients(net, X, y, weight, **options)
        with room_for(rows, net, X, engine):
            agree(norms_and_gradients(net, X, y, weight, **options), expected)


@every_option
def test_parts_leave_layers_of_two_names_their_weights(options):
    net, X, y = made(*TIED)
    before = list(net.parameters())
    options = {"engine": "loop", **options}
    expected = norms_and_gradients(net, X, y, WEIGHTS["equal"], **options)
    with room_for(1, net, X, "loop"):
        agree(norms_and_gradients(net, X, y, WEIGHTS["equal"], **options), expected)
    after = list(net.parameters())
    assert len(after) == len(before)
    assert all(one is other for one, other in zip(after, before, strict=True))


@every_option
@both_engines
@pytest.mark.parametrize("name", NETS)
def test_parts_give_the_values_of_the_whole_without_a_graph(name, engine, options):
    net, X, y = made(*NETS[name])
    options = {"engine": engine, **options}
    expected = jacobian_norm(net, X, y, create_graph=True, generator=seeded(), **options).detach()
    for rows in (0, 1, N_CLASSES - 1, 2 * N_CLASSES + 1):
        with room_for(rows, net, X, engine, create_graph=False):
            computed = jacobian_norm(net, X, y, generator=seeded(), **options)
        assert not computed.requires_grad
        agree(computed, expected)


@every_option
@pytest.mark.parametrize("engine", ["batched", "loop"])
@pytest.mark.parametrize("create_graph", [True, False])
def test_functions_give_the_same_in_little_memory(create_graph, engine, options):
    net, X, y = made(*NETS["MLP"])

    def norms():
        return jacobian_norm(
            lambda X: net(X),
            X,
            y,
            create_graph=create_graph,
            generator=seeded(),
            engine=engine,
            **options,
        )

    expected = norms()
    with config_context(working_memory=1e-9):
        agree(norms().detach(), expected.detach())
        if create_graph:  # not in parts: the weights are not known
            of = net[1].weight
            one, other = (torch.autograd.grad(n.sum(), of)[0] for n in (norms(), expected))
            agree(one, other)


@every_option
@every_engine
def test_a_single_sample_may_be_parted(engine, options):
    net, X, y = made(*NETS["MLP"], n=1)
    weight = torch.tensor([1.3], dtype=DOUBLE)
    expected = norms_and_gradients(net, X, y, weight, engine=engine, **options)
    with room_for(1, net, X, engine):
        agree(norms_and_gradients(net, X, y, weight, engine=engine, **options), expected)


@every_option
@both_engines
def test_parts_leave_out_weights_that_are_frozen(engine, options):
    net, X, y = made(*NETS["relu MLP"])
    weight = WEIGHTS["unequal"]
    for frozen in (net[1], net[3], net[5]):
        net.requires_grad_(True)
        frozen.requires_grad_(False)
        expected = norms_and_gradients(net, X, y, weight, engine=engine, **options)
        with room_for(1, net, X, engine):
            agree(norms_and_gradients(net, X, y, weight, engine=engine, **options), expected)


@every_option
@both_engines
@pytest.mark.parametrize("name", ["MLP", "relu CNN"])
def test_parts_give_the_values_when_all_weights_are_frozen(name, engine, options):
    net, X, y = made(*NETS[name])
    options = {"engine": engine, "create_graph": True, **options}
    expected = jacobian_norm(net, X, y, generator=seeded(), **options).detach()
    net.requires_grad_(False)
    with room_for(1, net, X, engine):
        agree(jacobian_norm(net, X, y, generator=seeded(), **options).detach(), expected)


@pytest.mark.parametrize("engine", ["loop", "batched", "closed_form"])
def test_parts_of_a_jacobian_that_no_trained_weight_changes(engine):
    net = nn.Sequential(nn.Linear(4, 3)).double()
    net[0].weight.requires_grad_(False)  # its bias is trained, of which J knows nothing
    X = torch.randn(6, 4, generator=seeded(), dtype=torch.float64)
    with room_for(1, net, X, engine):
        norms = jacobian_norm(net, X, engine=engine, create_graph=True).detach()
    torch.testing.assert_close(norms, net[0].weight.square().sum().expand(6))


@every_option
@both_engines
def test_parts_can_be_differentiated_where_gradients_are_switched_off(engine, options):
    net, X, y = made(*NETS["MLP"])
    with room_for(1, net, X, engine), torch.no_grad():
        norms = jacobian_norm(net, X, y, create_graph=True, engine=engine, **options)
    assert norms.requires_grad


@every_option
@both_engines
def test_the_gradient_of_parts_can_be_taken_twice(engine, options):
    net, X, y = made(*NETS["MLP"])
    weights = [p for p in net.parameters() if p.ndim > 1]
    with room_for(2, net, X, engine):
        norms = jacobian_norm(net, X, y, create_graph=True, engine=engine, **options)
        for weight in (WEIGHTS["equal"], WEIGHTS["unequal"]):
            first, second = (
                torch.autograd.grad(weight @ norms, weights, retain_graph=True) for _ in range(2)
            )
            torch.testing.assert_close(first, second, rtol=0, atol=0)


@every_engine
def test_gradients_of_weights_that_have_changed_since_are_an_error(engine):
    net, X, _ = made(*NETS["MLP"])
    for rows in (1, 1000):
        with room_for(rows, net, X, engine):
            norms = jacobian_norm(net, X, create_graph=True, engine=engine)
            with torch.no_grad():
                net[1].weight.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(WEIGHTS["unequal"] @ norms, net[1].weight)


@every_engine
@pytest.mark.parametrize("name", ["batch norm CNN"])
def test_parts_put_batch_normalization_in_eval_mode(name, engine):
    net, X, y = made(*NETS[name])
    weight = WEIGHTS["unequal"]
    expected = norms_and_gradients(net, X, y, weight, engine=engine)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    net.train()
    with room_for(1, net, X, engine):
        agree(norms_and_gradients(net, X, y, weight, engine=engine), expected)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@every_engine
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_a_pass_in_training_mode_does_not_change_the_gradients_of_norms_taken_before(
    engine, weight
):
    net, X, y = made(*NETS["batch norm CNN"])
    expected = norms_and_gradients(net, X, y, weight, engine=engine)[1]
    net.train()
    with room_for(1, net, X, engine):
        norms = jacobian_norm(net, X, y, create_graph=True, engine=engine)
        net(5 * X + 1)
        gradients = torch.autograd.grad(
            weight @ norms, list(net.parameters()), materialize_grads=True, allow_unused=True
        )
    agree(gradients, expected)


# --- dropout -----------------------------------------------------------------------------


def dropout_net():
    # Linear but for the mask, of which there are four.
    return nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.5), nn.Linear(2, N_CLASSES))


def norms_under_each_mask(net, X, y, **options):
    """The norms (4, n_samples) that each of the four masks gives."""
    norms = []
    for mask in torch.tensor([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0]], dtype=DOUBLE):
        masked = nn.Linear(6, N_CLASSES).double()
        with torch.no_grad():
            masked.weight.copy_(net[2].weight * mask @ net[0].weight)
        norms.append(jacobian_norm(masked, X, y, **options))
    return torch.stack(norms)


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("rows", [1, N_CLASSES, 1000])
@every_engine
@pytest.mark.parametrize("norm", JACOBIAN_NORMS)
def test_all_rows_of_a_sample_see_one_dropout_mask(norm, engine, rows, create_graph):
    net, X, y = made(dropout_net, (6,), n=30)
    net.train()
    options = {"norm": norm, "engine": engine, "create_graph": create_graph}
    with torch.random.fork_rng(devices=[]), room_for(rows, net, X, engine):
        torch.manual_seed(2)
        norms = jacobian_norm(net, X, y, **options).detach()
    possible = norms_under_each_mask(net, X, y, norm=norm)
    distance = (norms - possible).abs().amin(0)
    assert (distance < 1e-10).all()
    assert len((norms - possible).abs().argmin(0).unique()) == 4


@every_option
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_in_closed_form_parts_share_the_masks_of_the_forward_pass(activation, options):
    net, X, y = made(
        lambda: MLP(6, N_CLASSES, hidden_units=(9,), activation=activation, dropout=0.5), (6,)
    )
    net.train()
    results = []
    for rows in (1000, 1, N_CLASSES + 1):
        with torch.random.fork_rng(devices=[]), room_for(rows, net, X, "closed_form"):
            torch.manual_seed(3)
            results.append(norms_and_gradients(net, X, y, WEIGHTS["unequal"], **options))
    agree(results[1], results[0])
    agree(results[2], results[0])


@every_option
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("engine", ["batched", "loop"])
def test_by_autograd_gradients_are_those_of_the_masks_of_the_values(engine, weight, options):
    net, X, y = made(
        lambda: MLP(6, N_CLASSES, hidden_units=(5,), activation="tanh", dropout=0.5), (6,)
    )
    net.train()
    last, step = net[-1].weight, 1e-5

    def norms(**more):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return jacobian_norm(
                net, X, y, engine=engine, generator=seeded(), create_graph=True, **options, **more
            )

    with room_for(1, net, X, engine):
        state = torch.get_rng_state()
        value = norms()
        (gradient,) = torch.autograd.grad(weight @ value, last)
        assert torch.equal(torch.get_rng_state(), state)
        original = last.detach().clone()
        direction = torch.randn(last.shape, generator=seeded(7), dtype=DOUBLE)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                last.copy_(original + sign * step * direction)
            ends.append((weight @ norms().detach()).item())
    difference = (ends[0] - ends[1]) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(difference, rel=1e-6, abs=1e-7)


# --- how the rows are cut ----------------------------------------------------------------


@given(
    n_samples=st.integers(0, 9),
    n_classes=st.integers(1, 7),
    n_rows=st.one_of(st.none(), st.integers(1, 7)),
    at_once=st.integers(1, 50),
    rows_add=st.booleans(),
)
@settings(deadline=None)
def test_parts_hold_each_row_once_and_no_more_than_fit(
    n_samples, n_classes, n_rows, at_once, rows_add
):
    rows = n_rows or n_classes
    V = None if n_rows is None else torch.arange(n_samples * rows).reshape(n_samples, rows)
    seen = torch.zeros(n_samples, rows, dtype=torch.long)
    for samples, part in cut(n_samples, rows, V, at_once, rows_add):
        inside = torch.arange(n_samples)[samples]
        assert len(inside) > 0
        if part is None:
            seen[inside] += 1
            width = rows
        elif V is None:
            assert len(part) == 1
            seen[inside.unsqueeze(1), part] += 1
            width = part.shape[1]
        else:
            assert len(part) == len(inside)
            seen.view(-1)[part.flatten()] += 1
            width = part.shape[1]
        if rows_add or rows <= at_once:
            assert len(inside) * width <= at_once
        else:
            assert len(inside) == 1
    assert (seen == 1).all()


@every_option
@every_engine
@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("rows", [1, N_CLASSES, 2 * N_CLASSES + 1])
def test_no_more_rows_are_in_flight_than_fit(rows, create_graph, engine, options, spy_on):
    net, X, y = made(*NETS["MLP"])
    of_logits = options.get("output") != "loss"
    with room_for(rows, net, X, engine, create_graph):
        spy = spy_on(linearize(net, X, engine=engine, create_graph=create_graph))
        jacobian_norm(net, X, y, create_graph=create_graph, engine=engine, **options)
    assert spy.seen
    for n_samples, n_rows in spy.seen:
        # Where rows do not add, those of one sample stay together; nor can the gradient
        # of the loss, one row of each sample, be parted if it is to be differentiated.
        together = options["norm"] not in ("l2", "l1") and n_samples == 1
        assert n_samples * n_rows <= rows or together or (create_graph and not of_logits)


@pytest.mark.parametrize("options", ADDITIVE.values(), ids=ADDITIVE)
@every_engine
def test_the_rows_of_one_sample_may_be_parted_where_they_add(engine, options, spy_on):
    net, X, y = made(*NETS["MLP"])
    with room_for(1, net, X, engine, create_graph=False):
        spy = spy_on(linearize(net, X, engine=engine))
        jacobian_norm(net, X, y, engine=engine, **options)
    assert set(spy.seen) == {(1, 1)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_engine
def test_many_classes_may_be_parted(engine, options):
    net, X, y = made(lambda: MLP(6, 50, hidden_units=(7,), activation="tanh"), (6,), n_classes=50)
    weight = WEIGHTS["unequal"]
    expected = norms_and_gradients(net, X, y, weight, engine=engine, **options)
    for rows in (7, 50, 120):
        with room_for(rows, net, X, engine):
            computed = norms_and_gradients(net, X, y, weight, engine=engine, **options)
        agree(computed, expected)


# --- memory ------------------------------------------------------------------------------

PEAK = """
import pathlib, sys
import torch
from sklearn import config_context
from skjacobian.jacobian import jacobian_norm
from skjacobian.modules import MLP

def peak():
    # Not ru_maxrss, which a process inherits from the one that starts it.
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10

def run(n_classes):
    net, X = MLP(300, n_classes, hidden_units=(50,)), torch.zeros(64, 300)
    norms = jacobian_norm(net, X, norm="l1", engine=sys.argv[1], create_graph=True)
    norms.mean().backward()

torch.set_num_threads(1)
run(2)
pathlib.Path("/proc/self/clear_refs").write_text("5")
start = peak()
for working_memory in (16, 1024):
    with config_context(working_memory=working_memory):
        run(1000)
    print(peak() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("engine", ["closed_form", pytest.param("batched", marks=pytest.mark.slow)])
def test_the_peak_of_memory_is_bounded(engine):
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, engine], capture_output=True, text=True, check=True
    )
    limited, unlimited = map(float, ran.stdout.split())
    assert limited < 2 * 16
    assert unlimited > 2 * limited
