"""The tables that a learner reads on the terminal, in plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def show(title: str, headers: Sequence[str], rows: Iterable[Sequence[object]], notes: Iterable[str] = ()) -> None:
    """Print a title, columns as wide as their longest entry (numbers to the right), and a line for each note."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(headers, *cells, strict=True)]
    right = [
        bool(cells) and all(row[i][:1].isdigit() or row[i][:1] in "-−–" for row in cells) for i in range(len(widths))
    ]

    def line(row: Sequence[str]) -> str:
        placed = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True))
        return "  ".join(placed).rstrip()

    print(f"\n{title}\n{'=' * len(title)}")
    print(line(headers))
    print("  ".join("-" * width for width in widths))
    for row in cells:
        print(line(row))
    for note in notes:
        print(f"* {note}")
