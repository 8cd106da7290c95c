"""Records of equal size on disk, one for each numbered slot: memory-mapped, believed only where they prove right."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.core.files import write_atomically
from tersor.core.row_hash import row_hash

SCHEMA, RECORDS, LOCK = "schema.json", "records.bin", ".lock"
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_HEAD = 16  # bytes: the hash of the input that a record answers, and its checksum
_DTYPES = {"float16": torch.float16, "float32": torch.float32, "int32": torch.int32, "int64": torch.int64}


@dataclass(frozen=True)
class Column:
    """A named part of every record: a tensor of ``shape`` (without the batch) and ``dtype``."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes in a record, filled up to a multiple of 8."""
        bytes_ = math.prod(self.shape) * _DTYPES[self.dtype].itemsize
        return -(-bytes_ // 8) * 8

    @classmethod
    def of(cls, name: str, rows: Tensor) -> Column:
        """What keeps ``rows`` [batch, …]."""
        return cls(name, tuple(rows.shape[1:]), str(rows.dtype).removeprefix("torch."))


class Records:
    """The records of one ``schema.json``, for the first ``slots`` slots.

    A record is the hash of the input that it answers, a checksum of everything in it, of its slot and of the schema's
    salt, and its columns. One that is torn, damaged, misplaced, of another input or of another salt is not found; it
    needs no order of writing, so that a process may be killed, and others write the same file, at any time.
    """

    def __init__(self, folder: Path, columns: tuple[Column, ...], salt: int, slots: int):
        self.folder, self.columns, self.salt, self.slots = folder, columns, salt, slots
        self.size = _HEAD + sum(column.size for column in columns)
        self._seed = zlib.crc32(f"{salt} {columns}".encode())
        self._file: int | None = None
        self._closing = ExitStack()
        weakref.finalize(self, self._closing.close)
        lock = self._opened(folder / LOCK, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_SH)  # who makes room leaves this folder alone, until it is closed
        path = folder / RECORDS
        try:
            self._file = self._opened(path, os.O_RDWR)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            # What is there is still read.
            self.slots = min(self.slots, path.stat().st_size // self.size)
        else:
            if os.fstat(self._file).st_size < self.slots * self.size:
                os.truncate(self._file, self.slots * self.size)  # takes no room until something is written
        shape = self.slots, self.size
        self._map = np.memmap(path, np.uint8, "r", shape=shape) if self.slots else np.zeros(shape, np.uint8)

    def _opened(self, path: Path, flags: int) -> int:
        descriptor = os.open(path, flags)
        self._closing.callback(os.close, descriptor)
        return descriptor

    @property
    def writable(self) -> bool:
        """Whether anything can be written."""
        return self._file is not None

    @property
    def bytes(self) -> int:
        """What the records take on disk."""
        return (self.folder / RECORDS).stat().st_blocks * 512

    def close(self) -> None:
        """Let go of the files; nothing can be read or written any more."""
        self._closing.close()
        self._file, self._map, self.slots = None, np.zeros((0, self.size), np.uint8), 0

    def read(
        self, slots: NDArray[np.int64], inputs: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], int, dict[str, Tensor]]:
        """Which of these slots hold an answer to these inputs, how many hold anything else, and the columns found.

        ``slots``, ``inputs`` (hashes): [batch]. Columns: [found, …], in the order of the batch.
        """
        inside = np.nonzero(slots < self.slots)[0]
        rows = np.asarray(self._map[slots[inside]])
        heads = rows[:, :_HEAD].copy().view(np.int64)
        right = (heads[:, 1] == self._checksums(rows, slots[inside])) & (heads[:, 0] == inputs[inside])
        found = np.zeros(len(slots), dtype=bool)
        found[inside[right]] = True
        others = int((heads.any(axis=1) & ~right).sum())
        return found, others, self._columns(rows[right])

    def _columns(self, rows: NDArray[np.uint8]) -> dict[str, Tensor]:
        found, start = {}, _HEAD
        for column in self.columns:
            size = math.prod(column.shape) * _DTYPES[column.dtype].itemsize
            raw = rows[:, start : start + size].tobytes()
            values = np.frombuffer(bytearray(raw), column.dtype).reshape(len(rows), *column.shape)
            found[column.name] = torch.from_numpy(values)
            start += column.size
        return found

    def fits(self, columns: Mapping[str, Tensor]) -> bool:
        """Whether these rows are of the shapes and types that are kept here."""
        return tuple(Column.of(name, rows) for name, rows in columns.items()) == self.columns

    def write(self, slots: NDArray[np.int64], inputs: NDArray[np.int64], columns: Mapping[str, Tensor]) -> int:
        """Keep the rows of ``columns`` [batch, …], which fit; returns how many: slots beyond the last have no room.

        Raises OSError where the disk is full or the files cannot be written; what is torn then is not found later.
        """
        inside = np.nonzero(slots < self.slots)[0]
        if not len(inside):
            return 0
        rows = np.zeros((len(inside), self.size), dtype=np.uint8)
        start = _HEAD
        for column in self.columns:
            values = columns[column.name][torch.from_numpy(inside)].contiguous()
            raw = values.reshape(len(inside), -1).view(torch.uint8).numpy()
            rows[:, start : start + raw.shape[1]] = raw
            start += column.size
        rows[:, :8] = inputs[inside].reshape(-1, 1).copy().view(np.uint8)
        rows[:, 8:_HEAD] = self._checksums(rows, slots[inside]).reshape(-1, 1).view(np.uint8)
        assert self._file is not None, "was asked"
        for slot, row in zip(slots[inside].tolist(), rows, strict=True):
            if os.pwrite(self._file, row.data, slot * self.size) < self.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(inside)

    def _checksums(self, rows: NDArray[np.uint8], slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Never 0, which is what an empty slot holds: [batch]."""
        rest = row_hash(torch.from_numpy(rows[:, _HEAD:].copy()), self._seed).numpy()
        first = row_hash(torch.from_numpy(rows[:, :8].copy()), self._seed + 1).numpy()
        with np.errstate(over="ignore"):
            mixed = rest ^ (first * np.int64(0x5851F42D4C957F2D)) ^ ((slots + 1) * np.int64(0x2545F4914F6CDD1D))
        return mixed ^ np.int64(self._seed << 31) | np.int64(1)


class Shelf:
    """The folder of a cache: a folder of records for each key, all together within ``budget`` bytes.

    Every method may raise OSError, where the folder cannot be read or written.
    """

    def __init__(self, folder: Path, budget: int):
        self.folder, self.budget = folder, budget

    def find(self, key: str, slots: int) -> Records | None:
        """The records of this key; None where there are none, a file is missing, or the schema is damaged."""
        schema = _read_schema(self.folder / key / SCHEMA)
        if schema is None:
            return None
        columns, salt = schema
        try:
            with self._locked():
                return Records(self.folder / key, columns, salt, self._room(key, slots, columns))
        except FileNotFoundError:  # a process was killed while it made room
            return None
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            return Records(self.folder / key, columns, salt, slots)

    def create(self, key: str, columns: tuple[Column, ...], slots: int) -> Records:
        """Records of this key, those that another process has just made if they are alike. Room is made for them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            room = self._room(key, slots, columns)
            (self.folder / key).mkdir(exist_ok=True)
            for name in (LOCK, RECORDS):
                (self.folder / key / name).touch()
            found = _read_schema(self.folder / key / SCHEMA)
            if found is None or found[0] != columns:
                found = columns, _write_schema(self.folder / key / SCHEMA, columns)
            return Records(self.folder / key, columns, found[1], room)

    def renew(self, records: Records) -> Records:
        """The same records, all of them empty: with another salt, none that was written is found."""
        with self._locked():
            salt = _write_schema(records.folder / SCHEMA, records.columns)
            new = Records(records.folder, records.columns, salt, records.slots)
        records.close()
        return new

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / LOCK, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _room(self, key: str, slots: int, columns: tuple[Column, ...]) -> int:
        """How many slots fit, after what nobody uses has been removed as far as needed, the oldest first."""
        size = _HEAD + sum(column.size for column in columns)
        others = sorted(self._others(key), key=lambda path: path.stat().st_mtime)
        taken = {path: _taken(path) for path in others}
        for path in others:
            if sum(taken.values()) + slots * size <= self.budget:
                break
            if _removed(path):
                del taken[path]
        return max(0, min(slots, (self.budget - sum(taken.values())) // size))

    def _others(self, key: str) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.name != key and (path / LOCK).is_file()]


def _taken(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def _removed(folder: Path) -> bool:
    """Remove a folder of records, unless a process uses it."""
    with open(folder / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        for name in (RECORDS, SCHEMA):  # before the lock, by which a folder is known that a kill left half removed
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder)
    return True


def _write_schema(path: Path, columns: tuple[Column, ...]) -> int:
    """Write how records are read, with a new salt, which is returned."""
    salt = secrets.randbits(31)
    body: dict[str, Any] = {"salt": salt, "columns": [[c.name, list(c.shape), c.dtype] for c in columns]}
    write_atomically(path, json.dumps({"body": body, "sha256": _digest(body)}, indent=1).encode())
    return salt


def _read_schema(path: Path) -> tuple[tuple[Column, ...], int] | None:
    try:
        stored = json.loads(path.read_bytes())
        body = stored["body"]
        if stored["sha256"] != _digest(body):
            return None
        return tuple(Column(name, tuple(shape), dtype) for name, shape, dtype in body["columns"]), body["salt"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
