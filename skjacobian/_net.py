"""The skorch net that trains on an objective. The only file that imports skorch."""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatch
from types import TracebackType
from typing import Any

import numpy as np
import torch
from skorch import NeuralNet, NeuralNetClassifier
from skorch.callbacks import (
    Callback,
    EarlyStopping,
    EpochTimer,
    LRScheduler,
    PassthroughScoring,
    PrintLog,
)
from skorch.dataset import Dataset as SkorchDataset
from skorch.helper import predefined_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from skjacobian._batches import Batch, Batches, Samples
from skjacobian._net_params import VALIDATED, checked_optimizer_params
from skjacobian._optimizer import Adam
from skjacobian._rng import RandomStream, numpy_seeded
from skjacobian._validation import did_you_mean, reject
from skjacobian.exceptions import TrainingDivergedError
from skjacobian.losses import cross_entropy
from skjacobian.modules import may_draw
from skjacobian.objectives import CrossEntropy, Objective

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
LR_SCHEDULES = ("constant", "cosine")

# One fused kernel for all parameters, as in our own Adam: a fifth of a small network's step.
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)

# The key of a group of parameters whose learning rate is not that of the others.
OWN_LR = "own_lr"

# The name under which other files speak of any skorch net.
SkorchNet = NeuralNet


class ScoredSamples(Samples, SkorchDataset):
    """Samples whose X and y callbacks of skorch find, to score them without the cache.

    Parameters
    ----------
    samples : Samples
    """

    def __init__(self, samples: Samples) -> None:
        super().__init__(samples.X, samples.y, samples.sample_weight)


