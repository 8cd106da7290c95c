"""How a tensor of integers stands in a file of weights: packed numbers, scales, and a line that says which is which.

A tensor ``w`` [rows, …] becomes ``w.packed``, uint8 [rows, ⌈n · bits / 8⌉], n numbers to a row (``tensor/packing.py``);
``w.scale``, float32 [rows] or [rows, groups]; where zero points are used, ``w.zero_point``, uint8, of the same shape;
and the metadata ``tersor.packed.w``, JSON. docs/artifact-format.md has the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from tersor.core.errors import InputError
from tersor.files.choose import unfit
from tersor.files.dtypes import FLOATS
from tersor.files.open import PACKED
from tersor.files.weights import TensorEntry, WeightsFile, damaged
from tersor.quantize.schemes import Int
from tersor.tensor.packing import packed_bytes

VERSION = 1
LONGEST_ROW = 2**22  # numbers; a row is held in memory
_KEYS = {"version", "dtype", "shape", "bits", "symmetric", "group_size"}


@dataclass(frozen=True)
class Stored:
    """A tensor that is stored as integers. ``entry``: what it was, and what it is again when it is read."""

    entry: TensorEntry
    scheme: Int

    @property
    def rows(self) -> int:
        """Output channels; a tensor of one axis is one row."""
        return self.entry.shape[0] if len(self.entry.shape) > 1 else 1

    @property
    def row(self) -> int:
        """Numbers in a row."""
        return self.entry.size // self.rows

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return 1 if self.scheme.group_size is None else self.row // self.scheme.group_size

    @property
    def packed(self) -> TensorEntry:
        """The integers."""
        width = packed_bytes(self.row, self.scheme.bits)
        return TensorEntry(f"{self.entry.name}.packed", "U8", (self.rows, width), self.rows * width)

    @property
    def scale(self) -> TensorEntry:
        """The scales."""
        return TensorEntry(f"{self.entry.name}.scale", "F32", self._scales, 4 * math.prod(self._scales))

    @property
    def zero_point(self) -> TensorEntry | None:
        """The zero points, where there are any."""
        if self.scheme.symmetric:
            return None
        return TensorEntry(f"{self.entry.name}.zero_point", "U8", self._scales, math.prod(self._scales))

    @property
    def _scales(self) -> tuple[int, ...]:
        return (self.rows,) if self.scheme.group_size is None else (self.rows, self.groups)

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        """All that is stored of it, in order."""
        return tuple(entry for entry in (self.packed, self.scale, self.zero_point) if entry is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def metadata(self) -> dict[str, str]:
        """What the file says of it."""
        scheme = self.scheme
        said = {
            "version": VERSION, "dtype": self.entry.dtype, "shape": list(self.entry.shape), "bits": scheme.bits,
            "symmetric": scheme.symmetric, "group_size": scheme.group_size,
        }  # fmt: skip
        return {PACKED + self.entry.name: json.dumps(said)}


def objection(entry: TensorEntry, scheme: Int | None) -> str | None:
    """Why a tensor cannot be stored so, with the arithmetic; None where it can. Raises InputError where the scheme
    would rather refuse."""
    if scheme is None:
        return "stays in floating point, by its name"
    reason = unfit(entry, "quantised")
    if reason or not entry.shape:
        return reason or "it is a single number"
    if entry.columns_first:
        return "it is stored by columns (Fortran's order), and scales are of rows: save np.ascontiguousarray of it"
    row = Stored(entry, scheme).row
    if row > LONGEST_ROW:
        return f"a row of {row:,} numbers is beyond the {LONGEST_ROW:,} that are held at once"
    return scheme.check(entry.name, (entry.size // row, row)) or None


def read_stored(file: WeightsFile) -> dict[str, Stored]:
    """Name of each tensor that is stored as integers → how. Raises InputError where the file does not hold that."""
    entries = {entry.name: entry for entry in file.tensors}
    found = {}
    for key, text in file.metadata.items():
        if not key.startswith(PACKED):
            continue
        name = key.removeprefix(PACKED)
        try:
            stored = _read(name, json.loads(text))
        except (ValueError, TypeError, KeyError, RecursionError, InputError) as error:
            raise damaged(file.path, f"{key[:100]}: {type(error).__name__}: {error}") from error
        for part in stored.parts:
            if entries.get(part.name) != part:
                raise damaged(file.path, f"{entries.get(part.name, f'no {part.name}')}", expected=str(part))
        if name in entries:
            raise damaged(file.path, f"{name[:100]!r} stands there as integers and as numbers", expected="one of both")
        found[name] = stored
    return found


def _read(name: str, said: Mapping[str, object]) -> Stored:
    if not isinstance(said, dict) or said.keys() != _KEYS or said["version"] != VERSION:
        raise ValueError(f"{str(said)[:100]}: expected version {VERSION} and {', '.join(sorted(_KEYS))}")
    dtype, shape = said["dtype"], said["shape"]
    if dtype not in FLOATS or not isinstance(shape, list) or not all(type(n) is int and 0 < n < 2**63 for n in shape):
        raise ValueError(f"{str(dtype)[:20]} {str(shape)[:60]} is no tensor of numbers")
    if type(said["symmetric"]) is not bool:
        raise ValueError(f"symmetric is {said['symmetric']!r}")
    scheme = Int(said["bits"], symmetric=said["symmetric"], group_size=said["group_size"])
    entry = TensorEntry(name, dtype, tuple(shape), math.prod(shape) * FLOATS[dtype].unsigned.itemsize)
    reason = objection(entry, scheme)
    if reason or scheme.bits > 8:
        raise ValueError(reason or f"{scheme.bits} bits")
    return Stored(entry, scheme)
