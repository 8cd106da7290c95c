"""Score by the distance to the other units' weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from tersor.core.place import tensor_at
from tersor.core.task import Task
from tersor.graph.group import CoupledAxis, Group
from tersor.prune.structured.scores.coupling import Combine, Members, Normalise, check_coupling, combined, members_of
from tersor.prune.structured.scores.score import Score

CHUNK = 1 << 23  # distances computed at once


@final
@dataclass(frozen=True)
class GeometricMedian(Score):
    """Σ_j ‖w_k − w_j‖₂ over all units j: what lies near the geometric median can be replaced by the others.

    w_k is the slice of unit k of a weight that makes the units (``members``, see ``members_of``), all its positions
    one after another. Size plays no part: two large equal filters are redundant, a small odd one is not. ``combine``,
    ``normalise``: see ``combined``. The distances of n units take n² numbers' time, never their memory.

    Source: He et al. 2019, FPGM (arXiv 1811.00250), equation 6.
    """

    members: Members = "makers"
    combine: Combine = "mean"
    normalise: Normalise | None = "mean"

    def __post_init__(self) -> None:
        check_coupling("GeometricMedian", self.combine, self.normalise, self.members)

    def units(self, model: nn.Module, task: Task, groups: Sequence[Group]) -> list[Tensor]:
        """One float64 tensor [units] for each group; the task is not read."""
        return [self._of(model, group) for group in groups]

    def _of(self, model: nn.Module, group: Group) -> Tensor:
        axes = members_of(model, group, self.members)
        slices = (slices_of(tensor_at(model, axis.place).detach(), axis, group.units) for axis in axes)
        return combined([_distances(x) for x in slices], self.combine, self.normalise)


def slices_of(weight: Tensor, axis: CoupledAxis, units: int) -> Tensor:
    """The units' slices of ``weight`` as rows: [units, positions of a unit × all other dimensions], zeros where a unit
    has fewer positions than another."""
    rows = weight.movedim(axis.dim, 0).flatten(1) if weight.ndim > 1 else weight[:, None]
    order = np.argsort(axis.units, kind="stable")
    numbers = axis.units[order]
    counts = np.bincount(numbers, minlength=units)
    rank = np.arange(len(numbers)) - (np.cumsum(counts) - counts)[numbers]
    found = rows.new_zeros(units, int(counts.max()), rows.shape[1])
    found[torch.from_numpy(numbers), torch.from_numpy(rank)] = rows[torch.from_numpy(axis.positions[order])]
    return found.flatten(1)


def _distances(rows: Tensor) -> Tensor:
    """The sum of each row's distances to all rows: float64 [rows], on the CPU."""
    parts = rows.split(max(1, CHUNK // len(rows)))
    return torch.cat([torch.cdist(part, rows).sum(1, dtype=torch.float64).cpu() for part in parts])
