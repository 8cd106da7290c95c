"""Which integers stand for a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tersor.core.errors import InputError


@dataclass(frozen=True)
class Int:
    """Integers of ``bits`` bits. ``symmetric``: signed, zero point 0; otherwise unsigned with a zero point.

    ``granularity``: one scale for the tensor, or one per output channel (weights only). ``Int(8)`` is what weights take
    and ``Int(8, "per_tensor", symmetric=False)`` what activations take on AMX and VNNI kernels (U8 times S8).
    """

    bits: int = 8
    granularity: Literal["per_channel", "per_tensor"] = "per_channel"
    symmetric: bool = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise InputError("impossible width", where="Int.bits", got=self.bits, expected="a whole number from 2 to 8")
        if self.granularity not in ("per_channel", "per_tensor"):
            raise InputError(
                "unknown granularity",
                where="Int.granularity",
                got=self.granularity,
                expected="per_channel or per_tensor",
            )

    @property
    def quant_min(self) -> int:
        """The smallest integer."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def __str__(self) -> str:
        return f"{'' if self.symmetric else 'u'}int{self.bits} {self.granularity.replace('_', ' ')}"
