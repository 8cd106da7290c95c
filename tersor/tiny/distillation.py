"""A small model learns from a large one: the losses as the course calls them, and training that really trains."""

from __future__ import annotations

from typing import Any

from tersor.tiny.layers import Layer
from tersor.tiny.losses import check_distillation, distillation
from tersor.tiny.tables import show
from tersor.tiny.training import as_arrays, evaluate, fit


class KnowledgeDistillation:
    """A teacher, a student, and their loss α · T² · KL(teacher ‖ student at T) + (1 − α) · cross-entropy.

    ``alpha`` weighs the *teacher* here, and the labels in ``DistillationLoss``: so it is in the course. What changed:
    T², without which a higher temperature silently turns the teacher off; 1e-8 is no longer added inside logarithms.
    """

    def __init__(
        self, teacher_model: Layer, student_model: Layer, temperature: float = 3.0, alpha: float = 0.7
    ) -> None:
        check_distillation(temperature, alpha)
        self.teacher_model, self.student_model = teacher_model, student_model
        self.temperature, self.alpha = temperature, alpha

    def distillation_loss(self, student_logits: Any, teacher_logits: Any, true_labels: Any) -> float:
        """The loss of logits [batch, classes] (arrays or Tensors); labels are class numbers or probabilities."""
        return distillation(student_logits, teacher_logits, true_labels, self.temperature, self.alpha)[0]


class DistillationLoss:
    """α · cross-entropy + (1 − α) · T² · KL(teacher ‖ student at T): ``alpha`` weighs the *labels* here.

    What changed: the soft part is the divergence, which is 0 for a student that agrees with its teacher; the classic's
    was larger by the teacher's entropy, a constant, so that its gradient was the same.
    """

    def __init__(self, temperature: float = 3.0, alpha: float = 0.5) -> None:
        check_distillation(temperature, alpha)
        self.temperature, self.alpha = temperature, alpha

    def __call__(self, student_logits: Any, teacher_logits: Any, true_labels: Any) -> float:
        """The loss of logits [batch, classes]."""
        return distillation(student_logits, teacher_logits, true_labels, self.temperature, 1 - self.alpha)[0]


def train_with_distillation(
    teacher: Layer, student: Layer, data: Any, loss: DistillationLoss | None = None, epochs: int = 10,
    learning_rate: float = 0.02, batch_size: int = 32, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Train the student in place on ``data``, (x, y) or batches of it; the teacher is only asked.

    Gives loss (the mean of each epoch), accuracy_before, accuracy_after, teacher_accuracy (percent, on ``data``), and
    prints them. What changed: the classic named it without writing it. The gradients are those of ``layers.py``.
    """
    loss = DistillationLoss() if loss is None else loss
    x, y = as_arrays(data)
    answers = teacher.compute(x)
    before = evaluate(student, (x, y))
    history = fit(
        student, x, lambda z, rows: distillation(z, answers[rows], y[rows], loss.temperature, 1 - loss.alpha),
        epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    found = {
        "loss": history,
        "accuracy_before": before,
        "accuracy_after": evaluate(student, (x, y)),
        "teacher_accuracy": evaluate(teacher, (x, y)),
    }
    losses = [f"{value:.4f}" for value in history] or ["–"]
    large, small = (f"{sum(p.size for p in model.parameters()):,}" for model in (teacher, student))
    rows = [
        ("teacher", large, f"{found['teacher_accuracy']:.1f} %", ""),
        ("student before", small, f"{before:.1f} %", losses[0]),
        ("student after", small, f"{found['accuracy_after']:.1f} %", losses[-1]),
    ]
    show("Learning from a teacher", ("model", "parameters", "accuracy here", "loss, first and last epoch"), rows)
    return found


def distill(
    teacher: Layer, student: Layer, data_loader: Any, epochs: int = 10, temperature: float = 3.0, alpha: float = 0.7,
    learning_rate: float = 0.02, seed: int = 0,
) -> Layer:  # fmt: skip
    """``train_with_distillation``, giving the student, which was trained in place. ``alpha`` weighs the teacher, as in
    ``KnowledgeDistillation``. What changed: the classic named it without writing it.
    """
    check_distillation(temperature, alpha)
    train_with_distillation(
        teacher, student, data_loader, DistillationLoss(temperature, 1 - alpha), epochs, learning_rate, seed=seed
    )
    return student
