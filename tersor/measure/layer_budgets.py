"""From the sensitivity of layers to a sparsity for each: by a tolerance, or by the least predicted loss in all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tersor.core.errors import InputError
from tersor.measure.sensitivity import LayerCurve, Sensitivity
from tersor.tensor.masks import count


@dataclass(frozen=True)
class LayerBudgets:
    """``sparsity``: place of each weight → fraction, as ``Prune(sparsity=…)`` takes it; ``overall``: of all their
    numbers together; ``loss_increase``: predicted, the layers' own increases added up."""

    sparsity: dict[str, float]
    overall: float
    loss_increase: float


def within_tolerance(found: Sensitivity, *, loss: float | None = None, drop: float | None = None) -> LayerBudgets:
    """For each weight the largest sparsity up to which the model stays within the tolerance; 0 where none does.

    ``loss``: largest increase of the loss. ``drop``: largest fall of the metric, in its own unit. Give one of them. One
    layer is pruned at a time: all of them together cost more, about the sum. Raises InputError otherwise.
    """
    if (loss is None) == (drop is None):
        raise InputError("give one of the two", where="within_tolerance", got=f"loss={loss}, drop={drop}")
    size = _size(found)
    chosen: dict[str, float] = {}
    cost, zeros = 0.0, 0
    for curve in found.layers:
        chosen[curve.place], last = 0.0, (0, 0.0)
        for point, increase in zip(curve.points, found.increases(curve), strict=True):
            if (increase > loss) if loss is not None else (drop is not None and found.drop(point) > drop):
                break
            chosen[curve.place], last = point.sparsity, (point.zeros, increase)
        zeros, cost = zeros + last[0], cost + last[1]
    return LayerBudgets(chosen, zeros / size, cost)


def least_loss(found: Sensitivity, sparsity: float) -> LayerBudgets:
    """The fractions with which ⌊sparsity · n + 1e-9⌋ of all n weights together are zero at the least predicted loss.

    Predicted: each layer's increase by itself, on the convex curve below its points (linear between them), and the sum
    over layers. The cheapest pieces of all curves are taken until the zeros are enough, which for convex curves is the
    optimum. Raises InputError where the sparsity is out of range, or above what was measured.
    """
    if not 0 <= sparsity < 1:
        raise InputError("not a fraction", where="least_loss", got=sparsity, expected="[0, 1)")
    size = _size(found)
    left = count(sparsity, size)
    hulls = [(curve, _hull(_pairs(found, curve))) for curve in found.layers]
    reach = sum(hull[-1][0] for _, hull in hulls)
    if reach < left:
        raise InputError(
            "more zeros are asked for than were tried", where="least_loss", got=f"{left:,} of {size:,}",
            expected=f"at most {reach:,}", do="Measure higher sparsities, or ask for less",
        )  # fmt: skip
    pieces = [
        ((y1 - y0) / (x1 - x0), number, x1 - x0)
        for number, (_, hull) in enumerate(hulls)
        for (x0, y0), (x1, y1) in zip(hull, hull[1:], strict=False)
    ]
    zeros = [0] * len(hulls)
    cost = 0.0
    for slope, number, width in sorted(pieces):
        taken = min(width, left)
        zeros[number], left, cost = zeros[number] + taken, left - taken, cost + slope * taken
    chosen = {curve.place: many / curve.parameters for (curve, _), many in zip(hulls, zeros, strict=True)}
    return LayerBudgets(chosen, sum(zeros) / size, cost)


def _size(found: Sensitivity) -> int:
    if not found.layers:
        raise InputError("no layer was measured", where="sensitivity")
    return sum(curve.parameters for curve in found.layers)


def _pairs(found: Sensitivity, curve: LayerCurve) -> list[tuple[int, float]]:
    """(zeros, increase of the loss) from (0, 0) on, zeros growing; without points whose loss is infinite."""
    pairs = [(0, 0.0)]
    for point, increase in zip(curve.points, found.increases(curve), strict=True):
        if math.isfinite(increase) and point.zeros > pairs[-1][0]:
            pairs.append((point.zeros, increase))
    return pairs


def _hull(pairs: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull of points whose first coordinate grows (Andrew's monotone chain, 1979)."""
    hull: list[tuple[int, float]] = []
    for point in pairs:
        while len(hull) > 1 and _turns_right(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _turns_right(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - b[0]) >= (c[1] - b[1]) * (b[0] - a[0])
