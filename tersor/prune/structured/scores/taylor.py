"""Score by the first-order change of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.randomness import seeded
from tersor.core.task import Task
from tersor.graph.group import Group
from tersor.prune.structured.scores.coupling import Combine, Normalise, check_coupling
from tersor.prune.structured.scores.gradients import after_backward, gate_scores
from tersor.prune.structured.scores.score import Score


@final
@dataclass(frozen=True)
class Taylor(Score):
    """mean over batches of (Σ w · ∂L/∂w)²: the squared first-order change of the loss when the unit is not read.

    The sum runs over the weights of all that read the unit, since a channel is gone exactly when they are zero; L is
    the task's own loss on ``batches`` calibration batches, in eval mode, on a copy of the model. ``combine``: "gate"
    adds what all readers say before squaring; the others square each reader's own sum first (see ``combined``).

    Raises InputError for batches < 1, unknown options, no calibration data, and a loss that fails; TrainingError where
    the loss is not finite.
    Source: Molchanov et al. 2019 (arXiv 1906.10771, equation 8), who sum over the weights that make a channel.
    """

    batches: int = 16
    combine: Literal["gate"] | Combine = "gate"
    normalise: Normalise | None = None

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise InputError("at least one batch is needed", where="Taylor.batches", got=self.batches)
        check_coupling("Taylor", self.combine, self.normalise, also=("gate",))

    def units(self, model: nn.Module, task: Task, groups: Sequence[Group]) -> list[Tensor]:
        """One float64 tensor [units] for each group."""
        passes = after_backward(model, task, self.batches, "Taylor")
        with seeded(0, task.calibration):
            return gate_scores(model, groups, passes, self.combine, self.normalise)
