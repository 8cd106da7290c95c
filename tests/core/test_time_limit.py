import math
import signal
import sys
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


def test_what_python_drops_in_a_finaliser_is_raised_at_the_end_of_the_block(monkeypatch):
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: dropped.append(what.exc_value))

    class Slow:
        def __del__(self):
            while True:
                pass

    with pytest.raises(TimeUp, match=r"0\.02 s"), time_limit(0.02):
        slow = Slow()
        del slow
    assert [type(error) for error in dropped] == [TimeUp]


def test_an_error_that_a_library_makes_of_it_is_its_cause():
    with pytest.raises(TimeUp) as caught, time_limit(0.02):
        try:
            while True:
                pass
        except TimeUp:
            raise ValueError("the library's own words") from None
    assert str(caught.value.__cause__) == "the library's own words"


def test_an_error_in_time_is_left_as_it_is():
    with pytest.raises(ValueError, match="in time"), time_limit(60):
        raise ValueError("in time")


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


def test_an_alarm_that_comes_while_the_limit_is_taken_off_leaves_no_handler_behind(monkeypatch):
    set_timer, before = signal.setitimer, signal.getsignal(signal.SIGALRM)

    def late(which, seconds, interval=0):
        set_timer(which, seconds, interval)
        if not seconds:
            signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(signal, "setitimer", late)
    with pytest.raises(TimeUp, match="60 s"), time_limit(60):
        pass
    assert signal.getsignal(signal.SIGALRM) is before
