import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.errors import InputError
from tersor.core.task import Task
from tersor.distill.response import DecoupledSoftTargets, Distill, MatchLogits, SoftTargets
from tersor.train.finetune import Finetune
from tersor.train.objective import Forward, Objective, Sum, TaskLoss


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.randint(0, 3, (6,))


def both(loss=None):
    torch.manual_seed(1)
    model, teacher = Counting(), Counting()
    return model, teacher, Task(model, loss=loss, reference=teacher)


def test_a_loss_of_one_s_own_is_left_alone_where_nothing_asks_for_it_and_labels_are_missing(batch):
    model, teacher, task = both(loss=lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]))
    inputs = {"x": batch[0]}
    assert torch.equal(SoftTargets()(model, inputs, task), SoftTargets()(model, {**inputs, "y": batch[1]}, task))
    with pytest.raises(KeyError, match="y"):
        Distill()(model, inputs, task)


def test_the_task_loss_is_the_task_s(batch):
    model, _, task = both()
    assert torch.equal(TaskLoss()(model, batch, task), F.cross_entropy(model.layer(batch[0]), batch[1]))


def test_weighted_sums_compose(batch):
    model, _, task = both()
    composed = 2 * (0.3 * TaskLoss() + SoftTargets(temperature=2) * 0.7) + TaskLoss()
    assert composed == Sum(((0.6, TaskLoss()), (1.4, SoftTargets(2)), (1.0, TaskLoss())))
    expected = 1.6 * TaskLoss()(model, batch, task) + 1.4 * SoftTargets(2)(model, batch, task)
    assert torch.allclose(composed(model, batch, task), expected)


@pytest.mark.parametrize(
    "objective", [0.3 * TaskLoss() + 0.7 * SoftTargets(), 0.5 * SoftTargets() + TaskLoss(), Distill()]
)
@pytest.mark.parametrize("own_loss", [False, True])
def test_model_and_teacher_run_once_for_a_whole_sum(batch, objective, own_loss):
    model, teacher, task = both(
        loss=(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])) if own_loss else None
    )
    objective(model, batch, task).backward()
    assert (model.calls, teacher.calls) == (1, 1)
    assert not model._forward_hooks
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_loss_that_changes_the_inputs_does_not_lend_its_outputs(batch):
    model, _, task = both(loss=lambda model, batch: model(batch[0] * 2).square().mean())
    assert torch.equal(Forward(model, batch, task).outputs, model.layer(batch[0]))


def test_the_teacher_runs_in_eval_mode_and_keeps_its_own(batch):
    model = nn.Linear(4, 3)
    teacher = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    task = Task(model, reference=teacher)
    outputs = Forward(model, batch, task).reference_outputs
    assert teacher.training and teacher[0].num_batches_tracked == 0
    assert torch.equal(outputs, teacher.eval()(batch[0]).detach()) and not outputs.requires_grad


def test_no_teacher_is_an_error(batch):
    model = nn.Linear(4, 3)
    with pytest.raises(InputError, match="task.reference: there is no teacher"):
        SoftTargets()(model, batch, Task(model))


def test_an_infinite_weight_is_an_error():
    with pytest.raises(InputError, match="finite"):
        float("nan") * TaskLoss()


def test_an_objective_of_one_s_own_is_a_dataclass_with_one_function(batch):
    class Size(Objective):
        def of(self, forward):
            return forward.outputs.square().mean()

    model, _, task = both()
    total = (TaskLoss() + 0.1 * Size())(model, batch, task)
    assert torch.allclose(total, TaskLoss()(model, batch, task) + 0.1 * model.layer(batch[0]).square().mean())


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 3), 0

    def forward(self, tokens, mask=None):
        self.calls += 1
        return self.layer(tokens - 2 * mask)


class MaskFirst(Masked):
    def forward(self, mask, tokens):
        return super().forward(tokens, mask)


@pytest.mark.parametrize(
    "loss",
    [
        None,
        lambda model, batch: F.cross_entropy(model(batch["tokens"], batch["mask"]), batch["labels"]),
        lambda model, batch: F.cross_entropy(model(mask=batch["mask"], tokens=batch["tokens"]), batch["labels"]),
    ],
    ids=["none", "positional", "keywords"],
)
def test_a_teacher_whose_arguments_have_another_order_learns_from_the_same_inputs(batch, loss):
    torch.manual_seed(1)
    x, labels = batch
    mask = torch.randint(2, (6, 4)).float()
    model, teacher = Masked(), MaskFirst()
    task = Task(model, loss=loss, reference=teacher)
    forward = Forward(model, {"mask": mask, "tokens": x, "labels": labels}, task)
    objective = Distill(alpha=0.5).of(forward)
    assert torch.isfinite(objective) and (model.calls, teacher.calls) == (1, 1)
    assert torch.equal(forward.reference_outputs, teacher.layer(x - 2 * mask).detach())
    assert torch.equal(forward.outputs, model.layer(x - 2 * mask))


