"""Several companions of one training, as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import final

from torch import nn

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.train.companion import Companion, Moment


@final
@dataclass(frozen=True)
class Together(Companion):
    """Each does its part in turn, in this order; in a recipe a list. Raises InputError where there is none."""

    companions: tuple[Companion, ...]

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.companions:
            raise InputError("nobody goes along", where="Together.companions", expected="one companion or more")

    def begin(self, model: nn.Module, task: Task) -> None:
        """Each puts on ``model`` what it needs."""
        for companion in self.companions:
            companion.begin(model, task)

    def after_backward(self, moment: Moment) -> None:
        """Each sees the gradients that those before it left."""
        for companion in self.companions:
            companion.after_backward(moment)

    def after_step(self, moment: Moment) -> None:
        """Each sees the weights that those before it left."""
        for companion in self.companions:
            companion.after_step(moment)

    def settled(self, done: int, steps: int) -> bool:
        """Once all of them are."""
        return all(companion.settled(done, steps) for companion in self.companions)

    def expected(self, model: nn.Module, task: Task) -> Plan | None:
        """All that can be said by any of them, each of the model as it is."""
        plans = [companion.expected(model, task) for companion in self.companions]
        return _joined([plan for plan in plans if plan is not None])

    @contextmanager
    def judged(self, model: nn.Module) -> Iterator[None]:
        """While open, what all of them make of it."""
        with ExitStack() as stack:
            for companion in self.companions:
                stack.enter_context(companion.judged(model))
            yield

    def noted(self, model: nn.Module) -> Mapping[str, float]:
        """What each noted."""
        return {name: value for companion in self.companions for name, value in companion.noted(model).items()}

    def finish(self, model: nn.Module) -> Plan:
        """Each takes off what it put on, the last first; their edits, the first's first."""
        plans = [companion.finish(model) for companion in reversed(self.companions)][::-1]
        return _joined(plans) or Plan("together")


def _joined(plans: list[Plan]) -> Plan | None:
    if not plans:
        return None
    names = ", ".join(plan.method for plan in plans)
    edits = tuple(edit for plan in plans for edit in plan.edits)
    skips = tuple(skip for plan in plans for skip in plan.skips)
    return Plan(names, edits, skips, tuple(line for plan in plans for line in plan.lines))
