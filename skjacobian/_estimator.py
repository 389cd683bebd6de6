"""What both classifiers share: parameters, checks, fitting, prediction."""

import warnings
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import ClassifierMixin, _fit_context
from sklearn.metrics import accuracy_score, check_scoring
from sklearn.model_selection import train_test_split
from sklearn.utils import Tags, _safe_indexing, check_consistent_length, check_random_state
from sklearn.utils._param_validation import RealNotInt, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from skjacobian._batches import Samples, n_batches
from skjacobian._net import (
    LR_SCHEDULES,
    OPTIMIZERS,
    ValidationScores,
    early_stopping,
    predict_logits,
    train,
)
from skjacobian._net_owner import NetOwner
from skjacobian._preprocessing import TransformerInstance, fit_preprocessor
from skjacobian._rng import own_entropy
from skjacobian._training_data import (
    apply_class_weight,
    as_tensor,
    make_samples,
    training_weights,
)
from skjacobian._validation import ScalarInterval, check_labels, did_you_mean, reject, unwrap_scalar
from skjacobian.differentiable import Network, TensorFunction, as_torch
from skjacobian.jacobian import jacobian_norm
from skjacobian.jacobian._norms import checked_norm
from skjacobian.model_modes import frozen
from skjacobian.modules import MODULES
from skjacobian.objectives import Objective

NESTED_PREFIXES = ("module", "optimizer", "iterator_train", "iterator_valid", "callbacks")

# Rows of one forward pass at prediction; their order of summation does not depend on n.
PREDICTION_BATCH_SIZE = 1024

