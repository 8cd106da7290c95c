"""Proportions of separate groups: differences, ratios, and how far apart several groups are. Plain floats out."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from tersor.tensor.statistics import Estimate, wilson_intervals

Array = NDArray[np.float64]
Pair = tuple[float, float]
Apart = Callable[[Array, Array], Array]
_SCALES = 16  # true gaps that are tried
_CLOSEST = 1e-6  # proportions nearer than this to one another, to zero or to one count as there
_NODES = np.linspace(-4, 4, 33)  # of integrals over a normal distribution
_WEIGHTS = np.exp(-(_NODES**2) / 2) / np.exp(-(_NODES**2) / 2).sum()


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


def difference_of(successes: Pair, totals: Pair, confidence: float = 0.95) -> Estimate:
    """The first proportion minus the second, of separate samples (Newcombe 1998, method 10).

    >>> [round(value, 4) for value in difference_of((56, 48), (70, 80))]
    [0.2, 0.0524, 0.3339]
    """
    return mover(*_proportions(successes, totals, confidence))


def ratio_of(successes: Pair, totals: Pair, confidence: float = 0.95) -> Estimate:
    """The first proportion over the second, of separate samples; NaN of 0 to ∞ where both are zero.

    MOVER of a ratio (Donner and Zou 2012, "Closed-form confidence intervals for functions of the normal mean and
    standard deviation", section 2.2) with Wilson's intervals: limits of the ratio are where p₁ − r p₂ may be zero.
    """
    return _ratio(*_proportions(successes, totals, confidence))


def _ratio(one: Estimate, other: Estimate) -> Estimate:
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

    Two groups: ``difference_of`` without its sign, never below zero. More lie apart by chance, the more the more there
    are; the interval is of the true gaps for which what was found is no surprise (``_inverted``), and reaches at least
    as far as any pair's limit at 85 % (where groups differ in size, others than found may lie farthest apart).
    """
    x, n = _groups(successes, totals)
    if len(x) > 2:
        return largest_of_differences([(x, n)], confidence)
    ((value, low, high),) = _pairwise(mover, x, n, confidence)
    return Estimate(abs(value), max(0.0, -high), max(high, -low))


def largest_of_differences(tables: list[tuple[ArrayLike, ArrayLike]], confidence: float = 0.95) -> Estimate:
    """The largest of several ``largest_difference``, each of (successes, totals): equalised odds takes two."""
    groups = [_groups(*table) for table in tables]
    value = max(float(np.ptp(x / n)) for x, n in groups)
    found = _inverted(groups, value, lambda largest, smallest: largest - smallest, lambda at: at - value, confidence)
    pairs = [pair for table in groups for pair in _pairwise(mover, *table, _alone(confidence))]
    return Estimate(value, found.low, max(found.high, *(max(pair.high, -pair.low) for pair in pairs)))


def smallest_ratio(successes: ArrayLike, totals: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Smallest over largest of several groups' proportions, in [0, 1]; NaN of 0 to 1 where all are zero.

    Two groups: ``ratio_of``, at most one. More: as ``largest_difference``.
    """
    x, n = _groups(successes, totals)
    if not x.any():
        return Estimate(math.nan, 0.0, 1.0)
    if len(x) == 2:
        (found,) = _pairwise(_ratio, x, n, confidence)
        return Estimate(found.value, _smaller(found), min(found.high, 1.0))
    value = float((x / n).min() / (x / n).max())
    found = _inverted([(x, n)], value, lambda largest, smallest: smallest / largest, lambda at: at * value, confidence)
    pairs = _pairwise(_ratio, x, n, _alone(confidence))
    return Estimate(value, min(found.low, *(_smaller(pair) for pair in pairs)), found.high)


def _smaller(ratio: Estimate) -> float:
    """The lower end of a ratio or of its inverse."""
    return min(ratio.low, 1 / ratio.high if ratio.high > 0 else 1.0)


def _alone(confidence: float) -> float:
    """The level at which every pair's limit counts: errors three times as likely, 85 % for 95 %."""
    return max(0.0, 1 - 3 * (1 - confidence))


def _pairwise(of: Callable[[Estimate, Estimate], Estimate], x: Array, n: Array, confidence: float) -> list[Estimate]:
    """``of`` every two groups' proportions, the smaller one first."""
    return [of(*pair) for pair in combinations(sorted(_many(x, n, confidence)), 2)]


def _inverted(
    tables: list[tuple[Array, Array]], value: float, apart: Apart, least: Callable[[Array], Array], confidence: float
) -> Estimate:
    """How far apart groups truly lie, by test inversion: where what was found is at either end of the level.

    Tried are proportions that lie apart much as those found, but s times as far, s from 0 (all the same) upwards.
    Groups that share an extreme look farther apart than they are, so that for the nearest gap the groups in between
    count as half a standard error nearer to the extremes than found, for the farthest as nearer to the middle.
    ``apart``: of the largest and smallest proportion (of several tables the largest counts); ``least``: the smallest
    proportion that lies no farther apart from a given largest one than was found.
    """
    z, ends = float(special.ndtri((1 + confidence) / 2)), []
    for outwards, at in ((0.5, -z), (-0.5, 1.1 * z)):
        paths = _scaled(tables, outwards)
        truth = np.max([apart(p.max(axis=1), p.min(axis=1)) for p in paths], axis=0)
        chance = np.prod([_chance(p, n, least) for p, (_, n) in zip(paths, tables, strict=True)], axis=0)
        surprise = np.maximum.accumulate(-special.ndtri(np.clip(chance, 1e-12, 1 - 1e-12)))
        ends.append(float(np.interp(at, surprise, truth)))
    return Estimate(value, min(*ends, value), max(*ends, value))


def _scaled(tables: list[tuple[Array, Array]], outwards: float) -> list[Array]:
    """Proportions [scales, groups] of each table, from all the same to some standard errors farther apart than found.

    Groups in between lie ``outwards`` standard errors nearer to the extremes.
    """
    found = [((x + 0.5) / (n + 1), n) for x, n in tables]  # never 0 or 1
    shapes = [_shape(p, n, outwards) for p, n in found]
    farthest = max(float(np.ptp(shape)) for shape in shapes)
    if farthest < _CLOSEST:  # all the same: one group against the others
        shapes = [np.where(np.arange(len(shape)) == 0, shape + _CLOSEST, shape) for shape in shapes]
        farthest = _CLOSEST
    noise = max(float(_noise(p, n).max()) for p, n in found)
    scales = np.linspace(0, 1 + 9 * noise / farthest, _SCALES)[:, None]
    same = [np.average(p, weights=n) for p, n in found]
    return [
        np.clip(p + scales * (shape - p), _CLOSEST, 1 - _CLOSEST) for p, shape in zip(same, shapes, strict=True)
    ]  # fmt: skip


def _shape(p: Array, n: Array, outwards: float) -> Array:
    """Proportions, of which those in between the extremes are moved outwards by so many standard errors."""
    middle, reach = (p.max() + p.min()) / 2, float(np.ptp(p)) / 2
    away = p - middle
    extreme = np.where(away > 0, np.argmax(p), np.argmin(p))
    error = np.hypot(_noise(p, n), _noise(p, n)[extreme])
    moved = np.sign(away) * np.clip(np.abs(away) + outwards * error, 0, reach)
    return np.where((p == p.max()) | (p == p.min()), p, middle + moved)


def _noise(p: Array, n: Array) -> Array:
    return np.sqrt(p * (1 - p) / n)


def _chance(p: Array, n: Array, least: Callable[[Array], Array]) -> Array:
    """How likely groups [scales, groups] are found no farther apart than was, [scales].

    Σ_i ∫ f_i(x) Π_{j≠i} (F_j(x) − F_j(least(x))) dx over the group i that is the largest; F: the binomial's normal
    approximation with its skewness (Cornish and Fisher 1938).
    """
    q = np.clip(p, 0.5 / (n + 1), 1 - 0.5 / (n + 1))
    deviation = np.sqrt(q * (1 - q) / n)
    bend = (1 - 2 * q) / (6 * deviation * n)
    largest = p[..., None] + deviation[..., None] * (_NODES + bend[..., None] * (_NODES**2 - 1))

    def below(x: Array) -> Array:
        w = np.clip((x[:, :, None] - p[:, None, :, None]) / deviation[:, None, :, None], -_NODES[-1], _NODES[-1])
        return np.asarray(special.ndtr(w - bend[:, None, :, None] * (w**2 - 1)))

    between = np.clip(below(largest) - below(least(largest)), 0, 1)
    between[:, range(p.shape[1]), range(p.shape[1])] = 1
    return np.minimum((between.prod(axis=2) * _WEIGHTS).sum(axis=(1, 2)), 1)


def _proportions(successes: Pair, totals: Pair, confidence: float) -> tuple[Estimate, Estimate]:
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
