"""A benchmark for people who were not there: who is faster, how the times are spread, what each model costs."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import matplotlib as mpl
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from tersor.core.measurement import Measurement
from tersor.measure.benchmark_schema import Benchmark, Comparison, Timing
from tersor.report.behaviour.words import capital, counted
from tersor.report.forest import forest
from tersor.report.format import both_of, duration, interval_of, p_of, plain, shorten, value_of
from tersor.report.page import Document, Figure, Section, Table
from tersor.report.plots import Plot
from tersor.report.svg import ACCENT, AFTER, BEFORE, INK, MUTED, inline, new_figure, quiet_axis, settings

NAME = 34
_COLOURS = (BEFORE, AFTER, ACCENT, INK, MUTED)
_PANELS = 6
_TOLD = 3  # comparisons that the headline names
_SPEED = (
    "How long a call takes, measured in fresh processes with the models in turns, so that a machine that slows down "
    "slows all of them. A speed-up is that of pairs of neighbouring sittings, with its 95 % interval."
)
_COSTS = (
    "What each model costs beside its time: bytes on disk, memory that opening and running it adds to a fresh "
    "process, and how long it takes until it can answer for the first time."
)


def benchmark_document(found: Benchmark, more: Sequence[Section] = ()) -> Document:
    """The page of a benchmark alone; ``more``: sections of other measurements of its models."""
    told = _against_first(found)
    names = " beside ".join(shorten(each.name, NAME) for each in (*found.models[1:2], found.models[0]))
    title = names if len(found.models) < 3 else f"{len(found.models)} models beside one another"
    facts = [(capital(name), shorten(plain(value), 200)) for name, value in found.settings.items()]
    facts += [("took", duration(found.seconds)), *((name, value) for name, value in found.environment.items() if value)]
    return Document(
        title=title, kicker=("Tersor benchmark", title, found.inputs), status="muted", word="",
        headline=_headline(found) or f"{capital(title)}: measured.",
        sections=(*benchmark_sections(found), *more), source="benchmark.json", tersor=found.tersor,
        figures=tuple(_figure(each) for each in told[:4]), reading=_reading(found), notes=found.notes,
        skipped=tuple((each.what, each.why) for each in found.skipped), facts=tuple(facts),
    )  # fmt: skip


def benchmark_sections(found: Benchmark) -> tuple[Section, ...]:
    """Speed with its spread, and what the models cost."""
    rows = [(_against(each), both_of(each.speedup), each.verdict, p_of(each.p)) for each in found.comparisons]
    header = ("Model", "Times as fast", "Verdict", "p")
    caption = "p: of no difference, by the sign test over sittings. Where the machine is too noisy, no claim is made."
    tables = [Table(header, tuple(rows), caption)] if rows else []
    plots = (_speedups(found), _spread(found))
    says = tuple(f"{_sentence(each)}." for each in _against_first(found))
    speed = Section(
        "speed", "Speed", _SPEED, (*says, *_outliers(found)), (*tables, _timings(found)),
        tuple(plot for plot in plots if plot is not None),
    )  # fmt: skip
    return speed, Section("costs", "Bytes, memory, start", _COSTS, tables=(_models(found),))


def _against_first(found: Benchmark) -> list[Comparison]:
    return [each for each in found.comparisons if each.base == found.models[0].name]


def _under(each: Comparison | Timing) -> str:
    return f"batch {each.batch}, {counted(each.threads, 'thread')}"


def _against(each: Comparison) -> str:
    return f"{shorten(each.model, NAME)} against {shorten(each.base, NAME)}, {_under(each)}"


def _sentence(each: Comparison) -> str:
    return f"{shorten(each.model, NAME)} at {_under(each)}: {each.sentence}"


def _headline(found: Benchmark) -> str:
    """Against which model, and how the others compare; empty for one model alone."""
    told = _against_first(found)
    if not told:
        return ""
    more = f"; {len(told) - _TOLD} more below" if len(told) > _TOLD else ""
    said = "; ".join(map(_sentence, told[:_TOLD]))
    return f"Against {shorten(found.models[0].name, NAME)}: {said}{more}."


def _reading(found: Benchmark) -> str:
    against = f"Each against {shorten(found.models[0].name, NAME)}. " if _against_first(found) else ""
    return f"{against}In brackets: the 95 % interval."


def _figure(each: Comparison) -> Figure:
    value = value_of(each.speedup)
    label = f"as fast, {shorten(each.model, NAME)}, {_under(each)}"
    if each.verdict == "too noisy to tell" or each.speedup.vague:  # a middle that means little is no headline
        return Figure(interval_of(each.speedup), label, "")
    return Figure(value, label, interval_of(each.speedup))


def _outliers(found: Benchmark) -> list[str]:
    worst = max(found.timings, key=lambda each: each.outliers.share, default=None)
    if worst is None or worst.outliers.count == 0:
        return []
    share, slowest = Measurement(worst.outliers.share, "fraction"), max(worst.outliers.slowest_ms)
    return [
        f"Up to {value_of(share)} of the calls took far longer than their neighbours ({shorten(worst.model, NAME)} at "
        f"{_under(worst)}, the slowest {slowest:.3g} ms); they are counted in every number."
    ]


def _timings(found: Benchmark) -> Table:
    rows: tuple[tuple[str, ...], ...] = tuple(
        (
            f"{shorten(each.model, NAME)}, {_under(each)}", both_of(each.p50_ms), both_of(each.mean_ms),
            value_of(each.p95_ms), value_of(each.p99_ms), value_of(each.throughput),
        )
        for each in found.timings
    )  # fmt: skip
    header: tuple[str, ...] = ("Model", "Median", "Mean", "95 % below", "99 % below", "Throughput")
    if any(each.energy for each in found.timings):
        rows = tuple((*row, both_of(each.energy)) for row, each in zip(rows, found.timings, strict=True))
        header = (*header, "Energy")
    return Table(header, rows, "Time of one call; throughput counts samples of calls one after another.")


def _models(found: Benchmark) -> Table:
    rows = tuple(
        (
            shorten(each.name, NAME), each.backend if each.device == "cpu" else f"{each.backend} on {each.device}",
            value_of(each.size_bytes), value_of(each.peak_memory_bytes), both_of(each.load_ms),
            both_of(each.first_call_ms),
        )
        for each in found.models
    )  # fmt: skip
    return Table(("Model", "Run by", "Size", "Peak memory", "Load", "First call"), rows)


def _speedups(found: Benchmark) -> Plot | None:
    told = _against_first(found)
    if not told:
        return None
    rows = [(f"{shorten(each.model, 14)}, b{each.batch}, t{each.threads}", each.speedup) for each in told]
    caption = (
        f"How many times as fast as {shorten(found.models[0].name, NAME)}, with the 95 % interval, at batch size b "
        "with t threads. A bar that crosses the line at 1 shows no difference."
    )
    return forest("speedups", "Times as fast", caption, rows, line=1.0, hint="right of the line is faster")


@mpl.rc_context(settings())
def _spread(found: Benchmark) -> Plot | None:
    """Which share of the calls is faster than a time, one panel for each batch size and number of threads."""
    settings_of = list(dict.fromkeys((each.batch, each.threads) for each in found.timings))[:_PANELS]
    names = [model.name for model in found.models][: len(_COLOURS)]
    if not settings_of:
        return None
    rows = ceil(len(settings_of) / 2)
    figure = new_figure(60 + 17 * ceil(len(names) / 2) + 170 * rows)
    grid = figure.subplots(rows, min(2, len(settings_of)), squeeze=False, sharey=True).ravel()
    told = []
    for axes, (batch, threads) in zip(grid, settings_of, strict=False):
        measured = [t for t in found.timings if (t.batch, t.threads) == (batch, threads) and t.model in names]
        for each in measured:
            share = [100 * at / (len(each.percentiles_ms) - 1) for at in range(len(each.percentiles_ms))]
            colour = _COLOURS[names.index(each.model)]
            axes.plot(each.percentiles_ms, share, color=colour, linewidth=1.8)
            told.append(f"{each.model}, {_under(each)}: median {value_of(each.p50_ms)}, 99 % {value_of(each.p99_ms)}")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"batch {batch}, {counted(threads, 'thread')}")
        axes.set_ylim(-2, 103)
        quiet_axis(axes, grid="both")
    for axes in grid[len(settings_of) :]:
        axes.set_visible(False)
    figure.supxlabel("ms per call", fontsize=12)
    figure.supylabel("calls that are faster, %", fontsize=12)
    handles = [Line2D([], [], color=_COLOURS[at], linewidth=2) for at in range(len(names))]
    figure.legend(handles, [shorten(name, 22) for name in names], loc="outside upper left", ncols=min(2, len(names)))
    title = "How the times are spread"
    caption = (
        "All timed calls, outliers too: at each time the share of calls that were faster. Further left is faster, "
        "and steeper steadier; a long tail to the right is what the slowest users see."
    )
    return Plot("spread", title, caption, inline(figure, "spread", f"{title}. {'; '.join(told)}"))
