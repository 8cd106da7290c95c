"""Sensitivity to bits against quantising one layer by hand, and widths against trying every assignment."""

import copy
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tersor.core.errors import InputError
from tersor.core.place import ByName
from tersor.core.task import Task
from tersor.graph.trace import trace
from tersor.measure.bit_budgets import fewest_bits, least_loss
from tersor.measure.bit_sensitivity import (
    BitProbe,
    BitSensitivity,
    LayerWidths,
    WidthPoint,
    bit_sensitivity,
    quantizers_by_layer,
)
from tersor.quantize.quantize import Quantize
from tersor.quantize.schemes import Int


class Joined(nn.Module):
    """Two convolutions that are concatenated (and so share a grid), an addition, a pooling, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1).mean((2, 3))
        return self.head(torch.tanh(self.hidden(x) + x))


def task_of(model):
    generator = torch.Generator().manual_seed(2)
    batches = []
    for size in (20, 20, 7):
        x = torch.randn(size, 3, 6, 6, generator=generator)
        batches.append((x, (x.mean((2, 3)).argmax(1) + (x[:, 0, 0, 0] > 1).long()) % 4))
    return Task(model, batches, batches, batches, calibration=batches).complete()


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    return task_of(Joined().eval())


LAYERS = ("left", "right", "hidden", "head")


def test_a_layer_alone_has_the_quantisers_that_quantize_gives_it_alone(task):
    plan = Quantize().plan(task.model, task)
    alone = quantizers_by_layer(task.model, trace(task.model, task.example_inputs), plan)
    assert [place.module for place in alone] == list(LAYERS)
    for place, edits in [pair for pair in alone.items() if pair[0].module in ("left", "hidden")]:
        expected = Quantize(where=ByName(place.module)).plan(task.model, task).edits
        found = {place: edit for edit in edits for place in edit.places}
        wanted = {place: edit for edit in expected for place in edit.places}
        assert found.keys() == wanted.keys() and len(found) >= 3
        if place.module == "hidden":  # the grid of a concatenation reaches over both of its operands
            assert all(edit.scale.equal(wanted[at].scale) for at, edit in found.items())


def test_each_point_is_the_model_with_one_layer_quantised_by_hand(task):
    before = copy.deepcopy(task.model.state_dict())
    found = bit_sensitivity(task.model, task, BitProbe((4, 8)))
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    x, y = (torch.cat(parts) for parts in zip(*task.validation, strict=True))
    assert found.samples == 47 and not found.left_out
    assert found.loss == pytest.approx(float(F.cross_entropy(task.model(x), y).detach()), rel=1e-5)
    last = found.layers[-1]
    assert [point.bits for point in last.points] == [8, 4]
    for point in last.points:
        method = Quantize(weights=Int(point.bits), where=ByName(last.layer), learn=False)
        quantised = method.run(task.model, task).model.eval()
        assert point.loss == pytest.approx(float(F.cross_entropy(quantised(x), y).detach()), rel=1e-4)
        assert point.metric == pytest.approx(float((quantised(x).argmax(1) == y).double().mean()))
        assert point.size_bytes == 32 * point.bits // 8 + 4 * 4


def test_time_bounds_the_work_and_the_widest_come_first(task):
    found = bit_sensitivity(task.model, task, BitProbe((8, 4), seconds=1e-9))
    assert found.left_out == 2 * len(LAYERS) - 1 and [point.bits for point in found.layers[0].points] == [8]


def curves(*layers):
    """(numbers, [(bits, increase of the loss)]) for each layer; the metric falls by a tenth of the increase."""
    made = []
    for n, (size, points) in enumerate(layers):
        found = tuple(WidthPoint(b, size * b // 8, 1 + rise, 0.9 - rise / 10) for b, rise in points)
        made.append(LayerWidths(f"layer{n}.weight", size, found))
    return BitSensitivity(1.0, 0.9, True, 100, tuple(made))


def test_a_tolerance_takes_the_fewest_bits_and_layers_that_hurt_stay_float_by_name():
    found = curves((80, [(8, 0.1), (4, 0.4), (2, 0.2)]), (80, [(8, 0.9), (4, 1.0)]), (160, [(8, -0.1), (4, -0.2)]))
    budgets = fewest_bits(found, loss=0.3)
    assert budgets.bits == {"layer0": 8, "layer1": None, "layer2": 4}
    assert budgets.kept_float == {"layer1": "at 8 bits the loss grows by 0.9; 0.3 is allowed"}
    assert budgets.size_bytes == 80 + 4 * 80 + 80 and budgets.loss_increase == pytest.approx(0.1)
    assert budgets.per_layer(Int(8, "per_tensor")) == {
        "layer0": Int(8, "per_tensor"), "layer1": None, "layer2": Int(4, "per_tensor"),
    }  # fmt: skip
    assert fewest_bits(found, drop=0.05).bits == {"layer0": 2, "layer1": None, "layer2": 4}
    with pytest.raises(InputError, match="one of the two"):
        fewest_bits(found)


rises = st.lists(st.floats(-0.1, 2), min_size=3, max_size=3)


@given(st.lists(st.tuples(st.integers(1, 50), rises), min_size=1, max_size=5), st.floats(0, 1), st.booleans())
@settings(max_examples=80, deadline=None)
def test_the_widths_have_the_least_loss_of_all_assignments_within_the_budget(layers, share, may_stay_float):
    found = curves(*((8 * size, list(zip((8, 4, 2), rise, strict=True))) for size, rise in layers))
    least, most = sum(size * 2 for size, _ in layers), sum(size * 32 for size, _ in layers)
    budget = least + share * (most - least)
    budgets = least_loss(found, budget, may_stay_float=may_stay_float)
    every = []
    for bits in itertools.product((None, 8, 4, 2) if may_stay_float else (8, 4, 2), repeat=len(layers)):
        size = sum(8 * size * (b or 32) // 8 for b, (size, _) in zip(bits, layers, strict=True))
        loss = sum(
            max(0.0, *rise[: 1 + (8, 4, 2).index(b)]) if b else 0.0 for b, (_, rise) in zip(bits, layers, strict=True)
        )
        every += [loss] if size <= budget else []
    assert budgets.size_bytes <= budget and budgets.cost == budgets.size_bytes
    assert budgets.loss_increase == pytest.approx(min(every), abs=1e-9)


def test_other_costs_than_bytes_decide_where_they_are_given():
    found = curves((80, [(8, 0.1), (4, 0.2)]), (80, [(8, 0.3), (4, 0.4)]))
    costs = {"layer0": {None: 3.0, 8: 1.0, 4: 1.5}, "layer1": {None: 3.0, 8: 1.0, 4: 1.5}}
    budgets = least_loss(found, 4.0, costs=costs)
    assert budgets.bits == {"layer0": 8, "layer1": None} and budgets.cost == 4.0
    assert "the budget allows it, and at 8 bits the loss grows by 0.3" in budgets.kept_float["layer1"]
    with pytest.raises(InputError, match="layer1: no cost is given"):
        least_loss(found, 4.0, costs={"layer0": costs["layer0"]})


def test_what_cannot_be_met_or_measured_is_said():
    found = curves((80, [(8, 0.1), (4, math.inf)]))
    with pytest.raises(InputError, match="79 is asked, the least possible is 80"):
        least_loss(found, 79)
    assert least_loss(found, 100).bits == {"layer0": 8}
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["layers"][0]["points"][1]["loss"] is None
    with pytest.raises(InputError, match="no layer was measured"):
        least_loss(curves(), 1)
    for wrong, match in (({"bits": (9,)}, "within 2"), ({"bits": ()}, "within 2"), ({"samples": 0}, "1 or more")):
        with pytest.raises(InputError, match=match):
            BitProbe(**wrong)
