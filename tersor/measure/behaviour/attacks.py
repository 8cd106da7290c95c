"""What is done to inputs: corrupted by name and severity, or attacked with a model's own gradients.

Sources: FGSM, Goodfellow et al. 2015, "Explaining and Harnessing Adversarial Examples", arXiv:1412.6572, section 4;
PGD, Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", arXiv:1706.06083, section 2.1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final
from zlib import crc32

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.in_type import in_type_of
from tersor.core.metric import default_loss
from tersor.core.task import Arguments, Task
from tersor.measure.behaviour.corruptions import NUMBERS, PICTURES
from tersor.measure.behaviour.data import EvaluationData
from tersor.measure.behaviour.inputs import Change, Reach, slot_of, with_input
from tersor.measure.runnable import Runnable, on_device


@final
@dataclass(frozen=True, eq=False)
class Scale:
    """Which values of an input, [channels] each, are 0 and 1 to corruptions and budgets; ``said``: that in words."""

    low: Tensor
    high: Tensor
    pictures: bool
    said: str

    @classmethod
    def of(cls, reach: Reach, data: EvaluationData) -> Scale:
        """By the data's ``pixels``; else what each channel spans in the data. Raises InputError for wrong channels."""
        if data.pixels is None:
            said = "0 and 1 are the smallest and largest value of each channel in the test data"
            return cls(reach.low, reach.high, reach.pictures, said)
        low, high = data.pixels.reach
        if len(low) not in (1, len(reach.low)):
            raise InputError(
                "pixels has another number of channels than the inputs", where="EvaluationData.pixels", got=len(low),
                expected=len(reach.low),
            )  # fmt: skip
        return cls(low, high, reach.pictures, "pixels in [0, 1], by the data's mean and deviation")

    def to_unit(self, x: Tensor) -> Tensor:
        """x [n, channels, …] so that 0 and 1 are what they are; a channel that never changes is 0."""
        low, span = self._parts(x)
        return torch.where(span > 0, (x - low) / torch.where(span > 0, span, 1), torch.zeros_like(x))

    def back(self, unit: Tensor) -> Tensor:
        """The inverse of ``to_unit``."""
        low, span = self._parts(unit)
        return low + unit * span

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, *[1] * (x.ndim - 2))
        low, high = (end.to(x).reshape(shape) for end in (self.low, self.high))
        return low, high - low


@final
class Corrupted(Change):
    """A corruption by name at a severity of 1 to 5; the same batch gets the same noise each time."""

    def __init__(self, name: str, severity: int, scale: Scale):
        self.name, self.severity, self._scale = name, severity, scale
        self._corrupt = (PICTURES if scale.pictures else NUMBERS)[name]

    def __str__(self) -> str:
        return f"{self.name} {self.severity}"

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], targets: Tensor | None, number: int) -> Arguments:
        """The arguments with the first input corrupted."""
        slot = slot_of(args, kwargs)
        assert slot is not None, "there is an input of real numbers"
        x: Tensor = args[slot] if isinstance(slot, int) else kwargs[slot]
        generator = torch.Generator().manual_seed(crc32(f"{self} {number}".encode()))
        changed = self._corrupt(self._scale.to_unit(x.detach().cpu().float()), self.severity, generator)
        if self._scale.pictures:
            changed = changed.clamp(0, 1)
        return with_input(args, kwargs, slot, self._scale.back(changed).to(x))


@final
class Attacked(Change):
    """The loss of ``runnable``, a PyTorch model, is raised within ``budget`` of each value (L∞, on the scale's [0, 1]).

    x ← clip(x + α·sign ∇ₓ loss) ``steps`` times from a random start in the budget, α = 2.5·budget / steps (PGD); one
    step of the whole budget from x itself with ``steps`` 1 (FGSM). Without targets, the loss of what it answers itself.
    Gradients of a model in float16 are those of its copy in float32: in float16 they vanish where it is sure of itself.
    """

    def __init__(self, runnable: Runnable, task: Task, scale: Scale, budget: float, steps: int):
        assert runnable.module is not None, "only a PyTorch model has gradients"
        self.name, self.budget, self.by = ("fgsm" if steps == 1 else "pgd"), budget, runnable
        self._task, self._scale, self._steps = task, scale, steps
        self._model = runnable.module
        if any(parameter.dtype == torch.float16 for parameter in runnable.module.parameters()):
            self._model = copy.deepcopy(runnable.module).eval().float()
        self._last: tuple[int, Tensor] | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.budget:.3g} against {self.by.name}"

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], targets: Tensor | None, number: int) -> Arguments:
        """The arguments with the first input attacked."""
        slot = slot_of(args, kwargs)
        assert slot is not None, "there is an input of real numbers"
        x: Tensor = args[slot] if isinstance(slot, int) else kwargs[slot]
        if self._last is None or self._last[0] != number:
            self._last = number, self._attacked(args, kwargs, slot, targets, number)
        return with_input(args, kwargs, slot, self._last[1].to(x))

    def _attacked(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], slot: int | str, targets: Tensor | None, number: int
    ) -> Tensor:
        args, kwargs = on_device((args, dict(kwargs)), self.by.device)
        x: Tensor = args[slot] if isinstance(slot, int) else kwargs[slot]
        start = self._scale.to_unit(x.detach().float() if x.dtype == torch.float16 else x.detach())
        low, high = start - self.budget, start + self.budget
        if self._scale.pictures:
            low, high = low.clamp(0, 1), high.clamp(0, 1)
        if targets is None:
            targets = self._outputs(args, kwargs).argmax(dim=-1)
        now, step = start, self.budget
        if self._steps > 1:
            generator = torch.Generator().manual_seed(crc32(f"{self.name} {self.budget} {number}".encode()))
            drawn = torch.rand(start.shape, generator=generator).to(start)
            now, step = torch.clamp(start + (2 * drawn - 1) * self.budget, low, high), 2.5 * self.budget / self._steps
        for _ in range(self._steps):
            gradient = self._gradient(args, kwargs, slot, now, targets.to(start.device))
            now = torch.clamp(now + step * gradient.sign(), low, high)
        return self._scale.back(now).cpu()

    def _gradient(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], slot: int | str, unit: Tensor, targets: Tensor
    ) -> Tensor:
        with torch.enable_grad():
            leaf = unit.detach().requires_grad_()
            changed = with_input(args, kwargs, slot, self._scale.back(leaf))
            loss = default_loss(self._outputs(*changed), targets)
            found = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
        if found is None:
            raise InputError(
                "the model has no gradient by its input", where=self.by.name,
                do="It detaches or rounds what it is given: attack it by transfer, as an ONNX file",
            )  # fmt: skip
        return found

    def _outputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        args, kwargs = in_type_of(self._model, (args, kwargs))
        return self._task.output(self._model(*args, **kwargs))
