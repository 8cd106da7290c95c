"""Batches out of tensors that fit in memory, and the augmentations that go with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tersor.core.keyed import Keyed, KeyedLoader, Replayable
from tersor.core.randomness import fixed_randomness
from tersor.core.step import derive_seed

Augment = Callable[[Tensor], Tensor]


_AT_ONCE = 1_024  # images of a view that are augmented together


class TensorBatches(Replayable):
    """(images, targets) batches, drawn anew at each iteration; much faster than a loader that collates samples.

    ``images`` [n, channels, h, w], ``targets`` [n]. Order and augmentation are drawn from torch's global generator, so
    ``torch.manual_seed`` decides them. The last batch may be smaller.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: Augment | None = None,
    ):
        self.images, self.targets, self.batch_size = images, targets, batch_size
        self.shuffle, self.augment = shuffle, augment

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in self.order().split(self.batch_size):
            images = self.images[chosen]
            yield (self.augment(images) if self.augment else images), self.targets[chosen]

    def order(self) -> Tensor:
        """The numbers of the samples in the order of the next iteration: int64 [n]."""
        count = len(self.images)
        return torch.randperm(count) if self.shuffle else torch.arange(count)

    def replayed(self, views: int, seed: int) -> KeyedLoader:
        """Keyed batches of ``views`` views; a whole view is augmented when its epoch begins, and stays in memory."""
        return _Views(self, views, seed)


class _Views(KeyedLoader):
    def __init__(self, loader: TensorBatches, views: int, seed: int, share: tuple[int, int] = (0, 1)):
        self.loader, self.views, self.seed, self.share = loader, views, seed, share
        self.samples = len(loader.images)
        self._made: tuple[int, Tensor] | None = None

    def batches(self, view: int) -> Iterator[Keyed]:
        images = self._images(view)
        index, count = self.share
        chunks = self.loader.order().split(self.loader.batch_size)
        for chosen in chunks[index : len(self) * count : count]:
            yield Keyed((images[chosen], self.loader.targets[chosen]), chosen, view)

    def _images(self, view: int) -> Tensor:
        augment = self.loader.augment
        if augment is None:
            return self.loader.images
        if self._made is None or self._made[0] != view:
            parts = []
            for number, some in enumerate(self.loader.images.split(_AT_ONCE)):
                with fixed_randomness(derive_seed(self.seed, view, number)):
                    parts.append(augment(some.clone()))
            self._made = view, torch.cat(parts)
        return self._made[1]

    def __len__(self) -> int:
        return len(self.loader) // self.share[1]

    def part(self, index: int, count: int) -> KeyedLoader:
        return _Views(self.loader, self.views, self.seed, (index, count))


def shift(images: Tensor, pixels: int) -> Tensor:
    """Each image moved by up to ``pixels`` in both directions, drawn at random; its border repeats.

    [n, channels, h, w] → the same shape.
    """
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pixels,) * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * pixels + 1, (2, count, 1))
    rows, columns = dy + torch.arange(height), dx + torch.arange(width)
    sample = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def flip(images: Tensor) -> Tensor:
    """Each image mirrored left to right with probability one half. [n, channels, h, w] → the same shape."""
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(mirrored, images.flip(-1), images)
