"""What goes along with a training: it sees gradients after each backward pass, and may change masks and weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from tersor.core.plan import Plan
from tersor.core.task import Task


@dataclass(frozen=True, eq=False)
class Moment:
    """Where a training is. ``model``: the one in training, free of wrappers; ``done``: finished steps of ``steps``."""

    model: nn.Module
    task: Task
    optimizer: torch.optim.Optimizer
    done: int
    steps: int


class Companion(ABC):
    """Goes along with one training (``Finetune(companion=…)``). Subclasses are frozen dataclasses of plain settings.

    Subclasses write ``begin`` and ``finish``, and of the others what they need: by default nothing is done in between.

    Whatever it remembers must stand on the model as buffers (not persistent ones, if training alone needs them):
    checkpoints then hold it, and a training that was killed goes on to the same weights. With several processes each
    has its own; gradients are averaged when it sees them, and it must decide the same everywhere.

    ``needs_length``: whether it counts steps, so that the loader must say how many batches it has.
    """

    needs_length: ClassVar[bool] = True

    @abstractmethod
    def begin(self, model: nn.Module, task: Task) -> None:
        """Put on ``model``, a copy about to be trained, what is needed. Again before a training is gone on with."""

    def after_backward(self, moment: Moment) -> None:  # noqa: B027
        """Gradients are there, unclipped; the optimiser's step comes next and is not yet counted."""

    def after_step(self, moment: Moment) -> None:  # noqa: B027
        """The optimiser has made its step, which is counted; gradients are still there."""

    def settled(self, done: int, steps: int) -> bool:
        """Whether the model after ``done`` steps is what was asked for: only such epochs can be the best."""
        return True

    def expected(self, model: nn.Module, task: Task) -> Plan | None:
        """For a dry run: what the training would do to ``model``, as far as counts go; None: nothing can be said."""
        return None

    def judged(self, model: nn.Module) -> AbstractContextManager[None]:
        """While open, ``model`` is what validation judges; by default the one in training."""
        return nullcontext()

    def noted(self, model: nn.Module) -> Mapping[str, float]:
        """Numbers to tell after an epoch, by name; the history keeps them."""
        return {}

    @abstractmethod
    def finish(self, model: nn.Module) -> Plan:
        """Take off what only training needed; the edits by which the model differs in structure from the one given."""
