import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.errors import InputError
from tersor.core.task import Task
from tersor.distill.relations import (
    Correlation,
    CorrelationCongruence,
    RelativeAngles,
    RelativeDistances,
    SimilarityPreserving,
)


class Layered(nn.Module):
    """Gives ``value`` at the layer "at", and ``outputs``."""

    def __init__(self, value, outputs=None):
        super().__init__()
        self.value, self.given = nn.Parameter(value), outputs
        self.at = nn.Identity()

    def forward(self, x, attention_mask=None):
        value = self.at(self.value)
        return value.flatten(1) if self.given is None else self.given


def value_of(objective, student, teacher, targets=None, mask=None):
    model, batch = Layered(student), {"x": torch.zeros(len(student))}
    batch["labels"] = torch.zeros(len(student), dtype=torch.long) if targets is None else targets
    if mask is not None:
        batch["attention_mask"] = mask
    loss = objective(model, batch, Task(model, reference=Layered(teacher)))
    loss.backward()
    assert torch.isfinite(model.value.grad).all()
    return loss.item()


def huber(a, b):
    gap = abs(float(a) - float(b))
    return gap**2 / 2 if gap <= 1 else gap - 0.5


def naive_distances(student, teacher):
    pairs = list(itertools.permutations(range(len(student)), 2))
    mean_s, mean_t = (sum(float((x[i] - x[j]).norm()) for i, j in pairs) / len(pairs) for x in (student, teacher))
    return sum(
        huber((student[i] - student[j]).norm() / mean_s, (teacher[i] - teacher[j]).norm() / mean_t) for i, j in pairs
    ) / len(pairs)


def naive_angles(student, teacher):
    def cosine(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        return a @ b / (a.norm() * b.norm())

    triples = list(itertools.permutations(range(len(student)), 3))
    return sum(huber(cosine(student, *t), cosine(teacher, *t)) for t in triples) / len(triples)


def naive_similarity(student, teacher):
    total, n = 0.0, len(student)
    rows = []
    for x in (student, teacher):
        gram = [[float(a @ b) for b in x] for a in x]
        rows.append([[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in gram])
    for i, j in itertools.product(range(n), repeat=2):
        total += (rows[0][i][j] - rows[1][i][j]) ** 2
    return total / n**2


def naive_congruence(student, teacher, gamma=0.4):
    n, total = len(student), 0.0
    units = [x / x.norm(dim=1, keepdim=True) for x in (student, teacher)]
    for i, j in itertools.product(range(n), repeat=2):
        k_s, k_t = (math.exp(-gamma * float((x[i] - x[j]).norm()) ** 2) for x in units)
        total += (k_s - k_t) ** 2
    return total / n**2


@pytest.mark.parametrize("pairs", [{"at": "at"}, {}], ids=["layer", "outputs"])
@pytest.mark.parametrize(
    ("objective", "naive"),
    [
        (RelativeDistances, naive_distances),
        (RelativeAngles, naive_angles),
        (SimilarityPreserving, naive_similarity),
        (CorrelationCongruence, naive_congruence),
    ],
)
def test_relations_are_their_equations_whatever_the_widths(objective, naive, pairs):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5) * 3, torch.randn(6, 8 if pairs else 5)
    expected = naive(student.double(), teacher.double())
    assert value_of(objective(pairs), student, teacher) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("objective", [RelativeDistances, RelativeAngles])
def test_distances_and_angles_do_not_see_scale_shift_or_rotation(objective):
    torch.manual_seed(0)
    teacher = torch.randn(6, 5)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5))
    assert value_of(objective(), 7 * teacher @ rotation + 3, teacher) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("objective", [RelativeDistances(), RelativeAngles()])
@pytest.mark.parametrize("student", [torch.ones(4, 3), torch.ones(1, 3), torch.tensor([[1.0, 2], [1, 2], [3, 4]])])
def test_samples_that_coincide_give_a_finite_gradient(objective, student):
    teacher = torch.arange(float(student.numel())).reshape(student.shape).square()
    assert math.isfinite(value_of(objective, student, teacher))


def test_similarity_between_positions_compares_the_cosines_inside_each_sample():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 2, 3), torch.randn(2, 7, 2, 3)
    total = 0.0
    for s, t in zip(student.flatten(2), teacher.flatten(2), strict=True):
        for i, j in itertools.product(range(6), repeat=2):
            total += float(F.cosine_similarity(s[:, i], s[:, j], 0) - F.cosine_similarity(t[:, i], t[:, j], 0)) ** 2
    got = value_of(SimilarityPreserving({"at": "at"}, "positions"), student, teacher)
    assert got == pytest.approx(total / (2 * 36), rel=1e-5)


@pytest.mark.parametrize("between", ["samples", "positions"])
def test_padding_plays_no_part_in_relations(between):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 6)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    objective = SimilarityPreserving({"at": "at"}, between)
    first = value_of(objective, student, teacher, mask=mask)
    student[mask == 0], teacher[mask == 0] = 100, -50
    assert value_of(objective, student, teacher, mask=mask) == pytest.approx(first, rel=1e-5)
    assert value_of(objective, student, teacher) != pytest.approx(first, rel=1e-2)


def pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x.norm() * y.norm()))


@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1, 1, 1), (2, 0, 4), (0, 3, 2)])
def test_correlation_is_pearson_s_along_samples_and_along_classes(beta, gamma, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 4) * 2, torch.randn(6, 4)
    p_s, p_t = (torch.softmax(z.double() / temperature, 1) for z in (student, teacher))
    samples = sum(1 - pearson(a, b) for a, b in zip(p_s, p_t, strict=True)) / 6
    classes = sum(1 - pearson(a, b) for a, b in zip(p_s.T, p_t.T, strict=True)) / 4
    got = value_of(Correlation(beta, gamma, temperature), student, teacher)
    assert got == pytest.approx(temperature**2 * (beta * samples + gamma * classes), rel=1e-5)


def test_correlation_counts_positions_and_leaves_ignored_ones_out():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    targets = torch.tensor([[1, -100, 2], [0, 1, -100]])
    kept = targets != -100

    def over(keep):
        given = {"x": torch.zeros(2), "labels": targets if keep is None else torch.full((2, 3), -100)}
        model = Layered(student, student)
        return Correlation()(model, given, Task(model, reference=Layered(teacher, teacher))).item()

    flat = value_of(Correlation(), student[kept], teacher[kept])
    assert over(None) == pytest.approx(flat, rel=1e-5) and over("none") == 0


def test_a_teacher_of_other_classes_is_named_with_both_numbers():
    with pytest.raises(InputError, match="teacher 5, student 4"):
        value_of(Correlation(), torch.randn(3, 4), torch.randn(3, 5))


def test_relations_keep_float32_s_digits_under_mixed_precision():
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 5) + 30, torch.randn(8, 5)
    exact = value_of(RelativeDistances({"at": "at"}), student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert value_of(RelativeDistances({"at": "at"}), student, teacher) == pytest.approx(exact, rel=1e-5)
