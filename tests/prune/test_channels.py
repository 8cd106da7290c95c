import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from tersor.core.apply import apply
from tersor.core.edit import Mask
from tersor.core.errors import GraphError, InputError
from tersor.core.place import ByName, ByType, Everything, TensorPlace
from tersor.core.plan import Plan
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.measure.compute import macs
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.scores import Random, Score


class Net(nn.Module):
    """Two convolutions and a linear layer, with a place for one odd operator in between."""

    def __init__(self, odd=lambda x: x):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.fc = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 4)
        self.odd = odd

    def forward(self, x):
        x = self.conv2(self.odd(F.relu(self.norm(self.conv1(x)))))
        return self.fc(F.relu(x).mean((2, 3)))


def task_of(net, size=8):
    return Task(net, example_inputs=(torch.randn(2, 3, size, size),))


def plan_of(net, **settings):
    return PruneChannels(**{"score": Random(), **settings}).plan(net, task_of(net))


def lines(plan):
    return {place: what.split(" of ")[0] for place, what in plan.lines}


def test_a_line_says_what_each_group_loses_and_a_skip_why_the_head_stays():
    plan = plan_of(Net())
    assert lines(plan) == {"conv1": "8 -> 4", "conv2": "16 -> 8"}
    assert [(skip.place, skip.reason) for skip in plan.skips] == [
        ("fc", "4 channels are frozen: reaches the model's output")
    ]


def test_parameters_and_macs_really_fall():
    net = Net()
    result = PruneChannels(score=Random()).run(net, task_of(net))
    inputs = (torch.randn(1, 3, 8, 8),)
    assert macs(result.model, inputs).value < 0.45 * macs(net, inputs).value
    assert result.model.conv2.weight.shape == (8, 4, 3, 3)
    assert result.facts["verified"] < 1e-4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sparsity": 0.3}, {"conv1": "8 -> 6", "conv2": "16 -> 12"}),
        ({"sparsity": 0.6, "multiple_of": 4}, {"conv1": "8 -> 4", "conv2": "16 -> 8"}),
        ({"sparsity": 0.5, "multiple_of": 8}, {"conv2": "16 -> 8"}),
        ({"sparsity": 0.99, "minimum": 3}, {"conv1": "8 -> 3", "conv2": "16 -> 3"}),
        ({"sparsity": 0.99}, {"conv1": "8 -> 1", "conv2": "16 -> 1"}),
        ({"where": ByName("conv1")}, {"conv1": "8 -> 4"}),
        ({"where": ~ByName("conv1")}, {"conv2": "16 -> 8"}),
        ({"sparsity": 0}, {}),
    ],
)
def test_kept_counts_follow_sparsity_rounding_minimum_and_where(settings, expected):
    assert lines(plan_of(Net(), **settings)) == expected


def test_a_group_that_rounding_keeps_whole_is_skipped_with_the_arithmetic():
    plan = plan_of(Net(), multiple_of=8)
    assert any(skip.place == "conv1" and "multiple_of 8" in skip.reason for skip in plan.skips)


def test_coupled_layers_that_where_leaves_out_keep_the_group():
    class Residual(Net):
        def __init__(self):
            super().__init__()
            self.conv3 = nn.Conv2d(8, 8, 1)
            self.odd = lambda x: x + self.conv3(x)

    plan = plan_of(Residual(), where=ByName("conv1"))
    assert not plan.edits
    assert "conv3, which where= leaves out" in plan.skips[0].reason


class Fixed(Score):
    """Scores by position: the first unit of each group matters least; conv2's matter less than conv1's."""

    def units(self, model, task, groups):
        return [torch.arange(g.units, dtype=torch.float64) + 100 * (g.name == "conv1") for g in groups]


def test_the_units_with_the_smallest_scores_go():
    plan = plan_of(Net(), score=Fixed())
    assert [cut.keep.tolist() for cut in plan.edits[0].cuts if cut.place == TensorPlace("conv1", "weight")] == [
        [4, 5, 6, 7]
    ]


def test_global_scope_takes_from_the_group_that_matters_least_up_to_the_cap():
    assert lines(plan_of(Net(), score=Fixed(), scope="global", sparsity=0.5)) == {"conv2": "16 -> 4"}
    plan = plan_of(Net(), score=Fixed(), scope="global", sparsity=0.75, max_sparsity=0.75)
    assert lines(plan) == {"conv1": "8 -> 2", "conv2": "16 -> 4"}