class Wrapped(Counting):
    """Gives logits, and the loss where labels are given, in one result, as transformers' models do."""

    def forward(self, x, labels=None):
        logits = super().forward(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_model_that_computes_its_loss_beside_its_logits_runs_once(batch):
    student, teacher = Wrapped(), Wrapped()
    given = dict(zip(("x", "labels"), batch, strict=True))
    task = Task(student, loss=lambda model, batch: model(**batch)["loss"], reference=teacher)
    forward = Forward(student, given, task)
    value = Distill().of(forward)
    assert (student.calls, teacher.calls) == (1, 1)
    assert torch.equal(forward.outputs, student.layer(batch[0]))
    assert torch.allclose(value, Distill()(student, batch, Task(student, reference=teacher)))


def test_a_model_that_gives_its_loss_alone_is_asked_for_its_outputs_too(batch):
    class Either(Counting):
        def forward(self, x, labels=None):
            logits = super().forward(x)
            return logits if labels is None else F.cross_entropy(logits, labels)

    student = Either()
    given = dict(zip(("x", "labels"), batch, strict=True))
    task = Task(student, loss=lambda model, batch: model(**batch), reference=Either())
    assert torch.equal(Forward(student, given, task).outputs, student.layer(batch[0]))


def test_objectives_add_up_with_python_s_sum_and_nothing_else_does():
    terms = [0.5 * TaskLoss(), SoftTargets()]
    assert sum(terms) == 0.5 * TaskLoss() + SoftTargets()
    for wrong in (lambda: TaskLoss() + 2, lambda: 2 + TaskLoss(), lambda: TaskLoss() * "2", lambda: "2" * TaskLoss()):
        with pytest.raises(TypeError, match="unsupported operand|can't multiply sequence"):
            wrong()


@pytest.mark.parametrize("inputs", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_training_data_may_have_no_labels_where_the_teacher_says_all(batch, inputs):
    """The metric is that of the held-out data, which has labels."""
    student, teacher, _ = both()
    held = [batch]
    step = Finetune(2, SoftTargets() + MatchLogits(), keep="last")
    alone = step.run(student, Task(student, [inputs(batch[0])], held, held, reference=teacher))
    beside = step.run(student, Task(student, held, held, held, reference=teacher))
    assert [entry["loss"] for entry in alone.history] == [entry["loss"] for entry in beside.history]
    assert alone.history[-1]["validation"] == beside.history[-1]["validation"]
    with pytest.raises(InputError, match=r"epoch 1/2, batch 0.*the batch has no labels"):
        Finetune(2, Distill()).run(student, Task(student, [inputs(batch[0])], held, held, reference=teacher))


class Tokens(nn.Module):
    """As transformers' language models: the loss shifts the labels, the logits are of every position."""

    def __init__(self):
        super().__init__()
        self.embed, self.calls = nn.Embedding(5, 5), 0

    def forward(self, input_ids, labels=None):
        self.calls += 1
        logits = self.embed(input_ids)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


def shifted(batch):
    return F.pad(batch["labels"][:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize("objective", [TaskLoss(), Distill(), DecoupledSoftTargets(), 0.5 * SoftTargets() + TaskLoss()])
def test_labels_that_repeat_the_tokens_are_no_targets_to_learn(objective):
    torch.manual_seed(0)
    tokens = torch.randint(0, 5, (2, 6))
    batch = {"input_ids": tokens, "labels": tokens.clone().index_fill(1, torch.tensor([0]), -100)}
    model, teacher = Tokens(), Tokens()
    for _ in range(2):
        with pytest.raises(InputError, match="task.targets_of: each position's label is the token that stands there"):
            task = Task(model, reference=teacher)
            objective(model, batch, task)
    by_hand = objective(model, batch, Task(model, targets_of=shifted, reference=teacher))
    model.calls = 0
    shifts_itself = Task(model, targets_of=shifted, loss=lambda m, b: m(**b)["loss"], reference=teacher)
    assert torch.allclose(objective(model, batch, shifts_itself), by_hand) and model.calls == 1


@pytest.mark.parametrize("said", ["a mask's", "one token's"])
def test_labels_that_are_all_the_same_repeat_nothing_and_the_next_batch_is_looked_at(said):
    tokens, mask = torch.tensor([[2, 3, 4], [4, 3, 2]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    counted = mask.bool() if said == "a mask's" else tokens == 2

    class Masked(Tokens):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids)

    batch = {"input_ids": tokens, "attention_mask": mask}
    labels = (mask if said == "a mask's" else tokens).masked_fill(~counted, -100)
    task = Task(Masked())
    assert TaskLoss()(task.model, batch | {"labels": labels}, task).isfinite()
    with pytest.raises(InputError, match=r"that is to copy, as an autoencoder, takes a loss of its own"):
        TaskLoss()(task.model, batch | {"labels": tokens}, task)