class ObjectiveNet(NeuralNetClassifier):
    """A skorch classifier whose training loss is one of our objectives.

    Parameters
    ----------
    module : callable
        Makes the `nn.Module`.
    stream : RandomStream
        What initialization and dropout draw from.
    generator : torch.Generator
        What the objective draws from. The order of samples has another: how much it draws
        depends on their number, and a sample of weight 2 must act like two samples.
    **kwargs
        As `skorch.NeuralNetClassifier` takes them.
    """

    last_good_weights_: dict[str, Any]

    def __init__(
        self,
        module: Callable[..., nn.Module],
        *,
        stream: RandomStream,
        generator: torch.Generator,
        **kwargs: Any,
    ) -> None:
        super().__init__(module, criterion=nn.CrossEntropyLoss, **kwargs)
        self.objective: Objective = CrossEntropy()
        self.stream = stream
        self.generator = generator

    def get_default_callbacks(self) -> list[tuple[str, Callback]]:
        """Return skorch's own record keepers, with a column for the penalty."""
        callbacks = [
            ("epoch_timer", EpochTimer()),
            ("train_loss", PassthroughScoring("train_loss", on_train=True)),
            ("train_penalty", PassthroughScoring("train_penalty", None, on_train=True)),
            ("valid_loss", PassthroughScoring("valid_loss")),
        ]
        return [*callbacks, ("print_log", PrintLog())] if self.verbose else callbacks

    def notify(self, method_name: str, **cb_kwargs: Any) -> None:
        """Call a hook of the net and of those callbacks that have something to do there."""
        getattr(self, method_name)(self, **cb_kwargs)
        no_op = getattr(Callback, method_name)
        for _, callback in self.callbacks_:
            if getattr(type(callback), method_name, None) is not no_op:
                getattr(callback, method_name)(self, **cb_kwargs)

    def check_callbacks(self, lr_schedule: str) -> None:
        """Raise for callbacks that would do nothing or fail, and parameters of none."""
        for _, callback in self.callbacks_:
            if isinstance(callback, LRScheduler) and lr_schedule != "constant":
                raise ValueError(
                    f"Got an LRScheduler in callbacks and lr_schedule={lr_schedule!r}, but "
                    "expected lr_schedule='constant': both set the learning rate."
                )
            monitor = getattr(callback, "monitor", None)
            if self.train_split is None and str(monitor).removesuffix("_best") in VALIDATED:
                raise ValueError(
                    f"Got {type(callback).__name__}(monitor={monitor!r}) in callbacks, but "
                    "expected early_stopping=True, which holds out data, or another monitor."
                )
        names = [name for name, _ in self.callbacks_]
        for parameter in self.get_params_for("callbacks"):
            name = parameter.split("__")[0]
            if name not in names and name != "print_log":
                value = getattr(self, f"callbacks__{parameter}")
                hint = did_you_mean(name, names)
                reject(f"callbacks__{parameter}", value, f"one of {', '.join(names)}{hint}")

    def check_data(self, X: Any, y: Any = None) -> None:
        """Do nothing: the estimator has checked the data."""

    def get_dataset(self, X: Any, y: Any = None) -> Samples:
        """Return samples as they are; what a callback predicts has no labels."""
        if isinstance(X, Samples):
            return X
        X = torch.as_tensor(X)
        return Samples(
            X, X.new_zeros(len(X), dtype=torch.long) if y is None else torch.as_tensor(y)
        )

    def initialize_module(self) -> "ObjectiveNet":
        """Make the module from the private random stream.

        What it draws from the generators of numpy or Python it draws again when a pickle makes
        it anew.
        """
        with self.stream.borrowed(), numpy_seeded(self.stream.seed):
            super().initialize_module()
        self.draws_ = may_draw(self.module_)
        return self

    def drawing(self) -> AbstractContextManager[None]:
        """Let a module that may draw do so from the private random stream."""
        return self.stream.borrowed() if self.draws_ else nullcontext()

    def _set_training(self, training: bool = True) -> None:
        # Walking the modules costs more than a small layer, so only when the mode changes.
        if self.module_.training != training:
            super()._set_training(training)

    def train_step_single(self, batch: Batch, **fit_params: Any) -> dict[str, Any]:
        """Take the gradient of the weighted mean of the objective."""
        self._set_training(True)
        X, y = (tensor.to(self.device) for tensor in batch)
        with self.drawing():
            value = self.objective(self.module_, X, y, generator=self.generator)
        share = shares(batch.sample_weight, like=value.loss)
        # The gradient of the weighted mean, without a node for the mean.
        value.loss.backward(share)  # type: ignore[no-untyped-call]
        step = {"loss": value.loss.detach() @ share, "y_pred": value.logits.detach()}
        if value.penalty is not None:
            step["penalty"] = value.penalty @ share
        return step

    def validation_step(self, batch: Batch, **fit_params: Any) -> dict[str, Any]:
        """Return the weighted mean of the cross-entropy of held-out samples."""
        with self.drawing():
            step: dict[str, Any] = super().validation_step(batch, **fit_params)
        if batch.sample_weight is not None:
            loss = cross_entropy(step["y_pred"], batch[1].to(step["y_pred"].device))
            step["loss"] = loss @ shares(batch.sample_weight, like=loss)
        return step

    def run_single_epoch(
        self, iterator: Any, training: bool, prefix: str, step_fn: Any, **fit_params: Any
    ) -> None:
        """Run one epoch, reading the losses back from the device only at its end."""
        if iterator is None:
            return
        for batch in iterator:
            self.notify("on_batch_begin", batch=batch, training=training)
            step = step_fn(batch, **fit_params)
            for name in ("loss", "penalty"):
                if name in step:
                    self.history.record_batch(f"{prefix}_{name}", step[name])
            self.history.record_batch(f"{prefix}_batch_size", len(batch[0]))
            self.notify("on_batch_end", batch=batch, training=training, **step)
        self.history.record(f"{prefix}_batch_count", len(iterator))
        self._read_back(f"{prefix}_loss")
        self._read_back(f"{prefix}_penalty")
        if training:
            self._keep_if_finite()

    def _read_back(self, name: str) -> None:
        """Turn a column of 0-d tensors of this epoch's batches into floats, in one copy."""
        batches = [row for row in self.history[-1]["batches"] if name in row]
        if batches:
            values = torch.stack([row[name] for row in batches]).tolist()
            for row, value in zip(batches, values, strict=True):
                row[name] = value

    def _keep_if_finite(self) -> None:
        """Keep a copy of good weights; on bad ones go back to it and raise."""
        losses = [row["train_loss"] for row in self.history[-1]["batches"]]
        good = self.last_good_weights_
        # Masks of attention hold infinities, and may.
        finite = np.isfinite(losses).all() and all(
            _is_finite(w) or not _is_finite(good[name])
            for name, w in self.module_.state_dict().items()
        )
        if finite:
            self.last_good_weights_ = copy.deepcopy(self.module_.state_dict())
            return
        self.module_.load_state_dict(self.last_good_weights_)
        self.optimizer_.state.clear()  # its averages are NaN as well
        epoch = len(self.history)
        del self.history[-1]
        kept = "initial weights" if epoch == 1 else f"weights of epoch {epoch - 1}"
        raise TrainingDivergedError(
            f"The loss or the weights became NaN or infinite in epoch {epoch}; the {kept} are "
            "kept. Lower lr or lam, or scale the features."
        )

    def partial_fit(
        self, X: Any, y: Any = None, classes: Any = None, **fit_params: Any
    ) -> "ObjectiveNet":
        """Train on; unlike in skorch, only a callback may end it by KeyboardInterrupt."""
        if not self.initialized_:
            self.initialize()
        fit_params.pop("_routing_method", None)
        self.last_good_weights_ = copy.deepcopy(self.module_.state_dict())
        self.notify("on_train_begin", X=X, y=y)
        try:
            self.fit_loop(X, y, **fit_params)
        except KeyboardInterrupt as interrupt:
            if self.history and "train_loss" not in self.history[-1]:
                del self.history[-1]  # an epoch that has not ended
            if not _raised_by_callback(interrupt.__traceback__):
                raise
        self.notify("on_train_end", X=X, y=y)
        return self


