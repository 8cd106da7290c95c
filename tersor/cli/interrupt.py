"""Ctrl-C that is not lost: Python drops an interrupt that arrives in a garbage collection or in a callback from C."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 2.0  # seconds


@contextmanager
def insistent_interrupts(again: float = AGAIN) -> Iterator[None]:
    """While open, Ctrl-C raises KeyboardInterrupt, and again every ``again`` seconds until the block is left.

    In another thread than the main one, where no signal arrives, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    left = threading.Event()

    def insist() -> None:
        while not left.wait(again):
            _thread.interrupt_main()

    def handle(number: int, frame: FrameType | None) -> None:
        if not any(thread.name == "insist" for thread in threading.enumerate()):
            threading.Thread(target=insist, name="insist", daemon=True).start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        left.set()
        signal.signal(signal.SIGINT, before)
