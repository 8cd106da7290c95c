"""Reports as Markdown: the same sentences and tables as the pages, without pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tersor.core.record import Record
from tersor.report.columns import all_columns, present, rows
from tersor.report.findings import findings
from tersor.report.format import both_of, duration, human, scale_of
from tersor.report.page import Document, Section, Table
from tersor.report.schema import Summary
from tersor.report.skips import group_skips

RUN_STATUS = {"passed": "Passed", "missed": "Budget missed", "failed": "Not finished"}


def document_markdown(page: Document) -> str:
    """The page's sentences and tables."""
    figures = (f"{figure.value} {figure.interval} {figure.label}" for figure in page.figures)
    parts = [
        f"# {cell(page.title)}",
        f"**{page.word}.** {cell(page.headline)}" if page.word else cell(page.headline),
        bullets(figures),
        *(f"> {cell(note)}" for note in page.notes),
        *map(section_markdown, page.sections),
        *_left_out(page),
        f"## {page.facts_title}",
        table_markdown(Table(("", ""), page.facts)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _left_out(page: Document) -> tuple[str, ...]:
    if page.skipped is None:
        return ()
    told = bullets(f"{what}: {why}" for what, why in page.skipped)
    return "## What was not measured, and why", told or "Nothing was left out."


def run_markdown(summary: Summary, records: Sequence[Record], more: Sequence[Section] = ()) -> str:
    """A run; ``more``: sections of other measurements of its model."""
    parts = [
        f"# {cell(summary.task.name)}, recipe {cell(summary.recipe.name)}",
        f"**{RUN_STATUS[summary.verdict.status]}.** {cell(summary.verdict.sentence)}",
        bullets(findings(summary, records)),
        *(["## Budgets", table_markdown(budgets(summary))] if summary.verdict.budgets else []),
        "## Step by step",
        table_markdown(steps(summary)),
        *map(section_markdown, more),
        "## What was passed over, and why",
        bullets(_skips(summary)) or "Nothing was passed over.",
        "## How to get the same again",
        f"    {summary.reproduce.command}" if summary.reproduce.command else "",
        table_markdown(Table(("", ""), tuple((name, value) for name, value in summary.environment.items() if value))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def section_markdown(section: Section) -> str:
    """A section: what it means, what it says here, its tables; of its samples what was said of them."""
    parts = [f"## {cell(section.title)}", cell(section.meaning), bullets(section.says)]
    if section.samples:
        parts.append(bullets(f"{sample.title}: {'; '.join(sample.lines)}" for sample in section.samples))
    for table in section.tables:
        parts += [table_markdown(table), cell(table.caption)]
    return "\n\n".join(part for part in parts if part)


def table_markdown(table: Table) -> str:
    """A table; empty without rows."""
    if not table.rows:
        return ""
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    lines = [list(map(cell, table.header)), rule, *(list(map(cell, row)) for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(lines: Iterable[str]) -> str:
    """A list of sentences."""
    return "\n".join(f"* {cell(line)}" for line in lines)


def cell(text: str) -> str:
    """Text on one line that is not taken for Markdown or HTML, whatever models and users name their things."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\|`*]|(?<!\w)_|_(?!\w)|(?<=\])\()", r"\\\1", flat).replace("<", "&lt;")


def budgets(summary: Summary) -> Table:
    """The budgets, what was measured, and how each ended."""
    rows = tuple(
        (human(each.name), scale_of(each.limit, each.unit).full(each.limit), both_of(each.measured), each.outcome)
        for each in summary.verdict.budgets
    )
    return Table(("Budget", "At most", "Measured", ""), rows)


def steps(summary: Summary) -> Table:
    """The table step by step."""
    table = rows(summary)
    columns = present(all_columns(summary), table)
    cells = []
    for row in table:
        seconds = summary.seconds if row.kind == "final" else row.stage.seconds
        cells.append((row.label, *(both_of(row.at(column)) for column in columns), duration(seconds)))
    return Table(("After", *(column.title for column in columns), "Time"), tuple(cells))


def _skips(summary: Summary) -> list[str]:
    return [
        f"{stage.name}: {group.reason} ({', '.join(group.places)})"
        for stage in summary.stages
        for group in group_skips((skip.place, skip.reason) for skip in stage.skips)
    ]
