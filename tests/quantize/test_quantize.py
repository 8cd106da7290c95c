import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Mask, Quantizer
from tersor.core.errors import InputError
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.intercept import Intercept
from tersor.core.place import ActivationPlace, ByName, ByType, TensorPlace
from tersor.core.plan import Plan, Skip
from tersor.core.task import Task
from tersor.quantize.fold import FoldBatchNorm
from tersor.quantize.quantize import Quantize
from tersor.quantize.ranges import MinMax, MovingAverage
from tersor.quantize.schemes import Int


class Block(nn.Module):
    """A residual block whose ReLU works in place, is called twice, and follows ``out += x``."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class Residual(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.first, self.pool, self.second = Block(width), nn.MaxPool2d(2), Block(width)
        self.drop, self.fc = nn.Dropout(0.1), nn.Linear(width * 16, 10)

    def forward(self, x):
        x = self.second(self.pool(self.first(self.stem(x))))
        return self.fc(self.drop(torch.flatten(x, 1)))


class Gated(nn.Module):
    """Depthwise convolution, hardswish and a squeeze-and-excitation gate, all functional."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.fc = nn.Conv2d(16, 8, 1), nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu6(self.stem(x))
        x = F.hardswish(self.depthwise(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.fc(F.avg_pool2d(self.project(x * gate), 8).flatten(1))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 4, 1), nn.Conv2d(12, 4, 3)
        self.fc = nn.Linear(4 * 9, 10)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = torch.cat([F.relu(self.b(x)), F.max_pool2d(self.c(x).clamp_min(0), 3, 1, 1)], 1)
        return self.fc(F.max_pool2d(self.d(x), 2).flatten(1))


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(32, 16, bias=False), nn.Linear(16, 10)

    def forward(self, x):
        return self.c(F.gelu(self.b(torch.relu(self.a(x.flatten(1))))))


class Halves(nn.Module):
    """Chunks give tuples, which no tap can replace: the second half is caught at the convolution's input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x):
        left, right = F.relu(self.a(x)).chunk(2, 1)
        return self.fc(torch.cat([left, F.relu(self.b(right))], 1).mean((2, 3)))


def awake(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.normal_()
            module.running_var.uniform_(0.3, 2)
    return model.eval()


def task_of(model, batches=3):
    torch.manual_seed(0)
    data = [(torch.randn(16, 1, 8, 8), torch.zeros(16, dtype=torch.long)) for _ in range(batches)]
    return Task(model, calibration=data, example_inputs=(torch.randn(3, 1, 8, 8),))


def quantized(make, **fields):
    torch.manual_seed(0)
    model = awake(make())
    task = task_of(model)
    model = FoldBatchNorm().run(model, task).model
    result = Quantize(**fields).run(model, task)
    return model, result.model.eval(), result.plans[0]


def shared_places(plan):
    return [tuple(map(str, edit.places)) for edit in plan.edits if isinstance(edit, Quantizer) and edit.axis is None]


INTEGER = {
    Residual: {"QLinearConv": 5, "QLinearAdd": 2, "QGemm": 1, "QuantizeLinear": 1, "DequantizeLinear": 1},
    Gated: {"QLinearConv": 5, "QLinearAveragePool": 1, "QGemm": 1, "Clip": 0},
    Branches: {"QLinearConv": 4, "QLinearConcat": 1, "QGemm": 1, "QuantizeLinear": 1, "DequantizeLinear": 1},
    Perceptron: {"QGemm": 3, "Gelu": 1},
    Halves: {"QLinearConv": 2, "QGemm": 1},
}


@pytest.mark.parametrize("make", INTEGER)
def test_onnx_runtime_computes_in_integers_and_agrees(make, deploy):
    model, quantised, _ = quantized(make)
    deployed = deploy(quantised, torch.randn(3, 1, 8, 8))
    expected = INTEGER[make]
    assert {name: deployed.histogram[name] for name in expected} == expected
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Relu"} & set(deployed.histogram)
    x = torch.randn(200, 1, 8, 8)
    with torch.no_grad():
        ours, theirs, exact = quantised(x), deployed(x), model(x)
    last = quantised.c if make is Perceptron else quantised.fc
    taps = [module for module in last.modules() if isinstance(module, Intercept)]
    step = taps[0].taps["linear_0"].scale.detach()
    assert (ours - theirs).abs().max() <= 2.01 * step  # a tie upstream moves a logit by a step, seldom by two
    assert ((ours - theirs).abs() > 0.5 * step).float().mean() < 0.1
    assert (theirs - exact).square().mean() < 0.02 * exact.square().mean()


def test_relu_after_a_convolution_or_an_addition_is_absorbed_and_a_maximum_needs_no_quantiser():
    _, _, plan = quantized(Residual)
    places = {place for group in shared_places(plan) for place in group}
    assert {"<model>:input[0]", "stem.2:relu[0]", "first.relu:relu[0]", "first.relu:relu[1]"} <= places
    assert {"first.conv2:conv2d[0]", "fc:linear[0]"} <= places
    assert not places & {"stem.0:conv2d[0]", "first.conv1:conv2d[0]", "first:add[0]", "pool:max_pool2d[0]"}
    assert not plan.skips
    absorbed = [e for e in plan.edits if "relu" in str(e.places[0])]
    assert absorbed and all(int(edit.zero_point) == 0 for edit in absorbed)


def test_a_concatenation_shares_one_quantiser_with_what_it_alone_reads():
    _, _, plan = quantized(Branches)
    assert ("<model>:relu[1]", "<model>:clamp_min[0]", "<model>:cat[0]") in shared_places(plan)


def test_operators_without_an_integer_kernel_are_named():
    _, _, plan = quantized(Gated)
    reasons = {skip.place: skip.reason for skip in plan.skips}
    assert reasons["<model>:hardswish[0]"].startswith("no integer kernel: hardswish; called as a function")
    assert "<model>:hardsigmoid[0]" not in reasons
    assert "stays float" in reasons["<model>:mul[0]"]


def test_a_clamp_keeps_its_upper_end_and_its_step_is_not_learnt():
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.fc = nn.Conv2d(1, 4, 3), nn.ReLU6(), nn.Linear(144, 10)
            self.a.weight.data *= 50

        def forward(self, x):
            return self.fc(self.act(self.a(x)).flatten(1))

    _, _, plan = quantized(Clamped, activation_range=MinMax())
    edit = next(e for e in plan.edits if e.places == (ActivationPlace("act", "hardtanh"),))
    assert not edit.learn and 5.99 < float(edit.scale) * 255 <= 6


def test_weights_take_absmax_over_127_for_each_output_channel():
    model, _, plan = quantized(Residual)
    edit = next(e for e in plan.edits if e.places == (TensorPlace("stem.0", "weight"),))
    expected = model.stem[0].weight.detach().abs().amax(dim=(1, 2, 3)) / 127
    assert torch.allclose(edit.scale, expected) and edit.axis == 0 and edit.learn
    assert (edit.quant_min, edit.quant_max) == (-128, 127) and not edit.zero_point.any()


def test_dead_channels_and_large_biases_get_steps_that_32_bit_biases_can_hold():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[1].weight[0] = 0
        model[1].weight[1] *= 1e-7
        model[1].bias[:2] = 3.0
        model[3].weight.zero_()
    plan = Quantize().plan(model, task_of(model))
    scales = {str(place): edit.scale for edit in plan.edits for place in edit.places}
    weight = scales["1.weight"]
    assert weight[0] == pytest.approx(float(weight[1:].mean()), rel=1)
    assert (model[1].bias.abs() / (weight * scales["<model>:input[0]"]) < 2**31 / 100).all()
    assert (scales["3.weight"] > 0).all() and torch.isfinite(1 / scales["3.weight"]).all()


def test_masks_stay_zero_under_the_quantiser():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    keep = torch.rand(8, 64) > 0.5
    model = apply(model, Plan("mask", (Mask(TensorPlace("1", "weight"), keep),)))
    quantised = Quantize().run(model, task_of(model)).model
    assert (quantised[1].weight[~keep] == 0).all() and (quantised[1].weight[keep] != 0).any()
    assert not torch.equal(quantised[1].weight, model[1].weight)


def test_where_says_which_layers_run_in_integers():
    _, quantised, plan = quantized(Residual, where=~ByName("second.*") & (ByType("Conv2d") | ByType("Linear")))
    weights = {str(place) for edit in plan.edits for place in edit.places if isinstance(place, TensorPlace)}
    assert weights == {"stem.0.weight", "first.conv1.weight", "first.conv2.weight", "fc.weight"}
    assert {"second.conv1", "second.conv2"} <= {skip.place for skip in plan.skips if skip.reason == "left out by where"}
    assert not any(isinstance(module, FakeQuantize) for module in quantised.second.conv1.modules())


def test_planning_leaves_the_model_alone():
    torch.manual_seed(0)
    model = Gated().train()
    before = copy.deepcopy(model.state_dict())
    Quantize().plan(model, task_of(model))
    assert model.training and not any(isinstance(module, (Intercept, FakeQuantize)) for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_place_that_the_running_model_does_not_bear_out_is_left_float_by_name():
    class Shifty(Perceptron):
        def forward(self, x):
            if not torch.compiler.is_exporting():
                x = torch.relu(x) + x - torch.relu(x)  # two calls of relu that the graph does not have
            return super().forward(x)

    torch.manual_seed(0)
    model = Shifty()
    plan = Quantize().plan(model, task_of(model))
    reasons = {skip.place: skip.reason for skip in plan.skips}
    assert "1 relu calls in the graph, 3 at run time" in reasons["<model>:relu[0]"]
    assert "cannot be intercepted" in reasons["a:linear[0]"]
    weights = {str(place) for edit in plan.edits for place in edit.places if isinstance(place, TensorPlace)}
    assert weights == {"b.weight", "c.weight"} - ({"b.weight"} if "b:linear[0]" in reasons else set())


def test_wrong_models_and_data_are_refused_with_what_to_do():
    torch.manual_seed(0)
    model = awake(Residual())
    with pytest.raises(InputError, match=r"fold batch norm first.*FoldBatchNorm"):
        Quantize().plan(model, task_of(model))
    _, quantised, _ = quantized(Perceptron)
    with pytest.raises(InputError, match="quantised already"):
        Quantize().plan(quantised, task_of(quantised))
    plain = Perceptron()
    task = task_of(plain)
    task.calibration[1][0][0] = float("inf")
    with pytest.raises(InputError, match=r"input\[0\].*not finite"):
        Quantize().plan(plain, task)
    with pytest.raises(InputError, match=r"one scale each.*Int\(8"):
        Quantize(activations=Int(8))
    for wrong in (dict(weights=Int(16)), dict(per_layer={"fc": Int(16)})):
        with pytest.raises(InputError, match=r"too wide for weights.*2 to 8 bits"):
            Quantize(**wrong)
    for bits in (1, 9, 4.0):
        with pytest.raises(InputError, match=r"Int.bits.*whole number from 2 to 8"):
            Int(bits)
    with pytest.raises(InputError, match="matches no module"):
        Quantize(where=ByName("nothing")).plan(Perceptron(), task_of(plain))


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_a_constant_activation_stays_float_by_name_and_the_rest_is_quantised(constant, deploy):
    torch.manual_seed(0)
    dead, between = nn.Linear(8, 8), [nn.ReLU(), nn.Linear(8, 6), nn.ReLU()]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), dead, *between, nn.Linear(6, 3)).eval()
    with torch.no_grad():
        dead.weight.zero_()
        dead.bias.fill_(constant or -1)
    task = task_of(model)
    result = Quantize().run(model, task)
    reasons = {skip.place: skip.reason for skip in result.plans[0].skips}
    assert f"constant over the calibration batches ({constant:g} in every one of 3 calls)" in reasons["4:relu[0]"]
    assert "stays float" in reasons["3:linear[0]"] and "stays float" in reasons["5:linear[0]"]
    places = {str(place) for edit in result.plans[0].edits for place in edit.places}
    assert {"1.weight", "7.weight"} <= places and not {"3.weight", "5.weight"} & places
    x = torch.randn(20, 1, 8, 8)
    deployed = deploy(result.model.eval(), x)
    assert torch.allclose(deployed(x), result.model(x), atol=0.05) and deployed.histogram["QGemm"] >= 1


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)
    ).eval()


def test_some_layers_take_other_integers_and_some_stay_float_by_name():
    model = perceptron()
    per_layer = {"3": Int(4), "[13].weight": Int(3, "per_tensor"), "5": None}
    plan = Quantize(per_layer=per_layer).plan(model, task_of(model))
    found = {str(edit.places[0]): edit for edit in plan.edits if isinstance(edit.places[0], TensorPlace)}
    assert {name: (edit.quant_min, edit.quant_max, edit.axis) for name, edit in found.items()} == {
        "1.weight": (-4, 3, None), "3.weight": (-8, 7, 0),
    }  # fmt: skip
    assert Skip("5", "stays float: per_layer says so") in plan.skips


def test_a_name_of_no_layer_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"per_layer.*matches no convolution or linear.*Nearest names: fc"):
        Quantize(per_layer={"fcc": None}).plan(Gated(), task_of(Gated()))
    with pytest.raises(InputError, match="matches no convolution or linear layer that where means"):
        Quantize(per_layer={"fc": None}, where=~ByName("fc")).plan(Gated(), task_of(Gated()))


def test_groups_of_weights_have_their_own_scales_and_a_layer_that_they_do_not_divide_stays_float():
    model = perceptron()
    plan = Quantize(weights=Int(4, group_size=16)).plan(model, task_of(model))
    (first, second) = (edit for edit in plan.edits if isinstance(edit.places[0], TensorPlace))
    assert [tuple(edit.scale.shape) for edit in (first, second)] == [(32, 4), (24, 2)]
    runs = model[1].weight.detach().reshape(32, 4, 16)
    assert torch.allclose(first.scale, runs.abs().amax(2) / 7) and first.group_size == 16 and first.learn
    reasons = {skip.place: skip.reason for skip in plan.skips}
    assert "does not divide its 24 weights per output channel (24 = 1 · 16 + 8)" in reasons["5"]
    assert "in float in ONNX Runtime" in dict(plan.lines)["weights"]
    with pytest.raises(InputError, match=r"5.weight \[10, 24\]: .*24 = 1 · 16 \+ 8.*Use 12 or 24"):
        Quantize(weights=Int(4, group_size=16, indivisible="refuse")).plan(model, task_of(model))


@pytest.mark.parametrize("bits", [4, 16])
def test_activations_of_other_widths_are_true_in_the_exported_file(bits, ship):
    model = perceptron()
    task = task_of(model)
    weights = Int(4, group_size=8) if bits == 4 else Int(8)
    activations = Int(bits, "per_tensor", symmetric=False)
    result = Quantize(weights=weights, activations=activations, activation_range=MovingAverage()).run(model, task)
    quantised, x = result.model.eval(), torch.randn(100, 1, 8, 8)
    assert f"uint{bits} per tensor: ONNX Runtime's integer kernels take 8 bits alone" in str(result.plans[0])
    deployed = ship(quantised, x)
    step = next(float(edit.scale) for edit in result.plans[0].edits if str(edit.places[0]) == "5:linear[0]")
    with torch.no_grad():
        apart = (deployed(x) - quantised(x)).abs()
    assert apart.max() <= 1.01 * step and (apart > 0.01 * step).float().mean() < 0.01
    seen = {float(value) for value in (quantised(x) / step).round().flatten()}
    assert len(seen) <= 2**bits


def test_activations_with_outliers_are_said_and_others_are_not():
    model = perceptron()
    task = task_of(model)
    task.calibration[1][0][0, 0, 0, 0] = 400.0
    lines = dict(Quantize(activation_range=MinMax()).plan(model, task).lines)
    assert "the largest is 400, and the range goes to 399: activation_range=" in lines["<model>:input[0]"]
    assert "outliers" not in str(Quantize(activation_range=MinMax()).plan(model, task_of(model)))


def test_finer_activations_never_widen_the_steps_of_weights():
    model = perceptron()
    with torch.no_grad():
        model[1].bias.fill_(3.0)
    fine = Quantize(activations=Int(16, "per_tensor", symmetric=False)).plan(model, task_of(model))
    scale = next(edit.scale for edit in fine.edits if edit.places == (TensorPlace("1", "weight"),))
    assert torch.allclose(scale, model[1].weight.detach().abs().amax(1) / 127)
