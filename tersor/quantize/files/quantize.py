"""Quantising a file of weights by rounding to nearest: no model class, and never more than a piece of it in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.plan import Skip
from tersor.core.progress import Progress
from tersor.files.choose import choose, nothing_chosen, unfit
from tersor.files.open import expect_destination, expect_plain, open_weights, writing
from tersor.files.weights import Replacement, TensorEntry, WeightsFile
from tersor.quantize.files.rounding import NARROW, Rounding, ToIntegers, ToNarrow
from tersor.quantize.files.stored import objection
from tersor.quantize.ranges import MinMax, Range
from tersor.quantize.schemes import Int


@dataclass(frozen=True)
class QuantizeFile:
    """Stores tensors of a file as packed integers with scales; everything else in it stays as it is, bit by bit.

    ``scheme``: the integers, 2 to 8 bits, one scale per row or per group of a row; or one for each shell pattern of
    names, of which the first that matches counts (None: stays as it is); or None: nothing becomes integers. ``range``:
    the reals that they reach. ``dtype``: "float16" or "bfloat16", to which the other floating-point tensors are cast.
    ``where``: shell patterns of tensor names, what becomes integers (without a scheme: what is cast); by default every
    tensor of two or more axes (every tensor). Computed in float32.

    Memory: some 200 MB beside what Python and its libraries need. The file is read once.
    Source: Jacob et al. 2018 (arXiv 1712.05877), section 2.1; groups as in Frantar et al. 2023 (arXiv 2210.17323).
    """

    scheme: Int | Mapping[str, Int | None] | None = Int(8)
    range: Range = field(default_factory=MinMax)
    dtype: str | None = None
    where: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dtype is not None and self.dtype not in NARROW:
            raise InputError("unknown type", where="dtype", got=repr(self.dtype), expected=" or ".join(NARROW))
        schemes = self.scheme if isinstance(self.scheme, Mapping) else {"scheme": self.scheme}
        given = {name: scheme for name, scheme in schemes.items() if scheme is not None}
        if not given and self.dtype is None:
            raise InputError("nothing to do", where="scheme", expected="integers, or a dtype to cast to")
        for name, scheme in given.items():
            if scheme.granularity != "per_channel" or scheme.bits > 8:
                raise InputError(
                    "files store 2 to 8 bits, with a scale for each row or group", where=name, got=str(scheme),
                    expected="Int(bits), or Int(bits, group_size=…)",
                )  # fmt: skip

    def run(self, source: str | Path, out: str | Path, progress: Progress | None = None) -> QuantizedFile:
        """Quantise the file ``source`` into ``out``, which is whole or not there.

        Raises InputError for a file that is damaged, or quantised already, a weight that is NaN or infinite, or becomes
        so by a cast (naming the tensor, with the count), a pattern that matches nothing, nothing that can be quantised,
        a name that is taken, and an output that is the input.
        """
        file, out = open_weights(source), Path(out)
        expect_plain(file)
        expect_destination(file, out)
        schemes, casts, skips = self._choose(file)
        roundings: dict[str, Rounding] = {}
        for entry in file.tensors:
            if entry.name in schemes:
                scheme, waiting = schemes[entry.name], out.absolute().parent
                roundings[entry.name] = ToIntegers(file, entry, scheme, self.range, waiting)
            elif entry.name in casts:
                roundings[entry.name] = ToNarrow(file, entry, casts[entry.name])

        def change(entry: TensorEntry) -> Replacement | None:
            return roundings[entry.name].replacement() if entry.name in roundings else None

        with writing(out):
            file.rewrite(out, change, progress or Progress())
        return QuantizedFile(str(file.path), str(out), tuple(map(_row, roundings.values())), skips)

    def _choose(self, file: WeightsFile) -> tuple[dict[str, Int], dict[str, str], tuple[Skip, ...]]:
        """Tensor → its integers; tensor → the type to which it is cast; what stays as it is."""
        schemes: dict[str, Int] = {}
        skips: tuple[Skip, ...] = ()
        if self.scheme is not None:
            setting: Int | None | Mapping[str, Int | None] = self.scheme
            chosen, skips = choose(file, self.where, setting, objection, called="number of bits")
            schemes = {name: scheme for name, scheme in chosen.items() if scheme is not None}
        casts: dict[str, str] = {}
        if self.dtype is not None:
            named = self.where if self.scheme is None else ()
            casts, others = choose(file, named, self.dtype, _objection_to_cast, called="type", fewest_axes=0)
            casts = {name: dtype for name, dtype in casts.items() if name not in schemes}
            reasons = {skip.place: skip.reason for skip in others} | {skip.place: skip.reason for skip in skips}
            skips = tuple(
                Skip(name, f"{reason}; cast to {self.dtype}" if name in casts else reason)
                for name, reason in reasons.items() if name not in schemes
            )  # fmt: skip
        if not schemes and (self.scheme is not None or not casts):
            raise nothing_chosen(file, skips, "cast" if self.scheme is None else "quantised")
        return schemes, casts, skips


def _objection_to_cast(entry: TensorEntry, dtype: str | None) -> str | None:
    reason = unfit(entry, "cast")
    if reason or dtype is None:
        return reason
    same = entry.dtype == NARROW[dtype][0]
    return f"is {dtype} already" if same else None


def _row(done: Rounding) -> QuantizedTensor:
    entry, (stored, nbytes) = done.entry, done.result
    return QuantizedTensor(entry.name, entry.dtype, entry.shape, entry.size, stored, entry.nbytes, nbytes, done.error)


@dataclass(frozen=True)
class QuantizedTensor:
    """What became of one tensor. ``stored``: the integers ("int4 groups of 128"), or the type that it was cast to.

    ``dense_bytes``: what it took; ``stored_bytes``: what it takes, scales and zero points included. ``error``:
    Σ (x − x̂)² / Σ x².
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    stored: str
    dense_bytes: int
    stored_bytes: int
    error: float


@dataclass(frozen=True)
class QuantizedFile:
    """The result: where it lies, a row for each tensor that was changed, what was passed over and why."""

    source: str
    out: str
    tensors: tuple[QuantizedTensor, ...]
    skips: tuple[Skip, ...] = ()

    @property
    def dense_bytes(self) -> int:
        """What these tensors took."""
        return sum(tensor.dense_bytes for tensor in self.tensors)

    @property
    def stored_bytes(self) -> int:
        """What they take."""
        return sum(tensor.stored_bytes for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {**asdict(self), "dense_bytes": self.dense_bytes, "stored_bytes": self.stored_bytes}
