"""How the learning rate moves during training: one factor for each step of the optimiser."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from tersor.core.errors import InputError


class Schedule(ABC):
    """The learning rate's factor as a function of the step alone, so that a resumed training needs no state for it."""

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with at ``step`` (0 … ``steps`` − 1)."""


@final
@dataclass(frozen=True)
class Constant(Schedule):
    """The same learning rate throughout."""

    def factor(self, step: int, steps: int) -> float:
        """1."""
        return 1.0


@final
@dataclass(frozen=True)
class Cosine(Schedule):
    """A linear rise over the first ``warmup`` (fraction of all steps), then ½ (1 + cos πt) down to ``floor``.

    Source: Loshchilov and Hutter 2016 (arXiv 1608.03983), equation 5, without restarts.
    """

    warmup: float = 0.1
    floor: float = 0.0

    def __post_init__(self) -> None:
        _expect_fraction("Cosine.warmup", self.warmup)
        _expect_fraction("Cosine.floor", self.floor)

    def factor(self, step: int, steps: int) -> float:
        """(step + 1) / rise while it rises; then the cosine."""
        rise = round(self.warmup * steps)
        if step < rise:
            return (step + 1) / rise
        t = (step - rise) / max(1, steps - rise)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * t)) / 2


@final
@dataclass(frozen=True)
class OneCycle(Schedule):
    """Half a cosine from ``start`` up to 1 over the first ``rise`` (fraction of all steps), another down to ``end``.

    The same as ``torch.optim.lr_scheduler.OneCycleLR`` without its cycle of the momentum.
    Source: Smith and Topin 2017 (arXiv 1708.07120).
    """

    rise: float = 0.3
    start: float = 0.04
    end: float = 4e-6

    def __post_init__(self) -> None:
        for name in ("rise", "start", "end"):
            _expect_fraction(f"OneCycle.{name}", getattr(self, name))

    def factor(self, step: int, steps: int) -> float:
        """Up until step rise · steps − 1, down until the last."""
        peak, last = self.rise * steps - 1, steps - 1
        if step <= peak:
            return _half_cosine(self.start, 1.0, step / peak if peak > 0 else 1.0)
        return _half_cosine(1.0, self.end, (step - peak) / (last - peak) if last > peak else 1.0)


@final
@dataclass(frozen=True)
class Part(Schedule):
    """A part of another schedule's course, from ``begin`` to ``end`` as fractions of it: a training's last epochs, say.

    Raises InputError unless 0 ≤ begin < end ≤ 1.
    """

    of: Schedule
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _expect_fraction("Part.begin", self.begin)
        _expect_fraction("Part.end", self.end)
        if not self.begin < self.end:
            raise InputError("out of order", where="Part", got=f"{self.begin} … {self.end}", expected="begin < end")

    def factor(self, step: int, steps: int) -> float:
        """The factor of the whole course's step that this one is."""
        whole = round(steps / (self.end - self.begin))
        return self.of.factor(min(round(self.begin * whole) + step, whole - 1), whole)


def _half_cosine(begin: float, end: float, t: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * t)) / 2


def _expect_fraction(where: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError("not a fraction", where=where, got=value, expected="0 … 1")
