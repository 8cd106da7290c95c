"""What every command shares: options, exit codes, and where it prints."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

EXIT_CODES = """
Exit codes: 0 done and within budgets; 1 failed; 2 wrong usage or input; 3 a budget is missed; 130 interrupted.
"""

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print the verdict only.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="On an error, show the traceback too.")]


class Output:
    """Where a command prints: people's text (unless --json), progress (unless --quiet), and JSON."""

    def __init__(self, *, quiet: bool, as_json: bool):
        from tersor.report.progress import RichProgress

        self.quiet, self.as_json, self.out = quiet, as_json, sys.stdout
        if as_json:  # whatever the user's own code prints must not stand in the JSON; main puts it back
            sys.stdout = sys.stderr
        self.console = Console(stderr=as_json, highlight=False)
        self.progress = RichProgress(console=self.console, quiet=quiet or as_json)

    def json(self, data: Any) -> None:
        """Print JSON, where it was asked for."""
        if self.as_json:
            self.out.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    def show(self, *renderables: Any) -> None:
        """Print for people, unless JSON or quiet was asked for."""
        if not (self.quiet or self.as_json):
            self.console.print(*renderables)
