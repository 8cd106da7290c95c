"""The sparsity benchmark on a small network: arms have the zeros they say, and intervals decide the claims."""

import numpy as np
import pytest
import torch

from benchmarks import sparsity, tables
from benchmarks.results import Finished
from benchmarks.sparse import arms as arms_module
from benchmarks.sparse.arms import DENSE, RECOVERED, SPARSITIES, arms, weights_per_nonzero
from benchmarks.sparse.page import claims, section
from tersor.core.metric import ACCURACY
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.train.finetune import Finetune
from tersor.zoo.batches import TensorBatches
from tersor.zoo.residual import ResidualNet


def layers_of(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}


def small_task(seed=0):
    torch.manual_seed(seed)
    images, targets = torch.randn(48, 4, 6, 6), torch.arange(48) % 8
    images += targets[:, None, None, None]
    batches = TensorBatches(images, targets, 32)
    train = TensorBatches(images, targets, 32, shuffle=True)
    model = ResidualNet((8, 16), 1, in_channels=4, classes=8).eval()
    for layer in layers_of(model).values():
        torch.nn.init.normal_(layer.weight, std=0.1)  # of one scale, so that no layer is emptied where all compete
    return Task(model, train, batches, batches, batches, metric=ACCURACY).complete()


def test_every_arm_has_the_zeros_that_it_says_and_leaves_the_original():
    task = small_task()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    names = set()
    for arm in arms(Finetune(1), thorough=True):
        if arm.sparsity not in (None, 0.8) or (arm.trains and arm.family != DENSE):
            continue
        names.add(arm.family)
        model = arm.step.run(task.model, task, Context()).model
        zeros = 1 - 1 / weights_per_nonzero(model)
        wanted = {"2:4": 0.5, "ori": 0.0, "den": 0.0}.get(arm.family[:3], arm.sparsity)
        assert zeros == pytest.approx(wanted, abs=0.05), arm.family
    assert {"one shot + repair, global", "SparseGPT + repair, layer", "torch.nn.utils.prune, global"} <= names
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_by_magnitude_the_peer_zeroes_the_same_weights_up_to_rounding_of_the_count():
    task = small_task()
    made = {arm.family: arm for arm in arms(Finetune(1), thorough=False) if arm.sparsity == 0.9}
    for scope in ("layer", "global"):
        families = f"one shot, {scope}", f"torch.nn.utils.prune, {scope}"
        ours, theirs = (layers_of(made[name].step.run(task.model, task).model) for name in families)
        differ = sum(int(((ours[path].weight == 0) != (theirs[path].weight == 0)).sum()) for path in ours)
        assert differ <= len(ours)


def finished(right):
    return Finished(10.0, 1.0, 0.0, np.asarray(right, dtype=bool))


def found_with(dense, recovered, repaired, plain, seeds=5):
    """Accuracies in per cent of 1,000 images."""

    def arm(accuracy):
        rng = np.random.default_rng(int(accuracy * 7))
        rows = []
        for seed in range(seeds):
            right = np.zeros(1000, dtype=bool)
            right[rng.permutation(1000)[: int(10 * accuracy) + seed]] = True
            rows.append(finished(right))
        return rows

    return {
        (DENSE, None): arm(dense), (RECOVERED, 0.9): arm(recovered),
        ("one shot + repair, layer", 0.9): arm(repaired), ("one shot, layer", 0.9): arm(plain),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("accuracies", "holds"),
    [((90, 89.5, 80, 40), [True, True]), ((90, 88.5, 80, 40), [False, True]), ((90, 89.5, 40, 40.1), [True, False])],
)
def test_claims_hold_or_are_missed_by_the_figures(accuracies, holds):
    assert [claim.holds for claim in claims(found_with(*accuracies))] == holds


def test_too_few_seeds_are_said_and_the_page_has_every_arm_and_difference():
    found = found_with(90, 89.5, 80, 40, seeds=2)
    assert [claim.holds for claim in claims(found)] == [True, None]
    text = section("Net", "How.", found_with(90, 88.5, 80, 40))
    assert "**Missed**: 90 % zeros, SparseGPT, global, then trained" in text and "Holds: 90 % zeros, one shot" in text
    assert "| one shot + repair, layer |  | 80.20 (80.00–80.40); 90.0 % zeros, 1 s |  |" in text
    assert f"| 90 % | {RECOVERED} | {DENSE} | -1.50 |" in text
    assert "| 90 % | one shot + repair, layer | one shot, layer | +40.00 |" in text


def test_a_run_that_was_stopped_goes_on_and_writes_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(sparsity, "fashion_task", lambda seed, *_: small_task(seed))
    run = ["bench", "--models", "fashion", "--epochs", "1", "--quiet", "--out", str(tmp_path / "out")]
    only = ["--only", "original", "one shot, layer", "one shot + repair, layer"]
    monkeypatch.setattr("sys.argv", [*run, *only, "--seeds", "1"])
    sparsity.main()
    assert len((tmp_path / "out" / "fashion.jsonl").read_text().splitlines()) == 1 + 2 * len(SPARSITIES)
    monkeypatch.setattr(arms_module.Nothing, "run", lambda *_: pytest.fail("it is in the log"))
    monkeypatch.setattr("sys.argv", [*run, *only[:2], "--seeds", "1"])
    sparsity.main()
    assert "# Sparsity" in (tmp_path / "docs" / "sparsity.md").read_text() and "claims hold" in capsys.readouterr().out
