"""A setting: an interval, what it is tried on, and a draw that says whether the truth lies below, in or above it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from tersor.tensor.statistics import Estimate

Ends = tuple[float, float]
Draw = Callable[[Generator], tuple[Ends, float]]
DRAWS = 4000  # of each setting: coverage of 95 % is then known to ±0.7 points
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Coverage:
    """How often the truth lies below the interval, inside and above; ``draws`` is 0 where summed exactly."""

    below: float
    inside: float
    above: float
    draws: int


@dataclass(frozen=True)
class Setting:
    """``draw`` gives an interval of a fresh sample and the truth; ``exact`` the coverage without drawing."""

    said: str
    draw: Draw | None = None
    exact: Callable[[], Coverage] | None = None


@dataclass(frozen=True)
class Family:
    """Settings of one interval; ``source``: the function in ``tersor.tensor``; ``draws``: how many of each setting."""

    name: str
    source: str
    settings: tuple[Setting, ...]
    draws: int


def ends(found: Estimate | Ends) -> Ends:
    """The interval alone."""
    return found[-2], found[-1]


def measure(setting: Setting, draws: int, seed: int) -> Coverage:
    """The coverage of one setting."""
    if setting.exact is not None:
        return setting.exact()
    assert setting.draw is not None
    random, sides = np.random.default_rng(seed), [0, 0, 0]
    for _ in range(draws):
        (low, high), truth = setting.draw(random)
        sides[0 if truth < low - _ROUNDING else 2 if truth > high + _ROUNDING else 1] += 1
    below, inside, above = (count / draws for count in sides)
    return Coverage(below, inside, above, draws)
