"""How a net is made from a seed and a user's settings, and how it is trained."""

from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import torch
from skorch.callbacks import Callback
from skorch.dataset import Dataset as SkorchDataset
from skorch.helper import predefined_split
from torch import nn

from skjacobian._net.batches import Batches, Samples
from skjacobian._net.callbacks import (
    OWN_LR,
    CosineSchedule,
    begin_schedules,
    check_made_callbacks,
    is_callback,
)
from skjacobian._net.objective_net import ObjectiveNet
from skjacobian._net.optimizer import Adam
from skjacobian._net.params import checked_optimizer_params
from skjacobian._rng import RandomStream
from skjacobian._validation import reject
from skjacobian.objectives import Objective

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
LR_SCHEDULES = ("constant", "cosine")

# One fused kernel for all parameters, as in our own Adam: a fifth of a small network's step.
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


class ScoredSamples(Samples, SkorchDataset):
    """Samples whose X and y callbacks of skorch find, to score them without the cache.

    Parameters
    ----------
    samples : Samples
    """

    def __init__(self, samples: Samples) -> None:
        super().__init__(samples.X, samples.y, samples.sample_weight)


def make_net(
    module: Callable[[], nn.Module],
    *,
    seed: int,
    device: torch.device,
    n_classes: int,
    optimizer: str | type[torch.optim.Optimizer],
    nested: dict[str, Any],
) -> ObjectiveNet:
    """Make an initialized net, in eval mode, whose every random draw follows from `seed`.

    `nested` holds the parameters of optimizer, iterators and callbacks in skorch's
    spelling, `optimizer__betas` and so on.
    """
    optimizer_class = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    nested = checked_optimizer_params(optimizer_class, nested)
    groups = nested.get("optimizer__param_groups")
    order = torch.Generator().manual_seed(seed)
    defaults = {"iterator_train__shuffle": True, "iterator_train__generator": order}
    by_loops = nested.get("optimizer__foreach") or nested.get("optimizer__differentiable")
    if optimizer_class in _FUSED and not by_loops:
        defaults["optimizer__fused"] = True
    if groups is not None:
        nested["optimizer__param_groups"] = _with_own_rates(groups)
    net = ObjectiveNet(
        module,
        stream=RandomStream(seed, device),
        generator=torch.Generator().manual_seed(seed),
        optimizer=optimizer_class,
        iterator_train=Batches,
        iterator_valid=Batches,
        train_split=None,
        classes=list(range(n_classes)),
        device=device,
        verbose=0,
        **{**defaults, **nested},
    ).initialize()
    _check_patterns(net, groups or [])
    net._set_training(False)
    return net


def _with_own_rates(groups: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Return groups of parameters in which schedules find the learning rates of their own."""
    return [
        (pattern, {**given, OWN_LR: given["lr"]} if "lr" in given else given)
        for pattern, given in groups
    ]


def _check_patterns(net: ObjectiveNet, groups: list[tuple[str, dict[str, Any]]]) -> None:
    """Raise for a group of parameters that no parameter is in."""
    names = [name for name, _ in net.module_.named_parameters()]
    for pattern, _ in groups:
        if not any(fnmatch(name, pattern) for name in names):
            expected = f"patterns of the names of parameters: {', '.join(names)}"
            reject("optimizer__param_groups", pattern, expected)


def train(
    net: ObjectiveNet,
    samples: Samples,
    validation: Samples | None,
    *,
    objective: Objective,
    epochs: int,
    lr: float,
    lr_schedule: str,
    batch_size: int,
    callbacks: list[Any],
    verbose: int,
) -> None:
    """Train for `epochs` more, with the settings given now and the weights as they are.

    Between fits the net is in eval mode, as views of it, attacks and users expect.
    """
    net.objective = objective
    net.batch_size, net.verbose = batch_size, verbose
    net.train_split = None
    if validation is not None:
        net.train_split = predefined_split(ScoredSamples(validation))
    for group in net.optimizer_.param_groups:
        group["lr"] = group.get(OWN_LR, lr)
        group.pop("initial_lr", None)  # that of a scheduler before
    n_batches = len(net.get_iterator(samples, training=True))
    if n_batches == 0:
        expected = (
            f"at most {len(samples)}, the number of samples, where drop_last leaves out the rest"
        )
        reject("batch_size", batch_size, expected)
    schedule: list[tuple[str, Callback]] = []
    if lr_schedule == "cosine":
        schedule = [("lr_schedule", CosineSchedule(lr, epochs * n_batches))]
    if not all(map(is_callback, callbacks)):
        expected = "a sequence of skorch callbacks, or of pairs (name, callback)"
        reject("callbacks", callbacks, expected)
    net.callbacks = [*schedule, *callbacks]
    net._initialize_callbacks()
    check_made_callbacks(net, lr_schedule)
    begin_schedules(net)
    net.max_epochs = epochs
    try:
        net.partial_fit(ScoredSamples(samples))
    finally:
        net._set_training(False)
