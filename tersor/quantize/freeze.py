"""Quantisation-aware training whose steps stand still towards its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import nn

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.quantize.standing import learnt_quantizers
from tersor.train.companion import Companion, Moment


@final
@dataclass(frozen=True)
class FreezeScales(Companion):
    """The learnt steps of all quantisers stand still from ``start`` of the training on; weights learn on.

    Their gradient is taken away, so that no optimiser moves them, its momentum and weight decay included. They remain
    parameters of the model: a later training may move them again.

    Args:
        start: from which fraction of the training on; 0: they never learn.

    Raises InputError for a number out of range, and where no learnt quantiser stands on the model.
    As torchvision's reference training stops its observers after some epochs (``--num-observer-update-epochs``).
    """

    start: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.start < 1:
            raise InputError("out of range", where="FreezeScales.start", got=self.start, expected="0 ≤ start < 1")

    def begin(self, model: nn.Module, task: Task) -> None:
        """Nothing is put on; there must be something to freeze."""
        if not learnt_quantizers(model):
            raise InputError(
                "no quantiser learns its step", where="FreezeScales", expected="a model after Quantize(learn=True)",
                do="Run Quantize first, or leave FreezeScales out",
            )  # fmt: skip

    def after_backward(self, moment: Moment) -> None:
        """Take the gradients of steps away, where it is time."""
        if moment.done >= self.start * moment.steps:
            for quantizer in learnt_quantizers(moment.model):
                if quantizer.log_growth is not None:
                    quantizer.log_growth.grad = None

    def finish(self, model: nn.Module) -> Plan:
        """Nothing stands on the model."""
        return Plan("freeze scales")
