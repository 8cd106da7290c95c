"""What commands print: tables and lines for rich, made of plain data, at home in 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tersor.core.measurement import Measurement
from tersor.report.columns import TIMES_APART, Column, Row, rows
from tersor.report.format import (
    MISSING,
    both_of,
    count,
    duration,
    human,
    interval_of,
    scale_of,
    shape_of,
    shorten,
    value_of,
)
from tersor.report.schema import Summary, parse_summary
from tersor.report.skips import SkipGroup, group_skips
from tersor.report.table import plain_table

_VERDICTS = {
    "passed": ("passed", "bold green"),
    "missed": ("budget missed", "bold red"),
    "failed": ("failed", "bold red"),
}
_PLACES = 4  # places that a skip names before it only counts
_NAME = 8  # characters of a step's name on one line


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The table step by step: one row for the original, each step and the final model; intervals on a second line.

    ``b1``, ``b32``: the median latency in ms at that batch size, and under it the speed-up against the original.
    """
    parsed = parse_summary(summary)
    unit = scale_of(1.0, parsed.task.metric_unit).suffix
    metric = human(parsed.task.metric) + (f",{unit}" if unit.strip() else "")
    table = plain_table("after", metric, "lost", "file", "params", "MACs", "ms, b1", "ms, b32")
    for row in rows(parsed):
        label = {"baseline": "original", "final": "final"}.get(row.kind) or shorten(row.stage.name, 2 * _NAME)
        style = {"final": "bold", "baseline": "", "step": ""}[row.kind]
        cells: list[RenderableType] = [
            _two_lines(_at(row, parsed.task.metric)),
            _two_lines(_at(row, "drop_points", against=True)),
            *(value_of(_at(row, name)) for name in ("size_bytes", "parameters", "macs")),
            *(_latency(row, batch) for batch in (1, 32)),
        ]
        if row.kind == "final":
            table.add_section()
        table.add_row(Text(label), *cells, style=style)
    table.caption = _caption(parsed)
    return table


def _caption(summary: Summary) -> str:
    drops = [stage.measurements["drop_points"] for stage in summary.stages if "drop_points" in stage.measurements]
    unit = scale_of(0.0, drops[-1].unit).suffix.strip() if drops else "points"
    return (
        f"[ ]: 95 % interval. lost: {unit}. b1, b32: latency at batch 1 and 32, × the original's speed. {TIMES_APART}"
    )


def _at(row: Row, name: str, *, against: bool = False) -> Measurement | None:
    return row.at(Column(name, name, against))


def _two_lines(found: Measurement | None) -> Text:
    if found is None:
        return Text(MISSING)
    text = Text(scale_of(found.value, found.unit).bare(found.value))
    if interval_of(found):
        text.append("\n" + interval_of(found), style="dim not bold")
    return text


def _latency(row: Row, batch: int) -> Text:
    found, speed = _at(row, f"latency_ms_batch_{batch}"), _at(row, f"speedup_batch_{batch}", against=True)
    text = Text(value_of(found).removesuffix(" ms"))
    if speed is not None:
        text.append("\n" + value_of(speed), style="dim not bold" if row.kind != "final" else "")
    return text


def agreement_line(summary: Mapping[str, Any]) -> str:
    """How often the quantised file answers as its PyTorch model on the test data, and which share of its outputs is
    at most one step apart; empty where nothing was quantised."""
    final = parse_summary(summary).final
    found = final.measurements.get("onnx_agreement") if final is not None else None
    if final is None or found is None:
        return ""
    onnx = final.facts.get("onnx")
    within = onnx.get("within_one_step") if isinstance(onnx, Mapping) else None
    steps = f"; {100 * within:.1f} % of its outputs at most one step apart" if isinstance(within, float) else ""
    return f"the ONNX file and its PyTorch model: same answer for {both_of(found)} of {found.n} test samples{steps}"


def verdict_line(summary: Mapping[str, Any]) -> Text:
    """The verdict: its status in colour, then its sentence."""
    verdict = parse_summary(summary).verdict
    word, style = _VERDICTS[verdict.status]
    return Text.assemble((f"{word}: ", style), verdict.sentence)


