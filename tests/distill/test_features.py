import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.attached import CHILD
from tersor.core.errors import InputError
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.distill.attention import AttentionMaps
from tersor.distill.features import AttentionTransfer, Hints
from tersor.distill.relations import (
    Correlation,
    CorrelationCongruence,
    RelativeAngles,
    RelativeDistances,
    SimilarityPreserving,
)
from tersor.distill.response import DecoupledSoftTargets, Distill, MatchLogits, SoftTargets
from tersor.prune.sparse.gradual import GradualSparsity
from tersor.prune.sparse.prune import Prune
from tersor.train.finetune import Finetune, estimate
from tersor.train.objective import Forward, TaskLoss
from tersor.train.optimizer import Optimizer


class Given(nn.Module):
    """Gives at its layers what it was made of: maps, sequences or vectors."""

    def __init__(self, **features):
        super().__init__()
        for name, value in features.items():
            self.add_module(name, Constant(value))
        self.head = nn.Linear(1, 3)

    def forward(self, x):
        for name, layer in self.named_children():
            if name != "head":
                layer(x)
        return self.head(x)


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x):
        return self.value


def value_of(objective, student, teacher, model=None):
    """The objective of one batch whose layer "at" gives ``student`` and ``teacher``."""
    model = model or Given(at=student)
    batch = torch.ones(len(student), 1), torch.zeros(len(student), dtype=torch.long)
    return objective(model, batch, Task(model, reference=Given(at=teacher)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


AT = {"at": "at"}


def test_a_hint_is_the_mean_squared_difference_of_two_layers():
    student, teacher = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3)
    assert torch.allclose(value_of(Hints(AT), student, teacher), F.mse_loss(student, teacher))


def test_a_hint_by_cosine_compares_directions_at_each_position():
    student, teacher = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    expected = [
        1 - float(a @ b / (a.norm() * b.norm()))
        for a, b in zip(student.reshape(-1, 4), teacher.reshape(-1, 4), strict=True)
    ]
    got = value_of(Hints(AT, loss="cosine"), student, teacher)
    assert got.item() == pytest.approx(sum(expected) / 10, rel=1e-5)
    assert value_of(Hints(AT, loss="cosine"), 3 * teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_maps_of_different_resolution_meet_at_the_smaller_one():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)
    pooled = teacher.reshape(2, 3, 4, 2, 4, 2).mean((3, 5))
    assert torch.allclose(value_of(Hints(AT), student, teacher), F.mse_loss(student, pooled))
    assert torch.allclose(value_of(Hints(AT), teacher, student), F.mse_loss(student, pooled))


def test_patches_of_a_transformer_meet_a_map_without_the_tokens_in_front():
    student, teacher = torch.randn(2, 6, 3, 3), torch.randn(2, 2 + 9, 6)
    grid = teacher[:, 2:].transpose(1, 2).reshape(2, 6, 3, 3)
    assert torch.allclose(value_of(Hints(AT), student, teacher), F.mse_loss(student, grid))


@pytest.mark.parametrize(("channels", "axis"), [("last", 3), ("first", 1), ("auto", 1)])
def test_the_channels_axis_can_be_said(channels, axis):
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = (1 - F.cosine_similarity(student, teacher, dim=axis)).mean()
    assert torch.allclose(value_of(Hints(AT, loss="cosine", channels=channels), student, teacher), expected)


def naive_attention_transfer(student, teacher, power):
    total = 0.0
    for a_s, a_t in zip(student.double(), teacher.double(), strict=True):
        q_s, q_t = ((a.abs() ** power).sum(0).flatten() for a in (a_s, a_t))
        total += float(((q_s / q_s.norm() - q_t / q_t.norm()) ** 2).sum())
    return total / len(student)


@pytest.mark.parametrize("power", [2.0, 1.0, 4.0])
def test_attention_transfer_is_its_equation_whatever_the_widths(power):
    student, teacher = torch.randn(3, 5, 4, 4), torch.randn(3, 9, 4, 4)
    got = value_of(AttentionTransfer(AT, power), student, teacher)
    assert got.item() == pytest.approx(naive_attention_transfer(student, teacher, power), rel=1e-5)


def test_attention_transfer_averages_maps_not_features():
    student, teacher = torch.randn(2, 5, 2, 2), torch.randn(2, 9, 4, 4)
    energy = (teacher**2).sum(1, keepdim=True).reshape(2, 1, 2, 2, 2, 2).mean((3, 5))
    expected = naive_attention_transfer(student, energy.sqrt(), 2)
    assert value_of(AttentionTransfer(AT), student, teacher).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", [AttentionTransfer(AT), SimilarityPreserving(AT, "positions")])
def test_a_single_position_is_an_error_where_positions_are_compared(objective):
    with pytest.raises(InputError, match="single position"):
        value_of(objective, torch.randn(2, 5), torch.randn(2, 7))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((4, 6), (4, 6, 3, 3)), ((4, 7, 6), (4, 9, 6)), ((4, 7, 6), (4, 6, 3, 3)), ((4, 6), (8, 6)), ((4,), (4, 2))],
)
def test_hidden_states_that_no_projection_can_join_are_an_error_that_names_both(student, teacher):
    with pytest.raises(InputError) as caught:
        value_of(Hints(AT), torch.randn(student), torch.randn(teacher))
    assert f"student {list(student)}, teacher {list(teacher)}" in str(caught.value)
    assert "Hints: at ← at: no projection can join" in str(caught.value)


