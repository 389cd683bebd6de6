"""What each way of training buys on MNIST: clean and robust accuracy, norms, time.

Run ``python examples/benchmarks/mnist.py``; about 8 minutes on one core. Needs MNIST (see
README). ``--epochs`` and ``--seeds`` change the protocol.
"""

import argparse
import time

import numpy as np
import torch
from _timing import describe_machine

from skjacobian import AdversarialClassifier, JacobianRegularizedClassifier, RobustScorer
from skjacobian.datasets import load_mnist


def make_models(epochs: int, seed: int) -> dict[str, object]:
    common = {
        "module__hidden_units": (256, 256),
        "batch_size": 128,
        "max_epochs": epochs,
        "random_state": seed,
    }
    jacobian = {
        "plain (λ=0)": {"lam": 0},
        "l2, 1 projection, λ=0.005": {"lam": 0.005, "n_projections": 1},
        "l2, 1 projection, λ=0.05": {"lam": 0.05, "n_projections": 1},
        "l2, λ=0.05": {"lam": 0.05},
        "l2, λ=0.005 (the default)": {"lam": 0.005},
        "l2, λ=0.05, 8 samples": {"lam": 0.05, "penalty_samples": 8},
        "l1, λ=0.001": {"lam": 0.001, "norm": "l1"},
        "l1, λ=0.01": {"lam": 0.01, "norm": "l1"},
        "l1, λ=0.01, 8 samples": {"lam": 0.01, "norm": "l1", "penalty_samples": 8},
        "l21, λ=0.01": {"lam": 0.01, "norm": "l21"},
    }
    models = {
        f"Jacobian {name}" if "plain" not in name else name: JacobianRegularizedClassifier(
            **common, **params
        )
        for name, params in jacobian.items()
    }
    linf = {"norm": "linf", "eps": 0.1, "bounds": (0, 1)}
    models["FGSM training, linf 0.1"] = AdversarialClassifier(method="fgsm", **linf, **common)
    models["PGD-7 training, linf 0.1"] = AdversarialClassifier(n_steps=7, **linf, **common)
    models["TRADES-7, linf 0.1"] = AdversarialClassifier(
        method="trades", n_steps=7, **linf, **common
    )
    models["PGD-7 training, l2 1.5"] = AdversarialClassifier(
        norm="l2", eps=1.5, bounds=(0, 1), n_steps=7, **common
    )
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="train only models whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    X_train, y_train = load_mnist("train")
    X_test, y_test = load_mnist("test", n_samples=1000)
    print(
        f"{describe_machine()}; MNIST, MLP 784-256-256-10, batch 128, {arguments.epochs} epochs, "
        f"{arguments.seeds} seed(s); PGD-40 on the first 1,000 test points\n"
    )
    print("| training | CPU s | clean | linf 0.1 | l2 1.5 | mean ‖J‖_F² | mean ‖J‖_{1,1} |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in make_models(1, 0):
        if arguments.only not in name:
            continue
        rows = []
        for seed in range(arguments.seeds):
            model = make_models(arguments.epochs, seed)[name]
            start = time.process_time()
            model.fit(X_train, y_train)
            seconds = time.process_time() - start
            threats = {"linf": 0.1, "l2": 1.5}
            robust = [
                RobustScorer(norm=norm, eps=eps, bounds=(0, 1))(model, X_test, y_test)
                for norm, eps in threats.items()
            ]
            norms = [model.jacobian_norm(X_test, norm=norm).mean() for norm in ("l2", "l1")]
            rows.append([seconds, model.score(X_test, y_test), *robust, *norms])
        seconds, clean, linf, l2, frobenius, entrywise = np.mean(rows, axis=0)
        print(
            f"| {name} | {seconds:.1f} | {clean:.3f} | {linf:.3f} | {l2:.3f} | "
            f"{frobenius:.2f} | {entrywise:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
