"""The attack behind `attack="strong"`: cheap attacks first, costly ones on who still stands."""

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import joblib
import torch
from torch import Tensor

from skjacobian._rng import spawned
from skjacobian._validation import check_count, check_positive
from skjacobian.attacks._base import Attack
from skjacobian.attacks._flips import flips_pay
from skjacobian.attacks._found import Found, Stage
from skjacobian.attacks._search import BudgetSpentError, Search
from skjacobian.attacks.apgd import APGD
from skjacobian.attacks.fmn import FMN
from skjacobian.attacks.hotflip import HotFlip
from skjacobian.attacks.leaf_search import LeafSearch, known_leaves, leaves_decide
from skjacobian.attacks.pgd import PGD
from skjacobian.attacks.rays import RayS
from skjacobian.attacks.square import Square
from skjacobian.constraints import FeatureConstraints
from skjacobian.exceptions import AttackWarning, NoGradientError
from skjacobian.model_modes import PredictLogits

CLEAN = "clean"

# Tells whom a stage attacks, of those that stand.
Who = Callable[[Search], Tensor]


class Plan(NamedTuple):
    """One stage to come: its name, its attack, and on whom it runs of those that stand."""

    name: str
    attack: Attack
    who: Who


def everyone(search: Search) -> Tensor:
    """Tell that all samples are attacked."""
    return torch.ones_like(search.eligible)


def nearly_fooled(share: float) -> Who:
    """Attack the samples that have no more than a share of their clean margin left."""
    return lambda search: search.best >= share * search.clean


def misled(search: Search) -> Tensor:
    """Attack where gradients seem to mislead: Square came closer, or there are none."""
    probe = next(stage for stage in search.stages if stage.attack == "Square")
    return (probe.gain > ROUNDING) | without_gradient(search)


def without_gradient(search: Search) -> Tensor:
    """Attack where the first gradient was zero or not finite."""
    return search.is_zero | search.is_not_finite


def misled_or_nearly_fooled(search: Search) -> Tensor:
    """Attack where gradients seem to mislead, or have brought half of the way."""
    return misled(search) | nearly_fooled(0.5)(search)


# A share of the clean margin that is no gain: the same point, reached by another sum.
ROUNDING = 1e-4

# How plans for few features end. FMN looks inside the ball, where PGD, whose first steps cross it,
# does not come: what kernel machines take for a class may lie there alone, amid plateaus. It is
# last, so that Square tells whether gradients mislead: FMN tries random points, too.
END_OF_FEW = (
    Plan("Square, briefly", Square(n_queries=100), everyone),
    Plan("Square", Square(n_queries=1000), misled_or_nearly_fooled),
    Plan("Square, longer", Square(n_queries=5000), without_gradient),
    Plan("FMN", FMN(), everyone),
)

# What runs on a model that has gradients, only scores, or only decisions.
PLANS: dict[str, tuple[Plan, ...]] = {
    "gradients": (
        Plan("PGD", PGD(n_steps=40), everyone),
        Plan("PGD, targeted", PGD(n_steps=20, n_targets=9), nearly_fooled(0.5)),
        Plan("PGD, targeted, again", PGD(n_steps=40, n_targets=9), nearly_fooled(0.2)),
        Plan("PGD, restarted", PGD(n_steps=40, n_restarts=10), nearly_fooled(0.2)),
        Plan("Square, briefly", Square(n_queries=100), everyone),
        Plan("Square", Square(n_queries=5000), misled),
    ),
    "gradients of few features": (
        Plan("PGD", PGD(n_steps=40), everyone),
        Plan("PGD, targeted", PGD(n_steps=40, n_targets=9), everyone),  # exact if linear
        Plan("PGD, restarted", PGD(n_steps=40, n_restarts=20), nearly_fooled(0.5)),
        Plan("PGD, on the margin", PGD(n_restarts=20, loss="margin"), nearly_fooled(0.5)),
        Plan("APGD", APGD(), nearly_fooled(0.5)),
        *END_OF_FEW,
    ),
    "gradients in l1 balls of few features": (
        Plan("PGD", PGD(n_steps=40, n_restarts=9), everyone),  # 8 at single features
        Plan("PGD, targeted", PGD(n_steps=40, n_targets=9), everyone),
        Plan("APGD", APGD(n_steps=400), nearly_fooled(0.5)),  # to the end of kinks
        *END_OF_FEW,
    ),
    "scores": (
        Plan("RayS", RayS(n_queries=1000), everyone),  # scores may be flat, as of neighbours
        Plan("Square", Square(n_queries=5000), everyone),
    ),
    "scores in boxes": (
        Plan("Square", Square(n_queries=5000), everyone),  # inside, where rays do not lead
        Plan("RayS", RayS(n_queries=1000), everyone),
    ),
    "labels": (Plan("RayS", RayS(n_queries=3000), everyone),),
    "labels in boxes of few features": (
        Plan("RayS", RayS(n_queries=3000), everyone),
        Plan("Square", Square(n_queries=3000), everyone),  # inside, where rays do not lead
    ),
}


