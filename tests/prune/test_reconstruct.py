import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Cut, Slice
from tersor.core.errors import InputError
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan
from tersor.core.progress import Progress
from tersor.core.step import Context, Method
from tersor.core.task import Task
from tersor.export.artifact import load_artifact, save_artifact
from tersor.graph.group import removal
from tersor.graph.groups import find_groups
from tersor.graph.trace import trace
from tersor.observe import layerwise
from tersor.observe.least_squares import (
    NormalEquations,
    drawn_rows,
    equations_of,
    input_rows,
    output_rows,
    written,
)
from tersor.prune.layerwise.reconstruct import PruneAndReconstruct, reconstruction, surviving
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.scores import Fisher
from tersor.recipes.recipe import read_recipe, to_yaml
from tersor.train.recalibrate import RecalibrateBatchNorm
from tersor.zoo.digits import digits


@dataclass(frozen=True)
class DropEvery(Method):
    """Remove every ``n``-th unit of each group that may go."""

    n: int = 2

    def plan(self, model, task):
        groups = [g for g in find_groups(trace(model, task.example_inputs), model).prunable() if g.frozen is None]
        keep = {group: np.arange(group.units) % self.n != self.n - 1 for group in groups}
        return Plan("drop", removal(keep))


class Redundant(nn.Module):
    """Channels 1 and 3 of conv1 are sums of the others, so whoever reads them can do without them exactly."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.fc = nn.Linear(6 * 9, 3)
        with torch.no_grad():
            for even, odd in ((0, 1), (2, 3)):
                for tensor in (self.conv1.weight, self.conv1.bias):
                    tensor[odd] = 2 * tensor[even]

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x)).flatten(1))


def batches_of_noise(count=3, size=24, shape=(2, 6, 6), classes=3):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, *shape, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(count)
    ]


def task_of(model, batches=None, **fields):
    batches = batches or batches_of_noise()
    return Task(model.eval(), batches, batches, batches, calibration=batches, **fields).complete()


@dataclass(frozen=True)
class DropOddOfConv1(Method):
    """What the readers can do without exactly."""

    def plan(self, model, task):
        keep = torch.tensor([0, 2])
        conv1, conv2 = TensorPlace("conv1", "weight"), TensorPlace("conv2", "weight")
        bias = Cut(TensorPlace("conv1", "bias"), 0, keep, "bystander")
        cuts = (Cut(conv1, 0, keep, "producer"), bias, Cut(conv2, 1, keep, "consumer"))
        return Plan("drop odd", (Slice(cuts),))


@pytest.mark.parametrize("ridge", [0.0, 1e-9])
def test_what_others_can_stand_for_is_repaired_exactly(ridge):
    torch.manual_seed(0)
    model = Redundant()
    task = task_of(model)
    result = PruneAndReconstruct(DropOddOfConv1(), ridge=ridge).run(model, task)
    x = task.test[0][0]
    assert result.model.conv1.weight.shape[0] == 2
    assert torch.allclose(result.model(x), model(x), atol=1e-4)
    pruned = DropOddOfConv1().run(model, task).model
    assert (pruned(x) - model(x)).abs().max() > 0.1
    assert result.facts["reconstructed"] == 1 and result.facts["verified"] < 1e-4
    ((place, text),) = result.plans[1].lines
    assert place == "conv2" and text.startswith("18 weights per output from 648 rows: relative squared error 0.")


def unfolded(layer, x):
    """Rows [batch × places, channels × kernel] by torch's own unfold."""
    return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_solution_is_that_of_ridge_regression_towards_the_weights_given(bias, ridge):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=bias).double()
    x = torch.randn(40, 3, 7, 6, dtype=torch.float64)
    y = torch.randn_like(layer(x))
    equations = equations_of(layer)
    for part, target in zip(x.split(16), y.split(16), strict=True):
        rows = drawn_rows(layer, target, 10**6, torch.Generator())
        equations.add(input_rows(layer, part, rows), output_rows(layer, target, rows, None, 1))
    solution = equations.solve(ridge)
    X = unfolded(layer, x)
    Y = y.movedim(1, -1).flatten(0, -2)
    held = ridge * X.square().sum(0).mean()
    start = layer.weight.detach().flatten(1)
    if bias:
        X, start = torch.cat([X, torch.ones(len(X), 1)], 1), torch.cat([start, layer.bias.detach()[:, None]], 1)
    weights = held.sqrt() * torch.eye(X.shape[1], dtype=torch.float64)
    if bias:
        weights[-1] = 0
    expected = torch.linalg.lstsq(torch.cat([X, weights]), torch.cat([Y, weights @ start.T])).solution.T
    assert torch.allclose(solution[0], expected, rtol=1e-8)
    values = written(layer, solution)
    assert (
        values.keys() == ({"weight", "bias"} if bias else {"weight"}) and values["weight"].shape == layer.weight.shape
    )
    left = (Y - X @ expected.T).square().sum() / Y.square().sum()
    assert equations.error(solution) == pytest.approx(float(left))
    assert equations.error(equations.weight) == pytest.approx(
        float((Y - X @ start.T).square().sum() / Y.square().sum())
    )


