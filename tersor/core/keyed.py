"""Batches that know which samples they hold, and in which view of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Keyed:
    """A batch with the numbers of its samples in the data set, int64 [batch] on the CPU, and of their view.

    A sample's view is what augmentation made of it: the same number gives the same values again. Task reads a keyed
    batch as the batch that it holds; ``.to(device)`` moves it. ``answers``: where the teacher's answers come from.
    """

    batch: Any
    samples: Tensor
    view: int = 0
    answers: Any = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Keyed:
        """The same with the batch's tensors on ``device``."""
        from accelerate.utils import send_to_device

        return replace(self, batch=send_to_device(self.batch, device, non_blocking=non_blocking))

    def pin_memory(self) -> Keyed:
        """The same with the batch's tensors in pinned memory."""
        from torch.utils.data._utils.pin_memory import pin_memory

        return replace(self, batch=pin_memory(self.batch))


def plain(batch: Any) -> Any:
    """The batch itself, without its keys."""
    return batch.batch if isinstance(batch, Keyed) else batch


class KeyedLoader(ABC):
    """A loader of ``Keyed`` batches of ``views`` views; the epoch decides which, so that an epoch can be given again.

    ``samples``: how many the data set has. The next iteration is of the epoch that ``set_epoch`` said, else of the one
    after the last; epoch e has view e modulo ``views``. ``answers`` goes along with every batch.
    """

    samples: int
    views: int
    epoch: int = 0
    answers: Any = None

    @abstractmethod
    def batches(self, view: int) -> Iterator[Keyed]:
        """An epoch's batches of one view."""

    @abstractmethod
    def __len__(self) -> int:
        """How many batches."""

    @abstractmethod
    def part(self, index: int, count: int) -> KeyedLoader:
        """Every ``count``-th batch from the ``index``-th on; an incomplete last round is left out."""

    @final
    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch's."""
        self.epoch = epoch

    @final
    def __iter__(self) -> Iterator[Keyed]:
        view, self.epoch = self.epoch % self.views, self.epoch + 1
        for keyed in self.batches(view):
            yield replace(keyed, answers=self.answers)

    @final
    def shared(self, index: int, count: int) -> KeyedLoader:
        """The ``index``-th of ``count`` processes' share: as many batches for each."""
        part = self.part(index, count)
        part.epoch, part.answers = self.epoch, self.answers
        return part


class Replayable(ABC):
    """A loader, other than a DataLoader, that can say which samples it gives and give their views again."""

    @abstractmethod
    def replayed(self, views: int, seed: int) -> KeyedLoader:
        """The same batches, keyed, with augmentation drawn from (seed, view, sample) alone."""
