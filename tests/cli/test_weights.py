"""``tersor prune`` and ``tersor inspect`` on files of weights, through the door that users take."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tersor.cli.main import main


@pytest.fixture
def source(tmp_path):
    generator = torch.manual_seed(0)
    tensors = {
        "fc1.weight": torch.randn(40, 30, generator=generator),
        "fc2.weight": torch.randn(10, 40),
        "b": torch.ones(4),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_a_file_is_pruned_and_the_table_says_how_and_that_it_is_no_smaller(source, tmp_path, capsys):
    out = tmp_path / "b.safetensors"
    assert main(["prune", str(source), "-o", str(out), "--sparsity", "0.9", "--scope", "global"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "1,440 of 1,600 weights are zero." in printed
    assert "as large as before" in printed and "skipped b: F32 [4] has fewer than two axes" in printed
    assert sum(int((tensor == 0).sum()) for tensor in load_file(out).values()) == 1440
    assert out.stat().st_size == source.stat().st_size


def test_json_holds_what_the_table_says(source, tmp_path, capsys):
    arguments = ["prune", str(source), "-o", str(tmp_path / "b.safetensors"), "--json"]
    assert main([*arguments, "--sparsity", "fc1*=0.5", "--sparsity", "fc*=0.8"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["name"]: (row["target"], row["zeros"]) for row in told["tensors"]} == {
        "fc1.weight": (0.5, 600), "fc2.weight": (0.8, 320),
    }  # fmt: skip
    assert told["skips"] == [{"place": "b", "reason": "F32 [4] has fewer than two axes (where= would take it)"}]


@pytest.mark.parametrize(
    "pattern, where, zeros", [("2:4", ("fc2.weight",), 200), ("4x1", ("fc2*",), 0), ("2x5", ("fc*",), 300 + 100)]
)
def test_patterns_and_names_are_read(source, tmp_path, capsys, pattern, where, zeros):
    options = [word for glob in where for word in ("--where", glob)] + (
        ["--sparsity", "0.25"] if ":" not in pattern else []
    )
    code = main(["prune", str(source), "-o", str(tmp_path / "b.safetensors"), "--pattern", pattern, *options, "--json"])
    if pattern == "4x1":
        assert code == 2 and "10 outputs are no multiple of 4: 10 = 2 × 4 + 2" in capsys.readouterr().err
    else:
        assert code == 0 and json.loads(capsys.readouterr().out)["zeros"] == zeros


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sparsity", "much"], "sparsity: not a number. Got much"),
        (["--sparsity", "1"], "0 <= sparsity < 1"),
        (["--sparsity", "0.5", "--sparsity", "0.6"], "GLOB=NUMBER"),
        (["--sparsity", "0.5", "--scope", "model"], "layer or global"),
        (["--sparsity", "0.5", "--pattern", "2;4"], "such as 2:4"),
        (["--sparsity", "0.5", "--pattern", "5:4"], "0 < n <= m"),
        (["--sparsity", "0.5", "--where", "fc3.weight"], "Nearest names: fc"),
        ([], "no sparsity"),
    ],
)
def test_wrong_words_are_told_and_nothing_is_written(source, tmp_path, capsys, arguments, message):
    assert main(["prune", str(source), "-o", str(tmp_path / "b.safetensors"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_the_input_and_foreign_files_are_refused(source, tmp_path, capsys):
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    for given, out in (
        (source, source),
        (tmp_path / "cut.npz", tmp_path / "o.npz"),
        (tmp_path / "no.npz", tmp_path / "o.npz"),
    ):
        assert main(["prune", str(given), "-o", str(out), "--sparsity", "0.5"]) == 2
        assert str(given) in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_inspect_shows_tensors_and_bytes_of_either_kind(source, tmp_path, capsys, kind):
    path = source
    if kind == "npz":
        path = tmp_path / "a.npz"
        np.savez(path, **{name: tensor.numpy() for name, tensor in load_file(source).items()})
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("3 tensors", "fc1.weight", "40×30", "near zero", "smallest", "zipped"))
    assert main(["inspect", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["totals"]["size"] == 1604 and told["totals"]["dense_bytes"] == 1604 * 4
