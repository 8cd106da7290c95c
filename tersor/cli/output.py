"""What every command shares: options, exit codes, and where it prints."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console

from tersor.cli.values import parse_bytes, parse_milliseconds, parse_points, parse_words

if TYPE_CHECKING:
    from tersor.run.budgets import Budgets

EXIT_CODES = """
Exit codes: 0 done and within budgets; 1 failed; 2 wrong usage or input; 3 a budget is missed; 130 interrupted.
"""

STDOUT = 1  # the file descriptor

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print the verdict only.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")]
TaskArgument = Annotated[
    str, typer.Argument(help="digits, fashion, a Python file with task() -> tersor.Task, or package.module:function.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="The run's folder; it must be new or empty.")]
MaxDropOption = Annotated[str | None, typer.Option(help="Largest loss of the metric in percentage points, such as 1%.")]
MaxSizeOption = Annotated[str | None, typer.Option(help="Largest ONNX file, such as 4MB or 500KB.")]
MaxLatencyOption = Annotated[str | None, typer.Option(help="Largest median latency at batch 1, such as 5ms.")]
SeedOption = Annotated[int, typer.Option(help="All randomness of the run derives from it.", min=0)]
ThreadsOption = Annotated[
    int | None, typer.Option(help="Threads to train and to measure with; default: all cores.", min=1)
]
SecondsOption = Annotated[float, typer.Option(help="Seconds to time each batch size for.", min=0.05)]
FormatOption = Annotated[
    str, typer.Option("--format", help="Of the report: html, md, csv, or several; json: the numbers alone.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="On an error, show the traceback too.")]


class Output:
    """Where a command prints: people's text (unless --json), progress (unless --quiet), and JSON."""

    def __init__(self, *, quiet: bool, as_json: bool):
        from tersor.report.progress import RichProgress

        self.quiet, self.as_json, self.out, self._own = quiet, as_json, sys.stdout, -1
        if as_json:  # whatever else prints, C code and other processes too, must not stand in it; main puts it back
            self._own, sys.stdout = _apart(sys.stdout), sys.stderr
        self.console = Console(stderr=as_json, highlight=False)
        self.progress = RichProgress(console=self.console, quiet=quiet or as_json)

    def json(self, data: Any) -> None:
        """Print JSON, where it was asked for."""
        if not self.as_json:
            return
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        if self._own < 0:
            self.out.write(text)
            return
        with open(os.dup(self._own), "w", encoding="utf-8") as own:
            own.write(text)

    def show(self, *renderables: Any) -> None:
        """Print for people, unless JSON or quiet was asked for."""
        if not (self.quiet or self.as_json):
            self.console.print(*renderables)


def _apart(out: TextIO) -> int:
    """A file descriptor to where standard output goes, which itself goes where errors go from now on.

    −1 where ``out`` is not the process's own standard output.
    """
    try:
        if out.fileno() != STDOUT:
            return -1
        errors = sys.stderr.fileno()
    except (OSError, ValueError):  # captured
        return -1
    _flush(out)
    own = os.dup(STDOUT)
    os.dup2(errors, STDOUT)
    return own


def _flush(out: TextIO) -> None:
    """Write what waits in Python's buffer and in C's, which a pipe's reader would else get when the process ends."""
    with suppress(OSError, ValueError):  # closed
        out.flush()
    with suppress(AttributeError):  # Windows: Python's library does not show it
        ctypes.pythonapi.fflush(None)


@contextmanager
def output_put_back() -> Iterator[None]:
    """Standard output is afterwards what it was, whatever a command made of it."""
    out = sys.stdout
    try:
        kept = os.dup(STDOUT)
    except OSError:  # closed
        kept = -1
    try:
        yield
    finally:
        if sys.stdout is not out:
            _flush(out)
        sys.stdout = out
        if kept >= 0:
            os.dup2(kept, STDOUT)
            os.close(kept)


def show_reports(output: Output, stem: Path, formats: str) -> None:
    """Where the reports lie that were written under ``stem``."""
    for kind in parse_words(formats):
        if kind != "json":
            output.show(f"report:  {stem.with_suffix(f'.{kind}')}")


def conclude(output: Output, folder: Path, summary: Mapping[str, Any]) -> None:
    """The final table and verdict; exit code 3 where a budget is missed."""
    from tersor.report.terminal import agreement_line, summary_table, verdict_line

    output.json(summary)
    output.show(summary_table(summary))
    output.show(agreement_line(summary))
    if not output.as_json:
        output.console.print(verdict_line(summary))
    output.show(f"report: {folder / 'report.html'}\nmodel:  {folder / 'model.onnx'} and {folder / 'model'}")
    if summary["verdict"]["status"] != "passed":
        raise typer.Exit(3)


def budgets_of(max_drop: str | None, max_size: str | None, max_latency: str | None) -> Budgets:
    """The budgets that the options of these names give. Raises InputError for values that cannot be read."""
    from tersor.run.budgets import Budgets

    return Budgets(parse_points(max_drop), parse_bytes(max_size), parse_milliseconds(max_latency))


def set_threads(threads: int | None) -> None:
    """Let torch train with so many threads; None: as many as it likes."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
