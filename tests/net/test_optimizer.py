"""Adam takes torch's steps, bit for bit, whichever way it takes them."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from skjacobian._net.optimizer import Adam

N_STEPS = 20
BOTH = (torch.optim.Adam, Adam)


def network(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(generator=generator)
    return net


def loss_of(net, step):
    weight = next(net.parameters())
    generator = torch.Generator().manual_seed(step)
    X = torch.randn(8, 5, generator=generator, dtype=weight.dtype)
    return net(X).square().sum(1).mean()


def train(net, optimizer, steps=range(N_STEPS)):
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
    return net


def assert_equal_weights(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"lr": 0.1},
        {"lr": torch.tensor(0.1)},
        {"weight_decay": 0.1},
        {"betas": (0.5, 0.9), "eps": 1e-3},
        {"amsgrad": True},
        {"maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    ids=str,
)
def test_the_weights_are_those_of_torchs_fused_adam(params, dtype):
    nets = [network(dtype) for _ in BOTH]
    for cls, net in zip(BOTH, nets, strict=True):
        train(net, cls(net.parameters(), fused=True, **params))
    assert_equal_weights(*nets)


@pytest.mark.parametrize("params", [{"fused": False}, {"fused": False, "foreach": True}])
def test_without_the_fused_kernel_the_weights_are_those_of_torch(params):
    nets = [network() for _ in BOTH]
    for cls, net in zip(BOTH, nets, strict=True):
        train(net, cls(net.parameters(), **params))
    assert_equal_weights(*nets)


def test_each_parameter_group_has_its_own_settings():
    nets = [network() for _ in BOTH]
    for cls, net in zip(BOTH, nets, strict=True):
        groups = [
            {"params": net[0].parameters(), "lr": 0.1, "betas": (0.5, 0.9)},
            {"params": net[2].parameters(), "weight_decay": 0.3},
        ]
        train(net, cls(groups, lr=0.01, fused=True))
    assert_equal_weights(*nets)


def test_a_group_may_be_added_between_steps():
    nets = [network() for _ in BOTH]
    for cls, net in zip(BOTH, nets, strict=True):
        optimizer = cls(net[0].parameters(), lr=0.1, fused=True)
        train(net, optimizer, range(5))
        optimizer.add_param_group({"params": net[2].parameters(), "lr": 0.2})
        train(net, optimizer, range(5, 10))
    assert_equal_weights(*nets)


@pytest.mark.parametrize("frozen", [range(3), range(3, 6), range(0, 10, 2)], ids=str)
def test_a_parameter_without_a_gradient_is_left_alone_and_does_not_age(frozen):
    nets = [network() for _ in BOTH]
    for cls, net in zip(BOTH, nets, strict=True):
        optimizer = cls(net.parameters(), lr=0.1, fused=True)
        for step in range(10):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            if step in frozen:
                net[0].weight.grad = None
            optimizer.step()
    assert_equal_weights(*nets)


@pytest.mark.parametrize("without", [slice(0, 1), slice(0, 2)], ids=["one group", "all groups"])
def test_a_group_without_any_gradient_is_left_alone(without):
    nets = [network() for _ in BOTH]
    for cls, net in zip(BOTH, nets, strict=True):
        parts = [net[0], net[2]]
        optimizer = cls([{"params": part.parameters()} for part in parts], lr=0.1, fused=True)
        for part in parts[without]:
            part.requires_grad_(False)
        (loss_of(net, 0) + sum(p.sum() for p in net.parameters()) * 0).requires_grad_().backward()
        optimizer.step()
    assert_equal_weights(*nets)
    assert torch.equal(nets[1][0].weight, network()[0].weight)


@pytest.mark.parametrize(("first", "second"), [BOTH, BOTH[::-1]])
def test_either_goes_on_from_a_state_of_the_other(first, second):
    wanted, net = network(), network()
    train(wanted, torch.optim.Adam(wanted.parameters(), lr=0.1, fused=True))
    optimizer = first(net.parameters(), lr=0.1, fused=True)
    train(net, optimizer, range(N_STEPS // 2))
    successor = second(net.parameters(), lr=0.1, fused=True)
    successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, successor, range(N_STEPS // 2, N_STEPS))
    assert_equal_weights(net, wanted)


def test_the_state_is_that_of_torch():
    states = []
    for cls in BOTH:
        net = network()
        optimizer = cls(net.parameters(), fused=True)
        train(net, optimizer)
        states.append(optimizer.state_dict())
    theirs, ours = states
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    nets, losses = [network() for _ in BOTH], []
    for cls, net in zip(BOTH, nets, strict=True):
        optimizer = cls(net.parameters(), lr=0.1, fused=True)

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(net, 0)
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append([float(optimizer.step(closure)) for _ in range(3)])
    assert losses[0] == losses[1]
    assert_equal_weights(*nets)


def test_step_hooks_are_called_once_a_step():
    net, called = network(), []
    # torch wraps the step of its class when it makes the first instance of it.
    torch.optim.Adam(net.parameters())
    optimizer = Adam(net.parameters())
    before = optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    after = optimizer.register_step_post_hook(lambda *_: called.append("after"))
    train(net, optimizer, range(2))
    assert called == ["before", "after"] * 2
    before.remove()
    after.remove()
    train(net, optimizer, range(1))
    assert len(called) == 4


def test_step_hooks_of_all_optimizers_are_called():
    net, called = network(), []
    hook = register_optimizer_step_post_hook(lambda *_: called.append("after"))
    try:
        train(net, Adam(net.parameters()), range(2))
    finally:
        hook.remove()
    assert called == ["after"] * 2


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=N_STEPS),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=3),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=N_STEPS
        ),
    ],
    ids=["cosine", "steps", "one cycle"],
)
def test_learning_rate_schedules_work(schedule):
    nets = [network() for _ in BOTH]
    for cls, net in zip(BOTH, nets, strict=True):
        optimizer = cls(net.parameters(), lr=0.1, fused=True)
        scheduler = schedule(optimizer)
        for step in range(N_STEPS):
            train(net, optimizer, [step])
            scheduler.step()
    assert_equal_weights(*nets)


def test_a_scaled_loss_is_unscaled_before_the_step():
    nets = [network() for _ in BOTH]
    for cls, net in zip(BOTH, nets, strict=True):
        optimizer = cls(net.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(5):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, step)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_equal_weights(*nets)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_forgotten_or_set_to_zero(set_to_none):
    net = network()
    optimizer = Adam(net.parameters())
    loss_of(net, 0).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    for parameter in net.parameters():
        if set_to_none:
            assert parameter.grad is None
        else:
            assert not parameter.grad.any()


@pytest.mark.cuda
def test_the_weights_are_those_of_torchs_fused_adam_on_cuda():
    nets = [nn.Linear(5, 3, device="cuda") for _ in BOTH]
    nets[1].load_state_dict(nets[0].state_dict())
    X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).to("cuda")
    for cls, net in zip(BOTH, nets, strict=True):
        optimizer = cls(net.parameters(), lr=0.1, weight_decay=0.1, fused=True)
        for _ in range(N_STEPS):
            optimizer.zero_grad()
            net(X).square().mean().backward()
            optimizer.step()
    assert_equal_weights(*nets)
