"""False alarms of the tests: how often they name a difference where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy import stats

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


def alarms() -> list[Alarm]:
    """The tests' false alarms, the worst of several numbers of samples that differ or pairs."""
    exact, middle = (max(_mcnemar(n)[which] for n in (5, 10, 20, 50, 100, 200)) for which in (0, 1))
    return [
        Alarm("McNemar, exact, 5 to 200 samples that differ", "statistics.mcnemar", exact, 0),
        Alarm("McNemar, mid-p, 5 to 200 samples that differ", "statistics.mcnemar", middle, 0),
        _drawn("a thing timed against itself, 9 pairs", "statistics.compare_pairs", _timed, 2000),
        _drawn("any of 4 groups named, after Holm", "fairness.group_losses", _named, 300),
    ]


def _mcnemar(differing: int) -> tuple[float, float]:
    """How often either p is at most 5 % when so many samples differ."""
    splits = np.arange(differing + 1)
    chance = stats.binom.pmf(splits, differing, 0.5)
    found = [mcnemar([1] * k + [0] * (differing - k), [0] * k + [1] * (differing - k)) for k in splits]
    return tuple(
        float(sum(chance[[p <= LEVEL for p in ps]])) for ps in ([f.p for f in found], [f.p_mid for f in found])
    )


def _drawn(test: str, source: str, draw: Callable[[Generator], bool], draws: int) -> Alarm:
    random = np.random.default_rng(0)
    return Alarm(test, source, sum(draw(random) for _ in range(draws)) / draws, draws)


def _timed(random: Generator) -> bool:
    shared = random.lognormal(0, 0.3, 9)
    a, b = (shared * random.lognormal(0, 0.1, 9) for _ in range(2))
    return compare_pairs(a, b).verdict != "no difference shown"


def _named(random: Generator) -> bool:
    groups = np.repeat(list("abcd"), (200, 150, 100, 300))
    original = (random.random(len(groups)) < 0.9).astype(float)
    compressed = original * (random.random(len(groups)) >= 0.05)
    return any(loss.p_adjusted <= LEVEL for loss in group_losses(original, compressed, groups))
