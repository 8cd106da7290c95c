"""Pruning a file of weights by magnitude: no model class, and never more than a piece of a tensor in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.plan import Skip
from tersor.core.progress import Progress
from tersor.files.choose import choose, nothing_chosen
from tersor.files.open import expect_destination, expect_plain, open_weights, writing
from tersor.files.weights import TensorEntry, WeightsFile
from tersor.prune.files.removal import Removal
from tersor.prune.files.units import expect_pattern_of_files, objection
from tersor.prune.sparse.patterns import NM, Element, Pattern
from tersor.tensor import encodings


@dataclass(frozen=True)
class PruneFile:
    """Sets the smallest weights of a file to zero; everything else in it stays as it is, bit by bit.

    ``sparsity``: the fraction of zeros, in [0, 1); or one for each shell pattern of names (scope "layer"), of which the
    first that matches counts; None for N:M, which has its own. ``scope``: "layer" takes ⌊sparsity · units + 1e-9⌋ of
    each tensor, "global" that many of all together, by one threshold, exactly. Of equal magnitudes the earlier in the
    file goes first. ``pattern``: ``Element()``, ``NM(n, m)`` along the inputs, ``Block(r, c)`` of outputs × inputs.
    ``where``: shell patterns of tensor names; by default every tensor of two or more axes. ``allow_empty``: a tensor
    may lose everything that it had.

    Memory: about 100 MB beside what Python and its libraries need, or a row of blocks if that is more. The file is read
    once for the threshold as a rule (fp64 and mixed types three times, blocks and .npz twice), and again to write; with
    scope "layer" tensors up to 16 MiB are read once.
    Source: Han et al. 2015 (arXiv 1506.02626), section 3; the threshold is ours.
    """

    sparsity: float | Mapping[str, float] | None = None
    scope: Literal["layer", "global"] = "layer"
    pattern: Pattern = Element()
    where: tuple[str, ...] = ()
    allow_empty: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.scope not in ("layer", "global"):
            raise InputError("unknown scope", where="scope", got=repr(self.scope), expected="layer or global")
        expect_pattern_of_files(self.pattern)
        own = self.pattern.sparsity
        if isinstance(self.pattern, NM):
            if self.sparsity not in (None, own) or self.scope == "global":
                got = f"sparsity {self.sparsity}, scope {self.scope}"
                raise InputError(
                    f"{self.pattern.n}:{self.pattern.m} has its own sparsity in every group, {own:g}", where="pattern",
                    got=got, do="Leave sparsity and scope out",
                )  # fmt: skip
            return
        if self.sparsity is None:
            raise InputError("no sparsity", where="sparsity", expected="a fraction such as 0.9")
        given = self.sparsity if isinstance(self.sparsity, Mapping) else {"sparsity": self.sparsity}
        for name, value in given.items():
            if not 0 <= value < 1:
                raise InputError("out of range", where=name, got=value, expected="0 <= sparsity < 1, such as 0.8 (80%)")
        if isinstance(self.sparsity, Mapping) and (self.scope == "global" or not self.sparsity):
            raise InputError("sparsities by name need scope layer, and at least one", where="sparsity")

    def run(self, source: str | Path, out: str | Path, progress: Progress | None = None) -> PrunedFile:
        """Prune the file ``source`` into ``out``, which is whole or not there.

        Raises InputError for a file that is damaged, or quantised, a weight that is NaN or infinite (naming the tensor,
        with the count), a pattern that matches nothing, nothing that can be pruned, a tensor that would be emptied, and
        an output that is the input.
        """
        progress = progress or Progress()
        file, out = open_weights(source), Path(out)
        expect_plain(file)
        expect_destination(file, out)
        chosen, skips = self._choose(file)
        removal = Removal(file, chosen, self.pattern, self.scope, self.allow_empty, progress)
        with writing(out):
            if self.scope == "global":
                removal.find_shared_threshold()
            file.rewrite(out, removal.change, progress)
        targets = chosen if self.scope == "layer" else {}
        rows = tuple(self._row(entry, targets.get(entry.name), zeros) for entry, zeros in removal.done)
        return PrunedFile(str(file.path), str(out), rows, skips, self.scope)

    def _row(self, entry: TensorEntry, target: float | None, zeros: int) -> PrunedTensor:
        patterns = [(self.pattern.n, self.pattern.m)] if isinstance(self.pattern, NM) else []
        sizes = encodings.sizes_of(entry.shape, entry.nbytes // entry.size, entry.size - zeros, patterns)
        name = encodings.smallest(sizes)
        return PrunedTensor(
            entry.name, entry.dtype, entry.shape, entry.size, target, zeros, entry.nbytes, name, sizes[name]
        )

    def _choose(self, file: WeightsFile) -> tuple[dict[str, float], tuple[Skip, ...]]:
        """Tensor → its sparsity, and what is passed over."""
        setting = self.pattern.sparsity or 0.0 if self.sparsity is None else self.sparsity
        chosen, skips = choose(
            file, self.where, setting, lambda entry, _: objection(entry, self.pattern), called="sparsity"
        )
        if not chosen:
            raise nothing_chosen(file, skips, "pruned")
        return chosen, skips


@dataclass(frozen=True)
class PrunedTensor:
    """What became of one tensor. ``target``: fraction of zeros that was asked for; None with scope global.

    ``dense_bytes``: what it takes in the file, with or without zeros; ``smallest_bytes``: what it would take in
    ``encoding``, the smallest of ``tersor.tensor.encodings.sizes_of`` (``gaps`` would need to know where zeros stand).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    target: float | None
    zeros: int
    dense_bytes: int
    encoding: str
    smallest_bytes: int


@dataclass(frozen=True)
class PrunedFile:
    """The result: where it lies, a row for each tensor that was pruned, what was passed over and why."""

    source: str
    out: str
    tensors: tuple[PrunedTensor, ...]
    skips: tuple[Skip, ...] = field(default=())
    scope: str = "layer"

    @property
    def size(self) -> int:
        """Numbers in the tensors that were pruned."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def zeros(self) -> int:
        """Zeros among them, those that were there before too."""
        return sum(tensor.zeros for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {**asdict(self), "size": self.size, "zeros": self.zeros, "sparsity": self.zeros / max(1, self.size)}
