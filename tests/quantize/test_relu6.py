import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.core.place import ByName
from tersor.core.task import Task
from tersor.quantize.equalize import Equalize
from tersor.quantize.relu6 import ReplaceReLU6
from tersor.zoo.batches import TensorBatches


@pytest.fixture
def task():
    torch.manual_seed(0)
    clip = nn.ReLU6(inplace=True)
    model = nn.Sequential(
        nn.Linear(6, 8), clip, nn.Linear(8, 8), clip, nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 4)
    ).eval()
    with torch.no_grad():
        model[4].weight *= 60
    batches = TensorBatches(torch.randn(32, 6), torch.arange(32) % 4, 16)
    return Task(model, batches, batches, batches).complete()


def test_a_relu6_that_clips_nothing_becomes_a_relu_wherever_it_is_called(task):
    result = ReplaceReLU6().run(task.model, task)
    kinds = [type(result.model[n]).__name__ for n in (1, 3, 5)]
    assert kinds == ["ReLU", "ReLU", "ReLU6"] and [type(task.model[n]) for n in (1, 3)] == [nn.ReLU6] * 2
    x = task.calibration.images
    assert torch.equal(result.model(x), task.model(x))
    assert len(Equalize().plan(result.model, task).lines) == 2 and not Equalize().plan(task.model, task).lines


def test_one_that_clips_more_than_the_share_given_is_a_skip_with_its_share(task):
    x = task.calibration.images
    inner = task.model[:5](x)
    share = float((inner >= 6).float().mean())
    (skip,) = ReplaceReLU6().plan(task.model, task).skips
    assert share > 0.1 and skip.place == "5" and f"it clips {share:.2%} of its values" in skip.reason
    assert not ReplaceReLU6(most=0.9).plan(task.model, task).skips


def test_only_the_modules_meant_are_replaced_and_none_is_said(task):
    assert [edit.module for edit in ReplaceReLU6(most=1, where=ByName("5")).plan(task.model, task).edits] == ["5"]
    plan = ReplaceReLU6(where=ByName("0")).plan(task.model, task)
    assert not plan.edits and "no ReLU6 modules" in plan.skips[0].reason


def test_settings_out_of_range_are_refused():
    for wrong in ({"most": 1.5}, {"batches": 0}):
        with pytest.raises(InputError, match="ReplaceReLU6"):
            ReplaceReLU6(**wrong)
