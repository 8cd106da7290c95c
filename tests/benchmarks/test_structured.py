"""The accuracy benchmark: its log, its intervals, its one training loop, its arms and its pages, on small models."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.results import Finished, Log, over_images, over_seeds
from benchmarks.structured import page, report, training
from benchmarks.structured.latency_page import Row, draw, write_page
from tersor.core.measurement import Measurement
from tersor.distill.response import Distill
from tersor.measure.compute import macs
from tersor.zoo.cifar import Images
from tersor.zoo.residual import ResidualNet


def finished(right, ratio=2.1):
    return Finished(ratio, 1.0, 2.0, np.array(right, dtype=bool))


def images(count=96):
    torch.manual_seed(0)
    targets = torch.arange(count) % 4
    return Images(torch.randn(count, 3, 8, 8) + targets[:, None, None, None], targets)


def network():
    torch.manual_seed(1)
    return ResidualNet((8, 16), 1, in_channels=3, classes=10).eval()


def same(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_an_arm_that_is_in_the_log_is_not_run_again_and_other_settings_are(tmp_path):
    path, settings = tmp_path / "log.jsonl", {"arm": "a", "seed": 0}
    first = Log(path, {"images": 3}).once(settings, lambda: finished([True, False, True]))
    again = Log(path, {"images": 3}).once(settings, lambda: pytest.fail("it is in the log"))
    assert (again.ratio, again.training, again.right.tolist()) == (2.1, 2.0, first.right.tolist())
    assert again.accuracy == pytest.approx(200 / 3)
    for facts, others in (({"images": 4}, settings), ({"images": 3}, {**settings, "seed": 1})):
        assert not Log(path, facts).once(others, lambda: finished([False] * 3)).right.any()
    assert len(path.read_text().splitlines()) == 3


def test_a_line_that_was_cut_short_is_run_again_and_replaced(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, {})
    log.once({"seed": 0}, lambda: finished([True]))
    log.once({"seed": 1}, lambda: finished([True]))
    path.write_text(path.read_text()[:-9])
    log = Log(path, {})
    assert log.once({"seed": 0}, lambda: pytest.fail("it is whole")).right.all()
    assert not log.once({"seed": 1}, lambda: finished([False])).right.any()
    assert [json.loads(line)["settings"]["seed"] for line in path.read_text().splitlines()] == [0, 1]


def test_differences_are_paired_by_seed_and_have_students_interval():
    a = [finished([1, 1, 1, 0]), finished([1, 1, 1, 1]), finished([1, 1, 0, 0])]
    b = [finished([1, 1, 0, 0]), finished([1, 1, 0, 1]), finished([1, 1, 0, 0])]
    found = over_seeds(a, b)
    differences = np.array([25.0, 25.0, 0.0])
    half = 4.302652729911275 * differences.std(ddof=1) / math.sqrt(3)  # t of 2 degrees of freedom at 97.5 %
    assert found == pytest.approx((differences.mean(), differences.mean() - half, differences.mean() + half))
    assert over_seeds(a[:2], b[:2]) is None


def test_the_interval_over_images_holds_the_difference_and_is_paired():
    rng = np.random.default_rng(0)
    base = rng.random((2, 4000)) < 0.9
    better = base | (rng.random((2, 4000)) < 0.1)
    a, b = [finished(row) for row in better], [finished(row) for row in base]
    found = over_images(a, b)
    assert found.value == pytest.approx(100 * (better.mean() - base.mean())) and found.low < found.value < found.high
    unpaired = over_images(a, [finished(rng.permutation(row)) for row in base])
    assert found.high - found.low < 0.7 * (unpaired.high - unpaired.low)


def test_training_depends_on_the_seed_learns_and_leaves_the_model_given():
    cpu, data, model = torch.device("cpu"), images(), network()
    before, budget = training.checksum(model), training.Budget(epochs=8, lr=0.05, batch=16)
    first, _ = training.train(model, data, budget, 0, cpu)
    assert training.checksum(model) == before and not first.training
    assert same(first, training.train(model, data, budget, 0, cpu)[0])
    assert not same(first, training.train(model, data, budget, 1, cpu)[0])
    assert training.correct(first, data, cpu).mean() > training.correct(model, data, cpu).mean() + 0.2


def test_distillation_needs_its_teacher_and_leaves_it_as_it_was():
    cpu, data, model, teacher = torch.device("cpu"), images(32), network(), network()
    before, budget = training.checksum(teacher), training.Budget(epochs=1)
    plain, _ = training.train(model, data, budget, 0, cpu)
    distilled, _ = training.train(model, data, budget, 0, cpu, Distill(), teacher)
    assert not same(plain, distilled) and training.checksum(teacher) == before


@pytest.mark.parametrize("ratio", [1.5, 2.1])
def test_both_arms_reach_the_ratio_within_two_per_cent_and_leave_the_original(ratio):
    peer = pytest.importorskip("torch_pruning")
    from benchmarks.structured.arms import TersorArm, TorchPruningArm

    torch.manual_seed(1)
    model = ResidualNet((64, 96), 1, in_channels=3, classes=10).eval()
    task = training.task_of(model, images(), images(16))
    before = training.checksum(model)
    for arm in (TersorArm(), TorchPruningArm(peer.importance.GroupMagnitudeImportance, "norm")):
        pruned = arm.prune(task, ratio)
        inputs = task.example_inputs
        assert pruned.ratio == pytest.approx(macs(model, inputs).value / macs(pruned.model, inputs).value)
        assert abs(pruned.ratio / ratio - 1) <= 0.02
        assert pruned.model(inputs[0]).shape == (2, 10)
    assert training.checksum(model) == before


def test_the_accuracy_page_has_every_arm_and_the_differences_to_the_peer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "DOCS", tmp_path)
    setting = report.Setting("resnet20", 100, training.Budget(3), 2, "", "cifar.py")
    peer, ours = [finished([1, 0] * 50)] * 2, [finished([1, 1, 1, 0] * 25)] * 2
    arms, found = {"Peer": "norm", "Tersor": "ours"}, {("Peer", 2.5): peer, ("Tersor", 2.5): ours}
    report.write_page(setting, 91.25, arms, ["Tersor"], found)
    text = (tmp_path / "structured-resnet20.md").read_text()
    assert text in capsys.readouterr().out
    first, second = (line for line in text.splitlines() if line.startswith("| 2.5×"))
    assert "| 50.00 (50.00, 50.00) at 2.10× | 75.00 (75.00, 75.00) at 2.10× |" in first
    assert "| Tersor | Peer | +25.00 | +" in second and second.endswith("|  |")
    three = {key: [*arm, arm[0]] for key, arm in found.items()}
    report.write_page(setting, 91.25, arms, ["Tersor"], three)
    assert "| +25.00 to +25.00 |" in (tmp_path / "structured-resnet20.md").read_text()


def row(name, accuracy, drop, ms, faster):
    def measured(value, spread):
        return Measurement(value, "", value - spread, value + spread, 9)

    speedup = None if faster is None else measured(faster, 0.1)
    return Row(
        name, 2.0, measured(accuracy, 0.005), measured(drop, 0.2), measured(drop, 0.2), measured(ms, 0.1), speedup
    )


def test_the_latency_page_names_the_fastest_that_loses_at_most_a_point(tmp_path, monkeypatch):
    for module in ("page", "latency_page"):
        monkeypatch.setattr(f"benchmarks.structured.{module}.DOCS", tmp_path)
    rows = [
        row("original", 0.93, 0, 9.0, None), row("0.25 of channels removed", 0.931, -0.1, 6.0, 1.5),
        row("0.5 of channels removed", 0.922, 0.8, 2.8, 3.2), row("0.75 of channels removed", 0.9, 3.0, 1.0, 9.0),
    ]  # fmt: skip
    write_page(rows, 4, 0.05, 32)
    text = (tmp_path / "structured-latency.md").read_text()
    assert "0.5 of channels removed, 3.20× faster, 0.80 points lost. The goal of 3× is reached." in text
    assert (tmp_path / "structured-latency.svg").read_text().count("<g id=") > 20
    write_page([*rows[:2], rows[3]], 4, 0.05, 32)
    assert "The goal of 3× is missed" in (tmp_path / "structured-latency.md").read_text()


def test_every_point_of_the_plot_has_its_label():
    rows = [row("original", 0.93, 0, 9.0, None), row("0.5 of channels removed", 0.92, 1, 3.0, 3.0)]
    texts = [text.get_text() for text in draw(rows, 32).axes[0].texts]
    assert {"original", "0.5"} <= set(texts)


def test_grouping_is_timed_on_networks_of_the_depth_that_is_said():
    pytest.importorskip("torch_pruning")
    from benchmarks.structured.grouping import measure, plain_residual

    model = plain_residual(10)
    assert sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in model.modules()) == 10
    found = measure(model)
    assert min(found.capture, found.grouping, found.graph, found.groups) > 0
    with pytest.raises(ValueError, match="even"):
        plain_residual(11)