def shares(sample_weight: Tensor | None, like: Tensor) -> Tensor:
    """Return w/n, the share of each sample of a batch, for weights whose mean is 1 over all.

    Over the batches of an epoch that is Σwℓ/Σw without bias. w/Σw of the batch would count the
    batches in full that have no heavy sample: of one sample in a hundred, with half of all
    weight, it made three eighths in batches of 100.
    """
    equal = torch.full_like(like, 1 / len(like))
    return equal if sample_weight is None else equal * sample_weight.to(like)


def _is_finite(value: Any) -> bool:
    """Tell whether something is no tensor, or holds finite numbers alone."""
    return not isinstance(value, Tensor) or bool(value.isfinite().all())


def _raised_by_callback(traceback: TracebackType | None) -> bool:
    """Tell whether a hook of a callback itself raised, as EarlyStopping does to stop."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and isinstance(traceback.tb_frame.f_locals.get("self"), Callback)


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


def make_net(
    module: Callable[[], nn.Module],
    *,
    seed: int,
    device: torch.device,
    n_classes: int,
    optimizer: str | type[torch.optim.Optimizer],
    nested: dict[str, Any],
) -> ObjectiveNet:
    """Make an initialized net whose every random draw follows from `seed`.

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
    """Train for `epochs` more, with the settings given now and the weights as they are."""
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
    if not all(map(_is_callback, callbacks)):
        expected = "a sequence of skorch callbacks, or of pairs (name, callback)"
        reject("callbacks", callbacks, expected)
    net.callbacks = [*schedule, *callbacks]
    net._initialize_callbacks()
    net.check_callbacks(lr_schedule)
    _begin_schedules(net)
    net.max_epochs = epochs
    net.partial_fit(ScoredSamples(samples))


def _begin_schedules(net: ObjectiveNet) -> None:
    """Let schedulers of skorch begin where training does, not at the epochs of fits before.

    There torch asks for the learning rate that those began with, and some steps are taken twice.
    """
    for _, callback in net.callbacks_:
        if isinstance(callback, LRScheduler) and callback.policy_ is not ReduceLROnPlateau:
            vars(callback).setdefault("last_epoch", -1)


def _is_callback(given: Any) -> bool:
    """Tell whether something is a callback, its class, or such or None with a name."""
    is_pair = isinstance(given, tuple | list) and len(given) == 2
    callback = given[1] if is_pair else given
    is_class = isinstance(callback, type) and issubclass(callback, Callback)
    return is_class or isinstance(callback, Callback) or (is_pair and callback is None)


def early_stopping(monitor: str, patience: int) -> tuple[str, Callback]:
    """Stop when `monitor` has not improved for `patience` epochs; restore the best."""
    stop = EarlyStopping(
        monitor=monitor, patience=patience, threshold=0, lower_is_better=False, load_best=True
    )
    return "early_stopping", stop


def predict_logits(net: ObjectiveNet, X: Tensor, batch_size: int) -> np.ndarray:
    """Return the logits of `X` as an array of its type, computed in batches in eval mode.

    A module may compute in lower precision inside; numpy has no bfloat16.
    """
    net._set_training(False)
    with torch.no_grad():  # not inference mode, whose tensors modules may keep and need again
        logits = [net.module_(batch.to(net.device)) for batch in torch.split(X, batch_size)]
    return torch.cat([part.to("cpu", X.dtype) for part in logits]).numpy()
