"""Score by the second-order change of the loss along a unit's gate."""

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
from tersor.prune.structured.scores.gradients import after_backward_of_samples, gate_scores
from tersor.prune.structured.scores.score import Score


@final
@dataclass(frozen=True)
class Fisher(Score):
    """½ · mean over samples of (Σ w · ∂L/∂w)²: half the empirical Fisher information of a unit's gate.

    Near a minimum the loss changes by ½ h when a factor in front of the unit goes from one to zero, h being its second
    derivative; the Fisher information stands for h. Unlike ``Taylor`` the gradient is squared sample by sample, so that
    samples do not cancel; where all of them are fitted perfectly it says as little. ``samples`` forward and backward
    passes of one sample each.
    ``combine``: "gate" adds what all readers say before squaring; the others square each reader's own sum first.

    Raises InputError for samples < 1, unknown options, no calibration data, batches that cannot be divided and a loss
    that fails; TrainingError where the loss is not finite.
    Source: Theis et al. 2018 (arXiv 1801.05787), equation 8; Liu et al. 2021, group Fisher pruning (arXiv 2108.00708),
    section 3.2, for coupled layers.
    """

    samples: int = 64
    combine: Literal["gate"] | Combine = "gate"
    normalise: Normalise | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError("at least one sample is needed", where="Fisher.samples", got=self.samples)
        check_coupling("Fisher", self.combine, self.normalise, also=("gate",))

    def units(self, model: nn.Module, task: Task, groups: Sequence[Group]) -> list[Tensor]:
        """One float64 tensor [units] for each group."""
        passes = after_backward_of_samples(model, task, self.samples, "Fisher")
        with seeded(0, task.calibration):
            return [score / 2 for score in gate_scores(model, groups, passes, self.combine, self.normalise)]
