import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Mask, Quantizer, Write
from tersor.core.errors import InputError
from tersor.core.place import ByName, TensorPlace
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.quantize.adaround import AdaRound
from tersor.quantize.quantize import Quantize
from tersor.quantize.ranges import MeanSquaredError
from tersor.quantize.rounding import Rounding, undecided
from tersor.quantize.schemes import Int
from tersor.quantize.weight_only import QuantizeWeights, quantizer, rounded
from tersor.zoo.batches import TensorBatches

QUICK = {"steps": 100, "batches": 3}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1, groups=2)

    def forward(self, x, *, factor=1.0):
        return F.relu(self.second(F.relu(self.first(x))) * factor + x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), Block(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.block(F.relu(self.stem(x)), factor=0.5).mean((2, 3)))


def made_task(model, images):
    batches = TensorBatches(images, torch.arange(len(images)) % 4, 16)
    return Task(model.eval(), batches, batches, batches).complete()


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    coarse = torch.rand(48, 3, 4, 4)  # neighbouring pixels hang together, as in pictures
    return made_task(Net(), F.interpolate(coarse, size=(10, 10), mode="bilinear") + 0.05 * torch.rand(48, 3, 10, 10))


def error(model, task):
    x = task.calibration.images
    with torch.no_grad():
        return float((model(x) - task.model(x)).square().sum() / task.model(x).square().sum())


def on_grid(model, bits):
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight, grid = module.weight.detach(), module.parametrizations.weight[0]
            integers = weight / grid.scale.view(-1, *[1] * (weight.ndim - 1))
            assert (integers - integers.round()).abs().max() < 1e-4
            assert integers.min() >= -(2 ** (bits - 1)) - 1e-4 and integers.max() <= 2 ** (bits - 1) - 1 + 1e-4
            assert torch.equal(weight, module.parametrizations.weight.original)


@pytest.mark.parametrize("blocks", [None, ByName("block")])
def test_learnt_rounding_stays_nearer_than_rounding_to_the_nearest_on_the_same_grid(task, blocks):
    scheme = Int(3)
    nearest = QuantizeWeights(scheme, MeanSquaredError()).run(task.model, task).model
    result = AdaRound(scheme, blocks=blocks, **QUICK).run(task.model, task)
    assert error(result.model, task) < 0.5 * error(nearest, task)
    on_grid(result.model, 3)
    for path in ("stem", "block.first", "block.second", "head"):
        grids = [model.get_submodule(path).parametrizations.weight[0].scale for model in (nearest, result.model)]
        assert torch.equal(*grids)
        given = task.model.get_submodule(path).weight
        steps = (result.model.get_submodule(path).weight - given).abs() / grids[0].view(-1, *[1] * (given.ndim - 1))
        inside = given.abs() <= 3 * grids[0].view(-1, *[1] * (given.ndim - 1))
        assert steps[inside].max() < 1 + 1e-4  # up or down, no further


def test_of_all_roundings_of_a_small_layer_the_one_that_is_learnt_is_among_the_best():
    torch.manual_seed(4)
    x = torch.randn(64, 1, 1) + 0.2 * torch.randn(64, 1, 9)  # inputs that hang together
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 1))
    task = made_task(model, x)
    result = AdaRound(Int(3), steps=400, batches=4).run(model, task)
    grid = quantizer(TensorPlace("1", "weight"), model[1].weight.detach(), 0, Int(3), MeanSquaredError())
    rounding = Rounding.of(model[1].weight.detach(), grid)
    x = x.flatten(1)
    every = torch.stack(
        [rounding.below[0] + torch.tensor(ups) * rounding.gap[0] for ups in itertools.product((0.0, 1.0), repeat=9)]
    )
    costs = ((every - model[1].weight) @ x.T).square().mean(1)
    got = ((result.model[1].weight - model[1].weight) @ x.T).square().mean()
    assert float((costs < got - 1e-9).float().mean()) < 0.05
    assert got < 0.5 * ((rounded(grid, model[1].weight.detach()) - model[1].weight) @ x.T).square().mean()


