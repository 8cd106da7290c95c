"""What training makes small, each with its gradient: cross-entropy, and what a student has still to learn."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.tiny.layers import Array, as_array


def log_softmax(logits: Array) -> Array:
    """log pᵢ = zᵢ − log Σ exp zⱼ along the last axis; the largest is taken off first, so that nothing overflows."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def targets(labels: Any, classes: int) -> Array:
    """Probabilities [n, classes] from class numbers [n] or from probabilities [n, classes]."""
    y = as_array(labels)
    if y.ndim == 2:
        if y.shape[1] != classes or np.any(y < 0) or not np.allclose(y.sum(axis=1), 1, atol=1e-4):
            raise ValueError(f"labels {list(y.shape)}: expected probabilities of {classes} classes that add up to 1")
        return y
    if y.ndim != 1 or np.any(y != np.floor(y)) or np.any(y < 0) or np.any(y >= classes):
        raise ValueError(f"labels {list(y.shape)}: expected class numbers from 0 to {classes - 1}")
    return np.eye(classes)[y.astype(np.intp)]


def cross_entropy(logits: Any, labels: Any) -> tuple[float, Array]:
    """(−mean over the batch of Σ yᵢ log pᵢ, its gradient (p − y) / n in the logits [n, classes])."""
    z = _batch(logits)
    y, log_p = targets(labels, z.shape[1]), log_softmax(z)
    if len(y) != len(z):
        raise ValueError(f"{len(y)} labels for {len(z)} outputs: expected one each")
    return float(-np.mean(np.sum(y * log_p, axis=1))), (np.exp(log_p) - y) / len(z)


def imitation(student_logits: Any, teacher_logits: Any, temperature: float) -> tuple[float, Array]:
    """(T² · KL(teacher ‖ student) at temperature T, mean over the batch; its gradient T · (q − p) / n).

    T² keeps the gradient as large as at T = 1 (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """
    student, teacher = _batch(student_logits), _batch(teacher_logits)
    if student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)}: expected one shape")
    log_q, log_p = log_softmax(student / temperature), log_softmax(teacher / temperature)
    p = np.exp(log_p)
    value = temperature**2 * np.mean(np.sum(p * (log_p - log_q), axis=1))
    return float(value), temperature * (np.exp(log_q) - p) / len(student)


def distillation(
    student_logits: Any, teacher_logits: Any, labels: Any, temperature: float, soft_weight: float
) -> tuple[float, Array]:
    """``soft_weight`` · imitation + (1 − ``soft_weight``) · cross-entropy, and its gradient in the student's logits."""
    check_distillation(temperature, soft_weight)
    soft, soft_gradient = imitation(student_logits, teacher_logits, temperature)
    hard, hard_gradient = cross_entropy(student_logits, labels)
    return (
        soft_weight * soft + (1 - soft_weight) * hard,
        soft_weight * soft_gradient + (1 - soft_weight) * hard_gradient,
    )


def check_distillation(temperature: float, alpha: float) -> None:
    """Raises ValueError unless the temperature is positive and finite and 0 ≤ alpha ≤ 1."""
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature {temperature}: expected a positive number")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}: expected at least 0 and at most 1")


def _batch(logits: Any) -> Array:
    z = as_array(logits)
    if z.ndim != 2 or z.size == 0:
        raise ValueError(f"logits {list(z.shape)}: expected [batch, classes], not empty")
    return z.astype(np.float64) if z.dtype.kind != "f" else z
