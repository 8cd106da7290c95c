"""How much a unit of channels matters. A score reads the model (and data); it never changes it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tersor.core.errors import InputError, TrainingError, user_code
from tersor.core.loading import batches_of
from tersor.core.place import module_at, tensor_at
from tersor.core.randomness import seeded
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
    """(Σ |w|^p)^(1/p) of a unit's slice of each tensor that scales it, relative to that tensor's mean; averaged.

    What scales a unit: the weights that read it, and the scale of the batch norms on its way or, where there is none,
    the weights that make it (before a batch norm their length has no effect).

    Source: Li et al. 2017 (arXiv 1608.08710, section 3.1) for the weights that make a channel, with p = 1; Fang et al.
    2023 (arXiv 2301.12900, section 3.3) for the sum over what is coupled. Leaving out the makers before a batch norm is
    ours (docs/cards/prune-channels.md has the comparison).
    """

    p: float = 2.0

    def units(self, model: nn.Module, task: Task, groups: Sequence[Group]) -> list[Tensor]:
        if not self.p > 0:
            raise InputError("the norm's exponent must be positive", where="Magnitude.p", got=self.p)
        return [self._of(model, group) for group in groups]

    def _of(self, model: nn.Module, group: Group) -> Tensor:
        total = torch.zeros(group.units, dtype=torch.float64)
        axes = (*(_norm_scales(model, group) or group.producers), *group.with_role("consumer"))
        for axis in axes:
            weight = tensor_at(model, axis.place).detach()
            norm = by_unit(weight.abs().double() ** self.p, axis, group.units) ** (1 / self.p)
            total += norm / norm.mean().clamp_min(torch.finfo(torch.float64).tiny)
        return total / len(axes)


def _norm_scales(model: nn.Module, group: Group) -> tuple[CoupledAxis, ...]:
    """The scales of batch norms (and instance norms) that belong to the group."""
    return tuple(
        axis
        for axis in group.with_role("bystander")
        if axis.place.tensor == "weight" and isinstance(module_at(model, axis.place.module), _NormBase)
    )


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
        with seeded(0, task.calibration):
            for batch in islice(batches_of(task.calibration, "task.calibration"), self.batches):
                where = f"Taylor, calibration batch {seen}"
                model.zero_grad(set_to_none=True)
                with user_code("the loss cannot be computed", where=where):
                    loss = task.loss_of(model, batch)
                    if not bool(torch.isfinite(loss)):
                        raise TrainingError("the loss is not finite", where=where, got=loss.item())
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
