"""Coverage of the intervals of proportions: one, two, paired, several groups, and what groups lose."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from scipy import stats

from benchmarks.coverage.settings import DRAWS, Coverage, Draw, Ends, Family, Setting, ends
from tersor.tensor.fairness import excess
from tersor.tensor.proportions import (
    difference_of,
    largest_difference,
    largest_of_differences,
    ratio_of,
    smallest_ratio,
)
from tersor.tensor.statistics import Estimate, paired_difference, wilson_intervals

Rates = tuple[float, ...]
Members = tuple[int, ...]
# Settings are what a user meets: test sets of 100 to 10,000, groups of 50 and more, accuracies of 50 % to 99.5 %,
# differences of 0 to 5 points between two models.
RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
SIZES = (50, 100, 200, 500, 1000, 2000, 10_000)
# Accuracy of the original, and the shares that it alone and that the other alone has right.
PAIRED = (
    (0.6, 0.08, 0.06), (0.7, 0.1, 0.05), (0.7, 0.03, 0.02), (0.9, 0.03, 0.03), (0.9, 0.05, 0.01), (0.97, 0.02, 0.01),
)  # fmt: skip
PAIRS = (100, 300, 1000, 5000)
# (p, q, n, m): two groups of n and m.
TWO = (
    (0.5, 0.5, 50, 500), (0.3, 0.1, 80, 80), (0.9, 0.9, 100, 60), (0.8, 0.7, 60, 60), (0.9, 0.8, 200, 200),
    (0.97, 0.93, 300, 100), (0.95, 0.95, 1000, 300), (0.85, 0.8, 1000, 3000), (0.99, 0.97, 500, 1000),
)  # fmt: skip
SEVERAL: tuple[tuple[tuple[float, ...], tuple[int, ...]], ...] = (
    ((0.5, 0.5), (150, 60)),
    ((0.2, 0.6), (150, 60)),
    ((0.9, 0.87), (1000, 500)),
    ((0.5, 0.5, 0.7), (150, 60, 200)),
    ((0.7, 0.75, 0.72), (150, 60, 200)),
    ((0.95, 0.97, 0.96), (1000, 2000, 3000)),
    ((0.95, 0.9, 0.97), (5000, 50, 50)),
    ((0.9, 0.95, 0.97, 0.99), (150, 60, 200, 90)),
    ((0.5,) * 6, (150, 60, 200, 90, 120, 80)),
    ((0.1, 0.2, 0.3, 0.3, 0.3, 0.35), (150, 60, 200, 90, 120, 80)),
)
# (accuracy of the original, size of each group, share of what was right that each loses)
LOSSES: tuple[tuple[float, tuple[int, ...], tuple[float, ...]], ...] = (
    (0.9, (200, 200), (0.05, 0.05)),
    (0.9, (200, 400, 300), (0.15, 0.05, 0.05)),
    (0.9, (100, 800), (0.1, 0.03)),
    (0.8, (500, 500, 1000), (0.04, 0.02, 0.02)),
    (0.95, (1000, 4000), (0.02, 0.01)),
    (0.7, (60, 300), (0.1, 0.1)),
)


def families() -> list[Family]:
    """Every interval of proportions."""
    return [
        Family("A proportion", "statistics.wilson", tuple(_one(n, p) for n in SIZES for p in RATES), 0),
        Family(
            "Paired difference, zeros and ones", "statistics.paired_difference",
            tuple(_paired(n, *shares) for n in PAIRS for shares in PAIRED), DRAWS,
        ),
        Family("Difference of two groups", "proportions.difference_of", _two(difference_of, lambda p, q: p - q), DRAWS),
        Family("Ratio of two groups", "proportions.ratio_of", _two(ratio_of, lambda p, q: p / q), DRAWS),
        Family("Largest difference of groups", "proportions.largest_difference", _several(_gap), DRAWS),
        Family("Smallest ratio of groups", "proportions.smallest_ratio", _several(_ratio), DRAWS),
        Family("Equalised odds", "proportions.largest_of_differences", _several(_odds), DRAWS),
        Family("What a group loses more than others", "fairness.group_losses", _losses(), DRAWS),
    ]  # fmt: skip


def worst_proportion(n: int) -> float:
    """The least coverage of ``wilson`` among 1000 proportions from 0.5 on that expect half a failure or more."""
    return float(_exactly(n, np.linspace(0.5, 1 - 0.5 / n, 1000))[1].min())


def _exactly(n: int, p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = np.arange(n + 1)
    low, high = wilson_intervals(counts, np.full(n + 1, n))
    chance = stats.binom.pmf(counts[:, None], n, p)
    below, above = ((chance * side).sum(0) for side in (p < low[:, None] - 1e-12, p > high[:, None] + 1e-12))
    return below, 1 - below - above, above


def _one(n: int, p: float) -> Setting:
    def exact() -> Coverage:
        return Coverage(*(float(side[0]) for side in _exactly(n, np.array([p]))), draws=0)

    return Setting(f"{p:g} of {n}", exact=exact)


def _paired(n: int, right: float, only_a: float, only_b: float) -> Setting:
    shares = [right - only_a, only_a, only_b, 1 - right - only_b]

    def draw(random: Generator) -> tuple[Ends, float]:
        counts = random.multinomial(n, shares)
        a, b = np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)
        return ends(paired_difference(a, b)), only_a - only_b

    return Setting(f"{right:g} right, {only_a:g} lost, {only_b:g} gained, n {n}", draw)


def _two(interval: Callable[..., Estimate], truth: Callable[[float, float], float]) -> tuple[Setting, ...]:
    def of(p: float, q: float, n: int, m: int) -> Draw:
        def draw(random: Generator) -> tuple[Ends, float]:
            counts = int(random.binomial(n, p)), int(random.binomial(m, q))
            return ends(interval(counts, (n, m))), truth(p, q)

        return draw

    return tuple(Setting(f"{p:g} of {n}, {q:g} of {m}", of(p, q, n, m)) for p, q, n, m in TWO)


def _several(draw_of: Callable[[Rates, Members], Draw]) -> tuple[Setting, ...]:
    def said(rates: Rates, members: Members) -> str:
        return ", ".join(f"{rate:g} of {n}" for rate, n in zip(rates, members, strict=True))

    return tuple(Setting(said(*groups), draw_of(*groups)) for groups in SEVERAL)


def _gap(rates: Rates, members: Members) -> Draw:
    return lambda random: (ends(largest_difference(random.binomial(members, rates), members)), float(np.ptp(rates)))


def _ratio(rates: Rates, members: Members) -> Draw:
    return lambda random: (ends(smallest_ratio(random.binomial(members, rates), members)), min(rates) / max(rates))


def _odds(rates: Rates, members: Members) -> Draw:
    """True positive rates as given; false positive rates of 0.1 but for the first group's 0.2."""
    false = [0.2] + [0.1] * (len(rates) - 1)

    def draw(random: Generator) -> tuple[Ends, float]:
        tables = [(random.binomial(members, each), members) for each in (rates, false)]
        return ends(largest_of_differences(list(tables))), max(float(np.ptp(rates)), 0.1)

    return draw


def _losses() -> tuple[Setting, ...]:
    def of(accuracy: float, sizes: Members, losses: Rates) -> Draw:
        truth = accuracy * (losses[0] - float(np.average(losses[1:], weights=sizes[1:])))

        def draw(random: Generator) -> tuple[Ends, float]:
            original = (random.random(sum(sizes)) < accuracy).astype(float)
            compressed = original * (random.random(sum(sizes)) >= np.repeat(losses, sizes))
            first = np.arange(sum(sizes)) < sizes[0]
            return ends(excess(original, compressed, first, ~first)), truth

        return draw

    return tuple(
        Setting(f"{sizes[0]} of {sum(sizes)}, {losses[0]:g} of {accuracy:g} lost there", of(accuracy, sizes, losses))
        for accuracy, sizes, losses in LOSSES
    )
