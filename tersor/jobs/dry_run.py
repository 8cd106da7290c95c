"""A dry run: what each step of a recipe would do to which layer, what it would skip and why, and for how long."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tersor.core.apply import apply
from tersor.core.check_task import check_task
from tersor.core.plan import Plan
from tersor.core.progress import Progress
from tersor.core.randomness import seeded
from tersor.core.step import Method, Step
from tersor.core.task import Task
from tersor.distill.teach import Teach
from tersor.jobs.find_task import find_task
from tersor.measure.compute import macs
from tersor.measure.size import parameters
from tersor.recipes.recipe import parts_of, read_recipe
from tersor.run.engine import NamedStep
from tersor.train.finetune import Finetune, estimate


@dataclass(frozen=True)
class PlannedStep:
    """One step of a dry run. ``seconds``: estimated training time on this machine; ``memory_bytes``: estimated peak of
    training (weights, gradients, momentum and the copies that are kept), activations apart."""

    name: str
    title: str
    plans: tuple[Mapping[str, Any], ...]
    seconds: float
    memory_bytes: int
    parameters: int
    macs: int

    def to_json(self) -> dict[str, Any]:
        """The step as plain JSON values."""
        return {**self.__dict__, "plans": [dict(plan) for plan in self.plans]}


def dry_run(
    task: Task | str | Path, recipe: str | Path | Mapping[str, Any] = "balanced", *, progress: Progress | None = None
) -> tuple[PlannedStep, ...]:
    """Plan every step of ``recipe`` on copies of the model; nothing is trained, written or changed.

    Later steps are planned on what earlier ones would leave, without the training in between, so scores that depend
    on trained weights may choose other channels in the real run; counts and skips are the same.
    """
    progress = progress or Progress()
    read = read_recipe(recipe)
    found = find_task(task, progress) if isinstance(task, (str, Path)) else task
    complete = found.complete()
    check_task(complete)
    model: nn.Module = copy.deepcopy(complete.model).eval()
    planned = []
    for named in progress.track(read.steps, "planning", len(read.steps)):
        model, step = _plan_step(model, complete, named)
        planned.append(step)
    return tuple(planned)


def _plan_step(model: nn.Module, task: Task, named: NamedStep) -> tuple[nn.Module, PlannedStep]:
    example = task.demand_example()
    plans: list[Plan] = []
    seconds = 0.0
    for part in parts_of(named.step):
        model, plan = _plan_part(model, task, part)
        plans += [plan] if plan else []
        if (training := _training(part)) is not None:
            seconds += estimate(training, model, task)
    count = int(parameters(model).value)
    trains = any(_training(part) is not None for part in parts_of(named.step))
    copies = 7 if trains else 2  # weights, gradient, two moments, best state, the model given and the teacher
    step = PlannedStep(
        named.name, named.title, tuple(plan.summary() for plan in plans), round(seconds, 1), 4 * count * copies, count,
        int(macs(model, example).value),
    )  # fmt: skip
    return model, step


def _training(part: Step) -> Finetune | None:
    """How a part trains, if it does."""
    return part.training if isinstance(part, Teach) else part if isinstance(part, Finetune) else None


def _plan_part(model: nn.Module, task: Task, part: Step) -> tuple[nn.Module, Plan | None]:
    training = _training(part)
    companion = None if training is None else training.companion
    with seeded(0, task.calibration):
        if isinstance(part, Method):
            plan: Plan | None = part.plan(model, task)
        else:
            plan = None if companion is None else companion.expected(model, task)
    return model if plan is None else apply(model, plan), plan
