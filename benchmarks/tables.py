"""Markdown tables for docs/benchmarks/, with the machine they were measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tersor.run.environment import environment

DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(name: str, title: str, body: str, by: str = "make bench") -> None:
    """Print a page and keep it as docs/benchmarks/NAME.md."""
    script = f"benchmarks/{name.replace('-', '_')}.py"
    page = f"# {title}\n\n{body}\n\nMeasured on: {machine()}. Written by `{by}` (`{script}`).\n"
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / f"{name}.md").write_text(page)
    print(page)


def machine() -> str:
    """The processor, its threads and the versions of what was measured with."""
    facts = environment()
    return f"{facts['cpu']}, {facts['threads']} threads; " + ", ".join(
        f"{key} {facts[key]}" for key in ("python", "torch", "onnxruntime") if key in facts
    )
