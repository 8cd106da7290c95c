"""Averaged weights: what is validated and handed back is the mean of the training's last stretch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn

from tersor.core.attached import attach, attached, detach, is_attached
from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.train.companion import Companion, Moment

_KEY = "average"


@final
@dataclass(frozen=True)
class Average(Companion):
    """w̄ ← d w̄ + (1 − d) w after each step, d = min(``decay``, (1 + t) / (10 + t)) at step t; w̄ begins as w.

    Of every parameter, and of buffers in floating point (running statistics). Validation, the choice of the best epoch
    and the result are of w̄; training goes on from w. Costs a copy of the model and a pass over it per step. Raises
    InputError for a decay outside (0, 1).
    Source: Polyak and Juditsky 1992; the exponential form with its warm-up as in TensorFlow's
    ``ExponentialMovingAverage(num_updates)``.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.decay < 1:
            raise InputError("out of range", where="Average.decay", got=self.decay, expected="0 < decay < 1")

    def begin(self, model: nn.Module, task: Task) -> None:
        """A copy of the weights beside them."""
        attach(model, _KEY, _Means(list(_own(model).values())))

    @torch.no_grad()
    def after_step(self, moment: Moment) -> None:
        """Move the means towards the weights."""
        decay = min(self.decay, (1 + moment.done) / (10 + moment.done))
        torch._foreach_lerp_(_means(moment.model), list(_own(moment.model).values()), 1 - decay)

    @contextmanager
    def judged(self, model: nn.Module) -> Iterator[None]:
        """While open, the model has the mean weights."""
        held = [tensor.clone() for tensor in _own(model).values()]
        _write(model, _means(model))
        try:
            yield
        finally:
            _write(model, held)

    def finish(self, model: nn.Module) -> Plan:
        """The mean weights become the model's."""
        _write(model, _means(model))
        detach(model, _KEY)
        return Plan("average weights")


class _Means(nn.Module):
    """Copies of tensors, in order, as buffers, so that checkpoints hold them."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        for number, tensor in enumerate(tensors):
            self.register_buffer(f"mean_{number}", tensor.clone())


def _own(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors in floating point, tied ones once."""
    every = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach() for name, t in every if t.is_floating_point() and not is_attached(name)}


def _means(model: nn.Module) -> list[Tensor]:
    return list(cast(_Means, attached(model, _KEY)).buffers())


@torch.no_grad()
def _write(model: nn.Module, values: list[Tensor]) -> None:
    for tensor, value in zip(_own(model).values(), values, strict=True):
        tensor.copy_(value)
