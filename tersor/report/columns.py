"""The columns and rows of the table step by step, for the page and the terminal alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tersor.core.measurement import Measurement
from tersor.report.format import human
from tersor.report.schema import StepSummary, Summary

# Said below every table that has both: a row's ms and the original's were taken in sittings of their own.
TIMES_APART = (
    "Milliseconds of different rows were measured apart and do not compare; the speed-up does: each file was timed "
    "in turns with the original."
)


@dataclass(frozen=True)
class Column:
    """One measured quantity: ``name`` as in ``measurements``, ``title`` for the page.

    ``against_original``: a comparison with the original, which says nothing about the original itself.
    """

    name: str
    title: str
    against_original: bool = False


@dataclass(frozen=True)
class Row:
    """One stage of the run; ``kind`` is "baseline", "step" or "final"."""

    kind: str
    label: str
    stage: StepSummary

    def at(self, column: Column) -> Measurement | None:
        """What was measured for a column; None where nothing was."""
        if self.kind == "baseline" and column.against_original:
            return None
        return self.stage.measurements.get(column.name)


def all_columns(summary: Summary) -> tuple[Column, ...]:
    """Every column that the table may have, in order."""
    metric = human(summary.task.metric)
    return (
        Column(summary.task.metric, metric.capitalize()),
        Column("drop_points", f"{metric.capitalize()} lost", against_original=True),
        Column("agreement", "Same answers", against_original=True),
        Column("size_bytes", "ONNX file"),
        Column("parameters", "Parameters"),
        Column("nonzeros", "Non-zeros"),
        Column("macs", "MACs"),
        Column("latency_ms_batch_1", "Latency, batch 1"),
        Column("latency_ms_batch_32", "Latency, batch 32"),
        Column("speedup_batch_1", "Speed-up, batch 1", against_original=True),
        Column("speedup_batch_32", "Speed-up, batch 32", against_original=True),
        Column("peak_memory_bytes", "Peak memory"),
    )


def present(columns: Sequence[Column], table: Sequence[Row]) -> tuple[Column, ...]:
    """The columns in which at least one stage was measured. Non-zeros that equal the parameters are left out."""
    kept = []
    for column in columns:
        if all(row.at(column) is None for row in table):
            continue
        if column.name == "nonzeros" and all(_nearly_dense(row.stage) for row in table):
            continue
        kept.append(column)
    return tuple(kept)


def _nearly_dense(stage: StepSummary) -> bool:
    zeros, weights = stage.measurements.get("nonzeros"), stage.measurements.get("parameters")
    return zeros is None or weights is None or zeros.value >= 0.97 * weights.value


def rows(summary: Summary) -> tuple[Row, ...]:
    """Baseline, each step, final: whichever there are."""
    found = []
    if summary.baseline is not None:
        found.append(Row("baseline", "Original", summary.baseline))
    found += [Row("step", f"{step.number} {step.name}", step) for step in summary.steps]
    if summary.final is not None:
        found.append(Row("final", "Final", summary.final))
    return tuple(found)
