"""How much a unit of channels matters. A score reads the model (and data); it never changes it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError, TrainingError
from tersor.core.place import tensor_at
from tersor.core.randomness import fixed_randomness
from tersor.core.task import Task
from tersor.graph.group import CoupledAxis, Group


class Score(ABC):
    """Ranks the units of groups: a unit with a smaller score goes first. Scores of all groups are on one scale."""

    @abstractmethod
    def units(self, model: nn.Module, task: Task, groups: Sequence[Group]) -> list[Tensor]:
        """One float64 tensor [units] for each group."""


def by_unit(values: Tensor, axis: CoupledAxis, units: int) -> Tensor:
    """Sum ``values`` (of the axis's tensor, any shape) over everything but the units: float64 [units]."""
    others = [dim for dim in range(values.ndim) if dim != axis.dim]
    sums = values.double().sum(dim=others) if others else values.double()
    positions, numbers = torch.from_numpy(axis.positions), torch.from_numpy(axis.units)
    return torch.zeros(units, dtype=torch.float64).index_add_(0, numbers, sums.cpu()[positions])


@dataclass(frozen=True)
class Magnitude(Score):
    """(Σ |w|^p)^(1/p) over the slices of every producer's weight, each producer divided by its mean, then averaged.

    Source: Li et al. 2017 (arXiv 1608.08710, section 3.1) with p = 1; the sum over coupled layers is ours.
    """

    p: float = 2.0

    def units(self, model: nn.Module, task: Task, groups: Sequence[Group]) -> list[Tensor]:
        if self.p <= 0:
            raise InputError("the norm's exponent must be positive", where="Magnitude.p", got=self.p)
        return [self._of(model, group) for group in groups]

    def _of(self, model: nn.Module, group: Group) -> Tensor:
        total = torch.zeros(group.units, dtype=torch.float64)
        for axis in group.producers:
            weight = tensor_at(model, axis.place).detach()
            norm = by_unit(weight.abs().double() ** self.p, axis, group.units) ** (1 / self.p)
            total += norm / norm.mean().clamp_min(torch.finfo(torch.float64).tiny)
        return total / len(group.producers)


@dataclass(frozen=True)
class Taylor(Score):
    """mean over batches of (Σ w · ∂L/∂w)²: the squared first-order change of the loss when the unit is not read.

    The sum runs over the weights of all that read the unit, since a channel is gone exactly when they are zero; L is
    the task's own loss on ``batches`` calibration batches, in eval mode, on a copy of the model.

    Source: Molchanov et al. 2019 (arXiv 1906.10771, equation 8), who sum over the weights that make a channel.
    """

    batches: int = 16

    def units(self, model: nn.Module, task: Task, groups: Sequence[Group]) -> list[Tensor]:
        if self.batches < 1:
            raise InputError("at least one batch is needed", where="Taylor.batches", got=self.batches)
        if task.calibration is None:
            raise InputError("the task has no calibration data", where="Taylor", do="Pass task.complete()")
        model = copy.deepcopy(model).eval().requires_grad_(True)
        scores = [torch.zeros(group.units, dtype=torch.float64) for group in groups]
        seen = 0
        with fixed_randomness(0):
            for batch in islice(task.calibration, self.batches):
                model.zero_grad(set_to_none=True)
                loss = task.loss_of(model, batch)
                if not bool(torch.isfinite(loss)):
                    raise TrainingError("the loss is not finite", where=f"Taylor, calibration batch {seen}", got=loss.item())
                loss.backward()
                for score, group in zip(scores, groups, strict=True):
                    score += self._change(model, group).square()
                seen += 1
        if seen == 0:
            raise InputError("the loader is empty", where="task.calibration", got="no batch")
        return [score / seen for score in scores]

    def _change(self, model: nn.Module, group: Group) -> Tensor:
        total = torch.zeros(group.units, dtype=torch.float64)
        for axis in group.with_role("consumer") or group.producers:
            weight = tensor_at(model, axis.place)
            if weight.grad is not None:
                total += by_unit(weight.detach() * weight.grad, axis, group.units)
        return total


@dataclass(frozen=True)
class Random(Score):
    """Uniform numbers: the baseline that any other score must beat."""

    seed: int = 0

    def units(self, model: nn.Module, task: Task, groups: Sequence[Group]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.rand(group.units, dtype=torch.float64, generator=generator) for group in groups]
