import gc
import math
import weakref

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import config_context
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from skjacobian.jacobian import _cost
from skjacobian.jacobian._cost import affordable_sample, gram_pays, rows_at_once
from skjacobian.jacobian._dense_products import gram_gradient, gram_product
from skjacobian.jacobian._engines import linearize
from skjacobian.jacobian._norms import JacobianNorm
from skjacobian.jacobian._sizes import Sizes, sizes_of
from skjacobian.modules import CNN, MLP
from skjacobian.objectives import JacobianRegularization

# --- the Gram form -----------------------------------------------------------------------

size = st.integers(1, 3000)


def operations(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@given(
    n_rows=st.integers(1, 60),
    n_hidden=st.integers(1, 60),
    n_features=st.integers(1, 60),
)
@settings(deadline=None, max_examples=30)
def test_the_gram_form_pays_where_it_takes_fewer_operations(n_rows, n_hidden, n_features):
    A, W = torch.zeros(1, n_rows, n_hidden), torch.zeros(n_hidden, n_features)
    D = torch.zeros(1, n_rows, n_features)
    by_product = operations(lambda: (A[0] @ W, D[0] @ W.T, A[0].T @ D[0]))
    by_gram = operations(lambda: (gram_product(A, W), gram_gradient(A, torch.ones(1), W)))
    assert gram_pays(n_rows, n_hidden, n_features) == (by_gram < by_product)


@given(n_rows=size, n_hidden=size, n_features=size, more=size)
def test_once_the_gram_form_pays_it_pays_for_more_rows_and_features(
    n_rows, n_hidden, n_features, more
):
    if gram_pays(n_rows, n_hidden, n_features):
        assert gram_pays(n_rows + more, n_hidden, n_features)
        assert gram_pays(n_rows, n_hidden, n_features + more)
        assert gram_pays(n_rows, max(1, n_hidden - more), n_features)
    else:
        assert not gram_pays(n_rows, n_hidden + more, n_features)


# --- the sample that is affordable -------------------------------------------------------

batch = {
    "n_samples": st.integers(1, 2000),
    "operations": st.sampled_from([0, 1, 10**3, 10**5, 10**6, 10**8, 10**12]),
    "n_classes": st.integers(1, 300),
    "share": st.sampled_from([0.01, 0.4, 1.0]),
    "rows_add": st.booleans(),
}


def sample_of(n_samples, operations, n_classes, share, rows_add):
    """Return the sample, the rows of one of its samples, and all its rows."""
    rows_of_one = n_classes if rows_add else share * n_classes + 1
    sizes = Sizes(operations, n_classes)
    sample = affordable_sample(n_samples, sizes, rows_of_one, rows_add)
    return sample, rows_of_one, sample.n_samples * (sample.class_samples or rows_of_one)


@given(**batch)
@settings(deadline=None)
def test_the_sample_is_a_part_of_the_batch(**given):
    sample, _, _ = sample_of(**given)
    assert 1 <= sample.n_samples <= given["n_samples"]
    if sample.class_samples is not None:
        assert given["rows_add"]
        assert 1 <= sample.class_samples <= given["n_classes"]


def is_small(n_samples, operations, **_):
    """Tell whether starting kernels takes longer than the operations of a sixth of a step."""
    rows = max(n_samples // 6 // 4 * 4, 20)
    return 0 < 3 * operations * rows < _cost.FREE_OPERATIONS


def is_taken_whole(n_samples, operations, n_classes, share, rows_add):
    """Tell whether a batch has so few and cheap rows that all are taken."""
    rows = n_samples * (n_classes if rows_add else share * n_classes + 1)
    return rows <= _cost.FREE_ROWS and 0 < 3 * operations * rows <= _cost.SMALL_BATCH_OPERATIONS


@given(**batch)
@settings(deadline=None)
def test_the_sample_costs_a_sixth_of_a_step_or_twenty_rows_or_next_to_nothing(**given):
    sample, rows_of_one, rows = sample_of(**given)
    sixth = max(given["n_samples"] / 6, 20)
    # A row of each sample more, or one more sample, would be too much; rows come by fours.
    more = given["n_samples"] if given["rows_add"] else rows_of_one / 2
    assert rows >= min(sixth - 4 - more, given["n_samples"] * rows_of_one) - 1e-9
    if is_small(**given):
        assert sample.every > 1
        return
    assert sample.every == 1
    if is_taken_whole(**given):
        assert (sample.n_samples, sample.class_samples) == (given["n_samples"], None)
    else:
        assert rows <= max(rows_of_one, sixth + rows_of_one / 2) + 1e-9


@given(**batch, more=st.integers(1, 500))
@settings(deadline=None)
def test_larger_batches_have_larger_samples(more, **given):
    larger = {**given, "n_samples": given["n_samples"] + more}
    assume(is_small(**given) == is_small(**larger))
    assume(is_taken_whole(**given) <= is_taken_whole(**larger))
    sample, larger_sample = sample_of(**given)[0], sample_of(**larger)[0]
    assert larger_sample.n_samples >= sample.n_samples
    assert larger_sample.every == sample.every


@given(**batch, factor=st.sampled_from([1.5, 10, 1000]))
@settings(deadline=None)
def test_more_expensive_models_have_no_larger_samples(factor, **given):
    assume(given["operations"])
    expensive = {**given, "operations": math.ceil(factor * given["operations"])}
    (sample, _, rows), (smaller, _, fewer_rows) = sample_of(**given), sample_of(**expensive)
    assert smaller.every <= sample.every
    if smaller.every == sample.every:
        assert smaller.n_samples <= sample.n_samples
        assert fewer_rows <= rows


def test_rows_go_to_as_many_samples_as_possible_where_they_add():
    sizes = Sizes(10**12, 10)
    assert affordable_sample(600, sizes, 10, rows_add=True)[:2] == (100, 1)
    assert affordable_sample(600, sizes, 10, rows_add=False)[:2] == (10, None)
    assert affordable_sample(600, sizes, 1, rows_add=False)[:2] == (100, None)


def test_small_models_are_penalized_on_all_samples():
    for rows_add in (True, False):
        sample = affordable_sample(64, Sizes(100, 10), 10, rows_add=rows_add)
        assert sample[:2] == (64, None)


@pytest.mark.parametrize(
    ("norm", "n_rows"),
    [
        (JacobianNorm("l2"), 10),
        (JacobianNorm("l21"), 10),
        (JacobianNorm("l2", n_projections=3), 3),
        (JacobianNorm("l1", class_samples=4), 4),
        (JacobianNorm("l1", class_samples=40), 10),
        (JacobianNorm("l1", output="loss"), 1),
    ],
    ids=repr,
)
def test_norms_count_their_rows(norm, n_rows):
    assert norm.n_rows(10) == n_rows


@pytest.mark.parametrize("norm", ["spectral", "cross_lipschitz"])
def test_norms_that_choose_a_row_cost_less_than_all_with_their_gradients(norm):
    assert 1 < JacobianNorm(norm).n_rows(10) < 10


# --- the sizes of a model ----------------------------------------------------------------


def test_a_dense_network_takes_two_operations_for_each_weight():
    net = MLP(7, 3, hidden_units=(11, 5))
    n_weights = sum(p.numel() for p in net.parameters() if p.ndim == 2)
    assert sizes_of(net, torch.zeros(4, 7)) == Sizes(2 * n_weights, 3)


def test_a_convolution_takes_its_weights_at_each_pixel():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 5, 4))
    expected = 2 * (2 * 3 * 9) * (4 * 5) + 2 * (3 * 4 * 5) * 4
    assert sizes_of(net, torch.zeros(9, 2, 6, 7)) == Sizes(expected, 4)