def test_weights_that_bear_a_quantiser_keep_its_grid_and_activations_theirs(task):
    quantised = Quantize(weights=Int(4), learn=False).run(task.model, task).model
    result = AdaRound(Int(2), **QUICK).run(quantised, task)  # its own grid is for weights without one
    assert {type(edit) for edit in result.plans[0].edits} == {Write}
    old, new = quantised.state_dict(), result.model.state_dict()
    assert {key for key in old if not torch.equal(old[key], new[key])} == {
        f"{path}.parametrizations.weight.original" for path in ("stem", "block.first", "block.second", "head")
    }
    on_grid(result.model, 4)
    assert error(result.model, task) < 0.8 * error(quantised, task)


def test_masked_weights_stay_zero(task):
    keep = torch.rand(task.model.stem.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    masked = apply(task.model, Plan("by hand", (Mask(TensorPlace("stem", "weight"), keep),)))
    result = AdaRound(Int(4), **QUICK).run(masked, task)
    assert bool((result.model.stem.weight[~keep] == 0).all()) and bool((result.model.stem.weight[keep] != 0).any())


def test_groups_of_inputs_have_grids_of_their_own_and_what_they_do_not_divide_is_a_skip(task):
    plan = AdaRound(Int(4, group_size=4), **QUICK).plan(task.model, task)
    grids = {str(edit.places[0]): edit for edit in plan.edits if isinstance(edit, Quantizer)}
    assert grids["block.first.weight"].scale.shape == (8, 18) and grids["head.weight"].group_size == 4
    assert [(skip.place, skip.reason.split(" per ")[0]) for skip in plan.skips] == [
        ("stem", "group_size 4 does not divide its 27 weights")
    ]


def test_a_plan_is_the_same_each_time_and_leaves_the_model(task):
    before = copy.deepcopy(task.model.state_dict())
    method = AdaRound(Int(4), where=ByName("block*"), steps=20)
    plans = [method.plan(task.model, task) for _ in range(2)]
    for one, other in zip(*(plan.edits for plan in plans), strict=True):
        assert isinstance(one, Quantizer) or torch.equal(one.value, other.value)
    assert plans[0].lines == plans[1].lines and len(plans[0].lines) == 2
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_it_begins_at_the_weights_themselves_and_ends_between_the_two_grid_points():
    weight = torch.linspace(-1.2, 1.2, 48).view(2, 24)
    grid = quantizer(TensorPlace("", "weight"), weight, 0, Int(4), MeanSquaredError())
    rounding = Rounding.of(weight, grid)
    free = rounding.gap > 0
    assert torch.allclose(rounding.soft(rounding.h())[free], weight[free], atol=1e-6)
    assert torch.equal(rounding.hard(), rounded(grid, weight))
    rounding.V = torch.full_like(weight, -9.0)
    assert bool((rounding.hard()[free] <= weight[free]).all())


def test_nothing_is_undecided_at_zero_and_one():
    assert float(undecided(torch.tensor([0.0, 1.0]), 2.0)) == 0
    assert float(undecided(torch.tensor([0.5, 0.5]), 2.0)) == 2


def test_numbers_out_of_range_and_missing_data_are_refused(task):
    for name in ("steps", "batches", "rows"):
        with pytest.raises(InputError, match=f"AdaRound.{name}"):
            AdaRound(**{name: 0})
    with pytest.raises(InputError, match="AdaRound.scheme"):
        AdaRound(Int(16))
    with pytest.raises(InputError, match="no calibration data"):
        AdaRound().plan(task.model, Task(task.model, example_inputs=task.example_inputs))


def test_data_and_weights_that_are_not_finite_name_the_layer(task):
    images = task.calibration.images.clone()
    images[0, 0, 0, 0] = float("nan")
    bad = dataclasses.replace(task, calibration=TensorBatches(images, task.calibration.targets, 16))
    with pytest.raises(InputError, match="stem.*not finite"):
        AdaRound(**QUICK).plan(task.model, bad)
    broken = copy.deepcopy(task.model)
    with torch.no_grad():
        broken.head.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="head.weight.*not finite"):
        AdaRound(**QUICK).plan(broken, task)


def test_transposed_and_tied_layers_are_skips_with_reasons():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Unflatten(1, (1, 2, 2)), nn.ConvTranspose2d(1, 1, 1))
    model[1].weight = model[0].weight
    plan = AdaRound(steps=5).plan(model, made_task(model, torch.randn(8, 4)))
    assert [skip.place for skip in plan.skips] == ["0", "1", "3"] and not plan.edits
    assert "tied to 1.weight" in plan.skips[0].reason and "ConvTranspose2d" in plan.skips[2].reason
