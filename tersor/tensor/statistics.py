"""Intervals: for proportions, means, quantiles, paired differences and ratios. Arrays in, plain floats out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]
RESAMPLES = 2000
_CELLS = 4_000_000  # how many resampled values may lie in memory at once
_BCA_LIMIT = 2000  # above this many values the bias correction is too small to pay n² for
_NAMED: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median}


class Estimate(NamedTuple):
    """A value and its interval; an end is infinite where the data cannot bound it."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion. Source: Wilson 1927, "Probable inference, the law of succession".

    Raises ValueError unless 0 ≤ successes ≤ n and n > 0.

    >>> low, high = wilson(0, 10)
    >>> round(low, 3), round(high, 3)
    (0.0, 0.278)
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n and n > 0")
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(
    values: ArrayLike,
    statistic: Literal["mean", "median"] | Callable[..., Any] = "mean",
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of a statistic of ``values`` [n], n ≥ 2; a callable takes (values, axis).

    BCa (Efron 1987, "Better bootstrap confidence intervals") up to 2000 values, percentile above. Values that are all
    the same give an interval of no width. The same seed gives the same interval.
    """
    x = _finite(values, at_least=2)
    function = _NAMED[statistic] if isinstance(statistic, str) else statistic
    if np.all(x == x[0]):
        value = float(function(x, axis=0))
        return value, value
    result = stats.bootstrap(
        (x,), function, confidence_level=confidence, n_resamples=RESAMPLES, batch=max(1, _CELLS // len(x)),
        method="BCa" if len(x) <= _BCA_LIMIT else "percentile", vectorized=True, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def quantile_interval(values: ArrayLike, q: float, confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval of the ``q``-quantile from two order statistics of ``values`` [n].

    Conover 1999, "Practical Nonparametric Statistics", section 3.2. An end that n values cannot bound is infinite: the
    median needs 6 values at 95 %, the 95 % quantile's upper end 72.
    """
    x = _finite(values, at_least=1)
    interval: Any = stats.quantile_test(x, p=q).confidence_interval(confidence)
    low, high = float(interval.low), float(interval.high)
    return -math.inf if math.isnan(low) else low, math.inf if math.isnan(high) else high


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """mean(a − b) of pairs, with its interval.

    Pairs of zeros and ones: Newcombe 1998, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", method 10. Anything else: bootstrap of the differences. One pair that is not
    of zeros and ones is bounded by nothing.
    """
    x, y = _pairs(a, b)
    if is_binary(x) and is_binary(y):
        return _newcombe(x, y, confidence)
    difference = x - y
    value = float(difference.mean())
    if len(difference) < 2:
        return Estimate(value, -math.inf, math.inf)
    return Estimate(value, *bootstrap_interval(difference, "mean", confidence, seed))


def _newcombe(x: Array, y: Array, confidence: float) -> Estimate:
    n = len(x)
    both, only_x = int((x * y).sum()), int((x * (1 - y)).sum())
    only_y = int((y * (1 - x)).sum())
    neither = n - both - only_x - only_y
    (l1, u1), (l2, u2) = wilson(both + only_x, n, confidence), wilson(both + only_y, n, confidence)
    p1, p2 = (both + only_x) / n, (both + only_y) / n
    phi = _corrected_phi(both, only_x, only_y, neither)
    below = (p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2
    above = (u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2
    value = (only_x - only_y) / n
    return Estimate(value, value - math.sqrt(max(below, 0.0)), value + math.sqrt(max(above, 0.0)))


def _corrected_phi(both: int, only_x: int, only_y: int, neither: int) -> float:
    """Newcombe's φ̂ of the 2 × 2 table, continuity-corrected where it is positive."""
    margins = (both + only_x) * (only_y + neither) * (both + only_y) * (only_x + neither)
    if margins == 0:
        return 0.0
    determinant = float(both * neither - only_x * only_y)
    if determinant > 0:
        determinant = max(determinant - (both + only_x + only_y + neither) / 2, 0.0)
    return determinant / math.sqrt(margins)


def ratio_interval(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Median of the ratios aᵢ / bᵢ of positive pairs that were measured side by side, with its interval.

    The pairing cancels what slows both of a pair. The interval is distribution-free (``quantile_interval``): for a
    median it holds its coverage at small n, where the bootstrap does not.
    """
    x, y = _pairs(a, b)
    if np.any(x <= 0) or np.any(y <= 0):
        raise ValueError("ratios need positive values")
    ratios = x / y
    return Estimate(float(np.median(ratios)), *quantile_interval(ratios, 0.5, confidence))


def is_binary(values: ArrayLike) -> bool:
    """Whether every value is 0 or 1."""
    x = np.asarray(values)
    return bool(np.all((x == 0) | (x == 1)))


def _finite(values: ArrayLike, *, at_least: int) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) < at_least:
        raise ValueError(f"values of shape {x.shape}: expected one dimension and at least {at_least}")
    if not np.all(np.isfinite(x)):
        raise ValueError("values must be finite")
    return x


def _pairs(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    x, y = _finite(a, at_least=1), _finite(b, at_least=1)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} values are not pairs")
    return x, y
