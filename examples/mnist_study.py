"""Is the Jacobian-regularized risk a surrogate for the adversarial risk? A study on MNIST.

Run ``python examples/mnist_study.py``; it says how far it is, and goes on where it stopped. Each
network leaves a JSON file in the output folder; ``--report`` makes the figures and the table of
``report.md`` anew from these files, without training. ``--quick`` does the same on
scikit-learn's embedded digits in under a minute on one core. MNIST needs its files (see README).

- Part A: the penalties l2 and l1, λ over three decades, by training size and seed.
- Part B: the penalties that are the tight forms of both, "spectral" and "cross_lipschitz"; PGD
  training (for as many epochs, and for a quarter of them, which takes as long as a penalty),
  input-gradient regularization, weight decay and dropout, on the same axes; and penalties for
  twice the epochs, or four times as many of batches twice as large, at the samples and between
  them.
- Part C (of the report): the rank correlation of surrogate risks with the adversarial risk, for
  the norm that the theory pairs with an attack and for the crossed one.
- Part D (of the report): robust accuracy against CPU time of training.

Every network is attacked in both norms, so each pairing has its crossed control. ``--network cnn``
trains a convolutional network at a few settings.
"""

import argparse
import itertools
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from mnist_study_report import write_report
from sklearn.datasets import load_digits

from skjacobian import (
    AdversarialClassifier,
    JacobianRegularizedClassifier,
    RobustScorer,
    surrogate_gap,
)
from skjacobian.attacks import Cascade
from skjacobian.datasets import load_mnist

NORMS = ("l2", "l1", "l21", "spectral")


@dataclass(frozen=True)
class Protocol:
    """What is varied on a data set, and what is not.

    Attributes
    ----------
    name : str
    radii : dict of float
        Of the attack, by its norm.
    strengths : dict of tuple of float
        By method; 0 is plain training, which all methods share.
    epochs : dict of int
        By training size, most valuable size first.
    model : dict
        Parameters of every classifier.
    """

    name: str
    radii: dict
    strengths: dict
    epochs: dict
    n_evaluated: int
    model: dict
    attack: Any = "strong"


MNIST = Protocol(
    name="mnist",
    radii={"l2": 1.5, "linf": 0.1},
    strengths={
        "l2": (0.0002, 0.001, 0.005, 0.02, 0.05, 0.2),
        "l1": (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01),
        "spectral": (0.03, 0.1, 0.25, 0.6),
        "cross_lipschitz": (0.001, 0.005, 0.015, 0.05),
        "l2_twice": (0.02,),
        "l1_twice": (0.003,),
        "l2_between_twice": (0.02,),
        "l2_between_long": (0.02,),
        "l1_between_twice": (0.003,),
        "l1_between_long": (0.003,),
        "spectral_between_twice": (0.25,),
        "spectral_between_long": (0.25,),
        "cross_lipschitz_between": (0.015,),
        "cross_lipschitz_between_twice": (0.015,),
        "cross_lipschitz_between_long": (0.015,),
        "pgd_linf": (0.05, 0.1),
        "pgd_l2": (0.75, 1.5),
        "pgd_linf_quarter": (0.1,),
        "pgd_l2_quarter": (1.5,),
        "pgd_linf_twice": (0.1,),
        "pgd_l2_twice": (1.5,),
        "gradient_l2": (0.3, 3, 30),
        "gradient_l1": (0.01, 0.1, 0.3),
        "weight_decay": (1e-5, 1e-4, 1e-3),
        "dropout": (0.2, 0.5),
    },
    epochs={60000: 20, 5000: 60, 20000: 30, 1000: 100},
    n_evaluated=1000,
    model={"module__hidden_units": (256, 256), "batch_size": 128},
)
MNIST_CNN = replace(
    MNIST,
    strengths={
        "l2": (0.01, 0.02),
        "l1": (0.002,),
        "spectral": (0.1,),
        "cross_lipschitz": (0.005,),
        "pgd_linf": (0.1,),
        "pgd_linf_quarter": (0.1,),
    },
    epochs={60000: 8},
    model={"module": "cnn", "module__image_shape": (1, 28, 28), "batch_size": 128},
)
DIGITS = Protocol(
    name="digits",
    radii={"l2": 0.75, "linf": 0.1},
    strengths={
        "l2": (0.001, 0.01, 0.05),
        "l1": (0.0003, 0.003, 0.01),
        "pgd_linf": (0.1,),
        "pgd_l2": (0.75,),
    },
    epochs={1200: 20, 300: 40},
    n_evaluated=200,
    model={"module__hidden_units": (64, 64), "batch_size": 64},
    # The whole cascade takes most of the time, and found at most half a point more on these.
    attack=Cascade(n_queries=200),
)
# What the end of a method's name makes of the epochs, and of the size of the batches. A step of
# PGD-7 costs about four of a Jacobian penalty: in a quarter of the epochs it takes as long.
FACTORS_BY_SUFFIX = {"_quarter": (1 / 4, 1), "_twice": (2, 1), "_long": (4, 2)}
# The penalty between samples: up to halfway, on more rows than by default; where batches are
# large, in one class of each for the norms that add classes up.
BETWEEN = {"interpolation": 0.5, "penalty_samples": 40, "class_samples": None}
BETWEEN_LONG = {"interpolation": 0.5, "penalty_samples": 80}
PART_OF = {"plain": "A", "l2": "A", "l1": "A"}  # all other methods are of part B