def test_of_a_function_the_operations_are_unknown():
    W = torch.zeros(3, 5)
    assert sizes_of(lambda X: X @ W.T, torch.zeros(2, 5)) == Sizes(0, 3)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells, self.head = kind(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, X):
        return self.head(self.cells(X)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_weights_count_at_each_step(kind):
    net = Recurrent(kind)
    weights = sum(p.numel() for p in net.cells.parameters() if p.ndim == 2)
    expected = 2 * weights * 7 + 2 * 5 * 2
    assert sizes_of(net, torch.zeros(4, 7, 3)) == Sizes(expected, 2)


def test_weights_that_no_layer_holds_by_that_name_count_too():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 5, 4))
    expected = sizes_of(net, torch.zeros(1, 2, 6, 7))
    for layer in (net[0], net[3]):
        weight_norm(layer)
    fresh = nn.Sequential(*net)
    assert sizes_of(fresh, torch.zeros(1, 2, 6, 7)) == expected


class Scaled(nn.Module):
    """A layer without parameters that returns no tensor, or one without axes."""

    def forward(self, X):
        return {"mean": X.mean()}


class Rescaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.head = Scaled(), nn.Linear(4, 3)

    def forward(self, X):
        return self.head(X / (1 + self.scale(X)["mean"]))


