"""Time and memory that a model may take: a budget inside a process, and a watch over the whole process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
CANCELLED = "cancelled"


class OverBudget(BaseException):
    """The budget of processor seconds is spent. No Exception: whoever catches those must not catch this."""


@contextmanager
def budget(seconds: float) -> Iterator[None]:
    """Raise OverBudget in the main thread once this process has computed for ``seconds`` in the block.

    Processor time, not the clock's: what else runs on the machine does not count. Raised again every second, for those
    who catch everything. Blocks do not nest.
    """

    def stop(signum: int, frame: object) -> None:
        raise OverBudget(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def unbudgeted() -> Iterator[None]:
    """Stop the clock of the budget around this block, if one runs."""
    left, again = signal.setitimer(signal.ITIMER_PROF, 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, left, again)


@dataclass(frozen=True)
class Outcome:
    """How a watched process ended. ``stopped``: why it was ended, or how it died; None where it came to its end."""

    stopped: str | None
    seconds: float
    peak_gib: float
    stderr: str


def watched(
    module: str, arguments: Sequence[str], *, seconds: float, gib: float, cancelled: Callable[[], bool] = bool
) -> Outcome:
    """Run ``python -m module arguments`` with one thread, at most ``seconds`` by the clock and ``gib`` of memory,
    until ``cancelled`` says so."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    start, peak, stopped = time.monotonic(), 0.0, None
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            peak = max(peak, _resident(process.pid) / GIB)
            if peak > gib:
                stopped = f"more than {gib:g} GiB"
            elif time.monotonic() - start > seconds:
                stopped = f"more than {seconds:g} s in all"
            elif cancelled():
                stopped = CANCELLED
            if stopped:
                process.kill()
                break
            time.sleep(0.1)
        _, stderr = process.communicate()
    if stopped is None and process.returncode:
        last = (stderr.strip().splitlines() or [""])[-1]
        stopped = f"exit status {process.returncode}: {last}"
    return Outcome(stopped, time.monotonic() - start, peak, stderr)


def _resident(pid: int) -> int:
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.NoSuchProcess:
        return 0
