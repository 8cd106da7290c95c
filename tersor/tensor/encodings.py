"""Ways to store an array with zeros, and their bytes as really stored. NumPy and torch alike.

Every index is stored in the narrowest of 1, 2, 4 and 8 bytes that its largest value fits. An array of more than two
axes is a matrix [first axis, all others] to CSR and CSC.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace, device, size

from tersor.tensor.masks import n_of_m

Array = Any  # a NumPy array or a torch tensor

N_OF_M = ((1, 4), (2, 4))  # the patterns that are looked for
_LARGEST_GROUP = 256  # a position in it takes a byte


def sizes(array: Array) -> dict[str, int]:
    """Bytes of ``array`` in each encoding, by name (see ``sizes_of``); N:M where it holds along the inputs, and
    ``gaps`` (see ``Gaps``) where less than an eighth is not zero: with more a bitmap is smaller.

    >>> import numpy as np
    >>> sizes(np.array([[0, 1, 0, 2]], dtype=np.float32))
    {'dense': 16, 'bitmap': 9, 'csr': 12, 'csc': 15, 'coo': 12, '2:4': 9}
    """
    xp = array_namespace(array)
    patterns = [(n, m) for n, m in N_OF_M if is_n_of_m(array, n, m)]
    nonzeros = int(xp.count_nonzero(array))
    found = sizes_of(tuple(array.shape), array.dtype.itemsize, nonzeros, patterns)
    if 8 * nonzeros < size(array):
        found["gaps"] = nonzeros * array.dtype.itemsize + gap_bytes(array != 0)
    return found


def sizes_of(
    shape: Sequence[int], itemsize: int, nonzeros: int, patterns: Sequence[tuple[int, int]] = ()
) -> dict[str, int]:
    """Bytes in each encoding of an array of which these facts are known. With N values, K of them not zero, b bytes
    each, and w(v) the bytes of an index up to v:

        dense   N·b
        bitmap  K·b + ⌈N / 8⌉
        csr     K·b + K·w(columns − 1) + (rows + 1)·w(K)
        csc     K·b + K·w(rows − 1) + (columns + 1)·w(K)
        coo     K·b + K·Σ w(axis − 1)
        n:m     N·(n/m)·b + ⌈N·(n/m)·p / 8⌉, the position in its group taking p = 1, 2, 4 or 8 bits; for each of
                ``patterns`` that the array is known to be of, m at most 256

    Shapes, dtypes and names, which every encoding needs, are not counted.
    """
    n = math.prod(shape)
    if not 0 <= nonzeros <= n:
        raise ValueError(f"{nonzeros} nonzeros of {n} values: expected at least 0 and at most {n}")
    values = nonzeros * itemsize
    found = {"dense": n * itemsize, "bitmap": values + -(-n // 8)}
    if shape:
        rows, columns = shape[0], math.prod(shape[1:])
        found["csr"] = values + nonzeros * _width(columns - 1) + (rows + 1) * _width(nonzeros)
        found["csc"] = values + nonzeros * _width(rows - 1) + (columns + 1) * _width(nonzeros)
        found["coo"] = values + nonzeros * sum(_width(axis - 1) for axis in shape)
    for of, m in patterns:
        if m > _LARGEST_GROUP:
            continue
        stored = n * of // m
        found[f"{of}:{m}"] = stored * itemsize + -(-stored * _position_bits(m) // 8)
    return found


def smallest(found: Mapping[str, int]) -> str:
    """The name of the encoding with the fewest bytes; of equals the one named first."""
    return min(found, key=lambda name: found[name])


def is_n_of_m(array: Array, n: int, m: int) -> bool:
    """Whether at most ``n`` of every ``m`` consecutive values along the inputs are not zero.

    Inputs: axis 1 of a weight [out, in, *kernel]; of an array of one axis that axis.
    """
    if not array.shape or not math.prod(array.shape) or array.shape[_inputs(array.shape)] % m:
        return False
    xp = array_namespace(array)
    groups = xp.reshape(_inputs_last(array != 0), (-1, m))
    return bool(xp.all(xp.count_nonzero(groups, axis=-1) <= n))


def _inputs(shape: Sequence[int]) -> int:
    return min(1, len(shape) - 1)


def _inputs_last(array: Array) -> Array:
    """A view with the inputs' axis behind the kernel's."""
    return array_namespace(array).moveaxis(array, _inputs(array.shape), -1)


@dataclass(frozen=True, eq=False)
class Bitmap:
    """An array as its values that are not zero, in order, and a bit for each value that says which those are.

    ``bits``: uint8 [⌈N / 8⌉], the first value in the highest bit (as ``numpy.packbits``). ``values``: [K].
    """

    shape: tuple[int, ...]
    bits: Array
    values: Array

    @classmethod
    def encode(cls, array: Array) -> Bitmap:
        """``array`` encoded; −0.0 is a zero and comes back as 0.0."""
        xp = array_namespace(array)
        flat = xp.reshape(array, (-1,))
        keep = flat != 0
        return cls(tuple(array.shape), _pack(xp.astype(keep, xp.uint8), 1), flat[keep])

    def decode(self) -> Array:
        """The array. Raises ValueError where bits, values and shape do not agree."""
        xp = array_namespace(self.bits, self.values)
        n = math.prod(self.shape)
        keep = _unpack(self.bits, 1, n) != 0
        ones = int(xp.count_nonzero(keep))
        if self.values.shape != (ones,):
            raise ValueError(f"a bitmap with {ones} ones and {list(self.values.shape)} values: they must be as many")
        out = xp.zeros((n,), dtype=self.values.dtype, device=device(self.values))
        out[keep] = self.values
        return xp.reshape(out, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of bits and values."""
        return size(self.bits) + size(self.values) * self.values.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Gaps:
    """An array as its values that are not zero, in order, and how many zeros stand before each: the relative indices
    of Han et al. 2016 (Deep Compression, section 2), but a gap that is too long takes another step, not a zero value.

    ``steps``: see ``gaps``. ``values``: [K].
    """

    shape: tuple[int, ...]
    steps: Array
    values: Array

    @classmethod
    def encode(cls, array: Array) -> Gaps:
        """``array`` encoded; −0.0 is a zero and comes back as 0.0."""
        flat = array_namespace(array).reshape(array, (-1,))
        return cls(tuple(array.shape), gaps(flat != 0), flat[flat != 0])

    def decode(self) -> Array:
        """The array. Raises ValueError where steps, values and shape do not agree."""
        xp = array_namespace(self.steps, self.values)
        keep = places(self.steps, self.shape)
        ones = int(xp.count_nonzero(keep))
        if self.values.shape != (ones,):
            raise ValueError(f"steps to {ones} places and {list(self.values.shape)} values: they must be as many")
        out = xp.zeros(self.shape, dtype=self.values.dtype, device=device(self.values))
        out[keep] = self.values
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of steps and values."""
        return size(self.steps) * self.steps.dtype.itemsize + size(self.values) * self.values.dtype.itemsize


def gaps(keep: Array) -> Array:
    """Where a bool array is true, as steps: uint8 or uint16 [S], whichever takes fewer bytes.

    A step below the largest number L of its type says how many are false before the next that is true; L says L that
    are false and no more. The end counts as one more that is true, so that the steps say how long the array is.
    """
    xp = array_namespace(keep)
    zeros = _zeros_before(keep)
    width = min((1, 2), key=lambda width: _steps(zeros, width) * width)
    most = 256**width - 1
    ends = xp.cumulative_sum(zeros // most + 1) - 1
    steps = xp.full((_steps(zeros, width),), most, dtype=xp.int64, device=device(keep))
    steps[ends] = zeros % most
    return xp.astype(steps, xp.uint8 if width == 1 else xp.uint16)


def gap_bytes(keep: Array) -> int:
    """Bytes of ``gaps`` of a bool array."""
    zeros = _zeros_before(keep)
    return min(_steps(zeros, width) * width for width in (1, 2))


def places(steps: Array, shape: Sequence[int]) -> Array:
    """The bool array of ``shape`` that ``gaps`` made ``steps`` of. Raises ValueError where they do not agree."""
    xp = array_namespace(steps)
    if steps.ndim != 1 or not size(steps) or steps.dtype not in (xp.uint8, xp.uint16):
        raise ValueError(f"{steps.dtype} {list(steps.shape)} are no steps: expected one dimension of uint8 or uint16")
    most = 255 if steps.dtype == xp.uint8 else 65535
    wide = xp.astype(steps, xp.int64)
    reached = xp.cumulative_sum(wide + xp.astype(wide < most, xp.int64))[wide < most] - 1
    n = math.prod(shape)
    if not size(reached) or int(reached[-1]) != n or int(wide[-1]) == most:
        raise ValueError(f"the steps do not end where {list(shape)} does")
    keep = xp.zeros((n,), dtype=xp.bool, device=device(steps))
    keep[reached[:-1]] = True
    return xp.reshape(keep, tuple(shape))


def _zeros_before(keep: Array) -> Array:
    """How many are false before each that is true, and before the end: int64 [K + 1]."""
    xp = array_namespace(keep)
    (ones,) = xp.nonzero(xp.reshape(keep, (-1,)))
    before, end = (xp.asarray([at], dtype=xp.int64, device=device(keep)) for at in (-1, size(keep)))
    at = xp.concat([before, xp.astype(ones, xp.int64), end])
    return at[1:] - at[:-1] - 1


def _steps(zeros: Array, width: int) -> int:
    return int(array_namespace(zeros).sum(zeros // (256**width - 1) + 1))


@dataclass(frozen=True, eq=False)
class NOfM:
    """An array of at most ``n`` nonzeros in every ``m`` consecutive values along the inputs, as n values of each.

    The inputs are those of ``is_n_of_m``; of a convolution, groups are of one kernel position, which come in order.
    ``positions``: uint8, where in its group each value stands, packed at 1, 2, 4 or 8 bits, the first in the highest.
    ``values``: [N · n / m].
    """

    shape: tuple[int, ...]
    n: int
    m: int
    positions: Array
    values: Array

    @classmethod
    def encode(cls, array: Array, n: int, m: int) -> NOfM:
        """``array`` encoded. Raises ValueError where it is not of the pattern, or m is above 256."""
        bits = _position_bits(m)
        if not is_n_of_m(array, n, m):
            raise ValueError(f"{list(array.shape)} is not {n}:{m}: more than {n} of some {m} consecutive inputs")
        xp = array_namespace(array)
        groups = xp.reshape(_inputs_last(array), (-1, m))
        keep = n_of_m(xp.astype(groups != 0, xp.float32), n, m)
        places = xp.broadcast_to(xp.arange(m, dtype=xp.uint8, device=device(array)), tuple(groups.shape))
        return cls(tuple(array.shape), n, m, _pack(places[keep], bits), groups[keep])

    def decode(self) -> Array:
        """The array. Raises ValueError where positions, values and shape do not agree."""
        xp = array_namespace(self.positions, self.values)
        n, m = self.n, self.m
        stored = math.prod(self.shape) * n // m
        if self.values.shape != (stored,):
            raise ValueError(f"{n}:{m} of {list(self.shape)} with {list(self.values.shape)} values: expected {stored}")
        places = xp.reshape(_unpack(self.positions, _position_bits(m), stored), (-1, n))
        if n > 1 and not bool(xp.all(places[:, 1:] > places[:, :-1])):
            raise ValueError(f"{n}:{m} with positions that do not increase within their group")
        grid = xp.arange(m, dtype=xp.uint8, device=device(self.values))
        keep = xp.any(places[:, :, None] == grid, axis=1)
        out = xp.zeros(self.shape, dtype=self.values.dtype, device=device(self.values))
        inputs_last = _inputs_last(out)
        inputs_last[xp.reshape(keep, tuple(inputs_last.shape))] = self.values
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of positions and values."""
        return size(self.positions) + size(self.values) * self.values.dtype.itemsize


