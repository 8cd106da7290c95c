"""Weights quantised first (GPTQ, AdaRound, to the nearest), activations after them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tersor
from tersor.core.apply import apply
from tersor.core.edit import Mask, Write
from tersor.core.errors import InputError
from tersor.core.integer_bias import rounded_bias
from tersor.core.place import ByName, TensorPlace
from tersor.core.plan import Plan
from tersor.core.step import Pipeline
from tersor.core.task import Task
from tersor.measure.bit_sensitivity import BitProbe, bit_sensitivity
from tersor.quantize.adaround import AdaRound
from tersor.quantize.fold import FoldBatchNorm
from tersor.quantize.gptq import GPTQ
from tersor.quantize.quantize import Quantize
from tersor.quantize.schemes import Int
from tersor.quantize.weight_only import QuantizeWeights
from tersor.recipes.mixed_precision import MixedPrecision
from tersor.zoo.batches import TensorBatches

LAYERS = ("stem", "inner", "fc")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.fc(F.relu(self.inner(x) + x).mean((2, 3)))


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    batches = TensorBatches(torch.randn(32, 3, 8, 8), torch.arange(32) % 4, 16)
    return Task(Net().eval(), batches, batches, batches).complete()


def weights(model):
    return {path: model.get_submodule(path).weight.detach().clone() for path in LAYERS}


@pytest.mark.parametrize(
    "method",
    [GPTQ(Int(8)), QuantizeWeights(Int(8, "per_tensor")), AdaRound(Int(4), steps=20, batches=2)],
    ids=["gptq", "per tensor", "adaround"],
)  # fmt: skip
def test_weights_that_are_quantised_stay_as_they_are_and_the_file_runs_in_integers(task, method, ship):
    alone = Pipeline((FoldBatchNorm(), method)).run(task.model, task)
    result = Quantize(learn=False).run(alone.model, task)
    before, after = weights(alone.model), weights(result.model)
    assert all(torch.equal(after[path], before[path]) for path in LAYERS)
    said = dict(result.plans[0].lines)["weights"]
    assert said == "3 stay on the grid that they had: stem.weight, inner.weight, fc.weight"
    file, x = ship(result.model, task.calibration.images[:1]), task.calibration.images
    assert file.histogram["QLinearConv"] == 2 and file.histogram["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & file.histogram.keys()
    with torch.no_grad():
        ours, theirs = result.model(x), torch.cat([file(row[None]) for row in x])
    assert (ours - theirs).abs().max() < 0.02 * ours.abs().max()


def test_biases_lie_on_the_steps_of_the_grids_that_stand(task):
    alone = Pipeline((FoldBatchNorm(), GPTQ(Int(8)))).run(task.model, task).model
    model = Quantize(learn=False).run(alone, task).model
    for path in LAYERS:
        bias = model.get_submodule(path).bias.detach()
        assert torch.equal(bias, rounded_bias(model, path))
        assert not torch.equal(bias, alone.get_submodule(path).bias) and torch.allclose(
            bias, alone.get_submodule(path).bias, atol=1e-3
        )


def test_a_weight_in_groups_stays_weights_alone_and_the_rest_is_quantised(task):
    folded = FoldBatchNorm().run(task.model, task).model
    grouped = QuantizeWeights(Int(4, group_size=8), where=ByName("fc")).run(folded, task).model
    plan = Quantize().plan(grouped, task)
    reason = "stays weights alone: its weights have groups of 8, which no integer kernel takes"
    assert [skip.reason for skip in plan.skips if skip.place == "fc"] == [reason]
    assert "weights" not in dict(plan.lines)
    assert {str(place) for place in plan.places()} >= {"stem.weight", "inner.weight"}
    assert "fc.weight" not in {str(place) for place in plan.places()}


def test_only_a_channel_whose_bias_would_not_fit_is_put_on_a_wider_grid(task):
    folded = FoldBatchNorm().run(task.model, task).model
    weight = folded.inner.weight.detach().clone()
    weight[0] *= 1e-7
    weight[1] = 0
    bias = torch.full((16,), 0.5)
    place = TensorPlace("inner", "weight")
    plan = Plan("by hand", (Write(place, weight), Mask(place, weight != 0), Write(TensorPlace("inner", "bias"), bias)))
    alone = QuantizeWeights().run(apply(folded, plan), task).model
    model = Quantize(learn=False).run(alone, task).model
    old, new = (each.inner.parametrizations.weight[1].scale for each in (alone, model))
    assert new[0] > old[0] and new[1] > old[1] and torch.equal(new[2:], old[2:])
    assert torch.equal(model.inner.weight[1:], alone.inner.weight[1:]) and not model.inner.weight[1].any()
    reads = model.inner.parametrizations.weight[1].reads
    step = float(model.get_submodule(f"tersor_taps.taps.{reads.operator}_{reads.ordinal}").scale) * new
    assert float((0.5 / step).max()) < 2**29


def test_the_artifact_brings_the_model_back(task, tmp_path):
    result = Pipeline((FoldBatchNorm(), GPTQ(Int(4)), Quantize(learn=False))).run(task.model, task)
    tersor.save(tmp_path, result.model, original=task.model, plans=result.plans)
    loaded, x = tersor.load(tmp_path, model=Net()), task.calibration.images
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))
    entries = list(loaded.inner.parametrizations.weight)
    assert len(entries) == 1 and entries[0].reads is not None


def test_what_cannot_be_built_upon_is_refused_with_what_to_do(task):
    nearest = QuantizeWeights().run(FoldBatchNorm().run(task.model, task).model, task).model
    with pytest.raises(InputError, match=r"quantised already, and keep their grid.*Leave 'fc' out of per_layer"):
        Quantize(per_layer={"f*": Int(4)}).plan(nearest, task)
    plan = Quantize(per_layer={"fc": None}).plan(nearest, task)
    assert [s.reason for s in plan.skips if s.place == "fc"] == ["its activations stay float: per_layer says so"]
    late = QuantizeWeights().run(task.model, task).model
    with pytest.raises(InputError, match=r"norm:batch_norm\[0\]: .*Put FoldBatchNorm\(\) first, before the weights"):
        Quantize().plan(late, task)
    with pytest.raises(InputError, match="the model is quantised already"):
        Quantize().plan(Quantize().run(nearest, task).model, task)
    for measure in (
        lambda: bit_sensitivity(nearest, task, BitProbe((8,))),
        lambda: MixedPrecision().plan(nearest, task),
    ):
        with pytest.raises(InputError, match="weights are quantised already"):
            measure()
