"""One tensor of a file on its way to integers, or to another floating-point type, piece by piece."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import final

import numpy as np
import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.files.dtypes import Bits, FloatBits
from tersor.files.weights import PIECE, Part, Replacement, TensorEntry, WeightsFile, refuse_not_finite
from tersor.quantize.files.stored import Stored
from tersor.quantize.ranges import Range
from tersor.quantize.schemes import Int
from tersor.tensor.affine import dequantize, quantize
from tersor.tensor.packing import pack

VIEW = 2**17  # numbers that are worked on at once: they stay in the processor's cache

# What --dtype says → (safetensors' name, torch's type, NumPy's type of its bits)
NARROW = {"float16": ("F16", torch.float16), "bfloat16": ("BF16", torch.bfloat16)}


class Rounding(ABC):
    """Changes one tensor. ``error``, once it is written: Σ (x − x̂)² / Σ x², the share of its squares that is lost."""

    def __init__(self, file: WeightsFile, entry: TensorEntry):
        assert entry.float_bits is not None, f"objection() knows that {entry} has no numbers"
        self._file, self.entry, self._kind = file, entry, entry.float_bits
        self._lost = self._squares = 0.0

    @abstractmethod
    def replacement(self) -> Replacement:
        """What stands in the tensor's place."""

    @property
    @abstractmethod
    def result(self) -> tuple[str, int]:
        """What it is stored as, and in how many bytes."""

    @property
    def error(self) -> float:
        """0 where nothing is lost, of zeros too."""
        return self._lost / self._squares if self._squares else 0.0

    def _views(self, granule: int) -> Iterator[list[tuple[Bits, Tensor]]]:
        """Of each piece the views: their bits, and their numbers in float32, [k], k a multiple of ``granule``."""
        step = max(1, VIEW // granule) * granule
        for piece in self._file.pieces(self.entry, granule):
            bits = [piece[start : start + step] for start in range(0, len(piece), step)]
            yield [(view, torch.from_numpy(self._kind.floats(view)).float()) for view in bits]

    def _compare(self, x: Tensor, rounded: Tensor) -> None:
        self._lost += float((x - rounded).square_().sum())
        self._squares += float(x.square().sum())


@final
class ToIntegers(Rounding):
    """Rounds to integers. Scales and zero points wait in ``folder`` until the integers are written."""

    def __init__(self, file: WeightsFile, entry: TensorEntry, scheme: Int, range_: Range, folder: Path):
        super().__init__(file, entry)
        self.stored, self._range, self._folder = Stored(entry, scheme), range_, folder
        self._waiting: dict[TensorEntry, SpooledTemporaryFile[bytes]] = {}

    @property
    def result(self) -> tuple[str, int]:
        """The integers."""
        return str(self.stored.scheme), self.stored.nbytes

    def replacement(self) -> Replacement:
        """Integers, scales and zero points."""
        stored = self.stored
        rest = (Part(part, lambda part=part: self._waited(part)) for part in stored.parts[1:])  # type: ignore[misc]
        return Replacement((Part(stored.packed, self._packed), *rest), dict(stored.metadata()))

    def _packed(self) -> Iterator[Bits]:
        stored, scheme = self.stored, self.stored.scheme
        with ExitStack() as after_an_error:
            for part in stored.parts[1:]:
                waiting = SpooledTemporaryFile(max_size=PIECE, dir=str(self._folder))
                self._waiting[part] = after_an_error.enter_context(waiting)
            for views in self._views(stored.row):
                packed = [pack(self._rounded(*view), scheme.bits, signed=scheme.symmetric).numpy() for view in views]
                yield np.concatenate(packed).reshape(-1)
            after_an_error.pop_all()

    def _rounded(self, bits: Bits, flat: Tensor) -> Tensor:
        """The integers of a view [rows, row]."""
        stored, scheme = self.stored, self.stored.scheme
        if int((bits & self._kind.magnitude).max()) >= self._kind.infinity:
            refuse_not_finite(self._file, self.entry, "quantised")
        if self.entry.dtype == "F64" and not bool(flat.isfinite().all()):
            raise InputError(
                "numbers beyond float32 cannot be quantised", where=f"{self._file.path}, {self.entry.name}"
            )
        x = flat.reshape(-1, stored.row // stored.groups)
        scale, zero_point = self._range.parameters(x, scheme)
        s, z = scale[:, None], zero_point[:, None]
        q = quantize(x, s, z, quant_min=scheme.quant_min, quant_max=scheme.quant_max)
        self._compare(x, dequantize(q, s, z))
        for (part, waiting), values in zip(self._waiting.items(), (scale, zero_point.to(torch.uint8)), strict=False):
            assert part.nbytes, "a tensor that is quantised is not empty"
            waiting.write(values.numpy().tobytes())
        return q.reshape(-1, stored.row)

    def _waited(self, part: TensorEntry) -> Iterator[Bits]:
        with self._waiting.pop(part) as waiting:
            waiting.seek(0)
            while raw := waiting.read(PIECE):
                yield np.frombuffer(raw, np.uint8 if part.float_bits is None else part.float_bits.unsigned)


@final
class ToNarrow(Rounding):
    """Casts to a floating-point type of 16 bits, to nearest, halves to even. NaN and infinity stay what they are."""

    def __init__(self, file: WeightsFile, entry: TensorEntry, dtype: str):
        super().__init__(file, entry)
        name, self._dtype = NARROW[dtype]
        self.cast = TensorEntry(entry.name, name, entry.shape, 2 * entry.size, entry.columns_first)

    @property
    def result(self) -> tuple[str, int]:
        """The narrow type."""
        return self.cast.dtype, self.cast.nbytes

    def replacement(self) -> Replacement:
        """The same tensor, of the narrow type."""
        return Replacement((Part(self.cast, self._pieces),))

    def _pieces(self) -> Iterator[Bits]:
        for views in self._views(1):
            cast = [flat.to(self._dtype) for _, flat in views]
            for (bits, flat), narrow in zip(views, cast, strict=True):
                self._expect_no_new_infinity(bits, narrow)
                finite = flat.isfinite()
                self._compare(flat.where(finite, 0), narrow.float().where(finite, 0))
            yield np.concatenate([narrow.view(torch.uint16).numpy() for narrow in cast])

    def _expect_no_new_infinity(self, bits: Bits, narrow: Tensor) -> None:
        kind: FloatBits = self._kind
        grown = int(((bits & kind.magnitude) < kind.infinity)[narrow.isinf().numpy()].sum())
        if grown:
            raise InputError(
                "numbers would become infinite", where=f"{self._file.path}, {self.entry.name}",
                got=f"{grown:,} beyond {torch.finfo(self._dtype).max:g} among {narrow.numel():,}",
                do="Take bfloat16, or leave the tensor out with where=",
            )  # fmt: skip
