"""Whatever is brought, the command line says one clear thing, exits non-zero, and writes nothing or loses nothing."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from importlib import resources
from pathlib import Path

import pytest

from tersor.cli.main import main
from tersor.recipes.built_in import BUILT_IN

TASKS = Path(__file__).parent.parent / "tasks"

FRAME = """
import torch, tersor
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
x, y = torch.randn(60, 1, 4, 4), torch.randint(0, 3, (60,))
data = lambda x, y: DataLoader(TensorDataset(x, y), batch_size=20)
net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
good = dict(model=net, train=data(x, y), validation=data(x, y), test=data(x, y))
"""


def _run(tmp_path, capsys, body, *options, recipe=TASKS / "quick.yaml"):
    """Compress a task made of FRAME and ``body``; returns (exit code, what was said on standard error)."""
    path = tmp_path / "broken.py"
    path.write_text(FRAME + textwrap.dedent(body))
    code = main(
        [
            "compress",
            str(path),
            "-o",
            str(tmp_path / "run"),
            "--recipe",
            str(recipe),
            "--timing-seconds",
            "0.05",
            *options,
        ]
    )
    return code, capsys.readouterr().err


def _task(change):
    return f"def task(): return tersor.Task(**{{**good, {change}}})"


CASES = {
    "no function": ("def tasks(): return None", 2, ["task()", "broken.py"]),
    "a function that raises": ("def task(): raise KeyError('weights')", 2, ["KeyError", "weights", "broken.py:"]),
    "a file that cannot be imported": ("import no_such_package", 2, ["no_such_package", "broken.py"]),
    "the wrong type": ("def task(): return net", 2, ["Sequential", "tersor.Task"]),
    "a model that is none": (_task("'model': 3"), 2, ["model", "int"]),
    "no training data": (_task("'train': None"), 2, ["train"]),
    "no test data": (_task("'test': None"), 2, ["test"]),
    "an empty loader": (_task("'validation': []"), 2, ["validation", "empty"]),
    "a loader that is none": (_task("'test': 5"), 2, ["test", "int"]),
    "a one-shot generator": (_task("'train': (b for b in data(x, y))"), 2, ["train", "generator"]),
    "batches of the wrong structure": (_task("'train': DataLoader(x, 20)"), 2, ["train", "inputs"]),
    "a batch without targets": (_task("'test': [{'pixels': x}]"), 2, ["targets", "pixels"]),
    "inputs that are not numbers": (_task("'train': data(x / 0, y)"), 2, ["train", "inf", "batch"]),
    "targets out of range": (_task("'train': data(x, y + 1)"), 2, ["train", "3", "target"]),
    "inputs of the wrong shape": (_task("'train': data(x[:, :, 1:], y)"), 2, ["mat1", "train"]),
    "weights that are not numbers": (
        "net[0].weight.data[0] = float('nan')\ndef task(): return tersor.Task(**good)", 2, ["0.weight", "nan"],
    ),
    "a model whose graph cannot be captured": (
        """
        class Branch(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net
            def forward(self, x):
                return self.net(x) if x.sum() > 0 else self.net(-x)
        def task(): return tersor.Task(**{**good, 'model': Branch()})
        """, 1, ["captured", "broken.py:", "branching"],
    ),
    "a loss that turns NaN": (
        """
        calls = []
        def loss(model, batch):
            calls.append(1)
            value = nn.functional.cross_entropy(model(batch[0]), batch[1])
            return value * float('nan') if len(calls) > 3 else value
        def task(): return tersor.Task(**good, loss=loss)
        """, 1, ["loss", "NaN", "epoch"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_broken_task_is_one_clear_message(tmp_path, capsys, name):
    body, expected, words = CASES[name]
    code, said = _run(tmp_path, capsys, body)
    assert code == expected, said
    assert all(word.lower() in said.lower() for word in words), said
    assert "Traceback" not in said and "defect" not in said


def test_debug_shows_the_traceback(tmp_path, capsys):
    _, said = _run(tmp_path, capsys, "def task(): raise KeyError('weights')", "--debug")
    assert "Traceback" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compress", "digitz", "-o", "RUN"], ["digitz", "digits, fashion"]),
        (["compress", "absent.py", "-o", "RUN"], ["no such file", "absent.py"]),
        (["compress", "no.such.module:task", "-o", "RUN"], ["no.such.module"]),
        (["compress", "digits", "-o", "RUN", "--recipe", "smal"], ["smal", "balanced, small, fast"]),
        (["compress", "digits", "-o", "RUN", "--max-drop", "lots"], ["--max-drop", "lots", "1%"]),
        (["compress", "digits", "-o", "RUN", "--max-size", "4 parsec"], ["--max-size", "4MB"]),
        (["compress", "digits", "-o", "RUN", "--threads", "0"], ["--threads"]),
        (["compress", "digits"], ["--out"]),
        (["inspect", "digitz"], ["digitz"]),
        (["plan", "digitz"], ["digitz"]),
        (["resume", "RUN"], ["RUN", "no such folder"]),
        (["report", "RUN"], ["RUN"]),
        (["load-check", "RUN"], ["RUN"]),
        (["frobnicate"], ["frobnicate"]),
    ],
)
def test_wrong_usage_exits_with_two(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code = main(arguments)
    said = capsys.readouterr().err
    assert code == 2, said
    assert all(word in said for word in words), said
    assert "Traceback" not in said
    assert not (tmp_path / "RUN").exists()


def test_an_output_folder_in_use_is_refused_and_kept(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    code, said = _run(tmp_path, capsys, "def task(): return tersor.Task(**good)")
    assert code == 2 and "not empty" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_help_names_the_exit_codes_and_every_command(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for word in ("Exit codes", "compress", "resume", "inspect", "plan", "report", "load-check", "recipes"):
        assert word in said
    assert main(["compress", "--help"]) == 0
    assert "130 interrupted" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_help_lists_every_recipe_that_comes_along(capsys, command):
    there = {path.stem for path in resources.files("tersor.recipes").iterdir() if path.suffix == ".yaml"}
    assert there == set(BUILT_IN)
    assert main([command, "--help"]) == 0
    said = "".join(capsys.readouterr().out.split())  # lines break at hyphens too
    assert f"{','.join(BUILT_IN)},oraYAMLfile" in said


def test_recipes_are_listed_explained_and_printed(capsys):
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}:" in said for name in BUILT_IN)
    assert main(["recipes", "--json"]) == 0
    assert [recipe["name"] for recipe in json.loads(capsys.readouterr().out)] == list(BUILT_IN)
    assert main(["recipes", "fast"]) == 0
    assert "multiple_of: 16" in capsys.readouterr().out


LOUD = """
def task():
    import ctypes, os, subprocess, sys
    print("noise of Python")
    sys.__stdout__.write("noise of Python's own buffer\\n")
    os.write(1, b"noise of C code\\n")
    ctypes.pythonapi.printf(b"noise of C's buffer\\n")
    subprocess.run(["echo", "noise of a process"])
    return tersor.Task(**good)
"""


def test_json_is_not_mixed_with_what_the_users_code_prints(tmp_path):
    path = tmp_path / "loud.py"
    path.write_text(FRAME + LOUD)
    program = (
        "import os, sys; from tersor.cli.main import main; "
        "code = main(sys.argv[1:]); os.write(1, b'behind it'); print(' and print'); raise SystemExit(code)"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    told = subprocess.run(
        [sys.executable, "-c", program, "inspect", path, "--json"], capture_output=True, text=True, timeout=300,
        env=buffered,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    said, _, behind = told.stdout.partition("behind it")
    assert json.loads(said)["totals"] and behind == " and print\n"
    noises = "Python\n", "Python's own buffer", "C code", "C's buffer", "a process"
    assert all(f"noise of {what}" in told.stderr for what in noises)


def test_json_is_not_mixed_with_prints_where_standard_output_is_captured(tmp_path, capsys):
    path = tmp_path / "loud.py"
    path.write_text(FRAME + LOUD)
    assert main(["inspect", str(path), "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["totals"] and "noise of Python" in told.err


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "tersor",
        "compress",
        TASKS / "tiny.py",
        "-o",
        out,
        "--recipe",
        TASKS / "quick.yaml",
    ]
    process = subprocess.Popen(
        [*map(str, command), "--timing-seconds", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not (out / "records.jsonl").exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "tersor resume" in said and "Traceback" not in said
    assert len((out / "records.jsonl").read_text().splitlines()) == 1
