"""The two robust classifiers."""

import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.utils._param_validation import RealNotInt, StrOptions
from torch import Tensor

from skjacobian._attacked_columns import AttackedColumns
from skjacobian._estimator import TRAINING_CONSTRAINTS, RobustClassifier
from skjacobian._net.objective_net import ObjectiveNet
from skjacobian._table import Table
from skjacobian._validation import ScalarInterval, unwrap_scalar
from skjacobian.attacks import FGSM, PGD, Attack
from skjacobian.constraints import FeatureConstraints
from skjacobian.exceptions import AttackWarning
from skjacobian.geometry import BALL_NORMS
from skjacobian.jacobian import JACOBIAN_NORMS, OUTPUTS
from skjacobian.model_modes import frozen
from skjacobian.model_outputs import check_samples_apart, check_samples_apart_in_training
from skjacobian.objectives import (
    TRADES,
    AdversarialTraining,
    CrossEntropy,
    JacobianRegularization,
    Objective,
)


class PenaltyNorm(StrOptions):
    """Constraint on a parameter: a norm of the Jacobian, which is not called as the attack's is."""

    def __init__(self) -> None:
        super().__init__(set(JACOBIAN_NORMS))

    def __str__(self) -> str:
        return (
            f"{super().__str__()} (norms of the Jacobian: of l2 attacks 'l2', 'spectral', of linf "
            "attacks 'l1', 'l21', 'cross_lipschitz')"
        )


