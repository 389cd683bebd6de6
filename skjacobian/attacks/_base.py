"""The contract of every attack: it alone enforces the ball and decides success."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from sklearn.base import BaseEstimator, clone
from torch import Tensor

from skjacobian._columns import Columns
from skjacobian._domain import IsDefined, domain
from skjacobian._rng import seeded
from skjacobian._validation import (
    check_floating,
    check_non_negative,
    check_option,
    check_tensor,
    reject,
)
from skjacobian.attacks._found import Found
from skjacobian.attacks._search import Search
from skjacobian.constraints import FeatureConstraints, check_constraints
from skjacobian.geometry import BALL_NORMS, Ball
from skjacobian.model_modes import PredictLogits, frozen
from skjacobian.model_outputs import check_gradients_are_possible
from skjacobian.threat_model import (
    check_inside,
    outside,
    resolve_bounds,
    resolve_feature_scale,
    without_shut,
)
from skjacobian.validity import Rules


class Attack(BaseEstimator):
    """Base of all attacks: an adversary with a threat model, and a search that it uses.

    A subclass says how it searches (`_search`); this class checks what it is given, keeps
    the best perturbation of each sample, and guarantees that nothing leaves the ball.

    An attack is a value object: `__init__` only stores, so `clone`, `repr`, pickling and
    nested search parameters work.

    Attributes
    ----------
    needs : {"gradients", "scores", "labels"}
        What the attack must know of a model: the gradient of its logits, logits or
        probabilities alone, or no more than which class is predicted.
    norms : tuple of str
        Norms of the balls that it can search.
    THREAT_MODEL : tuple of str
        The parameters that say what an adversary may do; the others say how it searches.
    """

    THREAT_MODEL: ClassVar = ("norm", "eps", "feature_scale", "bounds", "mutable", "constraints")

    needs: ClassVar[str] = "gradients"
    norms: ClassVar[tuple[str, ...]] = BALL_NORMS

    norm: str
    eps: Any
    feature_scale: Any
    bounds: Any
    mutable: Any
    constraints: FeatureConstraints | None

    def _search(self, search: Search, generator: torch.Generator) -> None:
        """Search all samples, recording in `search` what is found."""
        raise NotImplementedError

    def with_threat(self, threat_model: dict[str, Any]) -> Self:
        """Return this attack for another threat model."""
        fresh: Self = clone(self).set_params(**threat_model)
        return fresh

    @property
    def threat_model(self) -> dict[str, Any]:
        """What the adversary may do, by parameter."""
        return {name: getattr(self, name) for name in self.THREAT_MODEL}

    def check_params(self) -> None:
        """Raise a ValueError that names the first parameter with a bad value."""
        check_option("norm", self.norm, self.norms)
        if not isinstance(self.eps, Tensor):
            check_non_negative("eps", self.eps)
        elif not bool((self.eps.isfinite() & (self.eps >= 0)).all()):
            reject("eps", self.eps, "non-negative finite numbers")
        check_constraints(self.constraints, self.feature_scale, self.bounds)

    def __call__(
        self,
        predict_logits: PredictLogits,
        X: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Search for a perturbation of each sample that fools the model.

        Parameters
        ----------
        predict_logits : callable
            Maps X to logits of shape (n_samples, n_classes), or to probabilities, which are
            recognised by their rows that sum to 1. For an attack that `needs` gradients,
            differentiably. A module is attacked in eval mode with its parameters frozen,
            and left as it was.
        X : Tensor of shape (n_samples, *features)
        y : Tensor of shape (n_samples,)
            True class indices.
        generator : torch.Generator, optional
            A CPU generator for random starts; None draws a fresh, unpredictable seed.

        Returns
        -------
        Tensor of shape (n_samples, *features)
            For each sample the first perturbation found that fools the model, or else
            the point of largest margin max_{k != y} z_k - z_y at which a search for it
            ended. Exactly inside ball and box; `X` itself where eps=0.

        Raises
        ------
        ValueError
            For parameters, samples or labels that make no sense or do not go together, and clean
            samples outside `bounds` or `constraints`.
        TypeError
            If X or y is no tensor, or the model does not return a row of logits for each sample.
        NoGradientError
            If the attack needs gradients and the model has none; a ValueError.

        Warns
        -----
        AttackWarning
            If first gradients are zero or not finite, or the model returns NaN where the attack
            goes.
        """
        return self.search(predict_logits, X, y, generator=generator).X_adv

    def search(
        self,
        predict_logits: PredictLogits,
        X: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Search as `__call__` does, and say of each sample whether the model is fooled.

        Returns
        -------
        Found
            With `X_adv`, `fooled`, `n_queries`, and `no_gradient`: where gradients gave nothing
            to follow.

        Raises
        ------
        ValueError, TypeError, NoGradientError
            As `__call__` does.

        Warns
        -----
        AttackWarning
            As `__call__` does.
        """
        return self._run(self._search, predict_logits, X, y, generator)

    def _run(
        self,
        search_with: Callable[[Search, torch.Generator], None],
        predict_logits: PredictLogits,
        X: Tensor,
        y: Tensor,
        generator: torch.Generator | None,
    ) -> Found:
        """Check what was given, let `search_with` search, and make sure of what it found."""
        self.check_params()
        _check_tensors(X, y)
        if self.needs == "gradients":
            check_gradients_are_possible()
        X, y = X.clone() if X.is_inference() else X.detach(), y.long()
        self.check_clean(X)
        with frozen(predict_logits), torch.set_grad_enabled(self.needs == "gradients"):
            search = Search(predict_logits, self.ball(X), y)
            if self.eps_is_zero:
                _stay(search)
            else:
                search_with(search, seeded(generator))
            found = search.result()
        search.warn_of_bad_gradients()
        return found

    @property
    def eps_is_zero(self) -> bool:
        """Whether the radius is 0 for every sample."""
        return bool((torch.as_tensor(self.eps) == 0).all())

    def rules_of(self, X: Tensor) -> Rules | None:
        """Return what makes samples like `X` valid; None for all."""
        return None if self.constraints is None else self.constraints.resolve(X)

    def bounds_of(self, X: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the bounds for samples `X`, wherever they were said; None for unbounded."""
        return self._bounds(X, self.rules_of(X))

    def scale_of(self, X: Tensor) -> Tensor | None:
        """Return the feature scale for samples `X`, 0 where a feature is fixed; None for 1."""
        return self._scale(X, self.rules_of(X))

    def reach_of(self, X: Tensor) -> Tensor:
        """Return how far each feature can change, bounds aside, in float64."""
        scale = self.scale_of(X)
        reach = torch.as_tensor(self.eps, dtype=torch.float64, device=X.device)
        if scale is not None:
            reach = (reach * scale).where(scale > 0, 0.0)
        return reach.expand(X.shape[1:])

    def where_defined(self, is_defined: IsDefined, X: Tensor) -> Self:
        """Return this attack, kept in the range of each feature in which a model is defined.

        Beyond it, as at the logarithm of a negative number, `predict` raises.

        Parameters
        ----------
        is_defined : callable
            Tells of points like `X` at which the model returns numbers.
        X : Tensor of shape (n_samples, *features)
        """
        if self.eps_is_zero or X.ndim != 2 or len(X) == 0:
            return self
        bounds = self.bounds_of(X.new_empty((0, *X.shape[1:]), dtype=torch.float64))
        found = domain(is_defined, X, self.reach_of(X), bounds)
        if found is None:
            return self
        low, high = found
        if self.constraints is not None and self.constraints.bounds is not None:
            narrowed = self.constraints.narrowed(low.cpu().numpy(), high.cpu().numpy())
            return self.with_threat({**self.threat_model, "constraints": narrowed})
        if bounds is not None:
            low, high = low.maximum(bounds[0]), high.minimum(bounds[1])
        return self.with_threat({**self.threat_model, "bounds": (low, high)})

    def _bounds(self, X: Tensor, rules: Rules | None) -> tuple[Tensor, Tensor] | None:
        return resolve_bounds(self.bounds, X) or (None if rules is None else rules.bounds)

    def _scale(self, X: Tensor, rules: Rules | None) -> Tensor | None:
        scale = resolve_feature_scale(self.feature_scale, X, self.mutable)
        if rules is not None:
            scale = rules.scaled(scale).to(X)
        return without_shut(scale, self._own_bounds(X, rules), X)

    def _own_bounds(self, X: Tensor, rules: Rules | None) -> tuple[Tensor, Tensor] | None:
        """Return the bounds that clean samples keep, too."""
        return None if rules is not None and rules.extends else self._bounds(X, rules)

    def outside(self, X: Tensor) -> Tensor:
        """Tell which clean samples lie outside their bounds, by more than rounding."""
        return outside(X, self._own_bounds(X, self.rules_of(X)))

    def check_valid(self, X: Tensor, columns: Columns | None = None) -> None:
        """Raise a ValueError unless clean samples are whole or one-hot where they must be."""
        rules = self.rules_of(X)
        if rules is not None:
            rules.check_clean(X, columns or Columns(X.shape[1:]))

    def check_clean(self, X: Tensor, columns: Columns | None = None) -> None:
        """Raise a ValueError unless clean samples obey bounds and constraints themselves.

        What breaks them is said by the names of the columns, where they are known.
        """
        self.check_valid(X, columns)
        check_inside(X, self._own_bounds(X, self.rules_of(X)), columns)

    def ball(self, X: Tensor) -> Ball:
        """Return the sets that this adversary may choose from, around the rows of `X`."""
        rules = self.rules_of(X)
        return Ball.around(
            X.detach(),
            norm=self.norm,
            eps=self.eps,
            scale=self._scale(X, rules),
            bounds=self._bounds(X, rules),
            rules=rules,
        )


def _stay(search: Search) -> None:
    """Record the clean samples, for an attack that may not move them."""
    if len(search.all_y) > 0:
        search.ask_clean()


def _check_tensors(X: Tensor, y: Tensor) -> None:
    for name, value in (("X", X), ("y", y)):
        check_tensor(name, value, "To attack an estimator with arrays, use RobustScorer.")
    check_floating("X", X)
    if X.ndim == 0:
        raise ValueError("Got X of shape (), but expected (n_samples, *features).")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"Got y of {y.dtype}, but expected class indices, whole numbers.")
    if y.ndim != 1:
        raise ValueError(
            f"Got y of shape {tuple(y.shape)}, but expected one class index for each sample, "
            "shape (n_samples,)."
        )
    if len(y) and int(y.min()) < 0:
        raise ValueError(f"Got y from {int(y.min())}, but expected class indices from 0.")
    if len(X) != len(y):
        raise ValueError(
            f"Got X with {len(X)} samples and y with {len(y)}, but expected as many of each."
        )
