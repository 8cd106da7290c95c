"""Which integers stand for a tensor, and how many scales they have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tersor.core.errors import InputError


@dataclass(frozen=True)
class Int:
    """Integers of ``bits`` bits. ``symmetric``: signed, zero point 0; otherwise unsigned with a zero point.

    ``bits``: 2 to 8, or 16 (activations only). ``granularity``: one scale for the tensor, or one per output channel
    (weights only). ``group_size``: one scale for each run of so many consecutive weights of an output channel, its
    inputs flattened. ``indivisible``: where that does not divide a channel's weights, the method skips the layer, or
    refuses. ``Int(8)`` is what weights take and ``Int(8, "per_tensor", symmetric=False)`` what activations take on AMX
    and VNNI kernels (U8 times S8).
    """

    bits: int = 8
    granularity: Literal["per_channel", "per_tensor"] = "per_channel"
    symmetric: bool = True
    group_size: int | None = None
    indivisible: Literal["skip", "refuse"] = "skip"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not (2 <= self.bits <= 8 or self.bits == 16):
            raise InputError(
                "impossible width", where="Int.bits", got=repr(self.bits), expected="a whole number from 2 to 8, or 16"
            )
        if self.granularity not in ("per_channel", "per_tensor"):
            raise InputError(
                "unknown granularity",
                where="Int.granularity",
                got=self.granularity,
                expected="per_channel or per_tensor",
            )
        if self.indivisible not in ("skip", "refuse"):
            raise InputError("unknown policy", where="Int.indivisible", got=self.indivisible, expected="skip or refuse")
        if type(self.symmetric) is not bool:
            raise InputError("neither true nor false", where="Int.symmetric", got=repr(self.symmetric))
        if self.group_size is None:
            return
        if type(self.group_size) is not int or self.group_size < 2 or self.granularity == "per_tensor":
            raise InputError(
                "impossible groups", where="Int.group_size", got=f"{self.group_size!r}, {self.granularity}",
                expected='a whole number of at least 2, with "per_channel"',
            )  # fmt: skip

    @property
    def quant_min(self) -> int:
        """The smallest integer."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def check(self, where: str, shape: Sequence[int], axis: int = 0) -> str:
        """Why a weight of this ``shape``, output channels along ``axis``, cannot bear the scheme; "" where it can.

        Raises InputError instead, naming ``where``, if the scheme says ``indivisible="refuse"``.
        """
        row, size = math.prod(n for d, n in enumerate(shape) if d != axis % len(shape)), self.group_size
        if size is None or row % size == 0:
            return ""
        arithmetic = (
            f"group_size {size} does not divide its {row} weights per output channel "
            f"({row} = {row // size} · {size} + {row % size})"
        )
        if self.indivisible == "skip":
            return arithmetic
        use = sorted(sorted(_divisors(row), key=lambda n: abs(math.log(n / size)))[:2])
        fits = f"Use {' or '.join(map(str, use))}, leave it out" if use else "Leave it out"
        raise InputError(
            arithmetic, where=f"{where} {list(shape)}", got=size, expected=f"a divisor of {row}",
            do=f"{fits}, or indivisible='skip'",
        )  # fmt: skip

    def __str__(self) -> str:
        scales = self.granularity.replace("_", " ") if self.group_size is None else f"groups of {self.group_size}"
        return f"{'' if self.symmetric else 'u'}int{self.bits} {scales}"


def _divisors(number: int) -> list[int]:
    """All but 1, growing."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)} - {1})
