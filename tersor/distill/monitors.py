"""Whether a distillation went wrong in one of the known ways, measured and said in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from tersor.core.device import device_of
from tersor.core.eval_mode import eval_mode
from tersor.core.loading import batches_of
from tersor.core.metric import IGNORED
from tersor.core.randomness import seeded
from tersor.core.task import Task
from tersor.distill.samples import is_regression, samples_of
from tersor.train.objective import Forward

BATCHES = 32  # of training and of validation data
NUMBERS = 2**22  # most of the teacher's logits that are kept, over all batches: a vocabulary's would fill the memory
SHARP, FLAT = 1.02, 0.98  # classes that soft targets spread over: at most so many; at least this part of all
SURE = 2.0  # standard errors
STALLED = 0.02  # largest fall of the loss over the last third of the epochs, relative, that counts as a floor
GAP = 0.02  # by how much more of the training samples the teacher has right than a student without capacity


@dataclass(frozen=True)
class Counts:
    """Samples: ``total``; which the student, the teacher has ``right``; of those that the teacher has ``wrong``, how
    many the student gives the teacher's wrong class (``repeated``), or the label (``corrected``)."""

    total: int
    student_right: int
    teacher_right: int
    repeated: int
    corrected: int

    @property
    def repeats(self) -> bool:
        """Whether the teacher's errors are repeated more often than corrected, by more than chance."""
        return self.repeated - self.corrected > SURE * math.sqrt(max(1, self.repeated + self.corrected))

    def to_json(self) -> dict[str, int]:
        """Plain JSON values."""
        return dict(vars(self))


def review(
    model: nn.Module, task: Task, history: Sequence[Mapping[str, Any]], temperature: float | None
) -> dict[str, Any]:
    """What became of a distillation: numbers, and ``warnings``, each a sentence; {} where there are no classes.

    Student and teacher see up to 32 batches of training data (as validation sees them: eval mode) and of validation.

    * *errors*: of training samples that the teacher has wrong, the student repeats more than it has right, by more than
      two standard errors of the difference. (Validation's are told too: there even students trained alone repeat.)
    * *capacity*: over the last third of at least six epochs the training loss fell by less than 2 %, the teacher has at
      least 2 % more of the training samples right, and the student is not better on training than on validation data
      by half of that.
    * *temperature*: exp(H), H the mean entropy of softmax(z_t / T), is how many classes the soft targets spread over:
      at most 1.02 is the bare label, at least 0.98 of all of them says hardly anything. A temperature is
      proposed at which they spread over √classes.
    """
    found = {}
    logits: list[Tensor] = []
    for split, loader in (("training", task.train), ("validation", task.validation)):
        assert loader is not None, "a completed task has data"
        counts, z = _look(model, task, loader, f"task.{'train' if split == 'training' else split}")
        if counts is None:
            return {}
        found[split], logits = counts, logits or z
    warnings = [*_errors(found["training"]), *_capacity(found["training"], found["validation"], history)]
    facts: dict[str, Any] = {split: counts.to_json() for split, counts in found.items()}
    if temperature is not None:
        said = torch.cat(logits)
        facts["soft_target_classes"] = round(spread(said, temperature), 4)
        warnings += _temperature(said, temperature)
    return {**facts, "warnings": warnings}


def _look(model: nn.Module, task: Task, loader: Iterable[Any], where: str) -> tuple[Counts | None, list[Tensor]]:
    """The counts on some batches, and some of the teacher's logits [n, classes]; None where there are no classes.

    Samples whose label is −100 do not count.
    """
    total, logits, device = torch.zeros(5, dtype=torch.int64), [], device_of(model)
    with seeded(0, loader), torch.no_grad(), eval_mode(model):
        for batch in islice(batches_of(loader, where), BATCHES):
            forward = Forward(model, send_to_device(batch, device), task)
            if forward.labels is None or is_regression(forward):
                return None, []
            samples = samples_of(forward, "review")
            if samples.student.shape[1] < 2:
                return None, []
            assert samples.targets is not None, "there are labels"
            chosen = samples.targets != IGNORED
            chosen = chosen if samples.counted is None else chosen & samples.counted
            student, z = samples.student[chosen], samples.teacher[chosen]
            total += _count(student.argmax(-1), z.argmax(-1), samples.targets[chosen]).cpu()
            logits.append(z[: max(1, NUMBERS // BATCHES // z.shape[-1])].float().cpu())
    return Counts(*total.tolist()), logits


def _count(student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    wrong = teacher != y
    parts = (wrong | ~wrong, student == y, ~wrong, wrong & (student == teacher), wrong & (student == y))
    return torch.stack([part.sum() for part in parts])


def _errors(counts: Counts) -> list[str]:
    wrong = counts.total - counts.teacher_right
    if not counts.repeats:
        return []
    return [
        f"The student repeats the teacher's errors more than it learns labels: of {wrong} training samples that the "
        f"teacher has wrong it repeats {counts.repeated} and has {counts.corrected} right. Give the labels more weight "
        "(a lower alpha), or take a better teacher."
    ]


def _capacity(training: Counts, validation: Counts, history: Sequence[Mapping[str, Any]]) -> list[str]:
    losses = [float(entry["loss"]) for entry in history]
    if len(losses) < 6:
        return []
    before, last = losses[-1 - len(losses) // 3], losses[-1]
    fell = (before - last) / max(abs(before), 1e-12)
    ours, theirs = training.student_right / training.total, training.teacher_right / training.total
    generalises = ours - validation.student_right / validation.total < (theirs - ours) / 2
    if fell >= STALLED or theirs - ours < GAP or not generalises:
        return []
    return [
        f"The student seems too small: its training loss stands at {last:.3g} (it fell {100 * max(fell, 0):.1f} % over "
        f"the last third of the epochs), it has {100 * ours:.1f} % of the training samples right, the teacher "
        f"{100 * theirs:.1f} %, and it is no better on training than on validation data. Make it wider or deeper, or "
        "raise the learning rate."
    ]


def spread(logits: Tensor, temperature: float) -> float:
    """exp of the mean entropy of softmax(z / T): over how many classes soft targets spread. logits [n, classes]."""
    log_p = (logits.double() / temperature).log_softmax(dim=-1)
    return float((-(log_p.exp() * log_p).sum(dim=-1)).mean().exp())


def proposed(logits: Tensor) -> float:
    """The temperature at which soft targets spread over √classes, to two digits, within 0.01 … 1000."""
    low, high, wanted = 0.01, 1000.0, math.sqrt(logits.shape[-1])
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spread(logits, middle) < wanted else (low, middle)
    return float(f"{low:.2g}")


def _temperature(logits: Tensor, temperature: float) -> list[str]:
    classes, over = logits.shape[-1], spread(logits, temperature)
    if over <= SHARP:
        what = "is too low: the soft targets say little beyond the teacher's first choice"
    elif over >= FLAT * classes:
        what = "is too high: the soft targets hardly tell classes apart"
    else:
        return []
    return [
        f"The temperature {temperature:g} {what} (they spread over {over:.2f} of {classes} classes). "
        f"At {proposed(logits):g} they would spread over {math.sqrt(classes):.1f}."
    ]
