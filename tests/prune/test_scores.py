import copy

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from tersor.core.errors import InputError, TrainingError
from tersor.core.place import TensorPlace
from tersor.core.task import Task
from tersor.graph.axis import Leaf
from tersor.graph.group import CoupledAxis, Group
from tersor.graph.groups import find_groups
from tersor.graph.trace import trace
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.scores import (
    ActivationWeighted,
    BatchNormScale,
    Fisher,
    GeometricMedian,
    HessianDiagonal,
    Magnitude,
    Random,
    Score,
    Taylor,
    combined,
    members_of,
)
from tersor.recipes.recipe import read_recipe, to_yaml
from tersor.recipes.registry import STEPS


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.fc = nn.Conv2d(6, 4, 3), nn.Linear(4 * 4, 3)

    def forward(self, x):
        x = self.conv2(F.relu(self.norm(self.conv1(x))))
        return self.fc(F.max_pool2d(x, 2).flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def task(net):
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(5, 1, 6, 6, generator=generator), torch.randint(3, (5,), generator=generator)) for _ in range(3)
    ]
    return Task(net, train=batches, calibration=batches, example_inputs=(batches[0][0][:2],))


def groups_of(net, task):
    return [group for group in find_groups(trace(net, task.example_inputs), net).prunable() if group.frozen is None]


def test_taylor_is_the_squared_change_when_a_channel_is_masked_where_it_is_read(net, task):
    """By a gate on each channel: Σ w ∂L/∂w over the readers is the gate's gradient at one."""
    found = Taylor().units(net, task, groups_of(net, task))
    expected = torch.zeros(6, dtype=torch.float64)
    for batch in task.calibration:
        gate = torch.ones(1, 6, 1, 1, requires_grad=True)
        gated = copy.deepcopy(net)
        gated.conv2.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate,))
        task.loss_of(gated, batch).backward()
        expected += gate.grad.flatten().double() ** 2 / 3
    assert torch.allclose(found[0], expected, rtol=1e-3)
    assert found[1].shape == (4,)


