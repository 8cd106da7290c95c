"""A limit of time that holds for work that knows nothing of it."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tersor.core.errors import TersorError

AGAIN = 2.0  # seconds: what is raised in a callback from C or a garbage collection is lost, and is raised again


class TimeUp(TersorError):
    """The work took longer than it was given. Exit code 1."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the block once ``seconds`` have passed, as Ctrl-C would raise; infinite: never.

    It comes between two of Python's own instructions, so that one long call into C ends first. Where the block loses
    it (Python drops what is raised in a callback or a finaliser, libraries catch it or raise an error of their own
    instead), it is raised again every AGAIN seconds and at the block's end at the latest, from the error that came out
    of the block, if one did. In another thread than the main one, and on Windows, no signal arrives and nothing is
    raised. Blocks do not nest.
    """
    if sys.platform == "win32" or seconds == math.inf or threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def up() -> TimeUp:
        return TimeUp("the time is up", got=f"more than {seconds:.3g} s")

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        raise up()

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN)
        yield
    except TimeUp:
        raise
    except Exception as error:
        if told:
            raise up() from error
        raise
    finally:
        try:  # one that comes just now is raised here, too
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.signal(signal.SIGALRM, before)
    if told:
        raise up()
