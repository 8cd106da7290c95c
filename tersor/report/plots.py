"""The report's plots: accuracy against size and speed, latency, layers before and after, loss curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from tersor.core.measurement import Measurement
from tersor.core.record import Record
from tersor.report.format import both_of, count, human, scale_of, shorten, value_of
from tersor.report.labels import Point, place_labels
from tersor.report.schema import StepSummary, Summary
from tersor.report.svg import ACCENT, AFTER, BEFORE, INK, MUTED, PAGE, inline, new_figure, quiet_axis, settings

BATCHES = (1, 32)
MOST_LAYERS = 28


@dataclass(frozen=True)
class Plot:
    """A drawn figure: ``svg`` is markup, made here; ``title`` and ``caption`` are plain text."""

    key: str
    title: str
    caption: str
    svg: str


def draw_all(summary: Summary, records: Sequence[Record]) -> tuple[Plot, ...]:
    """Every plot that the numbers at hand allow."""
    plots = [
        accuracy_against_size(summary),
        accuracy_against_speed(summary),
        latency(summary),
        layers(records),
        *losses(summary, records),
    ]
    return tuple(plot for plot in plots if plot is not None)


def accuracy_against_size(summary: Summary) -> Plot | None:
    """The metric with its interval against the file size, one point per step; None with fewer than two points."""
    found = [(stage, stage.measurements.get("size_bytes", _ZERO)) for stage in summary.stages]
    name, better = human(summary.task.metric).capitalize(), "higher" if summary.task.higher_is_better else "lower"
    return _trade_off(
        summary, [point for point in found if point[1].value > 0], key="size", title=f"{name} against size",
        label="size of the ONNX file", caption=f"Further left and {better} is better.", scale_axis=_size_axis,
    )  # fmt: skip


def accuracy_against_speed(summary: Summary) -> Plot | None:
    """The metric against the speed-up at batch 1, timed in turns with the original; None with fewer than two points."""
    found = [(stage, stage.measurements.get("speedup_batch_1", _ZERO)) for stage in summary.steps]
    found = [point for point in found if point[1].value > 0]
    if summary.baseline is not None and found:
        found.insert(0, (summary.baseline, Measurement(1.0, "×")))
    name, better = human(summary.task.metric).capitalize(), "higher" if summary.task.higher_is_better else "lower"
    return _trade_off(
        summary, found, key="speed", title=f"{name} against speed", label="times the original's speed at batch 1",
        caption=f"Further right and {better} is better. Each was timed in turns with the original, which stands at 1.",
        scale_axis=_speed_axis,
    )  # fmt: skip


@mpl.rc_context(settings())
def _trade_off(
    summary: Summary, found: Sequence[tuple[StepSummary, Measurement]], *, key: str, title: str, label: str,
    caption: str, scale_axis: Callable[[Axes, Sequence[Measurement]], None],
) -> Plot | None:  # fmt: skip
    """The metric of each stage above something else that was measured of it, both with intervals."""
    name = summary.task.metric
    points = [(stage, x, stage.measurements[name]) for stage, x in found if name in stage.measurements]
    if len(points) < 2:
        return None
    metrics = [metric for *_, metric in points]
    scale = scale_of(metrics[0].value, metrics[0].unit)
    at, values = [x.value for _, x, _ in points], [metric.value * scale.factor for metric in metrics]
    figure = new_figure(300)
    axes = figure.subplots()
    axes.plot(at, values, color=MUTED, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    for (stage, x, metric), value in zip(points, values, strict=True):
        colour = BEFORE if stage is summary.baseline else AFTER
        axes.errorbar(
            [x.value], [value], yerr=errors([metric], scale.factor), xerr=errors([x], 1), fmt="none", ecolor=colour,
            elinewidth=1.2, capsize=2.5, zorder=2,
        )  # fmt: skip
        axes.plot(
            [x.value], [value], "o", markersize=8, color=colour, markeredgecolor=PAGE, markeredgewidth=1.5, zorder=3
        )
    scale_axis(axes, [x for _, x, _ in points])
    axes.margins(y=0.16)
    quiet_axis(axes, grid="y")
    axes.set_xlabel(label)
    axes.set_title(f"{human(name)}{',' + scale.suffix if scale.suffix.strip() else ''} (95 % interval)")
    below, above = errors(metrics, scale.factor)
    place_labels(
        axes,
        [
            Point(x.value, y, y - down, y + up, shorten(stage.name, 20), x.low, x.high)
            for (stage, x, _), y, down, up in zip(points, values, below, above, strict=True)
        ],
    )
    told = "; ".join(f"{stage.label}: {both_of(metric)} at {both_of(x)}" for stage, x, metric in points)
    return Plot(key, title, caption, inline(figure, key, f"{title}. {told}"))


def _speed_axis(axes: Axes, speeds: Sequence[Measurement]) -> None:
    low = min(each.value if each.low is None else each.low for each in speeds)
    high = max(each.value if each.high is None else each.high for each in speeds)
    reach = 0.25 * max(high - low, 0.2 * high)
    axes.set_xlim(low - reach, high + reach)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×"))


_ZERO = Measurement(0.0, "")


def errors(found: Sequence[Measurement], factor: float) -> list[list[float]]:
    """Distances to the interval's ends, [below, above], as matplotlib wants them; zero where there is no interval."""
    below = [max(0.0, m.value - m.low) * factor if m.low is not None else 0.0 for m in found]
    above = [max(0.0, m.high - m.value) * factor if m.high is not None else 0.0 for m in found]
    return [below, above]