def test_taylor_leaves_the_model_and_the_random_state_alone(net, task):
    before = copy.deepcopy(net.state_dict())
    net.conv1.weight.requires_grad_(False)
    groups = groups_of(net, task)
    state = torch.get_rng_state()
    Taylor(batches=1).units(net, task, groups)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not net.conv1.weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_taylor_refuses_a_loss_that_is_not_finite_and_empty_data(net, task):
    groups = groups_of(net, task)
    nan = Task(net, calibration=task.calibration, loss=lambda model, batch: model(batch[0]).sum() * float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        Taylor().units(net, nan, groups)
    with pytest.raises(InputError, match="empty"):
        Taylor().units(net, Task(net, calibration=[]), groups)
    with pytest.raises(InputError, match="no calibration data"):
        Taylor().units(net, Task(net), groups)


def naive_norms(weight, axis, p):
    return [(weight.select(axis, i).abs() ** p).sum().item() ** (1 / p) for i in range(weight.shape[axis])]


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_magnitude_is_the_mean_of_the_relative_norms_of_what_scales_a_channel(net, task, p):
    nn.init.uniform_(net.norm.weight, -1, 1)
    first, second = Magnitude(p).units(net, task, groups_of(net, task))
    scale, read = net.norm.weight.detach().abs().numpy(), np.array(naive_norms(net.conv2.weight, 1, p))
    assert np.allclose(first.numpy(), (scale / scale.mean() + read / read.mean()) / 2)
    made, by_channel = np.array(naive_norms(net.conv2.weight, 0, p)), net.fc.weight.reshape(3, 4, 4)
    read = np.array(naive_norms(by_channel, 1, p))
    assert np.allclose(second.numpy(), (made / made.mean() + read / read.mean()) / 2)


def test_magnitude_of_a_silent_layer_is_finite(net, task):
    nn.init.zeros_(net.conv2.weight)
    assert all(bool(torch.isfinite(score).all()) for score in Magnitude().units(net, task, groups_of(net, task)))


def test_random_depends_on_its_seed_alone(net, task):
    groups = groups_of(net, task)
    one, same, other = (Random(seed).units(net, task, groups)[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_what_the_users_loader_or_loss_raises_is_told_with_its_batch(net, task):
    def failing(model, batch):
        raise KeyError("mask")

    groups = groups_of(net, task)
    with pytest.raises(
        InputError, match="Taylor, calibration batch 0: the loss cannot be computed. Got KeyError: 'mask'"
    ):
        Taylor().units(net, Task(net, calibration=task.calibration, loss=failing), groups)

    class Vanishing:
        def __iter__(self):
            yield task.calibration[0]
            raise FileNotFoundError("image 17.png")

    with pytest.raises(InputError, match="task.calibration, batch 1: the loader fails. Got FileNotFoundError"):
        Taylor().units(net, Task(net, calibration=Vanishing()), groups)


def gate_gradient(net, task, samples):
    """The gradient of a factor on each channel that conv2 reads, for each sample by itself: [samples, 6]."""
    found = []
    for x, y in samples:
        gate = torch.ones(1, 6, 1, 1, requires_grad=True)
        gated = copy.deepcopy(net)
        gated.conv2.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate,))
        task.loss_of(gated, (x, y)).backward()
        found.append(gate.grad.flatten().double())
    return torch.stack(found)


def one_by_one(task, count):
    pairs = [(x[i : i + 1], y[i : i + 1]) for x, y in task.calibration for i in range(len(x))]
    return pairs[:count]


@pytest.mark.parametrize("samples", [7, 100])
def test_fisher_is_half_the_mean_squared_gradient_of_a_gate_over_single_samples(net, task, samples):
    found = Fisher(samples).units(net, task, groups_of(net, task))[0]
    expected = gate_gradient(net, task, one_by_one(task, samples)).square().mean(0) / 2
    assert torch.allclose(found, expected, rtol=1e-3)
    assert not torch.allclose(found, Taylor().units(net, task, groups_of(net, task))[0] / 2, rtol=0.1)


def test_hessian_diagonal_adds_half_the_fisher_information_times_the_square_of_each_weight(net, task):
    found = HessianDiagonal(6).units(net, task, groups_of(net, task))[0]
    information = torch.zeros_like(net.conv2.weight)
    for sample in one_by_one(task, 6):
        net.zero_grad()
        task.loss_of(net, sample).backward()
        information += net.conv2.weight.grad.square() / 6
    expected = (information * net.conv2.weight.detach().square() / 2).sum((0, 2, 3)).double()
    assert torch.allclose(found, expected, rtol=1e-4)


def test_samples_are_taken_from_dicts_and_nested_batches_too(net, task):
    expected = Fisher(5).units(net, task, groups_of(net, task))[0]
    named = [{"x": x, "labels": y, "weight": 1.0} for x, y in task.calibration]
    loss = F.cross_entropy
    from_dicts = Task(
        net, calibration=named, loss=lambda model, batch: loss(model(batch["x"]), batch["labels"]) * batch["weight"]
    )
    nested = Task(
        net, calibration=[((x,), [y]) for x, y in task.calibration], loss=lambda m, b: loss(m(b[0][0]), b[1][0])
    )
    for other in (from_dicts, nested):
        assert torch.allclose(Fisher(5).units(net, other, groups_of(net, task))[0], expected)
    with pytest.raises(InputError, match="batch 0: the batch cannot be divided into samples"):
        Fisher().units(net, Task(net, calibration=["words"], loss=lambda m, b: m(b)), groups_of(net, task))


def test_geometric_median_adds_the_distances_to_all_other_filters(net, task):
    nn.init.normal_(net.conv1.weight)
    found = GeometricMedian(normalise=None).units(net, task, groups_of(net, task))
    for score, layer in zip(found, (net.conv1, net.conv2), strict=True):
        rows = layer.weight.detach().flatten(1).double().numpy()
        expected = [sum(np.linalg.norm(a - b) for b in rows) for a in rows]
        assert np.allclose(score.numpy(), expected, rtol=1e-5)


def test_a_filter_that_another_one_repeats_goes_first_by_geometric_median(net, task):
    with torch.no_grad():
        net.conv1.weight[4] = net.conv1.weight[1] = 3 * torch.ones(1, 3, 3)
        net.conv1.weight[0] = -0.01
    score = GeometricMedian(members="makers").units(net, task, groups_of(net, task))[0]
    assert Magnitude(members="makers").units(net, task, groups_of(net, task))[0].argmin() == 0
    others = [0, 2, 3, 5]
    assert score[1] == score[4] and min(score[1], score[4]) > score[others].min()  # far from the rest: kept
    net.conv1.weight.data[[0, 2, 3, 5]] = net.conv1.weight.data[[1]] + 0.1 * torch.randn(4, 1, 3, 3)
    net.conv1.weight.data[4] = -net.conv1.weight.data[1]
    assert GeometricMedian().units(net, task, groups_of(net, task))[0].argmax() == 4  # the one that is different


def test_units_of_several_positions_are_compared_as_wholes():
    layer = nn.Linear(3, 6, bias=False)
    positions, units = np.array([0, 1, 2, 3, 4, 5]), np.array([1, 0, 2, 0, 1, 2])
    axis = CoupledAxis(TensorPlace("", "weight"), 0, "producer", 6, positions, units)
    group = Group("heads", "head", 3, (axis,), (), None, Leaf(3))
    found = GeometricMedian(normalise=None).units(layer, Task(layer), [group])[0]
    rows = layer.weight.detach()
    wholes = [torch.cat([rows[1], rows[3]]), torch.cat([rows[0], rows[4]]), torch.cat([rows[2], rows[5]])]
    expected = torch.stack([sum((a - b).norm() for b in wholes) for a in wholes]).double()
    assert torch.allclose(found, expected, rtol=1e-5)
    sizes = Magnitude(members="makers", combine="sum", normalise=None).units(layer, Task(layer), [group])[0]
    assert torch.allclose(sizes, torch.stack([whole.norm() for whole in wholes]).double(), rtol=1e-6)


def test_batch_norm_scale_reads_nothing_else_and_says_where_there_is_none(net, task):
    nn.init.uniform_(net.norm.weight, -1, 1)
    first, second = groups_of(net, task)
    (found,) = BatchNormScale().units(net, task, [first])
    assert torch.equal(found, net.norm.weight.detach().abs().double())
    with pytest.raises(InputError, match="conv2: no batch norm scales these channels. Got 4 channels"):
        BatchNormScale().units(net, task, [first, second])


def test_activation_weighted_multiplies_each_weight_with_the_size_of_what_it_reads(net, task):
    found = ActivationWeighted(normalise=None).units(net, task, groups_of(net, task))
    hidden = torch.cat([F.relu(net.norm(net.conv1(x))) for x, _ in task.calibration]).detach().double()
    size = hidden.square().mean((0, 2, 3)).sqrt()
    assert torch.allclose(found[0], net.conv2.weight.detach().double().abs().sum((0, 2, 3)) * size, rtol=1e-5)
    flat = torch.cat([F.max_pool2d(net.conv2(h.float()[None]), 2).flatten(1) for h in hidden]).detach().double()
    products = net.fc.weight.detach().double().abs() * flat.square().mean(0).sqrt()
    assert torch.allclose(found[1], products.sum(0).view(4, 4).sum(1), rtol=1e-5)


class Grouped(nn.Module):
    """Readers of other layouts: a grouped and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 6, 1, groups=2)
        self.up, self.fc = nn.ConvTranspose2d(6, 5, 2), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.up(F.relu(self.grouped(F.relu(self.stem(x))))).mean((2, 3)))


def test_activation_weighted_knows_grouped_and_transposed_convolutions(task):
    torch.manual_seed(0)
    net = Grouped().eval()
    task = Task(net, calibration=task.calibration, example_inputs=task.example_inputs)
    groups = {group.name: group for group in groups_of(net, task)}
    stem, grouped = ActivationWeighted(normalise=None).units(net, task, [groups["stem"], groups["grouped"]])
    x = torch.cat([x for x, _ in task.calibration])
    size = F.relu(net.stem(x)).detach().double().square().mean((0, 2, 3)).sqrt()
    weight = net.grouped.weight.detach().double().abs()[:, :, 0, 0]  # [6, 2]: rows 0-2 read channels 0 and 1
    each = [sum(weight[3 * (c // 2) + row, c % 2] * size[c] for row in range(3)) for c in range(4)]
    units = groups["stem"].producers[0].units
    assert torch.allclose(stem, torch.stack([sum(each[c] for c in range(4) if units[c] == u) for u in set(units)]))
    size = F.relu(net.grouped(F.relu(net.stem(x)))).detach().double().square().mean((0, 2, 3)).sqrt()
    each = net.up.weight.detach().double().abs().sum((1, 2, 3)) * size
    units = groups["grouped"].producers[0].units
    assert torch.allclose(grouped, torch.stack([each[torch.from_numpy(units == u)].sum() for u in sorted(set(units))]))


def test_activation_weighted_says_whose_readers_cannot_be_seen(net, task):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.made, self.read = nn.Linear(36, 5, bias=False), nn.Linear(5, 3)

        def forward(self, x):
            return F.linear(F.relu(F.linear(x.flatten(1), self.made.weight)), self.read.weight, self.read.bias)

    model = Functional()
    task = Task(model, calibration=task.calibration, example_inputs=task.example_inputs)
    with pytest.raises(InputError, match="made: nobody's inputs can be seen.*Got read.weight, made.weight"):
        ActivationWeighted().units(model, task, groups_of(model, task))
    with pytest.raises(InputError, match="input of conv1|input of conv2"):
        nan = [(torch.full((2, 1, 6, 6), float("nan")), torch.zeros(2, dtype=torch.long))]
        ActivationWeighted().units(net, Task(net, calibration=nan), groups_of(net, task))


class Scores(nn.Module):
    """Queries times keys: what is inside them is read by no weight."""

    def __init__(self):
        super().__init__()
        self.size = 4
        self.q, self.k = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x):
        q, k = (layer(x[:, 0]).unflatten(-1, (2, self.size)).transpose(1, 2) for layer in (self.q, self.k))
        return (q @ k.transpose(-1, -2)).mean((1, 2, 3))[:, None].expand(-1, 3)


def test_channels_that_no_weight_reads_are_scored_by_what_makes_them(task):
    torch.manual_seed(0)
    net = Scores().eval()
    task = Task(net, calibration=task.calibration, example_inputs=task.example_inputs)
    (group,) = [group for group in find_groups(trace(net, task.example_inputs), net) if group.kind == "inside"]
    assert not group.with_role("consumer") and group.units == 4
    (found,) = ActivationWeighted(combine="sum", normalise=None).units(net, task, [group])
    size = torch.cat([x[:, 0] for x, _ in task.calibration]).double().square().mean((0, 1)).sqrt()
    rows = [layer.weight.detach().double().abs() @ size for layer in (net.q, net.k)]
    assert torch.allclose(found, sum(row.view(2, 4).sum(0) for row in rows), rtol=1e-5)
    assert all(bool((score.units(net, task, [group])[0] > 0).all()) for score in (Taylor(), Fisher(), Magnitude()))


def test_members_are_makers_scales_depthwise_filters_and_readers():
    net = nn.Sequential(
        nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(6 * 16, 3)
    )
    (group,) = groups_of(net, Task(net, example_inputs=(torch.randn(2, 1, 6, 6),)))

    def names(members):
        return [str(axis.place) for axis in members_of(net, group, members)]

    assert names("makers") == [str(axis.place) for axis in group.producers]
    assert names("readers") == ["4.weight"]
    assert names("scaling") == ["1.weight", "4.weight"]
    assert set(names("all")) == {"0.weight", "1.weight", "2.weight", "4.weight"} and names("all")[-1] == "4.weight"


def test_the_scale_of_a_layer_norm_counts_beside_the_makers():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    every = np.arange(4)
    axes = [
        CoupledAxis(TensorPlace("0", "weight"), 0, "producer", 4, every, every),
        CoupledAxis(TensorPlace("1", "weight"), 0, "bystander", 4, every, every),
        CoupledAxis(TensorPlace("1", "bias"), 0, "bystander", 4, every, every),
        CoupledAxis(TensorPlace("2", "weight"), 1, "consumer", 4, every, every),
    ]
    group = Group("0", "channel", 4, tuple(axes), (), None, Leaf(4))
    for members in ("scaling", "all"):
        assert [str(axis.place) for axis in members_of(net, group, members)] == ["0.weight", "1.weight", "2.weight"]


def test_members_join_as_the_options_say():
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([40.0, 0.0, 20.0])
    assert combined([a, b], "sum", None).tolist() == [41.0, 2.0, 23.0]
    assert combined([a, b], "mean", None).tolist() == [20.5, 1.0, 11.5]
    assert combined([a, b], "max", "mean").tolist() == [2.0, 1.0, 1.5]
    assert combined([a, b], "sum", "max").tolist() == pytest.approx([1 / 3 + 1, 2 / 3, 1.5])
    assert combined([a, b], "first", "max").tolist() == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert combined([torch.zeros(2)], "mean", "mean").tolist() == [0.0, 0.0]


class Forked(nn.Module):
    """Two layers read the same channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(36, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.stem(x.flatten(1)))
        return self.left(x) - 2 * self.right(x)


@pytest.mark.parametrize("score", [Taylor, Fisher])
def test_a_gate_adds_what_all_readers_say_before_squaring_and_the_other_options_after(task, score):
    torch.manual_seed(0)
    net = Forked()
    net.right.weight.data = net.left.weight.data / 2  # what one reader adds the other takes away
    task = Task(net, calibration=task.calibration, example_inputs=task.example_inputs)
    groups = groups_of(net, task)
    (gate,) = score().units(net, task, groups)
    assert gate.max() < 1e-10
    (total,) = score(combine="sum").units(net, task, groups)
    (largest,) = score(combine="max").units(net, task, groups)
    assert total.min() > 1e-9 and torch.allclose(total, 2 * largest, rtol=1e-3)


@pytest.mark.parametrize("score", [Magnitude, GeometricMedian, ActivationWeighted, Fisher, HessianDiagonal, Taylor])
def test_every_score_leaves_the_model_and_the_random_state_alone(net, task, score):
    before, groups = copy.deepcopy(net.state_dict()), groups_of(net, task)
    state, flags = torch.get_rng_state(), [module.training for module in net.modules()]
    one, two = score().units(net, task, groups), score().units(net, task, groups)
    assert all(torch.equal(a, b) and a.dtype == torch.float64 and bool((a >= 0).all()) for a, b in zip(one, two))
    assert [len(found) for found in one] == [group.units for group in groups]
    assert torch.equal(state, torch.get_rng_state())
    assert flags == [module.training for module in net.modules()]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_an_error_in_the_middle_puts_the_random_state_back(net, task):
    def failing(model, batch):
        raise KeyError("mask")

    state, groups = torch.get_rng_state(), groups_of(net, task)
    for score in (Taylor(), Fisher(), HessianDiagonal()):
        with pytest.raises(InputError, match=f"{type(score).__name__}, calibration batch 0"):
            score.units(net, Task(net, calibration=task.calibration, loss=failing), groups)
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", STEPS.families[Score])
def test_every_score_is_named_in_recipes_and_survives_being_printed(name):
    kind = STEPS.families[Score][name]
    settings = {"combine": "max"} if "combine" in kind.__dataclass_fields__ else {}
    part = {"prune_channels": {"score": {name: settings}}}
    recipe = read_recipe({"name": "mine", "steps": [{"name": "one", "parts": [part]}]})
    assert recipe.steps[0].step == PruneChannels(score=kind(**settings))
    assert read_recipe(yaml.safe_load(to_yaml(recipe))).steps == recipe.steps


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Magnitude(p=0), "Magnitude.p"),
        (lambda: Magnitude(combine="median"), "Magnitude.combine.*one of sum, mean, max, first"),
        (lambda: Magnitude(normalise="sum"), "Magnitude.normalise.*None, mean, max"),
        (lambda: GeometricMedian(members="none"), "GeometricMedian.members"),
        (lambda: Taylor(batches=0), "Taylor.batches"),
        (lambda: Taylor(combine="all"), "Taylor.combine.*gate, sum"),
        (lambda: HessianDiagonal(combine="gate"), "HessianDiagonal.combine"),
        (lambda: Fisher(samples=0), "Fisher.samples"),
        (lambda: ActivationWeighted(batches=0), "ActivationWeighted.batches"),
    ],
)
def test_options_that_no_score_knows_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
