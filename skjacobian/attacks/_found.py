"""What a search found, and the stages of a cascade; of several batches, joined."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """What one stage of a cascade found.

    Attributes
    ----------
    name : str
    attack : str
        The class of its attack; "clean" of the stage that asks about the clean samples.
    fooled : Tensor of bool of shape (n_samples,)
        Whom it fooled that had stood until then.
    gain : Tensor of shape (n_samples,)
        How much closer than all before it brought those that still stand, as a share of
        their clean margin.
    n_queries : Tensor of int of shape (n_samples,)
        How often it asked about each sample.
    seconds : float
    complete : bool
        Whether it came to its end; False where a budget cut it short.
    """

    name: str
    attack: str
    fooled: Tensor
    gain: Tensor
    n_queries: Tensor
    seconds: float
    complete: bool


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes
    ----------
    X_adv : Tensor of shape (n_samples, *features)
    fooled : Tensor of bool of shape (n_samples,)
        Whether the logits at `X_adv` favour another class than the true one.
    n_queries : Tensor of int of shape (n_samples,)
        How often the model was asked about each sample, with or without a gradient.
    is_zero, is_not_finite : Tensor of bool of shape (n_samples,)
        Whether the first gradient at a sample was zero, or not finite, while it stood.
    is_undefined : Tensor of bool of shape (n_samples,)
        Whether the model returned NaN where the attack went.
    is_blind : Tensor of bool of shape (n_samples,)
        Whether the model's answer depends on features at which the first gradients of all samples
        were zero.
    stages : tuple of Stage
        What a cascade ran, in order; empty for other attacks.
    problem : str
        A hash of samples, labels and threat model, where the search can be taken up again.
    """

    X_adv: Tensor
    fooled: Tensor
    n_queries: Tensor
    is_zero: Tensor
    is_not_finite: Tensor
    is_undefined: Tensor
    is_blind: Tensor
    stages: tuple[Stage, ...] = ()
    problem: str = ""

    @property
    def no_gradient(self) -> Tensor:
        """Whether gradients gave nothing to follow at a sample, for one of these reasons."""
        return self.is_zero | self.is_not_finite | self.is_undefined

    @property
    def complete(self) -> bool:
        """Whether the search came to its end; False where a budget cut it short."""
        return all(stage.complete for stage in self.stages)

    def stages_of(self, attack: str) -> list[Stage]:
        """Return the stages that an attack of this class ran, in order."""
        return [stage for stage in self.stages if stage.attack == attack]


def concatenate(found: list[Found]) -> Found:
    """Join what was found on batches, on the CPU."""

    def joined(values: list[Tensor]) -> Tensor:
        return torch.cat([value.cpu() for value in values]) if len(values) > 1 else values[0].cpu()

    names = [field.name for field in fields(Found) if field.name not in ("stages", "problem")]
    tensors: dict[str, Any] = {
        name: joined([getattr(part, name) for part in found]) for name in names
    }
    return Found(**tensors, stages=_concatenate_stages(found))


def _concatenate_stages(found: list[Found]) -> tuple[Stage, ...]:
    """Join the stages of the batches by name; a batch that did not come to one adds nothing."""
    attacks = {stage.name: stage.attack for part in found for stage in part.stages}
    return tuple(_joined_stage(name, attack, found) for name, attack in attacks.items())


def _joined_stage(name: str, attack: str, found: list[Found]) -> Stage:
    columns: dict[str, list[Tensor]] = {"fooled": [], "gain": [], "n_queries": []}
    seconds, complete = 0.0, True
    for part in found:
        stage = next((stage for stage in part.stages if stage.name == name), None)
        for field, values in columns.items():
            nothing = torch.zeros(len(part.fooled), dtype=getattr(found[0].stages[0], field).dtype)
            values.append(nothing if stage is None else getattr(stage, field).cpu())
        seconds += 0.0 if stage is None else stage.seconds
        complete &= stage is not None and stage.complete
    whole = {field: torch.cat(values) for field, values in columns.items()}
    return Stage(name, attack, **whole, seconds=seconds, complete=complete)