# Projections, in a training


class Net(nn.Module):
    def __init__(self, width, side=1):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, width, 3, stride=side, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv2(F.relu(self.conv1(x))))).mean((2, 3)))


def task_of(student, teacher, n=48):
    torch.manual_seed(3)
    x = torch.randn(n, 1, 6, 6)
    y = (x.mean((1, 2, 3)) * 20).round().long() % 3
    batches = list(zip(x.split(16), y.split(16), strict=True))
    return replace(Task(student, batches, batches, batches).complete(), reference=teacher.eval())


HINTS = Hints({"conv1": "conv1", "conv2": "conv2"})


def test_projections_are_trained_and_are_never_part_of_what_training_gives_back():
    task = task_of(Net(4, side=2), Net(6))
    seen = []

    class Watching(Hints.__mro__[1]):  # an objective of one's own beside it
        def of(self, forward):
            (maps,) = forward.student.get_submodule(CHILD).parts.values()
            seen.append({name: value.detach().clone() for name, value in maps.named_parameters()})
            return 0 * forward.task_loss

    step = Finetune(epochs=3, objective=TaskLoss() + HINTS + Watching(), optimizer=Optimizer(lr=0.05))
    result = step.run(task.model, task, Context(1))
    assert result.model.state_dict().keys() == task.model.state_dict().keys()
    assert [name for name, _ in result.model.named_modules()] == [name for name, _ in Net(4).named_modules()]
    assert not result.plans and CHILD not in task.model._modules
    assert {name: tuple(w.shape) for name, w in seen[0].items()} == {
        "conv1|conv1.weight": (6, 4),
        "conv2|conv2.weight": (6, 4),
    }
    assert all(not torch.equal(seen[0][name], seen[-1][name]) for name in seen[0])
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in [*result.model.modules(), *task.reference.modules()]
    )


def test_a_student_of_another_width_comes_to_resemble_its_teacher_through_the_projection():
    task = task_of(Net(4, side=2), Net(6))
    step = Finetune(epochs=25, objective=Hints({"conv2": "conv2"}, loss="cosine"), optimizer=Optimizer(lr=0.1))
    history = step.run(task.model, task, Context(1)).history
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


def test_a_training_with_projections_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    task = task_of(Net(4), Net(6))
    step = Finetune(epochs=3, objective=TaskLoss() + HINTS, optimizer=Optimizer(lr=0.05))
    whole = step.run(task.model, task, Context(1)).model

    class Stop(Exception):
        pass

    class Stopping(type(Context(1).progress)):
        def track(self, items, description, total=None):
            if description == "epoch 3/3":
                raise Stop
            yield from items

    with pytest.raises(Stop):
        step.run(task.model, task, Context(1, tmp_path, Stopping()))
    resumed = step.run(task.model, task, Context(1, tmp_path)).model
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_in_a_loop_of_one_s_own_companions_bring_and_take_the_projections():
    task = task_of(Net(4), Net(6))
    model = copy.deepcopy(task.model).train()
    with pytest.raises(InputError, match="begin"):
        HINTS(model, task.train[0], task)
    companions = HINTS.companions()
    for companion in companions:
        companion.begin(model, task)
    loss = HINTS(model, task.train[0], task)
    loss.backward()
    assert all(w.grad is not None for name, w in model.named_parameters() if CHILD in name)
    for companion in companions:
        companion.finish(model)
    assert model.state_dict().keys() == task.model.state_dict().keys()


