"""The checks behind the flags of a robustness report: is the figure what it seems?"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skjacobian._under_attack import Perturbed, UnderAttack, are_many, fooled_by_square
from skjacobian.attacks import FMN, PGD, Attack, Cascade, Square
from skjacobian.model_modes import frozen
from skjacobian.norms import vector_norm
from skjacobian.report import Flag
from skjacobian.threat_model import resolve_feature_scale

# What the checks behind the flags are made on, at most.
N_CHECKED = 200

# In the ball of each of them, half inside and half as far out as it reaches.
N_RANDOM_POINTS = 8

NOTHING_ATTACKED = "not checked: no sample inside the bounds is classified correctly"

MEANINGS = {
    "gradients": "Raised if the first gradient is zero or not finite at any sample that stands, or "
    "the model returns NaN where an attack goes. Gradient attacks cannot search there; in the "
    "first case Square has been tried, for longer. Or if answers depend on features at which the "
    "gradients of all samples are zero, as where a module rounds or casts some to integers: "
    "only Square can change these.",
    "scale of the logits": "Raised if PGD on cross-entropy says 2 points more than PGD on the "
    "soft margin, and more than by chance. Logits of this scale mislead cross-entropy: it has no "
    "gradient where they are very large, and pushes against all classes at once where they are "
    "small. Figures that others get with it are too high. This one does not depend on the scale.",
    "random predictions": "Raised if the same samples get other predictions when asked again. "
    "Attacks that take one answer for the model overstate its robustness.",
    "black box": "Raised if Square, after all gradients failed, fools 1 % of the samples, or "
    "brings 5 % closer by a quarter of their clean margin, two samples at least. Gradients "
    "mislead, and robustness is likely overstated.",
    "convergence": "Raised if the last restart, or FMN after it, still fools 0.5 % of the samples, "
    "two at least. More restarts would fool more.",
    "huge radius": "Raised if more samples stand than a constant classifier would get right, "
    "at a radius at which anything can become anything. The attack does not work on this model, "
    "or the model does not use the features that may change.",
    "units": "Raised if the radius lets every sample become any other; or, where no scale was "
    "said, lets some features take any value of theirs and changes others by less than 1 % of "
    'their range. eps is in the units of X, which feature_scale="std" or the scale of '
    "constraints replaces by those of each feature.",
    "bounds": "Raised if clean samples lie outside `bounds`, which are in the units of X. They "
    "are counted as fooled.",
    "torch view": "Raised if the classifier's own predict is right where the torch view that was "
    "attacked is wrong: predict decides, so robustness may be overstated by as many. Or if it is "
    "wrong at more than 1 % of the samples where the view is right, as where outputs saturate and "
    "several are the largest: the attack could not see that it had won, and looked elsewhere. Or "
    "if the two differ at random points of the balls, as where a rule decides beside the "
    "probabilities: what was attacked is not all that predicts.",
    "output": "Raised if the model returns probabilities or decisions. Probabilities are "
    "attacked through their logarithm; where they have been rounded to 0 or 1, gradients vanish.",
    "categories": "Raised if columns hold categories that were not said to be immutable. They "
    "were held fixed: an adversary who can change them may do better.",
    "stuck features": "Raised if no feature can change at this radius; or columns of an integer "
    "type, of which nobody said that they are whole numbers, cannot or by clearly less; or "
    "rounding takes back what others change by. An adversary who can may do better.",
    "weak attack": "Raised if less than the strong cascade was run, with gradients or among the "
    "leaves of trees, or a budget "
    "cut it short. Robust accuracy is an upper bound; a stronger attack gives a lower one.",
}


class Checks:
    """The checks behind the flags, on some of the samples that were attacked."""

    def __init__(
        self,
        subject: UnderAttack,
        attack: Attack,
        attacked: np.ndarray,
        perturbed: Perturbed,
    ) -> None:
        self.subject, self.attack = subject, attack
        self.perturbed = perturbed
        spread = np.linspace(0, len(attacked) - 1, min(N_CHECKED, len(attacked))).astype(int)
        self.checked = attacked[spread]
        X = subject.X_tensor[self.checked].to(subject.device)
        self.outputs = []
        if len(X):
            with frozen(subject.view), torch.no_grad():
                self.outputs = [subject.view(X).cpu() for _ in range(2)]

    def flags(self, inside: np.ndarray, unsaid: str, stuck: str) -> tuple[Flag, ...]:
        """Return all flags, raised or not."""
        flags = [
            self.gradients(),
            self.scale_of_the_logits(),
            self.random_predictions(),
            self.black_box(),
            self.convergence(),
            self.huge_radius(),
            self.units(),
            _flag("bounds", int((~inside).sum()), f"{(~inside).sum()} of {len(inside)} samples"),
            self.torch_view(),
            self.output(),
            _flag("categories", unsaid, f"held fixed: {unsaid or 'none'}"),
            _flag("stuck features", stuck, f"eps={self.attack.eps:g}, {stuck or 'none'}"),
            self.weak_attack(),
        ]
        return tuple(flags)

    def _stand(self, attack: Attack, **threat: Any) -> np.ndarray:
        """Tell which of the checked samples stand against an attack."""
        attack = attack.with_threat({**self.attack.threat_model, **threat})
        if threat:  # where the model is defined was asked up to the attack's own radius
            attack = self.subject.where_defined(attack)
        found = self.subject.perturb(attack, self.checked, quietly=True).found
        return (~found.fooled).numpy()

    @cached_property
    def has_gradients(self) -> bool:
        """Whether gradient attacks can run."""
        if len(self.checked) == 0 or self.subject.is_black_box:
            return False
        X = self.subject.X_tensor[self.checked[:1]].to(self.subject.device).requires_grad_()
        with frozen(self.subject.view), torch.enable_grad():
            output = self.subject.view(X).sum()
            if not output.requires_grad:
                return False
            (gradient,) = torch.autograd.grad(output, X, allow_unused=True)
        return gradient is not None and self.subject.output_kind != "decisions"

    @property
    def _fell_back(self) -> bool:
        """Whether the cascade found no gradients to run on."""
        return isinstance(self.attack, Cascade) and not self.perturbed.found.stages_of("PGD")

    def gradients(self) -> Flag:
        """Gradients that are zero or infinite, or lack some features."""
        found, n_attacked = self.perturbed.found, len(self.perturbed.right)
        n_masked, n_undefined = int(found.no_gradient.sum()), int(found.is_undefined.sum())
        detail = f"{n_masked} of {n_attacked} samples"
        if n_undefined:
            detail += f", at {n_undefined} the model returned NaN"
        if n_blind := int(found.is_blind.sum()):
            detail += f", {n_blind} depend on features without a gradient"
        return _flag("gradients", n_masked + n_blind, detail)

    def scale_of_the_logits(self) -> Flag:
        """Logits of a scale at which cross-entropy misleads: it saturates, or is spread thin."""
        name = "scale of the logits"
        if not self.has_gradients:
            return _flag(name, 0, "not checked: there are no gradients")
        misled, plain = (
            self._stand(PGD(n_steps=20, loss=loss)) for loss in ("cross_entropy", "soft_margin")
        )
        n_checked, n_more = len(self.checked), int(misled.sum()) - int(plain.sum())
        detail = (
            f"PGD on cross-entropy leaves {misled.mean():.3f} of {n_checked} samples, on the soft "
            f"margin {plain.mean():.3f}"
        )
        raised = are_many(n_more, 0.02, n_checked) and holds_more_often(misled, plain)
        return _flag(name, raised, detail)

    def random_predictions(self) -> Flag:
        """Answers that differ from one time to the next."""
        if len(self.checked) == 0:
            return _flag("random predictions", 0, NOTHING_ATTACKED)
        first, second = self.outputs
        # Sums over parallel workers differ in their last digits.
        slack = 1e-5 * first.abs().amax(1, keepdim=True)
        differs = ((first - second).abs() > slack).any(1).numpy()
        estimator, X = self.subject.estimator, self.subject.rows(self.checked)
        differs |= np.asarray(estimator.predict(X) != estimator.predict(X))
        return _flag(
            "random predictions", differs.sum(), f"{differs.sum()} of {len(differs)} samples"
        )

    def black_box(self) -> Flag:
        """Square where gradients failed."""
        stages = self.perturbed.found.stages_of("Square")
        if self._fell_back or not stages:
            return _flag("black box", 0, "not checked: Square was not run after gradients")
        n_fooled = fooled_by_square(self.perturbed.found)
        n_closer = sum(int((stage.gain > 0.25).sum()) for stage in stages[:1])
        n_attacked = len(self.perturbed.right)
        raised = are_many(n_fooled, 0.01, n_attacked) or are_many(n_closer, 0.05, n_attacked)
        detail = f"of {n_attacked} samples Square fooled {n_fooled}, came far closer at {n_closer}"
        return _flag("black box", raised, detail)

    def convergence(self) -> Flag:
        """What the last gradient stage still gained."""
        found = self.perturbed.found
        stages = [*found.stages_of("PGD")[1:], *found.stages_of("FMN")]
        if not stages:
            return _flag("convergence", 0, "not checked: nothing was restarted")
        name, n_fooled, n_samples = (
            stages[-1].name,
            int(stages[-1].fooled.sum()),
            len(self.subject.y),
        )
        detail = f"the last search ({name}) fooled {n_fooled} of {n_samples} samples"
        return _flag("convergence", are_many(n_fooled, 0.005, n_samples), detail)

    def huge_radius(self) -> Flag:
        """Robust accuracy where nothing should stand."""
        if len(self.checked) == 0:
            return _flag("huge radius", 0, NOTHING_ATTACKED)
        eps = radius_of_everything(self.subject.X_tensor, self.attack)
        # Not PGD, whose first steps are of this radius: where kernels vanish it is at a loss.
        attack = FMN() if self.has_gradients else Square(n_queries=200)
        share = float(self._stand(attack, eps=eps).mean())
        counts = np.unique(self.subject.y[self.checked], return_counts=True)[1]
        chance = counts.max() / counts.sum()
        detail = f"{share:.3f} of {len(self.checked)} samples stand at eps={eps:.4g}"
        return _flag("huge radius", share > max(chance, 0.02) if len(counts) > 1 else 0, detail)

    def units(self) -> Flag:
        """A radius that is no radius for these features."""
        X, attack = self.subject.X_tensor, self.attack
        width, reach = resolve_feature_scale("range", X), attack.reach_of(X)
        assert width is not None
        free = (reach > 0) & (width > 0)
        rules = attack.rules_of(X)
        if rules is not None:  # whose numbers say what a change is
            free &= ~rules.is_whole
        n_any, n_little = (
            int((free & is_so).sum()) for is_so in (reach >= width, reach < 0.01 * width)
        )
        diagonal = diagonal_of(width, attack.scale_of(X), attack.norm)
        is_scaled = attack.feature_scale is not None or (
            rules is not None and rules.scale is not None
        )
        raised = attack.eps >= diagonal > 0 or (not is_scaled and n_any > 0 and n_little > 0)
        detail = (
            f"eps={attack.eps:g} lets {n_any} of {int(free.sum())} features take any value of "
            f"theirs, and {n_little} change by less than 1 % of their range"
        )
        return _flag("units", raised, detail)

    def torch_view(self) -> Flag:
        """Where predict and the view disagree."""
        fooled, right = self.perturbed.found.fooled.numpy(), self.perturbed.right
        n_right, n_wrong = int((fooled & right).sum()), int((~fooled & ~right).sum())
        raised = n_right > 0 or n_wrong > 0.01 * len(right)
        detail = f"predict is right at {n_right} perturbed samples where it is not"
        if n_wrong:
            detail += f", and wrong at {n_wrong} where it is"
        differs = self._departures()
        if differs.any():
            raised = True
            detail += f", and differs at {differs.sum()} of {len(differs)} random points"
        return _flag("torch view", raised, detail)

    def _departures(self) -> np.ndarray:
        """Tell of random points of the balls whether predict and what was attacked differ there."""
        if len(self.checked) == 0 or self.attack.eps_is_zero:
            return np.zeros(0, dtype=bool)
        return np.concatenate([self._departs(points) for points in self._random_points()])

    def _random_points(self) -> Iterator[Tensor]:
        """Yield points of the balls, one of each checked sample at a time."""
        ball = self.attack.ball(self.subject.X_tensor[self.checked])
        generator = torch.Generator().manual_seed(self.subject.seed)
        for _ in range(N_RANDOM_POINTS // 2):
            inside = ball.random_start(generator)
            yield ball.valid(ball.enforce(inside))
            # From there on straight out, a hundred times as far: under linf a corner.
            yield ball.valid(ball.enforce(ball.project(ball.X + 100 * (inside - ball.X))))

    def _departs(self, points: Tensor) -> np.ndarray:
        """Tell at which points, one of each checked sample, predict is not what was attacked.

        Where the model returns NaN, predict may raise; it is not asked.
        """
        subject = self.subject
        with frozen(subject.view), torch.no_grad():
            batches = torch.split(points, subject.batch_size)
            scores = torch.cat([subject.view(X.to(subject.device)).cpu() for X in batches])
        answered = ~scores.isnan().any(1)
        if not answered.any():
            return np.zeros(0, dtype=bool)
        classes = np.asarray(subject.estimator.classes_)[scores[answered].argmax(1).numpy()]
        X_adv = subject.table.rows(self.checked[answered.numpy()], points[answered].numpy())
        return np.asarray(subject.estimator.predict(X_adv) != classes)

    def output(self) -> Flag:
        """What the model returns."""
        kind = self.subject.output_kind if len(self.checked) else "logits"
        raised = kind != "logits" and not self.subject.leaves_decide(self.attack)
        return _flag("output", raised, f"the model returns {kind}")

    def weak_attack(self) -> Flag:
        """Less than the cascade."""
        found = self.perturbed.found
        if not isinstance(self.attack, Cascade):
            return _flag("weak attack", 1, f"only {type(self.attack).__name__} was run")
        said = []
        if self._fell_back and found.stages and not self.subject.leaves_decide(self.attack):
            names = ", ".join(stage.name for stage in found.stages[1:])
            said.append(f"without gradients, only {names} was run")
        cut = ", ".join(stage.name for stage in found.stages if not stage.complete)
        if cut:
            said.append(f"cut short: {cut}")
        return _flag("weak attack", len(said), "; ".join(said) or "the whole cascade was run")


def _flag(name: str, raised: Any, detail: str) -> Flag:
    return Flag(name, bool(raised), detail, MEANINGS[name])


def holds_more_often(first: np.ndarray, second: np.ndarray) -> bool:
    """Tell whether one thing holds for more samples than another, beyond chance.

    McNemar's test (Psychometrika 1947): where they differ, chance gives each as many, and the
    difference of the two numbers has the variance of their sum. It must exceed two deviations.
    """
    difference = int(first.sum()) - int(second.sum())
    return difference > 2 * float(np.sqrt((first != second).sum()))


def radius_of_everything(X: Tensor, attack: Attack) -> float:
    """Return a radius at which every sample can become any other.

    The length of the diagonal of the bounds, or ten times that of the data.
    """
    width = resolve_feature_scale("range", X)
    assert width is not None
    width, bounds, scale = 10 * width, attack.bounds_of(X), attack.scale_of(X)
    if bounds is not None:
        diagonal = (bounds[1] - bounds[0]).expand_as(width)
        width = torch.where(diagonal.isfinite(), diagonal, width)
    return diagonal_of(width, scale, attack.norm)


def diagonal_of(width: Tensor, scale: Tensor | None, norm: str) -> float:
    """Return the length of the diagonal of a box, in units of the scale; 0 does not count."""
    if scale is not None:
        width = torch.where(scale > 0, width / scale, 0.0)
    return float(vector_norm(width.unsqueeze(0), norm))
