"""Score by the first-order change of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.place import TensorPlace
from tersor.core.randomness import seeded
from tersor.core.task import Task
from tersor.prune.sparse.elements.score import WeightScore
from tersor.prune.structured.scores.gradients import after_backward, mean_of


@final
@dataclass(frozen=True)
class WeightTaylor(WeightScore):
    """mean over batches of |w · ∂L/∂w|: the first-order change of the loss when the weight is zero.

    L is the task's own loss on ``batches`` calibration batches, in eval mode, on a copy of the model. On a network that
    was never trained, with one batch, this is SNIP.

    Raises InputError for batches < 1, no calibration data, and a loss that fails; TrainingError where the loss is not
    finite.
    Source: Lee et al. 2019, SNIP (arXiv 1810.02340), equation 5, without its normalisation, which changes no order;
    Molchanov et al. 2017 (arXiv 1611.06440), section 2.2.
    """

    batches: int = 16

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batches < 1:
            raise InputError("at least one batch is needed", where="WeightTaylor.batches", got=self.batches)

    def elements(self, model: nn.Module, task: Task, places: Sequence[TensorPlace]) -> list[Tensor]:
        """Float32 (float64 where the weight is), in the weight's shape."""
        with seeded(0, task.calibration):
            passes = after_backward(model, task, self.batches, "WeightTaylor")
            return mean_of(lambda weight, gradient: (weight * gradient).abs(), passes, places)