# What comes first where the leaves of trees are known, and what then is left to look for. Where
# there are categories, which the search among leaves holds fixed, the whole plan follows.
LEAVES = Plan("leaves", LeafSearch(), everyone)
AFTER_LEAVES = (
    Plan("Square, briefly", Square(n_queries=100), everyone),
    Plan("RayS, briefly", RayS(n_queries=300), everyone),
)
# What follows on the first stage over categories, and where whole numbers share a budget.
FLIPS = Plan("HotFlip", HotFlip(), everyone)


class Cascade(Attack):
    """A cascade of attacks, from cheap to costly, each on the samples that still stand.

    What `attack="strong"` runs. The worst case over:

    1. the clean samples;
    2. PGD of 40 steps on the soft margin, which is cross-entropy freed of the scale of the
       logits;
    3. PGD of 20 steps on the margin to each of the 9 likeliest wrong classes, on the samples
       that have no more than half of their clean margin left;
    4. the same with 40 steps from other starts, and step 2 from 10 starts, where no more than
       a fifth is left;
    5. Square with 100 queries, which needs no gradient;
    6. Square with 5,000 queries, on the samples whose gradient was zero or not finite, and on
       those where step 5 came closer than all gradients: signs that the gradients mislead.

    With at most 100 features, step 3 takes 40 steps on all that stand, which is exact for a
    linear model; step 4 attacks all that have no more than half left, from 20 starts on the soft
    margin and from 20 on the margin, and then by APGD; Square follows on them with 1,000 queries;
    and in the end FMN on all that stand, which looks inside the ball as well. Under l1, step 2
    searches from 9 starts, of which 8 are the best changes of single features, and APGD, for 400
    steps, stands for step 4.

    Samples that steps 3 and 4 leave out were hardly ever fooled by them (docs/benchmarks.md).
    Over categories, and in l2 and l1 balls over whole numbers, HotFlip follows on step 2. A model
    without gradients gets Square with 5,000 queries and RayS with 1,000, under l1 and l2 in the
    reverse order; one that returns only decisions (rows of 0 and 1) RayS with 3,000, and in linf
    balls of at most 100 features Square with 3,000, which looks inside of the box. A warning says
    so. Of trees whose leaves are known LeafSearch comes first, and then, unless there are
    categories, Square with 100 queries and RayS with 300.

    Every step is invariant to a rescaling of the logits. Who fooled a sample, at what price,
    is in the `stages` of what `search` returns.

    Parameters
    ----------
    norm : {"linf", "l2", "l1"}, default="linf"
        Norm of the ball.
    eps : float or Tensor of shape (n_samples,), default=0.1
        Radius: ‖(X_adv - X) / feature_scale‖ <= eps. A tensor has one value per sample.
    feature_scale : None, "std", "range" or array of shape (n_features,), default=None
        Unit of each feature; None is 1, "std" and "range" are those of the X attacked.
    bounds : (low, high), optional
        Numbers or one value per feature. None means unbounded; there is no implicit clip.
    mutable : int, or array-like of int or bool, optional
        Features that may change: indices, or a boolean mask. None is all.
    constraints : FeatureConstraints, optional
        What else makes a sample valid, columns given by index.
    n_queries : int, optional
        How often a sample is shown to the model at most; for l1 and l2 one query more may confirm
        the result. None is no limit. All samples of a batch stop together, so results under a
        limit depend on what else is in the batch.
    time_limit : float, optional
        Seconds after which the search ends with what it has. None is no limit. Results
        under a time limit differ from run to run.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> X, y = torch.tensor([[1.0, 0.5], [1.0, 0.0]]), torch.tensor([0, 0])
    >>> attack = Cascade(norm="linf", eps=0.3)
    >>> found = attack.search(lambda X: X @ W.T, X, y, generator=torch.Generator().manual_seed(0))
    >>> found.fooled
    tensor([ True, False])
    >>> [stage.name for stage in found.stages if stage.fooled.any()]
    ['PGD']
    """

    needs = "labels"

    def __init__(
        self,
        *,
        norm: str = "linf",
        eps: Any = 0.1,
        feature_scale: Any = None,
        bounds: Any = None,
        mutable: Any = None,
        constraints: FeatureConstraints | None = None,
        n_queries: int | None = None,
        time_limit: float | None = None,
    ) -> None:
        self.norm = norm
        self.eps = eps
        self.feature_scale = feature_scale
        self.bounds = bounds
        self.mutable = mutable
        self.constraints = constraints
        self.n_queries = n_queries
        self.time_limit = time_limit

    def check_params(self) -> None:
        """Raise a ValueError that names the first parameter with a bad value."""
        super().check_params()
        if self.n_queries is not None:
            check_count("n_queries", self.n_queries)
        if self.time_limit is not None:
            check_positive("time_limit", self.time_limit)

    def search(
        self,
        predict_logits: PredictLogits,
        X: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        resume: Found | None = None,
        on_stage: Callable[[Stage], None] | None = None,
    ) -> Found:
        """Search as `__call__` does, and say of each sample what fooled the model.

        Parameters
        ----------
        predict_logits, X, y, generator
            As for `__call__`.
        resume : Found, optional
            What a search of the same samples with the same seed found before its budget
            was spent. The stages that it completed are not run again. Two queries tell where
            it stood.
        on_stage : callable, optional
            Called with each `Stage` when it has been run.

        Returns
        -------
        Found
            With `stages` and `complete`.

        Raises
        ------
        ValueError, TypeError
            As `__call__` does; and a ValueError if `resume` is of other samples, other labels or
            another threat model.

        Warns
        -----
        AttackWarning
            As `__call__` does; and if the model has no gradients, so that only searches by scores
            or decisions were run.
        """
        problem = self._problem(X, y)
        if resume is not None and resume.problem != problem:
            raise ValueError(
                "Got resume of another search, but expected what a search of the same X and y "
                "under the same threat model found."
            )
        search_with = partial(self._search, resume=resume, on_stage=on_stage)
        found = self._run(search_with, predict_logits, X, y, generator)
        return replace(found, problem=problem)

    def _problem(self, X: Any, y: Any) -> str:
        said: str = joblib.hash(
            [_as_arrays(value) for value in (X, y, *self.threat_model.values())]
        )
        return said

    def _search(
        self,
        search: Search,
        generator: torch.Generator,
        resume: Found | None = None,
        on_stage: Callable[[Stage], None] | None = None,
    ) -> None:
        start = time.perf_counter()
        search.on_stage = on_stage
        # One for each stage, so that what it draws does not depend on those before it.
        longest = max(len(plans) for plans in PLANS.values()) + 1  # HotFlip, or leaves
        by_gradients, by_scores = (spawned(generator, longest) for _ in range(2))
        _run_stage(search, CLEAN, CLEAN, Search.ask_clean)
        if resume is not None:
            _take_up(search, resume)
        # Not before: with any budget, what is returned must be what the model says.
        if self.n_queries is not None:
            search.calls_left = max(0, int(self.n_queries) - (1 if resume is None else 2))
        if self.time_limit is not None:
            search.deadline = start + float(self.time_limit)
        known = _known(search)
        try:
            self._run_stages(search, known, by_gradients)
        except NoGradientError:
            known = _by_scores(search.all_balls.norm)
            self._run_stages(search, known, by_scores)
        if not leaves_decide(search.model, search.all_balls.rules):
            _warn_of_weakness(known)

    def _run_stages(self, search: Search, known: str, generators: list[torch.Generator]) -> None:
        plans = self._plans(search, known)
        for plan, generator in zip(plans, generators[: len(plans)], strict=True):
            attack = plan.attack.with_threat(self.threat_model)
            search.eligible = plan.who(search)
            with torch.set_grad_enabled(attack.needs == "gradients"):
                run = partial(attack._search, generator=generator)
                if not _run_stage(search, plan.name, type(attack).__name__, run):
                    return

    def _plans(self, search: Search, known: str) -> tuple[Plan, ...]:
        """Return the stages for what is known of the model and of the features."""
        plans = PLANS[known]
        if known_leaves(search.model) is not None:
            decide = leaves_decide(search.model, search.all_balls.rules)
            return (LEAVES, *(AFTER_LEAVES if decide else plans))
        if not flips_pay(search.all_balls) or not known.startswith("gradients"):
            return plans
        return (plans[0], FLIPS, *plans[1:])


