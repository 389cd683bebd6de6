"""What both classifiers share besides prediction: parameters, checks, fitting."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags
from sklearn.utils._param_validation import RealNotInt, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data
from torch import Tensor

from skjacobian._early_stopping import hold_out, warn_of_a_flat_score, watch
from skjacobian._net.batches import Samples, n_batches
from skjacobian._net.callbacks import check_callbacks
from skjacobian._net.objective_net import predict_logits
from skjacobian._net.owner import net_state, restore_net
from skjacobian._net.params import OptimizerClass, check_iterators, check_optimizer
from skjacobian._net.training import LR_SCHEDULES, OPTIMIZERS, train
from skjacobian._prediction import NetClassifier
from skjacobian._preprocessing import TransformerInstance, fit_preprocessor
from skjacobian._rng import draw_seed, own_random_state
from skjacobian._training_data import (
    apply_class_weight,
    make_samples,
    training_weights,
)
from skjacobian._validation import ScalarInterval, did_you_mean, reject, unwrap_scalar
from skjacobian.exceptions import TrainingDivergedError
from skjacobian.modules import MODULES
from skjacobian.objectives import Objective

# What is asked for by a name of scikit-learn, of the default modules, or of the scorers.
ASKED_FOR = {
    "hidden_layer_sizes": "module__hidden_units",
    "hidden_units": "module__hidden_units",
    "activation": "module__activation",
    "dropout": "module__dropout",
    "image_shape": "module__image_shape",
    "solver": "optimizer",
    "alpha": "weight_decay",
    "learning_rate": "lr",
    "learning_rate_init": "lr",
    "max_iter": "max_epochs",
    "mutable": "constraints",
}

NESTED_PREFIXES = ("module", "optimizer", "iterator_train", "iterator_valid", "callbacks")

TRAINING_CONSTRAINTS: dict[str, list[Any]] = {
    "module": [StrOptions(set(MODULES)), callable],
    "preprocessor": [TransformerInstance(), None],
    "lr": [ScalarInterval(Real, 0, None, closed="neither")],
    "max_epochs": [StrOptions({"auto"}), ScalarInterval(Integral, 1, None, closed="left")],
    "batch_size": [StrOptions({"auto"}), ScalarInterval(Integral, 1, None, closed="left")],
    "optimizer": [StrOptions(set(OPTIMIZERS)), OptimizerClass()],
    "weight_decay": [ScalarInterval(Real, 0, None, closed="left")],
    "lr_schedule": [StrOptions(set(LR_SCHEDULES))],
    "class_weight": [dict, StrOptions({"balanced"}), None],
    "early_stopping": ["boolean"],
    "validation_fraction": [ScalarInterval(RealNotInt, 0, 1, closed="neither")],
    "n_iter_no_change": [ScalarInterval(Integral, 1, None, closed="left")],
    "scoring": [str, callable, None],
    "warm_start": ["boolean"],
    "callbacks": [list, tuple, None],
    "device": [str, torch.device],
    "dtype": [StrOptions({"auto", "float32", "float64"})],
    "random_state": ["random_state"],
    "verbose": ["verbose"],
}


class RobustClassifier(NetClassifier):
    """Base of the classifiers: composes a skorch net, and behaves as scikit-learn expects.

    A subclass stores its own parameters and says what is minimized (`_make_objective`).
    """

    _parameter_constraints: dict[str, list[Any]] = TRAINING_CONSTRAINTS

    def __init__(
        self,
        module: Any,
        *,
        preprocessor: Any,
        lr: float,
        max_epochs: int | str,
        batch_size: int | str,
        optimizer: Any,
        weight_decay: float,
        lr_schedule: str,
        class_weight: Any,
        early_stopping: bool,
        validation_fraction: float,
        n_iter_no_change: int,
        scoring: Any,
        warm_start: bool,
        callbacks: Any,
        device: Any,
        dtype: str,
        random_state: Any,
        verbose: int,
        nested: dict[str, Any],
    ) -> None:
        self.module = module
        self.preprocessor = preprocessor
        self.lr = lr
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.class_weight = class_weight
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.scoring = scoring
        self.warm_start = warm_start
        self.callbacks = callbacks
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose
        for name in nested:
            if not _is_nested(name):
                known, here = self._get_param_names(), ASKED_FOR.get(name, "")
                is_here = here in known or _is_nested(here)
                hint = f" (here {here!r})" if is_here else did_you_mean(name, known)
                raise TypeError(
                    f"{type(self).__name__} got an unexpected parameter {name!r}{hint}."
                )
        self._nested = nested

    def _make_objective(self, X: Tensor) -> Objective:
        """Return what is minimized; raise for parameters that do not fit `X`."""
        raise NotImplementedError

    # --- parameters ---------------------------------------------------------------------

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Get the parameters, those in skorch's spelling (`module__…`) included.

        Parameters
        ----------
        deep : bool, default=True
            Whether to include the parameters of parameters that are estimators.

        Returns
        -------
        dict
        """
        return {**super().get_params(deep), **self._nested}

    def set_params(self, **params: Any) -> Self:
        """Set parameters, those in skorch's spelling (`module__…`) included.

        Parameters
        ----------
        **params : dict

        Returns
        -------
        self
        """
        nested = {name: value for name, value in params.items() if _is_nested(name)}
        super().set_params(**{n: v for n, v in params.items() if n not in nested})
        self._nested = {**self._nested, **nested}
        return self

    def __sklearn_tags__(self) -> Tags:
        """Say that images, arrays of more than two dimensions, are accepted if not preprocessed."""
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = self.preprocessor is None
        return tags

    # --- fitting ------------------------------------------------------------------------

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on X and y; with `warm_start=True`, go on from the last fit.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, *image_shape)
        y : array-like of shape (n_samples,)
            Labels of any type.
        sample_weight : array-like of shape (n_samples,), optional
            Relative to their mean. Rows of weight 0 are left out, but their labels are among
            `classes_`.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For parameters, samples, labels or weights that make no sense or do not go together.
            A fit that raises leaves the estimator as it was.
        TypeError
            If `module` is a module, not what makes one, or lacks a parameter.
        NotDifferentiableError
            If no torch view of `preprocessor` is known.
        TrainingDivergedError
            If loss or weights become NaN or infinite; the weights of the epoch before are kept.

        Warns
        -----
        ConvergenceWarning
            If the network answers all samples alike.
        AttackWarning
            If columns that `AdversarialClassifier` attacks cannot change.
        UserWarning
            If images look like channels last, outputs of `module` like probabilities, or the score
            that early stopping watched did not change.
        """
        going_on = self.warm_start and hasattr(self, "net_")
        with self._as_before_on_error(going_on):
            return self._fit(X, y, sample_weight, fresh=not going_on)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Train one more epoch, at a constant learning rate.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, *image_shape)
        y : array-like of shape (n_samples,)
        classes : array-like of shape (n_classes,), optional
            All labels that will ever come; needed at the first call where `y` lacks one.
        sample_weight : array-like of shape (n_samples,), optional
            Relative to their mean over the samples of this call.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError, NotDifferentiableError, TrainingDivergedError
            As `fit` does; and a ValueError with `early_stopping`, ``class_weight="balanced"`` and
            whatever else would be learned from a part of the data, and for labels that are not
            among `classes_`.

        Warns
        -----
        AttackWarning, UserWarning
            As `fit` does.
        """
        self._check_partial_fit()
        fresh = not hasattr(self, "net_")
        with self._as_before_on_error(going_on=not fresh):
            return self._fit(X, y, sample_weight, fresh=fresh, classes=classes, partial=True)

    @contextmanager
    def _as_before_on_error(self, going_on: bool) -> Iterator[None]:
        """Take back what a fit has learned where it raises, but for the weights before it diverged.

        A mistake in a parameter costs no trained network, and makes no untrained one. Callbacks
        and scorers raise after an epoch: where training goes on, the network itself is put back.
        """
        before = dict(self.__dict__)
        trained = net_state(self.net_) if going_on else None
        try:
            yield
        except TrainingDivergedError:
            raise
        except Exception:
            self.__dict__.clear()
            self.__dict__.update(before)
            if trained is not None:
                restore_net(self.net_, trained)
            raise

    def _check_partial_fit(self) -> None:
        """Raise for parameters that need more than a part of the data."""
        if self.early_stopping:
            raise ValueError(
                "Got early_stopping=True, but partial_fit expected early_stopping=False: one "
                "epoch leaves nothing to stop."
            )
        if isinstance(self.class_weight, str):
            raise ValueError(
                f"Got class_weight={self.class_weight!r}, but partial_fit expected None or a "
                "mapping of labels to weights: a part of the data does not know its classes' "
                "shares."
            )

    def _fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        *,
        fresh: bool,
        classes: Any = None,
        partial: bool = False,
    ) -> Self:
        if not fresh:
            self._check_same_net()
        self._check_net_params()
        values, y = self._validate_training_data(X, y, reset=fresh)
        weight, rows = training_weights(values, sample_weight)
        self._learn_classes(y, rows, classes, fresh)
        random_state = own_random_state(self.random_state)
        # Drawn by all fits, so that a seed holds out the same rows where training goes on: others
        # would have been trained on before.
        seed = draw_seed(random_state)
        held_out = rows[:0]
        if self.early_stopping:
            share = float(unwrap_scalar(self.validation_fraction))
            rows, held_out = hold_out(rows, y, share, random_state)
        if fresh:
            names = getattr(self, "feature_names_in_", None)
            preprocessor = fit_preprocessor(self.preprocessor, values, y, weight, rows, names)
            self._init_net(preprocessor, values, seed)
        samples = self._samples(values, y, weight, rows)
        objective = self._make_objective(samples.X)
        scored = X if hasattr(X, "__getitem__") else values  # what rows can be taken of
        watching = watch(self, scored, y, weight, held_out) if len(held_out) else []
        n_before = len(self.net_.history)
        train(
            self.net_,
            samples,
            self._samples(values, y, weight, held_out) if len(held_out) else None,
            objective=objective,
            epochs=1 if partial else self._n_epochs(len(samples)),
            lr=float(unwrap_scalar(self.lr)),
            lr_schedule="constant" if partial else self.lr_schedule,
            batch_size=self._batch_size(len(samples)),
            callbacks=[*watching, *(self.callbacks or [])],
            verbose=int(self.verbose),
        )
        if len(held_out) and self.scoring is not None:
            warn_of_a_flat_score(self, self.history_[n_before:])
        if not partial:
            self._warn_of_a_constant(samples.X)
        return self

    def _check_net_params(self) -> None:
        """Raise for what skorch or torch would refuse in words of their own, or an epoch later."""
        optimizer = OPTIMIZERS.get(self.optimizer, self.optimizer)
        check_optimizer(optimizer, float(unwrap_scalar(self.lr)), self._nested)
        check_iterators(self._nested)
        recorded = ["epoch", "dur", "train_loss", "train_loss_best", "train_penalty"]
        if self.lr_schedule == "cosine":
            recorded.append("lr")
        if self.early_stopping:
            recorded += ["valid_loss", "valid_loss_best", "valid_accuracy"]
        if self.early_stopping and self.scoring is not None:
            recorded.append("valid_score")
        check_callbacks(self.callbacks or [], self._nested, recorded=recorded)

    def _warn_of_a_constant(self, X: Tensor) -> None:
        """Warn if the net answers all of the samples alike, as where training went wrong."""
        spread = np.linspace(0, len(X) - 1, min(len(X), 200)).astype(int)
        X = X[spread].cpu()
        with self.net_.drawing():
            logits = predict_logits(self.net_, X, len(X))
        # What all classes have in common is no matter.
        ranges = np.ptp(logits - logits.mean(1, keepdims=True), axis=0)
        if torch.equal(X, X[:1].expand_as(X)) or ranges.max() >= 1e-3:
            return
        warnings.warn(
            f"{type(self).__name__} has learned nothing: the probabilities that it predicts are "
            "the same for all samples. Scale the features (preprocessor=StandardScaler()), or "
            "lower lr, eps or lam.",
            ConvergenceWarning,
            stacklevel=5,
        )

    def _validate_training_data(
        self, X: Any, y: Any, *, reset: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        if issparse(X):
            raise TypeError(
                f"Got X as a sparse {type(X).__name__}, but {type(self).__name__} expected a dense "
                "array: X.toarray(), or in a pipeline OneHotEncoder(sparse_output=False) and "
                "ColumnTransformer(sparse_threshold=0)."
            )
        if not reset:
            self._check_image_shape(X)
        try:
            X, y = validate_data(
                self, X, y, dtype=[np.float64, np.float32], allow_nd=True, reset=reset
            )
        except ValueError as error:
            if self.preprocessor is None or _holds_numbers(X):
                raise
            raise ValueError(
                f"Got preprocessor={self.preprocessor!r} and X with missing values (NaN) or "
                "columns that hold no numbers, but a preprocessor expected numbers, none missing. "
                "Imputers and encoders belong in a Pipeline, before the classifier."
            ) from error
        check_classification_targets(y)
        y = column_or_1d(y, warn=True)
        if reset:
            self.input_shape_ = X.shape[1:]
            self._warn_of_channels_last()
        self._check_shape(X)
        return X, y

    def _warn_of_channels_last(self) -> None:
        shape, channels = self.input_shape_, (1, 3, 4)
        if self.module != "cnn" or len(shape) != 3:
            return
        if shape[2] in channels and shape[0] not in channels:
            warnings.warn(
                f"Got X with samples of shape {shape}, whose last axis looks like channels, but "
                "images are taken as (channels, height, width): X.transpose(0, 3, 1, 2).",
                UserWarning,
                stacklevel=5,
            )

    def _learn_classes(self, y: np.ndarray, rows: np.ndarray, classes: Any, fresh: bool) -> None:
        """Set `classes_` when fresh, and check `y` against them; `rows` have a weight."""
        labels = np.unique(y)
        if fresh:
            self.classes_ = labels if classes is None else np.unique(np.asarray(classes))
            if len(self.classes_) < 2 and classes is not None:
                reject("classes", classes, "an array of at least 2 labels")
            trained = np.unique(y[rows]) if classes is None else self.classes_
            if len(trained) < 2:
                raise ValueError(
                    f"Got y with 1 class ({trained.tolist()[0]!r}), but {type(self).__name__} "
                    "expected samples of at least 2 classes."
                )
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            reject(
                "classes", classes, f"those of the first call, {self.classes_.tolist()}, or None"
            )
        self._check_labels(labels)

    def _samples(
        self, X: np.ndarray, y: np.ndarray, weight: np.ndarray | None, rows: np.ndarray
    ) -> Samples:
        target = np.searchsorted(self.classes_, y[rows])
        weight = None if weight is None else weight[rows]
        weight = apply_class_weight(self.class_weight, self.classes_, target, weight)
        if weight is not None and not weight.all():
            rows, target, weight = (values[weight > 0] for values in (rows, target, weight))
        return make_samples(
            X if len(rows) == len(X) else X[rows],
            target,
            weight,
            dtype=self._torch_dtype,
            device=self.net_.device,
        )

    def _n_epochs(self, n_samples: int) -> int:
        """Return `max_epochs`; "auto" makes about 1000 steps, in 10 to 100 epochs."""
        if self.max_epochs == "auto":
            n_steps = n_batches(n_samples, self._batch_size(n_samples))
            return int(np.clip(-(-1000 // n_steps), 10, 100))
        return int(unwrap_scalar(self.max_epochs))

    def _batch_size(self, n_samples: int) -> int:
        """Return that of training; "auto" is a twentieth of the samples, between 32 and 128."""
        batch_size = self._nested.get("iterator_train__batch_size", self.batch_size)
        if isinstance(batch_size, str):
            return int(np.clip(n_samples // 20, 32, 128))
        return int(unwrap_scalar(batch_size))


def _holds_numbers(X: Any) -> bool:
    """Tell whether `X` holds numbers alone, none of them missing."""
    values = np.asarray(X)
    try:
        return not np.isnan(values.astype(float) if values.dtype == object else values).any()
    except (TypeError, ValueError):
        return False


def _is_nested(name: str) -> bool:
    return any(name.startswith(f"{prefix}__") for prefix in NESTED_PREFIXES)
