"""The search among leaves against what is exact, and against black boxes, on forests.

Run ``python examples/benchmarks/trees.py``; about twenty minutes on one core, most of them for the
black boxes (``--without-black-boxes`` leaves them out). What is exact is the largest margin in the
ball, by a mixed-integer program (Kantchelian, Tygar & Joseph, arXiv 1509.07892): one binary
variable for each threshold within reach, one for each leaf, and a leaf for each tree.
"""

import argparse
import itertools
import time
import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch
from _timing import describe_machine
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from skjacobian import RobustScorer
from skjacobian.differentiable import leaves_of

N_SAMPLES = 40
POWER = {"l1": 1, "l2": 2}
FORESTS = {
    "forest of 15": RandomForestClassifier(15, random_state=0),
    "forest of 100": RandomForestClassifier(100, random_state=0),
    "extra trees, 30": ExtraTreesClassifier(30, random_state=0),
}
# In standard deviations; those of l1 and l2 are larger by these factors.
RADII = {"breast cancer": (0.1, 0.25), "wine": (0.2, 0.4), "digits 0 to 3": (0.15, 0.3)}
LARGER = {"linf": 1.0, "l2": 2.0, "l1": 2.5}
# Margins no farther from 0 are ties.
TIE = 1e-9


class BlackBox(ClassifierMixin, BaseEstimator):
    """A classifier whose leaves cannot be seen."""

    def __init__(self, classifier) -> None:
        self.classifier = classifier

    def fit(self, X, y):
        """Fit the classifier."""
        self.classifier_ = clone(self.classifier).fit(X, y)
        self.classes_ = self.classifier_.classes_
        return self

    def predict(self, X):
        """Return the classes that the classifier predicts."""
        return self.classifier_.predict(X)

    def predict_proba(self, X):
        """Return the probabilities that the classifier gives."""
        return self.classifier_.predict_proba(X)


def load(name: str) -> tuple:
    """Return training data and samples to attack, columns of standard deviation 1."""
    loaders = {"breast cancer": load_breast_cancer, "wine": load_wine}
    if name in loaders:
        X, y = loaders[name](return_X_y=True)
    else:
        X, y = load_digits(n_class=4, return_X_y=True)
    X = StandardScaler().fit_transform(X).astype(np.float32).astype(float)
    return train_test_split(X, y, test_size=N_SAMPLES, random_state=0, stratify=y)


def stands(forest: Any, trees: list, x: np.ndarray, y: int, norm: str, eps: float) -> bool:
    """Tell whether no point of the ball fools a forest; of equal votes the first class wins."""
    for k in range(len(forest.classes_)):
        if k == y:
            continue
        margin = _largest_margin(trees, x, k, y, norm, eps) / len(trees)
        if margin > TIE or (margin > -TIE and k < y):
            return False
    return True


def _largest_margin(trees: list, x: np.ndarray, k: int, y: int, norm: str, eps: float) -> float:
    """Return the largest sum over trees of the value of class k less that of y, in the ball."""
    near = [leaves[_near(leaves, x, norm, eps)] for leaves in trees]
    program = Program()
    above = _thresholds(program, near, x, norm, eps)
    for leaves in near:
        columns = [program.column(v[k] - v[y], is_binary=False) for v in leaves.values]
        program.row(dict.fromkeys(columns, 1.0), 1.0, 1.0)  # in one leaf of each tree
        for column, low, high in zip(columns, leaves.low, leaves.high, strict=True):
            for j in range(len(x)):
                if (j, low[j]) in above:
                    program.row({above[j, low[j]]: 1.0, column: -1.0}, 0.0, np.inf)
                if (j, high[j]) in above:
                    program.row({above[j, high[j]]: 1.0, column: 1.0}, -np.inf, 1.0)
    return program.largest()


def _near(leaves: Any, x: np.ndarray, norm: str, eps: float) -> np.ndarray:
    """Return the leaves within reach."""
    gap = np.maximum(np.maximum(leaves.low - x, x - leaves.high), 0.0)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    return np.flatnonzero(np.linalg.norm(gap, order, axis=1) <= eps)


