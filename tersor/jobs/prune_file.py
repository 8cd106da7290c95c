"""Prune a weights file, or say what is in one: what the command line's words mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.files.open import open_weights
from tersor.jobs.by_name import by_name, share
from tersor.measure.weights_file import WeightsFacts, weights_facts
from tersor.prune.files.prune import PrunedFile, PruneFile
from tersor.prune.sparse.patterns import NM, Block, Element, Pattern


def prune_file(
    source: str | Path,
    out: str | Path,
    sparsity: float | str | Sequence[str] | None = None,
    *,
    scope: str = "layer",
    pattern: str | Pattern = "element",
    where: str | Sequence[str] = (),
    allow_empty: bool = False,
    progress: Progress | None = None,
) -> PrunedFile:
    """Set the smallest weights of a file (safetensors, a sharded checkpoint, .npz) to zero; no model class is needed.

    ``sparsity``: 0.9 or "90%", or "GLOB=0.9" for tensors whose name matches (several; the first that matches counts).
    ``pattern``: "element", "2:4" (any n:m, along the inputs), "4x1" (blocks of r outputs × c inputs). The rest as
    ``tersor.prune.files.prune.PruneFile``, whose ``run`` says what is refused.
    """
    settings = PruneFile(
        _sparsity(sparsity), scope, parse_pattern(pattern) if isinstance(pattern, str) else pattern,  # type: ignore[arg-type]
        (where,) if isinstance(where, str) else tuple(where), allow_empty,
    )  # fmt: skip
    return settings.run(source, out, progress)


def inspect_file(source: str | Path, progress: Progress | None = None) -> WeightsFacts:
    """Tensors, types, zeros, magnitudes and bytes in each encoding of a weights file."""
    return weights_facts(open_weights(source), progress)


def parse_pattern(text: str) -> Pattern:
    """ "element", "2:4" → NM(2, 4), "4x1" or "4×1" → Block(4, 1). Raises InputError for anything else."""
    if text == "element":
        return Element()
    match = re.fullmatch(r"(\d{1,6})([:x×])(\d{1,6})", text)
    if match is None:
        raise InputError(
            "unknown pattern", where="pattern", got=repr(text), expected="element, n:m or rxc, such as 2:4"
        )
    first, second = int(match[1]), int(match[3])
    return NM(first, second) if match[2] == ":" else Block(first, second)


def _sparsity(said: float | str | Sequence[str] | None) -> float | dict[str, float] | None:
    if said is None or isinstance(said, (int, float)):
        return said
    return by_name(said, share, "sparsity", "0.9 or 90%") if len(said) else None