def test_singular_equations_keep_the_weights_where_nothing_is_said():
    layer = nn.Linear(3, 2, bias=False).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    x[:, 1] = 0  # a dead channel
    x[:, 2] = x[:, 0]
    equations = equations_of(layer)
    equations.add(x[None], (x @ torch.tensor([[1.0, 0, 0], [2, 0, 0]], dtype=torch.float64).T)[None])
    solution = equations.solve(0.0)[0]
    assert torch.allclose(solution[:, 1], layer.weight[:, 1])
    assert torch.allclose(solution[:, 0] + solution[:, 2], torch.tensor([1.0, 2.0], dtype=torch.float64))
    apart = layer.weight[:, 0] - layer.weight[:, 2]
    assert torch.allclose(solution[:, 0] - solution[:, 2], apart)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (5, 4, 11)),
        (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (5, 4, 7, 6)),
        (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), groups=2, bias=False), (5, 4, 7, 6)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 7, 6)),
        (nn.Conv3d(4, 2, 2, stride=2, groups=2), (3, 4, 4, 5, 6)),
        (nn.Linear(4, 6), (5, 7, 4)),
        (nn.Linear(4, 6, bias=False), (4,)),
    ],
)
def test_rows_times_weights_are_the_layer_s_outputs(layer, shape):
    layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    rows = drawn_rows(layer, y, 13, torch.Generator().manual_seed(0))
    equations = equations_of(layer)
    products = input_rows(layer, x, rows) @ equations.weight[..., : equations.weight.shape[2] - equations.bias].mT
    groups = len(equations.weight)
    wanted = output_rows(layer, y, rows, None, groups)
    if layer.bias is not None:
        wanted = wanted - layer.bias.view(groups, 1, -1)
    assert len(rows) == min(13, y.numel() // 6 if layer.weight.shape[0] == 6 else 13)
    assert torch.allclose(products, wanted)


class Branches(nn.Module):
    """A stem that two layers read, a grouped convolution, a layer that is called twice, and a sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.grouped, self.twice = nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.left(x)) + self.right(x)
        x = F.relu(self.grouped(x))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return self.fc(x.mean((2, 3)))


def repair(model, pruned, task, **settings):
    """(the repaired model, the plan)."""
    plan = reconstruction(model, pruned.model, pruned.plans, task, **settings)
    return apply(pruned.model, plan), plan


def test_each_layer_is_solved_on_what_it_reads_in_the_model_repaired_so_far():
    torch.manual_seed(1)
    model = Branches()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2  # signals that do not die out
    task = task_of(model, batches_of_noise(count=2, size=40))
    pruned = DropEvery(4).run(model, task)
    repaired, plan = repair(model, pruned, task, ridge=0.0)
    assert [place for place, _ in plan.lines] == ["left", "right", "grouped", "twice", "fc"]
    inputs = []
    repaired.fc.register_forward_hook(lambda layer, args, y: inputs.append(args[0]))
    x = torch.cat([x for x, _ in task.calibration])
    with torch.no_grad():
        wanted, got = model(x).double().numpy(), repaired(x).double().numpy()
    X = np.concatenate([inputs[0].double().numpy(), np.ones((80, 1))], 1)
    best = X @ np.linalg.lstsq(X, wanted, rcond=None)[0]
    assert np.square(got - wanted).sum() == pytest.approx(np.square(best - wanted).sum(), rel=1e-3)
    assert np.square(got - wanted).sum() < 0.2 * np.square(pruned.model(x).detach().numpy() - wanted).sum()


def test_models_loader_and_random_state_stay_as_they_were():
    torch.manual_seed(2)
    model = Branches()
    task = task_of(model)
    model.train()
    pruned = DropEvery().run(model, task)
    before, state = [copy.deepcopy(net.state_dict()) for net in (model, pruned.model)], torch.get_rng_state()
    one, two, other = (repair(model, pruned, task, rows=50, seed=seed)[0] for seed in (4, 4, 5))
    assert torch.equal(state, torch.get_rng_state()) and model.training and one.training
    for net, values in zip((model, pruned.model), before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for net in (model, pruned.model, one) for module in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.twice.weight, other.twice.weight)


def test_the_repaired_model_is_saved_and_loaded(tmp_path):
    torch.manual_seed(3)
    model = Branches()
    task = task_of(model)
    result = PruneAndReconstruct(DropEvery()).run(model, task)
    save_artifact(tmp_path, result.model, original=model, plans=result.plans)
    loaded = load_artifact(tmp_path, Branches())
    x = task.test[0][0]
    assert torch.equal(loaded.eval()(x), result.model.eval()(x))


class Attention(nn.Module):
    """A residual stream that a layer norm normalises, and two heads that read and write it."""

    def __init__(self):
        super().__init__()
        self.heads, self.size = 2, 4
        self.embed, self.norm, self.qkv = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 24)
        self.out, self.fc = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.embed(x.flatten(1, 2))
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, self.size))
        x = x + self.out(F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2))
        return self.fc(x.mean(1))


@pytest.mark.parametrize("heads", ["whole", "inside"])
def test_what_reads_a_normalised_stream_or_heads_is_repaired_too(heads):
    torch.manual_seed(5)
    model = Attention()
    task = task_of(model)
    pruned = PruneChannels(0.5, heads=heads, multiple_of=1).run(model, task)
    repaired, plan = repair(model, pruned, task)
    assert [place for place, _ in plan.lines] == ["qkv", "out", "fc"] and not plan.skips
    assert repaired.out.in_features == 4
    x = torch.cat([x for x, _ in task.test])
    with torch.no_grad():
        assert F.mse_loss(repaired(x), model(x)) < 0.2 * F.mse_loss(pruned.model(x), model(x))


class Odd(nn.Module):
    """Readers that cannot be solved for: a transposed convolution, a product outside modules, tied weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 4, 1)
        self.functional, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.up(F.relu(self.conv(x)))).mean((2, 3))
        return self.fc(F.relu(F.linear(x, self.functional.weight, self.functional.bias)))


