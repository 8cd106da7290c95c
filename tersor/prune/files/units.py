"""What goes as one in a weights file, piece by piece: single weights, n of every m, blocks. On bits, never on tensors.

A weight is [out, in, *kernel], as PyTorch stores linear layers and convolutions: N:M runs along the inputs (of a
convolution: the input channels at one kernel position), a block spans outputs × inputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import numpy as np
from numpy.typing import NDArray

from tersor.core.errors import InputError
from tersor.files.choose import unfit
from tersor.files.dtypes import FLOATS, Bits, FloatBits
from tersor.files.weights import TensorEntry
from tersor.prune.sparse.patterns import NM, Block, Element, Pattern
from tersor.tensor import masks
from tersor.tensor.threshold import Keys, Threshold, smallest


class Units(ABC):
    """The units of one tensor. ``granule``: numbers of the tensor that must be seen together; ``count``: of units."""

    granule: int
    count: int

    @abstractmethod
    def keys(self, bits: Bits) -> Keys:
        """The rank of each unit in a piece, an unsigned integer: below ``ceiling_of`` where all is finite, and 0 where
        all is zero."""

    @abstractmethod
    def keep(self, keys: Keys, threshold: Threshold) -> tuple[NDArray[np.bool_], Threshold]:
        """By the keys of a piece: which of its numbers stay, and the threshold for the pieces behind it."""


@final
class SingleWeights(Units):
    """Each weight is a unit; its rank is the bits of its magnitude. ``as_double``: of its magnitude as float64, which
    is exact, so that tensors of several types can be compared."""

    def __init__(self, entry: TensorEntry, as_double: bool):
        self.granule, self.count = 1, entry.size
        self._kind, self._as_double = _kind(entry), as_double

    def keys(self, bits: Bits) -> Keys:
        """One for each number."""
        magnitudes = bits & self._kind.magnitude
        return self._kind.floats(magnitudes).astype(np.float64).view(np.uint64) if self._as_double else magnitudes

    def keep(self, keys: Keys, threshold: Threshold) -> tuple[NDArray[np.bool_], Threshold]:
        """All that are not among the smallest."""
        gone, rest = smallest(keys, threshold)
        return np.logical_not(gone, out=gone), rest


@final
class Blocks(Units):
    """Each block is a unit; its rank is the bits of its mean magnitude, computed in float64 and rounded to float32
    (``as_double``: not rounded)."""

    def __init__(self, entry: TensorEntry, shape: tuple[int, int], as_double: bool):
        self._shape, self._rest, self._of = shape, entry.shape[1:], math.prod(shape)
        self.granule = shape[0] * math.prod(self._rest)
        self.count = entry.size // self._of
        self._kind = _kind(entry)
        self._rank = FLOATS["F64" if as_double else "F32"]

    def keys(self, bits: Bits) -> Keys:
        """One for each block, block row by block row."""
        parts = (
            self._kind.floats(bits & self._kind.magnitude).astype(np.float64) / self._of
        )  # their sum cannot overflow
        means = masks.blocks(parts.reshape(-1, *self._rest), self._shape)
        return means.astype(f"f{self._rank.unsigned.itemsize}").view(self._rank.unsigned).reshape(-1)

    def keep(self, keys: Keys, threshold: Threshold) -> tuple[NDArray[np.bool_], Threshold]:
        """All whose block is not among the smallest."""
        gone, rest = smallest(keys, threshold)
        blocks = ~gone.reshape(-1, self._rest[0] // self._shape[1], *self._rest[1:])
        like = np.broadcast_to(np.False_, (len(blocks) * self._shape[0], *self._rest))
        return masks.spread(blocks, self._shape, like).reshape(-1), rest


@final
class Groups(Units):
    """N:M: every m consecutive inputs compete among themselves, so that no threshold is needed."""

    def __init__(self, entry: TensorEntry, n: int, m: int):
        self._n, self._m, self._kernel = n, m, math.prod(entry.shape[2:])
        self.granule, self.count = m * self._kernel, entry.size // m
        self._kind = _kind(entry)

    def keys(self, bits: Bits) -> Keys:
        """One for each number."""
        return bits & self._kind.magnitude

    def keep(self, keys: Keys, threshold: Threshold) -> tuple[NDArray[np.bool_], Threshold]:
        """The n largest of every m."""
        groups = keys.reshape(-1, self._m, self._kernel)
        return masks.n_of_m(groups, self._n, self._m, axis=1).reshape(-1), threshold


def _kind(entry: TensorEntry) -> FloatBits:
    assert entry.float_bits is not None, f"objection() knows that {entry} cannot be pruned"
    return entry.float_bits


def expect_pattern_of_files(pattern: Pattern) -> None:
    """Raises InputError for a pattern that only models can have."""
    if not isinstance(pattern, (Element, NM, Block)) or pattern == Element(per_row=True):
        raise InputError(
            "the pattern is for models only",
            where="pattern",
            got=pattern,
            expected="Element(), NM(n, m) or Block(r, c)",
        )


def units_of(entry: TensorEntry, pattern: Pattern, as_double: bool) -> Units:
    """The units of a tensor that ``objection`` has nothing against."""
    match pattern:
        case NM():
            return Groups(entry, pattern.n, pattern.m)
        case Block():
            return Blocks(entry, (pattern.rows, pattern.columns), as_double)
        case _:
            return SingleWeights(entry, as_double)


def ceiling_of(pattern: Pattern, dtypes: set[str]) -> tuple[bool, int]:
    """(whether ranks are bits of float64, the rank of infinity) where tensors of these types are ranked together."""
    as_double = "F64" in dtypes if isinstance(pattern, Block) else len(dtypes) > 1
    if as_double:
        return True, FLOATS["F64"].infinity
    return False, FLOATS["F32"].infinity if isinstance(pattern, Block) else FLOATS[next(iter(dtypes))].infinity


def objection(entry: TensorEntry, pattern: Pattern) -> str | None:
    """Why a tensor cannot be pruned by a pattern, with the arithmetic; None where it can."""
    reason = unfit(entry, "pruned")
    if reason or isinstance(pattern, Element):
        return reason
    if len(entry.shape) < 2:
        return f"{pattern} needs outputs and inputs, and its shape is {list(entry.shape)}"
    if entry.columns_first:
        return f"it is stored by columns (Fortran's order), and {pattern} needs rows: save np.ascontiguousarray of it"
    return pattern.objection(entry.shape)
