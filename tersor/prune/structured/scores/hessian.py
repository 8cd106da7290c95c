"""Score by the second-order change of the loss, weight by weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.place import tensor_at
from tersor.core.randomness import seeded
from tersor.core.task import Task
from tersor.graph.group import CoupledAxis, Group
from tersor.prune.structured.scores.coupling import Combine, Normalise, by_unit, check_coupling, combined, members_of
from tersor.prune.structured.scores.gradients import after_backward_of_samples
from tersor.prune.structured.scores.score import Score


@final
@dataclass(frozen=True)
class HessianDiagonal(Score):
    """½ Σ h w² over the weights that read a unit, h = mean over samples of (∂L/∂w)², the diagonal of the empirical
    Fisher matrix in the Hessian's place.

    Weights count as independent of each other: where many small ones push the same way, ``Fisher`` sees it and this
    score does not. ``samples`` forward and backward passes of one sample each. ``combine``, ``normalise``: how several
    readers become one number (see ``combined``).

    Raises what ``Fisher`` raises.
    Source: LeCun, Denker, Solla 1990, *Optimal Brain Damage*, equation 5.
    """

    samples: int = 64
    combine: Combine = "sum"
    normalise: Normalise | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError("at least one sample is needed", where="HessianDiagonal.samples", got=self.samples)
        check_coupling("HessianDiagonal", self.combine, self.normalise)

    def units(self, model: nn.Module, task: Task, groups: Sequence[Group]) -> list[Tensor]:
        """One float64 tensor [units] for each group."""
        axes = [members_of(model, group, "readers") for group in groups]
        totals = [
            torch.zeros(len(readers), group.units, dtype=torch.float64)
            for readers, group in zip(axes, groups, strict=True)
        ]
        seen = 0
        with seeded(0, task.calibration):
            for copied in after_backward_of_samples(model, task, self.samples, "HessianDiagonal"):
                for total, readers, group in zip(totals, axes, groups, strict=True):
                    total += torch.stack([_squares(copied, axis, group.units) for axis in readers])
                seen += 1
        return [combined(list(total / (2 * seen)), self.combine, self.normalise) for total in totals]


def _squares(model: nn.Module, axis: CoupledAxis, units: int) -> Tensor:
    weight = tensor_at(model, axis.place)
    if weight.grad is None:
        return torch.zeros(units, dtype=torch.float64)
    return by_unit((weight.detach() * weight.grad).square(), axis, units)