class JacobianRegularizedClassifier(RobustClassifier):
    """Neural network trained with a penalty on the Jacobian of its logits.

    Minimizes the mean of ℓ(x) + λ‖J(x)‖, J = ∂logits/∂x: a surrogate of the adversarial loss,
    with the l2 norm of that under l2 attack, with the l1 norm of that under linf attack
    (following Wu & Li, arXiv 2412.12449). To first order, and for a λ in proportion to the
    radius, it is an upper bound (`skjacobian.theory`); λ as it trains well is smaller. It is no
    certificate: measure the result with `RobustScorer`.

    Parameters
    ----------
    module : {"mlp", "cnn"}, nn.Module subclass or callable, default="mlp"
        What makes the network. "mlp" has hidden layers of 128 and 64 units (ReLU), which
        `module__hidden_units`, `module__activation` and `module__dropout` change; "cnn" takes
        images of shape (channels, height, width) or (height, width), or flat ones with
        `module__image_shape`. Both (`skjacobian.modules`) are sized from the data. A class
        or function of yours is given `n_features`, `n_classes` and `input_shape` as far as its
        signature names them, and must return logits. Each fit calls it for weights of its own,
        and so does a pickle that is loaded: what it is made of belongs in parameters and buffers.
    preprocessor : transformer, optional
        Any that `as_torch` knows, or a `Pipeline` of such: `fit` clones it, fits it on the
        rows trained on (with their weights where its `fit` takes them) and makes it the
        first layers of the network. So the Jacobian is by the raw X, as in scoring, and
        `lam` is for its units; behind a scaler in a pipeline both are for scaled ones.
        `module` is sized from what it returns. `warm_start` and `partial_fit` keep it as
        first fitted. X itself must be numbers and not missing.
    lam : float, default=0.005
        λ >= 0, the strength of the penalty. 0 is plain training at its cost. The default
        suits "l2" and features of about unit scale (docs/benchmarks.md says how it was
        chosen), no other norm. The right magnitude depends on the norm and on the scale of the
        features: for an attack of radius eps search a factor of ten about 0.01·eps² ("l2"),
        0.03·eps ("l1"; "l21" is smaller, so its λ is larger) or 0.1·eps ("spectral",
        "cross_lipschitz").
    norm : {"l2", "l1", "l21", "spectral", "cross_lipschitz"}, default="l2"
        "l2" penalizes mean ‖J‖_F² and pairs with l2 attacks; "l1" mean ‖J‖_{1,1} = Σ|J_kj|
        and "l21" mean Σ_j ‖J_·j‖₂ pair with linf attacks. "spectral", the largest singular
        value, and "cross_lipschitz", max_k ‖J_k - J_y‖₁, are the tight forms for l2 and
        linf attacks.
    output : {"logits", "loss"}, default="logits"
        What is differentiated by x. "loss" penalizes the gradient of the cross-entropy, by
        "l2" its square (double backpropagation) or by "l1".
    n_projections : int, optional
        None computes the norm exactly. A number k estimates it without bias from k random
        projections ("l2" and "l21" only).
    penalty_samples : int, float, "auto" or None, default="auto"
        Samples of each batch that the penalty is taken on, drawn anew each time, as a
        number or a share. Penalty and gradient stay unbiased. "auto" takes what costs about
        a sixth of the operations of plain training; of very small networks all of one batch in
        three, at random; on CUDA all, where that takes no longer. None takes all. They
        train the same network, except where λ is so strong that it costs points of clean
        accuracy: there None ends a point or so more robust (docs/jacobian.md compares).
    class_samples : int, "auto" or None, default="auto"
        Classes of each of these samples, drawn likewise ("l1" and "l2" only). None takes
        all. "auto" takes all too, except with ``penalty_samples="auto"``, which spreads
        the penalty over many samples and few classes of each.
    interpolation : float, default=0.0
        How far from a sample, at most, on the way to another of its batch the penalty is
        taken: 0 at the samples, up to 0.5, halfway. Attacks go there; it made MNIST networks
        more robust at no cost of accuracy (docs/study.md), small tables not.
    lr : float, default=5e-3
        Learning rate.
    max_epochs : int or "auto", default="auto"
        Passes over the data. "auto" makes about 1000 steps, in 10 to 100 epochs.
    batch_size : int or "auto", default="auto"
        Samples per step. "auto" is a twentieth of the data, between 32 and 128.
    optimizer : {"adam", "adamw", "sgd"} or torch.optim.Optimizer subclass, default="adam"
        Minimizer; its own parameters are spelled `optimizer__betas` and so on.
    weight_decay : float, default=0.0
        Passed to the optimizer.
    lr_schedule : {"cosine", "constant"}, default="cosine"
        "cosine" lets the learning rate fall to 0 over a fit, batch by batch.
    class_weight : dict, "balanced" or None, default=None
        Weight of each class, as in scikit-learn.
    early_stopping : bool, default=False
        Hold out `validation_fraction` of the data, stop when its score has not risen for
        `n_iter_no_change` epochs, and restore the best weights.
    validation_fraction : float, default=0.1
        Share of the data held out, stratified by class.
    n_iter_no_change : int, default=10
        Patience of early stopping, in epochs.
    scoring : str, callable or None, default=None
        What early stopping watches; None is accuracy. A `RobustScorer` guards against
        robust overfitting.
    warm_start : bool, default=False
        Whether `fit` goes on from the weights of the last fit, with its network, optimizer and
        preprocessor; another one, another `weight_decay` or `dtype`, or other parameters of
        these (`module__…`) are an error.
    callbacks : list of skorch callbacks, optional
        Used unmodified; parameters are spelled `callbacks__name__parameter`.
    device : str or torch.device, default="auto"
        "auto" is CUDA where there is one.
    dtype : {"auto", "float32", "float64"}, default="auto"
        "auto" is the floating type of X on the CPU and float32 on CUDA.
    random_state : int, RandomState instance or None, default=None
        Seed of initialization, order, dropout and projections. None draws fresh entropy;
        the global states of numpy and torch are neither read nor changed.
    verbose : int, default=0
        1 prints a row per epoch.
    **module__kwargs
        Parameters of parts in skorch's spelling: `module__hidden_units`,
        `optimizer__betas`, `iterator_train__drop_last`, `callbacks__name__parameter`.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels.
    n_features_in_ : int
        Size of the second dimension of X.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns, where X had string names.
    input_shape_ : tuple of int
        Shape of a sample.
    preprocessor_ : transformer or None
        The fitted `preprocessor`.
    history_ : list of dict
        Per epoch: "train_loss", "train_penalty" (the norm without λ), "valid_…", "dur".
    n_iter_ : int
        Number of epochs trained.
    n_parameters_ : int
        Number of weights.
    net_ : skorch.NeuralNetClassifier
        The net that was trained.
    module_ : nn.Module
        The trained network, from X to logits; its first layers are the preprocessor's.

    See Also
    --------
    AdversarialClassifier : Trains on attacked samples instead.
    RobustScorer : Measures accuracy under attack.

    References
    ----------
    Wu & Li, arXiv 2412.12449. Hoffman, Roberts & Yaida, arXiv 1908.02729.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from skjacobian import JacobianRegularizedClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> model = make_pipeline(
    ...     StandardScaler(), JacobianRegularizedClassifier(random_state=0)
    ... )
    >>> bool(model.fit(X, y).score(X, y) > 0.9)
    True
    """

    _parameter_constraints: dict[str, list[Any]] = {
        **TRAINING_CONSTRAINTS,
        "lam": [ScalarInterval(Real, 0, None, closed="left")],
        "norm": [PenaltyNorm()],
        "output": [StrOptions(set(OUTPUTS))],
        "n_projections": [ScalarInterval(Integral, 1, None, closed="left"), None],
        "penalty_samples": [
            StrOptions({"auto"}),
            ScalarInterval(Integral, 1, None, closed="left"),
            ScalarInterval(RealNotInt, 0, 1, closed="right"),
            None,
        ],
        "class_samples": [
            StrOptions({"auto"}),
            ScalarInterval(Integral, 1, None, closed="left"),
            None,
        ],
        "interpolation": [ScalarInterval(Real, 0, 0.5, closed="both")],
    }

    def __init__(
        self,
        module: Any = "mlp",
        *,
        preprocessor: Any = None,
        lam: float = 0.005,
        norm: str = "l2",
        output: str = "logits",
        n_projections: int | None = None,
        penalty_samples: float | str | None = "auto",
        class_samples: int | str | None = "auto",
        interpolation: float = 0.0,
        lr: float = 5e-3,
        max_epochs: int | str = "auto",
        batch_size: int | str = "auto",
        optimizer: Any = "adam",
        weight_decay: float = 0.0,
        lr_schedule: str = "cosine",
        class_weight: Any = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        scoring: Any = None,
        warm_start: bool = False,
        callbacks: Any = None,
        device: Any = "auto",
        dtype: str = "auto",
        random_state: Any = None,
        verbose: int = 0,
        **module__kwargs: Any,
    ) -> None:
        super().__init__(
            module,
            preprocessor=preprocessor,
            lr=lr,
            max_epochs=max_epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            class_weight=class_weight,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
            scoring=scoring,
            warm_start=warm_start,
            callbacks=callbacks,
            device=device,
            dtype=dtype,
            random_state=random_state,
            verbose=verbose,
            nested=module__kwargs,
        )
        self.lam = lam
        self.norm = norm
        self.output = output
        self.n_projections = n_projections
        self.penalty_samples = penalty_samples
        self.class_samples = class_samples
        self.interpolation = interpolation

    def _make_objective(self, X: Tensor) -> Objective:
        return _penalized(
            self.net_,
            X,
            self.lam,
            self.norm,
            output=self.output,
            n_projections=unwrap_scalar(self.n_projections),
            penalty_samples=unwrap_scalar(self.penalty_samples),
            class_samples=unwrap_scalar(self.class_samples),
            interpolation=float(unwrap_scalar(self.interpolation)),
        )


