"""SiLU and hard swish become a gate and a product of integers, where what they read are integers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.edit import Quantizer, Swap
from tersor.core.errors import InputError
from tersor.core.gated import Gated
from tersor.core.task import Task
from tersor.quantize.quantize import Quantize
from tersor.quantize.schemes import Int
from tersor.testing import check_method
from tersor.zoo.batches import TensorBatches


def task_of(model, *shape):
    torch.manual_seed(0)
    batches = TensorBatches(2 * torch.randn(16, *shape), torch.arange(16) % 4, 8)
    return Task(model.eval(), batches, batches, batches).complete()


def convolutions(activation, gate=nn.Sigmoid):
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 8, 1), gate(), *head)


def planned(model, *shape, **settings):
    task = task_of(model, *shape)
    return Quantize(learn=False, **settings).plan(task.model, task)


def swaps_of(plan):
    return {edit.module: edit.arguments["gate"] for edit in plan.edits if isinstance(edit, Swap)}


@pytest.mark.parametrize(("gate", "function"), [("sigmoid", F.silu), ("hardsigmoid", F.hardswish)])
def test_a_gate_and_its_product_are_silu_and_hard_swish(gate, function):
    x = torch.cat([8 * torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 3, -3, 100])])
    torch.testing.assert_close(Gated(gate)(x), function(x), rtol=1e-6, atol=1e-7)


def test_an_unknown_gate_is_refused():
    with pytest.raises(InputError, match="sigmoid"):
        Gated("tanh")


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.SiLU(inplace=True), nn.Hardswish(inplace=True)])
def test_quantize_splits_the_modules_and_keeps_the_contract(activation):
    model = convolutions(activation)
    task = task_of(model, 3, 6, 6)
    result = check_method(Quantize(), model, task)
    assert isinstance(result.model[1], Gated) and model[1] is activation
    assert not result.plans[0].skips
    with torch.no_grad():
        got, exact = result.model.eval()(*task.example_inputs), model(*task.example_inputs)
    assert 0 < (got - exact).norm() < 0.03 * exact.norm()


def test_a_module_that_stands_at_two_places_is_split_at_both():
    act = nn.SiLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), act, nn.Conv2d(4, 4, 1), act, nn.Flatten(), nn.Linear(16, 4))
    assert swaps_of(planned(model, 3, 2, 2)) == {"1": "sigmoid", "3": "sigmoid"}


def test_the_grid_of_hard_sigmoid_is_that_of_a_shifted_x_and_not_learnt():
    task = task_of(convolutions(nn.Hardswish(), nn.Hardsigmoid), 3, 6, 6)
    edits = Quantize(learn=True).plan(task.model, task).edits
    gates = [e for e in edits if isinstance(e, Quantizer) and "hardsigmoid" in str(e.places[0])]
    assert [str(e.places[0]) for e in gates] == ["1:hardsigmoid[0]", "3:hardsigmoid[0]"]
    assert all((float(e.scale), int(e.zero_point), e.learn) == (1 / 256, 0, False) for e in gates)


def test_signed_activations_calibrate_the_gate_as_any_other():
    plan = planned(convolutions(nn.Hardswish()), 3, 6, 6, activations=Int(8, "per_tensor"))
    (gate,) = [e for e in plan.edits if isinstance(e, Quantizer) and "hardsigmoid" in str(e.places[0])]
    assert gate.quant_min < 0 and float(gate.scale) != 1 / 256


def test_what_reads_the_floats_of_a_wide_linear_layer_stays_whole():
    plan = planned(nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 4)), 5, 6)
    assert not swaps_of(plan)
    assert {skip.place: skip.reason for skip in plan.skips}["1:silu[0]"] == "no integer kernel: silu"


def test_one_whose_layers_stay_float_stays_whole():
    plan = planned(convolutions(nn.SiLU()), 3, 6, 6, per_layer={"*": None})
    assert not swaps_of(plan)


def test_a_function_stays_and_is_told_what_would_help():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.b(F.silu(self.a(x))).mean((2, 3))

    plan = planned(Functional(), 3, 4, 4)
    assert not swaps_of(plan)
    reason = {skip.place: skip.reason for skip in plan.skips}["<model>:silu[0]"]
    assert reason.startswith("no integer kernel: silu; called as a function") and "nn.SiLU" in reason


def test_a_module_whose_working_in_place_counts_stays():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.b = nn.Conv2d(3, 8, 1), nn.SiLU(inplace=True), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.a(x)
            self.act(x)
            return self.b(x).mean((2, 3))

    plan = planned(InPlace(), 3, 4, 4)
    assert not swaps_of(plan)
    assert "relies on its working in place" in {skip.place: skip.reason for skip in plan.skips}["act"]
