"""Problems that tests of several attacks share, and what their answers are held against."""

import numpy as np
import torch

from skjacobian.modules import MLP
from tests.seeds import seeded


def make_problem(n=60, n_features=6, n_classes=3, width=24, seed=0, dtype=torch.float64):
    """A ReLU net that is bent inside the balls, samples in [-1, 1], and its predictions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MLP(n_features, n_classes, hidden_units=(width, width)).double()
    X = 2 * torch.rand(n, n_features, generator=seeded(), dtype=torch.float64) - 1
    with torch.no_grad():
        for layer in net[1:4:2]:
            layer.weight *= 3
        net[-1].bias -= net(X).mean(0)  # all classes occur
    net.requires_grad_(False).to(dtype)
    X = X.to(dtype)
    return net, X, net(X).argmax(1)


def margins(net, X, y):
    logits = net(X)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    return others - logits.gather(1, y.unsqueeze(1)).squeeze(1)


def greedy(g, eps, low, high):
    """argmax gᵀu for ‖u‖₁ <= eps in the box: the steepest features first, each to its end."""
    u, left = np.zeros_like(g), eps
    for j in np.argsort(-np.abs(g)):
        u[j] = np.clip(np.sign(g[j]) * left, low[j], high[j])
        left -= abs(u[j])
    return u
