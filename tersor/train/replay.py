"""Loaders whose augmented epochs come again: each sample's augmentation is drawn from its number and its view alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tersor.core.check_task import same
from tersor.core.errors import InputError, user_code
from tersor.core.keyed import Keyed, KeyedLoader, Replayable
from tersor.core.loading import every_nth
from tersor.core.randomness import fixed_randomness, reseed
from tersor.core.step import derive_seed
from tersor.core.task import Batch
from tersor.train.share import like

_Pair = tuple[int, int]  # the number of a sample, and of its view


def replayed(loader: Iterable[Batch], views: int = 4, seed: int = 0) -> KeyedLoader:
    """``loader`` with ``views`` views of each sample: epoch e gives view e modulo ``views``, the same each time.

    Before a sample is fetched, Python's, NumPy's and torch's global generators are seeded with (``seed``, view, number
    of the sample): what a dataset draws from them is the same again, whoever's worker draws it. The order is drawn
    as before; the caller's random state is not disturbed. Few views are few versions of each sample to learn from.

    Takes a DataLoader of a dataset with numbered samples, and whatever is ``Replayable`` (the zoo's loaders). Raises
    InputError for others, for ``views`` below 1, and where a sample fetched twice is two samples.

    >>> from torch.utils.data import TensorDataset
    >>> again = replayed(DataLoader(TensorDataset(torch.arange(4.0), torch.arange(4)), batch_size=2), views=2)
    >>> [(keyed.samples.tolist(), keyed.view) for keyed in [*again, *again]]
    [([0, 1], 0), ([2, 3], 0), ([0, 1], 1), ([2, 3], 1)]
    """
    if isinstance(views, bool) or not isinstance(views, int) or views < 1:
        raise InputError("too few views", where="replayed", got=views, expected="a whole number from 1")
    if isinstance(loader, Replayable):
        return loader.replayed(views, seed)
    if not isinstance(loader, DataLoader):
        raise InputError(
            "this loader cannot say which samples its batches hold", where="replayed", got=type(loader).__name__,
            expected="a DataLoader", do="Or write replayed(views, seed) for it: see tersor.core.keyed.Replayable",
        )  # fmt: skip
    if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
        raise InputError(
            "the samples of this dataset have no numbers", where="replayed", got=type(loader.dataset).__name__,
            expected="a dataset with __getitem__ and __len__",
        )  # fmt: skip
    if loader.batch_sampler is None:
        raise InputError(
            "the dataset makes its batches itself", where="replayed", got="a DataLoader with batch_size=None",
            expected="a batch size or a batch sampler",
        )  # fmt: skip
    dataset = _Replayed(loader.dataset, seed)
    _check_again(dataset, len(loader.dataset))
    return _ReplayedLoader(loader, dataset, views)


def _check_again(dataset: _Replayed, count: int) -> None:
    for number in sorted({0, count - 1}) if count else ():
        with user_code("a sample cannot be fetched", where=f"replayed, sample {number}"):
            first, second = dataset.__getitems__([(number, 0)] * 2)
        if not same(first, second):
            raise InputError(
                "a sample fetched twice with the same seed is not the same", where=f"replayed, sample {number}",
                do="Let the dataset draw from torch's, NumPy's or Python's global generator, not from one of its own",
            )  # fmt: skip


class _Replayed(Dataset[Any]):
    """(number, view) → (number, view, sample), fetched with generators seeded by both."""

    def __init__(self, dataset: Dataset[Any], seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, pairs: Sequence[_Pair]) -> list[tuple[int, int, Any]]:
        with fixed_randomness(0):
            return [self._fetched(number, view) for number, view in pairs]

    def __getitem__(self, pair: _Pair) -> tuple[int, int, Any]:
        return self.__getitems__([pair])[0]

    def _fetched(self, number: int, view: int) -> tuple[int, int, Any]:
        reseed(derive_seed(self.seed, view, number))
        return number, view, self.dataset[number]


class _Pairs:
    """The batches of a batch sampler with the view, each number of a sample as (number, view)."""

    def __init__(self, sampler: Iterable[list[int]], share: tuple[int, int]):
        self.sampler, self.share, self.view = sampler, share, 0

    def __iter__(self) -> Iterator[list[_Pair]]:
        for numbers in every_nth(self.sampler, *self.share):
            yield [(int(number), self.view) for number in numbers]

    def __len__(self) -> int:
        return len(self.sampler) // self.share[1]  # type: ignore[arg-type]


class _Collate:
    """Samples with their numbers → a keyed batch, by the loader's own collation."""

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate

    def __call__(self, samples: list[tuple[int, int, Any]]) -> Keyed:
        numbers = torch.tensor([number for number, _, _ in samples], dtype=torch.int64)
        return Keyed(self.collate([sample for _, _, sample in samples]), numbers, samples[0][1])


class _ReplayedLoader(KeyedLoader):
    def __init__(self, loader: DataLoader[Any], dataset: _Replayed, views: int, share: tuple[int, int] = (0, 1)):
        self.views, self.samples = views, len(loader.dataset)  # type: ignore[arg-type]
        self.sampler, self.batch_sampler, self.generator = loader.sampler, loader.batch_sampler, loader.generator
        self._dataset, self._original = dataset, loader
        assert loader.batch_sampler is not None, "was demanded"
        self._pairs = _Pairs(loader.batch_sampler, share)
        collate = _Collate(loader.collate_fn)
        self._loader = like(loader, dataset=dataset, batch_sampler=self._pairs, collate_fn=collate)

    def batches(self, view: int) -> Iterator[Keyed]:
        self._pairs.view = view
        yield from self._loader

    def __len__(self) -> int:
        return len(self._loader)

    def part(self, index: int, count: int) -> KeyedLoader:
        return _ReplayedLoader(self._original, self._dataset, self.views, (index, count))
