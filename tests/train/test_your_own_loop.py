"""The examples of docs/your-own-loop.md do what the page says."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.task import Task

PAGE = Path(__file__).parents[2] / "docs" / "your-own-loop.md"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 16, 3)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(x))).flatten(1))


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    inputs, map_ = torch.randn(128, 1, 6, 6), torch.randn(36, 3)
    batches = list(zip(inputs.split(16), (inputs.flatten(1) @ map_).argmax(1).split(16), strict=True))
    original = Net()
    return {"original": original.eval(), "task": Task(original, batches, batches, batches)}


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_bare_loop_keeps_zeros_learns_steps_and_lowers_the_loss(names):
    exec(blocks()[0], names)
    model, plan, losses = names["model"], names["plan"], names["losses"]
    masked = ~plan.edits[0].keep
    assert 0.4 < masked.float().mean() < 0.6 and (model.conv.weight[masked] == 0).all()
    for quantizer, before in (
        (model.conv.parametrizations.weight[1], plan.edits[1].scale),
        (model.tersor_taps.taps["relu_0"], plan.edits[2].scale),
    ):
        assert ((quantizer.scale / before - 1).abs() > 1e-3).any()
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    steps = model.conv.weight / model.conv.parametrizations.weight[1].scale.reshape(-1, 1, 1, 1)
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    x = torch.randn(4, 1, 6, 6)
    assert torch.allclose(names["again"](x), model(x), atol=1e-6)


def test_the_groups_of_the_page_are_what_an_optimiser_takes(names):
    exec(blocks()[0] + blocks()[1], names)
    optimizer = names["optimizer"]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01, 0.0}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(names["model"].parameters()))


def test_the_other_examples_compile():
    for block in blocks()[2:]:
        compile(block, str(PAGE), "exec")
