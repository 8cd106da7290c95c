"""safetensors files, read and written in pieces. Format: github.com/huggingface/safetensors, README, "Format".

8 bytes n (little endian), n bytes of JSON {name: {dtype, shape, data_offsets}, "__metadata__": {…}}, then the data:
each tensor's bytes, little endian, without holes or overlaps. Where names, shapes and types stay, the header is copied
as it is, so that a rewritten file differs from its source in the bits that were changed and in nothing else. Where they
change, tensors are laid out by falling size of their numbers, as the reference does, so that each begins on a multiple
of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import IO, Any, final

import numpy as np

from tersor.core.errors import InputError
from tersor.core.files import replacing
from tersor.core.progress import Progress
from tersor.files.dtypes import BITS, Bits
from tersor.files.weights import (
    LARGEST_HEADER,
    METADATA,
    Change,
    Part,
    TensorEntry,
    WeightsFile,
    damaged,
    piece_size,
    write_behind,
)

_MOST_AXES = 64


@final
class SafetensorsFile(WeightsFile):
    """One safetensors file. Raises InputError for a header that breaks a rule of the format, saying which."""

    def __init__(self, path: Path):
        self.path = path
        self._header = _read_header(path)
        self._data = 8 + len(self._header)
        described = _parse(self._header, path)
        self.metadata = _metadata(described.pop(METADATA, {}), path)
        placed = sorted(((_entry(name, said, path)) for name, said in described.items()), key=lambda found: found[0])
        _expect_no_holes(placed, path.stat().st_size - self._data, path)
        self.tensors = tuple(entry for _, entry in placed)
        self._starts = {entry.name: start for (start, _), entry in placed}

    def pieces(self, entry: TensorEntry, granule: int = 1) -> Iterator[Bits]:
        """The bits of a tensor: see ``WeightsFile.pieces``."""
        dtype = _bits_of(entry)
        left = entry.nbytes // dtype.itemsize
        length = min(left, piece_size(dtype.itemsize, granule))
        buffers = cycle([np.empty(length, dtype) for _ in range(2 if length < left else 1)])
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._data + self._starts[entry.name])
            while left:
                piece = next(buffers)[:left]
                _fill(file, memoryview(piece).cast("B"), self.path)
                yield piece
                left -= len(piece)

    def run_of(self, entry: TensorEntry, start: int, count: int) -> Bits:
        """``count`` numbers of a tensor from ``start`` on."""
        found = np.empty(count, _bits_of(entry))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._data + self._starts[entry.name] + start * found.itemsize)
            _fill(file, memoryview(found).cast("B"), self.path)
        return found

    def rewrite(self, out: Path, change: Change, progress: Progress) -> None:
        """Write the file again, changed: see ``WeightsFile.rewrite``."""
        replacements = self.replacements(change)
        parts = [part for replacement in replacements for part in replacement.parts]
        metadata, header, starts = self.told(replacements), self._header, self._starts
        if [part.entry for part in parts] != list(self.tensors) or metadata != self.metadata:
            header, starts = _lay_out([part.entry for part in parts], metadata, out)
        with replacing(out) as file:

            def write(placed: tuple[int, Bits]) -> None:
                file.seek(placed[0])
                file.write(memoryview(placed[1]).cast("B"))

            file.write(len(header).to_bytes(8, "little") + header)
            tracked = progress.track(parts, f"writing {out.name}", len(parts))
            write_behind(write, _placed(tracked, {name: 8 + len(header) + at for name, at in starts.items()}))


def _placed(parts: Iterable[Part], starts: Mapping[str, int]) -> Iterator[tuple[int, Bits]]:
    """Each piece, and where in the file it belongs."""
    for part in parts:
        at = starts[part.entry.name]
        for piece in part.pieces():
            yield at, piece
            at += piece.nbytes
        missing = starts[part.entry.name] + part.entry.nbytes - at
        assert not missing, f"{part.entry}: {missing} bytes too few"


def _lay_out(entries: Sequence[TensorEntry], metadata: Mapping[str, str], out: Path) -> tuple[bytes, dict[str, int]]:
    """A header, and where in the data each tensor begins."""
    starts: dict[str, int] = {}
    described: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    at = 0
    for entry in sorted(entries, key=lambda entry: -BITS[entry.dtype]):
        starts[entry.name] = at
        described[entry.name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + entry.nbytes],
        }  # fmt: skip
        at += entry.nbytes
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > LARGEST_HEADER:
        expected = f"at most {LARGEST_HEADER:,}"
        raise InputError("the header would be too long", where=str(out), got=f"{len(header):,}", expected=expected)
    return header, starts


def _read_header(path: Path) -> bytes:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            expected = f"at most {min(max(size - 8, 0), LARGEST_HEADER):,} (the file has {size:,})"
            raise damaged(path, f"a header of {length:,} bytes", expected=expected)
        header = file.read(length)
    if len(header) != length:
        raise damaged(path, f"{len(header):,} bytes of a header of {length:,}")
    return header


def _parse(header: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(header.decode("utf-8"), object_pairs_hook=plain_pairs)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"a header that is no JSON: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise damaged(path, f"a header that is a {type(found).__name__}", expected="a JSON object")
    return found


def plain_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object for ``json.loads``. Raises ValueError for a name twice, and for half of a character ("\\ud800")."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        for text in (name, value):
            if isinstance(text, str):
                text.encode()  # half of one cannot be written anywhere
        if name in found:
            raise ValueError(f"{name[:100]!r} stands there twice")
        found[name] = value
    return found


def _metadata(said: Any, path: Path) -> Mapping[str, str]:
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise damaged(path, f"{METADATA} {str(said)[:100]}", expected="an object of strings")
    return said


def _entry(name: str, said: Any, path: Path) -> tuple[tuple[int, int], TensorEntry]:
    """(first byte, byte behind the last), and the tensor."""
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{name[:100]!r} is {str(said)[:100]}", expected="dtype, shape and data_offsets")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise damaged(path, f"{name[:100]!r} has dtype {str(dtype)[:40]!r}", expected=f"one of {', '.join(BITS)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > _MOST_AXES:
        raise damaged(path, f"{name[:100]!r} has shape {str(shape)[:60]}, data_offsets {str(offsets)[:60]}")
    needed, rest = divmod(math.prod(shape) * BITS[dtype], 8)
    if rest or offsets[1] - offsets[0] != needed:
        got = f"{name[:100]!r}, {dtype} {str(shape)[:60]}, with bytes {offsets[0]} to {offsets[1]}"
        raise damaged(path, got, expected=f"{str(needed)[:30]} bytes")
    return (offsets[0], offsets[1]), TensorEntry(name, dtype, tuple(shape), needed)


def _are_sizes(said: Any) -> bool:
    return isinstance(said, list) and all(type(n) is int and 0 <= n < 2**63 for n in said)


def _expect_no_holes(placed: list[tuple[tuple[int, int], TensorEntry]], available: int, path: Path) -> None:
    at = 0
    for (start, end), entry in placed:
        if start != at:
            raise damaged(path, f"{entry.name[:100]!r} begins at byte {start} of the data", expected=str(at))
        at = end
    if at != available:
        raise damaged(path, f"{available:,} bytes of data", expected=f"{at:,}, as the header says")


def _bits_of(entry: TensorEntry) -> np.dtype[Any]:
    return np.dtype(np.uint8) if entry.float_bits is None else entry.float_bits.unsigned.newbyteorder("<")


def _fill(file: IO[bytes], view: memoryview, path: Path) -> None:
    while len(view):
        got = file.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise damaged(path, "the end of the file while it was read", expected="a file that nobody changes")
        view = view[got:]
