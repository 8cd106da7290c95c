"""What every score of weights is. A score reads the model (and data); it never changes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from tersor.core.place import TensorPlace
from tersor.core.task import Task


class WeightScore(ABC):
    """Gives every weight a number: a weight with a smaller one goes first. Numbers of all tensors are on one scale."""

    @abstractmethod
    def elements(self, model: nn.Module, task: Task, places: Sequence[TensorPlace]) -> list[Tensor]:
        """One float tensor for each place, of its weight's shape, without NaN, where the weight lies."""
