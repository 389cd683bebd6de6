"""Parameters of the optimizer and of batches, checked before a net is made or trained."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from sklearn.utils._param_validation import HasMethods

from skjacobian._validation import check_count, check_flag, did_you_mean, reject

# The parameters of `Batches` that are a user's.
_ITERATOR = {"batch_size": check_count, "shuffle": check_flag, "drop_last": check_flag}


class OptimizerClass(HasMethods):
    """Constraint on a parameter: a subclass of `torch.optim.Optimizer`, not an instance."""

    def __init__(self) -> None:
        super().__init__(["step", "zero_grad"])

    def is_satisfied_by(self, val: Any) -> bool:
        """Tell whether `val` is a class of optimizers."""
        return isinstance(val, type) and issubclass(val, torch.optim.Optimizer)

    def __str__(self) -> str:
        return "a subclass of torch.optim.Optimizer (the class: each fit makes its own)"


def check_optimizer(
    optimizer: type[torch.optim.Optimizer], lr: float, nested: Mapping[str, Any]
) -> None:
    """Raise for values that an optimizer refuses, by making one of a single weight.

    `checked_optimizer_params` raises for the names of parameters that it does not have.
    """
    given = params_of("optimizer", nested)
    groups = _checked_groups(given.pop("param_groups", ()))
    accepted, takes_any = _parameters_of(optimizer)
    own = {name: value for name, value in given.items() if takes_any or name in accepted}
    said = ", ".join(f"optimizer__{name}={value!r}" for name, value in own.items())
    _try(optimizer, {"lr": lr, **own}, said or f"optimizer={optimizer.__name__}")
    for group in groups:
        said = f"optimizer__param_groups={nested['optimizer__param_groups']!r}"
        _try(optimizer, {"lr": lr, **own, **group}, said)


def checked_optimizer_params(
    optimizer: type[torch.optim.Optimizer], nested: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the parameters, without a weight decay of 0 for an optimizer that has none.

    Raise for parameters that it has not, and for one that has another name here.
    """
    accepted, takes_any = _parameters_of(optimizer)
    options = [name for name in (*accepted, "param_groups") if name not in ("params", "lr")]
    checked = dict(nested)
    if "weight_decay" not in options and not takes_any and not nested["optimizer__weight_decay"]:
        del checked["optimizer__weight_decay"]
    for name, value in params_of("optimizer", checked).items():
        if name == "lr":
            reject("optimizer__lr", value, "the learning rate as lr")
        if name not in options and not takes_any:
            hint = did_you_mean(name, options)
            reject(f"optimizer__{name}", value, f"a parameter of {optimizer.__name__}{hint}")
    return checked


def check_iterators(nested: Mapping[str, Any]) -> None:
    """Raise for parameters of iterators that batches do not have."""
    for part in ("iterator_train", "iterator_valid"):
        for name, value in params_of(part, nested).items():
            if name not in _ITERATOR:
                options = ", ".join(_ITERATOR)
                reject(f"{part}__{name}", value, f"one of {options}{did_you_mean(name, _ITERATOR)}")
            _ITERATOR[name](f"{part}__{name}", value)


def _parameters_of(optimizer: type[torch.optim.Optimizer]) -> tuple[list[str], bool]:
    """Return the names of the parameters that an optimizer has, and whether it takes others."""
    parameters = inspect.signature(optimizer).parameters
    return list(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def params_of(part: str, nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a part of the net, by their own names."""
    prefix = f"{part}__"
    return {n.removeprefix(prefix): v for n, v in nested.items() if n.startswith(prefix)}


def _checked_groups(groups: Any) -> list[dict[str, Any]]:
    """Return the parameters of each group, without the patterns of names."""
    pairs = list(groups) if isinstance(groups, list | tuple) else [groups]
    for pair in pairs:
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not (is_pair and isinstance(pair[0], str) and isinstance(pair[1], dict)):
            expected = "a list of pairs (pattern of names, dict of parameters)"
            reject("optimizer__param_groups", groups, expected)
    return [group for _, group in pairs]


def _try(optimizer: type[torch.optim.Optimizer], params: dict[str, Any], said: str) -> None:
    weight = torch.zeros(1, 1, requires_grad=True)
    try:
        optimizer([weight], **params)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"Got {said}, but expected parameters that {optimizer.__name__} takes: {error}"
        ) from error
