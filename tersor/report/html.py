"""One self-contained page: a summary and records in, HTML out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tersor.core.measurement import Measurement
from tersor.core.record import Record
from tersor.report import format as numbers
from tersor.report.columns import TIMES_APART, Row, all_columns, present, rows
from tersor.report.findings import findings
from tersor.report.markdown import RUN_STATUS
from tersor.report.onnx_facts import onnx_facts
from tersor.report.page import Figure, Section, fill
from tersor.report.plots import draw_all
from tersor.report.schema import StepSummary, Summary, parse_summary
from tersor.report.skips import SkipGroup, group_skips

_SHOWN_ELSEWHERE = {"onnx", "verified"}


@dataclass(frozen=True)
class LayerRow:
    """A layer before and after: what the layer table shows."""

    path: str
    type: str
    shape: str
    before: str
    after: str
    macs_before: str
    macs_after: str


def render(summary: Mapping[str, Any], records: Sequence[Record], more: Sequence[Section] = ()) -> str:
    """The report as one HTML page that needs no network; ``more``: sections of other measurements of its model.

    Raises ArtifactError where the summary breaks its schema.
    """
    parsed = parse_summary(summary)
    table = rows(parsed)
    columns = present(all_columns(parsed), table)
    return fill(
        "template.html",
        summary=parsed,
        status=RUN_STATUS[parsed.verdict.status],
        figures=_figures(parsed),
        budgets=[
            (budget, numbers.scale_of(budget.limit, budget.unit).full(budget.limit))
            for budget in parsed.verdict.budgets
        ],
        findings=findings(parsed, records),
        table=table,
        columns=columns,
        under_table=TIMES_APART if any(column.name.startswith("speedup") for column in columns) else "",
        cell=Row.at,
        plots=draw_all(parsed, records),
        details=[(stage, _did(stage, records), _facts(stage)) for stage in parsed.stages],
        sections=more,
        skips=_skips(parsed),
        layers=_layers(records),
        conditions=_conditions(parsed),
    )


def _figures(summary: Summary) -> list[Figure]:
    found = []
    for name, better, worse in (
        ("size", "smaller file", "the file's size"),
        ("latency_batch_1", "faster at batch 1", "the speed at batch 1"),
        ("latency_batch_32", "faster at batch 32", "the speed at batch 32"),
    ):
        ratio = _ratio(summary, name, "×")
        if ratio is not None:
            label = better if ratio.value >= 1 else worse
            if ratio.vague:  # a middle that means little is no headline
                found.append(Figure(numbers.interval_of(ratio), f"{worse}: the machine was too noisy", ""))
                continue
            found.append(Figure(numbers.value_of(ratio), label, numbers.interval_of(ratio)))
    drop = _ratio(summary, "accuracy_drop_points", "points")
    if drop is not None:
        label = f"{_unit(drop)} of {numbers.human(summary.task.metric)} {'gained' if drop.value < 0 else 'lost'}"
        size = numbers.turned(drop) if drop.value < 0 else drop
        found.append(Figure(numbers.value_of(size).split(" ")[0], label, numbers.interval_of(size)))
    return found


def _ratio(summary: Summary, name: str, unit: str) -> Measurement | None:
    if name in summary.ratio_intervals:
        return summary.ratio_intervals[name]
    return Measurement(summary.ratios[name], unit) if name in summary.ratios else None


def _unit(drop: Measurement) -> str:
    return numbers.scale_of(drop.value, drop.unit).suffix.strip() or "points"


def _did(stage: StepSummary, records: Sequence[Record]) -> list[str]:
    """A line for each plan of a step: which method made how many edits of which kind."""
    plans = [plan for record in records if record.number == stage.number for plan in record.plans]
    lines = []
    for plan in plans:
        counts = ", ".join(f"{n} × {kind}" for kind, n in dict(plan.get("edits", {})).items()) or "nothing to do"
        lines.append(f"{plan.get('method', 'plan')}: {counts}")
    return lines


def _facts(stage: StepSummary) -> list[tuple[str, str]]:
    found = []
    verified = stage.facts.get("verified")
    if isinstance(verified, (int, float)):
        found.append(
            ("edits verified", f"largest relative difference to the model that they must equal {verified:.1e}")
        )
    onnx = stage.facts.get("onnx")
    found += onnx_facts(onnx) if isinstance(onnx, Mapping) else []
    found += [
        (numbers.human(key), numbers.plain(value)) for key, value in stage.facts.items() if key not in _SHOWN_ELSEWHERE
    ]
    return found


def _skips(summary: Summary) -> list[tuple[StepSummary, tuple[SkipGroup, ...]]]:
    grouped = [(stage, group_skips((skip.place, skip.reason) for skip in stage.skips)) for stage in summary.stages]
    return [(stage, groups) for stage, groups in grouped if groups]


def _layers(records: Sequence[Record]) -> list[LayerRow]:
    tables = [{str(layer.get("path", "")): layer for layer in record.layers} for record in records if record.layers]
    if not tables:
        return []
    before, after = tables[0], tables[-1]
    return [_layer(path, before.get(path, {}), after.get(path, {})) for path in dict.fromkeys([*before, *after])]


def _layer(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> LayerRow:
    shapes = [numbers.shape_of(layer.get("shape")) for layer in (old, new)]
    shape = shapes[0] if shapes[0] == shapes[1] else " → ".join(shapes)
    return LayerRow(
        path or "<model>", str((new or old).get("type", "")), shape,
        _count(old, "parameters"), _count(new, "parameters"), _count(old, "macs"), _count(new, "macs"),
    )  # fmt: skip


def _count(layer: Mapping[str, Any], name: str) -> str:
    value = layer.get(name)
    return numbers.count(float(value)) if isinstance(value, (int, float)) else numbers.MISSING


def _conditions(summary: Summary) -> list[tuple[str, str]]:
    """How each quantity was measured, from the last stage that has it: samples, device, conditions."""
    found: dict[str, str] = {}
    for stage in summary.stages:
        for name, measurement in stage.measurements.items():
            parts = [f"n = {measurement.n}"] if measurement.n else []
            parts += [measurement.device] if measurement.device else []
            parts += [
                f"{numbers.human(str(key))} {numbers.plain(value)}" for key, value in measurement.conditions.items()
            ]
            found[name] = ", ".join(parts)
    return list(found.items())
