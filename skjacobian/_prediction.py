"""What a fitted net answers: logits, probabilities, labels, norms of its Jacobian."""

from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from skjacobian._net.objective_net import predict_logits
from skjacobian._net.owner import NetOwner
from skjacobian._rng import draw_seed
from skjacobian._training_data import as_tensor
from skjacobian._validation import check_labels, unwrap_scalar
from skjacobian.differentiable import Network, TensorFunction, as_torch, check_methods
from skjacobian.jacobian import jacobian_norm
from skjacobian.jacobian._norms import checked_norm
from skjacobian.model_modes import frozen

# Rows of one forward pass at prediction; their order of summation does not depend on n.
PREDICTION_BATCH_SIZE = 1024


class NetClassifier(ClassifierMixin, NetOwner):
    """Base of a classifier that answers by a net of its own, once that is fitted."""

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
        # One for all batches: the errors of estimates in different batches are independent.
        generator = torch.Generator().manual_seed(draw_seed(random_state))
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

    def _check_labels(self, labels: np.ndarray) -> None:
        check_labels(labels, self.classes_, f"those in classes: {self.classes_.tolist()}")


@as_torch.register
def _(classifier: NetClassifier) -> TensorFunction:
    check_is_fitted(classifier)
    check_methods(classifier, NetClassifier)
    return Network(classifier.module_)
