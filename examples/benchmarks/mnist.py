"""What each way of training buys on MNIST: clean and robust accuracy, norms, time.

Run ``python examples/benchmarks/mnist.py``; about ten minutes on one core. Needs MNIST (see
README). ``--epochs`` and ``--seeds`` change the protocol; ``--figure cost.png`` draws robust
accuracy against the cost of training.
"""

import argparse
import time

import numpy as np
import torch
from _timing import describe_machine

from skjacobian import AdversarialClassifier, JacobianRegularizedClassifier, RobustScorer
from skjacobian.datasets import load_mnist

WHOLE = {"penalty_samples": None}

# Parameters and strengths of the Jacobian penalties, by the name of the method.
PENALTIES = {
    "l2": ({}, (0.005, 0.02, 0.1)),
    "l1": ({"norm": "l1"}, (0.0005, 0.002, 0.01)),
    "l21": ({"norm": "l21"}, (0.001, 0.005, 0.02)),
    "spectral": ({"norm": "spectral"}, (0.02, 0.1, 0.3)),
    "cross_lipschitz": ({"norm": "cross_lipschitz"}, (0.002, 0.01, 0.03)),
    "loss gradient, l2": ({"output": "loss", **WHOLE}, (0.3, 3, 30)),
    "loss gradient, l1": ({"output": "loss", "norm": "l1", **WHOLE}, (0.01, 0.1, 0.3)),
    "l2, whole": (WHOLE, (0.005, 0.1)),
    "l1, whole": ({"norm": "l1", **WHOLE}, (0.002, 0.01)),
    "l21, whole": ({"norm": "l21", **WHOLE}, (0.005, 0.02)),
    "spectral, whole": ({"norm": "spectral", **WHOLE}, (0.1, 0.3)),
    "cross_lipschitz, whole": ({"norm": "cross_lipschitz", **WHOLE}, (0.01, 0.03)),
    "l2, 1 projection": ({"n_projections": 1, **WHOLE}, (0.005, 0.1)),
}
THREATS = {"linf": 0.1, "l2": 1.5}
COLUMNS = ("CPU s", "clean", "linf 0.1", "l2 1.5", "mean ‖J‖_F²", "mean ‖J‖_{1,1}")


def make_models(epochs: int, seed: int) -> dict[tuple[str, str], object]:
    """Return the estimators, by method and strength."""
    common = {
        "module__hidden_units": (256, 256),
        "batch_size": 128,
        "max_epochs": epochs,
        "random_state": seed,
    }
    models: dict[tuple[str, str], object] = {
        ("plain", "λ=0"): JacobianRegularizedClassifier(lam=0, **common)
    }
    for method, (params, strengths) in PENALTIES.items():
        for lam in strengths:
            models[method, f"λ={lam:g}"] = JacobianRegularizedClassifier(
                lam=lam, **params, **common
            )
    linf = {"norm": "linf", "eps": 0.1, "bounds": (0, 1), **common}
    attacked = {
        ("FGSM training", "linf 0.1"): AdversarialClassifier(method="fgsm", **linf),
        ("PGD-7 training", "linf 0.1"): AdversarialClassifier(n_steps=7, **linf),
        ("TRADES-7", "linf 0.1"): AdversarialClassifier(method="trades", n_steps=7, **linf),
        ("PGD-7 training", "l2 1.5"): AdversarialClassifier(
            n_steps=7, **{**linf, "norm": "l2", "eps": 1.5}
        ),
    }
    return {**models, **attacked}


def measure(model, train, test) -> list[float]:
    start = time.process_time()
    model.fit(*train)
    seconds = time.process_time() - start
    robust = [
        RobustScorer(norm=norm, eps=eps, bounds=(0, 1))(model, *test)
        for norm, eps in THREATS.items()
    ]
    norms = [float(model.jacobian_norm(test[0], norm=norm).mean()) for norm in ("l2", "l1")]
    return [seconds, model.score(*test), *robust, *norms]


def draw(results: dict[tuple[str, str], np.ndarray], path: str, title: str) -> None:
    """Draw robust accuracy against CPU time relative to plain training.

    That of a penalty does not depend on λ: it is the median over those.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plain = results["plain", "λ=0"][0]
    methods = list(dict.fromkeys(method for method, _ in results))
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharex=True, layout="constrained")
    markers = "osDv^<>Pp*XhH8d1234+"
    for ax, column, threat in zip(axes, (2, 3), ("linf 0.1", "l2 1.5"), strict=True):
        for method, marker in zip(methods, markers, strict=False):
            rows = np.array([row for (name, _), row in results.items() if name == method])
            cost = rows[:, 0] / plain
            if method in PENALTIES:
                cost = np.full(len(rows), np.median(cost))
            ax.plot(
                cost,
                rows[:, column],
                marker=marker,
                linestyle=":",
                linewidth=0.8,
                label=method,
            )
        ax.set_xscale("log")
        ticks = [1, 1.5, 2, 3, 5, 8, 12]
        ax.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        ax.minorticks_off()
        ax.set_xlabel("CPU time of training, relative to plain")
        ax.set_ylabel(f"accuracy under PGD-40, {threat}")
        ax.grid(alpha=0.3)
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="train only methods whose name contains this")
    parser.add_argument("--figure", default="", help="file that the figure is written to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, test = load_mnist("train"), load_mnist("test", n_samples=1000)
    print(
        f"{describe_machine()}; MNIST, MLP 784-256-256-10, batch 128, {arguments.epochs} epochs, "
        f"{arguments.seeds} seed(s); PGD-40 on the first 1,000 test points\n"
    )
    print(f"| training | | {' | '.join(COLUMNS)} |\n{'| --- ' * (2 + len(COLUMNS))}|")
    results = {}
    make_models(1, 0)["plain", "λ=0"].fit(*train)  # what is first is slower
    for method, strength in make_models(1, 0):
        if arguments.only not in method:
            continue
        rows = [
            measure(make_models(arguments.epochs, seed)[method, strength], train, test)
            for seed in range(arguments.seeds)
        ]
        row = results[method, strength] = np.mean(rows, axis=0)
        seconds, clean, linf, l2, frobenius, entrywise = row
        print(
            f"| {method} | {strength} | {seconds:.1f} | {clean:.3f} | {linf:.3f} | {l2:.3f} | "
            f"{frobenius:.2f} | {entrywise:.1f} |",
            flush=True,
        )
    if arguments.figure:
        draw(results, arguments.figure, f"MNIST, MLP, {arguments.epochs} epochs; points are λ")


if __name__ == "__main__":
    main()
