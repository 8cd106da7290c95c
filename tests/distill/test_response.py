import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.errors import InputError
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.distill.relations import Correlation
from tersor.distill.response import DecoupledSoftTargets, Distill, MatchLogits, SoftTargets
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


# Decoupled soft targets, logits, labels that are missing


def naive_decoupled(student, teacher, targets, alpha, beta, temperature):
    def divergence(p, q):
        return sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))

    total = 0.0
    for z_s, z_t, y in zip(student.double(), teacher.double(), targets, strict=True):
        p_s, p_t = (torch.softmax(z / temperature, 0) for z in (z_s, z_t))
        sure = divergence([p_t[y], 1 - p_t[y]], [p_s[y], 1 - p_s[y]])
        others = [i for i in range(len(z_s)) if i != y]
        rest = divergence(p_t[others] / (1 - p_t[y]), p_s[others] / (1 - p_s[y]))
        total += alpha * sure + beta * rest
    return temperature**2 * total / len(targets)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1, 8, 4), (0, 2, 1), (3, 0, 2)])
def test_decoupled_soft_targets_are_the_paper_s_two_parts(logits, alpha, beta, temperature):
    student, teacher, targets = logits
    got = objective_of(DecoupledSoftTargets(alpha, beta, temperature), student, teacher, targets)
    assert got.item() == pytest.approx(naive_decoupled(student, teacher, targets, alpha, beta, temperature), rel=1e-5)


def test_with_the_teacher_s_own_weights_the_two_parts_are_soft_targets(logits):
    student, teacher, _ = logits
    one = slice(0, 1)  # the weight 1 − p_y is each sample's own
    target = torch.tensor([2])
    beta = 1 - float(torch.softmax(teacher[one] / 3, 1)[0, 2])
    got = objective_of(DecoupledSoftTargets(1, beta, 3), student[one], teacher[one], target)
    assert torch.allclose(got, objective_of(SoftTargets(3), student[one], teacher[one], target), rtol=1e-5)


