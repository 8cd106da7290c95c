"""The logits of student and teacher, sample by sample, whichever axes a model gives them on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.metric import IGNORED
from tersor.train.objective import Forward


@dataclass(frozen=True, eq=False)
class Samples:
    """Logits ``student``, ``teacher`` float32 [n, classes]; ``targets`` int64 [n], None where the batch has no labels.

    ``counted``: bool [n], False for what is padding or ignored; None: all count.
    """

    student: Tensor
    teacher: Tensor
    targets: Tensor | None
    counted: Tensor | None

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` [n] over the samples that count: []."""
        if self.counted is None:
            return values.mean()
        return (values * self.counted).sum() / self.counted.sum().clamp_min(1)


def samples_of(forward: Forward, who: str) -> Samples:
    """The samples of a batch: [batch, classes], or every position of [batch, …, classes] or [batch, classes, …].

    Positions whose target is −100 do not count, nor padding by the model's ``attention_mask``. ``who``: the objective,
    for errors. Raises InputError where outputs and targets do not fit, and where teacher and student differ in shape or
    classes.
    """
    student, teacher, targets = forward.outputs.float(), forward.reference_outputs.float(), forward.labels
    axis = -1 if targets is None else class_axis(student, targets, who)
    expect_same(student, teacher, axis)
    positions = student.movedim(axis, -1).shape[:-1]
    counted = forward.counted(positions) if len(positions) == 2 else None
    if targets is not None and targets.ndim > 1:
        counted = (targets != IGNORED) & (True if counted is None else counted)
    classes = student.shape[axis]
    return Samples(
        student.movedim(axis, -1).reshape(-1, classes), teacher.movedim(axis, -1).reshape(-1, classes),
        None if targets is None else targets.reshape(-1).long(), None if counted is None else counted.reshape(-1),
    )  # fmt: skip


def distributions_of(forward: Forward, who: str) -> Samples:
    """``samples_of`` for a loss of distributions over classes. Raises InputError for fewer than two outputs as well."""
    samples = samples_of(forward, who)
    if samples.student.shape[1] < 2:
        raise InputError(
            "this loss needs classes", where=who, got="one output, whose softmax is always 1", expected="two or more",
            do="Learn the output itself: MatchLogits(), or float targets",
        )  # fmt: skip
    return samples


def classes_of(forward: Forward, who: str) -> Samples:
    """``distributions_of`` for a loss that needs the class of each sample. One whose class is −100 does not count, and
    has 0.

    Raises InputError where there are no labels, they are no classes or repeat the input's tokens, too.
    """
    if forward.targets.is_floating_point():
        raise InputError(
            "this loss needs classes", where=who, got=f"targets of {forward.targets.dtype}", expected="integers",
            do="For regression use SoftTargets() or MatchLogits()",
        )  # fmt: skip
    forward.expect_labels_of_their_own()
    samples = distributions_of(forward, who)
    assert samples.targets is not None, "there are labels"
    named = samples.targets != IGNORED
    counted = named if samples.counted is None else samples.counted & named
    return Samples(samples.student, samples.teacher, samples.targets.masked_fill(~named, 0), counted)


def is_regression(forward: Forward) -> bool:
    """Whether the targets are floats."""
    return forward.labels is not None and forward.labels.is_floating_point()


def class_axis(outputs: Tensor, targets: Tensor, who: str) -> int:
    """The axis of ``outputs`` that counts classes, by the targets' shape: the last one if it can be, else axis 1.

    Raises InputError where neither fits.
    """
    shape, expected = outputs.shape, targets.shape
    if len(shape) > 1 and shape[:-1] == expected:
        return -1
    if len(shape) > 2 and (*shape[:1], *shape[2:]) == tuple(expected):
        return 1
    raise InputError(
        "outputs and targets do not fit for distillation", where=who,
        got=f"outputs {list(shape)}, targets {list(expected)}",
        expected="outputs [batch, …, classes] or [batch, classes, …], targets [batch, …]",
        do="Pass output_of= or targets_of= to Task so that they do",
    )  # fmt: skip


def expect_same(student: Tensor, teacher: Tensor, axis: int | None) -> None:
    """Raise InputError unless both outputs have one shape; ``axis`` counts classes, where one does."""
    if student.shape == teacher.shape:
        return
    if axis is not None and student.ndim == teacher.ndim and student.shape[axis] != teacher.shape[axis]:
        raise InputError(
            "teacher and student have different numbers of classes", where="task.reference",
            got=f"teacher {teacher.shape[axis]}, student {student.shape[axis]}", expected="the same number",
            do="Distil from a teacher of the same classes or vocabulary, or from its hidden layers (Hints)",
        )  # fmt: skip
    raise InputError(
        "teacher and student give outputs of different shapes", where="task.reference",
        got=f"teacher {list(teacher.shape)}, student {list(student.shape)}", expected="the same shape",
    )  # fmt: skip


def divergence(log_teacher: Tensor, log_student: Tensor) -> Tensor:
    """KL(teacher ‖ student) along the last axis, of log-probabilities: [..., n] → [...]. 0 · log 0 counts as 0."""
    teacher = log_teacher.exp()
    gap = torch.where(teacher > 0, log_teacher - log_student, 0)
    return (teacher * gap).sum(dim=-1)
