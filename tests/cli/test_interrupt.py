import signal
import time

import pytest

from tersor.cli.interrupt import insistent_interrupts
from tersor.cli.main import main


def test_an_interrupt_that_is_swallowed_comes_again():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), insistent_interrupts(again=0.05):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass  # as in a callback
        for _ in range(500):
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGINT) is before


def test_none_comes_where_none_was_pressed_or_after_the_end():
    with insistent_interrupts(again=0.01):
        time.sleep(0.05)
    with pytest.raises(KeyboardInterrupt), insistent_interrupts(again=0.01):
        signal.raise_signal(signal.SIGINT)
    time.sleep(0.05)


@pytest.mark.parametrize("command, resumable", [("evaluate", False), ("compress", True)])
def test_an_interrupt_points_to_resume_only_where_there_is_something_to_resume(tmp_path, capsys, command, resumable):
    task = tmp_path / "task.py"
    task.write_text("def task():\n    raise KeyboardInterrupt\n")
    options = ["model.onnx", "model.onnx", "--data", str(task)] if command == "evaluate" else [str(task), "-o", "out"]
    assert main([command, *options]) == 130
    said = capsys.readouterr().err
    assert "interrupted" in said and ("tersor resume" in said) == resumable


@pytest.mark.parametrize(
    "out", [["-o", "my runs/one"], ["-omy runs/one"], ["--out", "my runs/one"], ["--out=my runs/one"]]
)
def test_after_an_interrupt_the_command_that_goes_on_can_be_copied(tmp_path, capsys, out):
    task = tmp_path / "task.py"
    task.write_text("def task():\n    raise KeyboardInterrupt\n")
    assert main(["compress", *out, str(task), "--recipe", "fast"]) == 130
    assert "tersor resume 'my runs/one' goes on" in capsys.readouterr().err


def test_an_interrupted_resume_names_its_run(monkeypatch, capsys):
    def interrupted(run, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tersor.jobs.compress.resume", interrupted)
    assert main(["resume", "--quiet", "runs/two"]) == 130
    assert "tersor resume runs/two goes on" in capsys.readouterr().err
