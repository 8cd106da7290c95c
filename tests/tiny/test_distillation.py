import numpy as np
import pytest

from tersor.tiny import (
    DistillationLoss,
    KnowledgeDistillation,
    Linear,
    ReLU,
    Sequential,
    Tensor,
    distill,
    evaluate,
    train,
    train_with_distillation,
)


def plain_loss(student, teacher, labels, temperature, soft_weight):
    """The loss of Hinton et al. in loops."""
    total = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        p = [np.exp(v / temperature) / sum(np.exp(u / temperature) for u in t) for v in t]
        q = [np.exp(v / temperature) / sum(np.exp(u / temperature) for u in s) for v in s]
        soft = temperature**2 * sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
        hard = -np.log(np.exp(s[label]) / sum(np.exp(u) for u in s))
        total += soft_weight * soft + (1 - soft_weight) * hard
    return total / len(labels)


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return rng.normal(size=(6, 4)), 2 * rng.normal(size=(6, 4)), np.array([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("temperature", [1.0, 3.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_both_losses_are_hintons_with_alpha_on_the_side_the_course_has_it(logits, temperature, alpha):
    student, teacher, labels = logits
    ours = KnowledgeDistillation(None, None, temperature, alpha).distillation_loss(*logits)
    assert ours == pytest.approx(plain_loss(student, teacher, labels, temperature, alpha))
    assert DistillationLoss(temperature, alpha)(*logits) == pytest.approx(
        plain_loss(student, teacher, labels, temperature, 1 - alpha)
    )


def test_the_defaults_are_the_courses():
    kd, loss = KnowledgeDistillation("t", "s"), DistillationLoss()
    assert (kd.temperature, kd.alpha, kd.teacher_model, kd.student_model) == (3.0, 0.7, "t", "s")
    assert (loss.temperature, loss.alpha) == (3.0, 0.5)


def test_tensors_and_probabilities_do_too(logits):
    student, teacher, labels = logits
    loss = DistillationLoss()
    assert loss(Tensor(student), Tensor(teacher), Tensor(labels)) == loss(*logits)
    assert loss(student, teacher, np.eye(4)[labels]) == pytest.approx(loss(*logits))


def test_a_student_that_agrees_has_nothing_soft_to_learn(logits):
    assert DistillationLoss(alpha=0.0)(logits[1], logits[1] + 5, logits[2]) == pytest.approx(0, abs=1e-12)


def test_huge_logits_do_not_overflow():
    huge = np.array([[1e4, -1e4], [-1e4, 1e4]])
    assert DistillationLoss()(huge, huge, np.array([0, 1])) == 0
    assert np.isfinite(DistillationLoss()(huge, -huge, np.array([0, 1])))


@pytest.mark.parametrize("change, said", [
    (lambda s, t, y: (s, t[:, :3], y), "one shape"), (lambda s, t, y: (s, t, y + 1), "0 to 3"),
    (lambda s, t, y: (s, t, y + 0.5), "0 to 3"), (lambda s, t, y: (s, t, y[:5]), "5 labels for 6"),
    (lambda s, t, y: (s[0], t[0], y), "expected .batch, classes"), (lambda s, t, y: (s, t, np.ones((6, 4))), "add up"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(logits, change, said):
    with pytest.raises(ValueError, match=said):
        DistillationLoss()(*change(*logits))


@pytest.mark.parametrize("temperature, alpha", [(0, 0.5), (-1, 0.5), (float("inf"), 0.5), (1, 1.1), (1, float("nan"))])
def test_impossible_settings_are_refused(temperature, alpha):
    for make in (lambda: DistillationLoss(temperature, alpha), lambda: KnowledgeDistillation(1, 2, temperature, alpha)):
        with pytest.raises(ValueError, match="temperature|alpha"):
            make()


def student():
    rng = np.random.default_rng(1)
    return Sequential(Linear(64, 16, rng=rng), ReLU(), Linear(16, 10, rng=rng))


def test_the_student_really_learns_and_the_teacher_stays_as_it_is(trained, digits):
    training, held_out = digits
    before, small = [p.data.copy() for p in trained.parameters()], student()
    found = train_with_distillation(trained, small, training, epochs=10)
    assert found["loss"][-1] < found["loss"][0] / 5 and len(found["loss"]) == 10
    assert found["accuracy_before"] < 30 < 95 < found["accuracy_after"]
    assert evaluate(small, held_out) > 85 and found["teacher_accuracy"] > 98
    assert all(np.array_equal(p.data, w) for p, w in zip(trained.parameters(), before, strict=True))


def test_a_teacher_alone_is_enough(trained, digits):
    (x, y), held_out = digits
    nonsense = np.zeros_like(y)
    small = distill(trained, student(), (x, nonsense), alpha=1.0, epochs=8)  # no label counts
    assert evaluate(small, held_out) > 85


def test_a_loader_of_batches_is_data_too(trained, digits):
    (x, y), held_out = digits
    loader = [(x[i : i + 100], y[i : i + 100]) for i in range(0, 1300, 100)]
    made = [student(), student()]
    assert distill(trained, made[0], loader, epochs=2) is made[0]
    distill(trained, made[1], (x, y), epochs=2)
    assert np.array_equal(made[0](x), made[1](x)) and evaluate(made[0], loader) == evaluate(made[0], (x, y))
    assert evaluate(made[0], (x, np.eye(10)[y])) == evaluate(made[0], (x, y))


def test_the_same_seed_trains_the_same(digits):
    a, b = student(), student()
    assert train(a, digits[0], epochs=2) == train(b, digits[0], epochs=2)
    assert np.array_equal(a(digits[1][0]), b(digits[1][0]))


def test_training_that_diverges_says_so(digits):
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="smaller learning_rate"):
        train(student(), digits[0], epochs=3, learning_rate=1e30)


@pytest.mark.parametrize("data, said", [
    ([], "no batch"), (3, "of type int"), ((np.ones((2, 64)), np.ones(3)), "2 inputs"),
    ((np.ones((0, 64)), np.ones(0)), "at least one"),
])  # fmt: skip
def test_data_that_is_none_is_refused(data, said):
    with pytest.raises(ValueError, match=said):
        evaluate(student(), data)
