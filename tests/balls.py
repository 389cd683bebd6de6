"""Balls that several tests are about."""

from types import SimpleNamespace

import pytest
import torch

from skjacobian.geometry import BALL_NORMS, Ball
from skjacobian.threat_model import resolve_bounds

DOUBLE = torch.float64


def rand(shape, generator, dtype=DOUBLE):
    return torch.randn(shape, generator=generator, dtype=dtype)


def case_of(norm, eps=0.5, scale=None, bounds=None, shape=(6,), n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.rand(n, *shape, generator=generator, dtype=DOUBLE)
    if scale is not None:
        scale = torch.rand(shape, generator=generator, dtype=DOUBLE) * 3 + 0.1
    if bounds is not None:
        bounds = resolve_bounds(bounds, X)
    ball = Ball.around(X, norm=norm, eps=eps, scale=scale, bounds=bounds)
    return SimpleNamespace(X=X, norm=norm, eps=eps, scale=scale, bounds=bounds, ball=ball)


def kinds_of_ball(*norms):
    """Balls of these norms, with scale and bounds and without, of rows and of images."""
    return pytest.mark.parametrize(
        "kind",
        [
            {"norm": norm, "scale": scale, "bounds": bounds, "shape": shape}
            for norm in norms
            for scale in (None, True)
            for bounds in (None, (0.0, 1.0))
            for shape in ((6,), (2, 3, 3))
        ],
        ids=lambda kind: "-".join(str(value) for value in kind.values()),
    )


all_kinds_of_ball = kinds_of_ball(*BALL_NORMS)
