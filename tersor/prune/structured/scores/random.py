"""Score by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from tersor.core.task import Task
from tersor.graph.group import Group
from tersor.prune.structured.scores.score import Score


@final
@dataclass(frozen=True)
class Random(Score):
    """Uniform numbers: the baseline that any other score must beat."""

    seed: int = 0

    def units(self, model: nn.Module, task: Task, groups: Sequence[Group]) -> list[Tensor]:
        """One float64 tensor [units] for each group; neither model nor task is read."""
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.rand(group.units, dtype=torch.float64, generator=generator) for group in groups]
