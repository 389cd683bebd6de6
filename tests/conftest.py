"""Shared set-up: one torch thread, so that two-core machines and reruns agree; no windows."""

import os

# scikit-learn's checks of array inputs run only with this, read when scipy is imported.
os.environ.setdefault("SCIPY_ARRAY_API", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from sklearn.base import clone

from skjacobian.attacks import _closest, cascade, fmn
from skjacobian.datasets import find_mnist, load_mnist

torch.set_num_threads(1)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def mnist():
    if find_mnist() is None:
        pytest.skip("MNIST was not found: set SKJACOBIAN_DATA to the folder that holds `mnist`")
    return load_mnist("train"), load_mnist("test", n_samples=1000)


@pytest.fixture
def figures_are_closed():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


@pytest.fixture
def shorten_stages(monkeypatch):
    """What gives the stages of "strong" no more than so many steps, restarts or queries."""

    def shorten(kind="", **most):
        def shortened(plan):
            given = plan.attack.get_params()
            few = {name: min(n, given[name]) for name, n in most.items() if name in given}
            return plan._replace(attack=clone(plan.attack).set_params(**few))

        for known, plans in cascade.PLANS.items():
            if known.startswith(kind):
                monkeypatch.setitem(cascade.PLANS, known, tuple(map(shortened, plans)))
        if "leaves".startswith(kind):
            after_leaves = tuple(map(shortened, cascade.AFTER_LEAVES))
            monkeypatch.setattr(cascade, "AFTER_LEAVES", after_leaves)
        # FMN, which comes last, looks elsewhere as well, and at random points.
        monkeypatch.setattr(fmn, "MORE_RESTARTS", 2)
        monkeypatch.setattr(_closest, "PATIENCE", 10)

    return shorten


@pytest.fixture
def short_stages(shorten_stages):
    """Stages of "strong" ask a sample thousands of times; tests are too short for it."""
    # Where there are gradients, Square asks 100 times before, briefly.
    shorten_stages("gradients", n_queries=200, n_restarts=9)
    shorten_stages("gradients of few features", n_restarts=3)
    shorten_stages("gradients in l1 balls", n_steps=100)
    shorten_stages("scores", n_queries=100)
    shorten_stages("labels", n_queries=100)
    shorten_stages("leaves", n_queries=100)


@pytest.fixture
def brief_stages(shorten_stages):
    """Stages so brief that they find little, for tests of anything but what they find."""
    shorten_stages(n_queries=40, n_restarts=2, n_steps=8)


def pytest_collection_modifyitems(config, items):
    """Skip what needs a CUDA device where there is none, and what is slow unless asked for."""
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if "slow" not in (config.getoption("-m") or ""):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
