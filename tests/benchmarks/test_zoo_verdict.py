"""What counts as done, how reasons are ranked, and what the page says."""

import pytest

from benchmarks.zoo.page import HEADER, page, row
from benchmarks.zoo.reasons import heaviest, kind_of, reasons
from benchmarks.zoo.results import append, fingerprint, latest
from benchmarks.zoo.verdict import OK, is_wrong, peer_verdict, verdict
from tersor.core.plan import Skip

DONE = {
    "key": "timm/a", "tool": "tersor", "code": "c0de", "stage": "done", "stopped": None, "inputs": ["2×3×64×64"],
    "parameters": 2e6, "groups": 3, "skips": 1, "plan_s": 1.0, "apply_s": 0.5, "capture_s": 2.0, "parameters_left": 0.3,
    "macs_left": 0.3, "difference": 1e-15, "effect": 0.5, "reloads": True, "trains": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "facts, said",
    [
        ({}, OK),
        ({"macs_left": 0.45, "plan_s": 59.0, "onnx": 1e-5}, OK),
        ({"macs_left": 0.451}, "45.1 % of the MACs left"),
        ({"difference": 1e-8}, "wrong: differs from the masked model by 1e-08"),
        ({"difference": float("nan")}, "wrong: differs from the masked model by nan"),
        ({"difference": 0.5, "error_train": "x", "macs_left": 0.9}, "wrong: differs from the masked model by 0.5"),
        ({"difference": None}, "nothing was compared with the masked model"),
        ({"groups": 0, "difference": None}, "nothing to prune"),
        ({"effect": 1e-8}, "removing the channels changes the output by 1e-08 only: nothing is proved"),
        ({"reloads": False}, "the loaded artifact gives other outputs"),
        ({"trains": False}, "the training step gives no finite loss and gradients"),
        ({"onnx": 1e-3}, "ONNX differs by 0.001"),
        ({"plan_s": 60.0}, "60 s"),
        ({"error_reload": "KeyError: 'x'"}, "reload: KeyError: 'x'"),
        ({"stage": "plan", "stopped": "more than 10 GiB"}, "plan: more than 10 GiB"),
    ],
)  # fmt: skip
def test_a_model_is_done_only_when_everything_holds(facts, said):
    assert verdict(DONE | facts) == said


def test_a_model_that_was_stopped_before_it_was_compared_is_not_wrong():
    facts = {key: value for key, value in DONE.items() if key != "difference"} | {"stopped": "more than 600 s in all"}
    assert not is_wrong(facts) and verdict(facts) != OK


@pytest.mark.parametrize(
    "facts, said",
    [
        ({"macs_left": 0.3}, OK),
        ({"macs_left": 0.5}, "50.0 % of the MACs left"),
        ({"error_prune": "ZeroDivisionError: no"}, "prune: ZeroDivisionError: no"),
        ({"stage": "prune", "stopped": "more than 10 GiB"}, "prune: more than 10 GiB"),
    ],
)
def test_the_peer_is_judged_by_what_is_left(facts, said):
    assert peer_verdict({"stopped": None, **facts}) == said


def test_reasons_of_a_kind_are_counted_together_and_ranked_by_the_compute_they_keep():
    skips = [
        Skip("a.0", "64 channels are frozen: view in a.0"), Skip("a.1", "32 channels are frozen: view in a.1"),
        Skip("b", "10 channels are frozen: reaches the model's output"),
    ]  # fmt: skip
    after = [{"path": "a.0", "macs": 1}, {"path": "a.1", "macs": 2}, {"path": "b", "macs": 7}]
    found = reasons(skips, after)
    assert [(reason["count"], reason["macs_share"]) for reason in found] == [(1, 0.7), (2, pytest.approx(0.3))]
    assert found[1]["reason"] == "# channels are frozen: view in …"
    assert found[1]["example"] == "a.0: 64 channels are frozen: view in a.0"


def test_a_kind_of_reason_keeps_its_words():
    assert kind_of("is read by x.y:view[0]") == kind_of("is read by z.q.r:view[12]") != kind_of("is read by x.y:add[0]")


