"""Intervals of proportions, means, any metric, quantiles, differences and ratios; tests of pairs. Plain floats out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Array = NDArray[np.float64]
Verdict = Literal["faster", "slower", "no difference shown"]
RESAMPLES = 2000
_CELLS = 4_000_000  # how many resampled values may lie in memory at once
_BCA_LIMIT = 2000  # above this many values the bias correction is too small to pay n² for
_FEW = 4  # up to so many successes (or failures) Wilson's inner end is too far in


class Estimate(NamedTuple):
    """A value and its interval; an end is infinite where the data cannot bound it."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion: Wilson's, modified where all but a few fail or succeed.

    Source: Wilson 1927, "Probable inference, the law of succession". Plain, it holds 0.03 to 0.05 too seldom where one
    to four are expected to fail (99 % right of 100: 92 %). Brown, Cai and DasGupta 2001 ("Interval estimation for a
    binomial proportion", section 4.1.1) therefore let its inner end begin at the exact one-sided limit there, which
    here is the binomial's rather than its Poisson approximation. Both ends of up to eight do so too: plain, one failure
    alone would bound the proportion by 0.79. Raises ValueError unless 0 ≤ successes ≤ n and n > 0.

    >>> low, high = wilson(0, 10)
    >>> round(low, 3), round(high, 3)
    (0.0, 0.278)
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n and n > 0")
    low, high = wilson_intervals(np.array([successes]), np.array([n]), confidence)
    return float(low[0]), float(high[0])


def wilson_intervals(successes: ArrayLike, totals: ArrayLike, confidence: float = 0.95) -> tuple[Array, Array]:
    """``wilson`` of many proportions at once: (low, high), float64 [k] of ``successes`` [k] and ``totals`` [k]."""
    x, n = np.asarray(successes, np.float64), np.asarray(totals, np.float64)
    low, high = _score(x, n, confidence)
    few, many = ((0 < k) & ((k <= np.minimum(_FEW, n / 2)) | (n <= 2 * _FEW)) for k in (x, n - x))
    low[few] = np.minimum(low[few], special.betaincinv(x[few], n[few] - x[few] + 1, 1 - confidence))
    high[many] = np.maximum(high[many], special.betaincinv(x[many] + 1, n[many] - x[many], confidence))
    return low, high


def _score(x: Array, n: Array, confidence: float) -> tuple[Array, Array]:
    """Wilson's interval as published."""
    z2 = float(special.ndtri((1 + confidence) / 2)) ** 2
    middle, half = (x + z2 / 2) / (n + z2), np.sqrt(z2 * (x * (n - x) / n + z2 / 4)) / (n + z2)
    # At the ends rounding would leave 1e-17 where the limit is exact.
    return np.where(x == 0, 0.0, middle - half), np.where(x == n, 1.0, middle + half)


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of ``values`` [n], n ≥ 2: at each end the wider of Student's and Hall's.

    With t Student's quantile, s the standard deviation and γ the skewness of the values, Student's ends are m ± t s/√n,
    Hall's m − h(∓t) s/√n with h the inverse of w + γw²/3√n + γ²w³/27n + γ/6√n (Hall 1992, "On the removal of skewness
    by transformation", section 2). Student's alone ends too early on the long side of skewed values, Hall's on heavy
    tails. It holds from 50 values on, of which ten are unlike the commonest. Values that are all the same give an
    interval of no width.
    """
    x = _finite(values, at_least=2)
    n, mean = len(x), float(x.mean())
    if np.all(x == x[0]):
        return float(x[0]), float(x[0])
    standard_error = float(x.std(ddof=1)) / math.sqrt(n)
    t = float(special.stdtrit(n - 1, (1 + confidence) / 2))
    ends = [mean + sign * max(t, sign * -_unskewed(-sign * t, x)) * standard_error for sign in (-1, 1)]
    return ends[0], ends[1]


def _unskewed(quantile: float, x: Array) -> float:
    """Hall's h: the value of (m − μ)√n / s that his transformation takes to ``quantile``."""
    g = float(np.mean(((x - x.mean()) / x.std()) ** 3)) / math.sqrt(len(x))
    if abs(g) < 1e-6:  # the cube root loses its digits; the limit is the identity
        return quantile
    return 3 * (float(np.cbrt(1 + g * (quantile - g / 6))) - 1) / g


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., Any],
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of ``statistic`` (values, axis) of ``values`` [n], n ≥ 2.

    At each end the wider of percentile and BCa (Efron 1987, "Better bootstrap confidence intervals"; up to 2000
    values), both with Student's quantiles for n samples (Hesterberg 2015, arXiv:1411.5279, section 5.3): it holds from
    100 values on. A resample in which the statistic is not defined (NaN) counts against both ends. Values that are all
    the same give an interval of no width. The same seed gives the same interval. The mean needs no resampling
    (``mean_interval``), nor what rises or falls with a mean: take the root of the mean square's ends.
    """
    x = _finite(values, at_least=2)
    if np.all(x == x[0]):
        value = float(statistic(x, axis=0))
        return value, value
    n, random = len(x), np.random.default_rng(seed)
    batch = max(1, _CELLS // n)
    found = np.concatenate([
        np.asarray(statistic(x[random.integers(0, n, (min(batch, RESAMPLES - done), n))], axis=-1), np.float64)
        for done in range(0, RESAMPLES, batch)
    ])  # fmt: skip
    z = math.sqrt(n / (n - 1)) * float(special.stdtrit(n - 1, (1 + confidence) / 2)) * np.array([-1.0, 1.0])
    quantiles = [z, _bca(x, statistic, found, z)] if n <= _BCA_LIMIT else [z]
    below, above = (np.where(np.isnan(found), end, found) for end in (-math.inf, math.inf))
    low = min(_quantile(below, float(special.ndtr(ends[0]))) for ends in quantiles)
    return low, max(_quantile(above, float(special.ndtr(ends[1]))) for ends in quantiles)


def _bca(x: Array, statistic: Callable[..., Any], found: Array, z: Array) -> Array:
    """The normal quantiles that the bias correction and the acceleration make of ``z``."""
    n, value = len(x), float(statistic(x, axis=0))
    known = found[np.isfinite(found)]
    below = (np.count_nonzero(known < value) + np.count_nonzero(known <= value)) / 2
    bias = float(special.ndtri((below + 0.5) / (len(known) + 1)))
    others = np.arange(n - 1) + (np.arange(n - 1) >= np.arange(n)[:, None])
    left_out = np.asarray(statistic(x[others], axis=-1), np.float64)
    left_out = left_out[np.isfinite(left_out)]
    pull = left_out.mean() - left_out if len(left_out) else left_out
    spread = float(np.sum(pull**2)) ** 1.5
    acceleration = float(np.sum(pull**3)) / (6 * spread) if spread > 0 else 0.0
    moved = bias + z
    return bias + moved / np.maximum(1 - acceleration * moved, 1e-3)


def _quantile(values: Array, q: float) -> float:
    return float(np.quantile(values, q, method="higher" if q > 0.5 else "lower"))


def bootstrap_rows(
    metric: Callable[..., float], *rows: NDArray[Any], confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """``metric(*rows)`` with its ``bootstrap_interval``; each of ``rows`` is [n, …], resampled together.

    For metrics that are no mean of samples: AUC, F1, a correlation, the difference of two models' AUC. Raises
    ValueError for other lengths, fewer than two rows, or a metric that is not defined on the rows as they are.

    >>> low, high = bootstrap_rows(lambda a, b: np.corrcoef(a, b)[0, 1], np.arange(50.0), np.arange(50.0) ** 2)[1:]
    >>> bool(0.9 < low < high <= 1)
    True
    """
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise ValueError(f"rows of {sorted(lengths)} do not go together: expected the same number of each")
    value = float(metric(*rows))
    if not math.isfinite(value):
        raise ValueError(f"the metric of these rows is {value}: expected a finite number")

    def of(numbers: Any, axis: int) -> Any:
        whole = numbers.astype(np.int64)
        return np.apply_along_axis(lambda at: metric(*(row[at] for row in rows)), axis, whole)

    return Estimate(value, *bootstrap_interval(np.arange(lengths.pop()), of, confidence, seed))


def quantile_interval(values: ArrayLike, q: float, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the ``q``-quantile between order statistics of ``values`` [n], whatever their distribution.

    Order statistics alone hold more often than they need (Conover 1999, "Practical Nonparametric Statistics", section
    3.2), as they are few: each end lies between two neighbours (Hettmansperger and Sheather 1986; Nyblom 1992, "Note on
    interpolated order statistics", for quantiles other than the median). An end that n values cannot bound is infinite:
    the median needs 6 values at 95 %, the 95 % quantile's upper end 72.
    """
    x = np.sort(_finite(values, at_least=1))
    if not 0 < q < 1:
        raise ValueError(f"the {q}-quantile: expected between 0 and 1")
    tail = (1 - confidence) / 2
    return _from_below(x, q, tail), -_from_below(-x[::-1], 1 - q, tail)


