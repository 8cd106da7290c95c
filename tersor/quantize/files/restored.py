"""A file of packed integers, read as if the numbers that they stand for stood in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.files.dtypes import Bits
from tersor.files.open import PACKED
from tersor.files.weights import Change, Part, Replacement, TensorEntry, WeightsFile, damaged, piece_size
from tersor.quantize.files.rounding import VIEW
from tersor.quantize.files.stored import Stored, read_stored
from tersor.tensor.affine import dequantize
from tersor.tensor.packing import unpack

_TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64,
}  # fmt: skip


@final
class RestoredFile(WeightsFile):
    """``file`` with the tensors that it stores as integers under their own names, shapes and types:

        x̂ = (q − zero_point) · scale, computed in float32.

    ``stored``: those tensors, by name. A file without any is read as it is. Raises InputError where what is stored does
    not fit what the file says of it.
    """

    def __init__(self, file: WeightsFile):
        self._file, self.path, self.stored = file, file.path, read_stored(file)
        self.metadata = {name: said for name, said in file.metadata.items() if not name.startswith(PACKED)}
        self._first = {stored.packed.name: stored for stored in self.stored.values()}
        self._others = {part.name for stored in self.stored.values() for part in stored.parts[1:]}
        kept = [entry for entry in file.tensors if entry.name not in self._others]
        self.tensors = tuple(self._first[e.name].entry if e.name in self._first else e for e in kept)

    def pieces(self, entry: TensorEntry, granule: int = 1) -> Iterator[Bits]:
        """The bits of a tensor: see ``WeightsFile.pieces``."""
        if entry.name in self.stored:
            return self._restored(self.stored[entry.name], granule)
        return self._file.pieces(entry, granule)

    def stored_pieces(self, entry: TensorEntry) -> Iterator[Bits]:
        """The bits of a tensor as the file has them: integers, then scales, then zero points."""
        parts = self.stored[entry.name].parts if entry.name in self.stored else (entry,)
        return (piece for part in parts for piece in self._file.pieces(part))

    def run_of(self, entry: TensorEntry, start: int, count: int) -> Bits | None:
        """``count`` numbers of a tensor from ``start`` on; None of one that is stored as integers."""
        return None if entry.name in self.stored else self._file.run_of(entry, start, count)

    def tensor(self, entry: TensorEntry) -> Tensor:
        """The whole tensor. Raises InputError for a type that PyTorch does not have."""
        if entry.dtype not in _TORCH:
            raise InputError("PyTorch has no such type", where=f"{self.path}, {entry.name}", got=entry.dtype)
        dtype, at = _TORCH[entry.dtype], 0
        found = torch.empty(entry.size, dtype=dtype)
        raw = found.view(torch.uint8).numpy() if entry.size else np.empty(0, np.uint8)
        for piece in self.pieces(entry):
            raw[at : at + piece.nbytes] = piece.view(np.uint8)
            at += piece.nbytes
        if entry.columns_first:
            return found.reshape(entry.shape[::-1]).permute(*reversed(range(len(entry.shape)))).contiguous()
        return found.reshape(entry.shape)

    def rewrite(self, out: Path, change: Change, progress: Progress) -> None:
        """Write the numbers: see ``WeightsFile.rewrite``."""

        def change_stored(entry: TensorEntry) -> Replacement | None:
            if entry.name in self._others:
                return Replacement(())
            stored = self._first.get(entry.name)
            if stored is None:
                return change(entry)
            new = change(stored.entry) or Replacement((Part(stored.entry, partial(self.pieces, stored.entry)),))
            return Replacement(new.parts, {**new.metadata, PACKED + stored.entry.name: None})

        self._file.rewrite(out, change_stored, progress)

    def _restored(self, stored: Stored, granule: int) -> Iterator[Bits]:
        kind = stored.entry.float_bits
        assert kind is not None
        together = math.lcm(stored.row, granule) // stored.row  # rows in a piece are a multiple of it
        rows_at_once = piece_size(kind.unsigned.itemsize, together * stored.row) // stored.row
        streams = [_Stream(self._file.pieces(part)) for part in stored.parts]
        for start in range(0, stored.rows, rows_at_once):
            rows = min(rows_at_once, stored.rows - start)
            step = max(1, VIEW // stored.row)
            views = [self._numbers(stored, streams, min(step, rows - at)) for at in range(0, rows, step)]
            yield torch.cat(views).to(_TORCH[stored.entry.dtype]).view(torch.uint8).numpy().view(kind.unsigned)

    def _numbers(self, stored: Stored, streams: list[_Stream], rows: int) -> Tensor:
        """The next ``rows`` rows, flat, in float32."""
        scheme, row = stored.scheme, stored.row
        packed, *grid = (
            stream.take(rows * part.size // stored.rows) for stream, part in zip(streams, stored.parts, strict=True)
        )
        scale = torch.from_numpy(grid[0].view(np.float32))
        zero_point = torch.from_numpy(grid[1]).int() if len(grid) > 1 else torch.zeros((), dtype=torch.int32)
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise damaged(self.path, f"scales of {stored.entry.name} that are not positive numbers")
        try:
            q = unpack(torch.from_numpy(packed).reshape(rows, -1), scheme.bits, row, signed=scheme.symmetric)
        except ValueError as error:
            raise damaged(self.path, f"{stored.entry.name}: {error}") from error
        runs = q.reshape(len(scale), -1).int()
        return dequantize(runs, scale[:, None], zero_point.reshape(-1, 1)).reshape(-1)


class _Stream:
    """Numbers out of pieces, as many at a time as are asked for."""

    def __init__(self, pieces: Iterator[Bits]):
        self._pieces, self._left = pieces, np.empty(0, np.uint8)

    def take(self, count: int) -> Bits:
        """The next ``count``, in memory of their own."""
        found: list[Bits] = []
        while count:
            if not len(self._left):
                self._left = next(self._pieces)
            found.append(self._left[:count].copy())
            self._left, count = self._left[count:], count - len(found[-1])
        return np.concatenate(found)
