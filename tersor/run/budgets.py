"""Budgets are a contract: which step is shipped, and whether what is shipped keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.record import Record
from tersor.core.task import Metric


@dataclass(frozen=True)
class Budgets:
    """Limits on the final model; None means no limit.

    ``max_drop``: how much worse than the original (percentage points for fractions, else the metric's own unit).
    ``max_size``: bytes of the ONNX file. ``max_latency``: milliseconds, median at batch 1.
    """

    max_drop: float | None = None
    max_size: float | None = None
    max_latency: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in asdict(self).items():
            if value is not None and not (0 <= value < float("inf")):
                raise InputError("a budget must be a number of at least 0", where=name, got=value)

    def check(self, record: Record) -> list[dict[str, Any]]:
        """One line per budget that is set: limit, value, interval, and whether it is met (by the test data)."""
        sources = {
            "max_drop": ("drop_points", None),
            "max_size": ("size_bytes", "bytes"),
            "max_latency": ("latency_ms_batch_1", "ms"),
        }
        lines = []
        for name, limit in asdict(self).items():
            if limit is None:
                continue
            source, unit = sources[name]
            found = record.measurements[source]
            lines.append(
                {
                    "name": name, "limit": limit, "unit": unit or found.unit.replace("percentage ", ""),
                    "value": found.value, "low": found.low, "high": found.high,
                    "met": found.value <= limit + 1e-9,
                }
            )  # fmt: skip
        return lines


def choose(records: Sequence[Record], budgets: Budgets, metric: Metric) -> Record:
    """The step to ship, decided on validation data: test data takes no part.

    The last step that keeps every budget; else the last one that keeps ``max_drop``; else the one that lost least.
    """
    steps = list(reversed(records[1:])) or list(records)
    drops = {record.number: validation_drop(records[0], record, metric) for record in steps}
    kept = [r for r in steps if budgets.max_drop is None or drops[r.number] <= budgets.max_drop + 1e-9]
    if not kept:
        return min(steps, key=lambda record: drops[record.number])
    others = Budgets(None, budgets.max_size, budgets.max_latency)
    return next((record for record in kept if all(line["met"] for line in others.check(record))), kept[0])


def validation_drop(original: Record, record: Record, metric: Metric) -> float:
    """How much worse the validation metric is than the original's: points for fractions, else the metric's unit."""
    name = f"validation_{metric.name}"
    change = original.measurements[name].value - record.measurements[name].value
    return (100.0 if metric.unit == "fraction" else 1.0) * (change if metric.higher_is_better else -change)


def merge(given: Budgets, default: Budgets, metric: Metric) -> tuple[Budgets, list[str]]:
    """What the user set, the recipe's elsewhere; and notes on what was left out.

    A recipe's ``max_drop`` means percentage points: it says nothing of a metric that is no fraction.
    """
    notes = []
    max_drop = default.max_drop if given.max_drop is None else given.max_drop
    if given.max_drop is None and default.max_drop is not None and metric.unit != "fraction":
        max_drop = None
        notes.append(
            f"the recipe's max_drop of {default.max_drop:g} percentage points says nothing of {metric.name}: "
            "no budget for it (give one with --max-drop, in its own unit)"
        )
    max_size = default.max_size if given.max_size is None else given.max_size
    max_latency = default.max_latency if given.max_latency is None else given.max_latency
    return Budgets(max_drop, max_size, max_latency), notes
