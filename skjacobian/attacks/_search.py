"""The state of a search for adversarial perturbations: who is fooled, and by what."""

import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from skjacobian.attacks._found import Found, Stage
from skjacobian.exceptions import AttackWarning
from skjacobian.geometry import Ball, is_nowhere
from skjacobian.losses import best_wrong_and_own
from skjacobian.model_modes import PredictLogits
from skjacobian.model_outputs import (
    check_class_indices,
    log_of_probabilities,
    output_kind,
    outputs,
    pulled_back,
)
from skjacobian.norms import rows

# At how many wrong classes brief searches of tables aim, the likeliest first: as many as APGD-T of
# AutoAttack, all of 10.
AIMED_CLASSES = 9

# From logits to one value for each sample, and its derivative by the logits.
LossAndSlope = Callable[[Tensor], tuple[Tensor, Tensor]]


class BudgetSpentError(Exception):
    """A search has used up its queries or its time."""


class Search:
    """A search on a batch: the best perturbation of each sample, and who is still in it.

    `X_best` and `best` hold, for all samples, the first perturbation that fooled the model
    or else the point of largest margin where a search ended. `active` are the indices of
    the samples that are searched; `ball`, `y`, `target` (the wrong class aimed at, or None)
    and `done` (who needs no more of it) are those of the active ones, and an attack keeps
    its own tensors in the same order.
    """

    # Dropping samples copies the others, so it waits until a few can go.
    DROP_SHARE = 0.02
    # Of so many samples each feature has a gradient at some, even behind max pooling.
    MANY_SAMPLES = 32

    def __init__(self, model: PredictLogits, ball: Ball, y: Tensor) -> None:
        self.model = model
        self.all_balls, self.all_y = ball, y
        self.X_best = ball.X.clone()
        self.best = torch.full((len(y),), -torch.inf, dtype=ball.X.dtype, device=y.device)
        self.n_queries = torch.zeros_like(y)
        self.is_zero = torch.zeros_like(y, dtype=torch.bool)
        self.is_not_finite = torch.zeros_like(y, dtype=torch.bool)
        self.is_undefined = torch.zeros_like(y, dtype=torch.bool)
        self.is_blind = torch.zeros_like(y, dtype=torch.bool)
        self.eligible = torch.ones_like(y, dtype=torch.bool)
        self.stages: list[Stage] = []
        self.on_stage: Callable[[Stage], None] | None = None
        self.clean = torch.full_like(self.best, torch.nan)
        self.calls_left: int | None = None
        self.deadline: float | None = None
        self.n_classes = 0  # until the model has been asked
        self.inspected = False
        self.n_missed_features = 0
        self.output_kind: str | None = None
        self._ranking: Tensor | None = None

    def restart(self, rank: int | None = None) -> bool:
        """Turn to all eligible samples that still stand; tell whether there are any.

        With a `rank`, aim at the wrong class of that rank, 0 being the likeliest.
        """
        ranking = None if rank is None else self._ranked_classes()
        self.active = ((self.best <= 0) & self.eligible).nonzero().squeeze(1)
        everyone = len(self.active) == len(self.all_y)
        self.ball = self.all_balls if everyone else self.all_balls[self.active]
        self.y = self.all_y[self.active]
        self.done = torch.zeros_like(self.y, dtype=torch.bool)
        self.target = None if ranking is None else ranking[self.active, rank]
        return len(self.active) > 0

    def n_wrong_classes(self) -> int:
        """Return how many classes a search may aim at."""
        return self._ranked_classes().shape[1]

    def _ranked_classes(self) -> Tensor:
        """Return the wrong classes of each sample by falling logit at the clean sample."""
        if self._ranking is None:
            self._clean_logits()
        assert self._ranking is not None
        return self._ranking

    def ask_clean(self) -> None:
        """Ask about all clean samples, and turn to all of them."""
        logits = self._clean_logits()
        self.restart()
        self.clean = self.safe_margin(logits)
        self.record(self.ball.X, self.clean, ~self.done)

    def _clean_logits(self) -> Tensor:
        """Return the logits at all clean samples; they rank the wrong classes."""
        self.active, self.y = torch.arange(len(self.all_y), device=self.all_y.device), self.all_y
        self.ball = self.all_balls
        with torch.no_grad():
            clean = self.logits(self.ball.X)
        wrong = clean.scatter(1, self.all_y.unsqueeze(1), -torch.inf)
        self._ranking = wrong.sort(stable=True, dim=1, descending=True).indices[:, :-1]
        return clean

    def logits(self, X_adv: Tensor) -> Tensor:
        """Return the logits at one point of each active sample, and count the query.

        Raises
        ------
        BudgetSpentError
            Instead of a call too many, or too late.
        """
        self._spend()
        self.n_queries.index_add_(0, self.active, torch.ones_like(self.active))
        output = outputs(self.model, self.ball.valid(X_adv))
        if self.n_classes == 0:
            check_class_indices(self.all_y, output.shape[1])
        self.n_classes = output.shape[1]
        if self.output_kind is None:
            self.output_kind = output_kind(output)
        return log_of_probabilities(output) if self.output_kind == "probabilities" else output

    def _spend(self) -> None:
        if self.calls_left is not None:
            if self.calls_left == 0:
                raise BudgetSpentError
            self.calls_left -= 1
        if self.is_late():
            raise BudgetSpentError

    def is_late(self) -> bool:
        """Tell whether the time is used up."""
        return self.deadline is not None and time.perf_counter() > self.deadline

    def margin(self, X_adv: Tensor) -> Tensor:
        """Return the margin at one point of each active sample, without a gradient."""
        with torch.no_grad():
            return self.safe_margin(self.logits(X_adv))

    def safe_margin(self, logits: Tensor) -> Tensor:
        """Return the margin less what rounding may make of it in a batch of another size."""
        found, rounding = self.margin_and_rounding(logits)
        return (found - rounding).to(self.best.dtype)

    def margin_and_rounding(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return margins, and what rounding may make of them: of the two logits between which.

        Others may be as low as -1e9, where a class is masked.
        """
        best, own = best_wrong_and_own(logits, self.y)
        size = torch.maximum(best.abs(), own.abs()).nan_to_num_(0.0, posinf=0.0)
        unit = torch.finfo(logits.dtype).eps
        # Half precision is rounded once, after sums in float32; there much more would be lost.
        return best - own, size.mul_((16 if unit < 1e-4 else 2) * unit)

    def gradient(self, X_adv: Tensor, loss: LossAndSlope) -> tuple[Tensor, Tensor, Tensor]:
        """Return the margin, the loss of the logits and its gradient at each active sample.

        Parameters
        ----------
        X_adv : Tensor of shape (n_active, *features)
        loss : callable
            Maps logits of the active samples to one value for each, and its derivative by them.
        """
        X = X_adv.detach().requires_grad_()
        logits = self.logits(X)
        value, slope = loss(logits)
        of_all = pulled_back(slope, logits, X)
        gradient = self.ball.of_free(of_all)
        found = self.safe_margin(logits.detach())
        undefined = found.isnan()
        if not is_nowhere(undefined):
            self.is_undefined[self.active] |= undefined
        if not self.inspected:
            self._inspect(of_all, gradient, fooled=found > 0)
        return found, value, gradient

    def record(self, X_adv: Tensor, found: Tensor, ended: Tensor) -> None:
        """Keep the points of those that `ended` here, if their margin beats what is kept.

        Valid ones: what a point is rounded to may be another once it has been made exact.
        """
        better = ended & (found > self.best[self.active])
        if X_adv.is_cuda:  # without waiting for the device
            better_row, X_adv = rows(better, X_adv), self.ball.nearest_valid(X_adv)
            self.best[self.active] = torch.where(better, found, self.best[self.active])
            self.X_best[self.active] = torch.where(better_row, X_adv, self.X_best[self.active])
            return
        chosen = better.nonzero().squeeze(1)
        if len(chosen):
            target = self.active[chosen]
            self.best[target] = found[chosen]
            of_chosen = self.ball if self.ball.rules is None else self.ball[chosen]
            self.X_best[target] = of_chosen.nearest_valid(X_adv[chosen])

    def end(self, X_adv: Tensor, found: Tensor, done: Tensor) -> None:
        """End the search of who is `done`, and keep the points where it ended."""
        if not is_nowhere(done):
            self.record(X_adv, found, done & ~self.done)
            self.done |= done

    def keep(self, X_adv: Tensor, found: Tensor) -> None:
        """Keep the points if they are better, and end the search of those that fool the model."""
        self.record(X_adv, found, ~self.done)
        self.done |= found > 0

    def drop(self, step: int) -> Tensor | None:
        """Drop who is done; return the indices, among the active, of those that stay.

        None means that all stay, for now: copying waits until it pays. On an accelerator,
        for which the CPU must wait to know, it happens after steps 0, 1, 3, 7, 15, …: often
        enough, and log2(n_steps) times.
        """
        if self.done.is_cuda and step & (step + 1) != 0:
            return None
        kept = (~self.done).nonzero().squeeze(1)
        if len(self.done) - len(kept) <= self.DROP_SHARE * len(self.done):
            return None
        self.active, self.ball, self.y = self.active[kept], self.ball[kept], self.y[kept]
        self.done = self.done[kept]
        self.target = None if self.target is None else self.target[kept]
        return kept

    def result(self) -> Found:
        """Return what was found, exactly inside the sets."""
        enforced, best = self.all_balls.enforce(self.X_best), self.best
        X_adv = self.all_balls.valid(enforced)
        seen = self.all_balls.valid(self.X_best)
        different = X_adv != seen
        if self.all_balls.missing is not None:
            different &= ~self.all_balls.missing
        moved = different.flatten(1).any(1).nonzero().squeeze(1)
        if len(moved):  # by a rounding error, which may decide
            self.calls_left = self.deadline = None
            self.active, self.ball, self.y = moved, self.all_balls[moved], self.all_y[moved]
            best = best.index_copy(0, moved, self.margin(enforced[moved]))
        reasons = (self.is_zero, self.is_not_finite, self.is_undefined, self.is_blind)
        return Found(X_adv, best > 0, self.n_queries, *reasons, stages=tuple(self.stages))

    def _inspect(self, of_all: Tensor, of_free: Tensor, fooled: Tensor) -> None:
        """Note where the gradient gives the attack nothing to follow.

        Samples where it is zero at all features: those that may change may well be those that do
        not matter. Those where it is not finite at these. And features at which it is zero for
        all samples, of which there are many, although they matter.
        """
        size = of_all.abs()
        size_free = size if of_free is of_all else of_free.abs()
        largest = size.flatten(1).amax(1)
        self.is_zero[self.active] = (largest == 0) & ~fooled
        self.is_not_finite[self.active] = ~torch.isfinite(size_free.flatten(1).amax(1))
        self.inspected = True
        if len(of_free) >= self.MANY_SAMPLES and bool((largest > 0).any()):
            scale = self.ball.scale
            self._inspect_missed((size_free.amax(0) == 0) & (True if scale is None else scale > 0))

    def _inspect_missed(self, features: Tensor) -> None:
        """Note the samples that the model answers otherwise with other values of some features.

        These are the values of the sample before, as far as the ball reaches; not where others
        must change with them, as in a category. A model that does not answer the same question
        alike says nothing.
        """
        if not bool(features.any()):
            return
        X = self.ball.X
        changed = self.ball.enforce(torch.where(features, X.roll(1, dims=0), X))
        with torch.no_grad():
            here, there, again = (self.logits(points) for points in (X, changed, X))
        alone = (self.ball.nearest_valid(changed) == X) | features
        depends = (there != here).any(1) & (again == here).all(1) & alone.flatten(1).all(1)
        self.is_blind[self.active] = depends
        self.n_missed_features = int(features.sum())

    def warn_of_bad_gradients(self) -> None:
        """Warn if first gradients were zero or not finite, a sign of masking, or logits NaN."""
        for masked, kind in ((self.is_zero, "zero"), (self.is_not_finite, "NaN or infinite")):
            count = int(masked.sum())
            if count:
                warnings.warn(
                    f"The loss gradient was {kind} at the first step of {count} of "
                    f"{len(self.all_y)} samples, so the attack could not search there and "
                    "robustness may be overstated. Very large logits do this to "
                    "cross-entropy; loss='soft_margin' does not suffer from it. Where the "
                    "model itself has no gradient, only black-box attacks (Square) can tell.",
                    AttackWarning,
                    stacklevel=4,
                )
        count = int(self.is_blind.sum())
        if count and self.n_missed_features:
            warnings.warn(
                f"The loss gradient was zero at {self.n_missed_features} of "
                f"{self.all_balls.X.shape[1:].numel()} features for all samples, but the answers "
                f"to {count} of {len(self.all_y)} samples depend on them, so the attack is "
                "blind there and robustness may be overstated. Modules that "
                "round, cast to integers (embeddings) or detach do this. Only black-box attacks "
                "(Square) can tell.",
                AttackWarning,
                stacklevel=4,
            )
        count = int((self.is_undefined & ~self.is_not_finite).sum())
        if count:
            warnings.warn(
                f"The model returned NaN for {count} of {len(self.all_y)} samples where the attack "
                "went, so it lost its way there and robustness may be overstated. Bounds that "
                "say where the model is defined help.",
                AttackWarning,
                stacklevel=4,
            )
