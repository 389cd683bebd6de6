"""What a Jacobian penalty costs: time for every norm and engine, and memory.

Run ``python examples/benchmarks/jacobian.py``; ``--only epochs`` takes ten minutes on one core. One
process, one thread, CPU seconds, all candidates in turn, medians of 15 for the default penalties
and of 5 for others. ``--device cuda`` times on a GPU, with a synchronization around each fit.
Epochs are of MNIST, and of random pixels where it is not found: these activate few units of
a network, which makes whole penalties cheap. Other inputs are random.
"""

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _timing import describe_machine, interleaved, print_ratios
from sklearn import config_context
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from skjacobian import AdversarialClassifier, JacobianRegularizedClassifier
from skjacobian.datasets import find_mnist, load_mnist
from skjacobian.modules import CNN, MLP

# Of random labels there is nothing to learn.
warnings.filterwarnings("ignore", message=".*has learned nothing")

WHOLE = {"penalty_samples": None}
PENALTIES = {
    "λ=0": {"lam": 0},
    "l2 (the default)": {},
    "l1": {"norm": "l1"},
    "l21": {"norm": "l21"},
    "spectral": {"norm": "spectral"},
    "cross_lipschitz": {"norm": "cross_lipschitz"},
    "loss gradient, l2": {"output": "loss"},
    "l2, whole": WHOLE,
    "l1, whole": {"norm": "l1", **WHOLE},
    "l21, whole": {"norm": "l21", **WHOLE},
    "spectral, whole": {"norm": "spectral", **WHOLE},
    "cross_lipschitz, whole": {"norm": "cross_lipschitz", **WHOLE},
    "loss gradient, l2, whole": {"output": "loss", **WHOLE},
    "l2, 1 projection, whole": {"n_projections": 1, **WHOLE},
}
MLP_PARAMS = {"module__hidden_units": (256, 256)}
CNN_PARAMS = {"module": "cnn"}
LENET_PARAMS = {
    "module": "cnn",
    "module__channels": (6, 16),
    "module__hidden_units": (120, 84),
}


def random_data(n_samples: int, shape: tuple[int, ...], n_classes: int):
    rng = np.random.default_rng(0)
    X = rng.random((n_samples, *shape), dtype=np.float32)
    return X, np.arange(n_samples) % n_classes


def images(n_samples: int, shape: tuple[int, ...]):
    """Return samples of MNIST, or random ones where it is not found."""
    if find_mnist() is None:
        print("MNIST was not found: set SKJACOBIAN_DATA. These are random pixels.")
        return random_data(n_samples, shape, 10)
    X, y = load_mnist(n_samples=n_samples)
    return X.reshape(len(X), *shape), y


def hoffman(module, X, y, n_projections: int, lam: float = 0.005) -> None:
    """One epoch with the regularizer as Hoffman, Roberts & Yaida define it (1908.02729).

    ½ ‖J‖_F², estimated by C ‖Jᵀv̂‖² from unit vectors v̂ that are random for each sample, or
    for -1 summed over the unit vectors of all classes, as in Algorithm 1 of their paper.
    """
    X, y = torch.from_numpy(X), torch.from_numpy(y)
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3, fused=True)
    for index in torch.randperm(len(X)).split(128):
        batch = X[index].requires_grad_()
        logits = module(batch)
        n_classes = logits.shape[1]
        total = 0.0
        for k in range(n_classes if n_projections == -1 else n_projections):
            if n_projections == -1:
                v = torch.zeros_like(logits)
                v[:, k] = 1.0
            else:
                v = F.normalize(torch.randn_like(logits), dim=1)
            (row,) = torch.autograd.grad(logits, batch, v, create_graph=True)
            factor = 1 if n_projections == -1 else n_classes / n_projections
            total = total + factor * row.square().sum() / len(batch)
        loss = F.cross_entropy(logits, y[index]) + lam * total / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fits(X, y, device: str = "cpu", only=PENALTIES, **params) -> dict[str, Callable]:
    """Return for each penalty a function that trains one epoch at batch size 128."""
    common = {"max_epochs": 1, "batch_size": 128, "random_state": 0, "device": device}

    def fit(model):
        model.fit(X, y)
        if device == "cuda":
            torch.cuda.synchronize()

    models = {
        name: JacobianRegularizedClassifier(**{**common, **params, **PENALTIES[name]})
        for name in only
    }
    models["PGD-7 training"] = AdversarialClassifier(n_steps=7, **{**common, **params})
    return {name: lambda model=model: fit(model) for name, model in models.items()}


def time_network(name: str, make_module: Callable, shape, n_batches: int, device: str, **params):
    """Print what an epoch costs with each penalty, and with Hoffman's on the CPU.

    The default penalties, which cost about as much as none, take turns of their own, and more.
    """
    X, y = images(128 * n_batches, shape)
    costly = fits(X, y, device, **params)
    cheap = {name: costly.pop(name) for name in PENALTIES if "whole" not in name}
    costly = {"λ=0": cheap["λ=0"], **costly}
    if device == "cpu":
        costly["Hoffman et al., 1 projection"] = lambda: hoffman(make_module(), X, y, 1)
        costly["Hoffman et al., whole"] = lambda: hoffman(make_module(), X, y, -1)
    title = f"{name}, batch 128, 10 classes, {device}"
    print_ratios(f"{title}: defaults", interleaved(cheap, 15, "λ=0"), "λ=0")
    print_ratios(f"{title}: others", interleaved(costly, 5, "λ=0"), "λ=0")


