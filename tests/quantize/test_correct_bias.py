import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.errors import InputError
from tersor.core.place import ByName
from tersor.core.task import Task
from tersor.quantize.correct_bias import CorrectBias
from tersor.quantize.quantize import Quantize
from tersor.quantize.schemes import Int
from tersor.quantize.unquantized import quantizers, without_quantizers
from tersor.quantize.weight_only import QuantizeWeights
from tersor.zoo.batches import TensorBatches


class Net(nn.Module):
    """A depthwise convolution without a bias between two with one, and a head."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.c, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.head(F.relu(self.c(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    batches = TensorBatches(torch.rand(48, 3, 8, 8), torch.arange(48) % 4, 16)
    return Task(Net().eval(), batches, batches, batches).complete()


@pytest.fixture(scope="module")
def quantised(task):
    return Quantize(weights=Int(4), learn=False).run(task.model, task).model


def means(model, path, task):
    """A loop's mean of each channel of what the layer gives."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _x, y: seen.append(y.detach()))
    with torch.no_grad():
        for images, _ in task.calibration:
            model(images)
    handle.remove()
    y = torch.cat(seen)
    return y.mean([d for d in range(y.ndim) if d != 1])


def test_every_layer_gets_back_its_mean_in_float(task, quantised):
    result = CorrectBias().run(quantised, task)
    for path in ("a", "b", "c"):  # what the head gives lies on a grid of its own
        before, after = (means(model, path, task) for model in (quantised, result.model))
        goal = means(task.model, path, task)
        assert (before - goal).abs().max() > 2e-3  # a grid of four bits moves it
        assert (after - goal).abs().max() < 0.3 * (before - goal).abs().max()
    assert {edit.place.tensor for edit in result.plans[0].edits} == {"bias"} and len(result.plans[0].edits) == 4


def test_weights_alone_are_corrected_exactly_and_outputs_come_nearer(task):
    quantised = QuantizeWeights(Int(3)).run(task.model, task).model
    corrected = CorrectBias().run(quantised, task).model
    for path in ("a", "b", "c", "head"):
        assert torch.allclose(means(corrected, path, task), means(task.model, path, task), atol=1e-6)
    x = task.calibration.images
    with torch.no_grad():
        errors = [float((model(x) - task.model(x)).square().mean()) for model in (quantised, corrected)]
    assert errors[1] < 0.3 * errors[0]


def test_weights_and_grids_stay(task, quantised):
    corrected = CorrectBias().run(quantised, task).model
    old, new = quantised.state_dict(), corrected.state_dict()
    assert {key for key in new if key not in old or not torch.equal(old[key], new[key])} == {
        "a.bias", "b.bias", "c.bias", "head.bias",
    }  # fmt: skip
    assert quantised.b.bias is None and corrected.b.bias is not None


def test_only_the_layers_meant_are_corrected(task, quantised):
    plan = CorrectBias(where=ByName("b")).plan(quantised, task)
    assert [str(edit.place) for edit in plan.edits] == ["b.bias"]


def test_a_layer_in_front_of_which_nothing_is_quantised_is_a_skip(task):
    quantised = QuantizeWeights(Int(4), where=ByName("c")).run(task.model, task).model
    plan = CorrectBias().plan(quantised, task)
    assert [str(edit.place) for edit in plan.edits] == ["c.bias"]  # and then the head has nothing left to correct
    assert {skip.place for skip in plan.skips} >= {"a", "b"} and "same without quantisers" in plan.skips[0].reason


def test_a_model_without_quantisers_is_refused(task):
    with pytest.raises(InputError, match="no quantisers.*its skips say why nothing is quantised"):
        CorrectBias().plan(task.model, task)


def test_calibration_data_is_needed(task, quantised):
    with pytest.raises(InputError, match="no calibration data"):
        CorrectBias().plan(quantised, Task(quantised, example_inputs=task.example_inputs))
    with pytest.raises(InputError, match="CorrectBias.batches"):
        CorrectBias(batches=0)


def test_the_model_without_its_quantisers_is_the_model_before_with_its_biases_on_their_grids(task, quantised):
    x, before = task.calibration.images, copy.deepcopy(task.model)
    for path in ("a", "c", "head"):
        bias = before.get_submodule(path).bias.data
        rounded = quantised.get_submodule(path).bias.data
        assert 0 < (rounded - bias).abs().max() < 1e-3
        bias.copy_(rounded)
    bare = without_quantizers(quantised)
    with torch.no_grad():
        assert torch.equal(bare(x), before(x)) and not torch.equal(quantised(x), before(x))
    assert not quantizers(bare) and len(quantizers(quantised)) >= 8
