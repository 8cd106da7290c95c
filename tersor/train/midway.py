"""A training inside an epoch: what it needs to go on there to the same weights."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tersor.core.errors import TersorError
from tersor.core.keyed import Keyed, plain
from tersor.core.step import Every
from tersor.core.task import Batch, Task
from tersor.train.state import Midway
from tersor.train.trainer import CHECK_EVERY, Trainer

_PYTHON, _NUMPY = 628, 627  # numbers in the state of Python's generator, and of NumPy's


class Clock:
    """When checkpoints inside an epoch are due: the same moments in every process."""

    def __init__(self, every: Every, trainer: Trainer):
        self.every, self.trainer = every, trainer
        self._looked, self._kept, self._time = 0, 0, time.monotonic()

    def begin(self, batches: int) -> None:
        """An epoch of which ``batches`` are done begins."""
        self._looked = self._kept = batches

    def due(self, batches: int) -> bool:
        """Whether one is to be written after so many batches."""
        by_count = self.every.batches is not None and batches - self._kept >= self.every.batches
        if by_count or self._late(batches):
            self.kept(batches)
            return True
        return False

    def kept(self, batches: int) -> None:
        """One was written."""
        self._kept, self._time = batches, time.monotonic()

    def _late(self, batches: int) -> bool:
        """Whether the time is over, by the main process's clock; looked at now and then."""
        if self.every.minutes is None or batches - self._looked < CHECK_EVERY:
            return False
        self._looked = batches
        return self.trainer.main_says(time.monotonic() - self._time >= 60 * self.every.minutes)


def midway(trainer: Trainer, epoch: int, losses: Sequence[Tensor], mark: int, halved: bool) -> Midway:
    """The state of the training now, in all processes: each must call it."""
    own = torch.stack(list(losses)).float(), randomness(trainer.device), torch.tensor(float(mark), dtype=torch.float64)
    several = trainer.accelerator.num_processes > 1
    together = [gather(value[None].to(trainer.device)) if several else value[None] for value in own]
    model, optimizer = trainer.snapshot()
    all_losses, states, marks = (value.cpu() for value in together)
    return Midway(epoch, model, optimizer, all_losses, states, marks.long(), halved)


def mark_of(batch: Batch, task: Task) -> int:
    """What tells batches apart whatever augmentation draws: a checksum of the samples' numbers, else of the targets,
    else of everything."""
    if isinstance(batch, Keyed) and len(batch.samples):
        found = [batch.samples]
    else:
        try:
            found = [leaf for leaf in tree_leaves(task.targets(batch)) if isinstance(leaf, Tensor)]
        except TersorError:
            found = []
        found = found or [leaf for leaf in tree_leaves(plain(batch)) if isinstance(leaf, Tensor)]  # no labels
    mark = 0
    for leaf in found:
        flat = leaf.detach().cpu().contiguous().reshape(-1)
        mark = zlib.crc32(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"", mark)
    return mark


def randomness(device: torch.device) -> Tensor:
    """The states of Python's, NumPy's and torch's generators (the CPU's, and the device's): float64 [n]."""
    version, words, gauss = random.getstate()
    python = [version, *words, gauss is not None, gauss or 0.0]
    kept: Any = np.random.get_state()
    numpy = [*kept[1].tolist(), *kept[2:]]
    parts = [torch.tensor(numbers, dtype=torch.float64) for numbers in (python, numpy)]
    parts.append(torch.get_rng_state().double())
    if device.type == "cuda":
        parts.append(torch.cuda.get_rng_state(device).double())
    return torch.cat(parts)


def set_randomness(state: Tensor, device: torch.device) -> None:
    """The inverse of ``randomness``."""
    version, *words, has, gauss = state[:_PYTHON].tolist()
    random.setstate((int(version), tuple(map(int, words)), gauss if has else None))
    *key, position, has_gauss, cached = state[_PYTHON : _PYTHON + _NUMPY].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), int(position), int(has_gauss), cached))
    rest, size = state[_PYTHON + _NUMPY :], len(torch.get_rng_state())
    torch.set_rng_state(rest[:size].byte())
    if device.type == "cuda":
        torch.cuda.set_rng_state(rest[size:].byte(), device)
