"""Integers of 2 to 8 bits packed into bytes without gaps. NumPy and torch alike.

Along the last axis the numbers are one stream of bits, the first number in the lowest bits of the first byte: two
numbers of 4 bits are low nibble, high nibble (as ONNX Runtime's MatMulNBits reads them), and eight of 3 bits are three
bytes. Each row of the last axis begins on a byte of its own; the bits behind its last number are zero.
"""

from __future__ import annotations

import math
from typing import Any

from array_api_compat import array_namespace, device

Array = Any  # a NumPy array or a torch tensor


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that ``n`` numbers of ``bits`` bits take: ⌈n · bits / 8⌉."""
    return -(-n * bits // 8)


def pack(q: Array, bits: int, *, signed: bool = False) -> Array:
    """Integers [..., n] from 0 to 2^bits − 1, or from −2^(bits − 1) if ``signed`` → uint8 [..., ⌈n · bits / 8⌉].

    What is stored of a signed q is q + 2^(bits − 1): its zero is MatMulNBits' zero point. Raises ValueError where
    ``bits`` is not 2 to 8 or a number is out of range.

    >>> import numpy as np
    >>> pack(np.array([1, 2, 15]), 4).tolist(), pack(np.array([-8, 7]), 4, signed=True).tolist()
    ([33, 15], [240])
    """
    xp = array_namespace(q)
    period, each = _period(bits)
    lowest = -(2 ** (bits - 1)) if signed else 0
    if math.prod(q.shape) and not (int(xp.min(q)) >= lowest and int(xp.max(q)) < lowest + 2**bits):
        raise ValueError(
            f"integers from {int(xp.min(q))} to {int(xp.max(q))} for {bits} bits: "
            f"expected {lowest} to {lowest + 2**bits - 1}"
        )
    *outer, n = q.shape
    stored = xp.astype(xp.astype(q, xp.int16) - lowest, xp.uint8)
    gap = xp.zeros((*outer, -n % period), dtype=xp.uint8, device=device(q))
    columns = xp.reshape(xp.concat([stored, gap], axis=-1), (*outer, -(-n // period), period))
    packed = xp.zeros((*columns.shape[:-1], each), dtype=xp.uint8, device=device(q))
    for i in range(period):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= columns[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= columns[..., i] >> (8 - shift)
    return xp.reshape(packed, (*outer, columns.shape[-2] * each))[..., : packed_bytes(n, bits)]


def unpack(packed: Array, bits: int, n: int, *, signed: bool = False) -> Array:
    """The inverse of ``pack``: [..., n], uint8, or int8 if ``signed``.

    Raises ValueError unless the last axis holds exactly ``n`` numbers, and zeros behind them.

    >>> import numpy as np
    >>> unpack(np.array([240], dtype=np.uint8), 4, 2, signed=True).tolist()
    [-8, 7]
    """
    xp = array_namespace(packed)
    period, each = _period(bits)
    if packed.ndim < 1 or packed.shape[-1] != packed_bytes(n, bits) or packed.dtype != xp.uint8:
        raise ValueError(
            f"{packed.dtype} {list(packed.shape)} for {n} numbers of {bits} bits: "
            f"expected uint8 [..., {packed_bytes(n, bits)}]"
        )
    *outer, held = packed.shape
    gap = xp.zeros((*outer, -held % each), dtype=xp.uint8, device=device(packed))
    columns = xp.reshape(xp.concat([packed, gap], axis=-1), (*outer, -(-held // each), each))
    numbers = []
    for i in range(period):
        byte, shift = divmod(i * bits, 8)
        number = columns[..., byte] >> shift
        if shift + bits > 8:
            number = number | (columns[..., byte + 1] << (8 - shift))
        numbers.append(number & (2**bits - 1))
    flat = xp.reshape(xp.stack(numbers, axis=-1), (*outer, columns.shape[-2] * period))
    if bool(xp.any(flat[..., n:] != 0)):
        raise ValueError("the bits behind the last number are not zero")
    flat = flat[..., :n]
    return xp.astype(xp.astype(flat, xp.int16) - 2 ** (bits - 1), xp.int8) if signed else flat


def _period(bits: int) -> tuple[int, int]:
    """(numbers, bytes) after which numbers begin on a whole byte again."""
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"{bits} bits: numbers of 2 to 8 bits can be packed")
    common = math.gcd(bits, 8)
    return 8 // common, bits // common
