"""What two models are compared on: a task's test data, and what only a comparison needs to know of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tersor.core.check_batch import check_inputs
from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError, user_code
from tersor.core.keyed import plain
from tersor.core.metric import default_metric
from tersor.core.task import TARGET_KEYS, Batch, Split, Task, first_batch

Groups = Mapping[str, NDArray[np.object_]]
_MISSING = {"", "?", "nan", "none", "null", "n/a"}


@final
@dataclass(frozen=True)
class Pixels:
    """How the first input was made of pixels in [0, 1]: x = (pixel − mean) / deviation, one number for each channel.

    Corruptions and attacks work on pixels; without this they take each channel's own reach in the data for [0, 1].
    """

    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.mean) != len(self.deviation) or not self.mean or not all(d > 0 for d in self.deviation):
            raise InputError(
                "no scale of pixels", where="Pixels", got=f"mean {self.mean}, deviation {self.deviation}",
                expected="as many means as deviations, which are above zero",
            )  # fmt: skip

    @property
    def reach(self) -> tuple[Tensor, Tensor]:
        """The inputs' smallest and largest possible values by channel, each [channels]."""
        mean, deviation = torch.tensor(self.mean), torch.tensor(self.deviation)
        return (0 - mean) / deviation, (1 - mean) / deviation


@final
@dataclass(frozen=True, eq=False)
class EvaluationData:
    """A task whose test data two models are compared on, with what is known of the samples beside their targets.

    Args:
        task: a Task (its test loader is read; its model counts only where it is one of the two), or the loader itself,
            for models that come as files. Batches without targets allow agreement, and nothing about right and wrong.
        groups_of: batch → {sensitive attribute: its value for each sample}. None, NaN, "" and "?" are missing values.
        classes: names of the classes, by index.
        positive: the favourable class, for which fairness asks who is selected; default: the second of two.
        pixels: how inputs were made of pixels, for pictures.
        outside: a loader of other data (out of distribution), read as the test loader is; its targets do not count.

    Raises InputError where there is no test loader, or a loader can be read only once.
    """

    task: Task | Iterable[Batch]
    groups_of: Callable[[Batch], Mapping[str, Any]] | None = None
    classes: tuple[str, ...] = ()
    positive: int | None = None
    pixels: Pixels | None = None
    outside: Iterable[Batch] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.task, Task):
            object.__setattr__(self, "task", Task(NoModel(), test=self.task, name="data"))
        for loader, where in ((self.based.test, f"task {self.based.name!r}"), (self.outside, "EvaluationData.outside")):
            if isinstance(loader, Iterator):
                raise InputError(
                    "the data can be read only once", where=where, got=type(loader).__name__,
                    expected="a loader or a list, which begins anew each time",
                    do="Return list(batches), or a DataLoader",
                )  # fmt: skip
        if self.based.test is None:
            raise InputError(
                "the task has no test data", where=f"task {self.based.name!r}", expected="Task(test=DataLoader)"
            )
        object.__setattr__(self, "task", _with_metric(self.based))

    @property
    def based(self) -> Task:
        """The task, also where a loader was given."""
        assert isinstance(self.task, Task), "made one at the start"
        return self.task

    @property
    def labelled(self) -> bool:
        """Whether the batches hold targets."""
        return self.based.metric is not None

    def loader(self, split: Split) -> Iterable[Batch]:
        """The batches of a split of the task, which is there."""
        found: Iterable[Batch] | None = getattr(self.based, split)
        assert found is not None, f"the task has {split} data"
        return found

    def elsewhere(self) -> EvaluationData:
        """The data from outside as data of their own, without targets and groups."""
        assert self.outside is not None
        task = replace(self.based, test=self.outside, metric=None, targets_of=_no_targets)
        return replace(self, task=task, groups_of=None, outside=None)

    def groups(self, batch: Batch, length: int, where: str) -> dict[str, NDArray[np.object_]]:
        """attribute → the group of each sample as text, None where it is missing, [length]. Raises InputError."""
        if self.groups_of is None:
            return {}
        with user_code("groups_of fails", where=where, expected="{attribute: its value for each sample}"):
            said = dict(self.groups_of(plain(batch)))
            found = {str(name): np.array([_group(value) for value in values], object) for name, values in said.items()}
        wrong = [f"{name}: {len(values)}" for name, values in found.items() if len(values) != length]
        if wrong:
            raise InputError("groups_of gives another number of samples", where=where, got=wrong[0], expected=length)
        return found


class NoModel(nn.Module):
    """Stands where data come without a model; it cannot be run."""

    def forward(self, *inputs: Any) -> Any:
        """Raises InputError."""
        raise InputError(
            "the data bring no model of their own", where="--data", do="Name both models: files, folders or functions"
        )


def _no_targets(batch: Batch) -> Tensor:
    raise InputError("these data have no targets", where="EvaluationData.outside")


def _with_metric(task: Task) -> Task:
    """The task with the metric that its targets call for; without one where there are no targets."""
    if task.targets_of is _no_targets:
        return task
    first = first_batch(task.demand_loader("test"), "test")
    if not has_targets(task, first):
        return replace(task, metric=None)
    check_inputs(task, first, "task.test, batch 0")
    metric = task.metric
    if metric is None:
        metric = default_metric(task.targets(first))
    return replace(task, metric=metric)


def has_targets(task: Task, batch: Batch) -> bool:
    """Whether the task finds targets in a batch; a batch of inputs alone has none."""
    if task.targets_of is not None:
        return task.targets_of is not _no_targets
    content = plain(batch)
    if isinstance(content, Mapping):
        return any(key in content for key in TARGET_KEYS)
    return isinstance(content, (tuple, list)) and len(content) >= 2


def _group(value: Any) -> str | None:
    plainly = value.item() if isinstance(value, (Tensor, np.generic)) else value
    if plainly is None:
        return None
    if isinstance(plainly, float) and plainly.is_integer():
        plainly = int(plainly)
    text = str(plainly).strip()
    return None if text.lower() in _MISSING else text
