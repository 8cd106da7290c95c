"""What was measured of each layer as tables and plots: rows of plain data in, as ``tersor.measure`` gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from rich.table import Table
from rich.text import Text

from tersor.report.format import MISSING, shape_of, shorten
from tersor.report.page import fill
from tersor.report.plots import MOST_LAYERS, Plot
from tersor.report.svg import ACCENT, AFTER, BEFORE, inline, new_figure, quiet_axis, settings
from tersor.report.table import plain_table

Rows = Sequence[Mapping[str, Any]]
_COLOURS = (AFTER, ACCENT, BEFORE)


@dataclass(frozen=True)
class Analysis:
    """Rows of ``redundancy``, ``sparsity``, ``weight_changes``, ``structured_against_unstructured`` or ``storage``.

    ``columns``: which of their keys are drawn, one to three; "bytes.csr" is the csr of bytes.
    """

    title: str
    rows: Rows
    columns: tuple[str, ...]


def analysis_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """(header, a row of cells for each): the name of the weight (or kind), then everything that is there."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    cells = [[_name(row), *(_cell(found.get(name)) for name in columns)] for row, found in zip(rows, flat, strict=True)]
    return ["weight", *map(_label, columns)], cells


def analysis_view(rows: Rows) -> Table:
    """The table for the terminal."""
    header, cells = analysis_table(rows)
    table = plain_table(header[0], *header[1:])
    for row in cells:
        table.add_row(*map(Text, row))
    return table


@mpl.rc_context(settings())
def analysis_plot(analysis: Analysis, key: str = "analysis") -> Plot | None:
    """Bars of the columns for each row, on one axis; None where no row has one of them. The first rows if many."""
    columns = analysis.columns
    found = [(_name(row), _flat(row)) for row in analysis.rows]
    found = [(name, row) for name, row in found if any(column in row for column in columns)]
    if not found:
        return None
    shown = found[:MOST_LAYERS]
    figure = new_figure(70 + (8 + 13 * len(columns)) * len(shown))
    axes = figure.subplots()
    height = 0.8 / len(columns)
    for number, column in enumerate(columns):
        at = [place + (number - (len(columns) - 1) / 2) * height for place in range(len(shown))]
        values = [float(row.get(column, 0)) for _, row in shown]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.barh(at, values, height=0.9 * height, color=colour, label=_label(column), zorder=2)
    axes.set_yticks(range(len(shown)), labels=[shorten(name, 24, keep_end=True) for name, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    quiet_axis(axes, grid="x")
    figure.legend(loc="outside upper left", ncols=len(columns), handletextpad=0.4, columnspacing=0.9)
    told = "; ".join(f"{name}: {', '.join(_cell(row.get(column)) for column in columns)}" for name, row in shown)
    left_out = len(found) - len(shown)
    caption = f"The first {len(shown)} rows; {left_out} more are in the table." if left_out else ""
    return Plot(key, analysis.title, caption, inline(figure, key, f"{analysis.title}. {told}"))


def render(title: str, analyses: Sequence[Analysis]) -> str:
    """A page with a plot and a table of each; needs no network."""
    parts = []
    for number, analysis in enumerate(analyses):
        plot = analysis_plot(analysis, f"analysis{number}")
        header, rows = analysis_table(analysis.rows)
        parts.append({"title": analysis.title, "plot": plot, "header": header, "rows": rows})
    return fill("analysis.html", title=title, parts=parts)


def _name(row: Mapping[str, Any]) -> str:
    """The kind where the rows are of one weight."""
    if "kind" in row:
        return str(row["kind"])
    return ".".join(part for part in (str(row["path"]), str(row["tensor"])) if part)


def _label(column: str) -> str:
    return column.replace("_", " ").replace(".", " ")


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the name; what lies in a mapping under "outer.inner"."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": each for inner, each in value.items()}
        elif name not in ("path", "tensor", "kind"):
            found[name] = value
    return found


def _cell(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, (list, tuple)):
        return shape_of(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
