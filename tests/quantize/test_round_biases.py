"""Biases on the grid on which integer kernels add them."""

import pytest
import torch
from torch import nn

from tersor.core.apply import apply
from tersor.core.edit import edit_from_json, edit_to_json
from tersor.core.errors import InputError
from tersor.core.task import Task
from tersor.quantize.quantize import Quantize
from tersor.quantize.round_biases import RoundBiases


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.twice = nn.Conv2d(2, 5, 3), nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        x = torch.relu(self.fc(torch.relu(self.conv(x)).mean((2, 3))))
        return self.twice(3 * torch.sigmoid(self.twice(x)) - 1)


def task_of(model):
    torch.manual_seed(1)
    data = [(torch.randn(32, 2, 6, 6), torch.arange(32) % 5)]
    return Task(model, data, data, data).complete()


@pytest.fixture
def quantised():
    torch.manual_seed(0)
    model = Net().eval()
    return model, apply(model, Quantize().plan(model, task_of(model))).eval()


def steps(model, layer, tap):
    """scale of what the layer reads · scale of its weight [outputs]"""
    weight = model.get_submodule(f"{layer}.parametrizations.weight.0").scale
    return (model.tersor_taps.taps[tap].scale * weight).detach().double()


def off_grid(bias, step):
    ratio = bias.detach().double() / step
    return float((ratio - ratio.round()).abs().max())


def test_quantize_rounds_each_bias_to_steps_of_the_products(quantised):
    before, model = quantised
    for layer, tap in (("conv", "input_0"), ("fc", "mean_0")):
        step, was = steps(model, layer, tap), before.get_submodule(layer).bias.double()
        got = model.get_submodule(layer).bias.double()
        assert off_grid(was, step) > 0.1 > 0.02 > off_grid(got, step)
        assert ((got - was).abs() <= 0.501 * step).all()


def test_a_bias_that_is_added_on_two_grids_stays(quantised):
    before, model = quantised
    assert torch.equal(model.twice.bias, before.twice.bias)
    assert "twice.bias" not in dict(RoundBiases().plan(model, task_of(model)).lines)


def test_biases_that_training_moved_are_put_back(quantised):
    _, model = quantised
    with torch.no_grad():
        model.conv.bias.add_(0.1234)
        model.tersor_taps.taps["mean_0"].log_growth.add_(0.3)
    plan = RoundBiases().plan(model, task_of(model))
    assert [str(edit.place) for edit in plan.edits] == ["conv.bias", "fc.bias"]
    rounded = apply(model, plan)
    for layer, tap in (("conv", "input_0"), ("fc", "mean_0")):
        step = steps(model, layer, tap)
        assert off_grid(model.get_submodule(layer).bias, step) > 0.1
        assert off_grid(rounded.get_submodule(layer).bias, step) < 0.02


def test_the_edit_keeps_what_its_weight_reads(quantised):
    before, _ = quantised
    edits = Quantize().plan(before, task_of(before)).edits
    edit = next(edit for edit in edits if str(edit.places[0]) == "fc.weight")
    again = edit_from_json(edit_to_json(edit, "0", {}), {})
    assert again.reads == edit.reads and str(edit.reads) == "<model>:mean[0]"
    data = edit_to_json(edit, "0", {})
    del data["reads"]
    assert edit_from_json(data, {}).reads is None  # an artifact of before


def test_a_model_that_is_not_quantised_is_refused():
    model = Net().eval()
    with pytest.raises(InputError, match="no weight is quantised"):
        RoundBiases().plan(model, task_of(model))
