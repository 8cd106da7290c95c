"""What an epoch costs: side by side, in turns, so that whatever else the machine does falls on all alike."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.distillation.tasks import student_of
from tersor.core.keyed import KeyedLoader
from tersor.core.loading import batches_of
from tersor.core.randomness import seeded
from tersor.core.task import Batch, Task
from tersor.distill.cache import TeacherCache
from tersor.distill.response import Distill
from tersor.tensor.statistics import Estimate, ratio_interval
from tersor.train.objective import Objective, TaskLoss
from tersor.train.optimizer import Optimizer
from tersor.train.trainer import Trainer
from tersor.zoo.batches import TensorBatches

BARE, LOOP, TAUGHT, READ = "bare PyTorch loop", "training loop", "with the teacher", "from the cache"
OPTIMIZER = Optimizer(lr=0.01, weight_decay=0.0)


@dataclass(frozen=True)
class Ratio:
    """How much longer ``one`` takes than ``other``: the median over rounds, with its interval."""

    one: str
    other: str
    estimate: Estimate


def measure(task: Task, folder: Path, images: int, rounds: int) -> tuple[Ratio, ...]:
    """Epochs over the first ``images``, in turns, ``rounds`` times after one that does not count."""
    assert isinstance(task.train, TensorBatches)
    some = TensorBatches(task.train.images[:images], task.train.targets[:images], task.train.batch_size, shuffle=True)
    task = replace(task, train=some)
    cached = TeacherCache(str(folder), views=1, refresh=0.0).on(task)
    epochs = {
        BARE: _bare(some), LOOP: _ours(task, TaskLoss()),
        TAUGHT: _ours(task, Distill()), READ: _ours(cached, Distill()),
    }  # fmt: skip
    seconds = in_turns(epochs, rounds)
    pairs = (LOOP, BARE), (READ, LOOP), (TAUGHT, LOOP)
    return tuple(Ratio(one, other, ratio_interval(seconds[one], seconds[other])) for one, other in pairs)


def in_turns(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in each round; every second round goes the other way round."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        order = list(work) if number % 2 else list(reversed(list(work)))
        for name in order:
            begun = time.perf_counter()
            work[name]()
            if number:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def _bare(batches: Iterable[Batch]) -> Callable[[], object]:
    model = student_of(0).train()
    optimizer = torch.optim.SGD(model.parameters(), OPTIMIZER.lr, momentum=OPTIMIZER.momentum)

    def epoch() -> None:
        with seeded(1):
            losses = []
            for x, y in batches:
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            float(torch.stack(losses).mean())

    return epoch


def _ours(task: Task, objective: Objective) -> Callable[[], object]:
    trainer = Trainer(copy.deepcopy(student_of(0)), task, objective, OPTIMIZER)

    def epoch() -> None:
        with seeded(1, task.train, 0):
            trainer.epoch(_batches(task), lambda number: 1.0)

    return epoch


def _batches(task: Task) -> Iterator[Batch]:
    assert isinstance(task.train, (TensorBatches, KeyedLoader))
    return batches_of(task.train, "task.train")