class AdversarialClassifier(RobustClassifier):
    """Neural network trained on attacked samples.

    Minimizes the mean of max_δ ℓ(x + δ) by "pgd" and "fgsm", adversarial training (Madry et
    al., arXiv 1706.06083), or of ℓ(x) + β max_δ KL(p(x) ‖ p(x + δ)) by "trades" (Zhang et al.,
    arXiv 1901.08573). Here ‖δ / feature_scale‖ <= eps, p is the softmax of the logits, and ℓ is
    cross-entropy; a `lam` above 0 adds λ‖J‖ at the point at which ℓ is taken. A gradient attack
    finds the δ of each sample, not always the worst: measure the result with `RobustScorer`.

    Parameters
    ----------
    module : {"mlp", "cnn"}, nn.Module subclass or callable, default="mlp"
        What makes the network. "mlp" has hidden layers of 128 and 64 units (ReLU), which
        `module__hidden_units`, `module__activation` and `module__dropout` change; "cnn" takes
        images of shape (channels, height, width) or (height, width), or flat ones with
        `module__image_shape`. Both (`skjacobian.modules`) are sized from the data. A class
        or function of yours is given `n_features`, `n_classes` and `input_shape` as far as its
        signature names them, and must return logits. Each fit calls it for weights of its own,
        and so does a pickle that is loaded: what it is made of belongs in parameters and buffers.
    preprocessor : transformer, optional
        Any that `as_torch` knows, or a `Pipeline` of such: `fit` clones it, fits it on the
        rows trained on (with their weights where its `fit` takes them) and makes it the
        first layers of the network. So `eps`, `feature_scale`, `bounds` and the Jacobian
        are in the units of the raw X, as in scoring; behind a scaler in a pipeline they are
        in scaled ones. `module` is sized from what it returns. `warm_start` and
        `partial_fit` keep it as first fitted. X itself must be numbers and not missing.
        The attack stays where it is defined: above 0 behind a logarithm.
    method : {"pgd", "fgsm", "trades"}, default="pgd"
        "pgd" trains on the samples that projected gradient descent finds (Madry et al.,
        arXiv 1706.06083), "fgsm" on those of one step from a random start (Wong, Rice &
        Kolter, arXiv 2001.03994), "trades" on clean samples plus β times the divergence
        that the attack causes (Zhang et al., arXiv 1901.08573).
    norm : {"linf", "l2", "l1"}, default="linf"
        Norm of the attack.
    eps : float, default=0.1
        Radius of the attack, in the units of the X that `fit` receives: behind a scaler in a
        pipeline scaled units, with the scaler as `preprocessor` raw ones. 0 is plain
        training at its cost.
    feature_scale : None, "std", "range" or array of shape (n_features,), default=None
        Unit of each feature, ‖delta / feature_scale‖ <= eps. "std" and "range" are those
        of the training data, in which each row counts alike whatever its weight.
    n_steps : int, default=10
        Gradient steps of the attack; "fgsm" always makes one.
    step_size : float, optional
        Length of a step; None lets it fall as 2·eps·(1 - step/n_steps)², for l1 as
        1.5·eps·(1 - step/n_steps). "fgsm" uses
        1.25·eps, or eps without a random start.
    random_start : bool, default=True
        Start the attack at a random point of the ball, another one for each sample.
    bounds : (low, high), optional
        Range of valid features, numbers or one value per feature, in the units of X. None
        is unbounded.
    constraints : FeatureConstraints, optional
        What else makes a sample valid. Unless it is fitted, `fit` fits it on the training
        data. As in scorers, columns of a DataFrame that are of an integer type change by whole
        numbers, and those of bool not at all.
    beta : float, default=6.0
        β of "trades".
    lam : float, default=0.0
        λ >= 0, the strength of a Jacobian penalty on top. It is taken at the attacked samples,
        with "trades" at the clean ones, on the part of each batch that
        ``penalty_samples="auto"`` of `JacobianRegularizedClassifier` takes.
    penalty_norm : {"l2", "l1", "l21", "spectral", "cross_lipschitz"}, default="l2"
        Norm of that penalty, as `norm` of `JacobianRegularizedClassifier`.
    lr : float, default=5e-3
        Learning rate.
    max_epochs : int or "auto", default="auto"
        Passes over the data. "auto" makes about 1000 steps, in 10 to 100 epochs.
    batch_size : int or "auto", default="auto"
        Samples per step. "auto" is a twentieth of the data, between 32 and 128.
    optimizer : {"adam", "adamw", "sgd"} or torch.optim.Optimizer subclass, default="adam"
        Minimizer; its own parameters are spelled `optimizer__betas` and so on.
    weight_decay : float, default=0.0
        Passed to the optimizer.
    lr_schedule : {"cosine", "constant"}, default="cosine"
        "cosine" lets the learning rate fall to 0 over a fit, batch by batch.
    class_weight : dict, "balanced" or None, default=None
        Weight of each class, as in scikit-learn.
    early_stopping : bool, default=False
        Hold out `validation_fraction` of the data, stop when its score has not risen for
        `n_iter_no_change` epochs, and restore the best weights.
    validation_fraction : float, default=0.1
        Share of the data held out, stratified by class.
    n_iter_no_change : int, default=10
        Patience of early stopping, in epochs.
    scoring : str, callable or None, default=None
        What early stopping watches; None is accuracy. A `RobustScorer` guards against
        robust overfitting.
    warm_start : bool, default=False
        Whether `fit` goes on from the weights of the last fit, with its network, optimizer and
        preprocessor; another one, another `weight_decay` or `dtype`, or other parameters of
        these (`module__…`) are an error.
    callbacks : list of skorch callbacks, optional
        Used unmodified; parameters are spelled `callbacks__name__parameter`.
    device : str or torch.device, default="auto"
        "auto" is CUDA where there is one.
    dtype : {"auto", "float32", "float64"}, default="auto"
        "auto" is the floating type of X on the CPU and float32 on CUDA.
    random_state : int, RandomState instance or None, default=None
        Seed of initialization, order, dropout and starts. None draws fresh entropy; the
        global states of numpy and torch are neither read nor changed.
    verbose : int, default=0
        1 prints a row per epoch.
    **module__kwargs
        Parameters of parts in skorch's spelling: `module__hidden_units`,
        `optimizer__betas`, `iterator_train__drop_last`, `callbacks__name__parameter`.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels.
    n_features_in_ : int
        Size of the second dimension of X.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns, where X had string names.
    input_shape_ : tuple of int
        Shape of a sample.
    preprocessor_ : transformer or None
        The fitted `preprocessor`.
    history_ : list of dict
        Per epoch: "train_loss", "train_penalty" (the norm without λ), "valid_…", "dur".
    n_iter_ : int
        Number of epochs trained.
    n_parameters_ : int
        Number of weights.
    net_ : skorch.NeuralNetClassifier
        The net that was trained.
    module_ : nn.Module
        The trained network, from X to logits; its first layers are the preprocessor's.

    See Also
    --------
    JacobianRegularizedClassifier : Penalizes the Jacobian instead, for less time.
    RobustScorer : Measures accuracy under attack.

    References
    ----------
    Madry et al., arXiv 1706.06083. Wong, Rice & Kolter, arXiv 2001.03994. Zhang et al.,
    arXiv 1901.08573.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from skjacobian import AdversarialClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> model = make_pipeline(
    ...     StandardScaler(), AdversarialClassifier(method="fgsm", eps=0.1, random_state=0)
    ... )
    >>> bool(model.fit(X, y).score(X, y) > 0.9)
    True
    """

    _parameter_constraints: dict[str, list[Any]] = {
        **TRAINING_CONSTRAINTS,
        "method": [StrOptions({"fgsm", "pgd", "trades"})],
        "norm": [StrOptions(set(BALL_NORMS))],
        "eps": [ScalarInterval(Real, 0, None, closed="left")],
        "feature_scale": [StrOptions({"std", "range"}), Real, "array-like", None],
        "n_steps": [ScalarInterval(Integral, 1, None, closed="left")],
        "step_size": [ScalarInterval(Real, 0, None, closed="neither"), None],
        "random_start": ["boolean"],
        "bounds": [tuple, list, None],
        "constraints": [FeatureConstraints, None],
        "beta": [ScalarInterval(Real, 0, None, closed="left")],
        "lam": [ScalarInterval(Real, 0, None, closed="left")],
        "penalty_norm": [PenaltyNorm()],
    }

    def __init__(
        self,
        module: Any = "mlp",
        *,
        preprocessor: Any = None,
        method: str = "pgd",
        norm: str = "linf",
        eps: float = 0.1,
        feature_scale: Any = None,
        n_steps: int = 10,
        step_size: float | None = None,
        random_start: bool = True,
        bounds: Any = None,
        constraints: FeatureConstraints | None = None,
        beta: float = 6.0,
        lam: float = 0.0,
        penalty_norm: str = "l2",
        lr: float = 5e-3,
        max_epochs: int | str = "auto",
        batch_size: int | str = "auto",
        optimizer: Any = "adam",
        weight_decay: float = 0.0,
        lr_schedule: str = "cosine",
        class_weight: Any = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        scoring: Any = None,
        warm_start: bool = False,
        callbacks: Any = None,
        device: Any = "auto",
        dtype: str = "auto",
        random_state: Any = None,
        verbose: int = 0,
        **module__kwargs: Any,
    ) -> None:
        super().__init__(
            module,
            preprocessor=preprocessor,
            lr=lr,
            max_epochs=max_epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            class_weight=class_weight,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
            scoring=scoring,
            warm_start=warm_start,
            callbacks=callbacks,
            device=device,
            dtype=dtype,
            random_state=random_state,
            verbose=verbose,
            nested=module__kwargs,
        )
        self.method = method
        self.norm = norm
        self.eps = eps
        self.feature_scale = feature_scale
        self.n_steps = n_steps
        self.step_size = step_size
        self.random_start = random_start
        self.bounds = bounds
        self.constraints = constraints
        self.beta = beta
        self.lam = lam
        self.penalty_norm = penalty_norm

    def _make_objective(self, X: Tensor) -> Objective:
        inner = _penalized(self.net_, X, self.lam, self.penalty_norm, penalty_samples="auto")
        attack = self._make_attack(X)
        if self.method == "trades":
            return TRADES(attack=attack, objective=inner, beta=float(unwrap_scalar(self.beta)))
        return AdversarialTraining(attack=attack, objective=inner)

    def _check_partial_fit(self) -> None:
        super()._check_partial_fit()
        if isinstance(self.feature_scale, str):
            raise ValueError(
                f"Got feature_scale={self.feature_scale!r}, but partial_fit expected numbers: a "
                "part of the data does not know its spread."
            )
        if self.constraints is not None and self.constraints.learns:
            raise ValueError(
                f"Got constraints={self.constraints!r}, but partial_fit expected fitted ones, "
                "constraints.fit(X): a part of the data does not know its range."
            )

    def _make_attack(self, X: Tensor) -> Attack:
        """Return the inner attack in the units of `X`, which must lie inside the bounds."""
        params = self._columns.threat_model(
            X,
            norm=self.norm,
            eps=float(unwrap_scalar(self.eps)),
            feature_scale=self.feature_scale,
            bounds=self.bounds,
            mutable=None,
            constraints=self.constraints,
        )
        params["constraints"] = _fitted(params["constraints"], X)
        params |= {"random_start": self.random_start, "loss": "cross_entropy"}
        if self.method == "fgsm":
            attack: Attack = FGSM(**params)
        else:
            n_steps = int(unwrap_scalar(self.n_steps))
            attack = PGD(**params, n_steps=n_steps, step_size=self.step_size)
        attack.check_clean(X, self._columns.columns)
        for message in self._columns.warnings(attack, X.cpu(), None, self.constraints):
            warnings.warn(message, AttackWarning, stacklevel=6)
        if self.preprocessor is None:
            return attack

        def is_defined(points: Tensor) -> Tensor:
            with self.net_.drawing(), frozen(self.module_), torch.no_grad():
                return self.module_(points.to(X)).isfinite().all(1).cpu()

        return attack.where_defined(is_defined, X.cpu())

    def _validate_training_data(
        self, X: Any, y: Any, *, reset: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        values, y = super()._validate_training_data(X, y, reset=reset)
        # The values of a DataFrame have lost the types of its columns, which scorers see.
        self._columns = AttackedColumns.of(Table(X if hasattr(X, "columns") else values[:1]))
        return values, y


def _fitted(constraints: FeatureConstraints | None, X: Tensor) -> FeatureConstraints | None:
    """Return constraints, said by index, fitted on the training data unless they are."""
    if constraints is None or hasattr(constraints, "low_"):
        return constraints
    return constraints.fit(X.cpu().numpy())


def _penalized(net: ObjectiveNet, X: Tensor, lam: Any, norm: str, **options: Any) -> Objective:
    """Return cross-entropy, with a Jacobian penalty unless λ is 0; raise if a net has none."""
    strength = float(unwrap_scalar(lam))
    penalized = JacobianRegularization(lam=strength, norm=norm, **options).checked()
    if strength == 0:
        return CrossEntropy()
    with net.drawing():
        check_samples_apart(net.module_, X[:2].to(net.device))
        check_samples_apart_in_training(net.module_, X[:4].to(net.device))
    return penalized
