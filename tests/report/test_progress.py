"""Progress: every item passes, whatever is shown."""

import io

import pytest
from rich.console import Console

from tersor.report.progress import RichProgress


class Clock:
    """A clock that moves a given number of seconds each time it is asked for an item."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def items(self, n, seconds):
        for number in range(n):
            self.now += seconds
            yield number


def on_paper():
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def on_screen():
    return Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "xterm-256color"})


@pytest.mark.parametrize("console", [on_paper, on_screen])
@pytest.mark.parametrize("quiet", [False, True])
def test_every_item_passes_in_order(console, quiet):
    progress = RichProgress(console(), quiet=quiet)
    assert list(progress.track(range(5), "count")) == [0, 1, 2, 3, 4]
    assert list(progress.track(iter("ab"), "letters", 2)) == ["a", "b"]
    assert list(progress.track([], "nothing")) == []


def test_on_paper_short_work_leaves_no_line_and_long_work_a_few():
    console, clock = on_paper(), Clock()
    progress = RichProgress(console, every=10, clock=clock)
    list(progress.track(clock.items(5, 1.0), "short", 5))
    assert console.file.getvalue() == ""
    list(progress.track(clock.items(100, 1.0), "long", 100))
    lines = console.file.getvalue().splitlines()
    assert 8 <= len(lines) <= 12
    assert lines[0] == "  long: 5 of 100, about 1 min 35 s left"
    assert lines[-1] == "  long: 100 done in 1 min 40 s"
    assert "\x1b" not in console.file.getvalue()


def test_nested_work_on_paper_shares_one_budget_of_lines():
    console, clock = on_paper(), Clock()
    progress = RichProgress(console, every=10, clock=clock)
    for _ in progress.track(range(20), "epochs", 20):
        list(progress.track(clock.items(10, 0.5), "batches", 10))
    assert len(console.file.getvalue().splitlines()) <= 22, "20 epochs of 5 s are 100 s: a line for each 10 s, and ends"


def test_on_paper_work_of_unknown_length_is_counted():
    console, clock = on_paper(), Clock()
    list(RichProgress(console, every=10, clock=clock).track(clock.items(15, 1.0), "stream"))
    assert console.file.getvalue().splitlines() == ["  stream: 10 so far", "  stream: 15 done in 15 s"]


def test_on_screen_bars_show_the_time_left_and_vanish():
    console = on_screen()
    progress = RichProgress(console)
    for number in progress.track(range(3), "training [bold]", 3):
        if number == 1:
            progress._bars.refresh()
    text = console.file.getvalue()
    assert "training [bold]" in text and "1/3" in text
    assert progress._bars is None and text.rstrip("\r").endswith("\x1b[2K\x1b[?25h"), "the bar's line is cleared"


def test_an_error_inside_the_loop_takes_the_bars_down():
    progress = RichProgress(on_screen())

    def work():
        for number in progress.track(range(3), "outer"):
            for _ in progress.track(range(3), "inner"):
                if number == 1:
                    raise ValueError("stop")

    with pytest.raises(ValueError, match="stop") as caught:
        work()
    del caught
    assert progress._bars is None


def test_quiet_says_nothing_but_warnings(capsys):
    console = on_paper()
    progress = RichProgress(console, quiet=True)
    progress.say("step 1")
    progress.say("warning: nothing to do")
    assert console.file.getvalue() == ""
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.strip() == "warning: nothing to do"


def test_say_prints_markup_as_it_stands_and_no_colour_to_a_file():
    console = on_paper()
    RichProgress(console).say("layers[red].0: skipped")
    assert console.file.getvalue() == "layers[red].0: skipped\n"