@pytest.mark.parametrize(
    "odd",
    [lambda x: x.cumsum(1), lambda x: x.sort(dim=1).values, lambda x: torch.fft.fft(x, dim=1).real],
    ids=["cumsum", "sort", "fft"],
)
def test_an_operator_that_is_not_followed_freezes_by_name(odd):
    net = Net(odd)
    plan = plan_of(net)
    assert set(lines(plan)) == {"conv2"}
    reason = next(skip.reason for skip in plan.skips if skip.place == "conv1")
    assert any(name in reason for name in ("cumsum", "sort", "fft_c2c", "fft"))
    assert PruneChannels(score=Random()).run(net, task_of(net)).facts["verified"] < 1e-4


def test_statistics_over_channels_are_taken_over_those_that_stay():
    for between in (nn.GroupNorm(2, 8), nn.LayerNorm([8, 8, 8]), lambda x: x * x.mean(1, keepdim=True)):
        net = Net(between)
        result = PruneChannels(score=Random()).run(net, task_of(net))
        assert result.model.conv1.out_channels == 4
        assert result.facts["verified"] < 1e-5


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: x.view(2, 8, 64).view(2, 8, 8, 8),
        lambda x: torch.cat(x.split(4, 1)[::-1], 1),
        lambda x: x.view(2, 2, 4, 8, 8).transpose(1, 2).reshape(x.shape),
    ],
    ids=["view", "split", "shuffle"],
)
def test_a_size_that_is_a_literal_in_the_forward_is_skipped_by_name(odd):
    net = Net(odd)
    before = copy.deepcopy(net.state_dict())
    plan = plan_of(net)
    assert set(lines(plan)) == {"conv2"}
    reason = next(skip.reason for skip in plan.skips if skip.place == "conv1")
    assert "literal in the forward" in reason
    assert "at <model>" in reason
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_sizes_taken_from_the_tensor_are_followed():
    def odd(x):
        batch, channels, height, width = x.shape
        x = torch.cat([part * 2 for part in x.chunk(2, 1)], 1)
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)

    assert lines(plan_of(Net(odd))) == {"conv1": "8 -> 4", "conv2": "16 -> 8"}


def test_a_forward_that_computes_with_the_number_of_channels_is_skipped_by_name():
    def odd(x):
        return x if x.shape[1] == 8 else x.flip(1)

    net = Net(odd)
    result = PruneChannels(score=Random()).run(net, task_of(net))
    (reason,) = [skip.reason for skip in result.plans[0].skips if skip.place == "conv1"]
    assert "computes with its size" in reason
    assert (result.model.conv1.out_channels, result.model.conv2.out_channels) == (8, 8)


def test_what_breaks_training_alone_is_skipped_by_name():
    class Noisy(Net):
        def forward(self, x):
            x = torch.relu(self.norm(self.conv1(x)))
            x = x + torch.randn(1, 8, 1, 1) if self.training else x
            return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))

    net = Noisy()
    result = PruneChannels(score=Random()).run(net, task_of(net))
    (reason,) = [skip.reason for skip in result.plans[0].skips if skip.place == "conv1"]
    assert "as it trains" in reason or "fails without it" in reason
    result.model.train()(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 1.0}, {"sparsity": -0.1}, {"sparsity": math.nan}, {"minimum": 0}, {"multiple_of": 0},
        {"scope": "block"}, {"max_sparsity": 1.0}, {"where": ByName("nothing.*")}, {"where": ByType("Conv9d")},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_input_errors(settings):
    with pytest.raises(InputError):
        plan_of(Net(), **settings)


def test_a_masked_model_is_refused():
    net = Net()
    keep = torch.rand(net.conv2.weight.shape) > 0.5
    masked = apply(net, Plan("mask", (Mask(TensorPlace("conv2", "weight"), keep),)))
    with pytest.raises(InputError, match="Prune channels first"):
        plan_of(masked)


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
def test_masks_of_torchs_own_and_quantised_layers_are_refused():
    net = Net()
    prune.l1_unstructured(net.conv1, "weight", 0.5)
    with pytest.raises(InputError, match=r"conv1.*torch.nn.utils.prune"):
        plan_of(net)
    net = Net()
    net.fc = torch.ao.nn.quantized.dynamic.Linear(16, 4)
    with pytest.raises(InputError, match=r"fc.*quantised layers"):
        plan_of(net)


