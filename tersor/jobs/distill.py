"""Distil a task's model, or other teachers, into a student: a run like the main job's, proved and reported alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.distill.checks import expect_one_of
from tersor.distill.response import DecoupledSoftTargets, Distill, MatchLogits, SoftTargets
from tersor.distill.teach import Teach
from tersor.jobs.compress import Asked, Compressed, begin, found_for
from tersor.jobs.find_task import absolute
from tersor.jobs.student import TEACHER, Student, taught
from tersor.prune.structured.channels import PruneChannels
from tersor.recipes.recipe import read_recipe
from tersor.recipes.registry import STEPS
from tersor.run.budgets import Budgets
from tersor.run.measure_step import Timing
from tersor.train.objective import Objective, TaskLoss
from tersor.train.rehearse import rehearse


def distill_student(
    task: Task | str | Path,
    student: Student | str = Student(),
    out: str | Path = "runs/distilled",
    *,
    teachers: Sequence[str] = (),
    teach: Teach = Teach(),
    budgets: Budgets | None = None,
    seed: int = 0,
    timing: Timing | None = None,
    progress: Progress | None = None,
    command: str = "tersor.distill_student(…) from Python",
) -> Compressed:
    """Train ``student`` by ``teach`` in the new folder ``out``; measure, export and report it beside the task's model.

    The teacher is the task's ``reference``, by default its model; ``teachers`` (functions that give trained modules, as
    ``package.module:function``) take its place. ``student``: a factory's name, or a ``Student``; the task's own model
    where nothing is said. The objective is evaluated on one batch before anything is written. ``tersor.resume`` goes on
    with it. Raises what ``tersor.compress`` raises.
    """
    _expect_names(student, teachers)
    progress = progress or Progress()
    origin = (Student(factory=student) if isinstance(student, str) else student).resolved()
    found = taught(found_for(task, out, progress), teachers)
    if origin == Student() and found.reference is None:
        raise InputError(
            "the student would be its own teacher", where="student", got="neither a student nor a teacher",
            expected="--student, --drop-layers or --prune, or a --teacher",
        )  # fmt: skip
    complete = found.complete()
    built = origin.build(complete)
    objective = teach.training.objective
    if not objective.companions():  # which Finetune puts on the model first
        rehearse(objective, complete.model if built is None else built, complete, objective.of)
    asked = Asked(read_recipe(_recipe(origin, teach)), budgets or Budgets(), seed, timing or Timing())
    names = [absolute(name, TEACHER) for name in teachers]
    facts = {"command": command, "student": dataclasses.asdict(origin), "teachers": names}
    return begin(found, Path(out), asked, facts, progress, built)


def _expect_names(student: Any, teachers: Any) -> None:
    """Raise InputError for modules: a run that goes on after a kill builds its student and its teachers again."""
    if not isinstance(student, (Student, str)):
        raise InputError(
            "a run builds its student itself", where="student", got=type(student).__name__,
            expected='a function\'s name ("models.py:small"), or tersor.Student(…)',
            do="For a module that is there: tersor.Teach(…).run(student, task)",
        )  # fmt: skip
    several = isinstance(teachers, Sequence) and not isinstance(teachers, str)
    if not several or not all(isinstance(name, str) for name in teachers):
        raise InputError(
            "a run builds its teachers itself", where="teachers", got=type(teachers).__name__,
            expected='names of functions, ["models.py:teacher"]', do="For modules that are there: Task(reference=…)",
        )  # fmt: skip


LOSSES = ("distill", "soft_targets", "decoupled", "match_logits")


def objective_of(loss: str = "distill", temperature: float | None = None, alpha: float | None = None) -> Objective:
    """One of LOSSES beside the task's own, which has the weight 1 − ``alpha``; None: as the papers have it.

    Raises InputError for another name, a temperature where there is none, and values out of range.
    """
    expect_one_of("--loss", loss, LOSSES)
    if loss == "match_logits" and temperature is not None:
        raise InputError("logits are matched without a temperature", where="--temperature", got=temperature)
    heat = {} if temperature is None else {"temperature": temperature}
    if loss == "distill":
        return Distill(**heat, **({} if alpha is None else {"alpha": alpha}))
    soft = {"soft_targets": SoftTargets, "decoupled": DecoupledSoftTargets, "match_logits": MatchLogits}[loss](**heat)
    if alpha is None:
        return soft if loss == "soft_targets" else TaskLoss() + soft
    return alpha * soft + (1 - alpha) * TaskLoss()


def _recipe(student: Student, teach: Teach) -> Mapping[str, Any]:
    """The steps as a recipe's data, so that run.json holds every setting."""
    steps = [{"name": "distill", "title": f"Distil into {student}", "parts": [STEPS.settings(teach)]}]
    if student.prune is not None:
        pruned = {"name": "prune", "title": "Prune channels", "parts": [STEPS.settings(PruneChannels(student.prune))]}
        steps.insert(0, pruned)
    return {"name": "distill", "explanation": f"Distil into {student}.", "steps": steps}
