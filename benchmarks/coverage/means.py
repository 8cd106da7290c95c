"""Coverage of the intervals of means, quantiles, ratios of medians, and of the bootstrap of any metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import stats

from benchmarks.coverage.settings import DRAWS, Ends, Family, Setting, ends
from tersor.measure.behaviour.confidence import auroc
from tersor.tensor.statistics import (
    bootstrap_interval,
    mean_interval,
    paired_difference,
    quantile_interval,
    ratio_interval,
)

Array = NDArray[np.float64]
VALUES: dict[str, tuple[Callable[[Generator, int], Array], float]] = {
    "normal": (lambda random, n: random.normal(0, 1, n), 0.0),
    "uniform": (lambda random, n: random.uniform(0, 1, n), 0.5),
    "Student's t, 3 degrees": (lambda random, n: random.standard_t(3, n), 0.0),
    "exponential": (lambda random, n: random.exponential(1, n), 1.0),
    "squared normal": (lambda random, n: random.normal(0, 1, n) ** 2, 1.0),
    "beta(5, 0.5), as of overlaps": (lambda random, n: random.beta(5, 0.5, n), 5 / 5.5),
    "log-normal": (lambda random, n: random.lognormal(0, 1, n), math.exp(0.5)),
    "a tenth not zero, normal": (lambda random, n: (random.random(n) < 0.1) * random.normal(0.5, 1, n), 0.05),
}
FEWEST = {"a tenth not zero, normal": 100}  # so that ten values differ from the commonest
SIZES = (50, 100, 500, 2000)  # sizes of test sets
QUANTILES = ((0.5, (9, 20, 100)), (0.95, (100, 1000)), (0.99, (500,)))
CONTINUOUS: dict[str, tuple[Callable[[Generator, int], Array], Callable[[float], float]]] = {
    "normal": (lambda random, n: random.normal(0, 1, n), lambda q: float(stats.norm.ppf(q))),
    "log-normal": (lambda random, n: random.lognormal(0, 1, n), lambda q: float(stats.lognorm.ppf(q, 1))),
}


def families() -> list[Family]:
    """Every interval of means, quantiles and other metrics."""
    means = tuple(_mean(name, n) for name in VALUES for n in SIZES if n >= FEWEST.get(name, 0))
    return [
        Family("A mean", "statistics.mean_interval", means, DRAWS),
        Family(
            "Paired difference, real values", "statistics.paired_difference",
            tuple(_paired_losses(n) for n in SIZES), DRAWS,
        ),
        Family(
            "A quantile", "statistics.quantile_interval",
            tuple(_quantile(q, n, name) for q, ns in QUANTILES for n in ns for name in CONTINUOUS), DRAWS,
        ),
        Family(
            "Ratio of medians", "statistics.ratio_interval",
            tuple(_ratio(n, factor) for n in (10, 20) for factor in (1, 1.1)), DRAWS,
        ),
        Family(
            "Any metric, by the bootstrap", "statistics.bootstrap_interval",
            tuple(_metric(name, n) for name in METRICS for n in (100, 300)), DRAWS // 2,
        ),
        Family(
            "AUROC, and its drop", "measure.behaviour.confidence.auroc",
            (*(_auroc(area, *sizes) for area in (0.7, 0.9, 0.97) for sizes in ((200, 200), (1000, 500))),
             *(_auroc_drop(area, less, 300) for area, less in ((0.8, 0.0), (0.9, 0.02), (0.97, 0.01)))), DRAWS,
        ),
    ]  # fmt: skip


def _mean(name: str, n: int) -> Setting:
    values, truth = VALUES[name]
    return Setting(f"{name}, n {n}", lambda random: (mean_interval(values(random, n)), truth))


def _paired_losses(n: int) -> Setting:
    """Losses of two models on the same samples: log-normal, the second one's a little larger."""

    def draw(random: Generator) -> tuple[Ends, float]:
        first = random.lognormal(-1, 1, n)
        return ends(paired_difference(first + random.gamma(0.5, 0.1, n), first)), 0.05

    return Setting(f"losses, n {n}", draw)


def _quantile(q: float, n: int, name: str) -> Setting:
    draw, quantile = CONTINUOUS[name]

    def of(random: Generator) -> tuple[Ends, float]:
        return quantile_interval(draw(random, n), q), quantile(q)

    return Setting(f"{q:g}, {name}, n {n}", of)


def _ratio(n: int, factor: float) -> Setting:
    def draw(random: Generator) -> tuple[Ends, float]:
        shared = random.lognormal(0, 0.3, n)
        return ends(ratio_interval(factor * shared * random.lognormal(0, 0.1, n), shared)), factor

    return Setting(f"{factor:g} times, {n} pairs", draw)


