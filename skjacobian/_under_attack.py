"""A fitted classifier under attack: from arrays to tensors, batch by batch, and back."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.utils import assert_all_finite, check_consistent_length
from sklearn.utils.validation import _check_n_features, column_or_1d
from torch import Tensor, nn

from skjacobian._attacked_columns import AttackedColumns
from skjacobian._attacked_view import (
    attacked_view,
    check_has,
    check_has_one_output,
    check_kind_of_labels,
)
from skjacobian._columns import in_the_order_of_fit
from skjacobian._rng import draw_seed
from skjacobian._table import Table, as_pandas
from skjacobian._validation import check_count_or_auto
from skjacobian.attacks import Attack, Cascade, Found
from skjacobian.attacks._found import Stage, concatenate
from skjacobian.attacks.leaf_search import known_leaves, leaves_decide
from skjacobian.differentiable import (
    BlackBox,
    FittedModule,
    TensorFunction,
    answers_or_nan,
    encoded_columns,
    unread_columns,
)
from skjacobian.exceptions import AttackWarning
from skjacobian.leaves import Leaves
from skjacobian.model_modes import frozen
from skjacobian.model_outputs import log_of_probabilities, output_kind

# Least and most samples of a batch, and how many numbers it should hold: on the CPU what
# its caches can, on CUDA what keeps the card busy.
_AUTO_BATCH = {"cpu": (64, 1024, 2**20), "cuda": (256, 8192, 2**25)}


@dataclass(frozen=True)
class Perturbed:
    """What an attack did to chosen samples of a classifier.

    Attributes
    ----------
    X_adv : array-like of shape (n_chosen, *features)
        In the container of the samples that were given.
    right : array of bool of shape (n_chosen,)
        Whether the classifier's own `predict` is right about `X_adv`.
    found : Found
        What the search says, on the CPU; its `fooled` is that of the torch view.
    seconds : float
    """

    X_adv: Any
    right: np.ndarray
    found: Found
    seconds: float = 0.0


class UnderAttack:
    """A fitted classifier with labelled samples, as attacks need them.

    Parameters
    ----------
    estimator : fitted classifier, or trained nn.Module
    X : array-like of shape (n_samples, *features)
    y : array-like of shape (n_samples,)
    batch_size : int or "auto"
        Samples attacked at once.
    random_state : int, RandomState instance or None
    verbose : bool
        Whether to print a line for each batch.

    Attributes
    ----------
    X : array-like, as given
    X_tensor : Tensor of shape (n_samples, *features)
    y : array of shape (n_samples,)
    view : callable
        What is attacked: the torch view, or scores without gradients.
    black_box_method : str or None
        The method of the classifier that is attacked; None for its torch view.
    columns : AttackedColumns
        What an adversary may do to the columns of X.
    """

    def __init__(
        self,
        estimator: Any,
        X: Any,
        y: Any,
        *,
        needs: str,
        batch_size: int | str = "auto",
        random_state: Any = 0,
        verbose: bool = False,
    ) -> None:
        if isinstance(estimator, nn.Module) and not hasattr(estimator, "predict"):
            estimator = FittedModule(estimator, X)
        check_has(estimator, "predict")
        check_has_one_output(estimator)
        given = X = as_pandas(X)
        X = in_the_order_of_fit(estimator, X)
        self.estimator, self.X, self.verbose = estimator, X, verbose
        self.table = Table(X)
        _check_n_features(estimator, X, reset=False)
        self.X_tensor = self.table.tensor
        self.view, self.black_box_method = attacked_view(estimator, self.table, needs)
        check_has(estimator, "classes_")
        self.y = column_or_1d(y)
        assert_all_finite(self.y, input_name="y")
        check_consistent_length(self.X_tensor, self.y)
        check_kind_of_labels(self.y, estimator.classes_)
        if isinstance(estimator, FittedModule):
            estimator.check_labels(self.y)
        self.columns = AttackedColumns.of(
            self.table,
            encoded=encoded_columns(estimator),
            unread=unread_columns(estimator),
            is_reordered=X is not given,
        )
        self.device = _device_of(self.view)
        given_size = check_count_or_auto("batch_size", batch_size)
        self.batch_size = given_size or _batch_size(self.X_tensor, self.device)
        self.seed = draw_seed(random_state)

    @property
    def is_black_box(self) -> bool:
        """Whether what is attacked has no gradients."""
        return self.black_box_method is not None

    @property
    def view_name(self) -> str:
        """What is attacked, in words."""
        if self.black_box_method is None:
            return "torch view"
        kind = "black box" if self.leaves is None else "leaves of trees"
        return f"{kind}, {self.black_box_method}"

    @property
    def leaves(self) -> Leaves | None:
        """The leaves of what is attacked, if they are known."""
        return known_leaves(self.view)

    @cached_property
    def predicted(self) -> np.ndarray:
        """The classes that `predict` gives the clean samples."""
        return np.asarray(self.estimator.predict(self.X))

    @property
    def right(self) -> np.ndarray:
        """Whether `predict` is right about the clean samples."""
        return np.asarray(self.predicted == self.y)

    def leaves_decide(self, attack: Attack) -> bool:
        """Tell whether all that an attack may change is searched among the leaves of trees."""
        return leaves_decide(self.view, attack.rules_of(self.X_tensor))

    def arm(self, attack: Attack, largest: float | None = None, **threat_model: Any) -> Attack:
        """Return an attack with a threat model, as users say it, that X obeys.

        Warn of what cannot change at the `largest` radius asked about, if that is not the attack's.
        """
        armed = attack.with_threat(self.columns.threat_model(self.X_tensor, **threat_model))
        armed.check_params()
        armed.check_clean(self.X_tensor, self.columns.columns)
        said = (threat_model["mutable"], threat_model["constraints"])
        asked = armed
        if largest is not None:
            asked = armed.with_threat({**armed.threat_model, "eps": largest})
        for message in self.columns.warnings(asked, self.X_tensor, *said):
            warnings.warn(message, AttackWarning, stacklevel=3)
        return self.where_defined(armed)

    def where_defined(self, attack: Attack) -> Attack:
        """Return the attack, kept in the range of each feature in which the model is defined."""
        return attack.where_defined(self._is_defined, self.X_tensor)

    def _is_defined(self, X: Tensor) -> Tensor:
        """Tell at which points the model returns numbers."""
        X = X.to(self.X_tensor.dtype, copy=True)
        if self.is_black_box:  # which is asked in the types of the columns
            X[:, self.table.integer] = X[:, self.table.integer].round()
        with frozen(self.view), torch.no_grad(), np.errstate(all="ignore"):
            n_classes = len(self.estimator.classes_)
            output = answers_or_nan(self.view, X.to(self.device), n_classes).cpu()
        # One score that is infinite is a decision; of two none is the largest.
        return ~output.isnan().any(1) & ((output == torch.inf).sum(1) <= 1)

    @cached_property
    def output_kind(self) -> str:
        """What the view returns: "logits", "probabilities" or "decisions".

        Told from all of X, unless the first samples tell that it gives logits: a batch of
        probabilities that are all 0 or 1 would look like decisions.
        """
        first = self._kind_of_outputs(self.X_tensor[: _AUTO_BATCH["cpu"][0]])
        return first if first == "logits" else self._kind_of_outputs(self.X_tensor)

    def _kind_of_outputs(self, X: Tensor) -> str:
        with frozen(self.view), torch.no_grad():
            batches = torch.split(X, self.batch_size)
            return output_kind(torch.cat([self.view(X.to(self.device)).cpu() for X in batches]))

    @cached_property
    def logits_view(self) -> TensorFunction:
        """The view, as logits where it gives probabilities."""
        if self.output_kind != "probabilities":
            return self.view
        if isinstance(self.view, nn.Module):
            return nn.Sequential(self.view, _Log())
        if isinstance(self.view, BlackBox):
            return self.view.changed(log_of_probabilities)
        return lambda X: log_of_probabilities(self.view(X))

    def class_indices(self, y: np.ndarray) -> Tensor:
        """Return the places of known labels among `classes_`, in whatever order these stand."""
        classes = np.asarray(self.estimator.classes_)
        order = np.argsort(classes)
        return torch.from_numpy(order[np.searchsorted(classes, y, sorter=order)])

    def rows(self, index: np.ndarray) -> Any:
        """Return chosen samples, in the container that was given."""
        return self.table.rows(index, self.X_tensor[index].numpy())

    def with_rows(self, index: np.ndarray, X_adv: Tensor) -> Any:
        """Return all samples, those of `index` replaced, in the container that was given."""
        values = self.X_tensor.clone()
        values[index] = X_adv
        return self.table.rows(np.arange(len(values)), values.numpy())

    def perturb(self, attack: Attack, index: np.ndarray, quietly: bool = False) -> Perturbed:
        """Attack the samples of `index`, whose labels the classifier knows."""
        if len(index) == 0:
            return self._nothing_perturbed()
        X, y = self.X_tensor[index], self.class_indices(self.y[index])
        found: list[Found] = []
        start = time.perf_counter()
        for X_batch, y_batch in zip(
            torch.split(X, self.batch_size), torch.split(y, self.batch_size), strict=True
        ):
            share = len(X_batch) / (len(index) - _n_samples(found))
            limited = _in_its_share_of_time(attack, share, time.perf_counter() - start)
            search: Callable[..., Found] = limited.search
            if self.verbose and isinstance(attack, Cascade):
                search = partial(search, on_stage=partial(_report_stage, attack))
            # The same starts for every batch: the result does not depend on their size.
            generator = torch.Generator().manual_seed(self.seed)
            X_batch, y_batch = X_batch.to(self.device), y_batch.to(self.device)
            result = search(self.logits_view, X_batch, y_batch, generator=generator)
            found.append(concatenate([result]))  # on the CPU: a card need not hold all samples
            if self.verbose and not quietly:
                _report_progress(attack, found, len(index), time.perf_counter() - start)
        whole = concatenate(found)
        if attack.constraints is not None:
            _check_is_valid(attack, X, whole.X_adv)
        X_adv = self.table.rows(index, whole.X_adv.numpy())
        right = np.asarray(self.estimator.predict(X_adv) == self.y[index])
        return Perturbed(X_adv, right, whole, seconds=time.perf_counter() - start)

    def _nothing_perturbed(self) -> Perturbed:
        """Return what an attack does to no samples, of which models need not be asked."""
        none = np.zeros(0, dtype=int)
        X_adv, false = self.X_tensor[:0], torch.zeros(0, dtype=torch.bool)
        found = Found(X_adv, false, torch.from_numpy(none), false, false, false, false)
        return Perturbed(self.rows(none), false.numpy(), found)


class _Log(nn.Module):
    """Probabilities to logits."""

    def forward(self, probabilities: Tensor) -> Tensor:
        return log_of_probabilities(probabilities)


def fooled_by_square(found: Found) -> int:
    """Return how many samples Square fooled after all gradients had failed."""
    if not found.stages_of("PGD"):
        return 0
    return sum(int(stage.fooled.sum()) for stage in found.stages_of("Square"))


def are_many(n: float, share: float, n_samples: int) -> bool:
    """Tell whether `n` are more than a share of the samples, and more than one, an accident."""
    return n > max(share * n_samples, 1)


def warn_of_black_box(perturbed: Perturbed) -> None:
    """Warn where Square fooled more than 1 % of the samples after all gradients had failed."""
    n_fooled, n_samples = fooled_by_square(perturbed.found), len(perturbed.right)
    if are_many(n_fooled, 0.01, n_samples):
        warnings.warn(
            f"Square fooled {n_fooled} of {n_samples} samples after all gradients had failed: "
            "gradients mislead, and robustness is likely overstated. evaluate_robustness says "
            "more.",
            AttackWarning,
            stacklevel=4,
        )


def warn_of_disagreement(perturbed: Perturbed) -> None:
    """Warn where the torch view is fooled by a perturbation and `predict` is not."""
    n_different = int((perturbed.found.fooled.numpy() & perturbed.right).sum())
    if n_different:
        warnings.warn(
            f"The torch view of the estimator is fooled by {n_different} perturbed samples of "
            f"{len(perturbed.right)} that its predict gets right. predict decides, so robustness "
            "may be overstated by as much.",
            AttackWarning,
            stacklevel=4,
        )


def _check_is_valid(attack: Attack, X: Tensor, X_adv: Tensor) -> None:
    """Make sure that what an attack returned is what the threat model allows."""
    ball = attack.ball(X)
    allowed = ball.contains(X_adv) & (X_adv.isnan() == X.isnan()).flatten(1).all(1)
    if ball.rules is not None:
        allowed &= ball.rules.hold(X_adv)
    if not bool(allowed.all()):
        raise RuntimeError(
            f"{attack!r} returned {int((~allowed).sum())} of {len(X)} samples outside the threat "
            "model. This is a fault of the attack; please report it."
        )


def _device_of(view: TensorFunction) -> torch.device:
    """Return where the weights of a view are, so that samples are moved there once."""
    tensors = chain(view.parameters(), view.buffers()) if isinstance(view, nn.Module) else ()
    first = next(iter(tensors), None)
    device = torch.device("cpu") if first is None else first.device
    if device.type not in _AUTO_BATCH:
        raise ValueError(f"Got a network on {str(device)!r}, but expected one on 'cpu' or 'cuda'.")
    return device


def _batch_size(X: Tensor, device: torch.device) -> int:
    """Return what "auto" is for samples of this size."""
    low, high, n_numbers = _AUTO_BATCH[device.type]
    return int(np.clip(n_numbers // X[0].numel(), low, high))


def _n_samples(found: list[Found]) -> int:
    return sum(len(part.fooled) for part in found)


def _in_its_share_of_time(attack: Attack, share: float, elapsed: float) -> Attack:
    """Return the attack for a batch, with its share of the time that is left, if limited."""
    limit = getattr(attack, "time_limit", None)
    if limit is None:
        return attack
    return clone(attack).set_params(time_limit=max(1e-9, share * (limit - elapsed)))


def _report_stage(attack: Attack, stage: Stage) -> None:
    n_asked, n_fooled = int((stage.n_queries > 0).sum()), int(stage.fooled.sum())
    print(
        f"{_name(attack)} {stage.name} fooled {n_fooled} of {n_asked} samples, "
        f"{stage.seconds:.1f} s",
        flush=True,
    )


def _report_progress(attack: Attack, found: list[Found], n_samples: int, seconds: float) -> None:
    n_done = _n_samples(found)
    n_fooled = sum(int(part.fooled.sum()) for part in found)
    print(
        f"{_name(attack)} {n_done} of {n_samples} samples, {n_fooled} fooled, {seconds:.1f} s",
        flush=True,
    )


def _name(attack: Attack) -> str:
    return f"[{type(attack).__name__}, {attack.norm} eps={attack.eps:g}]"