def _width(largest: int) -> int:
    return next(width for width in (1, 2, 4, 8) if largest < 256**width)


def _position_bits(m: int) -> int:
    if not 1 <= m <= _LARGEST_GROUP:
        raise ValueError(f"m={m}: positions in groups of 1 to {_LARGEST_GROUP} can be stored")
    return next(bits for bits in (1, 2, 4, 8) if m <= 2**bits)


def _pack(small: Array, bits: int) -> Array:
    """uint8 numbers below 2^bits [n] → uint8 [⌈n · bits / 8⌉]."""
    xp = array_namespace(small)
    each = 8 // bits
    padding = xp.zeros((-small.shape[0] % each,), dtype=xp.uint8, device=device(small))
    columns = xp.reshape(xp.concat([small, padding]), (-1, each))
    packed = xp.zeros((columns.shape[0],), dtype=xp.uint8, device=device(small))
    for i in range(each):
        packed |= columns[:, i] << (8 - bits * (i + 1))
    return packed


def _unpack(packed: Array, bits: int, n: int) -> Array:
    """The inverse of ``_pack``. Raises ValueError unless ``packed`` holds exactly n numbers and zeros behind them."""
    xp = array_namespace(packed)
    if packed.shape != (-(-n * bits // 8),) or packed.dtype != xp.uint8:
        raise ValueError(f"{packed.dtype} {list(packed.shape)} for {n} numbers of {bits} bits: expected uint8")
    shifts = [(packed >> (8 - bits * (i + 1))) & (2**bits - 1) for i in range(8 // bits)]
    flat = xp.reshape(xp.stack(shifts, axis=-1), (-1,))
    if bool(xp.any(flat[n:] != 0)):
        raise ValueError("the bits behind the last number are not zero")
    return flat[:n]
