import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.apply import apply
from tersor.core.edit import Precision
from tersor.core.errors import InputError
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.distill.cache import TeacherCache
from tersor.distill.response import Distill, SoftTargets
from tersor.distill.teachers import Teacher, Teachers, identity
from tersor.train.finetune import Finetune
from tersor.train.objective import Forward


class Says(nn.Module):
    """Gives these logits whatever it is asked."""

    def __init__(self, *rows):
        super().__init__()
        self.register_buffer("rows", torch.tensor(rows))

    def forward(self, x):
        return self.rows[: len(x)]


X = torch.zeros(2, 3)
A = Says([2.0, -1.0, 0.5], [0.0, 0.0, 0.0])
B = Says([-1.0, 3.0, 0.0], [4.0, -4.0, 1.0])


def naive(weights, mixture):
    rows = []
    for i in range(2):
        z = [A.rows[i].double(), B.rows[i].double()]
        p = [torch.exp(one) / torch.exp(one).sum() for one in z]
        w = list(weights)
        if mixture == "confidence":
            sure = [1 + float((q * q.log()).sum()) / float(torch.tensor(3.0).log()) for q in p]
            w = [a * max(c, 1e-3) for a, c in zip(w, sure, strict=True)]
        if mixture:
            rows.append(((w[0] * p[0] + w[1] * p[1]) / sum(w)).log())
        else:
            rows.append((w[0] * z[0] + w[1] * z[1]) / sum(w))
    return torch.stack(rows).float()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.25, 3.0)])
@pytest.mark.parametrize("combine", ["logits", "probabilities", "confidence"])
def test_teachers_are_combined_as_their_equations_say(combine, weights):
    teachers = [Teacher(model, weight) for model, weight in zip((A, B), weights, strict=True)]
    got = Teachers(teachers, combine)(X)
    assert torch.allclose(got, naive(weights, combine if combine != "logits" else None), atol=1e-5)


def test_the_mean_of_logits_is_the_geometric_mean_at_every_temperature():
    z = Teachers([A, B])(X)
    for temperature in (1.0, 4.0):
        product = (A(X) / temperature).softmax(1).sqrt() * (B(X) / temperature).softmax(1).sqrt()
        assert torch.allclose((z / temperature).softmax(1), product / product.sum(1, keepdim=True), atol=1e-6)


def test_who_is_unsure_counts_little_by_confidence_and_a_weight_of_zero_not_at_all():
    p = Teachers([A, B], "confidence")(X).softmax(1)
    assert torch.allclose(p[1], B(X)[1].softmax(0), atol=2e-3)  # A is uniform there
    assert torch.equal(Teachers([A, Teacher(B, 0.0)])(X), A(X))


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(5)), st.integers(1, 4), st.sampled_from(["logits", "probabilities", "confidence"]))
def test_each_class_is_taught_by_who_knows_it(order, cut, combine):
    first, second = tuple(order[:cut]), tuple(order[cut:])
    a, b = Says([float(3 * n) for n in first]), Says([float(3 * n) for n in second])
    z = Teachers([Teacher(a, classes=first), Teacher(b, classes=second)], combine)(X[:1])[0]
    if combine == "logits":
        assert torch.equal(z, torch.arange(5.0) * 3)
        return
    p = z.softmax(0)
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    for classes, logits in ((first, a.rows[0]), (second, b.rows[0])):
        inside = p[list(classes)] / p[list(classes)].sum()
        assert torch.allclose(inside, logits.softmax(0), atol=1e-4)


def test_a_teacher_of_some_classes_helps_one_of_all():
    helper = Says([10.0], [20.0])
    z = Teachers([A, Teacher(helper, classes=(1,))])(X)
    expected = A(X).clone()
    expected[:, 1] = (A(X)[:, 1] + helper(X)[:, 0]) / 2
    assert torch.equal(z, expected)


def test_each_teacher_has_its_own_inputs_and_output():
    class Wide(nn.Module):
        def forward(self, image, scale):
            return {"other": (image.flatten(1)[:, :3] * scale, None)}

    small, wide = nn.Flatten(), Wide()
    x = torch.rand(2, 1, 1, 3)
    both = Teachers([
        Teacher(small),
        Teacher(wide, transform=lambda x: (F.interpolate(x, scale_factor=2), 7.0), output=lambda out: out["other"][0]),
    ])  # fmt: skip
    expected = (x.flatten(1) + 7 * F.interpolate(x, scale_factor=2).flatten(1)[:, :3]) / 2
    assert torch.allclose(both(x), expected)
    named = Teachers(
        [Teacher(wide, transform=lambda x: {"scale": 2.0, "image": x}, output=lambda out: out["other"][0])]
    )
    assert torch.allclose(named(x), 2 * x.flatten(1))


