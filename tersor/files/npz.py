""".npz files (a zip of .npy files), read and written in pieces; compressed as they were, and never unpickled.

Format: numpy.lib.format. The .npy header of an array whose name, shape and type stay is copied as it is. What the file
says about itself is an array ``__metadata__`` of bytes: the JSON that safetensors has under that name.
"""

from __future__ import annotations

import io
import json
import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, final

import numpy as np
from numpy.lib import format as npy

from tersor.core.errors import InputError
from tersor.core.files import replacing
from tersor.core.progress import Progress
from tersor.files.dtypes import Bits
from tersor.files.safetensors import plain_pairs
from tersor.files.weights import (
    LARGEST_HEADER,
    METADATA,
    Change,
    Part,
    Replacement,
    TensorEntry,
    WeightsFile,
    damaged,
    name_taken,
    piece_size,
    write_behind,
)

_NUMPY = {"BOOL": "|b1", "C64": "<c8"} | {
    f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IUF" for size in (1, 2, 4, 8) if (kind, size) != ("F", 1)
}
_LONGEST_HEADER = 10_000  # bytes, NumPy's own limit
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, NotImplementedError, RuntimeError,
    UnicodeDecodeError,
)  # fmt: skip


@final
class NpzFile(WeightsFile):
    """One .npz file. Raises InputError for one that is damaged, or holds pickled objects or anything but arrays."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, str] = {}
        self._members: dict[str, tuple[zipfile.ZipInfo, bytes, np.dtype[Any]]] = {}
        tensors = []
        with _zip(path) as archive:
            for info in archive.infolist():
                entry, header, dtype = _read_entry(archive, info, path)
                if entry.name in self._members:
                    raise damaged(path, f"{entry.name[:100]!r} stands there twice")
                self._members[entry.name] = (info, header, dtype)
                said = _read_metadata(archive, info, entry, len(header)) if entry.name == METADATA else None
                if said is None:
                    tensors.append(entry)
                else:
                    self.metadata = said
        self.tensors = tuple(tensors)

    def pieces(self, entry: TensorEntry, granule: int = 1) -> Iterator[Bits]:
        """The bits of a tensor: see ``WeightsFile.pieces``."""
        info, header, dtype = self._members[entry.name]
        if entry.float_bits is None:
            dtype = np.dtype(np.uint8)
        count = piece_size(dtype.itemsize, granule)
        with _zip(self.path) as archive, archive.open(info) as stream:
            stream.read(len(header))
            left = entry.nbytes // dtype.itemsize
            while left:
                raw = _read(stream, min(left, count) * dtype.itemsize, self.path)
                piece = np.frombuffer(raw, dtype)
                yield piece.astype(dtype.newbyteorder("="), copy=False)
                left -= len(piece)
            stream.read(1)  # the end of the stream is where zipfile compares the checksum

    def run_of(self, entry: TensorEntry, start: int, count: int) -> None:
        """None: what is compressed can only be read from its beginning."""
        return None

    def rewrite(self, out: Path, change: Change, progress: Progress) -> None:
        """Write the file again, changed: see ``WeightsFile.rewrite``."""
        replacements = self.replacements(change)
        metadata = self.told(replacements)
        sources = list(zip(self.tensors, replacements, strict=True))
        if metadata and self.tensors:
            if any(part.entry.name == METADATA for replacement in replacements for part in replacement.parts):
                raise name_taken(self.path, METADATA)
            sources.append((self.tensors[-1], Replacement((_metadata_part(metadata),))))
        with replacing(out) as file, zipfile.ZipFile(file, "w") as archive:
            for source, replacement in progress.track(sources, f"writing {out.name}", len(sources)):
                for part in replacement.parts:
                    self._write(archive, source, part)

    def _write(self, archive: zipfile.ZipFile, source: TensorEntry, part: Part) -> None:
        """Write a part as the array that it stands for was written: its compression, permissions and date."""
        info, header, dtype = self._members[source.name]
        if part.entry != source:
            header, dtype = _npy_header(part.entry)
        target = zipfile.ZipInfo(f"{part.entry.name}.npy", info.date_time)
        target.compress_type, target.external_attr = info.compress_type, info.external_attr
        target.file_size = len(header) + part.entry.nbytes  # so that zipfile knows whether it needs 64 bits
        with archive.open(target, "w") as stream:
            stream.write(header)
            stored = (p if part.entry.float_bits is None else p.astype(dtype, copy=False) for p in part.pieces())
            write_behind(stream.write, (memoryview(p).cast("B") for p in stored))


@contextmanager
def _zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _DAMAGE as error:
        raise damaged(path, f"{type(error).__name__}: {error}", expected="a zip of .npy files") from error


def _read_entry(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path
) -> tuple[TensorEntry, bytes, np.dtype[Any]]:
    """The tensor, its .npy header as it is stored, and the type whose bits are read (unsigned, in the file's order)."""
    if not info.filename.endswith(".npy"):
        raise damaged(path, f"a member {info.filename[:100]!r}", expected="arrays only, NAME.npy")
    with archive.open(info) as stream:
        try:
            header, (shape, columns_first, dtype) = _read_npy_header(stream)
        except (ValueError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
            raise damaged(path, f"{info.filename[:100]!r}: {type(error).__name__}: {error}") from error
    if dtype.hasobject:
        raise damaged(path, f"{info.filename[:100]!r} holds pickled Python objects", expected="numbers")
    if any(type(side) is not int or not 0 <= side < 2**63 for side in shape):
        raise damaged(path, f"{info.filename[:100]!r} has shape {str(shape)[:60]}")
    nbytes = math.prod(shape) * dtype.itemsize
    if info.file_size != len(header) + nbytes:
        got = f"{info.filename[:100]!r}, {dtype.str} {str(shape)[:60]}, in {info.file_size:,} bytes"
        raise damaged(path, got, expected=f"{len(header) + nbytes:,}")
    entry = TensorEntry(info.filename[: -len(".npy")], _name(dtype), shape, nbytes, columns_first and len(shape) > 1)
    unsigned = dtype if entry.float_bits is None else np.dtype(f"{dtype.byteorder}u{dtype.itemsize}")
    return entry, header, unsigned


def _read_npy_header(stream: IO[bytes]) -> tuple[bytes, tuple[tuple[int, ...], bool, np.dtype[Any]]]:
    start = stream.read(npy.MAGIC_LEN)
    version = npy.read_magic(io.BytesIO(start))
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the .npy format, of which 1.0 and 2.0 can be read")
    width = 2 if version == (1, 0) else 4
    length = stream.read(width)
    said = int.from_bytes(length, "little")
    if said > _LONGEST_HEADER:
        raise ValueError(f"a header of {said:,} bytes, above {_LONGEST_HEADER:,}")
    rest = length + stream.read(said)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    return start + rest, read(io.BytesIO(rest))


def _read_metadata(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, entry: TensorEntry, header: int
) -> dict[str, str] | None:
    """What the file says about itself; None where the array of that name is something else."""
    if entry.dtype != "U8" or entry.nbytes > LARGEST_HEADER:
        return None
    with archive.open(info) as stream:
        stream.read(header)
        try:
            said = json.loads(stream.read(entry.nbytes + 1), object_pairs_hook=plain_pairs)
        except (ValueError, RecursionError):
            return None
    strings = isinstance(said, dict) and all(isinstance(value, str) for value in said.values())
    return said if strings else None


def _metadata_part(metadata: Mapping[str, str]) -> Part:
    text = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    return Part(TensorEntry(METADATA, "U8", text.shape, text.nbytes), lambda: [text])


def _npy_header(entry: TensorEntry) -> tuple[bytes, np.dtype[Any]]:
    """The .npy header of a new array, and the type whose bits are written."""
    if entry.dtype not in _NUMPY:
        raise InputError(
            "NumPy has no such type", where=entry.name, got=entry.dtype, expected="float16, or a file of safetensors"
        )
    dtype = np.dtype(_NUMPY[entry.dtype])
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {
        "descr": npy.dtype_to_descr(dtype), "fortran_order": entry.columns_first, "shape": entry.shape,
    })  # fmt: skip
    return header.getvalue(), np.dtype(f"<u{dtype.itemsize}")


def _name(dtype: np.dtype[Any]) -> str:
    """safetensors' name of the type; NumPy's where it has none."""
    if dtype.kind == "b":
        return "BOOL"
    known = {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8)}
    if dtype.itemsize in known.get(dtype.kind, ()):
        return f"{dtype.kind.upper()}{8 * dtype.itemsize}"
    return "C64" if dtype.str[1:] == "c8" else dtype.str


def _read(stream: IO[bytes], size: int, path: Path) -> bytearray:
    found = bytearray(size)
    view, at = memoryview(found), 0
    while at < size:
        got = stream.readinto(view[at:])  # type: ignore[attr-defined]
        if not got:
            raise damaged(path, f"{at:,} of {size:,} bytes of a tensor", expected="all of them")
        at += got
    return found
