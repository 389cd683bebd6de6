"""PGD-40 through RobustScorer against that of other libraries, side by side, on MNIST.

Run ``python examples/benchmarks/attacks.py``; about five minutes on one core. Needs MNIST
(see README) and ``pip install --no-deps torchattacks``; foolbox and
adversarial-robustness-toolbox are measured where they are installed.
"""

from functools import partial

import numpy as np
import torch
from _timing import describe_machine, interleaved, print_ratios
from sklearn.base import clone

from skjacobian import AdversarialClassifier, JacobianRegularizedClassifier, RobustScorer
from skjacobian.attacks import PGD
from skjacobian.datasets import load_mnist

THREATS = {"linf": 0.1, "l2": 1.5}
N_STEPS = 40
COMMON = {
    "module__hidden_units": (256, 256),
    "batch_size": 128,
    "max_epochs": 4,
    "random_state": 0,
}


def with_torchattacks(module, norm, eps, step_size):
    import torchattacks

    make = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
    attack = make(module, eps=eps, alpha=step_size, steps=N_STEPS, random_start=True)
    return lambda X, y: attack(torch.from_numpy(X), torch.from_numpy(y)).numpy()


def with_foolbox(module, norm, eps, step_size):
    import foolbox

    model = foolbox.PyTorchModel(module, bounds=(0, 1), device="cpu")
    make = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    attack = make(abs_stepsize=step_size, steps=N_STEPS, random_start=True)
    return lambda X, y: attack(model, torch.from_numpy(X), torch.from_numpy(y), epsilons=eps)[
        1
    ].numpy()


def with_art(module, norm, eps, step_size):
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        module, torch.nn.CrossEntropyLoss(), (1, 28, 28), 10, clip_values=(0, 1), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier,
        norm=np.inf if norm == "linf" else 2,
        eps=eps,
        eps_step=step_size,
        max_iter=N_STEPS,
        num_random_init=1,
        batch_size=1000,
        verbose=False,
    )
    return lambda X, y: attack.generate(X, y)


# All take images (the network flattens) and the constant step of Madry et al.
PEERS = {"torchattacks": with_torchattacks, "foolbox": with_foolbox, "ART": with_art}


def installed(module: torch.nn.Module, norm: str, eps: float, step_size: float) -> dict:
    """Return the attacks of the libraries that can be imported."""
    attacks = {}
    for name, make in PEERS.items():
        try:
            attacks[name] = make(module, norm, eps, step_size)
        except ImportError:
            print(f"{name} is missing")
    if "torchattacks" not in attacks:
        raise SystemExit("torchattacks is missing: pip install --no-deps torchattacks")
    return attacks


def compare(kind, model, norm, X, y) -> None:
    """Print CPU seconds and robust accuracies of all candidates, side by side."""
    eps = THREATS[norm]
    step_size = 2.5 * eps / N_STEPS
    threat = {"norm": norm, "eps": eps, "bounds": (0, 1)}
    constant = PGD(n_steps=N_STEPS, step_size=step_size, loss="cross_entropy")
    scorers = {
        "RobustScorer": RobustScorer(**threat, n_steps=N_STEPS),
        "RobustScorer, as the others": RobustScorer(**threat, attack=constant),
    }
    peers = installed(model.module_.eval(), norm, eps, step_size)
    accuracies: dict[str, list[float]] = {name: [] for name in (*peers, *scorers)}

    def theirs(name: str) -> None:
        X_adv = peers[name](X.reshape(-1, 1, 28, 28), y).reshape(X.shape)
        accuracies[name].append(float(np.mean(model.predict(X_adv) == y)))

    def ours(name: str) -> None:
        scorer = clone(scorers[name]).set_params(random_state=len(accuracies[name]))
        accuracies[name].append(scorer(model, X, y))

    candidates = {name: partial(theirs, name) for name in peers}
    candidates |= {name: partial(ours, name) for name in scorers}
    results = interleaved(candidates, 5, "torchattacks")
    print_ratios(f"{kind}, {norm} eps={eps}", results, "torchattacks")
    for name, values in accuracies.items():
        print(f"robust accuracy by {name}, mean of {len(values)} seeds: {np.mean(values):.4f}")


def main() -> None:
    torch.set_num_threads(1)
    X_train, y_train = load_mnist("train")
    X, y = load_mnist("test", n_samples=1000)
    print(describe_machine(), "; MNIST, first 1,000 test points, MLP 784-256-256-10, 4 epochs")
    models = {
        "plain": JacobianRegularizedClassifier(lam=0, **COMMON),
        "adversarially trained": AdversarialClassifier(eps=0.1, bounds=(0, 1), **COMMON),
    }
    for kind, model in models.items():
        print(f"training the {kind} network …", flush=True)
        model.fit(X_train, y_train)
        for norm in THREATS:
            compare(kind, model, norm, X, y)


if __name__ == "__main__":
    main()
