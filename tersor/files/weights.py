"""What a file of weights is to Tersor: named tensors whose bits are read, and written again, in bounded pieces."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.files.dtypes import FLOATS, Bits, FloatBits

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


# What becomes of a tensor when a file is rewritten: its new bits in pieces, or None where it is copied.
Change = Callable[[TensorEntry], Iterator[Bits] | None]


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
        """Write the same weights to ``out``, changed: names, shapes, types, order and metadata stay.

        ``out`` is complete, and durable, or not there at all. Raises InputError as ``pieces``, OSError where it cannot
        be written.
        """

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


def write_behind(write: Callable[[memoryview], object], pieces: Iterable[Bits]) -> None:
    """Write pieces in order, each while the next is being made (disks and NumPy both let other threads run)."""
    with ThreadPoolExecutor(1) as writer:
        last: Future[object] | None = None
        for piece in pieces:
            if last is not None:
                last.result()
            last = writer.submit(write, memoryview(piece).cast("B"))
        if last is not None:
            last.result()


def damaged(path: Path, got: str, *, expected: str = "") -> InputError:
    """The error of a file that is not what its kind must be."""
    return InputError(
        "the file is damaged, incomplete or not of its kind", where=str(path), got=got[:300], expected=expected
    )
