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