def test_layers_may_return_anything():
    assert sizes_of(Rescaled(), torch.zeros(5, 4)) == Sizes(2 * 12, 3)


def test_operations_are_counted_once_for_each_module():
    calls = []
    nets = [MLP(5, n_classes) for n_classes in (2, 3)]
    for net in nets:
        net.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        for net, n_classes in zip(nets, (2, 3), strict=True):
            assert sizes_of(net, torch.zeros(4, 5)).n_classes == n_classes
    assert len(calls) == 2


def test_a_module_is_not_kept_alive():
    net = MLP(5, 2)
    sizes_of(net, torch.zeros(4, 5))
    reference = weakref.ref(net)
    del net
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    "make_net",
    [
        lambda: MLP(5, 3, dropout=0.5),
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 3)
        ),
    ],
    ids=["dropout", "batch norm"],
)
def test_counting_leaves_the_model_alone(make_net):
    net = make_net().train()
    net[1].eval()
    net[0].requires_grad_(False)
    X = torch.ones(6, 5, requires_grad=True)
    modes = [module.training for module in net.modules()]
    wanted = [p.requires_grad for p in net.parameters()]
    state = {key: value.clone() for key, value in net.state_dict().items()}
    rng = torch.get_rng_state()
    sizes_of(net, X)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == wanted
    assert all(p.grad is None for p in net.parameters())
    assert X.grad is None
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.is_grad_enabled()


def test_a_model_that_mixes_samples_is_told_so_where_its_operations_are_counted(generator):
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False))
    objective = JacobianRegularization(penalty_samples="auto")
    with pytest.raises(ValueError, match=r"track_running_stats=False.*nn\.LayerNorm"):
        objective(net, torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), generator=generator)


# --- memory ------------------------------------------------------------------------------


def mlp_and_samples():
    return MLP(600, 10, hidden_units=(100, 50)).double(), torch.zeros(8, 600, dtype=torch.float64)


@pytest.mark.parametrize("engine", ["closed_form", "loop"])
def test_more_memory_holds_more_rows(engine):
    linearization = linearize(*mlp_and_samples(), engine=engine)
    rows = []
    for working_memory in (1e-9, 1e-3, 0.1, 1, 10, 1024):
        with config_context(working_memory=working_memory):
            rows.append(rows_at_once(linearization))
    assert rows[0] == 1
    assert rows == sorted(rows)
    assert rows[-1] > 1000 / 4


def test_rows_in_flight_take_no_more_memory_than_allowed():
    linearization = linearize(*mlp_and_samples(), engine="closed_form")
    with config_context(working_memory=3):
        rows = rows_at_once(linearization)
    # A row of one sample is 600 + 100 + 50 numbers on its way, four times at the height.
    assert 0.5 * 3 * 2**20 < rows * 750 * 8 * 4 <= 3 * 2**20


def test_rows_of_convolutions_stay_within_the_caches():
    net = CNN((1, 16, 16), 10, channels=(4,))
    linearization = linearize(net, torch.zeros(2, 1, 16, 16), engine="closed_form")
    with config_context(working_memory=1024):
        rows = rows_at_once(linearization)
    assert 1 < rows * linearization.numbers_per_row() * 4 <= 8 * 2**20
