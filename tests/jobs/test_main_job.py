"""The main job on a small real task: compress, resume after a kill, load, and the numbers in between."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import tersor
from tersor.cli.main import main
from tersor.core.errors import ArtifactError, InputError, TersorError
from tersor.jobs.find_task import find_task

TASKS = Path(__file__).parent.parent / "tasks"
TINY, QUICK = TASKS / "tiny.py", TASKS / "quick.yaml"


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tersor", *map(str, arguments)]


def _compress_arguments(out: Path) -> list[str]:
    return _command("compress", TINY, "-o", out, "--recipe", QUICK, "--timing-seconds", 0.1, "--threads", 1, "--quiet")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run, from the command line."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run(_compress_arguments(out), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


def _digest(out: Path) -> str:
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def _summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def test_a_run_leaves_what_the_design_promises(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    promised = {"run.json", "records.jsonl", "summary.json", "report.html", "model.onnx"}
    promised |= {"model/architecture.json", "model/model.safetensors", "model/card.md", "steps/01-prune/plan.json"}
    assert promised <= names
    assert not (finished / "work").exists() and not [name for name in names if name.endswith(".part")]


def test_the_result_is_smaller_and_every_number_has_its_interval(finished):
    summary = _summary(finished)
    assert [step["name"] for step in summary["steps"]] == ["prune", "quantize"]
    assert summary["ratios"]["size"] > 3 and summary["ratios"]["macs"] > 2
    for step in (summary["baseline"], *summary["steps"], summary["final"]):
        found = step["measurements"]
        assert found["accuracy"]["low"] <= found["accuracy"]["value"] <= found["accuracy"]["high"]
        assert found["accuracy"]["n"] == 200
        for name in (
            "size_bytes",
            "parameters",
            "nonzeros",
            "macs",
            "peak_memory_bytes",
            "latency_ms_batch_1",
            "throughput_batch_32",
        ):
            assert found[name]["value"] > 0, name
    assert summary["final"]["measurements"]["size_bytes"]["value"] == (finished / "model.onnx").stat().st_size


def test_the_convolutions_of_the_final_file_run_in_integers(finished):
    operators = _summary(finished)["final"]["facts"]["onnx"]["operators"]
    assert operators["QLinearConv"] == 3 and "Conv" not in operators, operators


def test_the_int8_file_and_its_pytorch_model_agree_on_the_test_data(finished):
    found = _summary(finished)["final"]["measurements"]["onnx_agreement"]
    assert found["n"] == 200 and 0.97 <= found["low"] <= found["value"] <= found["high"] <= 1
    assert "onnx_agreement" not in _summary(finished)["steps"][0]["measurements"]


def test_the_final_model_loads_into_the_original_architecture(finished):
    task = find_task(TINY)
    model = tersor.load(finished / "model", model=task.model)
    x, _ = next(iter(task.test))
    assert type(model) is type(task.model) and model.fc.in_features < task.model.fc.in_features
    assert model(x).shape == (100, 10)
    with safe_open(finished / "model" / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 10


def test_load_check_agrees_and_notices_damage(finished, tmp_path, capsys):
    found = tersor.load_check(finished)
    assert main(["load-check", str(finished)]) == 0
    assert f"on {found['samples']} test samples, as in the summary" in " ".join(capsys.readouterr().out.split())
    assert found["accuracy"] == _summary(finished)["final"]["measurements"]["accuracy"]["value"]
    path = finished / "model" / "model.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-7])
        with pytest.raises(ArtifactError, match=r"model\.safetensors"):
            tersor.load_check(finished)
    finally:
        path.write_bytes(whole)


def _wait(process: subprocess.Popen, condition, seconds: float = 120.0) -> None:
    """Wait for a file of the run to say that it is time to kill."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError(f"the run ended (exit code {process.poll()}) before it could be killed")


def test_a_run_killed_at_any_moment_ends_with_the_same_weights(finished, tmp_path):
    out = tmp_path / "killed"
    moments = [
        lambda: (out / "steps" / "00-baseline" / "model.onnx").exists(),  # measuring the original
        lambda: any((out / "work" / "01-prune").rglob("*.safetensors")),  # inside training, an epoch is kept
        lambda: (out / "steps" / "01-prune").exists(),  # the step is saved, not yet exported
        lambda: any((out / "work" / "02-quantize").rglob("*.safetensors")),  # inside quantisation-aware training
        lambda: (out / "steps" / "02-quantize" / "test.safetensors").exists(),  # measuring the last step
    ]
    command = _compress_arguments(out)
    for moment in moments:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _wait(process, moment)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        command = _command("resume", out, "--quiet")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert _digest(out) == _digest(finished)
    for name in ("accuracy", "size_bytes", "nonzeros"):
        assert _summary(out)["final"]["measurements"][name] == _summary(finished)["final"]["measurements"][name]


