"""A width for each layer in one step: within the size, and layers that hurt stay float by name."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.edit import Quantizer
from tersor.core.errors import InputError
from tersor.core.place import TensorPlace
from tersor.core.task import Task
from tersor.recipes.mixed_precision import MixedPrecision
from tersor.recipes.recipe import read_recipe
from tersor.testing import check_method


class Delicate(nn.Module):
    """``fine`` cannot bear rounding: its few large weights cancel, and what is left of them decides."""

    def __init__(self):
        super().__init__()
        self.fine, self.robust = nn.Linear(4, 6), nn.Linear(6, 3)
        with torch.no_grad():
            self.fine.weight[:, 0] += 100
            self.fine.weight[:, 1] -= 100

    def forward(self, x):
        return self.robust(F.relu(self.fine(torch.cat([x, x[:, :1], x[:, 1:2]], 1)[:, [0, 2, 1, 3]])))


@pytest.fixture
def task():
    torch.manual_seed(0)
    model, x = Delicate().eval(), torch.randn(64, 2)
    with torch.no_grad():
        y = model(x).argmax(1)
    batches = list(zip(x.split(16), y.split(16), strict=True))
    return Task(model, batches, batches, batches).complete()


def bits_of(plan):
    weights = [edit for edit in plan.edits if isinstance(edit, Quantizer) and isinstance(edit.places[0], TensorPlace)]
    return {edit.places[0].module: (edit.quant_max + 1).bit_length() for edit in weights}


def test_a_layer_that_hurts_stays_float_by_name_and_the_others_get_the_fewest_bits(task):
    plan = MixedPrecision((8, 4), max_drop=3.0).plan(task.model, task)
    assert bits_of(plan).keys() == {"robust"}
    (skip,) = [skip for skip in plan.skips if skip.place == "fine"]
    assert skip.reason.startswith("stays float: at 8 bits the metric falls by") and "0.03 is allowed" in skip.reason
    told = dict(plan.lines)
    assert told["fine"].startswith("float (8 bits: loss +") and "bytes of weights and scales" in told["<model>"]


def test_a_size_is_met_in_bytes_or_as_a_fraction(task):
    robust, fine = 6 * 3, 6 * 4
    for size in (fine + robust // 2 + 4 * 9, (fine + robust // 2 + 4 * 9) / (4 * (fine + robust))):
        plan = MixedPrecision((8, 4), max_size=size).plan(task.model, task)
        assert bits_of(plan) == {"fine": 8, "robust": 4}
    with pytest.raises(InputError, match="the budget cannot be met"):
        MixedPrecision((8, 4), max_size=10.0).plan(task.model, task)


def test_it_keeps_the_contract_of_a_method_and_is_read_from_recipes(task):
    check_method(MixedPrecision((8, 2), max_size=0.5), task.model, task)
    step = {"mixed_precision": {"bits": [8, 3], "max_size": 0.2, "quantize": {"learn": False}}}
    recipe = read_recipe({"name": "x", "steps": [{"name": "quantize", "parts": [step]}]})
    read = recipe.steps[0].step
    assert read.bits == (8, 3) and read.max_size == 0.2 and not read.quantize.learn
    for wrong in ({"max_drop": -1}, {"max_size": 0}, {"bits": (16,)}):
        with pytest.raises(InputError):
            MixedPrecision(**wrong)
