"""The types of numbers in weights files, and floating point by its bits: no type is ever converted on its way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[Any]  # unsigned integers: the bits of the numbers in a file, [n]


@dataclass(frozen=True)
class FloatBits:
    """A floating-point format by its bits; a number of larger magnitude has larger magnitude bits.

    ``unsigned``: the NumPy type that holds the bits. ``infinity``: its magnitude bits; NaNs lie above.
    """

    unsigned: np.dtype[Any]
    infinity: int

    @property
    def magnitude(self) -> Any:
        """The mask of all bits but the sign, as a number of ``unsigned``."""
        return self.unsigned.type(2 ** (8 * self.unsigned.itemsize - 1) - 1)

    def floats(self, bits: Bits) -> NDArray[Any]:
        """The numbers; bfloat16, which NumPy does not have, as float32."""
        if self is FLOATS["BF16"]:
            return (bits.astype(np.uint32) << 16).view(np.float32)
        return bits.view(np.dtype(f"f{bits.dtype.itemsize}"))


FLOATS = {
    "F16": FloatBits(np.dtype(np.uint16), 0x7C00),
    "BF16": FloatBits(np.dtype(np.uint16), 0x7F80),
    "F32": FloatBits(np.dtype(np.uint32), 0x7F80_0000),
    "F64": FloatBits(np.dtype(np.uint64), 0x7FF0_0000_0000_0000),
}

# Bits of one number of each type that safetensors knows.
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
