"""Bring what two layers gave to the same positions, so that only their widths may differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.core.errors import InputError
from tersor.train.layers import LayerPair
from tersor.train.objective import Forward

Channels = Literal["auto", "first", "last"]
CHANNELS: tuple[Channels, ...] = ("auto", "first", "last")
PREFIXES = (0, 1, 2, 4, 5)  # tokens in front of an image's patches: class, distillation, four registers
_POOLS: dict[int, Callable[[Tensor, Any], Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


@dataclass(frozen=True, eq=False)
class Joined:
    """Features float32 [batch, positions, channels] at the same positions; ``counted`` bool [batch, positions] or None
    where all of them count."""

    student: Tensor
    teacher: Tensor
    counted: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` [batch, positions] over the positions that count: []."""
        if self.counted is None:
            return values.mean()
        return (values * self.counted).sum() / self.counted.sum().clamp_min(1)

    def cleared(self) -> tuple[Tensor, Tensor]:
        """Both features with zeros where nothing counts."""
        if self.counted is None:
            return self.student, self.teacher
        return self.student * self.counted[..., None], self.teacher * self.counted[..., None]


def join(pair: LayerPair, forward: Forward, who: str, channels: Channels = "auto") -> Joined:
    """What ``pair`` gave, at the same positions.

    Vectors [batch, channels] are one position. Sequences [batch, length, channels] of one length meet token by token,
    padding left out. Maps [batch, channels, height, width] meet at the smaller resolution, the larger one averaged.
    Where the model takes no ``attention_mask``, a sequence meets a map, or a sequence of another length, as the square
    map of its patches, without the class, distillation and register tokens in front. ``channels``: see
    ``channel_axis``. ``who``: the objective, for errors. Raises InputError where there is no way to meet.
    """
    if min(pair.student.ndim, pair.teacher.ndim) < 2 or len(pair.student) != len(pair.teacher):
        raise _apart(pair, who)
    student, teacher = (x.float().movedim(channel_axis(x, channels), 1) for x in (pair.student, pair.teacher))
    if student.shape[2:] == teacher.shape[2:]:
        tokens = pair.student.ndim == 3 and channels != "first"
        counted = forward.counted(pair.student.shape[:2], pair.names[0]) if tokens else None
        return Joined(_flat(student), _flat(teacher), counted)
    if channels != "first" and forward.attention_mask is None:
        student, teacher = _grid(student), _grid(teacher)
    if student.ndim != teacher.ndim or (student.ndim == 3 and channels != "first") or student.ndim - 2 not in _POOLS:
        raise _apart(pair, who)
    size = tuple(min(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True))
    student, teacher = (x if x.shape[2:] == size else _POOLS[len(size)](x, size) for x in (student, teacher))
    return Joined(_flat(student), _flat(teacher))


def join_positions(pair: LayerPair, forward: Forward, who: str, channels: Channels = "auto") -> Joined:
    """The same where one position would say nothing: InputError then."""
    joined = join(pair, forward, who, channels)
    if joined.student.shape[1] == 1:
        raise InputError(
            "these layers have a single position to compare", where=f"{who}: {pair}",
            got=f"student {list(pair.student.shape)}, teacher {list(pair.teacher.shape)}",
            expected="maps or sequences", do="Name layers before pooling",
        )  # fmt: skip
    return joined


def exactly(x: Tensor) -> torch.autocast:
    """Inside, products on the device of ``x`` are float32's: differences of sums of squares need its digits."""
    return torch.autocast(x.device.type, enabled=False)


def channel_axis(x: Tensor, channels: Channels) -> int:
    """Where a layer's output has its channels: "auto" takes the last of up to three axes, axis 1 of more."""
    return -1 if channels == "last" or (channels == "auto" and x.ndim <= 3) else 1


def _flat(x: Tensor) -> Tensor:
    """[batch, channels, …] → [batch, positions, channels]."""
    return x.reshape(*x.shape[:2], -1).transpose(1, 2)


def _grid(x: Tensor) -> Tensor:
    """[batch, channels, length] of patches → their square map, without the tokens in front; else ``x`` as it is."""
    side = math.isqrt(x.shape[2]) if x.ndim == 3 else 0
    prefix = x.shape[2] - side**2 if side else 0
    return x[:, :, prefix:].unflatten(2, (side, side)) if side and prefix in PREFIXES else x


def _apart(pair: LayerPair, who: str) -> InputError:
    return InputError(
        "no projection can join these hidden states", where=f"{who}: {pair}",
        got=f"student {list(pair.student.shape)}, teacher {list(pair.teacher.shape)}",
        expected="vectors [batch, channels], sequences [batch, length, channels] of one length, or maps "
        "[batch, channels, height, width], with one batch",
        do="Name layers whose outputs are alike, or say channels='first' or 'last'",
    )  # fmt: skip
