"""attack="strong" against AutoAttack, and against long restarts where AutoAttack cannot run.

Run ``python examples/benchmarks/strong.py``; about 20 minutes on one core, of which the
references take 19. ``--part tables`` takes two, and needs neither MNIST nor a reference.
Needs MNIST (see README) and a reference: ``pip install pyautoattack`` (the authors' code,
100 steps) or ``pip install --no-deps torchattacks`` (whose "standard" makes 10 steps).
"""

import argparse
import logging
import time
import warnings

import numpy as np
import torch
from _timing import describe_machine
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skjacobian import (
    AdversarialClassifier,
    JacobianRegularizedClassifier,
    RobustScorer,
    evaluate_robustness,
)
from skjacobian.attacks import FMN, PGD, Square
from skjacobian.datasets import load_mnist

COMMON = {"module__hidden_units": (256, 256), "batch_size": 128, "random_state": 0}
NETWORKS = {
    "plain": JacobianRegularizedClassifier(lam=0, max_epochs=4, **COMMON),
    "Jacobian, l1": JacobianRegularizedClassifier(norm="l1", lam=0.002, max_epochs=8, **COMMON),
    "PGD-7 training, linf 0.1": AdversarialClassifier(
        eps=0.1, n_steps=7, bounds=(0, 1), max_epochs=8, **COMMON
    ),
}
THREATS = (("linf", 0.1), ("linf", 0.3), ("l2", 1.5))
ROW = "| {} | {} | {:.3f} | {:.3f} | {:.3f} | {:.1f} | {:.1f} | {:.2f} |"


def make_reference():
    """Return the name of the installed reference and its `(module, norm, eps) -> attack`."""
    names = {"linf": "Linf", "l2": "L2"}
    try:
        import pyautoattack

        logging.getLogger("auto-attack").setLevel(logging.CRITICAL)

        def attack(module, norm, eps):
            reference = pyautoattack.AutoAttack(
                module, norm=names[norm], eps=eps, seed=0, version="standard", device="cpu"
            )
            return lambda X, y: reference.run_standard_evaluation(X, y, batch_size=250)[0]

        return "pyautoattack", attack
    except ImportError:
        pass
    try:
        import torchattacks
    except ImportError:
        raise SystemExit("no reference: pip install pyautoattack") from None
    return "torchattacks", lambda module, norm, eps: torchattacks.AutoAttack(
        module, norm=names[norm], eps=eps, version="standard", n_classes=10, seed=0
    )


def compare_on_mnist() -> None:
    """Print robust accuracy and CPU seconds of both, side by side."""
    name, make = make_reference()
    X_train, y_train = load_mnist("train")
    X, y = load_mnist("test", n_samples=1000)
    images, labels = torch.from_numpy(X).reshape(-1, 1, 28, 28), torch.from_numpy(y)
    print(f"\nMNIST, first 1,000 test points, MLP 784-256-256-10; AutoAttack by {name}\n")
    print(
        "| network | ball | clean | AutoAttack | strong | AutoAttack, CPU s | strong, CPU s |",
        end="",
    )
    print(" ratio |\n|" + " --- |" * 8)
    for kind, model in NETWORKS.items():
        model.fit(X_train, y_train)
        for norm, eps in THREATS:
            start = time.process_time()
            X_adv = make(model.module_.eval(), norm, eps)(images, labels)
            theirs = time.process_time() - start
            reference = np.mean(model.predict(X_adv.numpy().reshape(X.shape)) == y)
            start = time.process_time()
            strong = RobustScorer(norm=norm, eps=eps, bounds=(0, 1), attack="strong")(model, X, y)
            ours = time.process_time() - start
            row = (kind, f"{norm} {eps:g}", model.score(X, y), reference, strong, theirs, ours)
            print(ROW.format(*row, ours / theirs), flush=True)


def compare_on_tables() -> None:
    """Print what stands after "strong", and after long attacks of each kind."""
    print("\nSamples that stand, of the test half; raw units over the standard deviation\n")
    print("| data | λ | ball | strong | PGD-200 ×20 | same, cross-entropy | FMN-100 ×3 |", end="")
    print(" Square 5,000 |\n|" + " --- |" * 8)
    for load in (load_breast_cancer, load_wine):
        X_train, X, y_train, y = train_test_split(
            *load(return_X_y=True), test_size=0.5, random_state=0
        )
        for lam in (0, 0.005):
            classifier = JacobianRegularizedClassifier(lam=lam, random_state=0)
            model = make_pipeline(StandardScaler(), classifier).fit(X_train, y_train)
            for norm, eps in (("linf", 0.3), ("linf", 0.6), ("l2", 1.0), ("l1", 3.0)):
                threat = {"norm": norm, "eps": eps, "feature_scale": "std"}
                attacks = (
                    PGD(n_steps=200, n_restarts=20),
                    PGD(n_steps=200, n_restarts=20, loss="cross_entropy"),
                    FMN(n_steps=100, n_restarts=3),
                    Square(n_queries=5000),
                )
                standing = [evaluate_robustness(model, X, y, **threat).robust.sum()]
                for attack in attacks:
                    share = RobustScorer(**threat, attack=attack)(model, X, y)
                    standing.append(round(share * len(y)))
                name = load.__name__.removeprefix("load_")
                cells = [name, lam, f"{norm} {eps:g}", f"**{standing[0]}**", *standing[1:]]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["mnist", "tables", "all"], default="all")
    part = parser.parse_args().part
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(describe_machine())
    if part != "tables":
        compare_on_mnist()
    if part != "mnist":
        compare_on_tables()


if __name__ == "__main__":
    main()
