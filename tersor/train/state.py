"""How far a training has come: everything that its next epoch depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Tensors = Mapping[str, Tensor]


@dataclass
class TrainingState:
    """A training at the end of an epoch.

    ``model``, ``optimizer``: copies of their tensors. ``best``: the model's tensors after epoch ``best_epoch``, the
    very same object as ``model`` where that is the last one. ``history``: one entry per epoch. ``halved``: the learning
    rate was halved after a loss that was not finite.
    """

    model: Tensors
    optimizer: Tensors
    best: Tensors
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    halved: bool = False

    @property
    def epoch(self) -> int:
        """How many epochs are finished."""
        return len(self.history)


@dataclass(frozen=True, eq=False)
class Midway:
    """A training after some batches of the epoch that follows ``epoch``, at a step of the optimiser.

    ``model``, ``optimizer``: copies of their tensors. ``losses``: float32 [processes, batches], of the epoch so far.
    ``randomness``: float64 [processes, n], the generators' states. ``seen``: int64 [processes], the marks of the last
    batches. ``halved``: as in TrainingState.
    """

    epoch: int
    model: Tensors
    optimizer: Tensors
    losses: Tensor
    randomness: Tensor
    seen: Tensor
    halved: bool

    @property
    def batches(self) -> int:
        """How many batches of the epoch are done."""
        return self.losses.shape[1]

    def of(self, process: int) -> tuple[list[Tensor], Tensor, int]:
        """One process's losses, random state, and mark of its last batch."""
        return list(self.losses[process]), self.randomness[process], int(self.seen[process])


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, tied ones once, buffers that are not saved otherwise too; not copied."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def keeps_other_state(model: nn.Module) -> list[str]:
    """The modules with state that is no parameter and no buffer (``get_extra_state``)."""
    plain = nn.Module.get_extra_state
    return [path for path, module in model.named_modules() if type(module).get_extra_state is not plain]