def test_the_heaviest_layers_say_what_they_kept_of_their_own():
    before = [{"path": "a", "macs": 100}, {"path": "b", "macs": 100}, {"path": "relu", "macs": 0}]
    after = [{"path": "a", "macs": 25}, {"path": "b", "macs": 75}, {"path": "relu", "macs": 0}]
    assert heaviest(before, after) == [
        {"layer": "b", "share": 0.75, "kept": 0.75}, {"layer": "a", "share": 0.25, "kept": 0.25}
    ]  # fmt: skip


def test_the_last_result_of_a_model_counts_and_a_broken_line_does_not(tmp_path):
    path = tmp_path / "runs" / "results.jsonl"
    assert latest(path) == {}
    for macs_left in (0.9, float("inf"), 0.3):
        append(path, {"key": "timm/a", "tool": "tersor", "macs_left": macs_left})
    append(path, {"key": "timm/a", "tool": "torch-pruning", "macs_left": 0.5})
    path.write_text(path.read_text() + '{"key": "timm/a", "to')
    found = latest(path)
    assert {pair: facts["macs_left"] for pair, facts in found.items()} == {
        ("timm/a", "tersor"): 0.3, ("timm/a", "torch-pruning"): 0.5
    }  # fmt: skip


def results_of(**verdicts):
    return {(f"timm/{name}", "tersor"): DONE | {"key": f"timm/{name}"} | facts for name, facts in verdicts.items()}


def summary_row(text):
    return next(line for line in text.splitlines() if line.startswith("| timm |")).split(" | ")


@pytest.mark.parametrize("failures, met", [(0, "met"), (2, "met"), (3, "not met")])
def test_the_target_of_timm_allows_two_failures_in_forty(failures, met):
    keys = [(f"timm/m{n}", "") for n in range(40)]
    results = results_of(**{f"m{n}": {"trains": n >= failures} for n in range(40)})
    cells = summary_row(page(keys, results, "c0de", "a machine"))
    assert cells[1:6] == ["40", "40", str(40 - failures), "38 of 40", met]


def test_models_that_were_not_run_keep_the_target_from_being_met():
    keys = [("timm/a", "attention"), ("timm/b", "hybrid")]
    text = page(keys, results_of(a={}), "c0de", "a machine")
    assert summary_row(text)[1:6] == ["2", "1", "1", "38 of 40", "not met"]
    assert "| b | hybrid |" in text and "not run" in text


def test_a_wrong_model_is_counted_and_listed_with_its_reason():
    text = page([("timm/a", "")], results_of(a={"difference": 0.1, "reasons": []}), "c0de", "a machine")
    assert summary_row(text)[6] == "1"
    assert "* **timm/a**: wrong: differs from the masked model by 0.1." in text


def test_every_row_has_a_cell_for_each_column():
    results = results_of(a={}, c={"error_train": "a | b"}) | {
        ("timm/a", "torch-pruning"): {"macs_left": 0.3, "prune_s": 1.0, "stopped": None}
    }
    for name in "abc":
        assert len(row(f"timm/{name}", "note", results)) == len(HEADER)
    assert row("timm/a", "", results)[-2:] == ["30.0%", "1.0"]
    assert row("timm/c", "", results)[-3] == "train: a \\| b"


def test_results_of_other_code_are_told_from_those_of_this():
    results = results_of(a={}, b={"code": "old"})
    assert "**1 of these results" in page([("timm/a", ""), ("timm/b", "")], results, "c0de", "a machine")
    assert "earlier state" not in page([("timm/a", "")], results, "c0de", "a machine")


def test_a_fingerprint_changes_with_what_files_say_and_are_called(tmp_path):
    (tmp_path / "a.py").write_text("1")
    first = fingerprint([tmp_path])
    assert fingerprint([tmp_path]) == first
    (tmp_path / "a.py").write_text("2")
    second = fingerprint([tmp_path])
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, fingerprint([tmp_path])}) == 3
