"""Fairness: rates of groups, how far apart they are, and which groups lose more than others. Arrays in, floats out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tersor.tensor.proportions import largest_difference, largest_of_differences, mover, smallest_ratio
from tersor.tensor.statistics import Estimate, holm, is_binary, paired_difference, wilson

Array = NDArray[np.float64]
_HALVINGS = 40  # of the interval in which log p is looked for
_SMALLEST_P = 1e-12


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
    """Groups and the gaps between them.

    ``demographic_parity``: largest minus smallest selection rate. ``disparate_impact``: smallest over largest selection
    rate, None where nobody is selected. ``equalised_odds``: the larger of the gaps of true and false positive rates,
    None where a group has no positives or no negatives. ``accuracy_gap``: largest minus smallest accuracy. ``missing``:
    rows without a group, left out. Sources: Hardt, Price and Srebro 2016 (arXiv:1610.02413), section 2; Feldman et al.
    2015 (arXiv:1412.3756), section 1.
    """

    groups: tuple[GroupRates, ...]
    demographic_parity: Estimate
    disparate_impact: Estimate | None
    equalised_odds: Estimate | None
    accuracy_gap: Estimate
    missing: int


@dataclass(frozen=True)
class GroupLoss:
    """What one group loses by compression.

    ``drop``: mean(original − compressed) of its samples; ``excess``: that minus the drop of all others. ``p``: of no
    excess, the level at which the interval of ``excess`` begins to hold zero; ``p_adjusted``: the same after Holm's
    correction for the number of groups.
    """

    group: str
    n: int
    drop: Estimate
    excess: Estimate
    p: float
    p_adjusted: float


def group_rates(predicted: ArrayLike, actual: ArrayLike, groups: ArrayLike) -> tuple[GroupRates, ...]:
    """Rates of each group, sorted by name; ``predicted`` and ``actual`` [n] in {0, 1}, ``groups`` [n] of names.

    A group that is None, NaN or an empty text is missing: its rows are left out. Raises ValueError for other lengths or
    values, and where nothing is left.
    """
    return tuple(_rates(name, *counts) for name, counts in _counts(predicted, actual, groups)[0].items())


def fairness(predicted: ArrayLike, actual: ArrayLike, groups: ArrayLike) -> Fairness:
    """Group rates and the gaps between groups, with 95 % intervals; arguments as for ``group_rates``.

    The intervals of gaps are those of ``largest_difference``, ``smallest_ratio`` and ``largest_of_differences``, which
    hold for any number of groups. Raises ValueError where there are fewer than two groups.
    """
    counts, missing = _counts(predicted, actual, groups)
    _check_several(counts)
    true_positive, positives, false_positive, negatives = np.array(list(counts.values())).T
    selected, n = true_positive + false_positive, positives + negatives
    odds = None
    if positives.all() and negatives.all():
        odds = largest_of_differences([(true_positive, positives), (false_positive, negatives)])
    return Fairness(
        groups=tuple(_rates(name, *of) for name, of in counts.items()),
        demographic_parity=largest_difference(selected, n),
        disparate_impact=smallest_ratio(selected, n) if selected.any() else None,
        equalised_odds=odds,
        accuracy_gap=largest_difference(true_positive + negatives - false_positive, n),
        missing=missing,
    )


def group_losses(original: ArrayLike, compressed: ArrayLike, groups: ArrayLike) -> tuple[GroupLoss, ...]:
    """Which groups lose more than the others; ``original``, ``compressed`` [n]: each sample's metric, more is better.

    Groups sorted by name; rows without one are left out. Raises ValueError where there are fewer than two groups.
    """
    x, y = np.asarray(original, np.float64), np.asarray(compressed, np.float64)
    names = _names(groups, x, y)
    members = {name: names == name for name in sorted({str(name) for name in names if name is not None})}
    _check_several(members)
    known = np.array([name is not None for name in names])
    found = [(name, here, excess(x, y, here, known & ~here)) for name, here in members.items()]
    p = [_level_of_zero(x, y, here, known & ~here) for _, here, _ in found]
    return tuple(
        GroupLoss(name, int(here.sum()), paired_difference(x[here], y[here]), excess, level, float(adjusted))
        for (name, here, excess), level, adjusted in zip(found, p, holm(p), strict=True)
    )


def excess(
    x: Array, y: Array, here: NDArray[np.bool_], others: NDArray[np.bool_], confidence: float = 0.95
) -> Estimate:
    """mean(x − y) of rows ``here`` minus that of the ``others``: ``paired_difference`` of each, put together."""
    one, other = (paired_difference(x[rows], y[rows], confidence) for rows in (here, others))
    return mover(one, other)


def _level_of_zero(x: Array, y: Array, here: NDArray[np.bool_], others: NDArray[np.bool_]) -> float:
    """The smallest level 1 − confidence at which the interval of the excess leaves out zero."""
    low, high = np.log(_SMALLEST_P), 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = excess(x, y, here, others, 1 - float(np.exp(middle)))
        low, high = (middle, high) if found.low <= 0 <= found.high else (low, middle)
    return float(np.exp(high))


def _check_several(groups: dict[str, object] | dict[str, tuple[int, int, int, int]]) -> None:
    if len(groups) < 2:
        raise ValueError(f"groups {list(groups)}: expected at least two to compare")


def _counts(
    predicted: ArrayLike, actual: ArrayLike, groups: ArrayLike
) -> tuple[dict[str, tuple[int, int, int, int]], int]:
    """Group → (true positives, positives, false positives, negatives), and how many rows have no group."""
    p, y = np.asarray(predicted, np.float64), np.asarray(actual, np.float64)
    names = _names(groups, p, y)
    if not (is_binary(p) and is_binary(y)):
        raise ValueError("predicted and actual are 0 or 1: say which class is the positive one")
    counts = {}
    for name in sorted({str(name) for name in names if name is not None}):
        here = names == name
        right, positive = p[here] * y[here], y[here].sum()
        counts[name] = (int(right.sum()), int(positive), int((p[here] - right).sum()), int(here.sum() - positive))
    if not counts:
        raise ValueError("no row has a group")
    return counts, sum(name is None for name in names)


def _rates(name: str, true_positive: int, positives: int, false_positive: int, negatives: int) -> GroupRates:
    n, right = positives + negatives, true_positive + negatives - false_positive
    return GroupRates(
        name, n, _rate(true_positive + false_positive, n),
        _rate(true_positive, positives) if positives else None,
        _rate(false_positive, negatives) if negatives else None, _rate(right, n),
    )  # fmt: skip


def _rate(successes: int, n: int) -> Estimate:
    return Estimate(successes / n, *wilson(successes, n))


def _names(groups: ArrayLike, *columns: Array) -> NDArray[np.object_]:
    """The groups' names as text, None where missing; columns must be as long."""
    names = np.asarray(groups, dtype=object)
    if names.ndim != 1 or any(column.shape != names.shape for column in columns):
        shapes = ", ".join(str(column.shape) for column in (*columns, names))
        raise ValueError(f"arrays of shapes {shapes}: expected one dimension and one length")
    missing = [name is None or name != name or str(name) == "" for name in names.tolist()]
    return np.array([None if gone else str(name) for name, gone in zip(names, missing, strict=True)], dtype=object)