def _from_below(x: Array, q: float, tail: float) -> float:
    """The one-sided lower limit of a quantile of sorted values: at π_r ≤ tail < π_r+1, π_r = P(Bin(n, q) < r)."""
    n = len(x)
    below = special.bdtr(np.arange(n), n, q)
    r = int(np.searchsorted(below, tail, "right"))
    if r == 0:
        return -math.inf
    if r == n:
        return float(x[-1])
    short, over = tail - below[r - 1], below[r] - tail
    weight = (n - r) * q * short / ((n - r) * q * short + r * (1 - q) * over)
    return float(x[r - 1] + weight * (x[r] - x[r - 1]))


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Estimate:
    """mean(a − b) of pairs, with its interval.

    Pairs of zeros and ones: Newcombe 1998, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", method 10. Anything else: ``mean_interval`` of the differences. One pair
    that is not of zeros and ones is bounded by nothing.
    """
    x, y = _pairs(a, b)
    if is_binary(x) and is_binary(y):
        return _newcombe(x, y, confidence)
    difference = x - y
    value = float(difference.mean())
    if len(difference) < 2:
        return Estimate(value, -math.inf, math.inf)
    return Estimate(value, *mean_interval(difference, confidence))


def _newcombe(x: Array, y: Array, confidence: float) -> Estimate:
    n = len(x)
    both, only_x = int((x * y).sum()), int((x * (1 - y)).sum())
    only_y = int((y * (1 - x)).sum())
    neither = n - both - only_x - only_y
    lows, highs = _score(np.array([both + only_x, both + only_y], np.float64), np.array([n, n], np.float64), confidence)
    (l1, l2), (u1, u2) = lows.tolist(), highs.tolist()
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

    The pairing cancels what slows both of a pair. The interval is that of a median (``quantile_interval``), which holds
    its coverage at small n, where the bootstrap does not.
    """
    x, y = _pairs(a, b)
    if np.any(x <= 0) or np.any(y <= 0):
        raise ValueError("ratios need positive values")
    ratios = x / y
    return Estimate(float(np.median(ratios)), *quantile_interval(ratios, 0.5, confidence))


class PairedTest(NamedTuple):
    """``ratio``: median of aᵢ / bᵢ and its interval; ``p``: of no difference, by the sign test; ``verdict``: of b."""

    ratio: Estimate
    p: float
    verdict: Verdict

    def __str__(self) -> str:
        """For example "faster by 2.1× (1.9–2.3)"."""
        if self.verdict == "no difference shown":
            return self.verdict
        times = self.ratio if self.verdict == "faster" else [1 / end for end in self.ratio]
        low, high = sorted(times[1:])
        return f"{self.verdict} by {times[0]:.3g}× ({low:.3g}–{high:.3g})"


def compare_pairs(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> PairedTest:
    """Whether ``b`` takes less time than ``a``, pairs of positive times [n] that were measured side by side.

    "faster" or "slower" where ``ratio_interval`` leaves out 1: of the comparisons of a thing with itself one in twenty
    names a difference, whatever the times' distribution. Fewer than 6 pairs never show one at 95 %.

    >>> str(compare_pairs([20, 21, 22, 20, 21, 22, 24, 20, 20], [10, 10, 11, 10, 10, 10, 11, 10, 9]))
    'faster by 2.1× (2–2.2)'
    """
    ratio = ratio_interval(a, b, confidence)
    x, y = _pairs(a, b)
    more, less = int(np.count_nonzero(x > y)), int(np.count_nonzero(x < y))
    p = _sign_test(more, less)[0]
    verdict: Verdict = "faster" if ratio.low > 1 else "slower" if ratio.high < 1 else "no difference shown"
    return PairedTest(ratio, p, verdict)


class McNemar(NamedTuple):
    """``only_a``, ``only_b``: samples that one of the two alone has right; ``p``: exact; ``p_mid``: mid-p."""

    only_a: int
    only_b: int
    p: float
    p_mid: float


def mcnemar(a: ArrayLike, b: ArrayLike) -> McNemar:
    """McNemar's test that two models are right equally often; ``a`` and ``b`` [n] in {0, 1}, the same samples.

    Source: McNemar 1947; mid-p: Fagerland, Lydersen and Laake 2013, "The McNemar test for binary matched-pairs data".
    The exact p is never too small, the mid-p nearly never, and it sees more. Raises ValueError for other values.

    >>> mcnemar([1] * 12 + [0] * 2, [0] * 12 + [1] * 2)[2:]
    (0.012939453125, 0.0073852539...)
    """
    x, y = _pairs(a, b)
    if not (is_binary(x) and is_binary(y)):
        raise ValueError("McNemar's test is of zeros and ones")
    only_a, only_b = int((x > y).sum()), int((x < y).sum())
    return McNemar(only_a, only_b, *_sign_test(only_a, only_b))


def _sign_test(more: int, less: int) -> tuple[float, float]:
    """(exact, mid-p): how likely a split at least as uneven is when either side is as likely."""
    fewest, n = min(more, less), more + less
    tail, point = float(stats.binom.cdf(fewest, n, 0.5)), float(stats.binom.pmf(fewest, n, 0.5))
    return min(1.0, 2 * tail), min(1.0, 2 * tail - point)


def holm(p: ArrayLike) -> Array:
    """Holm's adjusted p-values [k]: below α with at most α chance that any of the true hypotheses is.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    x = _p_values(p)
    order = np.argsort(x, kind="stable")
    steps = np.maximum.accumulate(x[order] * np.arange(len(x), 0, -1))
    return _put(order, np.minimum(steps, 1.0))


def benjamini_hochberg(p: ArrayLike) -> Array:
    """Benjamini and Hochberg's adjusted p-values [k]: of those below α, at most the fraction α is expected to be false.

    Source: Benjamini and Hochberg 1995, "Controlling the false discovery rate".

    >>> benjamini_hochberg([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.04, 0.04]
    """
    x = _p_values(p)
    order = np.argsort(x, kind="stable")[::-1]
    steps = np.minimum.accumulate(x[order] * len(x) / np.arange(len(x), 0, -1))
    return _put(order, np.minimum(steps, 1.0))


def _p_values(p: ArrayLike) -> Array:
    x = np.asarray(p, np.float64)
    if x.ndim != 1 or not np.all((x >= 0) & (x <= 1)):
        raise ValueError(f"p-values of shape {x.shape}: expected one dimension and values from 0 to 1")
    return x


def _put(order: NDArray[np.int64], values: Array) -> Array:
    placed = np.empty_like(values)
    placed[order] = values
    return placed


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
