"""What every score of weights is. A score reads the model (and data); it never changes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.masked import standing_mask
from tersor.core.place import TensorPlace, module_at
from tersor.core.task import Task

GATHERED = "gathered"  # the buffer's name


class WeightScore(ABC):
    """Gives every weight a number: a weight with a smaller one goes first. Numbers of all tensors are on one scale."""

    @abstractmethod
    def elements(self, model: nn.Module, task: Task, places: Sequence[TensorPlace]) -> list[Tensor]:
        """One float tensor for each place, of its weight's shape, without NaN, where the weight lies."""


class GatheredScore(WeightScore):
    """A score that is gathered while the model trains: ``GradualSparsity(Prune(score=…))`` does so, step by step.

    What is gathered stands beside each mask as its buffer ``GATHERED`` [weight's shape], float32, at first zero.
    """

    @property
    @abstractmethod
    def reads_gradients(self) -> bool:
        """Whether gradients of masked weights are needed too."""

    @abstractmethod
    def gather(self, gathered: Tensor, weight: Tensor, gradient: Tensor) -> None:
        """Add one step's to ``gathered``, in place. ``weight``: as it is stored, before the optimiser's step."""

    @final
    def elements(self, model: nn.Module, task: Task, places: Sequence[TensorPlace]) -> list[Tensor]:
        """What was gathered. Raises InputError outside of a training that gathers it."""
        found = [_gathered(model, place) for place in places]
        for place, gathered in zip(places, found, strict=True):
            if gathered is None:
                raise InputError(
                    "the score is gathered during training, and nothing was", where=str(place),
                    got=type(self).__name__, expected="a training that gathers it",
                    do="Use Finetune(companion=GradualSparsity(Prune(score=…))); start=0.5, updates=1 prunes once",
                )  # fmt: skip
        return [gathered for gathered in found if gathered is not None]


def _gathered(model: nn.Module, place: TensorPlace) -> Tensor | None:
    mask = standing_mask(module_at(model, place.module), place.tensor)
    return None if mask is None else mask._buffers.get(GATHERED)
