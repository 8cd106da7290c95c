"""What a model costs, as counted from its graph, is what the really shrunk model costs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.plan import Plan
from tersor.graph.cost import Cost, resolutions
from tersor.graph.group import removal
from tersor.graph.groups import find_groups
from tersor.graph.trace import trace
from tersor.measure.compute import macs
from tersor.measure.size import parameters


class Function(nn.Module):
    def __init__(self, function, *shapes):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)
        self.function = function

    def forward(self, x):
        return self.function(x, *self.weights)


def einsum(equation, *shapes):
    return Function(lambda x, *weights: torch.einsum(equation, x, *weights), *shapes)


class Recurrent(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        return self.cell(x)[0]


OPERATORS = [
    (nn.Conv1d(4, 6, 3, stride=2, groups=2), (4, 11)),
    (nn.Conv2d(3, 8, 3, padding=1), (3, 7, 5)),
    (nn.Conv2d(6, 12, 3, groups=6), (6, 7, 5)),
    (nn.Conv3d(2, 4, 2), (2, 4, 5, 3)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3), (4, 5)),
    (nn.Linear(20, 7), (20,)),
    (nn.Linear(20, 7), (11, 3, 20)),
    (nn.MultiheadAttention(8, 2, batch_first=True), None),
    (Recurrent(nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True)), (5, 6)),
    (Recurrent(nn.GRU(6, 4, batch_first=True)), (5, 6)),
    (Recurrent(nn.RNN(6, 4, batch_first=True)), (5, 6)),
    (Function(lambda x: x @ x.transpose(1, 2)), (5, 6)),
    (Function(lambda x, w: x @ w, (4, 1, 6, 3)), (5, 6)),
    (Function(lambda x, w: torch.mv(x.flatten(1), w), (30,)), (5, 6)),
    (Function(lambda x, w, b: torch.addmm(b, x.flatten(1), w), (30, 3), (3,)), (5, 6)),
    (Function(lambda x: torch.baddbmm(x[:, :, :5], x, x.transpose(1, 2))), (5, 6)),
    (Function(lambda x: F.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3, :4])), (2, 5, 6)),
    (Function(lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True)), (4, 5, 6)),
    (einsum("bti,ij->btj", (6, 7)), (5, 6)),
    (einsum("...i,ij", (6, 7)), (5, 6)),
    (einsum("bti,ui->btu", (7, 6)), (5, 6)),
    (einsum("bti,btj->bt", (2, 5, 3)), (5, 6)),
    (einsum("bti,i->bti", (6,)), (5, 6)),
    (einsum("bti,ij,jk->bk", (6, 4), (4, 3)), (5, 6)),
    (nn.BatchNorm2d(3), (3, 4, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("model", "shape"), OPERATORS, ids=lambda value: type(value).__name__)
def test_a_whole_model_costs_what_is_measured(model, shape):
    if shape is None:
        model, shape = Function(lambda x, module=model: module(x, x, x)[0]), (5, 8)
        model.inner = model.function.__defaults__[0]
    inputs = (torch.randn(2, *shape),)
    cost = cost_of(model, inputs)[0]
    assert cost.macs({}) == macs(model, inputs).value
    assert cost.parameters({}) == parameters(model).value
    assert cost.bytes({}) == bytes_of(model)


def cost_of(model, inputs):
    graph = trace(model, inputs)
    groups = find_groups(graph, model)
    return Cost(groups, model, tuple(groups)), groups


def bytes_of(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


class Residual(nn.Module):
    """A stem, a residual branch with batch norm and a gate, a concatenation, a flatten."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.gate = nn.Linear(12, 12)
        self.conv2 = nn.Conv2d(12, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.side = nn.Conv2d(3, 4, 2, stride=1)
        self.grouped = nn.Conv2d(10, 10, 3, groups=2)
        self.fc1, self.fc2 = nn.Linear(10 * 14 * 14, 9), nn.Linear(9, 5)

    def forward(self, x):
        a = F.relu(self.stem(x))
        y = F.relu(self.norm1(self.conv1(a)))
        y = self.depth(y) * self.gate(y.mean((2, 3))).sigmoid()[:, :, None, None]
        a = self.up(a + self.conv2(y))
        a = torch.cat([a, F.interpolate(self.side(x), size=16)], 1)
        return self.fc2(F.relu(self.fc1(self.grouped(a).flatten(1))))


class Mixer(nn.Module):
    """Linear layers over tokens and over channels: the rows of one are the channels of the other."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.tokens = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
        self.mix = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.mix(x)).mean(1))


class Attention(nn.Module):
    """Heads × head size: what is multiplied shrinks with both."""

    def __init__(self):
        super().__init__()
        self.heads, self.size = 4, 6
        self.embed, self.qkv = nn.Linear(5, 24), nn.Linear(24, 72)
        self.out, self.fc = nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.size)).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.fc(x + self.out(y.transpose(1, 2).flatten(2)))


def keep_at_random(groups, rng):
    keep = {}
    for group in groups:
        if group.frozen is None and group.units > 1:
            kept = rng.random(group.units) < rng.random()
            kept[rng.integers(group.units)] = True
            keep[group] = kept
    return keep


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Residual(), (3, 8, 8)), (Mixer(), (6, 5)), (Attention(), (7, 5))],
    ids=["residual", "mixer", "attention"],
)
def test_what_groups_keep_costs_what_the_shrunk_model_costs(model, shape):
    inputs = (torch.randn(2, *shape),)
    cost, groups = cost_of(model.eval(), inputs)
    rng = np.random.default_rng(0)
    for _ in range(8):
        keep = keep_at_random(groups, rng)
        assert len(keep) >= 3
        shrunk = apply(model, Plan("test", removal(keep)))
        assert cost.macs(keep) == macs(shrunk, inputs).value < cost.macs({})
        assert cost.parameters(keep) == parameters(shrunk).value < cost.parameters({})
        assert cost.bytes(keep) == bytes_of(shrunk)


def test_tied_weights_and_shared_modules_count_once_as_parameters_and_each_time_as_macs():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.again = nn.Linear(8, 8)
            self.again.weight = self.second.weight

        def forward(self, x):
            x = F.relu(self.first(x))
            return self.head(self.again(F.relu(self.second(F.relu(self.second(x))))))

    model, inputs = Tied(), (torch.randn(2, 6),)
    cost, groups = cost_of(model, inputs)
    assert cost.macs({}) == 6 * 8 + 3 * 8 * 8 + 8 * 3
    assert cost.parameters({}) == (6 * 8 + 8) + (8 * 8 + 8) + 8 + (8 * 3 + 3)
    keep = keep_at_random(groups, np.random.default_rng(1))
    shrunk = apply(model, Plan("test", removal(keep)))
    assert (cost.macs(keep), cost.parameters(keep)) == (macs(shrunk, inputs).value, parameters(shrunk).value)


def test_a_unit_that_holds_two_positions_of_a_tensor_costs_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(4, 6), nn.Linear(12, 5), nn.Linear(5, 2)

        def forward(self, x):
            x = self.a(x)
            return self.fc(self.b(torch.cat([x, F.relu(x)], 1)))

    model, inputs = Twice(), (torch.randn(2, 4),)
    cost, groups = cost_of(model, inputs)
    for group in groups:
        for unit in range(group.units if group.frozen is None else 0):
            keep = {group: np.arange(group.units) != unit}
            shrunk = apply(model, Plan("test", removal(keep)))
            assert cost.macs(keep) == macs(shrunk, inputs).value
            assert cost.parameters(keep) == parameters(shrunk).value


def test_resolutions_count_the_positions_of_the_producer():
    model = Residual()
    graph = trace(model, (torch.randn(2, 3, 8, 8),))
    groups = tuple(find_groups(graph, model))
    found = {group.name: count for group, count in zip(groups, resolutions(graph, model, groups), strict=True)}
    assert found["stem"] == 2 * 8 * 8 and found["conv1"] == 2 * 8 * 8
    assert found["up"] == 2 * 16 * 16 and found["fc1"] == 2