def _as_arrays(value: Any) -> Any:
    """Return tensors as arrays of float64, whose hash is that of their values."""
    if isinstance(value, tuple | list):
        return [_as_arrays(part) for part in value]
    # numpy has no bfloat16.
    return value.detach().to("cpu", torch.float64).numpy() if isinstance(value, Tensor) else value


def _take_up(search: Search, resume: Found) -> None:
    """Put a new search where an earlier one ended."""
    if search.restart():
        X_adv = resume.X_adv[search.active]
        search.record(X_adv, search.margin(X_adv), ~search.done)
    search.n_queries += resume.n_queries
    search.is_zero |= resume.is_zero
    search.is_not_finite |= resume.is_not_finite
    search.is_undefined |= resume.is_undefined
    search.is_blind |= resume.is_blind
    search.stages = [stage for stage in resume.stages if stage.complete]
    # By the first of the stages with gradients, at its first step.
    search.inspected = any(stage.name != CLEAN for stage in search.stages)


def _run_stage(search: Search, name: str, attack: str, run: Callable[[Search], None]) -> bool:
    """Run one stage unless it has been run, and note what it did; tell whether it ended."""
    if any(stage.name == name for stage in search.stages):
        return True
    best, n_queries, start = search.best.clone(), search.n_queries.clone(), time.perf_counter()
    complete = True
    try:
        run(search)
    except BudgetSpentError:
        complete = False
    stage = Stage(
        name,
        attack,
        fooled=(best <= 0) & (search.best > 0),
        gain=_gain(search, best),
        n_queries=search.n_queries - n_queries,
        seconds=time.perf_counter() - start,
        complete=complete,
    )
    search.stages.append(stage)
    if search.on_stage is not None:
        search.on_stage(stage)
    return complete


