import pytest
import torch
from torch import nn

from skjacobian.model_modes import (
    batch_norm_in_eval,
    differentiable_recurrence,
    frozen,
    normalized_inputs,
    statistics_following,
    trains_norms,
)


def mixed_net():
    """A net in training mode with one submodule in eval mode and one frozen parameter."""
    net = nn.Sequential(
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)),
        nn.Linear(4, 2),
    )
    net[2].eval()
    net[0].weight.requires_grad_(False)
    return net


def state(net):
    modes = [module.training for module in net.modules()]
    return modes, [parameter.requires_grad for parameter in net.parameters()]


@pytest.mark.parametrize("context", [frozen, batch_norm_in_eval])
def test_modes_and_requires_grad_are_restored(context):
    net = mixed_net()
    before = state(net)
    with context(net):
        assert state(net) != before
    assert state(net) == before


@pytest.mark.parametrize("context", [frozen, batch_norm_in_eval])
def test_modes_and_requires_grad_are_restored_after_an_error(context):
    net = mixed_net()
    before = state(net)
    with pytest.raises(ZeroDivisionError, match="division"), context(net):
        raise ZeroDivisionError("division")
    assert state(net) == before


@pytest.mark.parametrize("context", [frozen, differentiable_recurrence])
@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM, nn.Linear])
def test_only_recurrent_layers_are_without_cudnn_and_for_a_while(layer, context):
    with context(nn.Sequential(nn.Sequential(layer(3, 4)))):
        assert torch.backends.cudnn.enabled == (layer is nn.Linear)
    assert torch.backends.cudnn.enabled
    with pytest.raises(ZeroDivisionError, match="division"), context(layer(3, 4)):
        raise ZeroDivisionError("division")
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("context", [frozen, batch_norm_in_eval])
def test_contexts_nest(context):
    net = mixed_net()
    before = state(net)
    with context(net):
        inside = state(net)
        with context(net):
            assert state(net) == inside
        assert state(net) == inside
    assert state(net) == before


@pytest.mark.parametrize("context", [frozen, batch_norm_in_eval])
@pytest.mark.parametrize("model", [lambda X: X, None])
def test_what_is_no_module_is_left_alone(context, model):
    with context(model):
        assert not trains_norms(model)


def test_a_frozen_module_is_in_eval_mode_and_needs_no_gradient():
    net = mixed_net()
    with frozen(net):
        assert not any(module.training for module in net.modules())
        assert not any(parameter.requires_grad for parameter in net.parameters())


def test_only_batch_normalization_is_put_in_eval_mode():
    net = mixed_net().train()
    with batch_norm_in_eval(net):
        norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm1d)]
        others = [module for module in net.modules() if not isinstance(module, nn.BatchNorm1d)]
        assert not any(module.training for module in norms)
        assert all(module.training for module in others)
        assert not trains_norms(net)


@pytest.mark.parametrize("tracks", [True, False])
def test_instance_normalization_is_put_in_eval_mode_if_it_keeps_statistics(tracks):
    net = nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=tracks)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert trains_norms(net) is tracks
    with batch_norm_in_eval(net):
        assert net[0].training is not tracks
        assert not trains_norms(net)
        net(torch.randn(3, 2, 4, 4))
    assert net[0].training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4)])
def test_batch_normalization_is_trained_in_training_mode_only(norm):
    net = nn.Sequential(nn.Linear(3, 4), norm)
    assert trains_norms(net.train())
    assert not trains_norms(net.eval())


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Dropout()])
def test_other_layers_have_no_statistics_to_train(norm):
    assert not trains_norms(nn.Sequential(nn.Linear(3, 4), norm).train())


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalization_without_running_statistics_is_refused(training):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    net.train(training)
    before = state(net)
    with (
        pytest.raises(ValueError, match=r"track_running_stats=False.*mixes the samples"),
        batch_norm_in_eval(net),
    ):
        pass
    assert state(net) == before


def test_batch_normalization_in_eval_leaves_its_statistics_alone():
    net = mixed_net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with batch_norm_in_eval(net):
        net(torch.randn(5, 3))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_pass_in_training_mode_does_not_change_gradients_of_graphs_made_in_eval():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    X = 3 * torch.randn(5, 3, dtype=torch.float64) + 1
    with batch_norm_in_eval(net):
        before, after = net(X).sum(), net(X).sum()
    (expected,) = torch.autograd.grad(before, net[0].weight)
    net(X)
    (gradient,) = torch.autograd.grad(after, net[0].weight)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_lazy_normalization_is_sized_in_eval():
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))
    with batch_norm_in_eval(net):
        net(torch.ones(5, 3))
    assert net.training
    assert net[1].running_mean.shape == (4,)


def test_following_statistics_change_no_value_and_leave_the_parameters_alone():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    parameters, X = dict(net.named_parameters()), torch.randn(5, 3)
    with normalized_inputs(net) as inputs:
        net(X)
    with batch_norm_in_eval(net):
        expected = net(X)
    with statistics_following(inputs), batch_norm_in_eval(net):
        torch.testing.assert_close(net(X), expected, rtol=0, atol=0)
    assert all(parameters[name] is value for name, value in net.named_parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_the_inputs_of_every_call_of_a_layer_are_recorded():
    norm, low, high = nn.BatchNorm1d(2), torch.zeros(3, 2), torch.ones(3, 2)
    with normalized_inputs(norm) as inputs:
        norm(low), norm(input=high)
    assert inputs == {norm: [low, high]}


@pytest.mark.parametrize("n_calls", [1, 2])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 2, 2)])
def test_gradients_by_the_inputs_are_those_of_the_moments(shape, n_calls):
    """γ√(σ̄²/σ²) and β - γ/s·(μ - μ̄), bars and s constant, of which the mean over calls is taken."""
    norm = (nn.BatchNorm1d if len(shape) < 4 else nn.BatchNorm2d)(3, eps=0.1).double()
    nn.init.normal_(norm.weight)
    calls = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(n_calls)]
    v, w = torch.randn(2, 3, dtype=torch.float64)
    with normalized_inputs(norm) as inputs:
        for X in calls:
            norm(X)
    with statistics_following(inputs):
        gradients = torch.autograd.grad(v @ norm.weight + w @ norm.bias, calls)
    for X, gradient in zip(calls, gradients, strict=True):
        values = X.transpose(0, 1).flatten(1)
        variance, mean = values.var(1, correction=0) + 0.1, values.mean(1)
        scale = norm.weight.detach() * (variance.detach() / variance).sqrt()
        shift = -norm.weight.detach() / (norm.running_var + 0.1).sqrt() * mean
        (expected,) = torch.autograd.grad((v @ scale + w @ shift) / n_calls, X)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2, affine=False), nn.LayerNorm(2)]
)
def test_no_moments_are_recorded_where_no_statistics_could_follow(norm):
    with normalized_inputs(norm) as inputs:
        norm(torch.randn(3, 2))
    assert not inputs
    with statistics_following(inputs):
        pass
