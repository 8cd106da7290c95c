"""Progress in the terminal: bars with an estimate of the time left; sparse lines where there is no terminal."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from tersor.core.progress import Progress
from tersor.report.format import duration, shorten

T = TypeVar("T")
_DESCRIPTION = 36  # characters
_SOON = 2.0  # seconds: what ends so soon is told when it has ended


class RichProgress(Progress):
    """Bars that vanish when their work is done; to a pipe or a file, one plain line every ``every`` seconds at most.

    ``quiet``: no bars and no lines; warnings still go to standard error, because nothing that matters is dropped.
    ``clock``: seconds, for the sparse lines.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool = False,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.console = console or Console(stderr=True, highlight=False)
        self.quiet, self.every, self.clock = quiet, every, clock
        self._bars: Bars | None = None
        self._said_at = clock()

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, showing how many of ``total`` (default: the length of ``items``) have passed."""
        if total is None:
            total = operator.length_hint(items) or None
        description = shorten(description, _DESCRIPTION)
        if self.quiet:
            return iter(items)
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            return self._draw(items, description, total)
        return self._tell(items, description, total)

    def say(self, text: str) -> None:
        """Print one dim line; a line that begins with "warning" is yellow, and is printed even when quiet."""
        warning = text.lower().startswith("warning")
        if self.quiet and not warning:
            return
        console = Console(stderr=True, highlight=False) if self.quiet else self.console
        console.print(Text(text, style="yellow" if warning else "dim"), soft_wrap=True)

    def _draw(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        bars = self._bars
        if bars is None:
            bars = self._bars = _new_bars(self.console)
            bars.start()
        task = bars.add_task(description, total=total)
        try:
            for item in items:
                yield item
                bars.advance(task)
        finally:
            bars.remove_task(task)
            if not bars.task_ids:
                bars.stop()
                self._bars = None

    def _tell(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        begun, told = self.clock(), False
        done = 0
        for done, item in enumerate(items, start=1):
            yield item
            left = _left(done, total, self.clock() - begun)
            if self._due() and left >= _SOON:
                known = f"{done} of {total}, about {duration(left)} left" if left < math.inf else f"{done} so far"
                self._line(f"  {description}: {known}")
                told = True
        if told or self._due():
            self._line(f"  {description}: {done} done in {duration(self.clock() - begun)}")

    def _due(self) -> bool:
        return self.clock() - self._said_at >= self.every

    def _line(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)
        self._said_at = self.clock()


def _new_bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console, transient=True, refresh_per_second=5,
    )  # fmt: skip


def _left(done: int, total: int | None, seconds: float) -> float:
    """The seconds left at the pace so far; infinite where nobody knows how much there is."""
    return math.inf if total is None or done > total else seconds / done * (total - done)
