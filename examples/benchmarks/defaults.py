"""How the default λ was chosen: clean and robust accuracy over λ, all else at its default.

Run ``python examples/benchmarks/defaults.py``; about 6 minutes on one core. Data sets that
scikit-learn ships, each scaled as its users scale it, by 3-fold cross-validation; and MNIST
where it is found (see README), trained on 10,000 samples, tested on the first 1,000 of its test
set. The attack is PGD-40 in the units that the network sees. For each norm there is a grid of λ
("l1" and "l2" only; on MNIST "l2" only), and the λ that the user guide starts at, from the
radius ε of the attack that the norm pairs with.
"""

import numpy as np
import torch
from _timing import describe_machine
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from skjacobian import JacobianRegularizedClassifier, RobustScorer
from skjacobian.datasets import find_mnist, load_mnist

NORMS = ("l2", "l1")
STRENGTHS = (0.0, 1e-3, 3e-3, 5e-3, 1e-2, 3e-2)

# The attack that a norm pairs with, and λ from its radius: in proportion to ε where the norm is,
# to ε² where it is squared, so that other units of the features change nothing.
STARTS = {
    "l2": ("l2", lambda eps: 0.01 * eps**2),
    "spectral": ("l2", lambda eps: 0.1 * eps),
    "l1": ("linf", lambda eps: 0.03 * eps),
    "cross_lipschitz": ("linf", lambda eps: 0.1 * eps),
}


def folds(X: np.ndarray, y: np.ndarray, scaler):
    for train, test in StratifiedKFold(3, shuffle=True, random_state=0).split(X, y):
        scaler.fit(X[train])
        yield scaler.transform(X[train]), y[train], scaler.transform(X[test]), y[test]


def problems():
    """Yield name, the scorers of both attacks, and the splits of each data set."""
    digits = list(folds(*load_digits(return_X_y=True), MinMaxScaler()))
    yield "digits in [0, 1], linf 0.1, l2 0.5", {"linf": 0.1, "l2": 0.5}, digits
    for load in (load_breast_cancer, load_wine):
        splits = list(folds(*load(return_X_y=True), StandardScaler()))
        name = f"{load.__name__[5:]} standardized, linf 0.3, l2 1"
        yield name, {"linf": 0.3, "l2": 1.0}, splits
    if find_mnist() is None:
        print("MNIST was not found and is left out: set SKJACOBIAN_DATA", flush=True)
        return
    mnist = (*load_mnist("train", n_samples=10000), *load_mnist("test", n_samples=1000))
    yield "MNIST in [0, 1], 10,000 samples, linf 0.1, l2 1.5", {"linf": 0.1, "l2": 1.5}, [mnist]


def candidates(name: str, threats: dict[str, float]):
    """Yield norm, λ, and what to call it."""
    for norm in NORMS[:1] if "MNIST" in name else NORMS:
        for lam in STRENGTHS if norm == NORMS[0] else STRENGTHS[1:]:
            yield norm, lam, f"{lam:g}"
    for norm, (attack, of_radius) in STARTS.items():
        lam = of_radius(threats[attack])
        yield norm, lam, f"{lam:.2g}, from ε"


def main() -> None:
    torch.set_num_threads(1)
    print(describe_machine())
    for name, threats, splits in problems():
        print(f"\n### {name}\n\n| norm | λ | clean | linf | l2 |\n| --- | --- | --- | --- | --- |")
        scorers = [RobustScorer(norm=norm, eps=eps, n_restarts=1) for norm, eps in threats.items()]
        for norm, lam, label in candidates(name, threats):
            rows = []
            for X_train, y_train, X_test, y_test in splits:
                model = JacobianRegularizedClassifier(lam=lam, norm=norm, random_state=0)
                model.fit(X_train, y_train)
                robust = [scorer(model, X_test, y_test) for scorer in scorers]
                rows.append([model.score(X_test, y_test), *robust])
            clean, linf, l2 = np.mean(rows, axis=0)
            print(f"| {norm} | {label} | {clean:.3f} | {linf:.3f} | {l2:.3f} |", flush=True)


if __name__ == "__main__":
    main()
