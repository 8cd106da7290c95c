import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.progress import Progress
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.distill.monitors import Counts, proposed, review, spread
from tersor.distill.response import DecoupledSoftTargets, Distill, MatchLogits, SoftTargets
from tersor.train.finetune import Finetune
from tersor.train.objective import TaskLoss
from tersor.train.optimizer import Optimizer

CLASSES = 4


class Lookup(nn.Module):
    """Logits by the sample's number, which is the input."""

    def __init__(self, answers, scale=5.0):
        super().__init__()
        self.table = nn.Parameter(scale * nn.functional.one_hot(torch.as_tensor(answers), CLASSES).float())

    def forward(self, x):
        return self.table[x[:, 0].long()]


def made(labels, teacher, scale=5.0, validation=None):
    count = len(labels)
    data = TensorDataset(torch.arange(count).float()[:, None], torch.as_tensor(labels))
    held = data if validation is None else TensorDataset(data.tensors[0], torch.as_tensor(validation))
    loader, held_out = DataLoader(data, 10, shuffle=True), DataLoader(held, 10)
    reference = Lookup(teacher, scale).requires_grad_(False).eval()
    return Task(Lookup(labels), loader, held_out, held_out, reference=reference, metric=None).complete()


def test_errors_that_are_repeated_are_counted_sample_by_sample():
    labels = [0] * 40
    teacher = [1] * 20 + [0] * 20
    student = [1] * 15 + [0] * 2 + [2] * 3 + [0] * 20
    found = review(Lookup(student), made(labels, teacher), [], None)
    assert found["training"] == Counts(40, 22, 20, 15, 2).to_json()
    assert len(found["warnings"]) == 1 and "repeats 15 and has 2 right" in found["warnings"][0]


@pytest.mark.parametrize(
    ("repeated", "corrected", "warns"), [(15, 2, True), (10, 7, False), (2, 15, False), (0, 0, False)]
)
def test_chance_is_no_reason_for_a_warning(repeated, corrected, warns):
    assert Counts(100, 50, 80, repeated, corrected).repeats == warns


def history(losses):
    return [{"loss": loss} for loss in losses]


FLAT = [2.0, 1.5, 1.3, 1.21, 1.205, 1.20, 1.20, 1.199, 1.198]


@pytest.mark.parametrize(
    ("losses", "student_right", "validation_right", "warns"),
    [
        (FLAT, 20, 20, True), ([2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6, 0.4], 20, 20, False), (FLAT, 40, 40, False),
        (FLAT, 30, 10, False), (FLAT[:5], 20, 20, False),
    ],
)  # fmt: skip
def test_a_floor_of_the_loss_below_the_teacher_means_too_little_capacity(
    losses, student_right, validation_right, warns
):
    labels = [0] * 40
    student = [0] * student_right + [1] * (40 - student_right)
    held = [0] * validation_right + [2] * (40 - validation_right)
    task = made(labels, labels, validation=held)
    found = review(Lookup(student), task, history(losses), None)
    assert [("too small" in text) for text in found["warnings"]] == ([True] if warns else [])


def test_the_spread_is_the_exponential_of_the_entropy_and_grows_with_the_temperature():
    z = torch.randn(50, CLASSES, generator=torch.Generator().manual_seed(0))
    p = (z / 2).softmax(-1)
    assert spread(z, 2.0) == pytest.approx(math.exp(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    assert spread(z, 0.01) < 1.05 and spread(z, 100.0) > 0.99 * CLASSES
    assert spread(z, proposed(z)) == pytest.approx(math.sqrt(CLASSES), rel=0.1)


@pytest.mark.parametrize(("temperature", "says"), [(0.1, "too low"), (100.0, "too high"), (3.0, None)])
def test_temperatures_that_say_nothing_are_told_with_a_better_one(temperature, says):
    labels = torch.arange(40) % CLASSES
    found = review(Lookup(labels), made(labels, labels), [], temperature)
    assert len(found["warnings"]) == (says is not None)
    if says:
        assert says in found["warnings"][0] and f"of {CLASSES} classes" in found["warnings"][0]
    assert 1 <= found["soft_target_classes"] <= CLASSES


def test_samples_without_a_label_are_no_errors():
    labels = [-100] * 30 + [0] * 10
    teacher = [1] * 30 + [0] * 10
    task = made(teacher, teacher)
    task.train.dataset.tensors[1].copy_(torch.tensor(labels))
    found = review(Lookup(teacher), task, [], None)
    assert found["training"] == Counts(10, 10, 10, 0, 0).to_json() and not found["warnings"]


def test_of_a_large_vocabulary_only_some_logits_are_kept(monkeypatch):
    sizes = []
    monkeypatch.setattr("tersor.distill.monitors.NUMBERS", 2 * CLASSES * 32)
    monkeypatch.setattr("tersor.distill.monitors.spread", lambda z, temperature: sizes.append(len(z)) or 2.0)
    labels = torch.arange(40) % CLASSES
    review(Lookup(labels), made(labels, labels), [], 1.0)
    assert sizes[0] == 8  # two of each of four batches


class Listening(Progress):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


@pytest.mark.parametrize("objective", [Distill(100.0), TaskLoss() + DecoupledSoftTargets(temperature=100.0)])
def test_a_training_says_it_and_keeps_it_in_its_facts(objective):
    labels = torch.arange(40) % CLASSES
    task, progress = made(labels, labels), Listening()
    result = Finetune(1, objective, Optimizer(lr=0.01)).run(task.model, task, Context(1, None, progress))
    (warning,) = result.facts["review"]["warnings"]
    assert f"warning: {warning}" in progress.said and "too high" in warning


def test_what_knows_no_temperature_or_no_classes_is_not_judged_by_them():
    labels = torch.arange(40) % CLASSES
    task = made(labels, labels)
    assert "soft_target_classes" not in MatchLogits().review(task.model, task, [])
    assert TaskLoss().review(task.model, task, []) == {}
    values = DataLoader(TensorDataset(torch.randn(8, 3), torch.randn(8, 2)), 4)
    model = nn.Linear(3, 2)
    assert Distill().review(model, Task(model, values, values, values).complete(), []) == {}


def test_a_training_is_not_lost_where_its_review_fails():
    """The teacher may have no answer to validation data, which the training itself never asks it about."""

    class Narrow(Lookup):
        def forward(self, x):
            return super().forward(x).masked_fill((x > 39).expand(-1, CLASSES), math.nan)

    task = made([0] * 40, [0] * 40)
    held = DataLoader(TensorDataset(torch.arange(50).float()[:, None], torch.zeros(50, dtype=torch.int64)), 10)
    student = Lookup([0] * 50)
    narrow = Narrow([0] * 50).eval().requires_grad_(False)
    told = Progress()
    said: list[str] = []
    told.say = said.append
    result = Finetune(1, SoftTargets()).run(
        student, replace(task, validation=held, reference=narrow), Context(0, None, told)
    )
    assert len(result.history) == 1
    (warning,) = result.facts["review"]["warnings"]
    assert "task.reference: the teacher's output is not finite" in warning and f"warning: {warning}" in said


def test_a_single_output_has_no_classes_to_count():
    """The largest of one number is always number 0, right or wrong."""
    task = made([0] * 20 + [1] * 20, [0] * 40)
    one = nn.Sequential(nn.Linear(1, 1)).eval().requires_grad_(False)
    assert review(nn.Linear(1, 1), replace(task, reference=one), [], 1.0) == {}