def test_a_teacher_that_is_all_but_certain_gives_a_finite_gradient():
    teacher, student = torch.tensor([[200.0, 0, -200], [0, 300, 0]]), torch.tensor([[-200.0, 0, 200], [0, 0, 0]])
    model = Given(student)
    loss = DecoupledSoftTargets(temperature=1)(
        model, (torch.zeros(2, 1), torch.tensor([0, 1])), Task(model, reference=Given(teacher))
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(model.outputs.grad).all() and model.outputs.grad.abs().sum() > 0


def test_a_sample_whose_label_is_ignored_has_no_class_to_decouple(logits):
    student, teacher, targets = logits
    ignored = targets.clone()
    ignored[0] = -100
    got = objective_of(DecoupledSoftTargets(), student, teacher, ignored)
    assert torch.equal(got, objective_of(DecoupledSoftTargets(), student[1:], teacher[1:], targets[1:]))
    with pytest.raises(RuntimeError, match="out of bounds"):
        objective_of(DecoupledSoftTargets(), student, teacher, torch.full_like(targets, -1))


@pytest.mark.parametrize("objective", [DecoupledSoftTargets(), MatchLogits(), SoftTargets()])
def test_positions_that_are_ignored_or_padding_do_not_count(objective):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    targets = torch.tensor([[1, 2, -100], [0, -100, 3]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    counted = (targets != -100) & (mask == 1)
    model = Padded(student)
    batch = {"x": torch.zeros(2, 1), "attention_mask": mask, "labels": targets}
    got = objective(model, batch, Task(model, reference=Padded(teacher)))
    flat = objective_of(objective, student[counted], teacher[counted], targets[counted])
    assert got.item() == pytest.approx(flat.item(), rel=1e-5)
    batch = {"x": torch.zeros(2, 1), "attention_mask": mask, "labels": torch.full((2, 3), -100)}
    assert objective(model, batch, Task(model, reference=Padded(teacher))).item() == 0


class Padded(Given):
    def forward(self, x, attention_mask):
        return self.outputs


class Two(Given):
    def forward(self, x, attention_mask, decoder_input_ids=None):
        return self.outputs


def test_an_encoder_s_mask_does_not_hide_positions_of_the_decoder():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    batch = {"x": torch.zeros(2, 1), "attention_mask": torch.tensor([[1, 0, 0]] * 2), "labels": torch.ones(2, 3).long()}
    model = Two(student)
    got = SoftTargets(2.0)(model, batch, Task(model, reference=Two(teacher)))
    assert got.item() == pytest.approx(naive_soft(student.flatten(0, 1), teacher.flatten(0, 1), 2.0), rel=1e-5)


def test_logits_are_matched_by_squared_error(logits):
    student, teacher, targets = logits
    assert torch.allclose(objective_of(MatchLogits(), student, teacher, targets), F.mse_loss(student, teacher))
    floats = torch.randn(5, 7)
    assert torch.allclose(objective_of(MatchLogits(), student, teacher, floats), F.mse_loss(student, teacher))


@pytest.mark.parametrize("objective", [SoftTargets(2.0), Distill(2.0, alpha=1.0), MatchLogits()])
def test_what_needs_no_labels_does_without(logits, objective):
    student, teacher, targets = logits
    model = Given(student)
    got = objective(model, {"x": torch.zeros(5, 1)}, Task(model, reference=Given(teacher)))
    assert torch.allclose(got, objective_of(objective, student, teacher, targets))


@pytest.mark.parametrize("objective", [TaskLoss(), Distill(), DecoupledSoftTargets()])
def test_labels_that_are_missing_where_a_loss_needs_them_are_an_error(logits, objective):
    student, teacher, _ = logits
    model = Given(student)
    with pytest.raises(InputError, match=r"the batch has no labels. Got a dict with keys \['x'\]"):
        objective(model, {"x": torch.zeros(5, 1)}, Task(model, reference=Given(teacher)))


def test_labels_that_are_no_classes_are_an_error_where_classes_are_needed(logits):
    student, teacher, _ = logits
    with pytest.raises(InputError, match="DecoupledSoftTargets: this loss needs classes. Got targets of torch.float32"):
        objective_of(DecoupledSoftTargets(), student, teacher, torch.randn(5, 7))


def test_a_teacher_that_gives_nan_is_named_with_its_batch_in_training(logits):
    class Spoils(nn.Linear):
        def forward(self, x):
            return super().forward(x) / (x[:1, :1] != 7)

    x, y = torch.randn(12, 4), torch.randint(0, 3, (12,))
    x[8] = 7.0
    batches = list(zip(x.split(4), y.split(4), strict=True))
    task = replace(Task(nn.Linear(4, 3), batches, batches, batches).complete(), reference=Spoils(4, 3).eval())
    with pytest.raises(InputError, match="epoch 1/1, batch 2, task.reference: the teacher's output is not finite"):
        Finetune(epochs=1, objective=Distill()).run(task.model, task, Context(1))


@pytest.mark.parametrize("objective", [SoftTargets(), Distill(), Correlation()])
def test_one_output_has_no_distribution_to_learn(objective):
    """Its softmax is 1 whatever it says: the loss would be constant, and the teacher teach nothing, in silence."""
    targets = torch.tensor([0, 1, 1])

    def loss(model, batch):
        return F.binary_cross_entropy_with_logits(model(batch[0]).squeeze(1), batch[1].float())

    student, teacher = torch.randn(3, 1), torch.randn(3, 1)
    with pytest.raises(InputError, match=r"one output, whose softmax is always 1.*MatchLogits\(\)"):
        objective_of(objective, student, teacher, targets, loss)
    matched = objective_of(MatchLogits(), student, teacher, targets, loss)
    assert matched.item() == pytest.approx(float((student - teacher).square().mean()))


def test_labels_may_be_bytes_as_for_cross_entropy(logits):
    student, teacher, targets = logits
    for objective in (Distill(), TaskLoss() + DecoupledSoftTargets()):
        expected = objective_of(objective, student, teacher, targets)
        assert objective_of(objective, student, teacher, targets.to(torch.uint8)).item() == expected.item()


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 3)])
def test_a_model_of_positions_is_distilled_without_a_metric_of_its_own(shape):
    """Tokens, pixels: validation is the share of a sample's positions that are right, those at −100 left out."""
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 6, shape), torch.randint(0, 6, shape)
    labels[0].flatten()[1:] = -100
    batches = [(tokens, labels)]
    student, teacher = nn.Embedding(6, 6), nn.Embedding(6, 6)
    result = Finetune(1, Distill()).run(student, Task(student, batches, batches, batches, reference=teacher))
    right = (result.model(tokens).argmax(-1) == labels).double().flatten(1)
    counted = (labels != -100).flatten(1)
    expected = ((right * counted).sum(1) / counted.sum(1)).mean()
    assert result.history[0]["validation"] == pytest.approx(float(expected))
