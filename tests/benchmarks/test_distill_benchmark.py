"""The distillation benchmark on small data: every arm runs, intervals decide the claims, a stopped run goes on."""

import time

import numpy as np
import pytest
import torch

from benchmarks import distill, tables
from benchmarks.distillation.arms import ALONE, ARMS, CACHED, KD, REPLAYED
from benchmarks.distillation.clock import BARE, LOOP, READ, TAUGHT, Ratio, in_turns
from benchmarks.distillation.page import claims
from benchmarks.distillation.tasks import VisionTransformer, student_of
from benchmarks.results import Finished
from tersor.core.metric import ACCURACY
from tersor.core.task import Task
from tersor.tensor.statistics import Estimate
from tersor.zoo.batches import TensorBatches, flip
from tersor.zoo.fashion import network


def small_task(seed, *_):
    torch.manual_seed(seed)
    images, targets = torch.randn(64, 1, 28, 28), torch.arange(64) % 10
    batches = TensorBatches(images, targets, 32)
    train = TensorBatches(images, targets, 32, shuffle=True, augment=flip)
    return Task(network().eval(), train, batches, batches, batches, metric=ACCURACY)


def test_it_runs_every_arm_goes_on_where_it_was_and_writes_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(distill, "teacher_task", small_task)
    monkeypatch.setattr(distill, "transformer", lambda *_: VisionTransformer().eval().requires_grad_(False))
    torch.manual_seed(0)
    run = ["bench", "--seeds", "1", "--epochs", "3", "--quiet", "--out", str(tmp_path / "out"), "--timed-images", "64"]
    monkeypatch.setattr("sys.argv", [*run, "--rounds", "6"])
    distill.main()
    lines = (tmp_path / "out" / "fashion.jsonl").read_text().splitlines()
    assert len(lines) == len(ARMS) and (tmp_path / "out" / "answers" / "0").is_dir()
    page = (tmp_path / "docs" / "distill.md").read_text()
    for name in (*(arm.name for arm in ARMS), LOOP, READ, TAUGHT):
        assert f"| {name} |" in page, name
    assert "Too few seeds to say: KD: above alone" in page and "claims hold" in capsys.readouterr().out
    monkeypatch.setattr(distill, "_finish", lambda *_: pytest.fail("it is in the log"))
    monkeypatch.setattr("sys.argv", [*run, "--rounds", "0", "--only", ALONE])
    torch.manual_seed(0)
    distill.main()


def arm(accuracies):
    rows = []
    for seed, accuracy in enumerate(accuracies):
        right = np.zeros(1000, dtype=bool)
        right[np.random.default_rng(seed).permutation(1000)[: int(10 * accuracy)]] = True
        rows.append(Finished(10.0, 0.0, 1.0, right))
    return rows


def test_claims_hold_or_are_missed_by_the_figures():
    alone = arm([80, 80.5, 79.5, 80, 80.2])
    better, same = arm([85, 85.4, 84.6, 85, 85.1]), arm([80.3, 80.2, 79.9, 79.8, 80.1])
    ratios = [Ratio(LOOP, BARE, Estimate(1.02, 1.0, 1.05)), Ratio(READ, LOOP, Estimate(1.2, 1.1, 1.3))]
    found = {ALONE: alone, KD: better, REPLAYED: better, CACHED: better}
    assert [claim.holds for claim in claims(found, ratios)] == [True, True, True, False]
    assert [claim.holds for claim in claims({**found, KD: same, CACHED: alone}, [])] == [False, False]
    assert [claim.holds for claim in claims({name: rows[:2] for name, rows in found.items()}, [])] == [None, None]


def test_turns_go_forth_and_back_and_the_first_does_not_count():
    order = []
    seconds = in_turns({"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.01))}, 2)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert len(seconds["a"]) == 2 and min(seconds["b"]) > max(seconds["a"])


def test_arms_of_a_seed_begin_with_the_same_weights():
    assert torch.equal(student_of(3).conv.weight, student_of(3).conv.weight)
    assert not torch.equal(student_of(3).conv.weight, student_of(4).conv.weight)