def epochs(device: str) -> None:
    """Time an epoch of the networks of the MNIST benchmarks."""
    few = device == "cpu"
    time_network(
        "MLP 784-256-256-10",
        lambda: MLP(784, 10, (256, 256)),
        (784,),
        200 if few else 400,
        device,
        module__hidden_units=(256, 256),
    )
    time_network(
        "CNN (16 and 32 channels, the default), 28x28",
        lambda: CNN((28, 28), 10),
        (28, 28),
        10 if few else 200,
        device,
        module="cnn",
    )
    time_network(
        "CNN (6 and 16 channels, as LeNet), 28x28",
        lambda: CNN((28, 28), 10, channels=(6, 16), hidden_units=(120, 84)),
        (28, 28),
        10 if few else 200,
        device,
        **LENET_PARAMS,
    )


def many_classes(device: str) -> None:
    """Time the default with 100 and 1,000 classes."""
    only = ("λ=0", "l2 (the default)", "l1", "l21", "spectral", "cross_lipschitz")
    for n_classes in (100, 1000):
        X, y = random_data(128 * 100, (784,), n_classes)
        candidates = fits(X, y, device, only, **MLP_PARAMS)
        del candidates["PGD-7 training"]
        title = f"MLP 784-256-256-{n_classes}, batch 128, {device}"
        print_ratios(title, interleaved(candidates, 5, "λ=0"), "λ=0")


def tabular() -> None:
    """Time whole fits on a table of 30 features and 2 classes."""
    X, y = load_breast_cancer(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    for dtype in (np.float64, np.float32):
        for copies in (1, 5):
            data = np.tile(X.astype(dtype), (copies, 1)), np.tile(y, copies)
            models = {
                name: JacobianRegularizedClassifier(
                    module__hidden_units=(64, 64), random_state=0, **PENALTIES[name]
                )
                for name in ("λ=0", "l2 (the default)", "l1", "l2, whole")
            }
            candidates = {
                name: lambda model=model, data=data: model.fit(*data)
                for name, model in models.items()
            }
            title = f"breast cancer x {copies}, 64-64, whole fit, {np.dtype(dtype)}"
            print_ratios(title, interleaved(candidates, 9, "λ=0"), "λ=0")


# Fits of which the memory is measured, each in a process of its own.
MEMORY = {
    "cnn, λ=0": (CNN_PARAMS, "λ=0", (28, 28), 10, None),
    "cnn, l2 (the default)": (CNN_PARAMS, "l2 (the default)", (28, 28), 10, None),
    "cnn, l2, whole": (CNN_PARAMS, "l2, whole", (28, 28), 10, None),
    "cnn, l1, whole": (CNN_PARAMS, "l1, whole", (28, 28), 10, None),
    "mlp of 1,000 classes, λ=0": (MLP_PARAMS, "λ=0", (784,), 1000, None),
    "mlp of 1,000 classes, l1": (MLP_PARAMS, "l1", (784,), 1000, None),
    "mlp of 1,000 classes, l1, whole": (MLP_PARAMS, "l1, whole", (784,), 1000, None),
    "mlp of 1,000 classes, l1, whole, working_memory=256": (
        *(MLP_PARAMS, "l1, whole", (784,), 1000),
        256,
    ),
    "mlp of 1,000 classes, l1, whole, working_memory=64": (
        *(MLP_PARAMS, "l1, whole", (784,), 1000),
        64,
    ),
}


def measure_memory(name: str) -> None:
    """Print by how many MiB a fit lets the peak of this process's memory grow (Linux)."""
    params, penalty, shape, n_classes, working_memory = MEMORY[name]
    X, y = random_data(128 * 8, shape, n_classes)
    if n_classes > len(X) // 2:
        y = np.arange(len(X)) % n_classes
    model = JacobianRegularizedClassifier(
        **{"max_epochs": 1, "batch_size": 128, "random_state": 0},
        **params,
        **PENALTIES[penalty],
    )
    # A fit of one batch of two samples loads what any fit loads.
    rows = [0, 1, *range(2, n_classes)] if n_classes > 10 else range(20)
    JacobianRegularizedClassifier(lam=0, max_epochs=1, batch_size=2, **params).fit(
        X[: len(rows)], y[: len(rows)]
    )
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts from here
    before = peak_memory()
    with config_context(working_memory=working_memory or 1024):
        model.fit(X, y)
    print(peak_memory() - before)


def peak_memory() -> float:
    """Return the peak of this process's resident memory in MiB."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory() -> None:
    print("\n### Growth of the peak memory by a fit, batch 128\n")
    print("| fit | MiB |\n| --- | --- |")
    for name in MEMORY:
        command = [sys.executable, __file__, "--memory-of", name]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"| {name} | {float(result.stdout):.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--only", default="", choices=["", "epochs", "classes", "tabular", "memory"]
    )
    parser.add_argument("--memory-of", default="", help="measure one fit in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        measure_memory(arguments.memory_of)
        return
    parts = {
        "epochs": lambda: epochs(arguments.device),
        "classes": lambda: many_classes(arguments.device),
        "tabular": tabular,
        "memory": memory,
    }
    with threadpool_limits(1):
        card = f", {torch.cuda.get_device_name()}" if arguments.device == "cuda" else ""
        print(f"{describe_machine()}{card}; {time.strftime('%Y-%m-%d')}")
        for name, part in parts.items():
            if arguments.only in ("", name):
                part()


if __name__ == "__main__":
    main()
