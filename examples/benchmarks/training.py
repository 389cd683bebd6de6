"""The cost of training, side by side: scikit-learn, a loop by hand, and this package.

Run ``python examples/benchmarks/training.py``; about four minutes on one core. One process,
one thread, CPU seconds, all candidates in turn. The second part needs MNIST (see README).
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from _timing import describe_machine, interleaved, print_ratios
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from skjacobian import AdversarialClassifier, JacobianRegularizedClassifier
from skjacobian.datasets import find_mnist, load_mnist
from skjacobian.modules import MLP


def train_by_hand(X, y, hidden_units, batch_size: int, epochs: int) -> None:
    """Train as one would without a framework, with torch's fused Adam."""
    X, y = torch.from_numpy(X), torch.from_numpy(y)
    module = MLP(X.shape[1], 10, hidden_units).to(X.dtype)
    optimizer = torch.optim.Adam(module.parameters(), fused=True)
    for _ in range(epochs):
        for index in torch.randperm(len(X)).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(module(X[index]), y[index]).backward()
            optimizer.step()


def candidates(X, y, hidden_units, batch_size: int, epochs: int) -> dict[str, Callable]:
    common = {
        "module__hidden_units": hidden_units,
        "batch_size": batch_size,
        "max_epochs": epochs,
        "random_state": 0,
    }
    whole = {"penalty_samples": None}
    penalized = {
        "λ=0": {"lam": 0},
        "l2 (the default)": {},
        "l1": {"norm": "l1", "lam": 1e-3},
        "l2, between samples": {"interpolation": 0.5},
        "l2, whole": whole,
        "l1, whole": {"norm": "l1", "lam": 1e-3, **whole},
        "l2, 1 projection, whole": {"n_projections": 1, **whole},
        "l21, 1 projection, whole": {"n_projections": 1, "norm": "l21", "lam": 1e-3, **whole},
    }
    models = {
        name: JacobianRegularizedClassifier(**common, **params)
        for name, params in penalized.items()
    }
    models["FGSM training"] = AdversarialClassifier(method="fgsm", **common)
    models["PGD-7 training"] = AdversarialClassifier(n_steps=7, **common)
    return {name: lambda model=model: model.fit(X, y) for name, model in models.items()}


def digits() -> None:
    X, y = load_digits(return_X_y=True)
    for dtype in (np.float64, np.float32):
        scaled = (X / 16).astype(dtype)
        sizes = (scaled, y, (128, 64), 64, 20)
        theirs = MLPClassifier(
            (128, 64), batch_size=64, max_iter=20, n_iter_no_change=100, random_state=0
        )
        fits = {
            "MLPClassifier": lambda model=theirs, X=scaled: model.fit(X, y),
            "by hand, fused Adam": lambda sizes=sizes: train_by_hand(*sizes),
            **candidates(*sizes),
        }
        title = f"digits, 128-64, batch 64, 20 epochs, {np.dtype(dtype)}"
        print_ratios(title, results := interleaved(fits, 7, "MLPClassifier"), "MLPClassifier")
        relative = results["l2, 1 projection, whole"][0] / results["λ=0"][0]
        print(f"l2, 1 projection, whole, relative to λ=0: {relative:.2f}")


def mnist() -> None:
    if find_mnist() is None:
        print("\nMNIST was not found and is left out: set SKJACOBIAN_DATA")
        return
    X, y = load_mnist("train")
    sizes = (X, y, (256, 256), 128, 1)
    fits = {"by hand, fused Adam": lambda: train_by_hand(*sizes), **candidates(*sizes)}
    title = "MNIST, 784-256-256-10, batch 128, 1 epoch, float32"
    print_ratios(title, interleaved(fits, 3, "by hand, fused Adam"), "by hand")


def main() -> None:
    warnings.simplefilter("ignore", ConvergenceWarning)
    torch.set_num_threads(1)
    with threadpool_limits(1):
        print(describe_machine())
        digits()
        mnist()


if __name__ == "__main__":
    main()
