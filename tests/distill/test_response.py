import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.errors import InputError
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.distill.response import Distill, SoftTargets
from tersor.train.finetune import Finetune
from tersor.train.objective import TaskLoss
from tersor.train.optimizer import Optimizer


class Given(nn.Module):
    """Gives the same outputs whatever it is asked."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, x):
        return self.outputs


def objective_of(objective, student, teacher, targets, loss=None):
    model = Given(student)
    return objective(model, (torch.zeros(len(targets), 1), targets), Task(model, loss=loss, reference=Given(teacher)))


def naive_soft(student, teacher, temperature):
    total = 0.0
    for z_s, z_t in zip(student.double(), teacher.double(), strict=True):
        p_s = [float(v) for v in torch.exp(z_s / temperature) / torch.exp(z_s / temperature).sum()]
        p_t = [float(v) for v in torch.exp(z_t / temperature) / torch.exp(z_t / temperature).sum()]
        total += sum(t * (torch.tensor(t).log() - torch.tensor(s).log()) for s, t in zip(p_s, p_t, strict=True))
    return temperature**2 * float(total) / len(student)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(5, 7) * 3, torch.randn(5, 7) * 3, torch.randint(0, 7, (5,))


@pytest.mark.parametrize(("temperature", "alpha"), [(4.0, 0.7), (1.0, 0.5), (20.0, 1.0), (2.0, 0.0)])
def test_distillation_is_hinton_s_formula(logits, temperature, alpha):
    student, teacher, targets = logits
    hard = -sum(float(row.log_softmax(0)[t]) for row, t in zip(student, targets, strict=True)) / len(targets)
    expected = alpha * naive_soft(student, teacher, temperature) + (1 - alpha) * hard
    got = objective_of(Distill(temperature, alpha), student, teacher, targets)
    assert got.item() == pytest.approx(expected, rel=1e-5)
    written_out = alpha * SoftTargets(temperature) + (1 - alpha) * TaskLoss()
    assert objective_of(written_out, student, teacher, targets).item() == pytest.approx(expected, rel=1e-5)


def test_its_gradient_is_the_difference_of_the_softened_probabilities(logits):
    student, teacher, targets = logits
    model = Given(student)
    SoftTargets(3.0)(model, (targets, targets), Task(model, reference=Given(teacher))).backward()
    expected = 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)) / len(student)
    assert torch.allclose(model.outputs.grad, expected, atol=1e-6)


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn(logits):
    _, teacher, targets = logits
    assert objective_of(SoftTargets(), teacher.clone(), teacher, targets).item() == pytest.approx(0, abs=1e-6)


def test_each_position_of_a_sequence_is_a_sample_and_ignored_ones_do_not_count():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    targets = torch.tensor([[1, 2, -100], [0, -100, 3]])
    counted = targets != -100
    got = objective_of(SoftTargets(2.0), student, teacher, targets)
    assert got.item() == pytest.approx(naive_soft(student[counted], teacher[counted], 2.0), rel=1e-5)


def test_classes_may_stand_in_dimension_one_as_in_segmentation():
    torch.manual_seed(0)
    student, teacher, targets = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), torch.zeros(2, 3, 5, dtype=torch.long)
    got = objective_of(SoftTargets(2.0), student, teacher, targets, loss=lambda model, batch: model(batch[0]).sum())
    rows = [z.permute(0, 2, 3, 1).flatten(0, 2) for z in (student, teacher)]
    assert got.item() == pytest.approx(naive_soft(*rows, 2.0), rel=1e-5)


def test_regression_learns_the_teacher_s_output_by_squared_error():
    torch.manual_seed(0)
    student, teacher, targets = torch.randn(5, 2), torch.randn(5, 2), torch.randn(5, 2)
    expected = 0.7 * F.mse_loss(student, teacher) + 0.3 * F.mse_loss(student, targets)
    assert torch.allclose(objective_of(Distill(), student, teacher, targets), expected)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("objective", [Distill, SoftTargets])
def test_a_temperature_that_is_not_positive_is_an_error(objective, temperature):
    with pytest.raises(InputError, match=f"temperature must be positive. Got {temperature}"):
        objective(temperature=temperature)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_alpha_outside_zero_and_one_is_an_error(alpha):
    with pytest.raises(InputError, match="Distill.alpha"):
        Distill(alpha=alpha)


def test_other_numbers_of_classes_are_an_error_that_names_both(logits):
    student, teacher, targets = logits
    with pytest.raises(InputError, match="teacher 6, student 7"):
        objective_of(Distill(), student, teacher[:, :6], targets)


def test_outputs_that_do_not_fit_the_targets_are_an_error(logits):
    student, teacher, _ = logits
    with pytest.raises(InputError, match=r"outputs \[5, 7\], targets \[5, 2\]"):
        objective_of(SoftTargets(), student, teacher, torch.zeros(5, 2, dtype=torch.long))


def test_a_teacher_that_gives_nan_is_an_error(logits):
    student, teacher, targets = logits
    teacher[2, 3] = float("nan")
    with pytest.raises(InputError, match="teacher's output is not finite"):
        objective_of(Distill(), student, teacher, targets)


def test_a_student_learns_from_its_teacher_alone_and_leaves_it_as_it_was():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)).train()
    x = torch.randn(256, 4)
    with torch.no_grad():
        teacher[4].weight.mul_(8)
        taught = teacher.eval()(x).argmax(1)
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(32)]  # targets that teach nothing
    held_out = [(x, taught)]
    student = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    task = replace(Task(student, batches, held_out, held_out).complete(), reference=teacher)
    step = Finetune(epochs=20, objective=Distill(alpha=1.0), optimizer=Optimizer(lr=0.05, weight_decay=0))
    history = step.run(student, task, Context(1)).history
    assert history[0]["validation"] < 0.9 < 0.95 <= max(entry["validation"] for entry in history)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(module.training for module in teacher.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
