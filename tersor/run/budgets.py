"""Budgets are a contract: which step is shipped, and whether what is shipped keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tersor.core.errors import InputError
from tersor.core.record import Record


@dataclass(frozen=True)
class Budgets:
    """Limits on the final model; None means no limit.

    ``max_drop``: points of the task's metric (percentage points for fractions) below the original.
    ``max_size``: bytes of the ONNX file. ``max_latency``: milliseconds, median at batch 1.
    """

    max_drop: float | None = None
    max_size: float | None = None
    max_latency: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not (0 <= value < float("inf")):
                raise InputError("a budget must be a number of at least 0", where=name, got=value)

    def check(self, record: Record) -> list[dict[str, Any]]:
        """One line per budget that is set: limit, value, interval, and whether it is met (by the test data)."""
        sources = {
            "max_drop": ("drop_points", "points"),
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
                    "name": name, "limit": limit, "unit": unit,
                    "value": found.value, "low": found.low, "high": found.high,
                    "met": found.value <= limit + 1e-9,
                }
            )  # fmt: skip
        return lines


def choose(records: Sequence[Record], budgets: Budgets, metric: str, *, higher_is_better: bool, scale: float) -> Record:
    """The step to ship: the last one whose *validation* metric keeps ``max_drop``; the last step where none does.

    ``scale`` turns the metric into points (100 for fractions). Test data takes no part in the choice.
    """
    if budgets.max_drop is None:
        return records[-1]
    name = f"validation_{metric}"
    original = records[0].measurements[name].value
    sign = 1.0 if higher_is_better else -1.0
    for record in reversed(records[1:]):
        if sign * scale * (original - record.measurements[name].value) <= budgets.max_drop + 1e-9:
            return record
    return records[-1]


def parse_budgets(data: Mapping[str, Any]) -> Budgets:
    """Budgets from run.json."""
    return Budgets(**data)
