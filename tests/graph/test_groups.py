import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.graph.group import removal
from tersor.graph.groups import find_groups
from tersor.graph.trace import trace


class Module(nn.Module):
    """Layers by name, and a forward given as a function of (module, x)."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.rule = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *x):
        return self.rule(self, *x)


def groups_of(net, *inputs):
    inputs = inputs or (torch.randn(2, 3, 5, 7),)
    return {group.name: group for group in find_groups(trace(net.eval(), inputs), net)}


def units(group, place, dim):
    """position → unit, −1 where the position is another group's."""
    axis = next(axis for axis in group.axes if str(axis.place) == place and axis.dim == dim)
    found = np.full(axis.size, -1)
    found[axis.positions] = axis.units
    return found.tolist()


def test_an_addition_couples_its_operands_and_their_norms():
    def forward(net, x):
        return net.c(net.norm(net.a(x)) + net.b(x))

    net = Module(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), c=nn.Conv2d(4, 2, 1))
    group = groups_of(net)["a"]
    assert group.units == 4
    assert {(str(axis), axis.role) for axis in group.axes} == {
        ("a.weight[0]", "producer"), ("b.weight[0]", "producer"), ("c.weight[1]", "consumer"),
        ("a.bias[0]", "bystander"), ("b.bias[0]", "bystander"), ("norm.weight[0]", "bystander"),
        ("norm.bias[0]", "bystander"), ("norm.running_mean[0]", "bystander"), ("norm.running_var[0]", "bystander"),
    }  # fmt: skip
    assert {(a.module, a.name) for a in group.attributes} == {
        ("a", "out_channels"), ("b", "out_channels"), ("norm", "num_features"), ("c", "in_channels"),
    }  # fmt: skip
    assert str(group) == "a: 4 channels, together with b; read by c"


def test_a_concatenation_joins_groups_in_its_reader():
    def forward(net, x):
        return net.c(torch.cat([net.a(x), net.b(x)], 1))

    found = groups_of(Module(forward, a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 3, 1), c=nn.Conv2d(5, 2, 1)))
    assert units(found["a"], "c.weight", 1) == [0, 1, -1, -1, -1]
    assert units(found["b"], "c.weight", 1) == [-1, -1, 0, 1, 2]


def test_flattened_positions_follow_their_channel():
    def forward(net, x):
        return net.b(F.adaptive_avg_pool2d(net.a(x), (1, 3)).flatten(1))

    found = groups_of(Module(forward, a=nn.Conv2d(3, 2, 1), b=nn.Linear(6, 2)))
    assert units(found["a"], "b.weight", 1) == [0, 0, 0, 1, 1, 1]


def test_channels_last_flattening_interleaves():
    def forward(net, x):
        return net.b(F.adaptive_avg_pool2d(net.a(x), (1, 3)).permute(0, 2, 3, 1).reshape(2, -1))

    found = groups_of(Module(forward, a=nn.Conv2d(3, 2, 1), b=nn.Linear(6, 2)))
    assert units(found["a"], "b.weight", 1) == [0, 1, 0, 1, 0, 1]


def test_a_depthwise_convolution_follows_its_input_and_its_groups_shrink():
    def forward(net, x):
        return net.c(net.b(net.a(x)))

    found = groups_of(Module(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 8, 3, groups=4), c=nn.Conv2d(8, 2, 1)))
    assert set(found) == {"a", "c"}
    assert units(found["a"], "b.weight", 0) == units(found["a"], "c.weight", 1) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {"groups", "in_channels", "out_channels"} == {a.name for a in found["a"].attributes if a.module == "b"}


def test_a_grouped_convolution_keeps_equally_many_in_every_group():
    def forward(net, x):
        return net.c(net.b(net.a(x)))

    found = groups_of(Module(forward, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 4, 3, groups=2), c=nn.Conv2d(4, 2, 1)))
    assert units(found["a"], "a.weight", 0) == [0, 1, 2, 0, 1, 2]
    assert units(found["a"], "b.weight", 1) == [0, 1, 2]
    assert units(found["b"], "c.weight", 1) == [0, 1, 0, 1]
    assert "groups" not in {a.name for a in found["a"].attributes}


