"""Steps turn a model into a model; a Method is a step that only plans."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

from torch import nn

from tersor.core.apply import apply
from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.plan import Plan
from tersor.core.progress import Progress
from tersor.core.randomness import seeded
from tersor.core.task import Task
from tersor.core.verify import verify_edits


@dataclass(frozen=True)
class Every:
    """How often a training writes a checkpoint inside an epoch: after so many ``batches``, and when so many ``minutes``
    are over (looked at after each 64 batches); None: not by that. Raises InputError for numbers that are not positive.
    """

    batches: int | None = None
    minutes: float | None = 10.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("batches", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError("must be positive", where=f"Every.{name}", got=value)


@dataclass(frozen=True)
class Context:
    """What a step is given beside model and task. ``seed``: all its randomness derives from it. ``folder``: where it
    may keep checkpoints and logs while it runs (None: nowhere). ``progress``: whom it tells how far it is. ``every``:
    how often it keeps where it is, which changes nothing of what it gives."""

    seed: int = 0
    folder: Path | None = None
    progress: Progress = field(default_factory=Progress)
    every: Every = Every()

    def part(self, number: int, name: str) -> Context:
        """The context of a part of a step: a seed and a folder of its own."""
        folder = self.folder / f"{number:02d}-{name}" if self.folder else None
        return replace(self, seed=derive_seed(self.seed, number), folder=folder)


def derive_seed(*parts: int) -> int:
    """A 31-bit seed that depends on all ``parts``; the same on every machine."""
    import zlib

    return zlib.crc32(",".join(map(str, parts)).encode()) & 0x7FFFFFFF


@dataclass(frozen=True, eq=False)
class Result:
    """The model that a step gave, the plans that were applied on the way, and what was noted.

    ``history``: one mapping per training epoch (epoch, loss, validation …). ``facts``: what the step wants in its
    record (verification differences, epochs, early stopping), plain JSON values.
    """

    model: nn.Module
    plans: tuple[Plan, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Step(ABC):
    """One step of a recipe. The model given is never changed: ``run`` returns a new one."""

    @abstractmethod
    def run(self, model: nn.Module, task: Task, context: Context | None = None) -> Result:
        """Carry the step out on a copy of ``model``."""


class Method(Step):
    """A step that decides and nothing else: subclasses write ``plan``; ``run`` is the same for all."""

    @abstractmethod
    def plan(self, model: nn.Module, task: Task) -> Plan:
        """Decide what to do. Reads the model and the task's data, never writes."""

    @final
    def run(self, model: nn.Module, task: Task, context: Context | None = None) -> Result:
        """Complete the task, plan, apply, and verify that removed channels are gone and that what preserves does.

        Raises VerificationError where the edited model differs from what it must equal; the model given is untouched.
        """
        context, task = context or Context(), task.ready()
        with seeded(context.seed, task.calibration):  # calibration batches are often shuffled
            plan = self.plan(model, task)
        if not plan.edits:
            context.progress.say(f"warning: {plan.method} found nothing to do ({len(plan.skips)} skipped)")
        edited = apply(model, plan)
        facts = {"verified": verify_edits(model, edited, plan, task)}
        return Result(edited, (replace(plan, reference=None),), facts={k: v for k, v in facts.items() if v is not None})


@final
@dataclass(frozen=True)
class Pipeline(Step):
    """Steps one after another."""

    steps: Sequence[Step]

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self, model: nn.Module, task: Task, context: Context | None = None) -> Result:
        """Run every step on the model that the one before gave."""
        context, task = context or Context(), task.ready()
        result = Result(model)
        for number, step in enumerate(self.steps):
            part = step.run(result.model, task, context.part(number, type(step).__name__))
            facts = {**result.facts, **part.facts}
            if "verified" in result.facts and "verified" in part.facts:
                facts["verified"] = max(result.facts["verified"], part.facts["verified"])
            result = Result(part.model, result.plans + part.plans, result.history + part.history, facts)
        return result
