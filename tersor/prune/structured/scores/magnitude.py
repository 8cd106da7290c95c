"""Score by the size of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.place import TensorPlace, tensor_at
from tersor.core.task import Task
from tersor.graph.group import CoupledAxis, Group
from tersor.prune.structured.scores.coupling import (
    Combine,
    Members,
    Normalise,
    check_coupling,
    combined,
    gathered,
    members_of,
)
from tersor.prune.structured.scores.score import Score


@final
@dataclass(frozen=True)
class Magnitude(Score):
    """(Σ |w|^p)^(1/p) of a unit's slice of each tensor that scales it, relative to that tensor's mean; averaged.

    ``p``: 2 is the L2 norm, 1 the L1 norm. ``members``: whose slices count (see ``members_of``); ``combine`` and
    ``normalise``: how several coupled ones become one number (see ``combined``). ``Magnitude(1, members="makers",
    combine="first", normalise=None)`` is Li et al.'s; ``Magnitude(2, members="all", combine="sum", normalise=None)``
    adds the norms of everything coupled.

    Raises InputError for p ≤ 0 and unknown options.
    Source: Li et al. 2017 (arXiv 1608.08710, section 3.1) for the weights that make a channel, with p = 1; Fang et al.
    2023 (arXiv 2301.12900, section 3.3) for the sum over what is coupled. Leaving out the makers before a batch norm is
    ours (docs/cards/prune-channels.md has the comparison).
    """

    p: float = 2.0
    members: Members = "scaling"
    combine: Combine = "mean"
    normalise: Normalise | None = "mean"

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise InputError("the norm's exponent must be positive", where="Magnitude.p", got=self.p)
        check_coupling("Magnitude", self.combine, self.normalise, self.members)

    def units(self, model: nn.Module, task: Task, groups: Sequence[Group]) -> list[Tensor]:
        """One float64 tensor [units] for each group; the task is not read."""
        powers: dict[tuple[TensorPlace, int], Tensor] = {}  # what many groups share is summed up once

        def norm(axis: CoupledAxis, units: int) -> Tensor:
            if (axis.place, axis.dim) not in powers:
                powers[axis.place, axis.dim] = self._power(tensor_at(model, axis.place).detach(), axis.dim)
            return gathered(powers[axis.place, axis.dim], axis, units) ** (1 / self.p)

        return [
            combined(
                [norm(axis, group.units) for axis in members_of(model, group, self.members)],
                self.combine, self.normalise,
            )
            for group in groups
        ]  # fmt: skip

    def _power(self, weight: Tensor, dim: int) -> Tensor:
        """Σ |w|^p for each position of ``dim``."""
        others = [other for other in range(weight.ndim) if other != dim]
        if not others:
            return weight.double().abs() ** self.p
        return torch.linalg.vector_norm(weight, self.p, dim=others, dtype=torch.float64) ** self.p
