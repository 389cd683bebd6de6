"""What is handed on to skorch and torch, checked before a net is made or trained."""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from sklearn.utils._param_validation import HasMethods

from skjacobian._validation import check_count, check_flag, did_you_mean, reject

# The parameters of `Batches` that are a user's.
_ITERATOR = {"batch_size": check_count, "shuffle": check_flag, "drop_last": check_flag}

# What is recorded of the data that early stopping holds out.
VALIDATED = ("valid_loss", "valid_accuracy", "valid_score")


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
    given = _params_of("optimizer", nested)
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
    for name, value in _params_of("optimizer", checked).items():
        if name == "lr":
            reject("optimizer__lr", value, "the learning rate as lr")
        if name not in options and not takes_any:
            hint = did_you_mean(name, options)
            reject(f"optimizer__{name}", value, f"a parameter of {optimizer.__name__}{hint}")
    return checked


def check_iterators(nested: Mapping[str, Any]) -> None:
    """Raise for parameters of iterators that batches do not have."""
    for part in ("iterator_train", "iterator_valid"):
        for name, value in _params_of(part, nested).items():
            if name not in _ITERATOR:
                options = ", ".join(_ITERATOR)
                reject(f"{part}__{name}", value, f"one of {options}{did_you_mean(name, _ITERATOR)}")
            _ITERATOR[name](f"{part}__{name}", value)


def check_callbacks(
    callbacks: Sequence[Any], nested: Mapping[str, Any], *, recorded: Sequence[str]
) -> None:
    """Raise for callbacks that would watch or score what there is not.

    Parameters
    ----------
    callbacks : sequence of callbacks, their classes, or pairs (name, callback)
    nested : mapping
        Parameters in skorch's spelling.
    recorded : sequence of str
        What the history has of each epoch, but for what callbacks record.
    """
    for name, value in _params_of("callbacks", nested).items():
        if "__" not in name and not _has_hooks(value):
            reject(f"callbacks__{name}", value, "a skorch callback")
    made = list(_made(callbacks, nested))
    if "valid_loss" not in recorded:
        for callback in made:
            _check_scores_training_data(callback)
    # What callbacks of a user's own record, nobody knows.
    if all(type(callback).__module__.startswith("skorch.") for callback in made):
        names = {*recorded, *(name for callback in made for name in _recorded_by(callback))}
        for callback in made:
            _check_monitor(callback, sorted(names))


def _parameters_of(optimizer: type[torch.optim.Optimizer]) -> tuple[list[str], bool]:
    """Return the names of the parameters that an optimizer has, and whether it takes others."""
    parameters = inspect.signature(optimizer).parameters
    return list(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _params_of(part: str, nested: Mapping[str, Any]) -> dict[str, Any]:
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


def _has_hooks(given: Any) -> bool:
    return hasattr(given, "on_train_begin")


def _made(callbacks: Sequence[Any], nested: Mapping[str, Any]) -> Iterator[Any]:
    """Yield copies of the callbacks with the parameters that `callbacks__…` sets."""
    for given in callbacks:
        pair = isinstance(given, tuple | list) and len(given) == 2
        name, callback = given if pair else (None, given)
        if not _has_hooks(callback):  # None, or what `train` refuses
            continue
        made = callback() if isinstance(callback, type) else copy.copy(callback)
        name = type(made).__name__ if name is None else name
        made.set_params(**_params_of(f"callbacks__{name}", nested))
        yield made


def _check_scores_training_data(callback: Any) -> None:
    """Raise if a callback scores data that is held out, of which there is none."""
    if hasattr(callback, "scoring") and not callback.on_train:
        raise ValueError(
            f"Got {type(callback).__name__}({callback.scoring!r}) in callbacks, but expected "
            "early_stopping=True, which holds out data, or on_train=True."
        )


def _recorded_by(callback: Any) -> Iterator[str]:
    """Yield the names that a callback of skorch's gives to what it adds to the history."""
    if event := getattr(callback, "event_name", None):
        yield event
    if hasattr(callback, "on_train"):
        name = callback.initialize().name_ if hasattr(callback, "scoring") else callback.name
        yield from (name, f"{name}_best")


def _check_monitor(callback: Any, names: Sequence[str]) -> None:
    """Raise if a callback watches what is not among `names`."""
    monitor = getattr(callback, "monitor", None)
    if not isinstance(monitor, str) or monitor in names:
        return
    if "valid_loss" not in names and monitor.removesuffix("_best") in VALIDATED:
        return  # the net says what holds out data
    raise ValueError(
        f"Got {type(callback).__name__}(monitor={monitor!r}) in callbacks, but expected one of "
        f"{', '.join(names)}{did_you_mean(monitor, names)}."
    )