class Listening(Progress):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def test_readers_that_cannot_be_solved_for_are_skips_with_their_reason():
    model = Odd()
    task = task_of(model)
    result = PruneAndReconstruct(DropEvery()).run(model, task)
    skips = {skip.place: skip.reason for skip in result.plans[1].skips}
    assert skips == {
        "up.weight": "only convolutions and linear layers are reconstructed, not ConvTranspose2d",
        "functional": "the forward does not call it as a module",
    }
    assert [place for place, _ in result.plans[1].lines] == ["fc"]


def test_tied_weights_and_very_wide_layers_are_skips(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 40))
    model[1].weight = model[0].weight
    cuts = [Cut(TensorPlace(name, "weight"), 1, torch.arange(4), "consumer") for name in ("1", "2")]
    monkeypatch.setattr(layerwise, "MOST", 4)
    plan = reconstruction(model, model, [Plan("cut", (Slice(tuple(cuts)),))], Task(model))
    assert {skip.place: skip.reason for skip in plan.skips} == {
        "1.weight": "its weight is tied to 0.weight",
        "2.weight": "5 weights of one output are more than 4",
    }


def test_no_removal_is_said_and_changes_nothing():
    model, progress = nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), Listening()
    result = PruneAndReconstruct(DropEvery()).run(model, task_of(model), Context(progress=progress))
    assert "warning: no layer was reconstructed (0 skipped)" in progress.said
    assert torch.equal(result.model[1].weight, model[1].weight)


