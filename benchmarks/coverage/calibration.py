"""Coverage of the intervals of calibration errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from benchmarks.coverage.settings import DRAWS, Draw, Ends, Family, Setting, ends
from tersor.tensor.calibration import BINS, Kind, ece_increase, ece_interval, mce

Array = NDArray[np.float64]
_POPULATION = 500_000
CONFIDENCES: dict[str, Callable[[Generator, int], Array]] = {
    "sure": lambda random, n: 1 - 0.9 * random.beta(0.15, 3, n),
    "less sure": lambda random, n: 1 - 0.6 * random.beta(0.4, 2, n),
    "spread": lambda random, n: random.uniform(0.2, 1, n),
    "all but certain": lambda random, n: random.uniform(0.998, 1, n),
}


def cooled(confidence: Array, temperature: float) -> Array:
    """What a confidence becomes once its logit is divided by ``temperature``."""
    c = np.clip(confidence, 1e-9, 1 - 1e-9)
    return 1 / (1 + (1 / c - 1) ** (1 / temperature))


ACCURACIES: dict[str, Callable[[Array], Array]] = {
    "calibrated": lambda c: c,
    "overconfident (T 1.2)": lambda c: cooled(c, 1.2),
    "overconfident (T 2)": lambda c: cooled(c, 2.0),
    "wrong in one bin": lambda c: np.where((c > 0.6) & (c < 0.75), c - 0.3, c),
    "right in 98.5 %": lambda c: np.full_like(c, 0.985),
}
OF_ITS_OWN = "all but certain", "right in 98.5 %"  # a model that may be right throughout a test set and is too sure yet


def families() -> list[Family]:
    """Every interval of calibration."""
    kinds: tuple[tuple[Kind, str], ...] = (("width", "equal width"), ("mass", "equal mass"))
    usual = [(c, a) for c in CONFIDENCES for a in ACCURACIES if c not in OF_ITS_OWN and a not in OF_ITS_OWN]
    combined = [(c, a, n) for c, a in usual for n in (200, 2000)] + [(*OF_ITS_OWN, n) for n in (100, 300, 2000)]
    errors = [
        Family(
            f"Calibration error, {said}", "calibration.ece_interval",
            tuple(Setting(f"{c}, {a}, n {n}", _ece(c, a, n, kind)) for c, a, n in combined), DRAWS,
        )
        for kind, said in kinds
    ]  # fmt: skip
    return [
        *errors,
        Family(
            "Rise of the calibration error", "calibration.ece_increase",
            tuple(Setting(f"{c}, {said}, n {n}", _increase(c, before, after, n)) for c in ("sure", "less sure")
                  for said, before, after in RISES for n in (500, 2000)), DRAWS,
        ),
        Family(
            "Largest calibration error", "calibration.mce",
            tuple(Setting(f"spread, {a}, n {n}", _mce("spread", a, n)) for a in ACCURACIES
                  if a not in OF_ITS_OWN for n in ENOUGH), DRAWS,
        ),
    ]  # fmt: skip


ENOUGH = (500, 2000, 10_000)  # samples for the largest error of any bin
RISES = (
    ("both calibrated", 1.0, 1.0),
    ("T 1 to T 1.5", 1.0, 1.5),
    ("T 1.3 to T 1.6", 1.3, 1.6),
    ("both T 1.5", 1.5, 1.5),
)


@cache
def _population(name: str) -> Array:
    return CONFIDENCES[name](np.random.default_rng(12345), _POPULATION)


def true_error(confidence: Array, accuracy: Array, kind: Kind) -> float:
    """The calibration error of a population's bins."""
    edges = np.linspace(0, 1, BINS + 1)
    if kind == "mass":
        edges = np.quantile(confidence, edges)
    number = np.searchsorted(edges[1:-1], confidence)
    return float(np.abs(np.bincount(number, confidence - accuracy)).sum() / len(confidence))


def _ece(confidences: str, accuracies: str, n: int, kind: Kind) -> Draw:
    accuracy = ACCURACIES[accuracies]

    def draw(random: Generator) -> tuple[Ends, float]:
        c = CONFIDENCES[confidences](random, n)
        found = ece_interval(c, random.random(n) < accuracy(c), kind=kind)
        return ends(found), _truth(confidences, accuracies, kind)

    return draw


@cache
def _truth(confidences: str, accuracies: str, kind: Kind) -> float:
    population = _population(confidences)
    return true_error(population, ACCURACIES[accuracies](population), kind)


def _increase(confidences: str, before: float, after: float, n: int) -> Draw:
    """Two models that are right on much the same samples: the same draw decides, at their own accuracies."""

    def draw(random: Generator) -> tuple[Ends, float]:
        c, luck = CONFIDENCES[confidences](random, n), random.random(n)
        other = cooled(c, np.exp(0.2 * random.normal(size=n)))
        pairs = [(c, luck < cooled(c, before)), (other, luck < cooled(other, after))]
        return ends(ece_increase(*pairs)), _true_rise(confidences, before, after)

    return draw


@cache
def _true_rise(confidences: str, before: float, after: float) -> float:
    population = _population(confidences)
    other = cooled(population, np.exp(0.2 * np.random.default_rng(1).normal(size=len(population))))
    old = true_error(population, cooled(population, before), "width")
    return true_error(other, cooled(other, after), "width") - old


def _mce(confidences: str, accuracies: str, n: int) -> Draw:
    """The truth is that of the bins that have samples, at these samples' confidences."""

    def draw(random: Generator) -> tuple[Ends, float]:
        c = CONFIDENCES[confidences](random, n)
        accuracy = ACCURACIES[accuracies](c)
        number = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], c)
        count = np.bincount(number)
        gaps = np.abs(np.bincount(number, c - accuracy))[count > 0] / count[count > 0]
        return ends(mce(c, random.random(n) < accuracy)), float(gaps.max())

    return draw