def test_equal_parts_of_a_split_are_coupled_and_unequal_ones_freeze():
    layers = {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(3, 2, 1)}
    found = groups_of(Module(lambda net, x: net.b(net.a(x).chunk(2, 1)[0]), **layers))
    assert units(found["a"], "a.weight", 0) == [0, 1, 2, 0, 1, 2]
    found = groups_of(Module(lambda net, x: net.b(net.a(x).split([3, 2, 1], 1)[0]), **layers))
    assert "literal in the forward at <model>:split" in found["a[0:3]"].frozen
    found = groups_of(Module(lambda net, x: net.b(net.a(x).split(3, 1)[0]), **layers))
    assert "literal in the forward at <model>:split" in found["a"].frozen


def test_a_channel_shuffle_is_followed_through_its_views():
    def forward(net, x):
        x = net.a(x)
        return net.b(x.view(2, 2, 3, 5, 7).transpose(1, 2).reshape(2, 6, 5, 7))

    found = groups_of(Module(forward, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 2, 1)))
    assert units(found["a"], "a.weight", 0) == [0, 1, 2, 0, 1, 2]
    assert units(found["a"], "b.weight", 1) == [0, 0, 1, 1, 2, 2]


def test_a_gate_couples_what_it_multiplies():
    def forward(net, x):
        x = net.a(x)
        return net.c(x * torch.sigmoid(net.gate(x.mean((2, 3), keepdim=True))))

    found = groups_of(Module(forward, a=nn.Conv2d(3, 4, 1), gate=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 2, 1)))
    assert [str(axis) for axis in found["a"].producers] == ["a.weight[0]", "gate.weight[0]"]
    assert found["a"].frozen is None


def test_tied_and_shared_weights_come_together():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    net = Module(lambda net, x: net.c(net.b(net.a(net.first(x)))), first=nn.Linear(3, 4), a=a, b=b, c=nn.Linear(4, 2))
    found = groups_of(net, torch.randn(2, 3))
    group = found["first"]
    assert {str(axis.place) for axis in group.axes if axis.dim == 1} == {"a.weight", "c.weight"}
    assert {(x.module, x.name) for x in group.attributes if x.module in "ab"} == {
        (module, name) for module in "ab" for name in ("in_features", "out_features")
    }
    assert len(found) == 2


def test_an_embedding_makes_channels():
    net = Module(lambda net, x: net.b(net.a(x)), a=nn.Embedding(10, 4), b=nn.Linear(4, 2))
    group = groups_of(net, torch.randint(10, (2, 5)))["a"]
    assert units(group, "a.weight", 1) == units(group, "b.weight", 1) == [0, 1, 2, 3]
    assert ("a", "embedding_dim") in {(a.module, a.name) for a in group.attributes}


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda x: x.cumprod(1), "run along by <model>:cumprod[0]"),
        (lambda x: x.softmax(1), "run along by <model>:softmax[0]"),
        (
            lambda x: x.median(1, keepdim=True).values + x,
            "passes through <model>:median[0], an operator without a rule",
        ),
        (lambda x: F.layer_norm(x, x.shape[1:]), None),
        (lambda x: F.layer_norm(x, (4, 5, 7)), "literal in the forward at <model>:layer_norm[0]"),
        (lambda x: x[:, [1, 0, 2, 3]], "read by position at <model>:index[0]"),
        (lambda x: torch.stack([x[:, 3 - i] for i in range(4)], 1), "read by position at <model>:select[0]"),
        (lambda x: x + torch.arange(4.0).reshape(1, 4, 1, 1), "meets what <model>:arange[0] makes"),
        (lambda x: torch.stack(list(x.unbind(1))[::-1], 1), "taken apart by <model>:unbind[0]"),
        (lambda x: torch.einsum("bchw,bdhw->bchw", x, x), None),
        (lambda x: x.view(2, 4, -1).view_as(x), "literal in the forward at <model>:view[0]"),
        (lambda x: x.flatten(2).transpose(1, 2).reshape(2, -1).view(2, 5, 7, -1).permute(0, 3, 1, 2), None),
        (lambda x: x.transpose(1, 3).transpose(1, 3), None),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)), "cropped or mirrored by <model>:"),
        (lambda x: x.softmax(3).amax(2, keepdim=True) * x, None),
    ],
)
def test_what_sees_channels_one_by_one_freezes_and_what_does_not_lets_them_go(between, reason):
    net = Module(lambda net, x: net.b(between(net.a(x))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))
    frozen = groups_of(net)["a"].frozen
    assert frozen is None if reason is None else reason in frozen