def test_a_sequential_student_computes_the_same_with_projections_on_it():
    student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    teacher = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    task = task_of(student, teacher)
    x, before = task.train[0][0], student(task.train[0][0])
    for companion in Hints({"0": "0"}).companions():
        companion.begin(student, task)
    assert CHILD in student._modules and torch.equal(student(x), before)


def test_an_estimate_of_the_time_has_projections_too():
    task = task_of(Net(4), Net(6))
    assert estimate(Finetune(epochs=2, objective=HINTS), task.model, task) > 0


def test_without_a_gap_in_width_nothing_is_put_on_the_model():
    task = task_of(Net(4), Net(4))
    model = copy.deepcopy(task.model)
    for companion in HINTS.companions():
        companion.begin(model, task)
    assert CHILD not in model._modules


# Bad input, before training starts


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ({"conf1": "conv1"}, ["layer 'conf1'", "no layer of the student", "Nearest names: conv1"]),
        ({"conv1": "layers.2.*"}, ["layer 'layers.2.*'", "no layer of the teacher", "Nearest names: "]),
        ({"conv*": "conv1"}, ["more layers here than the teacher", "conv1, conv2"]),
        ({"head": "conv1"}, ["head ← conv1", "no projection can join", "task.train, batch 0"]),
    ],
)
def test_layers_that_cannot_be_paired_are_an_error_before_the_first_step(pairs, words):
    task = task_of(Net(4), Net(6))
    before = [p.clone() for p in task.model.parameters()]
    with pytest.raises(InputError) as caught:
        Finetune(objective=TaskLoss() + Hints(pairs)).run(task.model, task, Context(1))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "epoch" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True))


def test_a_layer_that_is_called_twice_or_never_is_an_error():
    class Reused(Net):
        def forward(self, x):
            return self.head(F.relu(self.norm(self.conv2(self.conv2(F.relu(self.conv1(x)))))).mean((2, 3)))

    task = task_of(Reused(4), Net(4))
    with pytest.raises(InputError, match="conv2: 2 tensors pass this layer of the student"):
        Hints({"conv2": "conv2"})(task.model, task.train[0], task)
    unused = Net(4)
    unused.spare = nn.Linear(2, 2)
    with pytest.raises(InputError, match="spare: nothing passes this layer of the teacher"):
        Hints({"conv1": "spare"})(task.model, task.train[0], replace(task, reference=unused))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Hints({}),
        lambda: Hints({"a": "b"}, loss="l1"),
        lambda: Hints({"a": "b"}, spread="middle"),
        lambda: Hints({"a": "b"}, channels="middle"),
        lambda: Hints(("a", "b")),
        lambda: AttentionTransfer({"a": "b"}, power=0),
        lambda: AttentionMaps({}),
        lambda: AttentionMaps({"a": "b"}, loss="cosine"),
        lambda: AttentionMaps({"a": "b"}, heads="first"),
        lambda: SimilarityPreserving(between="channels"),
        lambda: SimilarityPreserving(between="positions"),
        lambda: CorrelationCongruence(gamma=0),
        lambda: Correlation(beta=0, gamma=0),
        lambda: Correlation(beta=-1),
        lambda: Correlation(temperature=0),
        lambda: DecoupledSoftTargets(temperature=-1),
        lambda: DecoupledSoftTargets(alpha=0, beta=0),
        lambda: DecoupledSoftTargets(beta=float("nan")),
    ],
)
def test_settings_out_of_range_are_errors(make):
    with pytest.raises(InputError):
        make()


