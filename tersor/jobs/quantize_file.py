"""Quantise a weights file, write its numbers out again, or load them: what the command line's words mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.files.open import expect_destination, open_weights, writing
from tersor.jobs.by_name import by_name
from tersor.quantize.files.quantize import QuantizedFile, QuantizeFile
from tersor.quantize.files.restored import RestoredFile
from tersor.quantize.ranges import MeanSquaredError, MinMax, Range
from tersor.quantize.schemes import Int

RANGES: dict[str, Range] = {"min_max": MinMax(), "mean_squared_error": MeanSquaredError()}


def quantize_file(
    source: str | Path,
    out: str | Path,
    bits: int | str | Sequence[str] | None = None,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    range: str | Range = "min_max",
    dtype: str | None = None,
    where: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> QuantizedFile:
    """Store the weights of a file (safetensors, a sharded checkpoint, .npz) as packed integers; no model is needed.

    ``bits``: 2 to 8, or "GLOB=4" for tensors whose name matches (several; the first that matches counts; "GLOB=none"
    stays in floating point). ``group_size``: one scale for each run of so many numbers of a row; None: for each row.
    ``range``: "min_max", "mean_squared_error" (searches what to clip), or a ``Range``. ``dtype``: "float16" or
    "bfloat16", to which everything else in floating point is cast. The rest as
    ``tersor.quantize.files.quantize.QuantizeFile``, whose ``run`` says what is refused. ``load_weights`` reads the
    result, ``dequantize_file`` writes it out.
    """
    if bits is None and dtype is None:
        raise InputError(
            "neither integers nor a type to cast to",
            where="quantize",
            do="Name bits (--bits 8) or dtype (--dtype float16)",
        )
    read = bits if bits is None or isinstance(bits, int) else by_name(bits, _bits, "bits", "4")
    if isinstance(range, str) and range not in RANGES:
        raise InputError("unknown range", where="range", got=repr(range), expected=" or ".join(RANGES))

    def scheme(width: int | None) -> Int | None:
        if width is None:
            return None
        if not 2 <= width <= 8:  # Int has 16 too, which is for activations
            raise InputError("impossible width", where="bits", got=width, expected="a whole number from 2 to 8")
        return Int(width, symmetric=symmetric, group_size=group_size)

    schemes = {name: scheme(width) for name, width in read.items()} if isinstance(read, dict) else scheme(read)
    names = (where,) if isinstance(where, str) else tuple(where)
    settings = QuantizeFile(schemes, RANGES[range] if isinstance(range, str) else range, dtype, names)
    return settings.run(source, out, progress)


def dequantize_file(source: str | Path, out: str | Path, progress: Progress | None = None) -> tuple[str, ...]:
    """Write the numbers that a file of ``quantize_file`` stands for, under their first names, shapes and types.

    Returns the names of the tensors that were integers. Raises InputError for a file that is damaged, has none, or is
    the output.
    """
    file, out = open_weights(source), Path(out)
    expect_destination(file, out)
    restored = RestoredFile(file)
    if not restored.stored:
        raise InputError("no tensor of the file is stored as integers", where=str(file.path))
    with writing(out):
        restored.rewrite(out, lambda entry: None, progress or Progress())
    return tuple(restored.stored)


def load_weights(source: str | Path) -> dict[str, Tensor]:
    """Every tensor of a file of weights by name, floats where integers are stored: what ``load_state_dict`` takes.

    Safetensors, sharded checkpoints and .npz, quantised or not. Raises InputError for a file that is damaged, or a type
    that PyTorch does not have.
    """
    file = RestoredFile(open_weights(source))
    return {entry.name: file.tensor(entry) for entry in file.tensors}


def _bits(text: str) -> int | None:
    return None if text == "none" else int(text)