def plan_view(plans: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What plans (``Plan.summary()``: method, edits, lines, skips) would do, and what they pass over and why."""
    parts: list[RenderableType] = []
    for plan in plans:
        counts = ", ".join(f"{n} × {kind}" for kind, n in dict(plan.get("edits", {})).items()) or "nothing to do"
        parts.append(Text.assemble((str(plan.get("method", "plan")), "bold"), f": {counts}"))
        if plan.get("lines"):
            body = Table.grid(padding=(0, 2))
            body.add_column(overflow="fold", ratio=2)
            body.add_column(overflow="fold", ratio=3)
            for place, what in plan["lines"]:
                body.add_row(Text(str(place)), Text(str(what), style="dim"))
            parts.append(Padding(body, (0, 0, 0, 2)))
        for group in group_skips((str(skip["place"]), str(skip["reason"])) for skip in plan.get("skips", ())):
            parts.append(Padding(_skip(group), (0, 0, 0, 2)))
    return Group(*parts) if parts else Text("no plan: this step edits nothing by itself", style="dim")


def _skip(group: SkipGroup) -> Text:
    return Text.assemble(("skipped ", "yellow"), group.named(_PLACES), (f": {group.reason}", "dim"))


def dry_run_view(steps: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The steps of a dry run: name, title, plans, seconds, memory_bytes, parameters and macs after each."""
    parts: list[RenderableType] = []
    for number, step in enumerate(steps, start=1):
        parts.append(Text.assemble((f"{number} {step['name']}", "bold"), f"  {step.get('title', '')}"))
        parts.append(Padding(Text(_estimates(step), style="dim"), (0, 0, 0, 2)))
        if step.get("plans"):
            parts.append(Padding(plan_view(step["plans"]), (0, 0, 0, 2)))
        parts.append(Text(""))
    return Group(*parts)


def _estimates(step: Mapping[str, Any]) -> str:
    told = [f"leaves {count(float(step['parameters']))} parameters"] if "parameters" in step else []
    told += [f"{count(float(step['macs']))} MACs"] if "macs" in step else []
    if step.get("seconds"):
        told.append(f"trains for about {duration(float(step['seconds']))}")
    if step.get("memory_bytes"):
        size = float(step["memory_bytes"])
        told.append(f"needs about {scale_of(size, 'bytes').full(size)} beside the activations")
    return ", ".join(told)


def inspection_view(found: Mapping[str, Any]) -> RenderableType:
    """An inspection: ``totals`` (name → measurement), ``layers`` (rows of both tables), ``groups`` (lines)."""
    totals = Table.grid(padding=(0, 2))
    for name, measured in dict(found.get("totals", {})).items():
        totals.add_row(Text(human(name), style="dim"), Text(value_of(Measurement.from_json(measured))))
    parts: list[RenderableType] = [totals, layer_view(found.get("layers", ()))]
    if any("near_zero" in layer for layer in found.get("layers", ())):
        parts += [Text("Redundancy of the weights", style="bold"), redundancy_view(found["layers"])]
    if found.get("groups"):
        parts += [
            Text("Channels that can only go together", style="bold"),
            *(Text(f"  {line}") for line in found["groups"]),
        ]
    return Group(*parts)


def layer_view(layers: Sequence[Mapping[str, Any]]) -> Table:
    """One row per layer. Keys used: path, type, shape, parameters, nonzeros, macs; a missing one is shown as a dash."""
    table = plain_table("layer", "type", "shape", "params", "share", "MACs", "share")
    totals = {name: sum(float(layer.get(name) or 0) for layer in layers) for name in ("parameters", "macs")}
    for layer in layers:
        cells = [Text(str(layer.get("type", MISSING))), Text(shape_of(layer.get("shape")))]
        for name, total in totals.items():
            value = layer.get(name)
            cells.append(Text(MISSING if value is None else count(float(value))))
            cells.append(Text(MISSING if value is None or not total else f"{100 * float(value) / total:.1f} %"))
        table.add_row(Text(str(layer.get("path") or "<model>")), *cells)
    return table


def redundancy_view(layers: Sequence[Mapping[str, Any]]) -> Table:
    """One row per weight tensor. Keys used: path, near_zero, zeros (fractions), dead_channels of channels, rank_95 of
    full_rank; rows without ``near_zero`` are left out."""
    table = plain_table("layer", "near zero", "zero", "dead channels", "rank for 95 %")
    for layer in layers:
        if "near_zero" in layer:
            fractions = [_percent(layer.get(name)) for name in ("near_zero", "zeros")]
            dead, rank = _of(layer, "dead_channels", "channels"), _of(layer, "rank_95", "full_rank")
            table.add_row(Text(str(layer.get("path") or "<model>")), *fractions, dead, rank)
    table.caption = "near zero: at most a tenth of the mean |w|; rank: singular directions that hold 95 % of the energy"
    return table


def _percent(value: Any) -> str:
    return MISSING if value is None else scale_of(float(value), "fraction").full(float(value))


def _of(layer: Mapping[str, Any], part: str, whole: str) -> str:
    return f"{layer[part]} of {layer[whole]}" if part in layer and whole in layer else MISSING