def test_a_weight_that_the_forward_computes_is_followed():
    def forward(net, x):
        weight = net.b.weight
        return F.conv2d(net.a(x), (weight - weight.mean((1, 2, 3), keepdim=True)))

    found = groups_of(Module(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)))
    assert found["a"].frozen is None and units(found["a"], "b.weight", 1) == [0, 1, 2, 3]
    assert [str(axis) for axis in found["b"].producers] == ["b.weight[0]"]


def test_an_addition_to_the_models_input_freezes():
    found = groups_of(Module(lambda net, x: net.b(net.a(x) + x), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 2, 1)))
    assert found["a"].frozen == "meets the model's input at <model>:add[0]"
    assert found["b"].frozen == "reaches the model's output"


def test_only_the_channels_that_leave_are_frozen():
    def forward(net, x):
        x = torch.cat([net.a(x), net.b(x)], 1)
        return net.c(x), x[:, 4:]

    layers = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 4, 1), "c": nn.Conv2d(8, 2, 1)}
    found = groups_of(Module(forward, **layers))
    assert found["b"].frozen == "reaches the model's output"
    assert "literal in the forward at <model>:slice[0]" in found["a"].frozen  # the 4 of [:, 4:]
    found = groups_of(Module(lambda net, x: (net.c(torch.cat([net.a(x), net.b(x)], 1)), net.b(x)), **layers))
    assert found["a"].frozen is None
    assert found["b"].frozen == "reaches the model's output"


def test_finding_does_not_change_the_model():
    net = Module(lambda net, x: net.b(net.a(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)).train()
    graph = trace(net, (torch.randn(2, 3, 5, 7),))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert len(find_groups(graph, net).describe()) == 2
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_densely_connected_net_takes_well_under_two_seconds():
    class Dense(nn.Module):
        def __init__(self, layers=40, growth=32):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(64 + i * growth, growth, 1) for i in range(layers))
            self.norms = nn.ModuleList(nn.BatchNorm2d(64 + i * growth) for i in range(layers))
            self.stem, self.head = nn.Conv2d(3, 64, 1), nn.Conv2d(64 + layers * growth, 10, 1)

        def forward(self, x):
            features = [self.stem(x)]
            for conv, norm in zip(self.convs, self.norms, strict=True):
                features.append(conv(F.relu(norm(torch.cat(features, 1)))))
            return self.head(torch.cat(features, 1))

    net = Dense().eval()
    graph = trace(net, (torch.randn(2, 3, 4, 4),))
    start = time.process_time()
    groups = find_groups(graph, net)
    assert time.process_time() - start < 2
    assert len(groups) == 42


def test_a_table_that_makes_and_reads_is_one_tied_axis():
    net = Module(lambda net, x: F.linear(net.a(x), net.a.weight), a=nn.Embedding(10, 4))
    graph = trace(net, (torch.randint(10, (2, 5)),))
    group = next(group for group in find_groups(graph, net) if group.frozen is None)
    assert [(str(axis), axis.role) for axis in group.axes] == [("a.weight[1]", "producer"), ("a.weight[1]", "consumer")]
    (removal_, *_) = removal({group: np.array([True, False, True, True])})
    assert [(cut.dim, cut.role, cut.keep.tolist()) for cut in removal_.cuts] == [(1, "consumer", [0, 2, 3])]


def test_modules_that_only_training_uses_are_named():
    def forward(net, x):
        x = net.a(x)
        return (net.b(x), net.aux(x)) if net.training else net.b(x)

    net = Module(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1), aux=nn.Conv2d(4, 2, 1)).eval()
    assert find_groups(trace(net, (torch.randn(2, 3, 5, 7),)), net).unread == ("aux",)


def test_only_the_output_that_the_task_picks_must_stay_whole():
    def forward(net, x):
        features = net.a(x)
        return {"features": features, "logits": net.b(features), "none": None}

    net, inputs = Module(forward, a=nn.Linear(3, 8), b=nn.Linear(8, 2)), (torch.randn(2, 3),)
    graph = trace(net, inputs)

    def frozen(output_of):
        return next(group for group in find_groups(graph, net, output_of=output_of) if group.name == "a").frozen

    assert frozen(None) == "reaches the model's output"
    assert frozen(lambda found: found["logits"]) is None
    assert frozen(lambda found: found["features"]) is not None
    assert frozen(lambda found: found["logits"] + 1) is not None  # which outputs it computes with is not known
