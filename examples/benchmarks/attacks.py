"""PGD-40 through RobustScorer against torchattacks' PGD-40, side by side, on MNIST.

Run ``python examples/benchmarks/attacks.py``; about three minutes on one core. Needs MNIST
(see README) and ``pip install --no-deps torchattacks``.
"""

from functools import partial

import numpy as np
import torch
from _timing import describe_machine, interleaved, print_ratios
from sklearn.base import clone

from skjacobian import AdversarialClassifier, JacobianRegularizedClassifier, RobustScorer
from skjacobian.datasets import load_mnist

THREATS = {"linf": 0.1, "l2": 1.5}
COMMON = {
    "module__hidden_units": (256, 256),
    "batch_size": 128,
    "max_epochs": 4,
    "random_state": 0,
}


def main() -> None:
    torch.set_num_threads(1)
    try:
        import torchattacks
    except ImportError:
        raise SystemExit("torchattacks is missing: pip install --no-deps torchattacks") from None
    X_train, y_train = load_mnist("train")
    X_test, y_test = load_mnist("test", n_samples=1000)
    print(describe_machine(), "; MNIST, first 1,000 test points, MLP 784-256-256-10, 4 epochs")
    models = {
        "plain": JacobianRegularizedClassifier(lam=0, **COMMON),
        "adversarially trained": AdversarialClassifier(eps=0.1, bounds=(0, 1), **COMMON),
    }
    # torchattacks takes images only; the network flattens them.
    X, y = torch.from_numpy(X_test).reshape(-1, 1, 28, 28), torch.from_numpy(y_test)
    for kind, model in models.items():
        print(f"training the {kind} network …", flush=True)
        model.fit(X_train, y_train)
        for norm, eps in THREATS.items():
            constant = 2.5 * eps / 40  # the step of Madry et al., and of torchattacks here
            make = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
            peer = make(model.module_, eps=eps, alpha=constant, steps=40, random_start=True)
            threat = {"norm": norm, "eps": eps, "bounds": (0, 1), "n_steps": 40}
            scorers = {
                "RobustScorer": RobustScorer(**threat),
                "RobustScorer, constant steps": RobustScorer(**threat, step_size=constant),
            }
            accuracies: dict[str, list[float]] = {name: [] for name in ("torchattacks", *scorers)}

            def theirs(peer=peer, model=model, record=accuracies) -> None:
                X_adv = peer(X, y).numpy().reshape(X_test.shape)
                record["torchattacks"].append(float(np.mean(model.predict(X_adv) == y_test)))

            def ours(name: str, scorer: RobustScorer, model=model, record=accuracies) -> None:
                seeded = clone(scorer).set_params(random_state=len(record[name]))
                record[name].append(seeded(model, X_test, y_test))

            candidates = {"torchattacks": theirs}
            candidates |= {n: partial(ours, n, scorer) for n, scorer in scorers.items()}
            results = interleaved(candidates, 9, "torchattacks")
            print_ratios(f"{kind}, {norm} eps={eps}", results, "torchattacks")
            for name, values in accuracies.items():
                print(
                    f"robust accuracy by {name}, mean of {len(values)} seeds: {np.mean(values):.4f}"
                )


if __name__ == "__main__":
    main()
