"""Early stopping: what is held out, how it is scored after each epoch, and what a score must be."""

import math
import warnings
from numbers import Real
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, check_scoring
from sklearn.model_selection import train_test_split
from sklearn.utils import _safe_indexing

from skjacobian._net.callbacks import ValidationScores, early_stopping
from skjacobian._validation import reject, unwrap_scalar


def hold_out(
    rows: np.ndarray, y: np.ndarray, share: float, random_state: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on, and a share of them, of all classes, that is held out."""
    try:
        trained, held_out = train_test_split(
            rows, test_size=share, stratify=y[rows], random_state=random_state
        )
    except ValueError as error:
        sizes = np.unique(y[rows], return_counts=True)[1]
        raise ValueError(
            f"Got early_stopping=True and validation_fraction={share:g} of {len(rows)} samples "
            f"of {len(sizes)} classes, the smallest of {sizes.min()}, but expected at least 2 "
            "samples of each class, and enough to train on and to hold out one of each."
        ) from error
    return trained, held_out


def watch(
    estimator: Any, X: Any, y: np.ndarray, weight: np.ndarray | None, held_out: np.ndarray
) -> list[tuple[str, Any]]:
    """Return the callbacks that score an estimator on the rows held out, and stop early."""
    scoring = estimator.scoring
    if isinstance(scoring, type):
        reject("scoring", scoring, f"an instance of it, {scoring.__name__}(...)")
    X, y = _safe_indexing(X, held_out), y[held_out]
    weight = None if weight is None else weight[held_out]
    scorer = None if scoring is None else check_scoring(estimator, scoring)

    def scores() -> dict[str, float]:
        accuracy = float(accuracy_score(y, estimator.predict(X), sample_weight=weight))
        if scorer is None:
            return {"valid_accuracy": accuracy}
        score = _score(estimator, scorer, X, y, weight)
        return {"valid_accuracy": accuracy, "valid_score": score}

    monitor = "valid_accuracy" if scoring is None else "valid_score"
    patience = int(unwrap_scalar(estimator.n_iter_no_change))
    return [("valid_scores", ValidationScores(scores)), early_stopping(monitor, patience)]


def _score(estimator: Any, scorer: Any, X: Any, y: np.ndarray, weight: np.ndarray | None) -> float:
    """Return what a scorer says of the rows held out, if early stopping can follow it."""
    accepts_weight = getattr(scorer, "_accept_sample_weight", lambda: False)()
    weighted = {"sample_weight": weight} if weight is not None and accepts_weight else {}
    try:
        score = scorer(estimator, X, y, **weighted)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Got scoring={estimator.scoring!r}, but expected a scorer of the samples that early "
            f"stopping holds out: {error}"
        ) from error
    number = unwrap_scalar(score)
    if not isinstance(number, Real) or math.isnan(number):
        returned = "several" if isinstance(score, dict) else repr(score)
        expected = f"a scorer that returns one number; it returned {returned}"
        reject("scoring", estimator.scoring, expected)
    return float(number)


def warn_of_a_flat_score(estimator: Any, epochs: list[dict[str, Any]]) -> None:
    """Warn if the score that early stopping watched says nothing of what was learned."""
    ended = [epoch for epoch in epochs if "valid_score" in epoch]
    scores = {epoch["valid_score"] for epoch in ended}
    accuracies = [epoch["valid_accuracy"] for epoch in ended]
    if len(scores) == 1 and max(accuracies) > accuracies[0]:
        warnings.warn(
            f"Got scoring={estimator.scoring!r}, whose score was {scores.pop():g} in every epoch "
            "while accuracy rose, so early stopping kept the weights of the first. A scorer "
            f"sees X as {type(estimator).__name__} gets it: behind a scaler in a pipeline, scaled.",
            UserWarning,
            stacklevel=5,
        )
