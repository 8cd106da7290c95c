"""Score by the second-order change of the loss."""

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
from tersor.prune.structured.scores.gradients import after_backward_of_samples, mean_of


@final
@dataclass(frozen=True)
class WeightFisher(WeightScore):
    """½ h w², h = mean over samples of (∂L/∂w)²: the diagonal of the empirical Fisher matrix in the Hessian's place.

    Near a minimum this is the second-order change of the loss when the weight is zero and all others stay. ``samples``
    forward and backward passes of one sample each, in eval mode, on a copy of the model.

    Raises InputError for samples < 1, no calibration data, batches that cannot be divided and a loss that fails;
    TrainingError where the loss is not finite.
    Source: LeCun, Denker, Solla 1990, *Optimal Brain Damage*, equation 5; Theis et al. 2018 (arXiv 1801.05787).
    """

    samples: int = 64

    def __post_init__(self) -> None:
        check_fields(self)
        if self.samples < 1:
            raise InputError("at least one sample is needed", where="WeightFisher.samples", got=self.samples)

    def elements(self, model: nn.Module, task: Task, places: Sequence[TensorPlace]) -> list[Tensor]:
        """Float32 (float64 where the weight is), in the weight's shape."""
        with seeded(0, task.calibration):
            passes = after_backward_of_samples(model, task, self.samples, "WeightFisher")
            return mean_of(lambda weight, gradient: (weight * gradient).square() / 2, passes, places)
