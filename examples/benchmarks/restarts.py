"""What the default attack of `RobustScorer` misses on small tables: one search, and "auto".

Run ``python examples/benchmarks/restarts.py``; about five minutes on one core. scikit-learn's data.
"""

import itertools
import warnings

import numpy as np
import torch
from _timing import describe_machine
from sklearn.datasets import (
    load_breast_cancer,
    load_digits,
    load_iris,
    load_wine,
    make_classification,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from skjacobian import JacobianRegularizedClassifier, RobustScorer, robustness_curve
from skjacobian.exceptions import AttackWarning

TABLES = {
    "iris": load_iris(return_X_y=True),
    "wine": load_wine(return_X_y=True),
    "breast cancer": load_breast_cancer(return_X_y=True),
    "digits": load_digits(return_X_y=True),
    "6 classes": make_classification(
        400, n_features=8, n_informative=6, n_classes=6, random_state=0
    ),
}
CLASSIFIERS = (
    LogisticRegression(),
    MLPClassifier((50, 50), max_iter=300, random_state=0),
    SVC(C=10),
    JacobianRegularizedClassifier(random_state=0),
)
RADII = (("linf", 0.1), ("linf", 0.3), ("l2", 0.5), ("l2", 1.0), ("l1", 1.0), ("l1", 3.0))
SEARCHES = {"one search": {"n_restarts": 1}, '"auto"': {}, "strong": {"attack": "strong"}}


def scores(classifier, X, y, norm, eps):
    """Return the robust accuracy by each search, and by the curve."""
    found = [
        RobustScorer(norm=norm, eps=eps, **search)(classifier, X, y) for search in SEARCHES.values()
    ]
    return [*found, robustness_curve(classifier, X, y, norm=norm, eps=[eps])[1][0]]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", AttackWarning)
    warnings.simplefilter("ignore", ConvergenceWarning)
    print(describe_machine(), "; 300 samples of each, standardized; points above the best of all")
    print(
        f"\n| table | {' | '.join([*SEARCHES, 'curve'])} |\n" + "| --- " * (len(SEARCHES) + 2) + "|"
    )
    for name, (values, labels) in TABLES.items():
        chosen = np.random.default_rng(0).permutation(len(values))[:300]
        X, y = StandardScaler().fit_transform(values)[chosen], labels[chosen]
        above = []
        for classifier, (norm, eps) in itertools.product(CLASSIFIERS, RADII):
            found = np.array(scores(classifier.fit(X, y), X, y, norm, eps))
            above.append(100 * (found - found.min()))
        cells = [
            f"{mean:.2f}, {most:.1f}"
            for mean, most in zip(np.mean(above, 0), np.max(above, 0), strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