def auc(labels: Array, scores: Array) -> Any:
    """Area under the curve of rows [..., n] without ties."""
    order = np.argsort(scores, axis=-1, kind="stable")
    ranks = (np.take_along_axis(labels, order, -1) * np.arange(1, labels.shape[-1] + 1)).sum(-1)
    positives = labels.sum(-1)
    with np.errstate(invalid="ignore"):
        return (ranks - positives * (positives + 1) / 2) / (positives * (labels.shape[-1] - positives))


def f1(labels: Array, scores: Array) -> Any:
    """F1 of scores above zero."""
    chosen = scores > 0
    return 2 * (labels * chosen).sum(-1) / np.maximum(labels.sum(-1) + chosen.sum(-1), 1)


def correlation(a: Array, b: Array) -> Any:
    """Pearson's."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def _classes(share: float, apart: float) -> Callable[[Generator, int], tuple[Array, Array]]:
    def rows(random: Generator, n: int) -> tuple[Array, Array]:
        labels = (random.random(n) < share).astype(np.float64)
        return labels, random.normal(0, 1, n) + apart * (labels - 0.5)

    return rows


def _ranked(share: float, apart: float) -> Callable[[Generator, int], tuple[Array, Array]]:
    """The same with the scores' ranks, which are as good to an area and ten times as fast to sort."""
    rows = _classes(share, apart)

    def ranks(random: Generator, n: int) -> tuple[Array, Array]:
        labels, scores = rows(random, n)
        return labels, np.argsort(np.argsort(scores)).astype(np.int16)

    return ranks


def _together(random: Generator, n: int) -> tuple[Array, Array]:
    a = random.normal(0, 1, n)
    return a, a + random.normal(0, 1, n)


def _tokens(random: Generator, n: int) -> tuple[Array, Array]:
    count = random.integers(1, 20, n).astype(np.float64)
    return count * random.gamma(2, 0.5, n), count


_RIGHT = float(stats.norm.cdf(1))  # of either class, where means lie 2 apart
METRICS: dict[str, tuple[Callable[[Array, Array], Any], Callable[[Generator, int], tuple[Array, Array]], float]] = {
    "AUC 0.80": (auc, _ranked(0.5, 1.2), float(stats.norm.cdf(1.2 / math.sqrt(2)))),
    "AUC 0.94, 30 % positive": (auc, _ranked(0.3, 2.2), float(stats.norm.cdf(2.2 / math.sqrt(2)))),
    "F1, 30 % positive": (f1, _classes(0.3, 2.0), 0.6 * _RIGHT / (0.3 * _RIGHT + 0.7 * (1 - _RIGHT) + 0.3)),
    "correlation 0.71": (correlation, _together, math.sqrt(0.5)),
    "loss per token, by sequence": (lambda a, b: a.sum(-1) / b.sum(-1), _tokens, 1.0),
}  # fmt: skip


def _auroc(area: float, inside: int, away: int) -> Setting:
    """Normal scores whose means lie as far apart as makes this area."""
    apart = math.sqrt(2) * float(stats.norm.ppf(area))

    def draw(random: Generator) -> tuple[Ends, float]:
        found = auroc([(random.normal(apart, 1, inside), random.normal(0, 1, away))])
        assert found.low is not None and found.high is not None
        return (found.low, found.high), area

    return Setting(f"{area:g}, n {inside} and {away}", draw)


def _auroc_drop(area: float, less: float, n: int) -> Setting:
    """Two models' scores of the same samples, correlated 0.8, the second's area ``less`` smaller."""
    aparts = [math.sqrt(2) * float(stats.norm.ppf(each)) for each in (area, area - less)]

    def draw(random: Generator) -> tuple[Ends, float]:
        shared = random.normal(0, math.sqrt(0.8), (2, n))
        pairs = [(shared[0] + random.normal(apart, math.sqrt(0.2), n), shared[1] + random.normal(0, math.sqrt(0.2), n))
                 for apart in aparts]  # fmt: skip
        found = auroc(pairs)
        assert found.low is not None and found.high is not None
        return (found.low, found.high), less

    return Setting(f"drop of {less:g} from {area:g}, n {n} and {n}", draw)


def _metric(name: str, n: int) -> Setting:
    metric, rows, truth = METRICS[name]

    def draw(random: Generator) -> tuple[Ends, float]:
        a, b = rows(random, n)

        def of(numbers: Any, axis: int) -> Any:
            at = numbers.astype(np.int64)
            return metric(a[at], b[at])

        return bootstrap_interval(np.arange(n), of, seed=int(random.integers(2**31))), truth

    return Setting(f"{name}, n {n}", draw)
