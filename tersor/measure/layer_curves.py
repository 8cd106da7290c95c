"""Curves of what each layer bears: the whole model's loss and metric with one layer changed at a time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import nn

from tersor.core.check_batch import metric_values
from tersor.core.device import device_of
from tersor.core.errors import InputError, user_code
from tersor.core.loading import batches_of
from tersor.core.metric import default_loss
from tersor.core.plan import Skip
from tersor.core.progress import Progress
from tersor.core.randomness import seeded
from tersor.core.task import Batch, Task


class Judged(Protocol):
    """A point: loss and metric of the whole model, infinite and NaN where its outputs are not finite."""

    @property
    def loss(self) -> float:
        """The mean over samples."""

    @property
    def metric(self) -> float:
        """The mean over samples."""


class Curve(Protocol):
    """The points of one layer, each changing more of it than the one before."""

    @property
    def points(self) -> Sequence[Judged]:
        """In the order in which they were measured."""


C = TypeVar("C", bound=Curve)
Work = TypeVar("Work")


@dataclass(frozen=True)
class Curves(Generic[C]):
    """Loss and metric of the model as it is, a curve for each layer, and what was passed over.

    ``samples``: of validation. ``left_out``: how many measurements there was no time for.
    """

    loss: float
    metric: float
    higher_is_better: bool
    samples: int
    layers: tuple[C, ...]
    skips: tuple[Skip, ...] = ()
    left_out: int = 0

    def drop(self, point: Judged) -> float:
        """How much worse the metric is at a point, in its own unit; infinite where it is no number."""
        worse = self.metric - point.metric if self.higher_is_better else point.metric - self.metric
        return worse if math.isfinite(worse) else math.inf

    def increases(self, curve: C) -> list[float]:
        """The increase of the loss at each point, never falling: where more change seems to help, that is noise."""
        rises = (point.loss - self.loss for point in curve.points)
        return list(accumulate(rises, max, initial=0.0))[1:]

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values; what is not finite is null."""
        plain: dict[str, Any] = plain_json(dataclasses.asdict(self))
        return plain


@dataclass(frozen=True)
class Judge:
    """Evaluates models on the same validation batches. ``samples``: how many those have together."""

    task: Task
    batches: Sequence[Batch]

    @classmethod
    def of(cls, task: Task, model: nn.Module, samples: int) -> Judge:
        """With the first batches that together have at least ``samples`` samples, on the model's device."""
        return cls(task, validation_batches(task, model, samples))

    @property
    def samples(self) -> int:
        """Of all batches together."""
        return sum(len(self.task.targets(batch)) for batch in self.batches)

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return self.task.demand_metric().higher_is_better

    def __call__(self, model: nn.Module) -> tuple[float, float]:
        """(loss, metric), means over samples; infinite and NaN where outputs are not finite."""
        return judge(model, self.task, self.batches)


def expect_effort(where: str, samples: int, seconds: float | None) -> None:
    """Raise InputError for no samples and no time."""
    if samples < 1:
        raise InputError("too few", where=f"{where}.samples", got=samples, expected="1 or more")
    if seconds is not None and not seconds > 0:
        raise InputError("no time", where=f"{where}.seconds", got=seconds, expected="more than 0")


def in_time(
    work: Sequence[Work], title: str, seconds: float | None, begun: float, progress: Progress | None
) -> Iterator[Work]:
    """The pieces of work in order, until ``seconds`` are over since ``begun`` (a ``time.monotonic``); one at least."""
    for number, piece in enumerate((progress or Progress()).track(work, title, len(work))):
        if number and seconds is not None and time.monotonic() - begun > seconds:
            break
        yield piece


def in_own_unit(task: Task, points: float) -> float:
    """Percentage points as a difference of the task's metric; as they are where that is no fraction."""
    return points / 100 if task.demand_metric().unit == "fraction" else points


def validation_batches(task: Task, model: nn.Module, samples: int) -> list[Batch]:
    """The first batches that together have at least ``samples`` samples, on the model's device."""
    if task.validation is None or task.metric is None:
        raise InputError("the task is not completed", where="task.validation", do="Call task.complete() first")
    found: list[Batch] = []
    seen = 0
    with seeded(0, task.validation):
        for batch in batches_of(task.validation, "task.validation"):
            found.append(send_to_device(batch, device_of(model)))
            seen += len(task.targets(batch))
            if seen >= samples:
                break
    if not seen:
        raise InputError("the loader is empty", where="task.validation", got="no sample")
    return found


def judge(model: nn.Module, task: Task, batches: Sequence[Batch]) -> tuple[float, float]:
    """(loss, metric), means over samples; infinite and NaN where outputs are not finite."""
    losses, values, count = 0.0, 0.0, 0
    with torch.no_grad():
        for number, batch in enumerate(batches):
            where = f"task.validation, batch {number}"
            with user_code("the model does not run on this batch", where=where):
                outputs, targets = task.outputs(model, batch), task.targets(batch)
                loss = default_loss(outputs, targets) if task.loss is None else task.loss_of(model, batch)
            if not bool(torch.isfinite(outputs).all() and torch.isfinite(loss)):
                return math.inf, math.nan
            losses += float(loss) * len(targets)
            values += float(metric_values(task, outputs, targets, where).sum())
            count += len(targets)
    return losses / count, values / count


def plain_json(value: Any) -> Any:
    """Nested mappings and sequences as plain JSON values: numbers that are not finite are None."""
    if isinstance(value, Mapping):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
