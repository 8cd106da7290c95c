"""Work with random numbers that leaves the caller's random state as it was."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from tersor.core.keyed import KeyedLoader


@contextmanager
def fixed_randomness(seed: int) -> Iterator[None]:
    """Seed torch (CPU), NumPy's global generator and ``random``; put their earlier states back at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    reseed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def reseed(seed: int) -> None:
    """Seed torch (CPU), NumPy's global generator and ``random``, for good."""
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)


@contextmanager
def seeded(seed: int, loader: Iterable[Any] | None = None, epoch: int = 0) -> Iterator[None]:
    """Python, NumPy, torch on every device, and the loader's own generators start from ``seed``.

    A KeyedLoader is told ``epoch``. An epoch begun in here is the same whenever it is begun again. The caller's random
    state (Python, NumPy, torch on the CPU) is put back at the end.
    """
    with fixed_randomness(seed):
        torch.manual_seed(seed)
        for part in _parts(loader):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            if isinstance(part, (DistributedSampler, KeyedLoader)):
                part.set_epoch(epoch)
        yield


def _parts(loader: Iterable[Any] | None) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)  # a KeyedLoader gives those of the loader that it wraps
    return [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]


def keeps_own_randomness(loader: Iterable[Any]) -> bool:
    """Whether a loader has random state that ``seeded`` cannot reach: workers that live on from epoch to epoch."""
    return isinstance(loader, DataLoader) and loader.num_workers > 0 and loader.persistent_workers