def _gain(search: Search, before: Tensor) -> Tensor:
    """Return by what share of the clean margin the best margin rose where it is negative."""
    clean = search.clean.abs().clamp(min=torch.finfo(before.dtype).tiny)
    rise = (search.best - before) / clean
    return rise.where(before.isfinite() & (search.best <= 0), 0.0)


def _known(search: Search) -> str:
    """Tell which plan there is for what a model returns, supposing that logits have gradients."""
    has_few, norm = search.ball.has_few_features, search.ball.norm
    if search.output_kind == "decisions":
        return "labels in boxes of few features" if has_few and norm == "linf" else "labels"
    if known_leaves(search.model) is not None:
        return _by_scores(norm)
    if not has_few:
        return "gradients"
    return "gradients in l1 balls of few features" if norm == "l1" else "gradients of few features"


def _by_scores(norm: str) -> str:
    """Return the name of the plan for a model that gives only scores."""
    return "scores in boxes" if norm == "linf" else "scores"


def _warn_of_weakness(known: str) -> None:
    if known.startswith("gradients"):
        return
    what = {
        "scores": "does not depend on X differentiably, so only searches by decisions and scores "
        "(RayS, Square)",
        "scores in boxes": "does not depend on X differentiably, so only searches by scores and "
        "decisions (Square, RayS)",
        "labels": "returns only decisions, so only a search by decisions (RayS)",
        "labels in boxes of few features": "returns only decisions, so only searches by decisions "
        "(RayS, Square)",
    }[known]
    warnings.warn(
        f"The model {what} could be run. It is weaker than a gradient attack: robustness may be "
        "overstated.",
        AttackWarning,
        stacklevel=5,
    )
