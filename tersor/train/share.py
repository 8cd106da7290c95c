"""One process's share of a loader, where several train together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from tersor.core.keyed import KeyedLoader
from tersor.core.loading import every_nth
from tersor.core.task import Batch


def shared(loader: Iterable[Batch], index: int, count: int) -> Iterable[Batch]:
    """The ``index``-th of each ``count`` batches, in every epoch; an incomplete last round is left out.

    Of a DataLoader with numbered samples only these are fetched; one that its sampler divides already stays as it is.
    Whoever shuffles draws the same order in every process, since all begin an epoch from one seed.
    """
    if isinstance(loader, KeyedLoader):
        return loader.shared(index, count)
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or loader.batch_sampler is None
    ):
        return _Every(loader, index, count)
    if isinstance(loader.sampler, DistributedSampler):
        return loader
    return like(loader, batch_sampler=_Batches(loader.batch_sampler, index, count))


def like(loader: DataLoader[Any], **changed: Any) -> DataLoader[Any]:
    """A DataLoader with the settings of another one, but for what is given; its batch sampler must be."""
    kept = {
        "dataset": loader.dataset, "collate_fn": loader.collate_fn, "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory, "timeout": loader.timeout, "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context, "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers,
    }  # fmt: skip
    return DataLoader(**{**kept, **changed})


class _Batches:
    """Every n-th batch of a batch sampler."""

    def __init__(self, batches: Any, index: int, count: int):
        self.batches, self.index, self.count = batches, index, count
        self.sampler = getattr(batches, "sampler", None)  # which the epoch's seed looks for

    def __iter__(self) -> Iterator[Any]:
        return every_nth(self.batches, self.index, self.count)

    def __len__(self) -> int:
        return len(self.batches) // self.count


class _Every:
    """Every n-th batch of a loader whose batches cannot be chosen before they are made."""

    def __init__(self, loader: Iterable[Batch], index: int, count: int):
        self.loader, self.index, self.count = loader, index, count
        self.generator, self.sampler = getattr(loader, "generator", None), getattr(loader, "sampler", None)

    def __iter__(self) -> Iterator[Batch]:
        return every_nth(self.loader, self.index, self.count)

    def __len__(self) -> int:
        return len(self.loader) // self.count  # type: ignore[arg-type]