def _size_axis(axes: Axes, sizes: Sequence[Measurement]) -> None:
    low, high = min(each.value for each in sizes), max(each.value for each in sizes)
    if high < 1.5 * low:
        middle = (low + high) / 2
        axes.set_xlim(middle * 0.7, middle * 1.3)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, "bytes")))
        return
    axes.set_xscale("log")
    low, high = low / 1.5, high * 1.5
    axes.set_xlim(low, high)
    mantissas = (1, 2, 5) if high / low < 100 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**p for p in powers for m in mantissas if low <= m * 10.0**p <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([_tick(tick, "bytes") for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _tick(value: float, unit: str) -> str:
    scale = scale_of(value, unit)
    return f"{value * scale.factor:.3g}{scale.suffix}"


@mpl.rc_context(settings())
def latency(summary: Summary) -> Plot | None:
    """Bars of the median latency with intervals, one panel per batch size; None where none was measured."""
    panels = []
    for batch in BATCHES:
        name = f"latency_ms_batch_{batch}"
        stages = [stage for stage in summary.stages if name in stage.measurements]
        if stages:
            panels.append((batch, stages, [stage.measurements[name] for stage in stages]))
    if not panels:
        return None
    bars = sum(len(stages) for _, stages, _ in panels)
    figure = new_figure(34 * len(panels) + 25 * bars)
    ratios = [len(stages) + 0.6 for _, stages, _ in panels]
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=ratios)
    told = []
    for axes, (batch, stages, found) in zip(grid[:, 0], panels, strict=True):
        _bars(axes, stages, found, summary.baseline)
        axes.set_title(f"batch {batch}, ms per batch")
        each = "; ".join(f"{s.label} {both_of(m)}" for s, m in zip(stages, found, strict=True))
        told.append(f"batch {batch}: {each}")
    title = "Latency in ONNX Runtime"
    caption = (
        "Median with its 95 % interval. Shorter is better. The table's speed-ups compare with the original as timed in "
        "the same sittings, not with its bar here."
    )
    return Plot("latency", title, caption, inline(figure, "latency", f"{title}. {'. '.join(told)}"))


def _bars(
    axes: Axes, stages: Sequence[StepSummary], found: Sequence[Measurement], baseline: StepSummary | None
) -> None:
    rows = list(range(len(stages)))
    colours = [BEFORE if stage is baseline else AFTER for stage in stages]
    values = [m.value for m in found]
    axes.barh(rows, values, height=0.62, color=colours, zorder=2)
    axes.errorbar(values, rows, xerr=errors(found, 1), fmt="none", ecolor=INK, elinewidth=1, capsize=2.5, zorder=3)
    ends = [max(m.value, m.high or 0.0) for m in found]
    widest = max(ends) or 1.0
    for row, end, m in zip(rows, ends, found, strict=True):
        axes.text(end + 0.02 * widest, row, value_of(m), va="center", ha="left", color=INK)
    name_rows(axes, [shorten(stage.name, 20) for stage in stages])
    axes.set_xlim(0, widest * 1.27)
    _no_scale(axes)


def _no_scale(axes: Axes) -> None:
    """Every bar says its value, so the axis need not."""
    axes.set_xticks([])
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Rows from above to below, each with its name."""
    axes.set_yticks(range(len(names)), labels=list(names))
    axes.set_ylim(len(names) - 0.4, -0.6)


@mpl.rc_context(settings())
def layers(records: Sequence[Record]) -> Plot | None:
    """Parameters of each layer in the original and in the last step; None without two layer tables."""
    tables = [record.layers for record in records if record.layers]
    if len(tables) < 2:
        return None
    before, after = _parameters(tables[0]), _parameters(tables[-1])
    paths = sorted(before.keys() | after.keys(), key=lambda p: -max(before.get(p, 0), after.get(p, 0)))[:MOST_LAYERS]
    order = {path: place for place, path in enumerate(dict.fromkeys([*before, *after]))}
    paths.sort(key=lambda path: order[path])
    if not paths:
        return None
    figure = new_figure(20 + 20 * len(paths))
    axes = figure.subplots()
    rows = list(range(len(paths)))
    left, right = [before.get(path, 0.0) for path in paths], [after.get(path, 0.0) for path in paths]
    axes.barh(rows, left, height=0.7, color=BEFORE, alpha=0.55, label="before", zorder=2)
    axes.barh(rows, right, height=0.36, color=AFTER, label="after", zorder=3)
    widest = max([*left, *right]) or 1.0
    for row, old, new in zip(rows, left, right, strict=True):
        axes.text(max(old, new) + 0.015 * widest, row, _change(old, new), va="center", color=INK)
    name_rows(axes, [shorten(path or "<model>", 24, keep_end=True) for path in paths])
    axes.set_xlim(0, widest * 1.5)
    _no_scale(axes)
    left_out = len(before.keys() | after.keys()) - len(paths)
    caption = "Wide bars: the original; narrow bars: after the last step."
    caption += f" The {len(paths)} largest layers; {left_out} smaller ones are in the table below." if left_out else ""
    title = "Parameters of each layer"
    told = "; ".join(f"{path}: {_change(before.get(path, 0), after.get(path, 0))}" for path in paths)
    return Plot("layers", title, caption, inline(figure, "layers", f"{title}. {told}"))


def _change(old: float, new: float) -> str:
    return count(old) if old == new else f"{count(old)} → {count(new)}"


def _parameters(table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {str(layer["path"]): float(layer["parameters"]) for layer in table if layer.get("parameters")}


@mpl.rc_context(settings())
def losses(summary: Summary, records: Sequence[Record]) -> list[Plot]:
    """One plot for each step that trained: the loss and the validation metric over its epochs."""
    plots = (_loss(summary, record) for record in records)
    return [plot for plot in plots if plot is not None]


def _loss(summary: Summary, record: Record) -> Plot | None:
    loss, validation = _series(record.history, "loss"), _series(record.history, "validation")
    scale = scale_of(1.0, summary.task.metric_unit)
    validation = [(epoch, value * scale.factor) for epoch, value in validation]
    unit = scale.suffix if scale.factor != 1 else ""
    metric = f"validation {human(summary.task.metric)}"
    lines = (("training loss", "", loss, AFTER), (metric, unit, validation, ACCENT))
    shown = [line for line in lines if line[2]]
    if not shown:
        return None
    figure = new_figure(30 + 115 * len(shown))
    grid = figure.subplots(len(shown), squeeze=False, sharex=True)[:, 0]
    for axes, (name, suffix, line, colour) in zip(grid, shown, strict=True):
        epochs, values = [epoch for epoch, _ in line], [value for _, value in line]
        axes.plot(epochs, values, "o-" if len(line) <= 30 else "-", color=colour, linewidth=1.8, markersize=4)
        axes.set_title(f"{name},{suffix}" if suffix else name)
        axes.margins(x=0.03, y=0.15)
        if suffix == " %":
            _end_at_all(axes)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        quiet_axis(axes, grid="y")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    grid[-1].set_xlabel("epoch")
    told = ", ".join(f"{name} from {line[0][1]:.3g} to {line[-1][1]:.3g}{suffix}" for name, suffix, line, _ in shown)
    title = f"Training: {record.name}"
    key = f"loss-{record.number}"
    return Plot(key, title, f"{told[0].upper()}{told[1:]}.", inline(figure, key, f"{title}. {told}"))


def _end_at_all(axes: Axes) -> None:
    """No shares below 0 % or above 100 %, but for room to draw a line there."""
    low, high = axes.get_ylim()
    room = 0.05 * (high - low)
    axes.set_ylim(max(low, -room), min(high, 100 + room))


def _series(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(epoch counted over the whole step, value) wherever the value is a finite number."""
    numbered = ((place, entry.get(name)) for place, entry in enumerate(history, start=1))
    return [(place, float(v)) for place, v in numbered if isinstance(v, (int, float)) and math.isfinite(v)]
