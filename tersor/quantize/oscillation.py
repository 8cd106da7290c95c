"""Weights that swing between two integers while they are trained: counted, and frozen where they stand on average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn

from tersor.core.attached import attach, attached, detach
from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.masked import standing_mask
from tersor.core.place import module_at, stored_at
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.quantize.standing import weight_quantizers
from tersor.quantize.weight_only import spread
from tersor.train.companion import Companion, Moment

_KEY = "oscillation"
COUNTED = 0.005  # a weight oscillates, for the count, where its frequency is above, as in the paper's tables


@final
@dataclass(frozen=True)
class FreezeOscillation(Companion):
    """Weights whose integer keeps turning back are frozen at its mean: f > threshold, f ← m · o + (1 − m) · f.

    After each step, of each weight w under a quantiser of step s: q = round(w / s) within its range; o is 1 where q
    changed, and in the other direction than when it changed last. The mean of q moves as f does. A frozen weight is
    (its integer) · s from then on, whatever s becomes; its gradient is zero. The threshold falls from ``first`` to
    ``last`` over the training by half a cosine, so that at first nearly all weights may find their place. Masked
    weights do not count. The history's ``noted`` has the fractions of weights that oscillate (f > 0.005) and that are
    frozen.

    Args:
        first, last: the threshold at the start and at the end. None for ``last``: only counted, nothing is frozen.
        momentum: m.
        most_bits: wider grids are left alone: their steps are so fine that training's ordinary noise crosses them.

    Raises InputError for numbers out of range, and where no weight has a quantiser of so few bits.
    Source: Nagel et al. 2022 (arXiv 2203.11086), sections 4.1 and 4.3, algorithm 1.
    """

    first: float = 0.04
    last: float | None = 0.01
    momentum: float = 0.01
    most_bits: int = 4

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.momentum < 1:
            raise InputError(
                "out of range", where="FreezeOscillation.momentum", got=self.momentum, expected="0 < momentum < 1"
            )
        if self.last is not None and not 0 < self.last <= self.first <= 1:
            raise InputError(
                "out of order", where="FreezeOscillation", got=f"first {self.first}, last {self.last}",
                expected="0 < last ≤ first ≤ 1",
            )  # fmt: skip

    def begin(self, model: nn.Module, task: Task) -> None:
        """Beside each weight: its integer, where that went last, how often it turns, its mean, and what is frozen."""
        followed = list(self._weights(model))
        if not followed:
            raise InputError(
                f"no weight has a quantiser of at most {self.most_bits} bits", where="FreezeOscillation",
                got=f"{sum(1 for _ in weight_quantizers(model))} quantisers of more", expected="a model after Quantize",
                do="Run Quantize first, raise most_bits, or leave FreezeOscillation out",
            )  # fmt: skip
        attach(model, _KEY, nn.ModuleList(_Swing(weight.integers()) for weight in followed))

    def after_backward(self, moment: Moment) -> None:
        """Frozen weights have no gradient."""
        for weight, swing in zip(self._weights(moment.model), _swings(moment.model), strict=True):
            if weight.stored.grad is not None:
                weight.stored.grad.masked_fill_(swing.frozen, 0)

    @torch.no_grad()
    def after_step(self, moment: Moment) -> None:
        """Count, freeze, and put frozen weights where they belong."""
        way = moment.done / max(1, moment.steps)
        for weight, swing in zip(self._weights(moment.model), _swings(moment.model), strict=True):
            swing.follow(weight.integers(), self.momentum)
            if self.last is not None:
                swing.freeze(self.last + (self.first - self.last) * (1 + math.cos(math.pi * way)) / 2)
                weight.stored.copy_(torch.where(swing.frozen, swing.integer * weight.step(), weight.stored))

    def noted(self, model: nn.Module) -> Mapping[str, float]:
        """The fractions of all these weights that oscillate and that are frozen."""
        swings = list(_swings(model))
        total = sum(swing.frozen.numel() for swing in swings)
        moving = sum(int(((swing.frequency > COUNTED) & ~swing.frozen).sum()) for swing in swings)
        frozen = sum(int(swing.frozen.sum()) for swing in swings)
        return {"oscillating weights": moving / total, "frozen weights": frozen / total}

    def finish(self, model: nn.Module) -> Plan:
        """Take off what was counted; frozen weights stand on their grid."""
        detach(model, _KEY)
        return Plan("freeze oscillation")

    def _weights(self, model: nn.Module) -> Iterator[_Weight]:
        """The weights that are followed."""
        for place, quantizer in weight_quantizers(model):
            if quantizer.quant_max - quantizer.quant_min < 2**self.most_bits:
                mask = standing_mask(module_at(model, place.module), place.tensor)
                stored = cast(nn.Parameter, stored_at(model, place))
                yield _Weight(stored, quantizer, None if mask is None else mask.keep)


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight as it is stored, its quantiser, and the mask before it."""

    stored: nn.Parameter
    quantizer: FakeQuantize
    keep: Tensor | None

    def step(self) -> Tensor:
        """The step of each number: the weight's shape."""
        return spread(self.quantizer, self.stored.shape)[0].detach()

    def integers(self) -> Tensor:
        """q − zero point of each number, 0 where it is masked: the weight's shape, int16."""
        with torch.no_grad():
            q = (self.quantizer(self.stored) / self.step()).round_().to(torch.int16)
            return q if self.keep is None else q.masked_fill_(~self.keep, 0)


class _Swing(nn.Module):
    """What is known of one weight's integers, number by number; buffers, so that checkpoints hold them."""

    integer: Tensor
    direction: Tensor
    frequency: Tensor
    mean: Tensor
    frozen: Tensor

    def __init__(self, integer: Tensor):
        super().__init__()
        self.register_buffer("integer", integer)
        self.register_buffer("direction", torch.zeros_like(integer, dtype=torch.int8))
        self.register_buffer("frequency", torch.zeros_like(integer, dtype=torch.float32))
        self.register_buffer("mean", integer.float())
        self.register_buffer("frozen", torch.zeros_like(integer, dtype=torch.bool))

    def follow(self, integer: Tensor, momentum: float) -> None:
        """One step: ``integer`` is where the numbers are now; frozen ones are where they were."""
        integer = torch.where(self.frozen, self.integer, integer)
        change = (integer - self.integer).sign().to(torch.int8)
        turned = change * self.direction < 0
        self.frequency.lerp_(turned.float(), momentum)
        self.mean.lerp_(integer.float(), momentum)
        self.direction.copy_(torch.where(change == 0, self.direction, change))
        self.integer.copy_(integer)

    def freeze(self, threshold: float) -> None:
        """Numbers that turn more often than that stand on their rounded mean from now on."""
        new = (self.frequency > threshold) & ~self.frozen
        self.integer.copy_(torch.where(new, self.mean.round().to(self.integer.dtype), self.integer))
        self.frozen |= new


def _swings(model: nn.Module) -> Iterator[_Swing]:
    yield from cast("nn.ModuleList", attached(model, _KEY))  # type: ignore[misc]
