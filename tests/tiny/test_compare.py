import itertools

import numpy as np
import pytest

from tersor.tiny import Conv2D, Flatten, Linear, ReLU, Sequential, compare_techniques, evaluate
from tersor.tiny.compare import TECHNIQUES


@pytest.fixture(scope="module")
def found(_trained, digits):
    return compare_techniques(_trained, digits[1], repeats=2, epochs=3)


def test_every_technique_and_every_combination_is_there_once(found):
    names = [" + ".join(each) for n in range(6) for each in itertools.combinations(TECHNIQUES, n)]
    assert list(found) == ["original", *names[1:]] and len(found) == 32


def test_the_original_is_compared_with_itself(found, trained, digits):
    row = found["original"]
    assert row["error"] == 0 and row["compression_ratio"] == 1 and row["speedup"] == 1 and row["kernel"] == "dense"
    assert row["accuracy"] == evaluate(trained, digits[1]) and row["parameters"] == 6570
    assert row["size_bytes"] == 6570 * 4 and row["size_mb"] == row["size_bytes"] / 1024**2


def test_what_each_technique_is_for_shows(found):
    assert found["magnitude"]["sparsity"] == pytest.approx(80, abs=0.02)
    assert 3.5 < found["magnitude"]["compression_ratio"] < 5  # a fifth of the weights, and a bit for each
    assert 3.5 < found["int8"]["compression_ratio"] < 4 and found["int8"]["error"] < 0.05
    assert found["structured"]["parameters"] < found["original"]["parameters"] > found["low_rank"]["parameters"]
    assert found["distill"]["parameters"] < 6570 / 2 and found["distill"]["accuracy"] > 85
    assert found["magnitude + int8"]["size_bytes"] < min(found[n]["size_bytes"] for n in ("magnitude", "int8"))
    assert all(row["time_ms"] > 0 and row["kernel"] in ("dense", "CSR") for row in found.values())


def test_the_model_itself_is_not_changed(trained, digits):
    before = [p.data.copy() for p in trained.parameters()]
    compare_techniques(trained, digits[1], repeats=1, epochs=1)
    assert all(np.array_equal(p.data, w) for p, w in zip(trained.parameters(), before, strict=True))


def test_it_is_printed_side_by_side_and_fits_the_terminal(trained, digits, capsys):
    compare_techniques(trained, digits[1], techniques=("magnitude", "int8"), repeats=1)
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("applied"))
    assert all(word in header for word in ("KB", "zeros %", "error", "accuracy %", "ms"))
    assert sum("dense" in line or "CSR" in line for line in lines) == 4
    assert max(len(line) for line in lines if not line.startswith("*")) <= 80


def test_without_data_there_is_no_accuracy():
    found = compare_techniques(Sequential(Linear(30, 20), ReLU(), Linear(20, 4)), repeats=1, epochs=1)
    assert len(found) == 32 and all(row["accuracy"] is None for row in found.values())


@pytest.mark.filterwarnings("ignore:weight")
def test_convolutions_take_part():
    rng = np.random.default_rng(0)
    model = Sequential(
        Conv2D(1, 6, 3, rng=rng), ReLU(), Flatten(), Linear(96, 20, rng=rng), ReLU(), Linear(20, 4, rng=rng)
    )
    x = rng.normal(size=(20, 1, 6, 6)).astype(np.float32)
    found = compare_techniques(model, x, repeats=1, epochs=1)
    assert len(found) == 32 and 0 < found["int8"]["error"] < 0.05


def test_few_integers_are_counted_with_the_gaps_between_them():
    model = Sequential(Linear(100, 100, bias=False, rng=np.random.default_rng(0)))
    found = compare_techniques(model, sparsity=0.97, repeats=1, techniques=("magnitude", "int8"))
    left = int(round((1 - found["magnitude + int8"]["sparsity"] / 100) * 10_000))
    assert 2 * left <= found["magnitude + int8"]["size_bytes"] <= 2 * left + 20 < left + 10_000 / 8


def test_what_a_model_cannot_have_is_left_out_and_said(capsys):
    found = compare_techniques(Sequential(Linear(3, 1)), repeats=1, techniques=("structured", "low_rank", "int8"))
    assert list(found) == ["original", "int8"]
    printed = capsys.readouterr().out
    assert "structured left out" in printed and "low_rank left out" in printed and "distill left out" not in printed


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="magic"):
        compare_techniques(Sequential(Linear(4, 2)), techniques=("magic",))
    with pytest.raises(ValueError, match="pass data"):
        compare_techniques(Sequential(Conv2D(1, 2, 3), Flatten(), Linear(8, 2)))
