"""Score by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from tersor.core.check_fields import check_fields
from tersor.core.place import TensorPlace, tensor_at
from tersor.core.task import Task
from tersor.prune.sparse.elements.score import WeightScore


@final
@dataclass(frozen=True)
class RandomWeights(WeightScore):
    """Uniform numbers: the baseline that any other score must beat."""

    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def elements(self, model: nn.Module, task: Task, places: Sequence[TensorPlace]) -> list[Tensor]:
        """Numbers in [0, 1), drawn on the CPU; the same for the same shapes in the same order."""
        generator = torch.Generator().manual_seed(self.seed)
        weights = [tensor_at(model, place) for place in places]
        return [torch.rand(weight.shape, generator=generator).to(weight.device) for weight in weights]
