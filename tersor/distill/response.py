"""Learning from the teacher's outputs: soft targets, and their sum with the task's own loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.nn import functional as F

from tersor.core.check_batch import IGNORED
from tersor.core.errors import InputError
from tersor.train.objective import Forward, Objective


@final
@dataclass(frozen=True)
class SoftTargets(Objective):
    """T² · KL(softmax(z_t / T) ‖ softmax(z_s / T)), the mean over samples; the teacher is ``task.reference``.

    Logits z: [batch, classes]; [batch, …, classes] counts each position as a sample, positions whose target is −100
    left out; [batch, classes, …] where that is what matches the targets. Float targets mean regression: the mean
    squared error to the teacher's output then, without a temperature.

    Raises InputError for a temperature that is not positive, where teacher and student differ in shape or classes, and
    where the teacher's output is not finite.
    Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), section 2.
    """

    temperature: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise InputError(
                "the temperature must be positive", where=f"{type(self).__name__}.temperature", got=self.temperature
            )

    def of(self, forward: Forward) -> Tensor:
        """The divergence from the teacher for one forward pass: []."""
        student, teacher = forward.outputs.float(), forward.reference_outputs.float()
        targets = forward.targets
        if targets.is_floating_point():
            _expect_same(student, teacher, axis=None)
            return F.mse_loss(student, teacher)
        axis = class_axis(student, targets)
        _expect_same(student, teacher, axis)
        log_p_s = F.log_softmax(student / self.temperature, dim=axis)
        log_p_t = F.log_softmax(teacher / self.temperature, dim=axis)
        divergence = F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(dim=axis)
        if targets.ndim == 1:
            return self.temperature**2 * divergence.mean()
        counted = targets != IGNORED
        return self.temperature**2 * (divergence * counted).sum() / counted.sum().clamp_min(1)


@final
@dataclass(frozen=True)
class Distill(Objective):
    """``alpha`` · T² · KL(teacher ‖ student) + (1 − ``alpha``) · the task's loss, with T = ``temperature``.

    The same as ``alpha * SoftTargets(temperature) + (1 - alpha) * TaskLoss()``; see SoftTargets for shapes, regression
    and errors. Raises InputError for an alpha outside [0, 1].
    Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), section 2.
    """

    temperature: float = 4.0
    alpha: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise InputError("the temperature must be positive", where="Distill.temperature", got=self.temperature)
        if not 0 <= self.alpha <= 1:
            raise InputError("alpha is no fraction", where="Distill.alpha", got=self.alpha, expected="0 … 1")

    def of(self, forward: Forward) -> Tensor:
        """The weighted sum for one forward pass: []. A part of weight 0 is not computed."""
        if self.alpha == 0:
            return forward.task_loss
        soft = SoftTargets(self.temperature).of(forward)
        if self.alpha == 1:
            return soft
        return self.alpha * soft + (1 - self.alpha) * forward.task_loss


def class_axis(outputs: Tensor, targets: Tensor) -> int:
    """The axis of ``outputs`` that counts classes, by the targets' shape: the last one if it can be, else axis 1.

    Raises InputError where neither fits.
    """
    shape, expected = outputs.shape, targets.shape
    if len(shape) > 1 and shape[:-1] == expected:
        return -1
    if len(shape) > 2 and (*shape[:1], *shape[2:]) == tuple(expected):
        return 1
    raise InputError(
        "outputs and targets do not fit for distillation", where="SoftTargets",
        got=f"outputs {list(shape)}, targets {list(expected)}",
        expected="outputs [batch, …, classes] or [batch, classes, …], targets [batch, …]",
        do="Pass output_of= or targets_of= to Task so that they do",
    )  # fmt: skip


def _expect_same(student: Tensor, teacher: Tensor, axis: int | None) -> None:
    if student.shape == teacher.shape:
        return
    if axis is not None and student.ndim == teacher.ndim and student.shape[axis] != teacher.shape[axis]:
        raise InputError(
            "teacher and student have different numbers of classes", where="task.reference",
            got=f"teacher {teacher.shape[axis]}, student {student.shape[axis]}", expected="the same number",
            do="Distil from a teacher of the same classes",
        )  # fmt: skip
    raise InputError(
        "teacher and student give outputs of different shapes", where="task.reference",
        got=f"teacher {list(teacher.shape)}, student {list(student.shape)}", expected="the same shape",
    )  # fmt: skip
