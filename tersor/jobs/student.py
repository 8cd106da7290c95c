"""Who learns and who teaches in a run: the student and the teachers, found by what a user types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.task import Task
from tersor.distill.students import drop_layers
from tersor.distill.teachers import Teacher, Teachers
from tersor.jobs.find_task import absolute, made


@dataclass(frozen=True)
class Student:
    """How the student comes about: at most one of these; none of them means the task's own model.

    Args:
        factory: a function that builds it: ``package.module:function``, or ``file.py:function``.
        drop_layers: the task's model with every so many-th of its layers (``tersor.drop_layers``).
        prune: the task's model without this fraction of its channels (``tersor.PruneChannels``).

    Raises InputError where several are given.
    """

    factory: str | None = None
    drop_layers: int | None = None
    prune: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            raise InputError(
                "a student has one origin", where="student", got=", ".join(given), expected=f"one of {', '.join(given)}"
            )

    def __str__(self) -> str:
        if self.factory is not None:
            return self.factory
        if self.drop_layers is not None:
            return f"every {self.drop_layers}. layer of the original"
        return "the original" if self.prune is None else f"the original without {self.prune:.0%} of its channels"

    def build(self, task: Task) -> nn.Module | None:
        """The student; None where it is the task's model, pruned or not. ``task`` is completed."""
        if self.drop_layers is not None:
            return drop_layers(task.model, task.demand_example(), self.drop_layers)
        return None if self.factory is None else module_of(self.factory)

    def resolved(self) -> Student:
        """The same by a name that means the same from every folder."""
        return self if self.factory is None else replace(self, factory=absolute(self.factory, STUDENT))


STUDENT, TEACHER = "student", "teacher"  # functions that are looked for in a file where none is named
_MODULE = "torch.nn.Module"


def module_of(name: str) -> nn.Module:
    """The module that the function of this name builds, by default ``student``. Raises InputError."""
    found, source = made(name, STUDENT, _MODULE)
    if not isinstance(found, nn.Module):
        raise InputError("the factory gave no module", where=source, got=type(found).__name__, expected=_MODULE)
    return found


def taught(task: Task, teachers: Sequence[str]) -> Task:
    """The task with the teachers that the functions of these names give (a module or ``tersor.Teacher``, trained)."""
    if not teachers:
        return task
    found = []
    for name in teachers:
        one, source = made(name, TEACHER, _MODULE)
        if not isinstance(one, (nn.Module, Teacher)):
            expected = f"{_MODULE} or tersor.Teacher"
            raise InputError("the factory gave no teacher", where=source, got=type(one).__name__, expected=expected)
        found.append(one)
    first = found[0]
    alone = first if len(found) == 1 and isinstance(first, nn.Module) else None
    return replace(task, reference=alone or Teachers(found))


def student_of_run(facts: Mapping[str, Any], task: Task) -> nn.Module | None:
    """The architecture of the student with which a run began, by its run.json; None: the task's model."""
    said = facts.get("student")
    return None if said is None else Student(**said).build(task)


def taught_of_run(facts: Mapping[str, Any], task: Task) -> Task:
    """The task with the run's teachers."""
    return taught(task, facts.get("teachers", ()))