def test_inputs_with_names_go_to_each_teacher_s_own_arguments():
    class First(nn.Module):
        def forward(self, tokens, mask):
            return SimpleNamespace(logits=tokens * mask)

    class Second(nn.Module):
        def forward(self, mask, tokens):
            return tokens * mask + 2

    student = First()
    task = Task(student, output_of=lambda result: result.logits, reference=Teachers([First(), Second()]))
    batch = {"tokens": torch.rand(2, 3), "mask": torch.rand(2, 3), "labels": torch.tensor([0, 1])}
    outputs = Forward(student, batch, task).reference_outputs
    assert torch.allclose(outputs, batch["tokens"] * batch["mask"] + 1)


def test_teachers_stay_in_eval_mode_without_gradients_and_one_in_training_is_copied():
    trained = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3)).train()
    before = copy.deepcopy(trained.state_dict())
    resting = copy.deepcopy(trained).eval().requires_grad_(False)
    both = Teachers([trained, resting]).train()
    x = torch.randn(4, 3, requires_grad=True)
    out = both(x)
    assert torch.equal(out, both(x)) and not out.requires_grad
    assert not any(module.training for module in both.modules())
    assert not any(parameter.requires_grad for parameter in both.parameters())
    assert trained.training and all(parameter.requires_grad for parameter in trained.parameters())
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert both.teachers["1"] is resting and both.teachers["0"] is not trained


def test_the_task_keeps_teachers_as_they_are():
    data = DataLoader(TensorDataset(torch.randn(4, 3), torch.tensor([0, 1, 2, 0])), batch_size=2)
    both = Teachers([A, B])
    assert Task(nn.Linear(3, 3), data, data, data, reference=both).complete().reference is both


