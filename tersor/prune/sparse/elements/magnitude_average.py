"""Score by how large a weight stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.prune.sparse.elements.score import GatheredScore


@final
@dataclass(frozen=True)
class MagnitudeAverage(GatheredScore):
    """m ← β m + (1 − β) |w| at each step: weights that stay small go, those that pass through zero do not.

    Raises InputError unless 0 ≤ β < 1. Source: ours; with β = 0 it is ``WeightMagnitude`` of the step before.
    """

    beta: float = 0.99

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.beta < 1:
            raise InputError("out of range", where="MagnitudeAverage.beta", got=self.beta, expected="0 ≤ beta < 1")

    @property
    def reads_gradients(self) -> bool:
        """No."""
        return False

    def gather(self, gathered: Tensor, weight: Tensor, gradient: Tensor) -> None:
        """β · gathered + (1 − β) · |w|. All start at zero alike, which changes no order."""
        gathered.lerp_(weight.abs().to(gathered.dtype), 1 - self.beta)
