"""What training makes small: objectives, and the weighted sums of them."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.keyed import Keyed, plain
from tersor.core.task import Arguments, Batch, Task, default_loss
from tersor.train.teacher import Answer, run_teacher


class Forward:
    """One batch's way through the model, and through the reference: each runs at most once, when it is first asked for.

    Objectives that are summed share it. Where the task has a loss of its own, that loss runs the model; the outputs are
    then what it saw, provided that it called the model with the batch's own inputs.
    """

    def __init__(self, model: nn.Module, batch: Batch, task: Task):
        self.model, self.batch, self.task = model, plain(batch), task
        self.keyed = batch if isinstance(batch, Keyed) else None
        self._calls: list[tuple[tuple[Any, ...], Mapping[str, Any], Any]] = []

    @cached_property
    def targets(self) -> Tensor:
        """The batch's targets."""
        return self.task.targets(self.batch)

    @cached_property
    def outputs(self) -> Tensor:
        """The model's output tensor, with its gradient."""
        if self.task.loss is not None:
            _ = self.task_loss
            meant = self._bound(*self.task.inputs(self.batch, self.model))
            for args, kwargs, result in self._calls:
                if _same_objects(self._bound(args, kwargs), meant):
                    return self.task.output(result)
        return self.task.outputs(self.model, self.batch)

    @cached_property
    def task_loss(self) -> Tensor:
        """The task's own loss: []."""
        if self.task.loss is None:
            return default_loss(self.outputs, self.targets)
        hook = self.model.register_forward_hook(self._remember, with_kwargs=True)
        try:
            return self.task.loss(self.model, self.batch)
        finally:
            hook.remove()

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self._calls.append((args, kwargs, result))

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Arguments by the names that the task's model has for them, however they were passed."""
        try:
            return inspect.signature(self.task.model.forward).bind(*args, **kwargs).arguments
        except TypeError:  # a model with other arguments
            return {"args": args, "kwargs": kwargs}

    @cached_property
    def reference_outputs(self) -> Tensor:
        """What ``task.reference`` gives for the batch, in eval mode and without a gradient."""
        return self._answer.outputs

    @cached_property
    def _answer(self) -> Answer:
        """The teacher's answer to the batch: from where a keyed batch says, else by a forward pass.

        The reference is moved to the outputs' device when it first runs, and stays there. Raises InputError where there
        is none, or where its output is not finite.
        """
        reference, device = self.task.reference, self.outputs.device
        if reference is None:
            raise InputError(
                "there is no teacher", where="task.reference", got="None", expected="a model",
                do="Pass reference= to Task, or call task.complete(): it takes the model given",
            )  # fmt: skip

        def ask(inputs: Arguments) -> Answer:
            if any(tensor.device != device for tensor in (*reference.parameters(), *reference.buffers())):
                reference.to(device)
            return run_teacher(reference, inputs, self.task.output)

        inputs = self.task.inputs(self.batch, reference)
        if self.keyed is not None and self.keyed.answers is not None:
            return self.keyed.answers.answer(self.keyed, inputs, (), ask)
        return ask(inputs)


def _same_objects(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same_objects, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same_objects(a[key], b[key]) for key in a)
    return a is b


class Objective(ABC):
    """(model, batch, task) → a scalar to make small. Subclasses are frozen dataclasses that write ``of``.

    ``0.3 * TaskLoss() + 0.7 * SoftTargets()`` is an objective too; its parts share one forward pass.
    """

    @final
    def __call__(self, model: nn.Module, batch: Batch, task: Task) -> Tensor:
        """The objective of one batch: a tensor of shape [] with a gradient."""
        return self.of(Forward(model, batch, task))

    @abstractmethod
    def of(self, forward: Forward) -> Tensor:
        """The objective, read off one forward pass: []."""

    def __mul__(self, weight: float) -> Sum:
        return Sum(tuple((weight * w, part) for w, part in _terms(self)))

    __rmul__ = __mul__

    def __add__(self, other: Objective) -> Sum:
        return Sum(_terms(self) + _terms(other))


@final
@dataclass(frozen=True)
class TaskLoss(Objective):
    """The task's own loss."""

    def of(self, forward: Forward) -> Tensor:
        """The loss of one forward pass: []."""
        return forward.task_loss


@final
@dataclass(frozen=True)
class Sum(Objective):
    """Σ weight · objective over ``terms``, pairs of (weight, objective). Raises InputError for an infinite weight."""

    terms: tuple[tuple[float, Objective], ...]

    def __post_init__(self) -> None:
        for weight, part in self.terms:
            if not math.isfinite(weight):
                raise InputError("a weight must be finite", where=f"{weight} * {part}", got=weight)
        if not self.terms:
            raise InputError("a sum needs at least one objective", where="Sum")

    def of(self, forward: Forward) -> Tensor:
        """The weighted sum for one forward pass: []."""
        first, *rest = (weight * part.of(forward) for weight, part in self.terms)
        return sum(rest, start=first)


def _terms(objective: Objective) -> tuple[tuple[float, Objective], ...]:
    return objective.terms if isinstance(objective, Sum) else ((1.0, objective),)
