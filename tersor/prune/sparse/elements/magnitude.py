"""Score by the size of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from tersor.core.place import TensorPlace, tensor_at
from tersor.core.task import Task
from tersor.prune.sparse.elements.score import WeightScore


@final
@dataclass(frozen=True)
class WeightMagnitude(WeightScore):
    """|w|. Neither data nor gradients are read.

    Source: Han et al. 2015 (arXiv 1506.02626), section 3.
    """

    def elements(self, model: nn.Module, task: Task, places: Sequence[TensorPlace]) -> list[Tensor]:
        """|w|, in the weight's shape and dtype."""
        return [tensor_at(model, place).detach().abs() for place in places]
