"""Callbacks of our own, and checks of a user's: what would do nothing, or fail an epoch later."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from skorch import NeuralNet, NeuralNetClassifier
from skorch.callbacks import Callback, EarlyStopping, LRScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from skjacobian._net.objective_net import ObjectiveNet
from skjacobian._net.params import params_of
from skjacobian._validation import did_you_mean, reject

# The key of a group of parameters whose learning rate is not that of the others.
OWN_LR = "own_lr"

# What is recorded of the data that early stopping holds out.
VALIDATED = ("valid_loss", "valid_accuracy", "valid_score")


class CosineSchedule(Callback):
    """Lets the learning rate fall from `lr` to 0 along half a cosine, batch by batch.

    Step by step, not epoch by epoch: over three epochs the latter would end at a quarter
    of `lr`, where the noise of a penalty on samples still shows in the weights.

    Parameters
    ----------
    lr : float
    n_steps : int
    """

    def __init__(self, lr: float, n_steps: int) -> None:
        self.lr = lr
        self.n_steps = n_steps

    def on_train_begin(self, net: NeuralNetClassifier, **kwargs: Any) -> None:
        """Start at `lr`."""
        self.step_ = 0

    def on_batch_begin(
        self, net: NeuralNetClassifier, training: bool = True, **kwargs: Any
    ) -> None:
        """Set the learning rate of the step that comes."""
        if training:
            share = (1 + math.cos(math.pi * self.step_ / self.n_steps)) / 2
            for group in net.optimizer_.param_groups:
                group["lr"] = share * group.get(OWN_LR, self.lr)
            self.step_ += 1

    def on_epoch_end(self, net: NeuralNetClassifier, **kwargs: Any) -> None:
        """Record the learning rate that the epoch ended with."""
        net.history.record("lr", net.optimizer_.param_groups[-1]["lr"])


class ValidationScores(Callback):
    """Records validation accuracy, and a score where asked, after each epoch.

    Parameters
    ----------
    score : callable
        Takes nothing, returns the epoch's scores by name.
    """

    def __init__(self, score: Callable[[], dict[str, float]]) -> None:
        self.score = score

    def on_epoch_end(self, net: ObjectiveNet, **kwargs: Any) -> None:
        """Record the scores."""
        with net.drawing():
            scores = self.score()
        for name, value in scores.items():
            net.history.record(name, value)


def early_stopping(monitor: str, patience: int) -> tuple[str, Callback]:
    """Stop when `monitor` has not improved for `patience` epochs; restore the best."""
    stop = EarlyStopping(
        monitor=monitor, patience=patience, threshold=0, lower_is_better=False, load_best=True
    )
    return "early_stopping", stop


def begin_schedules(net: ObjectiveNet) -> None:
    """Let schedulers of skorch begin where training does, not at the epochs of fits before.

    There torch asks for the learning rate that those began with, and some steps are taken twice.
    """
    for _, callback in net.callbacks_:
        if isinstance(callback, LRScheduler) and callback.policy_ is not ReduceLROnPlateau:
            vars(callback).setdefault("last_epoch", -1)


def is_callback(given: Any) -> bool:
    """Tell whether something is a callback, its class, or such or None with a name."""
    name, callback = _name_and_callback(given)
    is_class = isinstance(callback, type) and issubclass(callback, Callback)
    return is_class or isinstance(callback, Callback) or (name is not None and callback is None)


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
    for name, value in params_of("callbacks", nested).items():
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


def check_made_callbacks(net: NeuralNet, lr_schedule: str) -> None:
    """Raise for callbacks that would do nothing or fail, and parameters of none."""
    for _, callback in net.callbacks_:
        if isinstance(callback, LRScheduler) and lr_schedule != "constant":
            raise ValueError(
                f"Got an LRScheduler in callbacks and lr_schedule={lr_schedule!r}, but "
                "expected lr_schedule='constant': both set the learning rate."
            )
        monitor = getattr(callback, "monitor", None)
        if net.train_split is None and str(monitor).removesuffix("_best") in VALIDATED:
            raise ValueError(
                f"Got {type(callback).__name__}(monitor={monitor!r}) in callbacks, but "
                "expected early_stopping=True, which holds out data, or another monitor."
            )
    names = [name for name, _ in net.callbacks_]
    for parameter in net.get_params_for("callbacks"):
        name = parameter.split("__")[0]
        if name not in names and name != "print_log":
            value = getattr(net, f"callbacks__{parameter}")
            hint = did_you_mean(name, names)
            reject(f"callbacks__{parameter}", value, f"one of {', '.join(names)}{hint}")


def _name_and_callback(given: Any) -> tuple[Any, Any]:
    """Return both of a pair; what is no pair has no name."""
    is_pair = isinstance(given, tuple | list) and len(given) == 2
    return (given[0], given[1]) if is_pair else (None, given)


def _has_hooks(given: Any) -> bool:
    return hasattr(given, "on_train_begin")


def _made(callbacks: Sequence[Any], nested: Mapping[str, Any]) -> Iterator[Any]:
    """Yield copies of the callbacks with the parameters that `callbacks__…` sets."""
    for given in callbacks:
        name, callback = _name_and_callback(given)
        if not _has_hooks(callback):  # None, or what `train` refuses
            continue
        made = callback() if isinstance(callback, type) else copy.copy(callback)
        name = type(made).__name__ if name is None else name
        made.set_params(**params_of(f"callbacks__{name}", nested))
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
