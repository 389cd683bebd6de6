"""Does a penalty on a part of each batch train the same network as the whole penalty?

Run ``python examples/benchmarks/sampling.py --network mlp --batch-size 128``; about half an
hour on one core, and several times that for the CNN (``--network lenet``); ``--device cuda``
trains and attacks on a GPU, where the seconds printed are those of its host. Needs MNIST (see
README).

For each norm and λ, networks of several seeds are trained with the penalty on one class of
every sixth sample, by fours and 20 at least, which is what ``penalty_samples="auto"`` takes of
these networks on the CPU (``--rows`` takes others), and with that of all samples and classes
(``None``). Printed are the means over seeds of clean accuracy (10,000 test points), of accuracy
under PGD-40 (1,000 test points) and of the Jacobian norms, and below them the difference, part
minus whole, with its standard error over the seeds, which share initialization and order of
samples.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from _timing import describe_machine

from skjacobian import JacobianRegularizedClassifier, RobustScorer
from skjacobian.datasets import load_mnist

# Two decades of λ for each norm.
STRENGTHS = {"l2": (0.002, 0.02, 0.2), "l1": (0.0001, 0.001, 0.01)}
NETWORKS = {
    "mlp": {"module": "mlp", "module__hidden_units": (256, 256)},
    "lenet": {
        "module": "cnn",
        "module__image_shape": (28, 28),
        "module__channels": (6, 16),
        "module__hidden_units": (120, 84),
    },
}
COLUMNS = ("CPU s", "clean", "linf 0.1", "l2 1.5", "mean ‖J‖_F²", "mean ‖J‖_{1,1}")


def train_and_measure(params: dict, train, test, n_attacked: int) -> list[float]:
    """Return CPU seconds, accuracies in percent, and mean norms of one network."""
    model = JacobianRegularizedClassifier(**params)
    start = time.process_time()
    model.fit(*train)
    seconds = time.process_time() - start
    X, y = test[0][:n_attacked], test[1][:n_attacked]
    robust = [
        100 * RobustScorer(norm=norm, eps=eps, bounds=(0, 1), random_state=0)(model, X, y)
        for norm, eps in (("linf", 0.1), ("l2", 1.5))
    ]
    norms = [model.jacobian_norm(X, norm=norm).mean() for norm in ("l2", "l1")]
    return [seconds, 100 * model.score(*test), *robust, *(float(norm) for norm in norms)]


def compare(name: str, batch_size: int, arguments, train, test) -> None:
    print(f"\n### {name}, batch {batch_size}, {arguments.epochs} epochs\n")
    print(f"| norm, λ | penalty on | {' | '.join(COLUMNS)} |")
    print("| --- " * (2 + len(COLUMNS)) + "|", flush=True)
    for norm, strengths in STRENGTHS.items():
        for lam in strengths:
            if arguments.only not in ("", f"{norm} {lam:g}"):
                continue
            n_rows = arguments.rows or max(20, batch_size // 24 * 4)
            samples = {
                "part": {"penalty_samples": n_rows, "class_samples": 1},
                "all": {"penalty_samples": None},
            }
            rows = {sample: [] for sample in samples if arguments.arm in ("both", sample)}
            for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
                for sample in rows:
                    params = {
                        **NETWORKS[name],
                        **samples[sample],
                        "lam": lam,
                        "norm": norm,
                        "batch_size": batch_size,
                        "max_epochs": arguments.epochs,
                        "random_state": seed,
                        "device": arguments.device,
                    }
                    row = train_and_measure(params, train, test, arguments.attacked)
                    rows[sample].append(row)
                    record = {"network": name, "sample": sample, **params, "row": row}
                    if arguments.record:
                        with Path(arguments.record).open("a") as file:
                            file.write(json.dumps(record) + "\n")
            means = {sample: np.mean(values, axis=0) for sample, values in rows.items()}
            for sample, mean in means.items():
                cells = " | ".join(f"{value:.2f}" for value in mean)
                print(f"| {norm}, {lam:g} | {sample} | {cells} |")
            if arguments.arm != "both" or arguments.seeds < 2:
                continue
            difference = np.array(rows["part"]) - np.array(rows["all"])
            error = difference.std(axis=0, ddof=1) / np.sqrt(len(difference))
            cells = " | ".join(
                f"{d:+.2f} ± {e:.2f}" for d, e in zip(difference.mean(axis=0), error, strict=True)
            )
            print(f"| | difference | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=list(NETWORKS), default="mlp")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=60_000, help="training samples")
    parser.add_argument("--attacked", type=int, default=1000, help="test points attacked")
    parser.add_argument("--only", default="", help='one norm and λ alone, as "l2 0.02"')
    parser.add_argument("--arm", choices=["both", "part", "all"], default="both")
    parser.add_argument("--rows", type=int, default=0, help="samples of the part; 0 is the rule's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", default="", help="file that raw results are appended to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train = load_mnist("train", n_samples=arguments.samples)
    test = load_mnist("test")
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else "no GPU"
    print(
        f"{describe_machine()}, {card}; MNIST, {arguments.samples} training samples, "
        f"{arguments.seeds} seeds, PGD-40 on {arguments.attacked} test points"
    )
    compare(arguments.network, arguments.batch_size, arguments, train, test)


if __name__ == "__main__":
    main()
