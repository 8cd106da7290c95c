"""What users bring that cannot be quantised, on models that are not the project's: what is said, and where."""

import dataclasses

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.core.step import Pipeline
from tersor.core.task import Task
from tersor.quantize.adaround import AdaRound
from tersor.quantize.dynamic import QuantizeDynamically
from tersor.quantize.equalize import Equalize
from tersor.quantize.fold import FoldBatchNorm
from tersor.quantize.gptq import GPTQ
from tersor.quantize.quantize import Quantize
from tersor.quantize.ranges import MinMax
from tersor.quantize.schemes import Int
from tersor.quantize.weight_only import QuantizeWeights
from tersor.recipes.mixed_precision import MixedPrecision


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.gru, self.out = nn.Linear(6, 16), nn.GRU(16, 24, batch_first=True), nn.Linear(24, 3)

    def forward(self, x):
        return self.out(self.gru(torch.relu(self.enter(x)))[0][:, -1])


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        x = self.enter(x)
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Forked(nn.Module):
    """Two inputs, a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, 2)
        self.fc, self.head = nn.Linear(5, 8), nn.Linear(12, 4)

    def forward(self, image, numbers):
        image = self.up(torch.relu(self.conv(image))).mean((2, 3))
        return self.head(torch.cat([image, torch.relu(self.fc(numbers))], 1))


def task_of(model, *inputs):
    batches = [(*(value[n : n + 8] for value in inputs), torch.arange(8) % 3) for n in (0, 8)]
    return Task(model.eval(), batches, batches, batches, batches).complete()


def reasons(model, *inputs, method=None):
    plan = (method or Quantize()).plan(model, task_of(model, *inputs))
    return {skip.place: skip.reason for skip in plan.skips}, {str(place) for place in plan.places()}


def test_operators_of_several_results_are_listed_where_no_integer_kernel_takes_them():
    torch.manual_seed(0)
    skips, places = reasons(Recurrent(), torch.randn(16, 5, 6))
    assert skips["gru:gru[0]"].startswith("no integer kernel: gru")
    assert {"enter.weight", "out.weight"} <= places


def test_layers_inside_torchs_own_attention_stay_float_each_by_name():
    torch.manual_seed(0)
    skips, places = reasons(Attending(), torch.randn(16, 5, 6))
    assert {place for place in skips if place.startswith("attention:linear")} == {
        "attention:linear[0]", "attention:linear[1]",
    }  # fmt: skip
    assert {"enter.weight", "out.weight"} <= places and not any(place.startswith("attention.") for place in places)


def test_a_layer_that_stays_float_says_which_place_is_why():
    torch.manual_seed(0)
    model, image, numbers = Forked(), torch.randn(16, 3, 8, 8), torch.full((16, 5), 0.5)
    skips, places = reasons(model, image, numbers)
    constant = "<model>:input[1] is constant over the calibration batches (0.5 in every one of 2 calls)"
    assert skips["fc:linear[0]"].startswith(f"stays float: {constant}")
    assert skips["up"] == "no integer kernel: conv_transpose2d"
    assert "conv.weight" in places and "fc.weight" not in places


def test_a_parameter_that_is_not_finite_is_named_and_not_the_data_blamed():
    for path, tensor in (("fc", "weight"), ("conv", "bias")):
        model = Forked()
        with torch.no_grad():
            model.get_submodule(path).get_parameter(tensor).view(-1)[0] = float("nan")
        task = task_of(Forked(), torch.randn(16, 3, 8, 8), torch.randn(16, 5))
        with pytest.raises(InputError, match=rf"{path}.{tensor}: a weight that is not finite.*the network is broken"):
            Quantize().plan(model, task)


def test_a_calibration_batch_that_the_model_does_not_take_is_named():
    task = task_of(Forked(), torch.randn(16, 3, 8, 8), torch.randn(16, 5))
    grey = (torch.randn(4, 1, 8, 8), torch.randn(4, 5), torch.zeros(4, dtype=torch.long))
    broken = dataclasses.replace(task, calibration=[task.calibration[0], grey])
    with pytest.raises(InputError, match=r"task.calibration, batch 1: the model does not run.*3 channels, but got 1"):
        Quantize().plan(task.model, broken)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Quantize(weights=8), "Quantize.weights: wrong type. Got int 8; expected Int."),
        (lambda: Quantize(per_layer={"fc": 4}), r"Quantize.per_layer\['fc'\]: wrong type"),
        (lambda: Quantize(activation_range=MinMax), r"expected a Range \(.*Write MinMax\(…\)"),
        (lambda: Quantize(where="fc"), r"Write ByName\('fc'\)"),
        (lambda: Quantize(calibration_batches=1.5), "Quantize.calibration_batches: wrong type"),
        (lambda: QuantizeWeights(4), "QuantizeWeights.scheme: wrong type"),
        (lambda: GPTQ(4), "GPTQ.scheme: wrong type"),
        (lambda: AdaRound(4), "AdaRound.scheme: wrong type"),
        (lambda: Int(8, symmetric="yes"), "Int.symmetric: neither true nor false. Got 'yes'"),
        (lambda: MixedPrecision(bits=8), "MixedPrecision.bits: wrong type. Got int 8; expected a tuple of int"),
    ],
)
def test_settings_of_another_type_are_refused_when_they_are_given(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_a_size_that_no_widths_meet_is_refused_with_the_least_that_they_take():
    torch.manual_seed(0)
    model = Recurrent()
    task = task_of(model, torch.randn(16, 5, 6))
    # enter: 96 weights, 16 scales; out: 72 and 3; at 4 bits
    least = (96 + 72) // 2 + 4 * (16 + 3)
    said = rf"MixedPrecision.max_size: .*10 is asked, the least possible is {least}, in bytes"
    with pytest.raises(InputError, match=said):
        MixedPrecision(bits=(8, 4), max_size=10).plan(model, task)
    assert MixedPrecision(bits=(8, 4), max_size=least).plan(model, task).edits


def test_run_completes_the_task_and_plan_says_that_it_must_be():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)).eval()
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 3)]
    bare = Task(model, batches, batches, batches)
    quantised = Pipeline((FoldBatchNorm(), Quantize())).run(model, bare).model
    expected = Pipeline((FoldBatchNorm(), Quantize())).run(model, bare.complete()).model
    x = batches[0][0]
    assert bare.example_inputs is None and torch.equal(quantised(x), expected(x))
    for method in (FoldBatchNorm(), Quantize(), Equalize(), AdaRound(), QuantizeDynamically()):
        with pytest.raises(InputError, match=r"task 'task': the task has no .*Pass task.complete\(\)"):
            method.plan(model, bare)
