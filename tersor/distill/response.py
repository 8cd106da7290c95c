"""Learning from the teacher's outputs: soft targets, decoupled ones, logits, and sums with the task's own loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.task import Task
from tersor.distill.checks import expect_positive, expect_weights
from tersor.distill.monitors import review
from tersor.distill.samples import (
    classes_of,
    distributions_of,
    divergence,
    expect_same,
    is_regression,
    samples_of,
)
from tersor.train.objective import Forward, Objective


@final
@dataclass(frozen=True)
class SoftTargets(Objective):
    """T² · KL(softmax(z_t / T) ‖ softmax(z_s / T)), the mean over samples; the teacher is ``task.reference``.

    Logits z: [batch, classes]; [batch, …, classes] counts each position as a sample, positions whose target is −100 and
    padding by the model's ``attention_mask`` left out; [batch, classes, …] where that is what matches the targets.
    Labels may be missing. Float targets mean regression: the mean squared error to the teacher's output then, without a
    temperature.

    Raises InputError for a temperature that is not positive, for fewer than two classes, where teacher and student
    differ in shape or classes, and where the teacher's output is not finite.
    Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), section 2.
    """

    temperature: float = 4.0

    def __post_init__(self) -> None:
        check_fields(self)
        expect_positive("SoftTargets", temperature=self.temperature)

    def of(self, forward: Forward) -> Tensor:
        """The divergence from the teacher for one forward pass: []."""
        if is_regression(forward):
            return _squared_error(forward)
        samples = distributions_of(forward, "SoftTargets")
        log_p_s = F.log_softmax(samples.student / self.temperature, dim=-1)
        log_p_t = F.log_softmax(samples.teacher / self.temperature, dim=-1)
        return self.temperature**2 * samples.mean(divergence(log_p_t, log_p_s))

    def review(self, model: nn.Module, task: Task, history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Errors, capacity and temperature: see ``monitors.review``."""
        return review(model, task, history, self.temperature)


@final
@dataclass(frozen=True)
class Distill(Objective):
    """``alpha`` · T² · KL(teacher ‖ student) + (1 − ``alpha``) · the task's loss, with T = ``temperature``.

    The same as ``alpha * SoftTargets(temperature) + (1 - alpha) * TaskLoss()``; see SoftTargets for shapes, regression
    and errors. Raises InputError for an alpha outside [0, 1].
    Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), section 2.
    """

    temperature: float = 4.0
    alpha: float = 0.7

    def __post_init__(self) -> None:
        check_fields(self)
        expect_positive("Distill", temperature=self.temperature)
        if not 0 <= self.alpha <= 1:
            raise InputError("alpha is no fraction", where="Distill.alpha", got=self.alpha, expected="0 … 1")

    def of(self, forward: Forward) -> Tensor:
        """The weighted sum for one forward pass: []. A part of weight 0 is not computed."""
        if self.alpha == 0:
            return forward.task_loss
        soft = SoftTargets(self.temperature).of(forward)
        if self.alpha == 1:
            return soft
        return self.alpha * soft + (1 - self.alpha) * forward.task_loss

    def review(self, model: nn.Module, task: Task, history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Errors, capacity and temperature: see ``monitors.review``."""
        return review(model, task, history, self.temperature)


@final
@dataclass(frozen=True)
class DecoupledSoftTargets(Objective):
    """T² · (``alpha`` · TCKD + ``beta`` · NCKD), the mean over samples: soft targets in two parts, weighed apart.

    TCKD = KL of (p_y, 1 − p_y), how sure of the label's class y; NCKD = KL of softmax(z / T) over the other classes
    alone. Soft targets weigh NCKD by 1 − p_y of the teacher, so that a sure teacher teaches little. Needs labels; add
    the task's loss: ``TaskLoss() + DecoupledSoftTargets()``. Shapes are SoftTargets'.

    Raises InputError for a temperature that is not positive, weights that are negative or both zero, labels that are
    missing or no classes, and what SoftTargets raises.
    Source: Zhao et al. 2022 (arXiv 2203.08679), equation 7; T² as in the authors' code.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        check_fields(self)
        expect_positive("DecoupledSoftTargets", temperature=self.temperature)
        expect_weights("DecoupledSoftTargets", alpha=self.alpha, beta=self.beta)

    def of(self, forward: Forward) -> Tensor:
        """Both parts for one forward pass: []."""
        samples = classes_of(forward, "DecoupledSoftTargets")
        assert samples.targets is not None, "classes"
        sure_t, others_t = _decoupled(samples.teacher / self.temperature, samples.targets)
        sure_s, others_s = _decoupled(samples.student / self.temperature, samples.targets)
        tckd, nckd = divergence(sure_t, sure_s), divergence(others_t, others_s)
        return self.temperature**2 * samples.mean(self.alpha * tckd + self.beta * nckd)

    def review(self, model: nn.Module, task: Task, history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Errors, capacity and temperature: see ``monitors.review``."""
        return review(model, task, history, self.temperature)


def _decoupled(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (p_y, 1 − p_y) [n, 2], and those of the other classes alone [n, classes], −∞ at the label's."""
    log_p, label = F.log_softmax(z, dim=-1), targets[:, None]
    others = log_p.scatter(1, label, -torch.inf)
    log_rest = others.logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_p.gather(1, label), log_rest], dim=-1), others - log_rest


@final
@dataclass(frozen=True)
class MatchLogits(Objective):
    """The mean of (z_s − z_t)² over samples and classes: logits learnt by regression, without a temperature.

    Shapes and errors are SoftTargets', but one output will do; for float targets it is the same.
    Source: Ba and Caruana 2013 (arXiv 1312.6184), equation 1, which halves it.
    """

    def of(self, forward: Forward) -> Tensor:
        """The squared error for one forward pass: []."""
        if is_regression(forward):
            return _squared_error(forward)
        samples = samples_of(forward, "MatchLogits")
        return samples.mean((samples.student - samples.teacher).square().mean(dim=-1))

    def review(self, model: nn.Module, task: Task, history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Errors, capacity and temperature: see ``monitors.review``."""
        return review(model, task, history, None)


def _squared_error(forward: Forward) -> Tensor:
    student, teacher = forward.outputs.float(), forward.reference_outputs.float()
    expect_same(student, teacher, axis=None)
    return F.mse_loss(student, teacher)
