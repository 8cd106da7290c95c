"""Fairness: rates of groups, how far apart they are, and which groups lose more than others. Arrays in, floats out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tersor.tensor.statistics import Estimate


@dataclass(frozen=True)
class GroupRates:
    """Rates of one group, each with Wilson's interval; None where the group has nobody to count.

    ``selection``: predicted positive; ``true_positive`` and ``false_positive``: predicted positive among the actual
    positives and negatives; ``accuracy``: predicted as they are.
    """

    group: str
    n: int
    selection: Estimate
    true_positive: Estimate | None
    false_positive: Estimate | None
    accuracy: Estimate


@dataclass(frozen=True)
class Fairness:
    """Groups and the gaps between them; a gap is None where a group has nobody to count for it.

    ``demographic_parity``: largest minus smallest selection rate. ``disparate_impact``: smallest over largest selection
    rate. ``equalised_odds``: the larger of the gaps of true and false positive rates. ``accuracy_gap``: largest minus
    smallest accuracy. ``missing``: rows without a group, left out.
    """

    groups: tuple[GroupRates, ...]
    demographic_parity: Estimate
    disparate_impact: Estimate
    equalised_odds: Estimate | None
    accuracy_gap: Estimate
    missing: int


@dataclass(frozen=True)
class GroupLoss:
    """What one group loses by compression.

    ``drop``: mean(original − compressed) of its samples; ``excess``: that minus the drop of all others. ``p``: of no
    excess; ``p_adjusted``: the same after Holm's correction for the number of groups.
    """

    group: str
    n: int
    drop: Estimate
    excess: Estimate
    p: float
    p_adjusted: float


def group_rates(predicted: ArrayLike, actual: ArrayLike, groups: ArrayLike) -> tuple[GroupRates, ...]:
    """Rates of each group, sorted by name; ``predicted`` and ``actual`` [n] in {0, 1}, ``groups`` [n] of names.

    A group that is None, NaN or an empty text is missing: its rows are left out. Raises ValueError where nothing is left.
    """
    raise NotImplementedError


def fairness(predicted: ArrayLike, actual: ArrayLike, groups: ArrayLike) -> Fairness:
    """Group rates and the gaps between groups, with 95 % intervals; arguments as for ``group_rates``.

    Raises ValueError where there are fewer than two groups.
    """
    raise NotImplementedError


def group_losses(original: ArrayLike, compressed: ArrayLike, groups: ArrayLike) -> tuple[GroupLoss, ...]:
    """Which groups lose more than the others; ``original`` and ``compressed`` [n]: the metric of each sample, more is better.

    Raises ValueError where there are fewer than two groups.
    """
    raise NotImplementedError