def test_classes_may_stand_in_axis_one():
    z = [torch.randn(2, 3, 4, 5) for _ in range(2)]
    models = [Says(*one.tolist()) for one in z]
    got = Teachers(models, "probabilities", axis=1)(torch.zeros(2, 1))
    assert torch.allclose(got.exp(), (z[0].softmax(1) + z[1].softmax(1)) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Teachers([]), "no teacher that counts. Got none"),
        (lambda: Teachers([Teacher(A, 0.0), Teacher(B, 0)]), "Got 2, all of weight 0"),
        (lambda: Teacher(A, -1.0), "Teacher.weight"),
        (lambda: Teacher(A, float("nan")), "Teacher.weight"),
        (lambda: Teacher(lambda x: x), "no torch.nn.Module"),
        (lambda: Teacher(A, classes=(0, 0, 1)), "Teacher.classes"),
        (lambda: Teacher(A, classes=()), "Teacher.classes"),
        (lambda: Teachers([A], "median"), "Teachers.combine"),
        (lambda: Teachers([Teacher(A, name="a"), Teacher(B, name="a")]), "a name twice"),
        (lambda: Teachers([Teacher(A, classes=(0, 1, 4))]), r"classes that no teacher knows. Got \[2, 3\]"),
        (lambda: Teachers([Teacher(A, classes=(0, 1))])(X), "3 outputs, classes"),
        (lambda: Teachers([A, Teacher(B, classes=(1, 2, 3))])(X), "classes below 3"),
        (lambda: Teachers([A, Says([1.0, 2.0])])(X[:1]), "teacher 1: the teacher's outputs are not its classes"),
        (lambda: Teachers([A, Says([1.0, 2.0, 3.0])])(X), r"\[1, 3\] beside \[2, 3\] of teacher 0"),
        (lambda: Teachers([A, Teacher(nn.Linear(5, 3), name="big")])(X), "teacher big: the teacher fails"),
    ],
)
def test_teachers_that_do_not_fit_are_errors_that_name_them(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_a_function_s_identity_changes_with_its_code_and_its_constants_alone():
    def made(number):
        return lambda x: x * number

    assert identity(made(2)) == identity(made(2)) != identity(made(3))
    assert identity(lambda x: x + 1) != identity(lambda x: x + 2)
    assert identity(partial(made, 2)) != identity(partial(made, 3)) and identity(None) == "None"
    first, second = (Teachers([Teacher(A, transform=made(n))]) for n in (2, 3))
    assert str(first) != str(second) and str(first) == str(Teachers([Teacher(A, transform=made(2))]))


def test_a_transformer_and_another_network_teach_a_small_one_from_the_cache(tmp_path):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.read = nn.Linear(4, 16), nn.Linear(16, 3)
            self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

        def forward(self, x):
            return self.read(self.block(self.embed(x)).mean(dim=1))

    torch.manual_seed(0)
    teachers = Teachers([
        Teacher(Attending(), weight=2.0, transform=lambda x: x.reshape(len(x), 4, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
    ])  # fmt: skip
    x = torch.randn(96, 1, 4, 4)
    data = DataLoader(TensorDataset(x, teachers(x).argmax(1)), batch_size=16, shuffle=True)
    student = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    task = TeacherCache(str(tmp_path), views=1).on(Task(student, data, data, data, reference=teachers))
    result = Finetune(epochs=8, objective=Distill(alpha=0.9)).run(student, task, Context(1))
    losses = [entry["loss"] for entry in result.history]
    assert losses[-1] < 0.7 * losses[0] and result.facts["teacher"]["hits"] == 7 * 96
    batch = next(iter(data))
    same = SoftTargets()(student, batch, Task(student, reference=teachers))
    assert torch.isfinite(same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_in_another_precision_is_given_its_inputs_in_it(dtype, precision):
    """Alone or among others; in autocast the training itself would run, and what looks at it afterwards would not."""
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(20, 3, 6, 6), torch.randint(0, 4, (20,))), 10)
    teacher, student = (nn.Sequential(nn.Conv2d(3, 4, 6), nn.Flatten()) for _ in range(2))
    other = copy.deepcopy(teacher).to(dtype)
    images = data.dataset.tensors[0]
    for reference in (other, Teachers([teacher, Teacher(other, transform=lambda x: x)])):
        task = Task(student, data, data, data, reference=reference)
        said = Forward(student, (images, data.dataset.tensors[1]), task).reference_outputs.float()
        torch.testing.assert_close(said, teacher(images), atol=0.05, rtol=0)
        found = Finetune(1, SoftTargets(), precision=precision).run(student, task).facts["review"]
        assert found["training"]["total"] == 20


def test_a_teacher_of_mixed_precision_takes_its_inputs_as_they_are():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2).bfloat16()

        def forward(self, x):
            return self.last(self.first(x).bfloat16())

    mixed = Mixed().eval().requires_grad_(False)
    x = torch.randn(5, 3)
    task = Task(nn.Linear(3, 2), reference=mixed)
    assert torch.equal(Forward(task.model, (x, torch.zeros(5)), task).reference_outputs, mixed(x))


def test_a_teacher_that_is_stored_in_half_precision_computes_with_inputs_as_they_are():
    narrow = Precision(TensorPlace("0", "weight"), torch.float16)
    stored = apply(nn.Sequential(nn.Linear(3, 2, bias=False)), Plan("x", (narrow,))).eval().requires_grad_(False)
    x = torch.randn(5, 3)
    task = Task(nn.Linear(3, 2), reference=stored)
    assert torch.equal(Forward(task.model, (x, torch.zeros(5)), task).reference_outputs, stored(x))


def test_of_several_teachers_the_one_whose_output_is_not_finite_is_named():
    broken = Says([2.0, -1.0, 0.5], [0.0, float("nan"), 0.0])
    with pytest.raises(InputError, match=r"teacher second: the teacher's output is not finite.* first in row 1"):
        Teachers([A, Teacher(broken, name="second")])(X)


def test_a_teacher_that_fails_is_named_as_such():
    task = Task(nn.Linear(3, 2), reference=nn.Linear(4, 2))
    with pytest.raises(InputError, match="task.reference: the teacher fails. Got RuntimeError: mat1 and mat2"):
        SoftTargets()(task.model, (torch.zeros(2, 3), torch.tensor([0, 1])), task)


@pytest.mark.parametrize("name", ["half", "a.b", ""])
def test_a_teacher_s_name_is_one_that_a_module_can_have(name):
    with pytest.raises(InputError, match="Teacher.name: no name for a module"):
        Teacher(A, name=name)