OBJECTIVES = [
    SoftTargets(),
    Distill(),
    DecoupledSoftTargets(),
    MatchLogits(),
    HINTS,
    AttentionTransfer({"conv*": "conv*"}),
    RelativeDistances({"conv2": "conv2"}),
    RelativeAngles({"norm": "norm"}),
    SimilarityPreserving({"conv2": "conv2"}),
    SimilarityPreserving({"conv2": "conv2"}, "positions"),
    CorrelationCongruence({"conv2": "conv2"}),
    Correlation(),
    RelativeDistances(),
    RelativeAngles(),
    SimilarityPreserving(),
    CorrelationCongruence(),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_a_student_that_is_its_teacher_has_nothing_to_learn_and_another_has(objective):
    task = task_of(Net(4), Net(4))
    model = copy.deepcopy(task.model).eval()
    alike = objective(model, task.train[0], replace(task, reference=copy.deepcopy(model)))
    labels = 0.3 * F.cross_entropy(model(task.train[0][0]), task.train[0][1]).item()
    assert alike.item() == pytest.approx(labels if objective == Distill() else 0, abs=1e-5)
    with torch.no_grad():
        task.reference.head.weight.mul_(20)
    loss = objective(model, task.train[0], task)
    loss.backward()
    assert loss.item() > 1e-4
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.conv2.weight.grad.abs().sum() > 0 and all(p.grad is None for p in task.reference.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *task.reference.modules()])


def test_student_and_teacher_run_once_for_a_sum_of_all_of_them():
    task = task_of(Net(4), Net(4))
    calls = []
    for net in (task.model, task.reference):
        net.register_forward_hook(lambda module, args, output: calls.append(module))
    objective = sum(OBJECTIVES[1:], start=OBJECTIVES[0])
    for companion in objective.companions():
        companion.begin(task.model, task)
    calls.clear()
    objective(task.model.train(), task.train[0], task).backward()
    assert calls == [task.model, task.reference]


class Attending(nn.Module):
    def __init__(self, fails):
        super().__init__()
        self.at, self.fails = nn.MultiheadAttention(4, 1, batch_first=True), fails

    def forward(self, x):
        y = self.at(x, x, x)[0]
        if self.fails:
            raise RuntimeError("boom")
        return y.sum(1)


@pytest.mark.parametrize("fails", ["student", "teacher", "neither"])
def test_hooks_are_gone_also_after_an_error(fails):
    student, teacher = (Attending(fails == who) for who in ("student", "teacher"))
    batch, objective = (torch.randn(2, 3, 4), torch.tensor([0, 1])), Hints(AT) + AttentionMaps(AT)
    with pytest.raises((RuntimeError, InputError), match="boom") if fails != "neither" else nullcontext():
        objective(student, batch, Task(student, reference=teacher))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*student.modules(), *teacher.modules()])
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_layer_s_output_is_kept_as_it_was_before_the_next_one_changes_it_in_place():
    student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3))
    task = task_of(student, copy.deepcopy(student))
    forward = Forward(student, task.train[0], task, Hints({"0": "0"}).reads())
    (pair,) = forward.pairs(forward.reads[0])
    assert torch.equal(pair.student, student[0](task.train[0][0])) and (pair.student < 0).any()


def test_with_a_loss_of_the_task_s_own_the_taps_are_of_the_pass_with_the_batch_s_inputs():
    def loss(model, batch):
        model(batch[0] + 1)
        return F.cross_entropy(model(batch[0]), batch[1])

    net = Net(4).eval()
    task = replace(task_of(net, Net(4)), loss=loss)
    forward = Forward(net, task.train[0], task, HINTS.reads())
    pair = forward.pairs(forward.reads[0])[0]
    assert torch.equal(pair.student, net.conv1(task.train[0][0])) and not net._forward_hooks


def test_a_forward_pass_that_was_not_told_of_layers_says_so():
    task = task_of(Net(4), Net(4))
    with pytest.raises(InputError, match="not told which layers"):
        HINTS.of(Forward(task.model, task.train[0], task))


def test_what_prunes_meanwhile_leaves_projections_alone():
    task = task_of(Net(4), Net(6))
    companion = GradualSparsity(Prune(0.5), end=0.5, updates=2)
    result = Finetune(epochs=2, objective=TaskLoss() + HINTS, companion=companion).run(task.model, task, Context(1))
    assert {edit.place.module for edit in result.plans[0].edits} == {"conv1", "conv2", "head"} and len(
        result.plans
    ) == 1
    assert CHILD not in result.model._modules and int((result.model.conv2.weight == 0).sum()) == 72


@pytest.mark.parametrize("pairs", [{}, ["conv1"], {"conv1": 3}, {0: "conv1"}, {"conv1": ["conv1"]}])
def test_pairs_that_are_no_names_are_an_error_at_once(pairs):
    for objective in (Hints, AttentionMaps):
        with pytest.raises(InputError, match=f"{objective.__name__}.pairs: no pairs of layers"):
            objective(pairs)
