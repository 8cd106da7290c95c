"""What a weights file is made of: zeros, magnitudes, and bytes in each encoding; read once, in pieces."""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.core.progress import Progress
from tersor.files.dtypes import Bits, FloatBits
from tersor.files.weights import TensorEntry, WeightsFile
from tersor.measure.redundancy import NEAR_ZERO, PERCENTILES
from tersor.quantize.files.restored import RestoredFile
from tersor.tensor import encodings

_ZIPPED = 4 * 2**20  # bytes of a tensor that are really compressed
_SHIFT = {"F16": 0, "BF16": 0, "F32": 11, "F64": 40}  # bits that the histogram of magnitudes leaves out


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a file.

    ``dense_bytes``: without any encoding. ``stored``: "dense", or the integers as which it is stored, in
    ``stored_bytes``, scales included. ``encodings``: bytes by name (``tersor.tensor.encodings``, and as it is stored),
    ``smallest`` the best of them. ``zip_bytes``: what deflate makes of what is stored; estimated from parts of it where
    ``zip_sampled``. Of tensors in floating point also ``zeros`` and ``near_zero`` (fractions; near: |w| ≤ 0.1 ·
    mean|w|), ``mean_magnitude`` and ``percentiles`` of |w|, over its finite numbers, to 1 part in 8192 for F32 and F64;
    and how many are ``not_finite``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    dense_bytes: int
    zip_bytes: int
    zip_sampled: bool
    stored: str
    stored_bytes: int
    smallest: str = "dense"
    encodings: dict[str, int] = field(default_factory=dict)
    zeros: float | None = None
    near_zero: float | None = None
    mean_magnitude: float | None = None
    percentiles: dict[str, float] = field(default_factory=dict)
    not_finite: int = 0


@dataclass(frozen=True)
class WeightsFacts:
    """A file of weights, tensor by tensor, and what it says about itself."""

    path: str
    metadata: dict[str, str]
    tensors: tuple[TensorFacts, ...]

    def to_json(self) -> dict[str, Any]:
        """The facts as plain JSON values, with totals."""
        totals = {
            "size": sum(tensor.size for tensor in self.tensors),
            "dense_bytes": sum(tensor.dense_bytes for tensor in self.tensors),
            "stored_bytes": sum(tensor.stored_bytes for tensor in self.tensors),
            "smallest_bytes": sum(tensor.encodings[tensor.smallest] for tensor in self.tensors),
            "zip_bytes": sum(tensor.zip_bytes for tensor in self.tensors),
        }
        return {**asdict(self), "totals": totals}


def weights_facts(file: WeightsFile, progress: Progress | None = None) -> WeightsFacts:
    """Read the file once and say what is in it; of packed integers, the numbers that they stand for.

    Some 200 MB of memory. Raises InputError where it is damaged.
    """
    restored = RestoredFile(file)
    tensors = restored.tensors
    tracked = (progress or Progress()).track(tensors, f"reading {file.path.name}", len(tensors))
    return WeightsFacts(str(file.path), dict(restored.metadata), tuple(_facts(restored, entry) for entry in tracked))


