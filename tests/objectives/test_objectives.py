import copy
import itertools
import pickle
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from sklearn import config_context
from sklearn.base import clone
from torch import nn
from torch.nn import functional as F

from skjacobian.attacks import APGD, FGSM, PGD
from skjacobian.jacobian import JACOBIAN_NORMS, jacobian_norm
from skjacobian.modules import CNN, MLP
from skjacobian.objectives import (
    TRADES,
    AdversarialTraining,
    CrossEntropy,
    JacobianRegularization,
)
from skjacobian.objectives.jacobian_regularization import interpolated
from skjacobian.objectives.trades import divergence
from tests.seeds import seeded
from tests.slow import others_slow

DOUBLE = torch.float64
NORMS = ["linf", "l2"]

OBJECTIVES = {
    "cross-entropy": CrossEntropy(),
    "Jacobian, l2": JacobianRegularization(lam=0.1, norm="l2"),
    "Jacobian, l1": JacobianRegularization(lam=0.1, norm="l1"),
    "Jacobian, l21": JacobianRegularization(lam=0.1, norm="l21"),
    "Jacobian, projected": JacobianRegularization(lam=0.1, n_projections=2),
    "Jacobian, sampled": JacobianRegularization(lam=0.1, penalty_samples=3),
    "Jacobian, between samples": JacobianRegularization(lam=0.1, interpolation=0.5),
    "adversarial": AdversarialTraining(
        attack=PGD(n_steps=3, loss="cross_entropy"), objective=CrossEntropy()
    ),
    "adversarial, l2": AdversarialTraining(
        attack=FGSM(norm="l2", random_start=True), objective=CrossEntropy()
    ),
    "adversarial Jacobian": AdversarialTraining(
        attack=PGD(n_steps=3, loss="cross_entropy"), objective=JacobianRegularization(lam=0.1)
    ),
    "TRADES": TRADES(attack=PGD(n_steps=3), objective=CrossEntropy(), beta=2.0),
    "TRADES, Jacobian": TRADES(
        attack=PGD(norm="l2", n_steps=3), objective=JacobianRegularization(lam=0.1)
    ),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


@contextmanager
def global_seed(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make_net(kind="mlp"):
    with global_seed():
        net = {
            "mlp": lambda: MLP(4, 3, hidden_units=(6,), activation="tanh"),
            "cnn": lambda: CNN((1, 2, 2), 3, channels=(3,), kernel_size=3, hidden_units=(5,)),
            "dropout": lambda: MLP(4, 3, hidden_units=(12,), dropout=0.5),
            "batch norm": lambda: nn.Sequential(
                nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
            ),
            "batch norm and dropout": lambda: nn.Sequential(
                nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3)
            ),
        }[kind]()
        net = net.double().train()
        net(3 * torch.randn(32, 4, dtype=DOUBLE) + 1)  # running statistics unlike the batch's
    return net


def batch(n=10, seed=0):
    X = torch.rand(n, 4, generator=seeded(seed), dtype=DOUBLE)
    return X, torch.arange(n) % 3


def plain_cross_entropy(logits, y):
    return -torch.log_softmax(logits, 1)[torch.arange(len(y)), y]


def gradient_of(net, loss):
    gradients = torch.autograd.grad(loss.sum(), list(net.parameters()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


# --- what every objective promises -------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "cnn", "batch norm", "dropout"])
@every_objective
def test_every_sample_gets_a_loss_and_logits(objective, kind, generator):
    X, y = batch()
    with global_seed():
        value = objective(make_net(kind), X, y, generator=generator)
    assert value.loss.shape == (10,)
    assert value.logits.shape == (10, 3)
    assert value.loss.requires_grad
    assert torch.isfinite(value.loss).all()
    if value.penalty is not None:
        assert value.penalty.shape == (10,)
        assert not value.penalty.requires_grad


@every_objective
def test_the_loss_reaches_every_parameter(objective, generator):
    net = make_net()
    value = objective(net, *batch(), generator=generator)
    gradients = torch.autograd.grad(value.loss.sum(), list(net.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@every_objective
def test_the_same_seed_gives_the_same_value(objective):
    net = make_net()
    first, second = (objective(net, *batch(), generator=seeded(3)) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.logits, second.logits)


@pytest.mark.parametrize(
    "name", ["Jacobian, projected", "Jacobian, between samples", "adversarial, l2", "TRADES"]
)
def test_another_seed_gives_another_value(name):
    net = make_net()
    first, second = (OBJECTIVES[name](net, *batch(), generator=seeded(seed)) for seed in (0, 1))
    assert not torch.allclose(first.loss, second.loss)


EACH_DRAWS = ("Jacobian, projected", "Jacobian, sampled", "Jacobian, between samples")


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in EACH_DRAWS])
def test_equal_samples_get_equal_losses_unless_each_draws_for_itself(name, generator):
    X, y = batch(n=3)
    value = OBJECTIVES[name](
        make_net(), X[[0, 1, 0, 2, 0]], y[[0, 1, 0, 2, 0]], generator=generator
    )
    torch.testing.assert_close(value.loss[[0, 0]], value.loss[[2, 4]])


@every_objective
def test_the_net_the_samples_and_the_global_random_states_are_left_alone(objective, generator):
    net = make_net("batch norm")
    net[0].bias.requires_grad_(False)
    net[2].eval()
    X, y = batch()
    clean = X.clone()

    def state():
        return [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]

    before = state()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    value = objective(net, X, y, generator=generator)
    torch.autograd.grad(value.loss.sum(), [p for p in net.parameters() if p.requires_grad])
    assert state() == before
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(X, clean)
    assert X.grad is None
    assert not X.requires_grad
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@every_objective
def test_samples_that_require_a_gradient_are_treated_like_any_other(objective):
    net, (X, y) = make_net(), batch()
    expected = objective(net, X, y, generator=seeded())
    value = objective(net, X.clone().requires_grad_(), y, generator=seeded())
    torch.testing.assert_close(value.loss, expected.loss)


@every_objective
def test_an_objective_is_a_value_object(objective):
    for copied in (clone(objective), pickle.loads(pickle.dumps(objective))):
        assert repr(copied) == repr(objective)
        assert copied is not objective


def test_nested_parameters_can_be_set():
    objective = clone(OBJECTIVES["adversarial Jacobian"])
    objective.set_params(attack__n_steps=9, attack__eps=0.3, objective__lam=5.0)
    assert objective.attack.n_steps == 9
    assert objective.attack.eps == 0.3
    assert objective.objective.lam == 5.0
    assert OBJECTIVES["adversarial Jacobian"].attack.n_steps == 3


# --- strengths of zero -------------------------------------------------------------------


NO_STRENGTH = {
    **{f"Jacobian, {norm}": JacobianRegularization(lam=0, norm=norm) for norm in JACOBIAN_NORMS},
    "Jacobian, projected": JacobianRegularization(lam=0.0, n_projections=1),
    "adversarial": AdversarialTraining(attack=PGD(eps=0), objective=CrossEntropy()),
    "TRADES, no radius": TRADES(attack=PGD(eps=0.0), objective=CrossEntropy()),
    "TRADES, no weight": TRADES(attack=PGD(eps=0.1), objective=CrossEntropy(), beta=0),
}


@pytest.mark.parametrize("kind", ["mlp", "cnn", "batch norm", "dropout", "batch norm and dropout"])
@pytest.mark.parametrize("objective", NO_STRENGTH.values(), ids=NO_STRENGTH)
def test_without_strength_it_is_cross_entropy_exactly(objective, kind, generator):
    X, y = batch()
    net = make_net(kind)
    with global_seed():
        plain = CrossEntropy()(copy.deepcopy(net), X, y, generator=generator)
    with global_seed():
        value = objective(net, X, y, generator=generator)
    assert torch.equal(value.loss, plain.loss)
    assert torch.equal(value.logits, plain.logits)
    torch.testing.assert_close(plain.loss, plain_cross_entropy(plain.logits, y))


# --- Jacobian regularization -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("norm", JACOBIAN_NORMS)
def test_the_loss_is_cross_entropy_plus_lam_times_the_norm(norm, kind, generator):
    net, (X, y) = make_net(kind), batch()
    value = JacobianRegularization(lam=0.3, norm=norm)(net, X, y, generator=generator)
    norms = jacobian_norm(net, X, y, norm=norm)
    torch.testing.assert_close(value.penalty, norms)
    torch.testing.assert_close(value.loss, plain_cross_entropy(net(X), y) + 0.3 * norms)


@pytest.mark.parametrize("norm", ["l2", "l21"])
def test_the_penalty_can_be_estimated_from_projections(norm):
    net, (X, y) = make_net(), batch()
    objective = JacobianRegularization(lam=0.3, norm=norm, n_projections=2)
    value = objective(net, X, y, generator=seeded(5))
    expected = jacobian_norm(net, X, norm=norm, n_projections=2, generator=seeded(5))
    torch.testing.assert_close(value.penalty, expected)
    torch.testing.assert_close(value.loss, plain_cross_entropy(net(X), y) + 0.3 * expected)


@pytest.mark.parametrize(
    ("norm", "n_projections"),
    [*((norm, None) for norm in JACOBIAN_NORMS), ("l2", 2), ("l21", 2)],
)
def test_the_gradient_by_the_weights_matches_finite_differences(norm, n_projections):
    net, (X, y) = make_net(), batch(n=3)
    objective = JacobianRegularization(lam=0.7, norm=norm, n_projections=n_projections)

    def loss():
        return objective(net, X, y, generator=seeded(2)).loss

    step, differences = 1e-5, []
    for parameter in net.parameters():
        flat = parameter.data.view(-1)
        for j in range(len(flat)):
            original = flat[j].item()
            ends = []
            for end in (original + step, original - step):
                flat[j] = end
                ends.append(loss().sum().item())
            flat[j] = original
            differences.append((ends[0] - ends[1]) / (2 * step))
    expected = torch.tensor(differences, dtype=DOUBLE)
    torch.testing.assert_close(gradient_of(net, loss()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lam", [0.1, 10.0])
def test_lam_may_differ_between_samples(lam, generator):
    net, (X, y) = make_net(), batch()
    lams = torch.tensor([0.0, lam] * 5, dtype=DOUBLE)
    together = JacobianRegularization(lam=lams)(net, X, y, generator=generator).loss
    for which in (0.0, lam):
        alone = JacobianRegularization(lam=which)(net, X, y, generator=generator).loss
        torch.testing.assert_close(together[lams == which], alone[lams == which])


@pytest.mark.parametrize("norm", JACOBIAN_NORMS)
def test_with_batch_normalization_loss_and_penalty_see_different_statistics(norm, generator):
    net, (X, y) = make_net("batch norm"), batch()
    oracle = copy.deepcopy(net)
    logits = oracle(X)  # batch statistics, and updates the running ones
    penalty = jacobian_norm(oracle.eval(), X, y, norm=norm)  # running statistics
    value = JacobianRegularization(lam=0.3, norm=norm)(net, X, y, generator=generator)
    torch.testing.assert_close(value.logits, logits)
    torch.testing.assert_close(value.penalty, penalty)
    torch.testing.assert_close(value.loss, plain_cross_entropy(logits, y) + 0.3 * penalty)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, oracle.state_dict()[name])


def follower():
    """A net whose running statistics are those of the last batch."""
    with global_seed():
        norms = [nn.BatchNorm1d(n, eps=1e-15, momentum=1.0) for n in (5, 6)]
        layers = [nn.Linear(4, 5), norms[0], nn.Tanh(), nn.Linear(5, 6), norms[1], nn.Tanh()]
        net = nn.Sequential(*layers, nn.Linear(6, 3)).to(DOUBLE)
        for norm in norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return net


def mean_penalty_of_a_follower(parameters, X, points):
    """Mean ‖J‖_F² at points, all statistics being functions of the parameters."""
    *hidden, last_weight, last_bias = parameters
    blocks = [hidden[:4], hidden[4:]]
    statistics, value = [], X
    for weight, bias, scale, shift in blocks:
        value = value @ weight.T + bias
        statistics.append((value.mean(0), value.std(0)))
        standardized = (value - value.mean(0)) / value.std(0, correction=0)
        value = torch.tanh(standardized * scale + shift)

    def logits(x):
        for (weight, bias, scale, shift), (mean, std) in zip(blocks, statistics, strict=True):
            x = torch.tanh((weight @ x + bias - mean) / std * scale + shift)
        return last_weight @ x + last_bias

    jacobian = torch.func.vmap(torch.func.jacrev(logits))(points)
    return jacobian.square().sum((1, 2)).mean()


@pytest.mark.parametrize("memory", [1024, 1e-4])
@pytest.mark.parametrize("penalty_samples", [None, 4])
@pytest.mark.parametrize("engine", ["auto", "batched", "loop"])
def test_running_statistics_follow_the_weights_in_the_gradient_of_the_penalty(
    engine, penalty_samples, memory
):
    net, (X, y) = follower(), batch(12)
    index = torch.randperm(12, generator=seeded(1))[:penalty_samples]
    points = X if penalty_samples is None else X[index]
    expected = torch.autograd.grad(
        mean_penalty_of_a_follower(list(net.parameters()), X, points),
        list(net.parameters()),
        materialize_grads=True,
    )

    def gradient(lam):
        objective = JacobianRegularization(lam=lam, penalty_samples=penalty_samples, engine=engine)
        with config_context(working_memory=memory):
            loss = objective(net, X, y, generator=seeded(1)).loss.mean()
            return torch.autograd.grad(loss, list(net.parameters()))

    for with_penalty, plain, wanted in zip(gradient(0.3), gradient(0.0), expected, strict=True):
        torch.testing.assert_close(with_penalty - plain, 0.3 * wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("interpolation", [0.0, 0.5])
@pytest.mark.parametrize("norm", JACOBIAN_NORMS)
def test_no_penalty_shrinks_the_weights_before_batch_normalization(norm, interpolation):
    net, (X, y) = follower(), batch(12)
    objective = JacobianRegularization(lam=0.3, norm=norm, interpolation=interpolation)
    loss = objective(net, X, y, generator=seeded(1)).loss.mean()
    for layer in (net[0], net[3]):
        weights = list(layer.parameters())
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        along = sum((g * w).sum() for g, w in zip(gradients, weights, strict=True))
        assert abs(along) <= 1e-10 * sum(
            g.norm() * w.norm() for g, w in zip(gradients, weights, strict=True)
        )


def test_with_batch_normalization_in_eval_mode_all_is_one_forward_pass(generator):
    net, (X, y) = make_net("batch norm").eval(), batch()
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    value = JacobianRegularization(lam=0.3)(net, X, y, generator=generator)
    assert len(calls) == 1
    torch.testing.assert_close(value.logits, net(X))


def jacobian_by_hand(linear_in, mask, linear_out, hidden, slope=1.0):
    """J = W₂ diag(mask · 1[hidden > 0] · slope) W₁ of each sample."""
    gate = mask * (hidden > 0) * slope
    return torch.einsum("ch,nh,hd->ncd", linear_out.weight, gate, linear_in.weight).detach()


def test_with_dropout_loss_and_penalty_share_one_mask(generator):
    net, (X, y) = make_net("dropout"), batch()
    linear_in, linear_out = net[1], net[-1]
    with global_seed(9):
        mask = F.dropout(torch.ones(10, 12, dtype=DOUBLE), 0.5)
    with global_seed(9):
        value = JacobianRegularization(lam=0.3)(net, X, y, generator=generator)
    hidden = linear_in(X)
    torch.testing.assert_close(value.logits, linear_out(hidden.relu() * mask))
    jacobian = jacobian_by_hand(linear_in, mask, linear_out, hidden)
    torch.testing.assert_close(value.penalty, jacobian.square().sum((1, 2)))


def test_with_batch_normalization_and_dropout_the_mask_is_drawn_once(generator):
    net, (X, y) = make_net("batch norm and dropout"), batch()
    linear_in, norm, linear_out = net[0], net[1], net[-1]
    with global_seed(9):
        mask = F.dropout(torch.ones(10, 12, dtype=DOUBLE), 0.5)
        after_one_draw = torch.get_rng_state()
    with global_seed(9):
        value = JacobianRegularization(lam=0.3)(net, X, y, generator=generator)
        assert torch.equal(torch.get_rng_state(), after_one_draw)
    raw = linear_in(X)
    standardized = (raw - raw.mean(0)) / (raw.var(0, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(value.logits, linear_out(standardized.relu() * mask))
    slope = 1 / (norm.running_var + norm.eps).sqrt()
    jacobian = jacobian_by_hand(linear_in, mask, linear_out, raw - norm.running_mean, slope)
    torch.testing.assert_close(value.penalty, jacobian.square().sum((1, 2)))


@pytest.mark.parametrize("penalty_samples", [None, 3])
def test_the_loss_sees_each_instance_where_its_normalization_keeps_statistics(
    penalty_samples, generator
):
    norm = nn.InstanceNorm1d(2, track_running_stats=True)
    net = nn.Sequential(nn.Unflatten(1, (2, 3)), norm, nn.Flatten(), nn.Linear(6, 3)).to(DOUBLE)
    X, y = torch.randn(8, 6, dtype=DOUBLE), torch.arange(8) % 3
    objective = JacobianRegularization(lam=0.3, penalty_samples=penalty_samples)
    value = objective(net, X, y, generator=generator)
    torch.testing.assert_close(norm.running_mean, 0.1 * X.unflatten(1, (2, 3)).mean((0, 2)))
    torch.testing.assert_close(value.logits, net(X))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"norm": "l3"}, "Got norm='l3', but expected one of 'l1', 'l2', 'l21'"),
        ({"norm": "l1", "n_projections": 1}, "Got n_projections=1, but expected None with"),
        ({"n_projections": 0}, "Got n_projections=0, but expected an integer of at least 1"),
    ],
    ids=repr,
)
def test_a_bad_norm_is_rejected(params, message, generator):
    with pytest.raises(ValueError, match=message):
        JacobianRegularization(**params)(make_net(), *batch(), generator=generator)


# --- adversarial training ----------------------------------------------------------------


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [PGD(n_steps=5), FGSM(), FGSM(random_start=True)], ids=repr)
def test_the_loss_is_taken_at_points_inside_the_ball(attack, norm, bounds, generator):
    # Logits that are the samples themselves show where the loss was taken.
    X = torch.rand(20, 3, generator=generator, dtype=DOUBLE)
    y = torch.arange(20) % 3
    attack = clone(attack).set_params(norm=norm, eps=0.3, bounds=bounds)
    objective = AdversarialTraining(attack=attack, objective=CrossEntropy())
    value = objective(lambda X: X * 1.0, X, y, generator=generator)
    X_adv = value.logits
    assert attack.ball(X).contains(X_adv).all()
    if bounds is not None:
        assert X_adv.min() >= 0
        assert X_adv.max() <= 1
    torch.testing.assert_close(value.loss, plain_cross_entropy(X_adv, y))
    assert (value.loss > plain_cross_entropy(X, y)).double().mean() >= 0.9


def test_the_worst_case_of_a_linear_model_is_trained_on(generator):
    W = torch.randn(2, 4, generator=generator, dtype=DOUBLE)
    X, _ = batch()
    y = torch.arange(10) % 2
    objective = AdversarialTraining(attack=PGD(eps=0.2), objective=CrossEntropy())
    value = objective(lambda X: X @ W.T, X, y, generator=generator)
    worst = X + 0.2 * (W[1 - y] - W[y]).sign()
    torch.testing.assert_close(value.loss, plain_cross_entropy(worst @ W.T, y))


def test_the_gradient_takes_the_perturbed_samples_as_given(generator):
    net, (X, y) = make_net(), batch()
    attack = PGD(eps=0.2, n_steps=4, random_start=False, loss="cross_entropy")
    value = AdversarialTraining(attack=attack, objective=CrossEntropy())(
        net, X, y, generator=generator
    )
    X_adv = attack.maximize(
        lambda Z: F.cross_entropy(net(Z), y, reduction="none"), attack.ball(X), generator
    )
    expected = gradient_of(net, plain_cross_entropy(net(X_adv.detach()), y))
    torch.testing.assert_close(gradient_of(net, value.loss), expected)


def test_the_attack_climbs_its_own_loss(generator):
    net, (X, y) = make_net(), batch()
    values = {
        loss: AdversarialTraining(
            attack=FGSM(norm="l2", eps=0.5, loss=loss), objective=CrossEntropy()
        )(net, X, y, generator=generator)
        for loss in ("cross_entropy", "margin")
    }
    assert not torch.allclose(values["cross_entropy"].loss, values["margin"].loss)


@pytest.mark.parametrize("name", ["adversarial", "adversarial, l2", "adversarial Jacobian"])
def test_the_attack_leaves_batch_statistics_alone(name, generator):
    net, (X, y) = make_net("batch norm"), batch()
    oracle = copy.deepcopy(net)
    objective = OBJECTIVES[name]
    before = net[1].num_batches_tracked.item()
    objective(net, X, y, generator=seeded(4))
    assert net[1].num_batches_tracked.item() == before + 1
    oracle.eval()
    X_adv = objective.attack.maximize(
        lambda Z: F.cross_entropy(oracle(Z), y, reduction="none"),
        objective.attack.ball(X),
        seeded(4),
    )
    oracle.train()(X_adv)
    for buffer, expected in zip(net.buffers(), oracle.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [AdversarialTraining, TRADES])
def test_the_radius_may_differ_between_samples(make, norm):
    net, (X, y) = make_net(), batch(n=6)
    radii = torch.tensor([0.0, 0.125, 0.5, 0.0, 0.125, 0.5], dtype=DOUBLE)

    def loss(eps):
        objective = make(attack=PGD(norm=norm, eps=eps, n_steps=4), objective=CrossEntropy())
        return objective(net, X, y, generator=seeded(1)).loss

    together = loss(radii)
    for eps in (0.0, 0.125, 0.5):
        torch.testing.assert_close(together[radii == eps], loss(eps)[radii == eps])


# --- TRADES ------------------------------------------------------------------------------


def random_logits(seed, n=200):
    return 4 * torch.randn(n, 5, generator=seeded(seed), dtype=DOUBLE)


def test_the_divergence_is_that_of_kullback_and_leibler():
    one, other = random_logits(0), random_logits(1)
    expected = F.kl_div(
        other.log_softmax(1), one.log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    torch.testing.assert_close(divergence(one, other), expected)
    assert (divergence(one, other) > 0).all()


def test_the_divergence_of_equal_predictions_is_zero():
    logits = random_logits(0)
    assert (divergence(logits, logits) == 0).all()
    shifted = divergence(logits, logits + 3)
    torch.testing.assert_close(shifted, torch.zeros(200, dtype=DOUBLE), rtol=0, atol=1e-12)
    assert (divergence(logits, logits + 1e-4 * random_logits(1)) > -1e-15).all()


def test_the_divergence_of_certain_predictions_is_finite():
    certain = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    assert torch.equal(divergence(certain, certain), torch.zeros(2))
    assert torch.isfinite(divergence(certain, certain.flip(1))).all()


@pytest.mark.parametrize("beta", [0.5, 6.0])
@pytest.mark.parametrize("norm", NORMS)
def test_the_loss_is_the_clean_objective_plus_beta_times_the_divergence(norm, beta):
    net, (X, y) = make_net(), batch()
    attack = PGD(norm=norm, eps=0.3, n_steps=5)
    objective = TRADES(attack=attack, objective=CrossEntropy(), beta=beta)
    value = objective(net, X, y, generator=seeded(2))
    clean = net(X).detach()
    X_adv = attack.maximize(lambda Z: divergence(clean, net(Z)), attack.ball(X), seeded(2))
    moved = F.kl_div(
        net(X_adv).log_softmax(1), clean.log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    assert attack.ball(X).contains(X_adv).all()
    assert (moved > 0).all()
    torch.testing.assert_close(value.loss, plain_cross_entropy(clean, y) + beta * moved)
    torch.testing.assert_close(value.logits, clean)


def test_the_gradient_flows_through_both_sides_of_the_divergence():
    net, (X, y) = make_net(), batch()
    attack = PGD(eps=0.3, n_steps=5)
    value = TRADES(attack=attack, objective=CrossEntropy(), beta=2.0)(
        net, X, y, generator=seeded(2)
    )
    clean = net(X).detach()
    X_adv = attack.maximize(lambda Z: divergence(clean, net(Z)), attack.ball(X), seeded(2)).detach()
    log_p, log_q = net(X).log_softmax(1), net(X_adv).log_softmax(1)
    loss = plain_cross_entropy(net(X), y) + 2.0 * (log_p.exp() * (log_p - log_q)).sum(1)
    torch.testing.assert_close(gradient_of(net, value.loss), gradient_of(net, loss))


def test_beta_may_differ_between_samples():
    net, (X, y) = make_net(), batch()
    betas = torch.tensor([0.0, 4.0] * 5, dtype=DOUBLE)

    def loss(beta):
        objective = TRADES(attack=PGD(n_steps=4), objective=CrossEntropy(), beta=beta)
        return objective(net, X, y, generator=seeded(1)).loss

    for beta in (0.0, 4.0):
        torch.testing.assert_close(loss(betas)[betas == beta], loss(beta)[betas == beta])


def test_the_penalty_of_the_clean_objective_is_kept():
    net, (X, y) = make_net(), batch()
    inner = JacobianRegularization(lam=0.3)
    value = TRADES(attack=PGD(n_steps=4), objective=inner)(net, X, y, generator=seeded(1))
    torch.testing.assert_close(value.penalty, jacobian_norm(net, X))


def test_the_gradient_of_the_penalty_is_at_the_running_statistics_of_the_clean_samples():
    net, (X, y) = make_net("batch norm"), batch()
    oracle = copy.deepcopy(net)
    oracle(X)  # the pass of the attacked samples, which comes later, changes them again
    penalty = jacobian_norm(oracle.eval(), X, create_graph=True)

    def gradient(lam):
        own = copy.deepcopy(net)
        objective = TRADES(attack=PGD(n_steps=4), objective=JacobianRegularization(lam=lam))
        # Of the layers that do not move the statistics.
        return gradient_of(own[1:], objective(own, X, y, generator=seeded(1)).loss)

    torch.testing.assert_close(gradient(0.3) - gradient(0), 0.3 * gradient_of(oracle[1:], penalty))


@pytest.mark.parametrize(
    ("norm", "n_projections", "penalty_samples"),
    [
        ("l2", None, np.int64(4)),
        pytest.param("l1", None, 0.25, marks=pytest.mark.slow),
        ("l21", 1, 1),
        pytest.param("l2", None, 1, marks=pytest.mark.slow),
        pytest.param("l1", None, 3, marks=pytest.mark.slow),
        pytest.param("l21", 1, 3, marks=pytest.mark.slow),
    ],
)
def test_a_penalty_on_a_part_of_the_batch_is_unbiased(penalty_samples, norm, n_projections):
    net, (X, y) = make_net("batch norm"), batch(8)
    net[1].momentum = 0.0  # so that the running statistics stay what they are
    objective = JacobianRegularization(
        norm=norm, n_projections=n_projections, penalty_samples=penalty_samples
    )
    modes = [module.training for module in net.modules()]
    n_tracked = int(net[1].num_batches_tracked)
    weight = torch.rand(8, generator=seeded(3), dtype=DOUBLE)
    generator = seeded()
    draws = torch.stack(
        [
            (objective(net, X, y, generator=generator).penalty * weight).sum() / weight.sum()
            for _ in range(2000)
        ]
    )
    exact = (jacobian_norm(net, X, norm=norm) * weight).sum() / weight.sum()
    assert abs(draws.mean() - exact) < 4 * draws.std() / len(draws) ** 0.5
    assert [module.training for module in net.modules()] == modes
    assert int(net[1].num_batches_tracked) == n_tracked + 2000  # the loss's passes alone


@pytest.mark.parametrize(("penalty_samples", "n_penalized"), [(3, 3), (20, 8), (0.5, 4), (1e-9, 1)])
def test_the_penalty_is_taken_on_as_many_samples_as_asked_for(penalty_samples, n_penalized):
    net, (X, y) = make_net(), batch(8)
    objective = JacobianRegularization(penalty_samples=penalty_samples)
    penalty = objective(net, X, y, generator=seeded()).penalty
    chosen = penalty != 0
    assert int(chosen.sum()) == n_penalized
    expected = jacobian_norm(net, X) * 8 / n_penalized
    torch.testing.assert_close(penalty[chosen], expected[chosen])


def test_a_part_as_large_as_the_batch_is_the_whole_penalty():
    net, (X, y) = make_net(), batch(8)
    whole = JacobianRegularization()(net, X, y, generator=seeded())
    part = JacobianRegularization(penalty_samples=1.0)(net, X, y, generator=seeded())
    torch.testing.assert_close(part.loss, whole.loss, rtol=0, atol=0)


def relu_net(hidden_units=(9, 8), n_classes=5, **kwargs):
    with global_seed():
        return MLP(4, n_classes, hidden_units=hidden_units, **kwargs).double().train()


CLASSES = [{"penalty_samples": 6, "class_samples": 2}, {"class_samples": 3}]
PARTS = [
    *((norm, part) for norm in JACOBIAN_NORMS for part in ({}, {"penalty_samples": 4})),
    *((norm, part) for norm in ("l1", "l2") for part in CLASSES),
    *((norm, {"n_projections": 2}) for norm in ("l2", "l21")),
]


@pytest.mark.parametrize(("norm", "part"), PARTS, ids=repr)
@pytest.mark.parametrize("hidden_units", [(), (9,), (9, 8), (160, 150)])
def test_the_joint_pass_of_a_dense_network_agrees_with_backward_passes(hidden_units, norm, part):
    net = relu_net(hidden_units)
    X = torch.rand(40, 4, generator=seeded(1), dtype=DOUBLE)
    y = torch.arange(40) % 5
    weight = torch.linspace(0.1, 1, 40, dtype=DOUBLE)
    values, gradients = [], []
    for engine in ("auto", "loop"):
        objective = JacobianRegularization(lam=0.1, norm=norm, engine=engine, **part)
        value = objective(net, X, y, generator=seeded(2))
        values.append(value)
        gradients.append(gradient_of(net, weight * value.loss))
    for ours, theirs in zip(*values, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("bias", [True, False])
def test_the_joint_pass_leaves_frozen_parameters_alone(bias):
    with global_seed():
        net = nn.Sequential(
            nn.Linear(4, 6), nn.LeakyReLU(), nn.Linear(6, 5, bias=bias), nn.ReLU(), nn.Linear(5, 3)
        ).double()
    net[2].weight.requires_grad_(False)
    gradients = []
    for engine in ("auto", "loop"):
        objective = JacobianRegularization(lam=0.1, engine=engine)
        objective(net, *batch(), generator=seeded()).loss.sum().backward()
        assert net[2].weight.grad is None
        gradients.append([p.grad for p in net.parameters() if p.requires_grad])
        net.zero_grad()
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_loss_and_penalty_share_the_dropout_mask_in_the_joint_pass_too(norm):
    net = relu_net((12,), dropout=0.5)
    X, y = batch()
    with global_seed():
        value = JacobianRegularization(lam=0.1, norm=norm)(net, X, y, generator=seeded())
    with global_seed():
        by_hand = JacobianRegularization(lam=0.1, norm=norm, engine="loop")(
            net, X, y, generator=seeded()
        )
    torch.testing.assert_close(value.logits, by_hand.logits)
    torch.testing.assert_close(value.penalty, by_hand.penalty)


SMALL, LARGE = (6,), (400, 300)


@pytest.mark.parametrize(
    ("norm", "hidden_units"),
    others_slow(
        itertools.product(["l1", "l2", "l21"], [SMALL, LARGE]),
        [("l1", SMALL), ("l2", LARGE), ("l21", SMALL)],
    ),
)
def test_the_automatic_part_is_unbiased_in_value_and_gradient(norm, hidden_units):
    net, y = relu_net(hidden_units), torch.arange(48) % 5
    X = torch.rand(48, 4, generator=seeded(1), dtype=DOUBLE)
    exact = JacobianRegularization(lam=1.0, norm=norm)(net, X, y, generator=seeded())
    expected = torch.autograd.grad(exact.loss.mean(), net[1].weight)[0]
    objective = JacobianRegularization(lam=1.0, norm=norm, penalty_samples="auto")
    generator, penalties, gradients = seeded(), [], []
    for _ in range(800):
        value = objective(net, X, y, generator=generator)
        penalties.append(value.penalty.mean())
        gradients.append(torch.autograd.grad(value.loss.mean(), net[1].weight)[0])
    penalties, gradients = torch.stack(penalties), torch.stack(gradients)
    error = penalties.std() / 800**0.5
    assert error > 0
    assert abs(penalties.mean() - exact.penalty.mean()) < 4 * error
    deviations = (gradients.mean(0) - expected) / (gradients.std(0) / 800**0.5 + 1e-12)
    assert deviations.square().mean() < 2


@pytest.mark.parametrize(("n_samples", "n_penalized"), [(150, 24), (128, 20), (48, 20), (12, 12)])
def test_the_automatic_part_of_a_large_network_is_one_class_of_every_sixth_sample(
    n_samples, n_penalized
):
    net, y = relu_net((400, 300)), torch.arange(n_samples) % 5
    X = torch.rand(n_samples, 4, generator=seeded(1), dtype=DOUBLE)

    def penalty_of(**params):
        objective = JacobianRegularization(**params)
        return objective(net, X, y, generator=seeded()).penalty

    penalty = penalty_of(penalty_samples="auto")
    assert int((penalty > 0).sum()) == n_penalized
    one_class = penalty_of(penalty_samples=n_penalized, class_samples=1)
    torch.testing.assert_close(penalty, one_class, rtol=0, atol=0)
    all_classes = penalty_of(penalty_samples="auto", class_samples=None)
    assert int((all_classes > 0).sum()) == round(max(n_samples // 24 * 4, 20) / 5)


def test_the_automatic_part_of_a_small_network_is_all_of_one_batch_in_three():
    net, (X, y) = relu_net((6,)), batch()
    exact = JacobianRegularization()(net, X, y, generator=seeded()).penalty
    objective, generator = JacobianRegularization(penalty_samples="auto"), seeded()
    penalties = [objective(net, X, y, generator=generator).penalty for _ in range(300)]
    taken = [penalty for penalty in penalties if penalty.any()]
    assert 60 < len(taken) < 140
    for penalty in taken:
        torch.testing.assert_close(penalty, 3 * exact)


def test_lam_may_differ_between_samples_where_a_part_is_penalized():
    net, (X, y) = make_net(), batch()
    lams = torch.linspace(0.1, 1, 10, dtype=DOUBLE)
    objective = JacobianRegularization(lam=lams, penalty_samples=4)
    value = objective(net, X, y, generator=seeded())
    expected = plain_cross_entropy(net(X), y) + lams * value.penalty
    torch.testing.assert_close(value.loss, expected)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_gradient_of_the_loss_can_be_penalized(norm):
    net, (X, y) = make_net(), batch()
    value = JacobianRegularization(lam=0.3, norm=norm, output="loss")(net, X, y, generator=seeded())
    leaf = X.clone().requires_grad_()
    loss = plain_cross_entropy(net(leaf), y)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    norms = gradient.abs().sum(1) if norm == "l1" else gradient.square().sum(1)
    torch.testing.assert_close(value.penalty, norms)
    torch.testing.assert_close(
        gradient_of(net, value.loss), gradient_of(net, loss + 0.3 * norms), rtol=1e-8, atol=1e-10
    )


def test_the_closed_form_of_a_network_with_batch_normalization_is_taken_in_training_too(generator):
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()
    X = torch.randn(12, 4, generator=generator)
    y = torch.randint(3, (12,), generator=generator)
    values = [
        # A copy each: the running statistics change.
        JacobianRegularization(engine=engine)(copy.deepcopy(net), X, y, generator=torch.Generator())
        for engine in ("auto", "closed_form", "loop")
    ]
    for value in values[1:]:
        torch.testing.assert_close(value.loss, values[0].loss)


@pytest.mark.parametrize("penalty_samples", [None, "auto", 2])
@pytest.mark.parametrize("model", [nn.Sequential(), nn.Identity()], ids=["empty", "identity"])
@pytest.mark.parametrize("norm", JACOBIAN_NORMS)
def test_a_model_without_layers_has_the_unit_matrix_as_its_jacobian(norm, model, penalty_samples):
    X, y = torch.eye(3, dtype=torch.float64), torch.arange(3)
    objective = JacobianRegularization(norm=norm, penalty_samples=penalty_samples)
    penalty = objective(model, X, y, generator=seeded()).penalty
    expected = {"spectral": 1.0, "cross_lipschitz": 2.0}.get(norm, 3.0)
    torch.testing.assert_close(penalty.sum() / 3, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("penalty_samples", [None, "auto", 2])
@pytest.mark.parametrize("is_module", [True, False])
def test_a_model_that_returns_no_logits_is_named(is_module, penalty_samples):
    class Two(nn.Module):
        def forward(self, X):
            return X, X

    objective = JacobianRegularization(penalty_samples=penalty_samples)
    model = Two() if is_module else (lambda X: (X, X))
    with pytest.raises(TypeError, match="has type tuple, but expected a tensor of logits"):
        objective(model, torch.eye(3), torch.arange(3), generator=seeded())


def test_parameters_without_a_hash_are_taken_or_named_as_others_are():
    net, (X, y) = make_net(), batch()
    part = JacobianRegularization(penalty_samples=np.array(0.5))
    same = JacobianRegularization(penalty_samples=0.5)
    values = [objective(net, X, y, generator=seeded()).loss for objective in (part, same)]
    torch.testing.assert_close(*values, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"Got norm=\['l2'\], but expected"):
        JacobianRegularization(norm=["l2"])(net, X, y, generator=seeded())


def regularized(**params):
    return JacobianRegularization(**params)


def adversarial(**params):
    return AdversarialTraining(attack=PGD(**params), objective=CrossEntropy())


def trades(beta=6.0, **params):
    return TRADES(attack=PGD(**params), objective=CrossEntropy(), beta=beta)


@pytest.mark.parametrize(
    ("make", "name", "value", "expected"),
    [
        (regularized, "lam", -0.1, "a non-negative finite number"),
        (regularized, "penalty_samples", 0, "an integer of at least 1"),
        (regularized, "penalty_samples", -3, "an integer of at least 1"),
        (regularized, "penalty_samples", 1.5, "a number of samples, a share of them"),
        (regularized, "penalty_samples", "all", "a number of samples, a share of them"),
        (regularized, "interpolation", 0.6, "a number from 0 to 0.5"),
        (regularized, "interpolation", -1, "a number from 0 to 0.5"),
        (adversarial, "step_size", -0.1, "a positive finite number"),
        (adversarial, "loss", "foo", "one of"),
        (adversarial, "feature_scale", "std", "None or an array"),
        (trades, "feature_scale", "range", "None or an array"),
        (trades, "random_start", False, "True for TRADES, whose divergence has no gradient at X"),
        (trades, "beta", -6, "a non-negative finite number"),
    ],
)
def test_parameters_that_make_no_sense_are_named(make, name, value, expected):
    net, (X, y) = make_net("mlp"), batch()
    with pytest.raises(ValueError, match=f"Got {name}={value!r}, but expected {expected}"):
        make(**{name: value})(net, X, y, generator=seeded())


# --- between samples ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2)])
@pytest.mark.parametrize("index", [None, torch.tensor([7, 2, 5])])
def test_interpolated_points_lie_on_the_way_to_others_of_the_batch(index, shape, generator):
    X = torch.randn(10, *shape, generator=generator, dtype=DOUBLE)
    start = X if index is None else X[index]
    for largest in (0.0, 0.2, 0.5):
        points = interpolated(X, index, largest, generator)
        assert points.shape == start.shape
        step = (points - start).flatten(1)
        way = X.flatten(1) - start.flatten(1).unsqueeze(1)  # from each to each of the batch
        length = way.square().sum(2)
        share = (way * step.unsqueeze(1)).sum(2) / length.where(length > 0, 1.0)
        missed = (share.unsqueeze(2) * way - step.unsqueeze(1)).abs().amax(2)
        allowed = (share >= -1e-9) & (share <= largest + 1e-9)
        assert (missed.masked_fill(~allowed, torch.inf).amin(1) < 1e-9).all()


@pytest.mark.parametrize("index", [None, torch.tensor([1, 0])])
def test_the_other_sample_is_another(index):
    X = torch.tensor([[0.0], [1.0]])
    for seed in range(20):
        points = interpolated(X, index, 0.5, seeded(seed))
        assert (points != (X if index is None else X[index])).all()
    alone = X[:1]
    assert torch.equal(interpolated(alone, None, 0.5, seeded()), alone)


@pytest.mark.parametrize("part", [None, 4])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "batch norm"])
@pytest.mark.parametrize("norm", JACOBIAN_NORMS)
def test_between_samples_the_norm_is_that_at_the_points(norm, kind, part):
    net, (X, y) = make_net(kind), batch()
    objective = JacobianRegularization(lam=0.1, norm=norm, penalty_samples=part, interpolation=0.4)
    value = objective(net, X, y, generator=seeded())
    draws = seeded()
    chosen = None if part is None else torch.randperm(10, generator=draws)[:part]
    points = interpolated(X, chosen, 0.4, draws)
    index = torch.arange(10) if part is None else chosen
    expected = torch.zeros(10, dtype=DOUBLE)
    expected[index] = jacobian_norm(net, points, y[index], norm=norm) * 10 / len(index)
    torch.testing.assert_close(value.penalty, expected)
    torch.testing.assert_close(value.logits, net(X))


@pytest.mark.parametrize("class_samples", [None, 1])
@pytest.mark.parametrize("hidden_units", [(6,), (8, 5)])
def test_between_samples_the_joint_pass_agrees_with_backward_passes(hidden_units, class_samples):
    X, y = batch()
    gradients = []
    for engine in ("auto", "loop"):
        with global_seed():
            net = MLP(4, 3, hidden_units=hidden_units).double()
        objective = JacobianRegularization(
            penalty_samples=6, class_samples=class_samples, interpolation=0.5, engine=engine
        )
        gradients.append(gradient_of(net, objective(net, X, y, generator=seeded()).loss))
    torch.testing.assert_close(*gradients)


def test_between_samples_batch_statistics_are_those_of_the_samples():
    X, y = batch()
    net, alone = make_net("batch norm"), make_net("batch norm")
    JacobianRegularization(interpolation=0.5)(net, X, y, generator=seeded())
    alone(X)
    for seen, expected in zip(net.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("objective", [AdversarialTraining, TRADES])
def test_an_inner_maximization_is_one_ascent(objective):
    X, y = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
    ask = lambda attack: objective(attack=attack, objective=CrossEntropy())(  # noqa: E731
        nn.Linear(3, 2), X, y, generator=torch.Generator()
    )
    with pytest.raises(TypeError, match=r"Got attack=APGD\(\), but expected PGD or FGSM"):
        ask(APGD())
    for more in ({"n_restarts": 2}, {"n_targets": 1}):
        with pytest.raises(ValueError, match=r"Got attack=PGD\(.*, but expected n_restarts=1 and"):
            ask(PGD(**more))
