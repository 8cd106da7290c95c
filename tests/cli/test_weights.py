"""``tersor prune`` and ``tersor inspect`` on files of weights, through the door that users take."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
    assert "as large as before" in printed and "skipped b: fewer than two axes" in printed
    assert sum(int((tensor == 0).sum()) for tensor in load_file(out).values()) == 1440
    assert out.stat().st_size == source.stat().st_size


def test_json_holds_what_the_table_says(source, tmp_path, capsys):
    arguments = ["prune", str(source), "-o", str(tmp_path / "b.safetensors"), "--json"]
    assert main([*arguments, "--sparsity", "fc1*=0.5", "--sparsity", "fc*=0.8"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["name"]: (row["target"], row["zeros"]) for row in told["tensors"]} == {
        "fc1.weight": (0.5, 600), "fc2.weight": (0.8, 320),
    }  # fmt: skip
    assert told["skips"] == [{"place": "b", "reason": "fewer than two axes (a pattern of names, where, would take it)"}]


def test_a_sparsity_may_be_a_percentage(source, tmp_path, capsys):
    arguments = ["prune", str(source), "-o", str(tmp_path / "b.safetensors"), "--json"]
    assert main([*arguments, "--sparsity", "fc1*=7%", "--sparsity", "fc*=80 %"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["target"] for row in told["tensors"]] == [0.07, 0.8]


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
        (["--sparsity", "80"], "such as 0.8 (80%)"),
        (["--sparsity", "8%0"], "sparsity: not a number. Got 8%0"),
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
    for read, out in (
        (source, source),
        (tmp_path / "cut.npz", tmp_path / "o.npz"),
        (tmp_path / "no.npz", tmp_path / "o.npz"),
    ):
        assert main(["prune", str(read), "-o", str(out), "--sparsity", "0.5"]) == 2
        assert str(read) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cnn.pt", "cnn.PTH", "pytorch_model.bin"])
@pytest.mark.parametrize("command", ["inspect", "prune", "quantize"])
def test_a_pickled_file_is_refused_with_the_line_that_makes_safetensors_of_it(tmp_path, capsys, command, name):
    (tmp_path / name).write_bytes(b"PK")
    more = {"inspect": [], "prune": ["--sparsity", "0.5"], "quantize": ["--bits", "8"]}[command]
    out = [] if command == "inspect" else ["-o", str(tmp_path / "o.safetensors")]
    assert main([command, str(tmp_path / name), *out, *more]) == 2
    assert 'safetensors.torch.save_file(model.state_dict(), "model.safetensors")' in capsys.readouterr().err


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


def test_a_file_is_quantised_and_written_out_again(source, tmp_path, capsys):
    packed, back = tmp_path / "q.safetensors", tmp_path / "back.safetensors"
    options = ["--bits", "fc1*=4", "--bits", "*=8", "--group-size", "10", "--affine", "--dtype", "bfloat16"]
    assert main(["quantize", str(source), "-o", str(packed), *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "uint4 groups of 10" in printed and "uint8 groups of 10" in printed and "times less" in printed
    assert "skipped b: fewer than two axes (a pattern of names, where, would take it); cast to bfloat16" in printed
    assert main(["inspect", str(packed)]) == 0
    printed = capsys.readouterr().out
    assert (
        all(word in printed for word in ("fc1.weight", "40×30", "uint4 groups of 10"))
        and "tersor.packed" not in printed
    )
    assert main(["dequantize", str(packed), "-o", str(back), "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)["tensors"]) == ["fc1.weight", "fc2.weight"]
    before, after = load_file(source), load_file(back)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert (before["fc2.weight"] - after["fc2.weight"]).abs().max() < 0.02 and after["b"].dtype == torch.bfloat16


def test_what_is_passed_over_for_one_reason_takes_one_line(tmp_path, capsys):
    path = tmp_path / "bn.safetensors"
    save_file({"w": torch.randn(4, 8), "bn.weight": torch.ones(4), "bn.bias": torch.zeros(6)}, path)
    assert main(["quantize", str(path), "-o", str(tmp_path / "q.safetensors"), "--bits", "8"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("skipped") == 1 and "skipped bn.bias, bn.weight: fewer than two axes" in printed


@pytest.mark.parametrize("options", [("quantize", "--bits", "8"), ("prune", "--sparsity", "0.5")])
def test_of_many_passed_over_five_are_named_and_all_are_in_json(tmp_path, capsys, options):
    path, out = tmp_path / "bn.safetensors", tmp_path / "o.safetensors"
    save_file({"w": torch.randn(4, 8), **{f"bn{n:02}.bias": torch.ones(4) for n in range(60)}}, path)
    command, *more = options
    assert main([command, str(path), "-o", str(out), *more]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    names = ", ".join(f"bn{n:02}.bias" for n in range(5))
    assert f"skipped 60 tensors, {names} and 55 more: fewer than two axes" in printed and "bn05" not in printed
    assert main([command, str(path), "-o", str(tmp_path / "again.safetensors"), *more, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["skips"]) == 60


def test_json_holds_what_quantising_did(source, tmp_path, capsys):
    assert main(["quantize", str(source), "-o", str(tmp_path / "b.safetensors"), "--bits", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["stored_bytes"] for row in told["tensors"]} == {
        "fc1.weight": 1200 + 160, "fc2.weight": 400 + 40,
    }  # fmt: skip
    assert (
        told["stored_bytes"] == 1800 and told["dense_bytes"] == 6400 and all(r["error"] < 1e-3 for r in told["tensors"])
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "neither integers nor a type"),
        (["--bits", "four"], "bits: not a number. Got four"),
        (["--bits", "4.5"], "bits: not a number"),
        (["--bits", "1"], "bits: impossible width. Got 1; expected a whole number from 2 to 8."),
        (["--bits", "9"], "bits: impossible width. Got 9; expected a whole number from 2 to 8."),
        (["--bits", "16"], "a whole number from 2 to 8."),
        (["--bits", "-4"], "impossible width"),
        (["--bits", "99999999999999999999999"], "impossible width"),
        (["--bits", "4", "--bits", "8"], "GLOB=NUMBER"),
        (["--bits", "none"], "nothing to do"),
        (["--bits", "fc9*=4"], "Nearest names: b, fc1.weight"),
        (["--bits", "[=4"], "matches no tensor"),
        (["--bits", "4", "--group-size", "0"], "impossible groups"),
        (["--bits", "4", "--group-size", "-1"], "impossible groups"),
        (["--bits", "4", "--group-size", "7"], "30 = 4 · 7 + 2"),
        (["--bits", "4", "--group-size", "x"], "--group-size"),
        (["--bits", "4", "--range", "kl"], "min_max or mean_squared_error"),
        (["--dtype", "int4"], "float16 or bfloat16"),
        (["--bits", "4", "--where", "fc3.weight"], "Nearest names: fc"),
    ],
)
def test_wrong_words_about_integers_are_told_and_nothing_is_written(source, tmp_path, capsys, arguments, message):
    assert main(["quantize", str(source), "-o", str(tmp_path / "b.safetensors"), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(
        st.sampled_from(
            ["--bits", "--group-size", "--range", "--dtype", "--where", "--affine", "--json", "-o", "--out"]
        )
        | st.sampled_from(["4", "fc*=3", "*=none", "10", "min_max", "float16", "bfloat16", "fc1.weight", "[", "", "="])
        | st.text(max_size=4).filter(lambda word: word.strip("-")[:1] not in ("h", "d")),
        max_size=7,
    )
)
def test_whatever_is_asked_is_done_or_told_in_one_line(source, tmp_path, capsys, words):
    out = tmp_path / "b.safetensors"
    code = main(["quantize", str(source), *words, "-o", str(out)])
    told = capsys.readouterr()
    assert code == 0 or (code == 2 and told.err and "Traceback" not in told.err and "defect" not in told.err), told.err
    assert out.exists() == (code == 0)
    out.unlink(missing_ok=True)