@dataclass(frozen=True)
class Setting:
    """One network to train: how, how strongly, on how much, from which seed."""

    method: str
    strength: float
    n_train: int
    seed: int

    @property
    def part(self) -> str:
        """A or B."""
        return PART_OF.get(self.method, "B")

    @property
    def file_name(self) -> str:
        """Of its JSON file."""
        return f"{self.method}-{self.strength:g}-n{self.n_train}-seed{self.seed}.json"


def settings_of(protocol: Protocol, parts: str, sizes: list[int], seeds: int) -> list[Setting]:
    """Return the networks of a study, those first that say most."""
    strengths = {"plain": (0.0,), **protocol.strengths}
    every = [
        Setting(method, strength, n_train, seed)
        for method, values in strengths.items()
        for strength, n_train, seed in itertools.product(values, sizes, range(seeds))
    ]
    order = {size: rank for rank, size in enumerate(sizes)}

    def value(s: Setting) -> tuple:
        # The first seed at the first two sizes, the baselines there, all else after it.
        rank = order[s.n_train]
        return s.seed, rank > 1, s.part, rank, s.method != "plain", s.method

    return sorted((setting for setting in every if setting.part in parts), key=value)


def split_suffix(method: str) -> tuple[str, float, int]:
    """Return how a network is trained, and by what epochs and batches are multiplied."""
    for suffix, factors in FACTORS_BY_SUFFIX.items():
        if method.endswith(suffix):
            return method.removesuffix(suffix), *factors
    return method, 1, 1


def epochs_of(setting: Setting, protocol: Protocol, epochs: int | None) -> int:
    """Return how many epochs a network is trained for."""
    _, factor, _ = split_suffix(setting.method)
    return max(1, int(factor * (epochs or protocol.epochs[setting.n_train])))


def make_model(setting: Setting, protocol: Protocol, epochs: int):
    """Return the classifier of a setting."""
    method, _, larger = split_suffix(setting.method)
    strength = setting.strength
    common = {**protocol.model, "max_epochs": epochs, "random_state": setting.seed}
    common["batch_size"] *= larger
    if method.startswith("pgd_"):
        attack = {"norm": method.removeprefix("pgd_"), "eps": strength, "bounds": (0, 1)}
        return AdversarialClassifier(n_steps=7, **attack, **common)
    if method.startswith("gradient_"):
        norm = method.removeprefix("gradient_")
        return JacobianRegularizedClassifier(lam=strength, output="loss", norm=norm, **common)
    if method == "weight_decay":
        return JacobianRegularizedClassifier(lam=0, weight_decay=strength, **common)
    if method == "dropout":
        return JacobianRegularizedClassifier(lam=0, module__dropout=strength, **common)
    norm = "l2" if method == "plain" else method.removesuffix("_between")
    between = {}
    if method.endswith("_between"):
        between = BETWEEN if larger == 1 else BETWEEN_LONG
        if larger > 1 and norm in ("l2", "l1"):
            between = {**BETWEEN_LONG, "class_samples": 1}
    return JacobianRegularizedClassifier(lam=strength, norm=norm, **between, **common)


def load(protocol: Protocol):
    """Return training and test data, features in [0, 1]."""
    if protocol.name == "mnist":
        return load_mnist("train"), load_mnist("test", n_samples=protocol.n_evaluated)
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    order = np.random.RandomState(0).permutation(len(X))
    rows, held_out = order[protocol.n_evaluated :], order[: protocol.n_evaluated]
    return (X[rows], y[rows]), (X[held_out], y[held_out])


def training_part(train, setting: Setting):
    """Return the samples to train on: nested in size, another draw for each seed."""
    X, y = train
    rows = np.random.RandomState(setting.seed).permutation(len(X))[: setting.n_train]
    return X[rows], y[rows]