def test_the_whole_choice_is_tried_on_one_copy_and_halves_only_where_it_fails(monkeypatch):
    tried = []

    def counted(model, plan, **options):
        tried.append(plan.method)
        return apply(model, plan, **options)

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 6), *(nn.Linear(6, 6) for _ in range(7)), nn.Linear(6, 2))
            self.least = 0

        def forward(self, x):
            for number, layer in enumerate(self.layers):
                x = layer(x)
                assert number != 4 or x.shape[-1] >= self.least
            return x

    monkeypatch.setattr("tersor.prune.structured.trial.apply", counted)
    net = Deep()
    task = Task(net, example_inputs=(torch.randn(2, 3),))
    assert len(PruneChannels(score=Random()).plan(net, task).lines) == 8
    assert tried == ["trial"]
    net.least = 6
    plan = PruneChannels(score=Random()).plan(net, task)
    assert len(plan.lines) == 7
    assert [skip.place for skip in plan.skips if "fails without it" in skip.reason] == ["layers.4"]
    assert len(tried) == 1 + 7 + 1  # all; 3 pairs of halves; the others again


def test_a_forward_that_cannot_be_captured_is_a_graph_error():
    with pytest.raises(GraphError):
        plan_of(Net(lambda x: x if x.sum() > 0 else -x))


def test_the_method_is_a_frozen_step_with_defaults():
    method = PruneChannels()
    assert isinstance(method, Method)
    assert method == PruneChannels(where=Everything())
    with pytest.raises(AttributeError):
        method.sparsity = 0.1


class Attention(nn.Module):
    """Four heads of six; the width is their product, which the forward takes from its attributes."""

    def __init__(self):
        super().__init__()
        self.heads, self.size = 4, 6
        self.embed = nn.Linear(5, 24)
        self.q, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.out, self.norm, self.fc = nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 3)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (f(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.fc(self.norm(x + self.out(y)))


@pytest.mark.parametrize(("heads", "expected"), [("whole", (2, 6)), ("inside", (4, 3))])
def test_attention_loses_whole_heads_or_channels_inside_each(heads, expected):
    net = Attention()
    task = Task(net, example_inputs=(torch.randn(2, 7, 5),))
    method = PruneChannels(heads=heads, score=Random())
    model = method.run(net, task).model
    assert (model.heads, model.size) == expected
    assert model.q.out_features == 12 and model.embed.out_features == 12
    line = next(what for place, what in method.plan(net, task).lines if place.startswith("q"))
    assert ("(4 -> 2 heads)" in line) == (heads == "whole")


class Tied(Attention):
    """The embedding's width is viewed as heads × head size: all three can only shrink in step."""

    def forward(self, x):
        x = self.embed(x)
        b, t, width = x.shape
        q, k, v = (f(x).view(b, t, self.heads, width // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width)
        return self.fc(self.norm(x + self.out(y)))


def test_sizes_that_the_forward_ties_keep_the_same_fraction():
    net = Tied()
    task = Task(net, example_inputs=(torch.randn(2, 7, 5),))
    for sparsity, heads, width in ((0.5, 2, 12), (0.3, 3, 18), (0.2, 4, 24)):
        model = PruneChannels(sparsity, score=Random()).run(net, task).model
        assert (model.heads, model.embed.out_features, model.q.out_features) == (heads, width, width)


def test_a_layer_that_shares_its_fraction_with_one_that_stays_is_skipped_by_its_name():
    net = Tied()
    plan = PruneChannels(score=Random(), where=~ByName("embed")).plan(
        net, Task(net, example_inputs=(torch.randn(2, 7, 5),))
    )
    assert not plan.edits
    assert any("must keep the same fraction as embed" in skip.reason for skip in plan.skips), plan.skips


def test_a_model_without_weights_is_planned_on_the_meta_device():
    with torch.device("meta"):
        net, x = Net(), torch.empty(2, 3, 8, 8)
    plan = PruneChannels(score=Random()).plan(net, Task(net, example_inputs=(x,)))
    assert lines(plan) == {"conv1": "8 -> 4", "conv2": "16 -> 8"}
    with pytest.raises(InputError, match="no weights to score"):
        PruneChannels().plan(net, Task(net, example_inputs=(x,)))
