"""The skorch net that trains on an objective."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import numpy as np
import torch
from skorch import NeuralNet, NeuralNetClassifier
from skorch.callbacks import (
    Callback,
    EpochTimer,
    PassthroughScoring,
    PrintLog,
)
from torch import Tensor, nn

from skjacobian._net.batches import Batch, Samples
from skjacobian._rng import RandomStream, numpy_seeded
from skjacobian.exceptions import TrainingDivergedError
from skjacobian.losses import cross_entropy
from skjacobian.modules import may_draw
from skjacobian.objectives import CrossEntropy, Objective

# The name under which other files speak of any skorch net.
SkorchNet = NeuralNet


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


def predict_logits(net: ObjectiveNet, X: Tensor, batch_size: int) -> np.ndarray:
    """Return the logits of `X` as an array of its type, computed in batches in eval mode.

    A module may compute in lower precision inside; numpy has no bfloat16.
    """
    net._set_training(False)
    with torch.no_grad():  # not inference mode, whose tensors modules may keep and need again
        logits = [net.module_(batch.to(net.device)) for batch in torch.split(X, batch_size)]
    return torch.cat([part.to("cpu", X.dtype) for part in logits]).numpy()
