"""What the teacher says to a batch: run on it, or had from elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tersor.core.errors import InputError, user_code
from tersor.core.eval_mode import eval_mode
from tersor.core.in_type import in_type_of
from tersor.core.keyed import Keyed
from tersor.core.task import Arguments
from tersor.train.taps import Tap, sole, tapped


@dataclass(frozen=True, eq=False)
class Answer:
    """What a teacher says to a batch: its output tensor, and what each layer gave that was asked for, by its name."""

    outputs: Tensor
    layers: Mapping[str, Tensor] = field(default_factory=dict)


Ask = Callable[[Arguments], Answer]


class Answers(ABC):
    """Where the answers to keyed batches come from, in the place of the teacher's forward pass on every one."""

    @abstractmethod
    def answer(self, keyed: Keyed, inputs: Arguments, layers: tuple[str, ...], ask: Ask) -> Answer:
        """The answer to a batch, with what ``layers`` of the teacher gave, one row for each of ``keyed.samples``.

        ``ask`` runs the teacher, those layers watched, on (args, kwargs): on ``inputs``, or on some rows of them.
        """

    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What a training's record says of the answers so far: plain JSON values."""

    @abstractmethod
    def sentence(self) -> str:
        """The same for people, in one line."""


class Reference(nn.Module):
    """A teacher that gives the output tensor itself: the task's ``output_of``, made for its own model, is not asked."""


def device_of_inputs(inputs: Arguments) -> torch.device:
    """Where the first tensor lies; the CPU where there is none."""
    return next((leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), torch.device("cpu"))


def run_teacher(
    teacher: nn.Module, inputs: Arguments, output: Callable[[Any], Tensor], taps: Sequence[Tap] = ()
) -> Answer:
    """Run ``teacher`` in eval mode and without a gradient; each module's own mode is put back.

    It is moved to the device of its inputs, and stays there; their floats come in the type of its parameters.
    ``output``: what the teacher returns → the tensor that counts; ``taps``: what is kept on the way. Raises InputError
    where it fails, and, with the rows, where the output is not finite (on a GPU, where looking would halt the queue, it
    shows in the loss).
    """
    args, kwargs = inputs if isinstance(teacher, Reference) else in_type_of(teacher, inputs)
    device = device_of_inputs(inputs)
    if any(tensor.device != device for tensor in (*teacher.parameters(), *teacher.buffers())):
        teacher.to(device)
    training = any(module.training for module in teacher.modules())
    with torch.no_grad(), eval_mode(teacher) if training else nullcontext(), tapped(teacher, taps) as seen:
        with user_code("the teacher fails", where="task.reference"):
            result = teacher(*args, **kwargs)
            outputs = result if isinstance(teacher, Reference) else output(result)
    expect_finite_answer(outputs, "task.reference")
    return Answer(outputs, {str(tap): value for tap, value in sole(seen.values, "teacher").items()})


def expect_finite_answer(outputs: Tensor, where: str) -> None:
    """Raise InputError, with the rows, where a teacher's output on the CPU is not finite; ``where``: which teacher."""
    if outputs.device.type == "cpu" and not bool(torch.isfinite(outputs).all()):
        finite = torch.isfinite(outputs).reshape(len(outputs) if outputs.ndim else 1, -1).all(dim=1)
        rows = (~finite).nonzero().flatten().tolist()
        raise InputError(
            "the teacher's output is not finite", where=where,
            got=f"NaN or infinity in {len(rows)} of {len(finite)} rows of the batch, first in row {rows[0]}",
            expected="finite numbers", do="Check the reference model's weights and its input scaling",
        )  # fmt: skip
