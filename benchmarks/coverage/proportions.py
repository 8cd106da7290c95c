"""Coverage of the intervals of proportions: one, two, paired, several groups, and what groups lose."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from scipy import stats

from benchmarks.coverage.settings import Coverage, Draw, Ends, Family, Setting, ends
from tersor.tensor.fairness import group_losses
from tersor.tensor.proportions import (
    difference_of,
    largest_difference,
    largest_of_differences,
    ratio_of,
    smallest_ratio,
)
from tersor.tensor.statistics import Estimate, paired_difference, wilson_intervals

RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
SIZES = (20, 50, 100, 200, 500, 1000, 10_000)
TWO = ((0.9, 0.9, 100, 60), (0.9, 0.8, 200, 200), (0.97, 0.93, 300, 100), (0.3, 0.1, 80, 80), (0.5, 0.5, 50, 500))
SEVERAL = (
    (0.5,) * 2,
    (0.2, 0.6),
    (0.5, 0.5, 0.7),
    (0.9, 0.95, 0.97, 0.99),
    (0.5,) * 6,
    (0.1, 0.2, 0.3, 0.3, 0.3, 0.35),
)
MEMBERS = (150, 60, 200, 90, 120, 80)
# Accuracy of the original, and the shares that it alone and that the other alone has right.
PAIRED = ((0.9, 0.03, 0.03), (0.9, 0.05, 0.01), (0.7, 0.1, 0.05), (0.97, 0.02, 0.01), (0.7, 0.03, 0.02))


def families() -> list[Family]:
    """Every interval of proportions."""
    return [
        Family("A proportion", "statistics.wilson", tuple(_one(n, p) for n in SIZES for p in RATES), 0),
        Family(
            "Paired difference, zeros and ones", "statistics.paired_difference",
            tuple(_paired(n, *shares) for n in (100, 300, 1000, 5000) for shares in PAIRED), 4000,
        ),
        Family("Difference of two groups", "proportions.difference_of", _two(difference_of, lambda p, q: p - q), 4000),
        Family("Ratio of two groups", "proportions.ratio_of", _two(ratio_of, lambda p, q: p / q), 4000),
        Family("Largest difference of groups", "proportions.largest_difference", _several(_gap), 1500),
        Family("Smallest ratio of groups", "proportions.smallest_ratio", _several(_ratio), 1500),
        Family("Equalised odds", "proportions.largest_of_differences", _several(_odds), 1000),
        Family("What a group loses more than others", "fairness.group_losses", _losses(), 500),
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


def _several(draw_of: Callable[[tuple[float, ...]], Draw]) -> tuple[Setting, ...]:
    return tuple(Setting("groups of " + ", ".join(f"{rate:g}" for rate in rates), draw_of(rates)) for rates in SEVERAL)


def _gap(rates: tuple[float, ...]) -> Draw:
    members = MEMBERS[: len(rates)]
    return lambda random: (ends(largest_difference(random.binomial(members, rates), members)), float(np.ptp(rates)))


def _ratio(rates: tuple[float, ...]) -> Draw:
    members = MEMBERS[: len(rates)]
    return lambda random: (ends(smallest_ratio(random.binomial(members, rates), members)), min(rates) / max(rates))


def _odds(rates: tuple[float, ...]) -> Draw:
    """True positive rates as given; false positive rates of 0.1 but for the first group's 0.2."""
    members = MEMBERS[: len(rates)]
    false = [0.2] + [0.1] * (len(rates) - 1)

    def draw(random: Generator) -> tuple[Ends, float]:
        tables = [(random.binomial(members, each), members) for each in (rates, false)]
        return ends(largest_of_differences(list(tables))), max(float(np.ptp(rates)), 0.1)

    return draw


def _losses() -> tuple[Setting, ...]:
    def of(sizes: tuple[int, ...], losses: tuple[float, ...]) -> Draw:
        truth = 0.9 * losses[0] - 0.9 * float(np.average(losses[1:], weights=sizes[1:]))

        def draw(random: Generator) -> tuple[Ends, float]:
            original = (random.random(sum(sizes)) < 0.9).astype(float)
            compressed = original * (random.random(sum(sizes)) >= np.repeat(losses, sizes))
            groups = np.repeat([str(number) for number in range(len(sizes))], sizes)
            return ends(group_losses(original, compressed, groups)[0].excess), truth

        return draw

    chosen = (((200, 200), (0.05, 0.05)), ((200, 400, 300), (0.15, 0.05, 0.05)), ((100, 800), (0.1, 0.03)))
    return tuple(
        Setting(f"{sizes[0]} of {sum(sizes)}, {losses[0]:g} lost there", of(sizes, losses)) for sizes, losses in chosen
    )
