"""Find the data that a name or an object gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.core.task import Batch, Task
from tersor.jobs.find_task import find_task, found_as, made
from tersor.measure.behaviour.data import EvaluationData
from tersor.zoo import BUILTIN

Data = EvaluationData | Task | Iterable[Batch] | str | Path


def find_data(source: Data, progress: Progress | None = None) -> EvaluationData:
    """What ``source`` names: EvaluationData, a Task, a loader; of a file its function ``task`` where none is named."""
    if isinstance(source, EvaluationData):
        return source
    if isinstance(source, Task) or not isinstance(source, (str, Path)):
        return EvaluationData(source)
    name = str(source)
    if name in BUILTIN:
        return EvaluationData(find_task(name, progress))
    expected = "tersor.Task or tersor.EvaluationData"
    found, where = made(name, "task", expected)
    if isinstance(found, EvaluationData):
        based = found.based
        return dataclasses.replace(found, task=dataclasses.replace(based, source=based.source or where))
    if isinstance(found, Task):
        return EvaluationData(found_as(found, name, where))
    if isinstance(found, Iterable) and not isinstance(found, (str, bytes)):
        return EvaluationData(found)
    raise InputError("the function gave no data", where=where, got=type(found).__name__, expected=expected)
