"""How much a residual block matters. A score reads the model and the task's data; it never changes them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.apply import write
from tersor.core.errors import InputError, TrainingError, user_code
from tersor.core.loading import batches_of
from tersor.core.randomness import seeded
from tersor.core.task import Task
from tersor.prune.blocks.candidates import Block
from tersor.prune.blocks.gates import sharing_copy, watched


class BlockScore(ABC):
    """Ranks blocks: one with a smaller score goes first."""

    @abstractmethod
    def blocks(self, model: nn.Module, task: Task, blocks: Sequence[Block]) -> list[float]:
        """One number for each block."""


@dataclass(frozen=True)
class Similarity(BlockScore):
    """1 − mean cos(x, y) of a block's input x and output y: what the block hardly turns goes first.

    The mean is over ``batches`` calibration batches and, for x of shape [batch, positions, features], over positions;
    for any other shape the cosine is of whole samples.

    Source: Men et al. 2024, *ShortGPT* (arXiv 2403.03853), "block influence". Ours is of whole samples
    where an image's channels, not its last dimension, are the features.
    """

    batches: int = 8

    def blocks(self, model: nn.Module, task: Task, blocks: Sequence[Block]) -> list[float]:
        def angle(x: Tensor, y: Tensor) -> Tensor:
            return 1 - F.cosine_similarity(_rows(x), _rows(y), dim=1)

        return _mean_over_calibration(model, task, blocks, self.batches, angle, "Similarity")


@dataclass(frozen=True)
class RelativeNorm(BlockScore):
    """mean ‖y − x‖ / ‖x‖ of a block's input x and output y, whole samples: what adds little goes first.

    Unlike ``Similarity`` it counts a change of length too.
    """

    batches: int = 8

    def blocks(self, model: nn.Module, task: Task, blocks: Sequence[Block]) -> list[float]:
        def share(x: Tensor, y: Tensor) -> Tensor:
            x, y = x.flatten(1).double(), y.flatten(1).double()
            return (y - x).norm(dim=1) / x.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)

        return _mean_over_calibration(model, task, blocks, self.batches, share, "RelativeNorm")


@dataclass(frozen=True)
class LossIncrease(BlockScore):
    """The task's mean loss without the block less that with it, over ``batches`` calibration batches: exact, and a pass
    over them for each block."""

    batches: int = 4

    def blocks(self, model: nn.Module, task: Task, blocks: Sequence[Block]) -> list[float]:
        whole = self._loss(sharing_copy(model), task)
        found = []
        for block in blocks:
            without = sharing_copy(model)
            for swap in block.swaps:
                write(without, swap)
            found.append(self._loss(without, task) - whole)
        return found

    def _loss(self, model: nn.Module, task: Task) -> float:
        losses = []
        for number, batch in enumerate(_batches(task, self.batches, "LossIncrease")):
            where = f"LossIncrease, calibration batch {number}"
            with user_code("the loss cannot be computed", where=where), torch.no_grad():
                losses.append(task.loss_of(model.eval(), batch).item())
            if not math.isfinite(losses[-1]):
                raise TrainingError("the loss is not finite", where=where, got=losses[-1])
        return sum(losses) / len(losses)


def _rows(x: Tensor) -> Tensor:
    """[vectors, features] in float64: positions of a sequence, or whole samples."""
    return x.double().flatten(0, 1) if x.ndim == 3 else x.double().flatten(1)


def _mean_over_calibration(
    model: nn.Module, task: Task, blocks: Sequence[Block], batches: int, measure: Any, name: str
) -> list[float]:
    sums, counts = torch.zeros(len(blocks), dtype=torch.float64), [0] * len(blocks)

    def see(number: int, x: Tensor, y: Tensor) -> None:
        values = measure(x, y)
        sums[number] += values.sum().item()
        counts[number] += values.numel()

    target = watched(model, [block.passage for block in blocks], see).eval()
    for number, batch in enumerate(_batches(task, batches, name)):
        with user_code("the model fails", where=f"{name}, calibration batch {number}"), torch.no_grad():
            task.outputs(target, batch)
    means = [float(total) / max(count, 1) for total, count in zip(sums, counts, strict=True)]
    for block, mean in zip(blocks, means, strict=True):
        if not math.isfinite(mean):
            raise TrainingError("a block's values are not finite", where=f"{name}, {block.name}", got=mean)
    return means


def _batches(task: Task, count: int, name: str) -> Iterator[Any]:
    if count < 1:
        raise InputError("at least one batch is needed", where=f"{name}.batches", got=count)
    if task.calibration is None:
        raise InputError("the task has no calibration data", where=name, do="Pass task.complete()")
    seen = 0
    with seeded(0, task.calibration):
        for batch in islice(batches_of(task.calibration, "task.calibration"), count):
            yield batch
            seen += 1
    if seen == 0:
        raise InputError("the loader is empty", where="task.calibration", got="no batch")
