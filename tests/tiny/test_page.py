"""docs/tiny.md, as a learner follows it: its code runs top to bottom, without torch, and says what the text says."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import tersor
import tersor.tiny as tiny

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is blocked")
sys.meta_path.insert(0, Blocked())
"""
PAGE = (Path(tersor.__file__).resolve().parent.parent / "docs" / "tiny.md").read_text()


def test_the_evening_runs_top_to_bottom_without_torch(tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S))
    (tmp_path / "evening.py").write_text(BLOCKED + code)
    done = subprocess.run([sys.executable, "evening.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    dense = float(next(line for line in lines if re.fullmatch(r"[\d.]+ [\d.]+ [\d.]+", line)).split()[2])
    once = float(next(line for line in lines if re.fullmatch(r"(89\.9|90)[\d.]* [\d.]+", line)).split()[1])
    steps = float(next(line for line in lines if re.fullmatch(r"\d+ → \d+ [\d.]+", line)).split()[3])
    assert 91 < dense < 96 and 20 < dense - once < 60 and dense - steps < 4


def test_every_name_is_in_the_table():
    table = PAGE[PAGE.index("## Name by name") :]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.*?)\|", table, re.M)))) == set(tiny.__all__)


def test_it_is_as_short_as_the_page_says():
    files = [path for path in Path(tiny.__file__).parent.glob("*.py") if path.stem != "__init__"]
    lines = sum(len(path.read_text().splitlines()) for path in files)
    said = re.search(r": (\w+) short files, some ([\d,]+) lines", PAGE)
    assert {"fifteen": 15, "sixteen": 16, "seventeen": 17}[said[1]] == len(files)
    assert abs(lines - int(said[2].replace(",", ""))) < 100


def test_each_docstring_says_what_changed():
    """Of every name that the classic had and that differs; those that the table calls the same need not."""
    same = {"Tensor", "Flatten", "ReLU", "Sequential", "Linear", "Conv2D", "train", "CompressionMetrics",
            "calculate_sparsity", "prune_model_by_magnitude"}  # fmt: skip
    for name in sorted(set(tiny.__all__) - same):
        assert "What changed" in getattr(tiny, name).__doc__, name
    assert ast.get_docstring(ast.parse(Path(tiny.__file__).read_text()))