def evaluate(model, X, y, protocol: Protocol, *, strong: bool) -> dict:
    """Return what is measured of a network on some samples."""
    result = {
        "n_samples": len(y),
        "accuracy": float(model.score(X, y)),
        "jacobian": {norm: float(model.jacobian_norm(X, norm=norm).mean()) for norm in NORMS},
    }
    for norm, eps in protocol.radii.items():
        threat = {"norm": norm, "eps": eps, "bounds": (0, 1)}
        gap = surrogate_gap(model, X, y, **threat)
        result["loss"] = float(gap.loss.mean())
        result[norm] = {
            "robust_accuracy_pgd": RobustScorer(**threat)(model, X, y),
            "adversarial_loss": float(gap.adversarial_loss.mean()),
            "second_order_share": gap.second_order_share,
            "terms": {name: float(term.mean()) for name, term in gap.terms.items()},
            "exceeded": gap.exceeded,
        }
        if strong:
            scorer = RobustScorer(**threat, attack=protocol.attack, random_state=0)
            result[norm]["robust_accuracy"] = scorer(model, X, y)
    return result


def run(setting: Setting, protocol: Protocol, epochs: int, folder: Path) -> str:
    """Train and measure a network, write its file, and return a line about it."""
    torch.set_num_threads(1)
    train, test = load(protocol)
    X, y = training_part(train, setting)
    # The first steps of a process load libraries, which is no cost of a method.
    make_model(setting, protocol, 1).fit(X[:200], y[:200])
    model = make_model(setting, protocol, epochs)
    wall, cpu = time.perf_counter(), time.process_time()
    model.fit(X, y)
    seen = slice(protocol.n_evaluated)
    result = {
        **asdict(setting),
        "part": setting.part,
        "epochs": epochs,
        "radii": protocol.radii,
        "attack": str(protocol.attack),
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "train": evaluate(model, X[seen], y[seen], protocol, strong=False),
        "test": evaluate(model, *test, protocol, strong=True),
    }
    # Whole or not at all: a file that is there is not computed again.
    unfinished = folder / f".{setting.file_name}"
    unfinished.write_text(json.dumps(result, indent=1))
    unfinished.rename(folder / setting.file_name)
    return f"{summary(result)}, all {time.perf_counter() - wall:.0f} s"


def summary(result: dict) -> str:
    """Return a line about a network."""
    test = result["test"]
    robust = ", ".join(f"{norm} {test[norm]['robust_accuracy']:.3f}" for norm in result["radii"])
    return (
        f"{result['method']} {result['strength']:g}, n={result['n_train']}, seed {result['seed']}: "
        f"clean {test['accuracy']:.3f}, {robust}; trained {result['cpu_seconds']:.0f} CPU s"
    )


def run_all(settings: list[Setting], protocol: Protocol, epochs: int | None, folder: Path, n_jobs):
    """Run what has no file yet, and print a line for each network as it is done."""
    missing = [s for s in settings if not (folder / s.file_name).exists()]
    print(f"{len(settings)} networks, {len(settings) - len(missing)} of them are there", flush=True)
    parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    start = time.perf_counter()
    lines = parallel(
        joblib.delayed(run)(s, protocol, epochs_of(s, protocol, epochs), folder) for s in missing
    )
    for n_done, line in enumerate(lines, start=1):
        left = (time.perf_counter() - start) / n_done * (len(missing) - n_done)
        print(f"[{n_done}/{len(missing)}, {left / 60:.0f} min left] {line}", flush=True)


def load_results(folder: Path) -> list[dict]:
    """Return what is in the files of a folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("[!.]*.json"))]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="digits instead of MNIST")
    parser.add_argument("--network", choices=("mlp", "cnn"), default="mlp", help="on MNIST")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--parts", default="AB", help="A, B or both")
    parser.add_argument("--sizes", type=int, nargs="+", help="training sizes")
    parser.add_argument("--seeds", type=int, help="how many; 3, or 1 with --quick")
    parser.add_argument("--epochs", type=int, help="for all sizes alike")
    parser.add_argument("--n-jobs", type=int, default=1, help="networks trained at once")
    parser.add_argument("--report", action="store_true", help="no training")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    on_mnist = {"mlp": MNIST, "cnn": MNIST_CNN}[options.network]
    protocol = DIGITS if options.quick else on_mnist
    folder = options.out or Path("outputs") / f"{protocol.name}_study_{options.network}"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = options.sizes or list(protocol.epochs)
    seeds = options.seeds or (1 if options.quick else 3)
    if not options.report:
        settings = settings_of(protocol, options.parts, sizes, seeds)
        run_all(settings, protocol, options.epochs, folder, options.n_jobs)
    print(f"wrote {write_report(load_results(folder), folder)}")


if __name__ == "__main__":
    main()
