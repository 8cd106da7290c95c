"""What a file of weights is to Tersor: named tensors whose bits are read, and written again, in bounded pieces."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.files.dtypes import FLOATS, Bits, FloatBits

T = TypeVar("T")

METADATA = "__metadata__"  # the name under which a file says something about itself
LARGEST_HEADER = 100_000_000  # bytes of what it says, the limit of safetensors' reference implementation
PIECE = 16 * 2**20  # bytes that are read at once, unless a row of blocks needs more


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file. ``dtype``: safetensors' name of it (F32, BF16, I64 …). ``columns_first``: stored in Fortran's
    order, so that its bits come column by column."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    columns_first: bool = False

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def float_bits(self) -> FloatBits | None:
        """Its format where it is a floating-point one that can be pruned, else None."""
        return FLOATS.get(self.dtype)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Part:
    """A tensor that is written: what it is, and its bits in pieces (as ``WeightsFile.pieces``), made when called."""

    entry: TensorEntry
    pieces: Callable[[], Iterable[Bits]]


@dataclass(frozen=True)
class Replacement:
    """What stands in a rewritten file in the place of one tensor, known before any bit is read.

    ``parts`` are made one after the other. ``metadata``: what the file says about itself from now on; None: no longer.
    """

    parts: tuple[Part, ...]
    metadata: Mapping[str, str | None] = field(default_factory=dict)


# What becomes of a tensor when a file is rewritten; None where it is copied. Asked more than once.
Change = Callable[[TensorEntry], Replacement | None]


class WeightsFile(ABC):
    """A file of weights, or several that belong together; ``open_weights`` makes one. Nothing is changed in place.

    ``path``: the file; of sharded weights their index. ``tensors``: in the order in which they are stored.
    ``metadata``: what the file says about itself.
    """

    path: Path
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]

    @abstractmethod
    def pieces(self, entry: TensorEntry, granule: int = 1) -> Iterator[Bits]:
        """The bits of a tensor from first to last, in pieces of about ``PIECE`` bytes.

        A piece is an unsigned integer array [k], k a multiple of ``granule`` numbers (the tensor's size is one, too);
        uint8 [bytes] for types that are not ``FLOATS``. It may be written to; its memory may be that of the piece after
        the next, and no earlier one. Raises InputError where the file ends too early or is damaged.
        """

    @abstractmethod
    def run_of(self, entry: TensorEntry, start: int, count: int) -> Bits | None:
        """``count`` numbers of a tensor from ``start`` on; None in a file that can only be read from its beginning."""

    @abstractmethod
    def rewrite(self, out: Path, change: Change, progress: Progress) -> None:
        """Write the weights to ``out``, changed; what ``change`` does not name stays: names, shapes, types, metadata.

        ``out`` is complete, and durable, or not there at all. Raises InputError as ``pieces``, and where two tensors
        would have one name; OSError where it cannot be written.
        """

    def replacements(self, change: Change) -> list[Replacement]:
        """What each tensor becomes: a copy is a part that is the tensor itself."""
        found = [change(entry) or Replacement((Part(entry, partial(self.pieces, entry)),)) for entry in self.tensors]
        names: set[str] = set()
        for part in (part for replacement in found for part in replacement.parts):
            if part.entry.name in names:
                raise name_taken(self.path, part.entry.name)
            names.add(part.entry.name)
        return found

    def told(self, replacements: Iterable[Replacement]) -> dict[str, str]:
        """The metadata after the replacements."""
        changes = {name: said for replacement in replacements for name, said in replacement.metadata.items()}
        return {name: said for name, said in {**self.metadata, **changes}.items() if said is not None}

    def matching(self, patterns: Sequence[str]) -> list[TensorEntry]:
        """The tensors whose names match at least one shell pattern. A pattern that matches none is an InputError."""
        names = [entry.name for entry in self.tensors]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
                raise InputError(
                    "the pattern matches no tensor", where=str(self.path), got=repr(pattern),
                    do=f"Nearest names: {', '.join(near)}" if near else "The file has no tensors",
                )  # fmt: skip
        return [entry for entry in self.tensors if any(fnmatchcase(entry.name, pattern) for pattern in patterns)]


def piece_size(itemsize: int, granule: int) -> int:
    """Numbers in a piece: about ``PIECE`` bytes, a multiple of ``granule``, at least one."""
    return max(1, PIECE // (itemsize * granule)) * granule


def write_behind(write: Callable[[T], object], pieces: Iterable[T]) -> None:
    """Write pieces in order, each while the next is being made (disks and NumPy both let other threads run)."""
    with ThreadPoolExecutor(1) as writer:
        last: Future[object] | None = None
        for piece in pieces:
            if last is not None:
                last.result()
            last = writer.submit(write, piece)
        if last is not None:
            last.result()


def name_taken(path: Path, name: str) -> InputError:
    """The error of a change that gives a tensor a name which another has."""
    return InputError(
        "two tensors of the output would have one name", where=str(path), got=name, do="Leave it out with where="
    )


def damaged(path: Path, got: str, *, expected: str = "") -> InputError:
    """The error of a file that is not what its kind must be."""
    return InputError(
        "the file is damaged, incomplete or not of its kind", where=str(path), got=got[:300], expected=expected
    )


def refuse_not_finite(file: WeightsFile, entry: TensorEntry, what: str) -> NoReturn:
    """Raises InputError: weights that are not finite cannot be ``what``. The tensor is read again to count them."""
    kind = entry.float_bits
    assert kind is not None
    nan = infinite = 0
    for piece in file.pieces(entry):
        magnitudes = piece & kind.magnitude
        nan += int(np.count_nonzero(magnitudes > kind.infinity))
        infinite += int(np.count_nonzero(magnitudes == kind.infinity))
    raise InputError(
        f"weights that are not finite cannot be {what}", where=f"{file.path}, {entry.name}",
        got=f"{nan:,} NaN and {infinite:,} infinite of {entry.size:,}", expected="finite weights",
        do="Take an earlier checkpoint, or leave the tensor out with where=",
    )  # fmt: skip
