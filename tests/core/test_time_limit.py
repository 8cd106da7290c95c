import math
import signal
import threading
import time

import pytest

from tersor.core.time_limit import TimeUp, time_limit


def test_work_that_never_ends_is_ended():
    begun = time.monotonic()
    with pytest.raises(TimeUp, match=r"0\.05 s"), time_limit(0.05):
        while True:
            pass
    assert time.monotonic() - begun < 5


def test_work_that_ends_in_time_is_left_alone_and_the_alarm_with_it():
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(0.2):
        pass
    with time_limit(math.inf):
        pass
    time.sleep(0.25)
    assert signal.getsignal(signal.SIGALRM) is before


def test_work_that_swallows_what_is_raised_is_told_again(monkeypatch):
    monkeypatch.setattr("tersor.core.time_limit.AGAIN", 0.05)
    with pytest.raises(TimeUp), time_limit(0.05):
        try:
            while True:
                pass
        except TimeUp:
            time.sleep(10)


def test_in_another_thread_nothing_is_raised():
    seen = []

    def work():
        with time_limit(0.01):
            time.sleep(0.05)
        seen.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["done"]
