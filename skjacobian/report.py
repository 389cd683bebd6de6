"""What an evaluation of robustness found, and how far it can be trusted."""

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from skjacobian.averages import class_accuracies
from skjacobian.intervals import effective_n_samples, wilson_interval


@dataclass(frozen=True)
class Flag:
    """One sign that a robustness figure may not be what it seems.

    Attributes
    ----------
    name : str
    raised : bool
    detail : str
        What was measured.
    meaning : str
        When the flag is raised, and what that means.
    """

    name: str
    raised: bool
    detail: str
    meaning: str


@dataclass(frozen=True)
class StageResult:
    """What one stage of the attack left standing.

    Attributes
    ----------
    name : str
    robust_accuracy : float
        Share of all samples that stand after this stage.
    n_fooled : int
        Samples that it fooled and that had stood until then.
    n_queries : float
        Queries per sample that it was run on.
    seconds : float
    """

    name: str
    robust_accuracy: float
    n_fooled: int
    n_queries: float
    seconds: float


@dataclass(frozen=True, repr=False, eq=False)
class RobustnessReport:
    """Robust accuracy of a classifier, stage by stage, with signs of what may be wrong.

    Made by `evaluate_robustness`. Printing it gives the text, a notebook shows it as tables,
    `to_frame` gives the stages.

    Attributes
    ----------
    estimator_name : str
    norm : str
    eps : float
    attack : str
    y : array of shape (n_samples,)
        True labels.
    right, robust : array of bool of shape (n_samples,)
        Whether the classifier is right about the clean sample, and whether it stands.
    X_adv : array-like of shape (n_samples, *features)
        For each sample what was found: the perturbation that fools, or else the one of
        largest margin; misclassified samples as they were.
    stages : tuple of StageResult
    flags : tuple of Flag
    seconds : float
    view : str
        What was attacked: "torch view", or "leaves of trees" or "black box" and the method that
        was asked.
    sample_weight : array of shape (n_samples,) or None
        Weights of the samples in all accuracies; flags and numbers of samples are without.
    """

    estimator_name: str
    norm: str
    eps: float
    attack: str
    y: np.ndarray
    right: np.ndarray
    robust: np.ndarray
    X_adv: Any
    stages: tuple[StageResult, ...]
    flags: tuple[Flag, ...]
    seconds: float
    view: str = "torch view"
    sample_weight: np.ndarray | None = None

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return len(self.y)

    @property
    def accuracy(self) -> float:
        """Share of the clean samples that are classified correctly."""
        return float(np.average(self.right, weights=self.sample_weight))

    @property
    def robust_accuracy(self) -> float:
        """Share of the samples that no attack fooled; an upper bound on the true one."""
        return float(np.average(self.robust, weights=self.sample_weight))

    @property
    def confidence_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `robust_accuracy`, for the choice of the samples alone.

        With weights, that of (Σw)²/Σw² samples, as many as say as much of a mean (Kish).
        """
        weight = self.sample_weight
        n_samples = self.n_samples if weight is None else effective_n_samples(weight)
        low, high = wilson_interval(self.robust_accuracy * n_samples, n_samples)
        return float(low), float(high)

    @property
    def raised(self) -> tuple[Flag, ...]:
        """The flags that are raised."""
        return tuple(flag for flag in self.flags if flag.raised)

    @property
    def class_accuracies(self) -> dict[Any, tuple[int, float, float]]:
        """For each class its number of samples, its accuracy and its robust accuracy.

        Without those whose samples have no weight.
        """
        clean, robust = (
            class_accuracies(of, self.y, self.sample_weight) for of in (self.right, self.robust)
        )
        return {
            label: (int((self.y == label).sum()), clean[label], robust[label]) for label in clean
        }

    def to_frame(self) -> Any:
        """Return the stages as a DataFrame, indexed by their name. Needs pandas."""
        import pandas as pd

        columns = ["robust_accuracy", "n_fooled", "n_queries", "seconds"]
        rows = {stage.name: [getattr(stage, c) for c in columns] for stage in self.stages}
        return pd.DataFrame.from_dict(rows, "index", columns=columns).rename_axis("stage")

    def __repr__(self) -> str:
        return (
            f"<RobustnessReport: robust accuracy {self.robust_accuracy:.3f} at {self.norm} "
            f"eps={self.eps:g}, {len(self.raised)} of {len(self.flags)} flags raised>"
        )

    def __str__(self) -> str:
        lines = [self._title(), self._attacked(), "", *_text_table(*self._stage_table())]
        lines += ["", *_text_table(*self._class_table()), "", self._verdict()]
        for flag in self.raised:
            lines += [f"  ! {flag.name}: {flag.detail}", f"    {flag.meaning}"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        flags = "".join(
            f"<li><b>{escape(flag.name)}</b>: {escape(flag.detail)} {escape(flag.meaning)}</li>"
            for flag in self.raised
        )
        return (
            f"<div><p><b>{escape(self._title())}</b><br>{escape(self._attacked())}</p>"
            f"{_html_table(*self._stage_table())}"
            f"<details><summary>By class</summary>{_html_table(*self._class_table())}</details>"
            f"<p>{escape(self._verdict())}</p><ul>{flags}</ul></div>"
        )

    def _title(self) -> str:
        low, high = self.confidence_interval
        weighted = "" if self.sample_weight is None else "weighted "
        return (
            f"{self.estimator_name}, {self.norm} eps={self.eps:g}, "
            f"{self.n_samples} {weighted}samples: "
            f"accuracy {self.accuracy:.3f}, robust accuracy {self.robust_accuracy:.3f} "
            f"(95 % interval {low:.3f} to {high:.3f})"
        )

    def _attacked(self) -> str:
        return f"attacked by {self.attack} through: {self.view}"

    def _verdict(self) -> str:
        if not self.raised:
            return f"None of {len(self.flags)} flags is raised."
        verb = "is" if len(self.raised) == 1 else "are"
        return f"{len(self.raised)} of {len(self.flags)} flags {verb} raised:"

    def _stage_table(self) -> tuple[list[str], list[list[str]]]:
        header = ["stage", "robust accuracy", "fooled", "queries per sample", "seconds"]
        return header, [
            [
                stage.name,
                f"{stage.robust_accuracy:.3f}",
                str(stage.n_fooled),
                f"{stage.n_queries:.0f}",
                f"{stage.seconds:.2f}",
            ]
            for stage in self.stages
        ]

    def _class_table(self) -> tuple[list[str], list[list[str]]]:
        header = ["class", "samples", "accuracy", "robust accuracy"]
        return header, [
            [str(label), str(n), f"{clean:.3f}", f"{robust:.3f}"]
            for label, (n, clean, robust) in self.class_accuracies.items()
        ]


def _text_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]


def _html_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
