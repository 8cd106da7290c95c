"""A benchmark in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tersor.measure.benchmark_schema import Benchmark, Comparison, Timing, parse_benchmark
from tersor.report.format import MISSING, both_of, duration, shorten, value_of
from tersor.report.table import plain_table

_NAME = 34
_STYLES = {
    "faster": "bold green", "slower": "bold red", "no difference shown": "", "too noisy to tell": "bold yellow",
}  # fmt: skip


def benchmark_view(data: Mapping[str, Any]) -> RenderableType:
    """What a benchmark says: each model's bytes, memory and load time, times by batch size, notes, what was skipped."""
    found = parse_benchmark(data)
    parts: list[RenderableType] = [Text(_heading(found)), _models(found)]
    for batch, threads in dict.fromkeys((each.batch, each.threads) for each in found.timings):
        parts.append(_timings(found, batch, threads))
    parts += [Text(f"note: {note}") for note in found.notes]
    parts += [Text(f"left out: {each.what}: {each.why}", style="dim") for each in found.skipped]
    return Group(*parts)


def verdict_lines(data: Mapping[str, Any]) -> Text:
    """One line for each model, batch size and number of threads against the first model, coloured."""
    found = parse_benchmark(data)
    lines = Text()
    for each in _against_first(found):
        under = f"batch {each.batch}, {each.threads} {'thread' if each.threads == 1 else 'threads'}"
        lines.append(f"{shorten(each.model, _NAME)} ({under}): ")
        lines.append(f"{each.sentence}\n", style=_STYLES[each.verdict])
    lines.rstrip()
    return lines


def _against_first(found: Benchmark) -> list[Comparison]:
    return [each for each in found.comparisons if each.base == found.models[0].name]


def _heading(found: Benchmark) -> str:
    names = f"{len(found.models)} models" if len(found.models) > 1 else found.models[0].name
    return f"{names} on {found.inputs}, {duration(found.seconds)}; 95 % intervals in brackets"


def _models(found: Benchmark) -> Table:
    table = plain_table("model", "run by", "size", "peak memory", "load", "first call")
    for each in found.models:
        backend = each.backend if each.device == "cpu" else f"{each.backend} on {each.device}"
        table.add_row(
            Text(shorten(each.name, _NAME)), backend, value_of(each.size_bytes), value_of(each.peak_memory_bytes),
            both_of(each.load_ms), value_of(each.first_call_ms),
        )  # fmt: skip
    return table


def _rate(timing: Timing) -> str:
    return MISSING if timing.throughput is None else value_of(timing.throughput).replace(" samples/s", "/s")


def _timings(found: Benchmark, batch: int, threads: int) -> Table:
    table = plain_table(f"batch {batch}", "mean", "p50", "p95", "p99", "throughput", "outliers")
    measured = [each for each in found.timings if (each.batch, each.threads) == (batch, threads)]
    with_energy = any(each.energy is not None for each in measured)
    if with_energy:
        table.add_column("energy", justify="right")
    for each in measured:
        cells = [value_of(each.mean_ms), both_of(each.p50_ms), value_of(each.p95_ms), value_of(each.p99_ms)]
        cells += [_rate(each), f"{each.outliers.share:.1%}"]
        table.add_row(Text(shorten(each.model, _NAME)), *cells, *([value_of(each.energy)] if with_energy else []))
    table.caption = f"{threads} {'thread' if threads == 1 else 'threads'}; p50 with its interval, samples a second."
    return table
