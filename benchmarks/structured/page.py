"""Pages of docs/benchmarks/ that `make bench-structured` writes."""

from __future__ import annotations

from benchmarks.tables import DOCS, machine, table

__all__ = ["DOCS", "table", "write"]


def write(name: str, title: str, body: str, source: str, device: str = "") -> None:
    """Print a page and keep it as docs/benchmarks/NAME.md."""
    on = f"{device}; {machine()}" if device else machine()
    page = f"# {title}\n\n{body}\n\nMeasured on: {on}. Written by `make bench-structured` (`{source}`).\n"
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / f"{name}.md").write_text(page)
    print(page)
