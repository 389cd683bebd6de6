"""Keeping global random states out of it: dropout and initialization draw from them."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

# Two fits in two threads share the one global state, so only one may borrow it at a time.
_BORROWING = threading.RLock()


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """Return `generator`, or a new one with a fresh seed, so the global one is untouched."""
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"Got generator={generator!r}, but expected a torch.Generator or None.")
    return generator


def spawned(generator: torch.Generator, n: int) -> list[torch.Generator]:
    """Return generators seeded from another: what one draws does not change what others do."""
    seeds = torch.randint(2**62, (n,), generator=generator).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def own_random_state(random_state: Any) -> np.random.RandomState:
    """Return the RandomState that is meant; for None a fresh one, not numpy's global."""
    return np.random.RandomState() if random_state is None else check_random_state(random_state)


def draw_seed(random_state: Any) -> int:
    """Draw a seed for generators of torch."""
    return int(own_random_state(random_state).randint(2**31 - 1))


class RandomStream:
    """A private stream of torch's global generators, lent out by `borrowed`.

    Layers such as dropout draw from the global state. While a stream is borrowed that
    state is the stream's own; afterwards the global state is as it was.

    Parameters
    ----------
    seed : int
    device : torch.device
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device
        self.state = torch.Generator().manual_seed(seed).get_state()
        self.cuda_state = (
            torch.Generator(device).manual_seed(seed).get_state() if device.type == "cuda" else None
        )

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Make the stream the global state for the duration."""
        with _BORROWING:
            outer = _get_state(self.device)
            _set_state(self.device, (self.state, self.cuda_state))
            try:
                yield
            finally:
                self.state, self.cuda_state = _get_state(self.device)
                _set_state(self.device, outer)


@contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of numpy and Python for the duration."""
    with _BORROWING:
        # The global generator is what modules draw from that know no better.
        outer = np.random.get_state(), random.getstate()  # noqa: NPY002
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(outer[0])  # noqa: NPY002
            random.setstate(outer[1])


@contextmanager
def replayed_rng(device: torch.device) -> Iterator[Callable[..., AbstractContextManager[None]]]:
    """Give a function that replays, for a block, the draws made since this was entered.

    ``replay(variant=k)`` makes other draws, which follow from them and from k.
    """
    start = _get_state(device)

    @contextmanager
    def replay(variant: int = 0) -> Iterator[None]:
        with _BORROWING:
            now = _get_state(device)
            _set_state(device, start)
            if variant:
                seed = int(torch.randint(2**62, (1,))) + variant
                torch.default_generator.manual_seed(seed)
                if device.type == "cuda":
                    index = torch.cuda.current_device() if device.index is None else device.index
                    torch.cuda.default_generators[index].manual_seed(seed)
            try:
                yield
            finally:
                _set_state(device, now)

    yield replay


def _get_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


def _set_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
