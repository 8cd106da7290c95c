"""One option for each of several rows, within a budget, at the least loss: the multiple-choice knapsack, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def least_loss_choice(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The options x with Σ costs[i][x_i] ≤ ``budget`` that make Σ losses[i][x_i] least; of equals the cheapest.

    ``costs``, ``losses``: one row for each decision, of as many numbers as it has options; an infinite loss is no
    option. Dynamic programming over the rows: of all partial choices those are kept that none beats in both cost and
    loss, and of these those whose loss with the linear relaxation of the remaining rows does not exceed that of a
    greedy solution. Raises ValueError where rows and options do not match, or nothing is within the budget.
    Source: Sinha and Zoltners 1979 (relaxation and hulls); Kellerer, Pferschy and Pisinger 2004, chapter 11.

    >>> least_loss_choice([[8, 4], [80, 40]], [[0, 3], [0, 1]], budget=48)
    [0, 1]
    """
    rows = [_row(cost, loss, number) for number, (cost, loss) in enumerate(zip(costs, losses, strict=True))]
    if not rows:
        return []
    least = sum(row.cost[0] for row in rows)
    if least > budget:
        raise ValueError(f"nothing is within the budget: {budget:,.6g} is asked, the least possible is {least:,.6g}")
    bounds = _bounds(rows)
    most = _greedy(rows, budget)
    cost, loss = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for number, row in enumerate(rows):
        bound = bounds[number + 1]
        new_cost = (cost[:, None] + row.cost).ravel()
        new_loss = (loss[:, None] + row.loss).ravel()
        spare = budget - new_cost - bound.least_cost
        open_ = (spare >= 0) & (new_loss + bound(spare) <= most + 1e-9 * max(1.0, abs(most)))
        order = np.flatnonzero(open_)
        order = order[np.lexsort((new_loss[order], new_cost[order]))]
        better = np.minimum.accumulate(new_loss[order])
        order = order[np.concatenate(([True], new_loss[order][1:] < better[:-1]))]
        trail.append((order // len(row.cost), order % len(row.cost)))
        cost, loss = new_cost[order], new_loss[order]
    return _traced(rows, trail, len(cost) - 1)  # by growing cost, the loss falls: the last has the least


@dataclass(frozen=True, eq=False)
class _Row:
    """The options that no other beats, cost growing and loss falling; ``number``: which of the given ones each is."""

    cost: Floats
    loss: Floats
    number: NDArray[np.int64]

    def hull(self) -> list[int]:
        """The options on the lower convex hull (Andrew's monotone chain)."""
        found: list[int] = []
        for point in range(len(self.cost)):
            while len(found) > 1 and self._above(found[-2], found[-1], point):
                found.pop()
            found.append(point)
        return found

    def _above(self, a: int, b: int, c: int) -> bool:
        rise, run = self.loss - self.loss[a], self.cost - self.cost[a]
        return bool(rise[b] * run[c] >= rise[c] * run[b])


def _row(cost: Sequence[float], loss: Sequence[float], number: int) -> _Row:
    if len(cost) != len(loss):
        raise ValueError(f"row {number} has {len(cost)} costs and {len(loss)} losses")
    costs, losses = np.asarray(cost, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    usable = np.flatnonzero(np.isfinite(losses) & np.isfinite(costs))
    if not len(usable):
        raise ValueError(f"row {number} has no option with a finite cost and loss")
    order = usable[np.lexsort((losses[usable], costs[usable]))]
    best = np.minimum.accumulate(losses[order])
    order = order[np.concatenate(([True], losses[order][1:] < best[:-1]))]
    return _Row(costs[order], losses[order], order)


@dataclass(frozen=True, eq=False)
class _Bound:
    """The least loss of some rows, relaxed, for what may be spent beyond ``least_cost``: falling, convex, linear
    between the corners."""

    least_cost: float
    spent: Floats
    loss: Floats

    def __call__(self, spare: Floats) -> Any:
        return np.interp(spare, self.spent, self.loss)


def _bounds(rows: Sequence[_Row]) -> list[_Bound]:
    """Entry i: of the rows from i on."""
    pieces = [piece for number, row in enumerate(rows) for piece in _pieces(row, number)]
    pieces.sort()
    found = []
    for first in range(len(rows) + 1):
        mine = [(width, gain) for _, number, width, gain in pieces if number >= first]
        spent = np.concatenate(([0.0], np.cumsum([width for width, _ in mine])))
        gained = np.concatenate(([0.0], np.cumsum([gain for _, gain in mine])))
        base = sum(float(row.loss[0]) for row in rows[first:])
        found.append(_Bound(sum(float(row.cost[0]) for row in rows[first:]), spent, base - gained))
    return found


def _pieces(row: _Row, number: int) -> list[tuple[float, int, float, float]]:
    """(slope, row, added cost, removed loss) of each edge of the row's hull, the steepest first."""
    hull = row.hull()
    found = []
    for a, b in zip(hull, hull[1:], strict=False):
        width, gain = float(row.cost[b] - row.cost[a]), float(row.loss[a] - row.loss[b])
        found.append((-gain / width, number, width, gain))
    return found


def _greedy(rows: Sequence[_Row], budget: float) -> float:
    """The loss of a choice within the budget: edges of the hulls in the order of their slopes, while they fit."""
    spare = budget - sum(float(row.cost[0]) for row in rows)
    loss = sum(float(row.loss[0]) for row in rows)
    stopped: set[int] = set()
    for _, number, width, gain in sorted(piece for n, row in enumerate(rows) for piece in _pieces(row, n)):
        if number in stopped or width > spare:
            stopped.add(number)
        else:
            spare, loss = spare - width, loss - gain
    return loss


def _traced(rows: Sequence[_Row], trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]], last: int) -> list[int]:
    chosen = []
    for row, (parents, options) in zip(reversed(rows), reversed(trail), strict=True):
        chosen.append(int(row.number[options[last]]))
        last = int(parents[last])
    return chosen[::-1]
