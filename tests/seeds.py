"""Generators of torch by their seeds."""

import torch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)
