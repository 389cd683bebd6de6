"""Robust accuracy by PGD-40 to the end of every search, and giving up who seems hopeless.

Run ``python examples/benchmarks/giving_up.py``; about five minutes on one core. Needs MNIST
(see README). Searches of one sample do not depend on those of others, so giving up can only
leave more samples standing; printed is how many percent, and what share of the CPU time.
"""

import itertools
import time
import warnings
from unittest.mock import patch

import numpy as np
import torch
from _timing import describe_machine
from sklearn.datasets import load_digits, make_moons
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from skjacobian import AdversarialClassifier, JacobianRegularizedClassifier, RobustScorer
from skjacobian.attacks import PGD
from skjacobian.attacks._outlook import Outlook
from skjacobian.datasets import load_mnist

NEVER = 10**6
COMMON = {"batch_size": 128, "max_epochs": 4, "random_state": 0}
BALLS = {
    "images": [("linf", 0.05), ("linf", 0.1), ("linf", 0.2), ("l2", 0.5), ("l2", 1.5), ("l2", 3.0)],
    "tables": [("linf", 0.1), ("linf", 0.3), ("l2", 0.5), ("l2", 1.0), ("l2", 2.0)],
}


def problems():
    """Yield a name, a fitted classifier, samples, what they are, and their bounds."""
    X, y = (values[:3000] for values in load_mnist("train"))
    samples = load_mnist("test", n_samples=500)
    large = load_mnist("train", n_samples=20_000)
    networks = {
        "MLP": JacobianRegularizedClassifier(lam=0, **COMMON),
        "MLP, Jacobian penalty": JacobianRegularizedClassifier(norm="l1", lam=0.01, **COMMON),
        "MLP, PGD training": AdversarialClassifier(eps=0.1, bounds=(0, 1), **COMMON),
    }
    for name, network in networks.items():
        yield f"MNIST, {name}", network.fit(*large), samples, "images", (0, 1)
    kernels = {"SVC(gamma=0.02)": {"gamma": 0.02}, "SVC(gamma=0.1)": {"gamma": 0.1}}
    kernels["SVC(kernel='poly')"] = {"kernel": "poly"}
    for name, params in kernels.items():
        yield f"MNIST, {name}", SVC(**params).fit(X, y), samples, "images", (0, 1)
    tanh = MLPClassifier((128,), activation="tanh", max_iter=20, random_state=0)
    with warnings.catch_warnings(action="ignore"):
        tanh.fit(X, y)
    yield "MNIST, MLPClassifier, tanh", tanh, samples, "images", (0, 1)
    X, y = load_digits(return_X_y=True)
    large = np.kron(X.reshape(-1, 8, 8) / 16, np.ones((2, 2))).reshape(len(X), -1)
    model = SVC(C=10, gamma=0.1).fit(large[:1200], y[:1200])
    name = "digits of 256 pixels, SVC(C=10, gamma=0.1)"
    yield name, model, (large[1200:], y[1200:]), "images", (0, 1)
    X = StandardScaler().fit_transform(X)
    for gamma in (0.02, 0.1, 1.0):
        model = SVC(gamma=gamma).fit(X[:1200], y[:1200])
        yield f"digits, SVC(gamma={gamma})", model, (X[1200:], y[1200:]), "tables", None
    X, y = make_moons(600, noise=0.1, random_state=0)
    for model in (GaussianProcessClassifier(), SVC(gamma=1.0)):
        model.fit(X[:300], y[:300])
        yield f"moons, {type(model).__name__}", model, (X[300:], y[300:]), "tables", None


def scored(scorer, model, samples, fewest_steps) -> tuple[float, float]:
    """Return the robust accuracy and the CPU seconds if nobody is given up before some steps."""
    start = time.process_time()
    with patch.object(Outlook, "FEWEST_STEPS", fewest_steps):
        accuracy = scorer(model, *samples)
    return accuracy, time.process_time() - start


def compare(name, model, samples, kind, bounds) -> None:
    """Print one line: points and time, over all balls and two losses."""
    ends, givings = [], []
    for (norm, eps), loss in itertools.product(BALLS[kind], ("soft_margin", "cross_entropy")):
        scorer = RobustScorer(attack=PGD(loss=loss), norm=norm, eps=eps, bounds=bounds)
        ends.append(scored(scorer, model, samples, NEVER))
        givings.append(scored(scorer, model, samples, Outlook.FEWEST_STEPS))
    (accuracy, seconds), (to_the_end, all_seconds) = (np.transpose(of) for of in (givings, ends))
    more = 100 * (accuracy - to_the_end)
    share = seconds.sum() / all_seconds.sum()
    print(f"| {name} | {len(samples[1])} | {more.mean():.3f} | {more.max():.2f} | {share:.2f} |")


def main() -> None:
    torch.set_num_threads(1)
    print(describe_machine())
    print("| classifier | samples | points more, mean | most | share of CPU time |")
    print("| --- | --- | --- | --- | --- |")
    for problem in problems():
        compare(*problem)


if __name__ == "__main__":
    main()
