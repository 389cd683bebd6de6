"""The minimum-norm curve against PGD at ten radii, on MNIST: how far above it, and how fast.

Run ``python examples/benchmarks/curve.py``; about nine minutes on one core. Needs MNIST (see
README).
"""

import numpy as np
import torch
from _timing import describe_machine, interleaved

from skjacobian import (
    AdversarialClassifier,
    JacobianRegularizedClassifier,
    RobustScorer,
    robustness_curve,
)
from skjacobian.attacks import PGD
from skjacobian.datasets import load_mnist

RADII = {"linf": np.geomspace(0.01, 0.3, 10), "l2": np.geomspace(0.2, 3, 10)}
COMMON = {"module__hidden_units": (256, 256), "batch_size": 128, "random_state": 0}
LONG = "curve, one search of 28 steps"
ONE, TEN = "PGD-40, one scorer", "PGD-40, ten scorers"
TEXTBOOK = "PGD-40 of the textbook, ten scorers"


def main() -> None:
    torch.set_num_threads(1)
    X_train, y_train = load_mnist("train")
    X, y = load_mnist("test", n_samples=1000)
    print(describe_machine(), "; MNIST, first 1,000 test points, MLP 784-256-256-10")
    models = {
        "plain": JacobianRegularizedClassifier(lam=0, max_epochs=4, **COMMON),
        "Jacobian, l1": JacobianRegularizedClassifier(norm="l1", lam=0.002, max_epochs=8, **COMMON),
        "adversarially trained": AdversarialClassifier(
            eps=0.1, n_steps=7, bounds=(0, 1), max_epochs=8, **COMMON
        ),
    }
    for model in models.values():
        model.fit(X_train, y_train)
    print(
        "\n| network | norm | search | robust accuracy, mean over the radii | points above ten "
        "scorers: mean, most | CPU s | ratio to one scorer | to ten | to ten of the textbook |\n"
        + "| --- " * 9
        + "|"
    )
    for kind, model in models.items():
        for norm, radii in RADII.items():
            for row in compare(model, X, y, norm, radii):
                print(f"| {kind} | {norm} | " + " | ".join(row) + " |", flush=True)


def compare(model, X, y, norm, radii):
    """Yield the cells of the row of each way to get robust accuracy at all radii."""
    accuracies = {}

    def curve(name, **params):
        accuracies[name] = robustness_curve(
            model, X, y, norm=norm, eps=radii, bounds=(0, 1), **params
        )[1]

    def one_scorer():
        scores = RobustScorer(norm=norm, eps=radii, bounds=(0, 1))(model, X, y)
        accuracies[ONE] = np.array([*scores.values()][1:])

    def ten_scorers():
        scorers = [RobustScorer(norm=norm, eps=eps, bounds=(0, 1)) for eps in radii]
        accuracies[TEN] = np.array([scorer(model, X, y) for scorer in scorers])

    def textbook():
        # Steps of one size on the cross-entropy: nobody is given up.
        attacks = [PGD(step_size=2.5 * eps / 40, loss="cross_entropy") for eps in radii]
        scorers = [
            RobustScorer(norm=norm, eps=eps, bounds=(0, 1), attack=attack)
            for eps, attack in zip(radii, attacks, strict=True)
        ]
        accuracies[TEXTBOOK] = np.array([scorer(model, X, y) for scorer in scorers])

    candidates = {
        "curve": lambda: curve("curve"),
        LONG: lambda: curve(LONG, n_steps=28, n_restarts=1),
        ONE: one_scorer,
        TEN: ten_scorers,
        TEXTBOOK: textbook,
    }
    results = interleaved(candidates, 3, TEN)
    for name, (seconds, ratio) in results.items():
        above = 100 * (accuracies[name] - accuracies[TEN])
        yield (
            name,
            f"{accuracies[name].mean():.4f}",
            f"{above.mean():+.2f}, {above.max():+.1f}",
            f"{seconds:.2f}",
            f"{seconds / results[ONE][0]:.2f}",
            f"{ratio:.2f}",
            f"{seconds / results[TEXTBOOK][0]:.2f}",
        )


if __name__ == "__main__":
    main()