TRAINING_CONSTRAINTS: dict[str, list[Any]] = {
    "module": [StrOptions(set(MODULES)), callable],
    "preprocessor": [TransformerInstance(), None],
    "lr": [ScalarInterval(Real, 0, None, closed="neither")],
    "max_epochs": [StrOptions({"auto"}), ScalarInterval(Integral, 1, None, closed="left")],
    "batch_size": [StrOptions({"auto"}), ScalarInterval(Integral, 1, None, closed="left")],
    "optimizer": [StrOptions(set(OPTIMIZERS)), type],
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


class RobustClassifier(ClassifierMixin, NetOwner):
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
                raise TypeError(
                    f"{type(self).__name__} got an unexpected parameter {name!r}"
                    f"{did_you_mean(name, self._get_param_names())}."
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
        """
        going_on = self.warm_start and hasattr(self, "net_")
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
        """
        self._check_partial_fit()
        fresh = not hasattr(self, "net_")
        return self._fit(X, y, sample_weight, fresh=fresh, classes=classes, partial=True)

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
        values, y = self._validate_training_data(X, y, reset=fresh)
        weight, rows = training_weights(values, sample_weight)
        self._learn_classes(y, rows, classes, fresh)
        random_state = check_random_state(own_entropy(self.random_state))
        seed = int(random_state.randint(2**31 - 1)) if fresh else None
        rows, held_out = self._hold_out(rows, y, random_state)
        if seed is not None:
            names = getattr(self, "feature_names_in_", None)
            preprocessor = fit_preprocessor(self.preprocessor, values, y, weight, rows, names)
            self._init_net(preprocessor, values, seed)
        samples = self._samples(values, y, weight, rows)
        objective = self._make_objective(samples.X)
        scores = self._validation_callbacks(X, y, weight, held_out)
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
            callbacks=[*scores, *(self.callbacks or [])],
            verbose=int(self.verbose),
        )
        if len(held_out) and self.scoring is not None:
            self._warn_of_a_flat_score(self.history_[n_before:])
        return self

    def _warn_of_a_flat_score(self, epochs: list[dict[str, Any]]) -> None:
        """Warn if the score that early stopping watched says nothing of what was learned."""
        ended = [epoch for epoch in epochs if "valid_score" in epoch]
        scores = {epoch["valid_score"] for epoch in ended}
        accuracies = [epoch["valid_accuracy"] for epoch in ended]
        if len(scores) == 1 and max(accuracies) > accuracies[0]:
            warnings.warn(
                f"Got scoring={self.scoring!r}, whose score was {scores.pop():g} in every epoch "
                "while accuracy rose, so early stopping kept the weights of the first. A scorer "
                f"sees X as {type(self).__name__} gets it: behind a scaler in a pipeline, scaled.",
                UserWarning,
                stacklevel=4,
            )

    def _hold_out(
        self, rows: np.ndarray, y: np.ndarray, random_state: np.random.RandomState
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows to train on, and those that early stopping watches."""
        if not self.early_stopping:
            return rows, rows[:0]
        trained, held_out = train_test_split(
            rows,
            test_size=float(unwrap_scalar(self.validation_fraction)),
            stratify=y[rows],
            random_state=random_state,
        )
        return trained, held_out

    def _validate_training_data(
        self, X: Any, y: Any, *, reset: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        if not reset:
            self._check_image_shape(X)
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], allow_nd=True, reset=reset)
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

    def _check_image_shape(self, X: Any) -> None:
        """Name both shapes where X has another than images in fit; numbers of features mislead."""
        if len(self.input_shape_) > 1:
            self._check_shape(np.asarray(X))

    def _check_shape(self, X: np.ndarray) -> None:
        if X.shape[1:] != self.input_shape_:
            raise ValueError(
                f"Got X with samples of shape {X.shape[1:]}, but {type(self).__name__} expected "
                f"{self.input_shape_}, as in fit."
            )

    def _learn_classes(self, y: np.ndarray, rows: np.ndarray, classes: Any, fresh: bool) -> None:
        """Set `classes_` when fresh, and check `y` against them; `rows` have a weight."""
        labels = np.unique(y)
        if fresh:
            self.classes_ = labels if classes is None else np.unique(np.asarray(classes))
            trained = np.unique(y[rows]) if classes is None else self.classes_
            if len(trained) < 2:
                raise ValueError(
                    f"Got y with 1 class ({trained[0]!r}), but {type(self).__name__} "
                    "expected samples of at least 2 classes."
                )
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            reject(
                "classes", classes, f"those of the first call, {self.classes_.tolist()}, or None"
            )
        self._check_labels(labels)

    def _check_labels(self, labels: np.ndarray) -> None:
        check_labels(labels, self.classes_, f"those in classes: {self.classes_.tolist()}")

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
        """Return `batch_size`; "auto" is a twentieth of the samples, between 32 and 128."""
        if self.batch_size == "auto":
            return int(np.clip(n_samples // 20, 32, 128))
        return int(unwrap_scalar(self.batch_size))

    def _validation_callbacks(
        self, X: Any, y: np.ndarray, weight: np.ndarray | None, rows: np.ndarray
    ) -> list[tuple[str, Any]]:
        """Return the callbacks that score the held-out rows and stop early."""
        if len(rows) == 0:
            return []
        X, y = _safe_indexing(X, rows), y[rows]
        weight = None if weight is None else weight[rows]
        scorer = None if self.scoring is None else check_scoring(self, self.scoring)
        accepts_weight = getattr(scorer, "_accept_sample_weight", lambda: False)()
        weighted = {"sample_weight": weight} if weight is not None and accepts_weight else {}

        def score() -> dict[str, float]:
            scores = {"valid_accuracy": accuracy_score(y, self.predict(X), sample_weight=weight)}
            if scorer is not None:
                try:
                    value = scorer(self, X, y, **weighted)
                except ValueError as error:
                    raise ValueError(
                        f"Got scoring={self.scoring!r}, but expected a scorer of the samples that "
                        f"early stopping holds out: {error}"
                    ) from error
                if isinstance(value, dict):
                    reject("scoring", self.scoring, "a scorer that returns one number")
                scores["valid_score"] = value
            return {name: float(value) for name, value in scores.items()}

        monitor = "valid_accuracy" if self.scoring is None else "valid_score"
        patience = int(unwrap_scalar(self.n_iter_no_change))
        return [("valid_scores", ValidationScores(score)), early_stopping(monitor, patience)]

    # --- prediction ---------------------------------------------------------------------

    def _logits(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return predict_logits(self.net_, self._prediction_tensor(X), PREDICTION_BATCH_SIZE)

    def _prediction_tensor(self, X: Any) -> Tensor:
        self._check_image_shape(X)
        X = validate_data(self, X, dtype=[np.float64, np.float32], allow_nd=True, reset=False)
        self._check_shape(X)
        return as_tensor(X, self._torch_dtype)

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the logits; for two classes, that of the second minus that of the first.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, *image_shape)

        Returns
        -------
        ndarray of shape (n_samples, n_classes), or (n_samples,) for two classes
        """
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class, the softmax of the logits.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, *image_shape)

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Columns in the order of `classes_`.
        """
        return torch.from_numpy(self._logits(X)).softmax(1).numpy()

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Return the logarithm of the probability of each class.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, *image_shape)

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Columns in the order of `classes_`. Finite where the probability rounds to 0.
        """
        return torch.from_numpy(self._logits(X)).log_softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable label of each sample.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, *image_shape)

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        winners = self._logits(X).argmax(1)
        return self.classes_[winners]

    def jacobian_norm(
        self,
        X: Any,
        y: Any = None,
        *,
        norm: str = "l2",
        output: str = "logits",
        n_projections: int | None = None,
        class_samples: int | None = None,
        random_state: Any = None,
    ) -> np.ndarray:
        """Return a norm of the Jacobian J = ∂logits/∂x, or of the loss, at each sample.

        Each bounds to first order how fast an attack can raise the loss:

        =================  ====================  ============
        `norm`             value                 pairs with
        =================  ====================  ============
        "l2"               ‖J‖_F², **squared**   l2
        "spectral"         σ_max(J)              l2, tight
        "l1"               ‖J‖_{1,1}             linf
        "l21"              Σ_j ‖J_·j‖₂           linf
        "cross_lipschitz"  max_k ‖J_k - J_y‖₁    linf, tight
        =================  ====================  ============

        With ``output="loss"`` the gradient of the cross-entropy takes the place of J: "l2"
        is ‖∇ₓℓ‖₂² and "l1" is ‖∇ₓℓ‖₁.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, *image_shape)
        y : array-like of shape (n_samples,), optional
            Labels as in `fit`, which "cross_lipschitz" and ``output="loss"`` depend on.
            None takes the predicted labels there.
        norm : {"l2", "l1", "l21", "spectral", "cross_lipschitz"}, default="l2"
        output : {"logits", "loss"}, default="logits"
            What is differentiated by x; "loss" knows the norms "l2" and "l1".
        n_projections : int, optional
            None is exact; a number estimates "l2" and "l21" from that many directions.
        class_samples : int, optional
            None is exact; a number estimates "l2" and "l1" from that many classes.
        random_state : int, RandomState instance or None, default=None
            Source of the directions and classes.

        Returns
        -------
        ndarray of shape (n_samples,)
            In the floating type of the network.

        Raises
        ------
        ValueError
            For parameters that are unknown or do not go together, and for a `y` of another
            length than X or with labels that are not in `classes_`.

        See Also
        --------
        skjacobian.jacobian.jacobian_norm : The same of any torch model, with formulas.
        skjacobian.JacobianNormDisplay : Draws what this returns.

        Examples
        --------
        >>> from sklearn.datasets import load_iris
        >>> from skjacobian import JacobianRegularizedClassifier
        >>> X, y = load_iris(return_X_y=True)
        >>> model = JacobianRegularizedClassifier(random_state=0).fit(X, y)
        >>> model.jacobian_norm(X, y, norm="cross_lipschitz").shape
        (150,)
        """
        check_is_fitted(self)
        n_projections, class_samples = unwrap_scalar(n_projections), unwrap_scalar(class_samples)
        measure = checked_norm(norm, output, n_projections, class_samples)
        X = self._prediction_tensor(X)
        seed = check_random_state(own_entropy(random_state)).randint(2**31 - 1)
        # One for all batches: the errors of estimates in different batches are independent.
        generator = torch.Generator().manual_seed(int(seed))
        order = torch.arange(len(X))
        if class_samples is not None:  # the classes of samples in this order take turns
            order = torch.randperm(len(X), generator=generator)
        norms = []
        with frozen(self.module_):
            target = self._target(X, y) if y is not None or measure.needs_labels else None
            for rows in torch.split(order, PREDICTION_BATCH_SIZE):
                batch_norms = jacobian_norm(
                    self.module_,
                    X[rows].to(self.net_.device),
                    None if target is None else target[rows].to(self.net_.device),
                    norm=norm,
                    output=output,
                    n_projections=n_projections,
                    class_samples=class_samples,
                    generator=generator,
                )
                norms.append(batch_norms.cpu())
        return torch.cat(norms)[order.argsort()].numpy()

    def _target(self, X: Tensor, y: Any) -> Tensor:
        """Return the class indices of the labels `y`, or of those predicted if it is None."""
        if y is None:
            logits = predict_logits(self.net_, X, PREDICTION_BATCH_SIZE)
            return torch.from_numpy(logits.argmax(1))
        y = column_or_1d(y, warn=True)
        check_consistent_length(X, y)
        self._check_labels(y)
        return torch.from_numpy(np.searchsorted(self.classes_, y))


@as_torch.register
def _(classifier: RobustClassifier) -> TensorFunction:
    check_is_fitted(classifier)
    return Network(classifier.module_)


def _is_nested(name: str) -> bool:
    return any(name.startswith(f"{prefix}__") for prefix in NESTED_PREFIXES)
