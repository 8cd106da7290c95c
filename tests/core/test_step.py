from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from tersor.core.edit import Cut, Slice, Write
from tersor.core.errors import VerificationError
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan, Skip
from tersor.core.progress import Progress
from tersor.core.step import Context, Method, Pipeline, Result, Step, derive_seed
from tersor.core.task import Task


class Heard(Progress):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


@dataclass(frozen=True)
class SetBias(Method):
    value: float

    def plan(self, model, task):
        return Plan("set_bias", (Write(TensorPlace("0", "bias"), torch.full((3,), self.value)),))


@dataclass(frozen=True)
class Note(Step):
    def run(self, model, task, context=None):
        facts = {f"seed {context.seed}": str(context.folder)}
        return Result(model, history=({"epoch": 0, "bias": model[0].bias[0].item()},), facts=facts)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


@pytest.fixture
def task(model):
    data = [(torch.randn(6, 4), torch.arange(6) % 2)]
    return Task(model, data, data, data).complete()


def test_run_applies_the_plan_to_a_copy(model, task):
    before = model[0].bias.clone()
    result = SetBias(5.0).run(model, task)
    assert result.model[0].bias.tolist() == [5.0] * 3 and torch.equal(model[0].bias, before)
    assert [plan.method for plan in result.plans] == ["set_bias"] and result.facts == {}


def test_a_plan_without_edits_is_said(model, task):
    @dataclass(frozen=True)
    class Idle(Method):
        def plan(self, model, task):
            return Plan("idle", (), (Skip("0", "too small"), Skip("2", "too small")))

    heard = Heard()
    Idle().run(model, task, Context(progress=heard))
    assert heard.said == ["warning: idle found nothing to do (2 skipped)"]


def remove(consumer):
    @dataclass(frozen=True)
    class Remove(Method):
        def plan(self, model, task):
            kept = torch.tensor([0, 2])
            cuts = [Cut(TensorPlace("0", name), 0, kept, "producer") for name in ("weight", "bias")]
            return Plan(
                "remove", (Slice((*cuts, Cut(TensorPlace("2", "weight"), 1, torch.tensor(consumer), "consumer"))),)
            )

    return Remove()


def test_removed_channels_are_verified_and_the_difference_noted(model, task):
    result = remove([0, 2]).run(model, task)
    assert 0 <= result.facts["verified"] < 1e-6 and result.model[0].weight.shape == (2, 4)
    with pytest.raises(VerificationError):
        remove([0, 1]).run(model, task)


def test_a_pipeline_hands_the_model_on_and_collects_everything(model, task):
    context = Context(seed=7, folder=Path("runs/x"))
    result = Pipeline((SetBias(1.0), Note(), SetBias(2.0), Note())).run(model, task, context)
    assert result.model[0].bias.tolist() == [2.0] * 3
    assert [plan.method for plan in result.plans] == ["set_bias", "set_bias"]
    assert [entry["bias"] for entry in result.history] == [1.0, 2.0]
    assert result.facts == {
        f"seed {derive_seed(7, 1)}": "runs/x/01-Note",
        f"seed {derive_seed(7, 3)}": "runs/x/03-Note",
    }


def test_derived_seeds_depend_on_every_part_and_never_change():
    seeds = {derive_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(0, 1) == 868570902


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ((torch.randn(4), torch.tensor(0)) for _ in range(8))


def test_a_calibration_loader_without_a_length_is_fine():
    class Looks(Method):
        def plan(self, model, task):
            return Plan("looks", lines=((str(next(iter(task.calibration))[0].sum().item()), "seen"),))

    loader = torch.utils.data.DataLoader(Endless(), 4)
    task = Task(nn.Linear(4, 2), train=loader, validation=loader, test=loader).complete()
    first, second = (Looks().run(task.model, task, Context(seed=3)).plans[0].lines for _ in range(2))
    assert first == second