def _thresholds(program: "Program", near: list, x: np.ndarray, norm: str, eps: float) -> dict:
    """Add a binary column for each threshold within reach: whether x is above it."""
    above, budget, spent = {}, {}, 0.0
    for j in range(len(x)):
        ends = np.unique(np.concatenate([side[:, j] for t in near for side in (t.low, t.high)]))
        ends = ends[np.abs(ends - x[j]) <= eps]
        columns = [program.column(0.0, is_binary=True) for _ in ends]
        above |= {(j, t): column for t, column in zip(ends, columns, strict=True)}
        for lower, higher in itertools.pairwise(columns):
            program.row({lower: 1.0, higher: -1.0}, 0.0, np.inf)
        if norm == "linf":
            continue
        cost = np.abs(ends - x[j]) ** POWER[norm]
        rising = ends >= x[j]
        for column, price in zip(
            np.array(columns)[rising], np.diff(cost[rising], prepend=0.0), strict=True
        ):
            budget[column] = price
        for column, price in zip(
            np.array(columns)[~rising], -np.diff(cost[~rising], append=0.0), strict=True
        ):
            budget[column], spent = -price, spent + price
    if budget:
        program.row(budget, -np.inf, eps ** POWER[norm] - spent)
    return above


class Program:
    """A mixed-integer program, column by column and row by row."""

    def __init__(self) -> None:
        self.worth: list[float] = []
        self.is_binary: list[bool] = []
        self.rows: list[tuple[dict, float, float]] = []

    def column(self, worth: float, *, is_binary: bool) -> int:
        """Add a variable between 0 and 1; return its place."""
        self.worth.append(worth)
        self.is_binary.append(is_binary)
        return len(self.worth) - 1

    def row(self, factors: dict, low: float, high: float) -> None:
        """Add bounds on a sum of variables, given by place."""
        self.rows.append((factors, low, high))

    def largest(self) -> float:
        """Return the largest worth; raise if it is not known for certain."""
        at = [(i, j, v) for i, (factors, *_) in enumerate(self.rows) for j, v in factors.items()]
        rows, columns, values = zip(*at, strict=True)
        matrix = csr_array((values, (rows, columns)), shape=(len(self.rows), len(self.worth)))
        low, high = (np.array([row[i] for row in self.rows]) for i in (1, 2))
        found = milp(
            -np.array(self.worth),
            constraints=LinearConstraint(matrix, low, high),
            integrality=np.array(self.is_binary, dtype=int),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-6},
        )
        if found.status != 0:
            raise RuntimeError(found.message)
        return float(-found.fun)


def compare(name: str, with_black_boxes: bool) -> Counter:
    """Print a line for each forest, norm and radius; return the sums."""
    X_train, X, y_train, y = load(name)
    total: Counter = Counter()
    for kind, forest in FORESTS.items():
        forest.fit(X_train, y_train)
        trees = [leaves_of(tree) for tree in forest.estimators_]
        right = forest.predict(X) == y
        candidates = {"leaves": forest}
        if with_black_boxes:
            candidates["black boxes"] = BlackBox(forest).fit(X_train, y_train)
        for norm in LARGER:
            for radius in RADII[name]:
                eps = radius * LARGER[norm]
                scorer = RobustScorer(norm=norm, eps=eps, attack="strong")
                counts, seconds = {"clean": int(right.sum())}, {}
                for candidate, model in candidates.items():
                    start = time.process_time()
                    counts[candidate] = round(scorer(model, X, y) * len(y))
                    seconds[candidate] = time.process_time() - start
                start = time.process_time()
                robust = [
                    stands(forest, trees, x, label, norm, eps)
                    for x, label in zip(X[right], y[right], strict=True)
                ]
                counts["exact"] = sum(robust)
                seconds["exact"] = time.process_time() - start
                cells = [*map(str, counts.values()), *(f"{s:.1f}" for s in seconds.values())]
                print(f"| {name} | {kind} | {norm} {eps:g} | {' | '.join(cells)} |", flush=True)
                total.update({f"{norm}, {key}": value for key, value in counts.items()})
                total.update({f"{norm}, {key}, s": value for key, value in seconds.items()})
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without-black-boxes", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    shown = ["leaves", *([] if arguments.without_black_boxes else ["black boxes"]), "exact"]
    print(f"{describe_machine()}; {N_SAMPLES} samples of each, columns of standard deviation 1")
    print(f"| data | model | ball | clean | {' | '.join(shown)} | CPU s, {' | '.join(shown)} |")
    print("| --- " * (4 + 2 * len(shown)) + "|", flush=True)
    total: Counter = Counter()
    for name in RADII:
        total.update(compare(name, not arguments.without_black_boxes))
    for key, value in total.items():
        print(f"{key}: {value:.4g}")


if __name__ == "__main__":
    main()
