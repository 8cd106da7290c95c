"""What every score is. A score reads the model (and data); it never changes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from tersor.core.task import Task
from tersor.graph.group import Group


class Score(ABC):
    """Ranks the units of groups: a unit with a smaller score goes first. Scores of all groups are on one scale."""

    @abstractmethod
    def units(self, model: nn.Module, task: Task, groups: Sequence[Group]) -> list[Tensor]:
        """One float64 tensor [units], on the CPU, for each group."""