def _facts(file: RestoredFile, entry: TensorEntry) -> TensorFacts:
    packed = file.stored.get(entry.name)
    stored, nbytes = ("dense", entry.nbytes) if packed is None else (str(packed.scheme), packed.nbytes)
    zipped = _Zipped(nbytes)
    kind = entry.float_bits
    magnitudes = _Magnitudes(entry, kind) if kind is not None and entry.size else None
    if packed is not None:
        for piece in file.stored_pieces(entry):
            zipped.add(piece)
    for piece in file.pieces(entry, magnitudes.granule if magnitudes else 1):
        if packed is None:
            zipped.add(piece)
        if magnitudes:
            magnitudes.add(piece)
    sizes, statistics = {"dense": entry.nbytes}, {}
    if magnitudes:
        sizes = encodings.sizes_of(entry.shape, entry.nbytes // entry.size, magnitudes.nonzeros, magnitudes.patterns())
        statistics = magnitudes.statistics()
    sizes |= {stored: nbytes}
    return TensorFacts(
        entry.name, entry.dtype, entry.shape, entry.size, entry.nbytes, *zipped.result(), stored, nbytes,
        encodings.smallest(sizes), sizes, **statistics,
    )  # fmt: skip


class _Zipped:
    """The bytes after deflate; of a large tensor the beginning of each piece stands for the piece."""

    def __init__(self, nbytes: int):
        self._nbytes, self._share = nbytes, min(1.0, _ZIPPED / max(1, nbytes))
        self._deflate = zlib.compressobj()
        self._read = self._found = 0

    def add(self, piece: Bits) -> None:
        part = memoryview(piece).cast("B")[: math.ceil(piece.nbytes * self._share)]
        self._read += len(part)
        self._found += len(self._deflate.compress(part))

    def result(self) -> tuple[int, bool]:
        """Bytes, and whether they are estimated."""
        found = self._found + len(self._deflate.flush())
        return (round(found * self._nbytes / self._read), True) if self._share < 1 else (found, False)


class _Magnitudes:
    """Statistics of |w| of a tensor that comes in pieces."""

    def __init__(self, entry: TensorEntry, kind: FloatBits):
        self._entry, self._kind, self._shift = entry, kind, _SHIFT[entry.dtype]
        self._counts = np.zeros((kind.infinity >> self._shift) + 1, np.int64)  # the last bin: not finite
        self._sum, self.nonzeros = 0.0, 0
        kernel = math.prod(entry.shape[2:])
        grouped = len(entry.shape) > 1 and entry.shape[1] % 4 == 0 and not entry.columns_first
        self.granule = 4 * kernel if grouped else 1
        self._most = 0 if grouped else 4  # numbers that are not zero in any four consecutive inputs

    def add(self, piece: Bits) -> None:
        """Count a piece."""
        magnitudes = piece & self._kind.magnitude
        self.nonzeros += int(np.count_nonzero(magnitudes))
        if self._most < 3:
            groups = (magnitudes != 0).view(np.uint8).reshape(-1, 4, self.granule // 4)
            self._most = int(sum((groups[:, i] for i in range(1, 4)), start=groups[:, 0]).max())
        bins = np.minimum(magnitudes >> self._kind.unsigned.type(self._shift), len(self._counts) - 1)
        self._counts += np.bincount(bins.astype(np.int64), minlength=len(self._counts))
        finite = magnitudes if magnitudes.max() < self._kind.infinity else magnitudes[magnitudes < self._kind.infinity]
        self._sum += float(self._kind.floats(finite).sum(dtype=np.float64))

    def patterns(self) -> list[tuple[int, int]]:
        """The N:M patterns that the tensor has along its inputs."""
        return [(n, m) for n, m in encodings.N_OF_M if m == 4 and self._most <= n]

    def statistics(self) -> dict[str, Any]:
        """The fields of ``TensorFacts``."""
        finite = self._counts[:-1]
        n = int(finite.sum())
        found: dict[str, Any] = {
            "zeros": 1 - self.nonzeros / self._entry.size, "not_finite": int(self._counts[-1]),
        }  # fmt: skip
        if not n:
            return found
        upto, values = np.cumsum(finite), self._values()
        mean = self._sum / n
        ranks = [math.ceil(p / 100 * n) for p in PERCENTILES]
        at = np.searchsorted(upto, ranks)
        near = int(finite[: np.searchsorted(values, NEAR_ZERO * mean, side="right")].sum())
        return found | {
            "near_zero": near / n,
            "mean_magnitude": mean,
            "percentiles": {f"p{p}": float(values[i]) for p, i in zip(PERCENTILES, at, strict=True)},
        }

    def _values(self) -> NDArray[Any]:
        """The magnitude in the middle of each bin, increasing; bin 0 is zero."""
        keys = np.arange(len(self._counts) - 1, dtype=self._kind.unsigned) << self._kind.unsigned.type(self._shift)
        keys[1:] += self._kind.unsigned.type((1 << self._shift) >> 1)
        return self._kind.floats(keys)
