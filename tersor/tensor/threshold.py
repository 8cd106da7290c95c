"""The k smallest of more keys than fit in memory, exactly, in as few passes over them as possible. NumPy.

Keys are unsigned integers. Magnitudes of floating-point numbers are such keys by their bits: |a| ≤ |b| exactly where
bits(|a|) ≤ bits(|b|) (IEEE 754), so that nothing is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[Any]  # unsigned integers [n]

_FEWEST_BINS, _MOST_BINS = 2**10, 2**22
_WAITING = 2**20  # keys that wait to be counted together
_SPREAD = 6  # standard errors on either side of the sample's quantile


@dataclass(frozen=True)
class Threshold:
    """Which keys are the k smallest: those below ``key``, and the first ``ties`` of those equal to it."""

    key: int
    ties: int


def find_threshold(
    pieces: Callable[[], Iterable[Keys]], k: int, n: int, *, ceiling: int, sample: Keys | None = None
) -> Threshold:
    """The threshold of the ``k`` smallest of ``n`` keys, all below ``ceiling``.

    ``pieces`` gives all keys, piece by piece, whenever it is called: once for every pass. A pass counts the keys below
    a bracket and makes a histogram of those inside; the bin that holds the threshold is the bracket of the next pass,
    until a bin is a single key. ``sample`` [clusters, size]: runs of consecutive keys, from all over. The first bracket
    is where they put the threshold, give or take six standard errors by the spread between clusters. The result is
    exact whatever the sample: it decides how many passes there are (one as a rule; without it two for 32 bits).

    Memory beside a piece: up to 100 MB, little for small n. Raises ValueError where k is negative or above the number
    of keys that came.

    >>> keys = [np.array([3, 1, 2], np.uint32), np.array([1, 7], np.uint32)]
    >>> find_threshold(lambda: keys, 2, 5, ceiling=8)
    Threshold(key=1, ties=2)
    """
    if k == 0:
        return Threshold(0, 0)
    floor = 0
    low, high = (floor, ceiling) if sample is None or not sample.size else _bracket(sample, k / n, ceiling)
    while True:
        histogram = _Histogram(low, high, min(max(n // 16, _FEWEST_BINS), _MOST_BINS))
        for keys in pieces():
            histogram.add(keys)
        rank = k - histogram.below
        inside = histogram.total()
        if 0 < rank <= inside:
            key, width, before = histogram.find(rank)
            if width == 1:
                return Threshold(key, rank - before)
            floor, ceiling = low, high = key, key + width
        elif rank <= 0 and floor < low:  # the sample misled: it lies below the bracket, or above
            low, high = floor, low
        elif rank > inside and high < ceiling:
            low, high = high, ceiling
        else:
            raise ValueError(
                f"the {k} smallest of {histogram.below + inside} keys below {ceiling}: there are not as many"
            )


def smallest(keys: Keys, threshold: Threshold) -> tuple[NDArray[np.bool_], Threshold]:
    """Which of these keys are among the k smallest, and the threshold for the keys that come next.

    >>> found, rest = smallest(np.array([3, 1, 1, 2, 1], np.uint32), Threshold(key=1, ties=2))
    >>> found.tolist(), rest.ties
    ([False, True, True, False, False], 0)
    """
    found = keys < keys.dtype.type(threshold.key)
    if not threshold.ties:
        return found, threshold
    tied = np.flatnonzero(keys == keys.dtype.type(threshold.key))[: threshold.ties]
    found[tied] = True
    return found, Threshold(threshold.key, threshold.ties - len(tied))


def _bracket(sample: Keys, quantile: float, ceiling: int) -> tuple[int, int]:
    """[low, high) around the ``quantile`` of the sample."""
    flat = np.sort(sample, axis=None)
    at = flat[min(int(quantile * len(flat)), len(flat) - 1)]
    shares = np.mean(sample <= at, axis=1)  # of each cluster: their spread is the error of the whole
    error = float(np.std(shares)) / math.sqrt(max(1, len(shares) - 1)) + 1 / len(flat)
    first = math.floor((quantile - _SPREAD * error) * len(flat))
    last = math.ceil((quantile + _SPREAD * error) * len(flat))
    return int(flat[first]) if first > 0 else 0, min(int(flat[last]) + 1, ceiling) if last < len(flat) else ceiling


class _Histogram:
    """How many keys lie below ``low``, and in each bin of [low, high)."""

    def __init__(self, low: int, high: int, most_bins: int):
        self.low, self.width, self.below = low, high - low, 0
        self.shift = max(0, (self.width - 1).bit_length() - (most_bins - 1).bit_length())
        self._counts = np.zeros(((self.width - 1) >> self.shift) + 1, np.int64)
        self._waiting: list[Keys] = []
        self._waiting_count = 0

    def add(self, keys: Keys) -> None:
        """Count a piece."""
        number = keys.dtype.type
        self.below += int(np.count_nonzero(keys < number(self.low)))
        offsets = keys - number(self.low)  # of keys below the bracket: wrapped around, above every width
        inside = offsets[np.flatnonzero(offsets < number(self.width))]
        self._waiting.append(inside >> number(self.shift))
        self._waiting_count += len(inside)
        if self._waiting_count >= _WAITING:
            self._count_waiting()

    def _count_waiting(self) -> None:
        if self._waiting:
            self._counts += np.bincount(np.concatenate(self._waiting).astype(np.int64), minlength=len(self._counts))
        self._waiting, self._waiting_count = [], 0

    def total(self) -> int:
        """How many keys lie in the bracket."""
        self._count_waiting()
        return int(self._counts.sum())

    def find(self, rank: int) -> tuple[int, int, int]:
        """Of the bin with the ``rank``-th key of the bracket: its first key, its width, and how many lie before it."""
        upto = np.cumsum(self._counts)
        bin_ = int(np.searchsorted(upto, rank))
        return self.low + (bin_ << self.shift), 1 << self.shift, int(upto[bin_] - self._counts[bin_])
