"""False alarms of the tests: how often they name a difference where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import Generator
from scipy import stats

from benchmarks.coverage.settings import DRAWS
from tersor.tensor.fairness import group_losses
from tersor.tensor.statistics import compare_pairs, mcnemar

LEVEL = 0.05


@dataclass(frozen=True)
class Alarm:
    """``rate``: how often the test is below 5 % without a difference; ``draws`` is 0 where summed exactly."""

    test: str
    source: str
    rate: float
    draws: int


# (samples, share on which exactly one of the two is right)
DIFFERING = ((100, 0.05), (100, 0.2), (300, 0.03), (1000, 0.02), (1000, 0.1))


def alarms() -> list[Alarm]:
    """The tests' false alarms; of McNemar's the most of several settings."""
    exact, middle = (max(rates) for rates in zip(*(_mcnemar(*setting) for setting in DIFFERING), strict=True))
    return [
        Alarm("McNemar, exact, 100 to 1000 samples", "statistics.mcnemar", exact, 0),
        Alarm("McNemar, mid-p, 100 to 1000 samples", "statistics.mcnemar", middle, 0),
        _drawn("a thing timed against itself, 10 pairs", "statistics.compare_pairs", _timed, DRAWS),
        _drawn("any of 4 groups named, after Holm", "fairness.group_losses", _named, 500),
    ]


def _mcnemar(n: int, share: float) -> tuple[float, float]:
    """How often either p is at most 5 % where a sample differs with chance ``share``."""
    chance = stats.binom.pmf(np.arange(n + 1), n, share)
    likely = np.flatnonzero(chance > 1e-6).tolist()
    rates = np.array([_of_differing(count) for count in likely])
    exact, middle = (chance[likely] @ rates).tolist()
    return exact, middle


@cache
def _of_differing(count: int) -> tuple[float, float]:
    """The same when so many samples differ."""
    chance, sums = stats.binom.pmf(np.arange(count + 1), count, 0.5), [0.0, 0.0]
    for one in range(count // 2 + 1):
        found = mcnemar(np.arange(count) < one, np.arange(count) >= one) if count else None
        both = chance[one] + (chance[count - one] if count - one != one else 0)
        for which, p in enumerate((found.p, found.p_mid) if found else (1.0, 1.0)):
            sums[which] += float(both) if p <= LEVEL else 0.0
    return sums[0], sums[1]


def _drawn(test: str, source: str, draw: Callable[[Generator], bool], draws: int) -> Alarm:
    random = np.random.default_rng(0)
    return Alarm(test, source, sum(draw(random) for _ in range(draws)) / draws, draws)


def _timed(random: Generator) -> bool:
    shared = random.lognormal(0, 0.3, 10)
    a, b = (shared * random.lognormal(0, 0.1, 10) for _ in range(2))
    return compare_pairs(a, b).verdict != "no difference shown"


def _named(random: Generator) -> bool:
    groups = np.repeat(list("abcd"), (200, 150, 100, 300))
    original = (random.random(len(groups)) < 0.9).astype(float)
    compressed = original * (random.random(len(groups)) >= 0.05)
    return any(loss.p_adjusted <= LEVEL for loss in group_losses(original, compressed, groups))
