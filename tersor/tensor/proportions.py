"""Proportions of separate groups: differences, ratios, and how far apart several groups are. Plain floats out."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tersor.tensor.statistics import Estimate, wilson_intervals

Array = NDArray[np.float64]


def mover(one: Estimate, other: Estimate, correlation: float = 0.0) -> Estimate:
    """``one`` − ``other`` with the interval that theirs make together, their lopsidedness kept.

    low = d − √((θ₁ − l₁)² + (u₂ − θ₂)² − 2ρ (θ₁ − l₁)(u₂ − θ₂)), high alike; ρ: the ``correlation`` of the estimates.
    Of proportions with Wilson's intervals this is Newcombe's (1998, "Interval estimation for the difference between
    independent proportions", method 10); of any two it is MOVER (Zou and Donner 2008, "Construction of confidence
    limits about effect measures").
    """
    value = one.value - other.value

    def apart(a: float, b: float) -> float:
        if not (math.isfinite(a) and math.isfinite(b)):
            return math.inf
        return math.sqrt(max(0.0, a**2 + b**2 - 2 * correlation * a * b))

    low = value - apart(one.value - one.low, other.high - other.value)
    return Estimate(value, low, value + apart(one.high - one.value, other.value - other.low))


def difference_of(successes: tuple[int, int], totals: tuple[int, int], confidence: float = 0.95) -> Estimate:
    """The first proportion minus the second, of separate samples (Newcombe 1998, method 10).

    >>> [round(value, 4) for value in difference_of((56, 48), (70, 80))]
    [0.2, 0.0524, 0.3339]
    """
    return mover(*_proportions(successes, totals, confidence))


def ratio_of(successes: tuple[int, int], totals: tuple[int, int], confidence: float = 0.95) -> Estimate:
    """The first proportion over the second, of separate samples; NaN of 0 to ∞ where both are zero.

    MOVER of a ratio (Donner and Zou 2012, "Closed-form confidence intervals for functions of the normal mean and
    standard deviation", section 2.2) with Wilson's intervals: limits of the ratio are where p₁ − r p₂ may be zero.
    """
    one, other = _proportions(successes, totals, confidence)
    if other.value == 0:
        value, high = math.nan if one.value == 0 else math.inf, math.inf
    else:
        value = one.value / other.value
        high = _ratio_end(one.value, other.value, one.high, other.low, 1)
    low = _ratio_end(one.value, other.value, one.low, other.high, -1)
    return Estimate(value, low, high)


def _ratio_end(p: float, q: float, p_end: float, q_end: float, sign: int) -> float:
    """The root of (p − r q)² = (p − p_end)² + r² (q − q_end)², the larger one for ``sign`` 1."""
    a, c = q_end * (2 * q - q_end), p_end * (2 * p - p_end)
    root = math.sqrt(max(0.0, (p * q) ** 2 - a * c))
    if sign > 0:
        return (p * q + root) / a if a > 0 else math.inf
    # The other way to write the root: it needs no division by what may be zero.
    return max(0.0, c / (p * q + root)) if p * q + root > 0 else 0.0


def largest_difference(successes: ArrayLike, totals: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Largest minus smallest of several groups' proportions; ``successes`` and ``totals`` [groups], two or more.

    The upper end is the largest of any pair's (``difference_of``): the pair that truly lies farthest apart is among
    them, so it needs no correction. The lower end is the largest at a level corrected for the number of pairs
    (Bonferroni), and never below zero: that some groups lie apart in the sample is no surprise where there are many.
    """
    x, n = _groups(successes, totals)
    p = x / n
    pairs = _pairs_downwards(p)
    return Estimate(float(np.ptp(p)), *_of_pairs(x, n, pairs, len(pairs), confidence))


def largest_of_differences(tables: list[tuple[ArrayLike, ArrayLike]], confidence: float = 0.95) -> Estimate:
    """The largest of several ``largest_difference``, each of (successes, totals): equalised odds takes two."""
    groups = [_groups(*table) for table in tables]
    count = sum(len(x) * (len(x) - 1) // 2 for x, _ in groups)
    ends = [_of_pairs(x, n, _pairs_downwards(x / n), count, confidence) for x, n in groups]
    value = max(float(np.ptp(x / n)) for x, n in groups)
    return Estimate(value, max(low for low, _ in ends), max(high for _, high in ends))


def _pairs_downwards(p: Array) -> list[tuple[int, int]]:
    return list(combinations(np.argsort(-p, kind="stable").tolist(), 2))


def _of_pairs(x: Array, n: Array, pairs: list[tuple[int, int]], count: int, confidence: float) -> tuple[float, float]:
    """(low, high) of the largest |difference|, pairs with the larger proportion first."""
    wide = _many(x, n, 1 - (1 - confidence) / count)
    plain = _many(x, n, confidence)
    low = max(mover(wide[a], wide[b]).low for a, b in pairs)
    return max(0.0, low), max(max(abs(end) for end in mover(plain[a], plain[b])[1:]) for a, b in pairs)


def smallest_ratio(successes: ArrayLike, totals: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Smallest over largest of several groups' proportions, in [0, 1]; NaN of 0 to 1 where all are zero.

    Ends as for ``largest_difference``: the smallest of any pair's, and the smallest at a level corrected for the pairs.
    """
    x, n = _groups(successes, totals)
    p = x / n
    pairs = _pairs_downwards(p)

    def ratios(level: float) -> list[Estimate]:
        return [ratio_of((int(x[b]), int(x[a])), (int(n[b]), int(n[a])), level) for a, b in pairs]

    low = min(min(found.low, 1 / found.high if found.high > 0 else 1.0) for found in ratios(confidence))
    high = min(found.high for found in ratios(1 - (1 - confidence) / len(pairs)))
    value = float(p.min() / p.max()) if p.max() > 0 else math.nan
    return Estimate(value, min(low, 1.0), min(high, 1.0))


def _proportions(successes: tuple[int, int], totals: tuple[int, int], confidence: float) -> tuple[Estimate, Estimate]:
    one, other = _many(*_groups(successes, totals), confidence)
    return one, other


def _many(x: Array, n: Array, confidence: float) -> list[Estimate]:
    return [Estimate(*map(float, row)) for row in zip(x / n, *wilson_intervals(x, n, confidence), strict=True)]


def _groups(successes: ArrayLike, totals: ArrayLike) -> tuple[Array, Array]:
    x, n = np.asarray(successes, np.float64), np.asarray(totals, np.float64)
    if x.ndim != 1 or x.shape != n.shape or len(x) < 2:
        raise ValueError(f"successes {x.shape} of totals {n.shape}: expected two groups or more, one number each")
    if np.any(n <= 0) or np.any(x < 0) or np.any(x > n):
        raise ValueError("each group needs 0 <= successes <= total and a total above zero")
    return x, n
