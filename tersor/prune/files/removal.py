"""The passes over a weights file: find thresholds, then zero what lies below them while the file is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Literal

import numpy as np

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.files.dtypes import Bits
from tersor.files.weights import PIECE, Part, Replacement, TensorEntry, WeightsFile, refuse_not_finite
from tersor.prune.files.units import Groups, SingleWeights, Units, ceiling_of, units_of
from tersor.prune.sparse.patterns import Pattern
from tersor.tensor import masks
from tersor.tensor.threshold import Keys, Threshold, find_threshold

_VIEW = 2**17  # numbers that are worked on at once: they stay in the processor's cache
_SHARE = 16  # one of so many numbers is sampled to guess a threshold, in runs:
_FEWEST_CLUSTERS, _MOST_CLUSTERS = 32, 1024
_CLUSTER, _SHORT_CLUSTER = 4096, 128  # numbers in a run, in files and in memory


class Removal:
    """One run over a file. ``chosen``: tensor → its sparsity. ``done``: each tensor that was written, and its zeros."""

    def __init__(
        self,
        file: WeightsFile,
        chosen: Mapping[str, float],
        pattern: Pattern,
        scope: Literal["layer", "global"],
        allow_empty: bool,
        progress: Progress,
    ):
        self._file, self._chosen, self._pattern, self._progress = file, chosen, pattern, progress
        self._allow_empty = allow_empty
        self._entries = [entry for entry in file.tensors if entry.name in chosen]
        dtypes = {entry.dtype for entry in self._entries}
        ranked = [dtypes] if scope == "global" else [{dtype} for dtype in dtypes]
        self._ranks = {dtype: ceiling_of(pattern, together) for together in ranked for dtype in together}
        self._shared: Threshold | None = None  # what is left of it for the tensors that are still to be written
        self._largest: dict[str, int] = {}  # key of each tensor
        self.done: list[tuple[TensorEntry, int]] = []

    def find_shared_threshold(self) -> None:
        """For scope global, before the file is written; refuses at once where whole tensors lie below the threshold."""
        units = {entry: self._units(entry) for entry in self._entries}
        n = sum(each.count for each in units.values())

        def every_key() -> Iterator[Keys]:
            for entry in self._progress.track(self._entries, "finding the threshold", len(self._entries)):
                each = units[entry]
                yield from self._keys(entry, each, self._file.pieces(entry, each.granule))

        found = find_threshold(
            every_key, masks.count(self._chosen[self._entries[0].name], n), n,
            ceiling=self._ceiling(self._entries[0]), sample=_sample(self._file, units),
        )  # fmt: skip
        self._shared = found
        self._tell_emptied([entry for entry in self._entries if 0 < self._largest.get(entry.name, 0) < found.key])

    def change(self, entry: TensorEntry) -> Replacement | None:
        """The tensor's bits with zeros, piece by piece; None where it was not chosen."""
        return Replacement((Part(entry, partial(self._pruned, entry)),)) if entry.name in self._chosen else None

    def _pruned(self, entry: TensorEntry) -> Iterator[Bits]:
        assert entry.float_bits is not None
        units = self._units(entry)
        # A small tensor is one piece, which is held; a large one is read again.
        held = list(self._file.pieces(entry, units.granule)) if entry.nbytes <= PIECE else None
        shared = self._shared
        threshold = self._own_threshold(entry, units, held) if shared is None else shared
        magnitude, nonzeros = entry.float_bits.magnitude, 0
        for piece in held if held is not None else self._file.pieces(entry, units.granule):
            for view, keys in self._ranked(entry, units, piece):
                keep, threshold = units.keep(keys, threshold)
                np.multiply(view, keep, out=view)
                nonzeros += int(np.count_nonzero(view & magnitude))
            yield piece
        self._shared = threshold if shared is not None else None
        if nonzeros == 0 and self._largest[entry.name]:
            self._tell_emptied([entry])
        self.done.append((entry, entry.size - nonzeros))

    def _own_threshold(self, entry: TensorEntry, units: Units, held: list[Bits] | None) -> Threshold:
        if isinstance(units, Groups):
            return Threshold(0, 0)

        def every_key() -> Iterator[Keys]:
            return self._keys(entry, units, self._file.pieces(entry, units.granule) if held is None else held)

        k = masks.count(self._chosen[entry.name], units.count)
        sample = _sample(self._file, {entry: units}) if held is None else _sample_of(held[0], units)
        return find_threshold(every_key, k, units.count, ceiling=self._ceiling(entry), sample=sample)

    def _units(self, entry: TensorEntry) -> Units:
        return units_of(entry, self._pattern, self._ranks[entry.dtype][0])

    def _ceiling(self, entry: TensorEntry) -> int:
        return self._ranks[entry.dtype][1]

    def _keys(self, entry: TensorEntry, units: Units, pieces: Iterable[Bits]) -> Iterator[Keys]:
        for piece in pieces:
            for _, keys in self._ranked(entry, units, piece):
                yield keys

    def _ranked(self, entry: TensorEntry, units: Units, piece: Bits) -> Iterator[tuple[Bits, Keys]]:
        """Views of a piece, small enough to stay in the cache, and the keys of their units, which are checked."""
        step = max(1, _VIEW // units.granule) * units.granule
        for start in range(0, len(piece), step):
            view = piece[start : start + step]
            keys = units.keys(view)
            largest = int(keys.max())
            if largest >= self._ceiling(entry):
                refuse_not_finite(self._file, entry, "ranked")
            self._largest[entry.name] = max(largest, self._largest.get(entry.name, 0))
            yield view, keys

    def _tell_emptied(self, entries: list[TensorEntry]) -> None:
        if not entries:
            return
        names = ", ".join(str(entry) for entry in entries[:5]) + (" …" if len(entries) > 5 else "")
        if not self._allow_empty:
            raise InputError(
                f"{len(entries)} of {len(self._entries)} tensors would lose every weight", where=str(self._file.path),
                got=names, do="Ask for less, use scope layer, or allow it (allow_empty=True, --allow-empty)",
            )  # fmt: skip
        self._progress.say(f"warning: nothing is left of {names}")


def _sample(file: WeightsFile, units: Mapping[TensorEntry, Units]) -> Keys | None:
    """Runs of keys from all over the tensors, [clusters, size]; None where that is not worth it or cannot be done."""
    entries = list(units)
    bounds = np.cumsum([entry.size for entry in entries])
    clusters = min(int(bounds[-1]) // (_SHARE * _CLUSTER), _MOST_CLUSTERS)
    if not all(isinstance(each, SingleWeights) for each in units.values()) or clusters < _FEWEST_CLUSTERS:
        return None
    found = []
    for position in _positions(int(bounds[-1]), clusters):
        at = int(np.searchsorted(bounds, position, side="right"))
        entry = entries[at]
        if entry.size < _CLUSTER:
            continue
        start = min(int(position - (bounds[at] - entry.size)), entry.size - _CLUSTER)
        bits = file.run_of(entry, start, _CLUSTER)
        if bits is None:
            return None
        found.append(units[entry].keys(bits))
    return np.stack(found) if found else None


def _sample_of(bits: Bits, units: Units) -> Keys | None:
    """The same from a tensor in memory, where runs may be short."""
    clusters = len(bits) // (_SHARE * _SHORT_CLUSTER)
    if not isinstance(units, SingleWeights) or clusters < _FEWEST_CLUSTERS:
        return None
    starts = np.minimum(_positions(len(bits), clusters), len(bits) - _SHORT_CLUSTER)
    return units.keys(bits[starts[:, None] + np.arange(_SHORT_CLUSTER)])


def _positions(n: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """A random position (always the same) in each of ``count`` equal parts of n: nothing periodic misleads it."""
    return ((np.arange(count) + np.random.default_rng(0).random(count)) * (n / count)).astype(np.int64)
