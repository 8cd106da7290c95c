"""Batches out of tensors that fit in memory, and the augmentations that go with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Augment = Callable[[Tensor], Tensor]


class TensorBatches:
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
        count = len(self.images)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for chosen in order.split(self.batch_size):
            images = self.images[chosen]
            yield (self.augment(images) if self.augment else images), self.targets[chosen]


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