def test_resuming_a_finished_run_reports_it_again(finished):
    before = (finished / "records.jsonl").read_bytes()
    assert tersor.resume(finished).summary["ratios"] == _summary(finished)["ratios"]
    assert (finished / "records.jsonl").read_bytes() == before


def _half_done(finished: Path, out: Path) -> Path:
    """A copy of a finished run in which only the original and the first step are recorded."""
    shutil.copytree(finished, out)
    for path in (out / "steps" / "02-quantize", out / "model"):
        shutil.rmtree(path)
    lines = (out / "records.jsonl").read_text().splitlines(keepends=True)
    (out / "records.jsonl").write_text("".join(lines[:2]))
    return out


def test_resuming_with_other_data_or_another_forward_is_refused(finished, tmp_path):
    out = _half_done(finished, tmp_path / "run")
    task = find_task(TINY)
    brighter = [(3 * x + 1, y) for x, y in task.test]
    with pytest.raises(InputError, match="test data changed"):
        tersor.resume(out, dataclasses.replace(task, test=brighter))
    other = find_task(TINY)
    other.model.block.relu = torch.nn.Tanh()
    with pytest.raises(InputError, match="model's code changed"):
        tersor.resume(out, other)
    assert len((out / "records.jsonl").read_text().splitlines()) == 2


def test_records_and_folders_changed_by_hand_are_refused(finished, tmp_path):
    out = _half_done(finished, tmp_path / "run")
    lines = (out / "records.jsonl").read_text().splitlines(keepends=True)
    (out / "records.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(ArtifactError, match="records are not those"):
        tersor.resume(out)
    (out / "records.jsonl").write_text("".join(lines))
    shutil.rmtree(out / "steps" / "00-baseline")
    with pytest.raises(ArtifactError, match="original model of the run is gone"):
        tersor.resume(out)


def test_a_missed_budget_is_said_and_the_best_earlier_step_is_kept(tmp_path):
    recipe = {
        "name": "ruinous",
        "steps": [
            {"name": "mild", "parts": [{"prune_channels": {"sparsity": 0.1}}, {"finetune": {"epochs": 2}}]},
            {"name": "ruin", "parts": [{"prune_channels": {"sparsity": 0.9, "score": {"random": {}}}}]},
        ],
    }
    timing = tersor.run.measure_step.Timing(0.1, 1)
    done = tersor.compress(
        TINY, recipe, tmp_path / "run", budgets=tersor.Budgets(max_drop=20, max_size=1), timing=timing
    )
    assert not done.passed and done.summary["verdict"]["status"] == "missed"
    assert done.summary["final"]["name"] == "mild"
    assert "ruin" in done.summary["verdict"]["sentence"] and "max_size" in done.summary["verdict"]["sentence"]
    met = {line["name"]: line["met"] for line in done.summary["verdict"]["budgets"]}
    assert met == {"max_drop": True, "max_size": False}


def test_a_dry_run_changes_nothing_and_says_what_would_happen():
    task = find_task(TINY)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    prune, quantize = tersor.dry_run(task, QUICK)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert prune.parameters < sum(p.numel() for p in task.model.parameters()) * 0.5
    assert prune.seconds > 0 and prune.memory_bytes > 4 * prune.parameters
    assert any("block.conv1" in line[0] for line in prune.plans[0]["lines"])
    assert [plan["method"] for plan in quantize.plans]


def test_a_run_begun_in_python_needs_its_task_to_resume(tmp_path):
    task = dataclasses.replace(find_task(TINY), source="")
    recipe = {"name": "one", "steps": [{"name": "prune", "parts": [{"prune_channels": {"sparsity": 0.5}}]}]}
    timing = tersor.run.measure_step.Timing(0.1, 1)
    done = tersor.compress(task, recipe, tmp_path / "run", timing=timing)
    with pytest.raises(InputError, match="tersor.resume"):
        tersor.resume(done.folder)
    assert tersor.resume(done.folder, task).summary["ratios"]["size"] == done.summary["ratios"]["size"]


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    from tersor.run import engine

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(engine, "save_artifact", full)
    with pytest.raises(TersorError, match="No space left on device.*tersor resume"):
        tersor.compress(TINY, QUICK, tmp_path / "run")
