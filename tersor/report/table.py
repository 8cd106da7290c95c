"""The one look of every table that commands print."""

from __future__ import annotations

from rich import box
from rich.table import Table

_NAME = 8  # characters of the first column that are never folded


def plain_table(first: str, *others: str) -> Table:
    """An empty table: names on the left, numbers to the right."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="dim", caption_justify="left"
    )
    table.add_column(first, overflow="fold", min_width=_NAME)
    for name in others:
        table.add_column(name, justify="right")
    return table