def test_slices_of_several_plans_are_followed_back_to_the_original():
    place = TensorPlace("fc", "weight")
    first = Plan("one", (Slice((Cut(place, 1, torch.tensor([0, 2, 3, 5]), "consumer"),)),))
    second = Plan("two", (Slice((Cut(place, 1, torch.tensor([1, 3]), "consumer"),)),))
    assert surviving([first, second])[place, 1].tolist() == [2, 5]


def test_a_recipe_says_what_is_pruned_and_how_it_is_repaired():
    part = {"prune_and_reconstruct": {"prune": {"prune_channels": {"sparsity": 0.3, "score": "fisher"}}, "ridge": 0.01}}
    recipe = read_recipe({"name": "mine", "steps": [{"name": "one", "parts": [part]}]})
    assert recipe.steps[0].step == PruneAndReconstruct(PruneChannels(0.3, score=Fisher()), ridge=0.01)
    assert read_recipe(yaml.safe_load(to_yaml(recipe))).steps == recipe.steps


def test_what_cannot_be_is_refused():
    for field, value in (("batches", 0), ("rows", 0), ("ridge", -1.0)):
        with pytest.raises(InputError, match=f"PruneAndReconstruct.{field}"):
            PruneAndReconstruct(DropEvery(), **{field: value})
    model = Branches()
    task = task_of(model)
    pruned = DropEvery().run(model, task)
    with pytest.raises(InputError, match="no calibration data"):
        reconstruction(model, pruned.model, pruned.plans, Task(model, example_inputs=task.example_inputs))
    with pytest.raises(InputError, match="task.calibration: the loader is empty"):
        empty = Task(model, example_inputs=task.example_inputs, calibration=[])
        reconstruction(model, pruned.model, pruned.plans, empty)
    bad = [(torch.full((2, 2, 6, 6), float("nan")), torch.zeros(2))]
    with pytest.raises(InputError, match="left: a calibration batch makes a value that is not finite"):
        poisoned = Task(model, example_inputs=task.example_inputs, calibration=bad)
        reconstruction(model, pruned.model, pruned.plans, poisoned)
    with pytest.raises(InputError, match="batch 0: the model does not run"):
        strange = Task(model, example_inputs=task.example_inputs, calibration=[(torch.randn(2, 5, 6, 6), 0)])
        reconstruction(model, pruned.model, pruned.plans, strange)


def test_half_of_the_channels_of_a_trained_network_go_without_training():
    task = digits().complete()
    pruned = DropEvery().run(task.model, task)
    repaired, _ = repair(task.model, pruned, task)
    both = RecalibrateBatchNorm(batches=8).run(repaired, task).model
    images = torch.cat([x for x, _ in task.test])
    targets = torch.cat([y for _, y in task.test])

    def accuracy(model):
        with torch.no_grad():
            return float((model.eval()(images).argmax(1) == targets).float().mean())

    assert accuracy(pruned.model) < 0.5
    assert accuracy(repaired) > accuracy(task.model) - 0.02
    assert accuracy(both) > accuracy(task.model) - 0.02


def test_the_equations_do_not_depend_on_how_the_rows_are_divided():
    torch.manual_seed(0)
    x, y = torch.randn(1, 30, 4), torch.randn(1, 30, 2)
    whole, parts = (NormalEquations(torch.zeros(1, 2, 5, dtype=torch.float64), True) for _ in range(2))
    whole.add(x, y)
    for a, b in zip(x.split(7, 1), y.split(7, 1), strict=True):
        parts.add(a, b)
    assert whole.rows == parts.rows == 30 and torch.allclose(whole.solve(0.01), parts.solve(0.01))
