"""What a forward says of sizes: which attributes follow which channels, what hangs together, what a literal holds."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.edit import Attribute
from tersor.graph.axis import Leaf
from tersor.graph.equations import Polynomial, Unsolvable, constant, of_symbol
from tersor.graph.group import removal
from tersor.graph.groups import groups_of
from tersor.graph.sizes import Held


class Net(nn.Module):
    """Attributes and layers by name, and a forward given as a function of (module, x)."""

    def __init__(self, how, **parts):
        super().__init__()
        self.how = how
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.how(self, x)


def found(net, width=8):
    return groups_of(net.eval(), (torch.randn(2, 5, width),))


def named(groups, name):
    return next(group for group in groups if group.name == name)


def after(kept):
    """(module, attribute) → its value after the removal: group → how many units stay."""
    keep = {group: np.arange(group.units) < count for group, count in kept.items()}
    return {(e.module, e.name): e.value for e in removal(keep) if isinstance(e, Attribute)}


def test_polynomials_multiply_divide_and_cancel():
    a, b = Leaf(4), Leaf(6)
    x, y = of_symbol(a), of_symbol(b)
    assert x * y * x.inverse() == y and x + y == y + x and x + x == x.scaled(Fraction(2))
    assert (x + y.scaled(Fraction(-1))) + y == x and constant(0) == Polynomial({}) and x * constant(0) == constant(0)
    assert (x + constant(1)) * (x + constant(-1)) == x * x + constant(-1)
    assert (x * y + constant(2)).value({a: 3}) == 20 and (x * y.inverse()).value({}) == Fraction(2, 3)
    with pytest.raises(Unsolvable):
        (x + y).inverse()


def test_an_attribute_is_replaced_by_what_it_is_in_every_power():
    leaf, held = Leaf(4), Held("", "width")
    width = of_symbol(held)
    known = {held: of_symbol(leaf).scaled(Fraction(3))}
    assert (width * width).replaced(known).value({}) == 144 and width.inverse().replaced(known).value(
        {leaf: 2}
    ) == Fraction(1, 6)
    assert width.replaced({}) is width


def attention(net, x):
    """Hand-written: heads an attribute, the width of the stream heads × head size."""
    b, t, c = x.shape
    q, k, v = (y.view(b, t, net.heads, c // net.heads).transpose(1, 2) for y in net.qkv(x).split(net.width, dim=2))
    y = F.scaled_dot_product_attention(q, k, v)
    return net.out(y.transpose(1, 2).reshape(b, t, c))


def attending(how=attention, wide=8, **more):
    layers = dict(qkv=nn.Linear(8, 3 * wide), out=nn.Linear(wide, 8), stem=nn.Linear(8, 8), head=nn.Linear(8, 3))
    block = Net(how, **{**layers, "heads": 4, "width": 8, **more})
    return Net(lambda net, x: net.block.head(net.block(y := net.block.stem(x)) + y), block=block)


def test_a_stream_that_is_viewed_as_heads_is_as_wide_as_heads_times_their_size():
    groups = found(attending())
    chosen = {group.name: group for group in groups.prunable("whole") if group.frozen is None}
    stream, heads = chosen["block.stem"], chosen["block.qkv:heads"]
    assert stream.share == heads.share is not None, "c = heads × head size with the head size as it was"
    values = after({stream: 6, heads: 3})
    assert values["block", "heads"] == 3 and values["block", "width"] == 6
    assert values["block.qkv", "in_features"] == 6 and values["block.qkv", "out_features"] == 18
    assert values["block.out", "in_features"] == values["block.out", "out_features"] == 6


def test_the_same_inside_heads_leaves_their_number():
    chosen = {group.name: group for group in found(attending()).prunable("inside") if group.frozen is None}
    stream, inside = chosen["block.stem"], chosen["block.qkv:inside"]
    assert stream.share == inside.share is not None
    values = after({stream: 4, inside: 1})
    assert values["block", "width"] == 4 and ("block", "heads") not in values
    assert values["block.qkv", "out_features"] == 12


def own_width(net, x):
    """Heads × head size apart from the stream's width, all attributes."""
    q, k, v = (y.unflatten(-1, (net.heads, net.size)).transpose(1, 2) for y in net.qkv(x).split(net.inner, dim=-1))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return net.out(y.reshape(*x.shape[:2], net.heads * net.size))


def test_an_inner_width_of_its_own_is_free_of_the_stream():
    groups = found(attending(own_width, 16, size=4, inner=16))
    chosen = {group.name: group for group in groups.prunable("whole") if group.frozen is None}
    assert chosen["block.stem"].share is None and chosen["block.qkv:heads"].share is None
    values = after({chosen["block.qkv:heads"]: 1})
    assert (values["block", "heads"], values["block", "inner"]) == (1, 4) and ("block", "size") not in values
    inside = named(groups.prunable("inside"), "block.qkv:inside")
    values = after({inside: 3})
    assert (values["block", "size"], values["block", "inner"]) == (3, 12) and ("block", "heads") not in values


def halves(sizes):
    def forward(net, x):
        a, b = net.a(x).split(sizes(net), dim=-1)
        return net.b(a) + net.c(b)

    return Net(forward, a=nn.Linear(8, 10), b=nn.Linear(6, 3), c=nn.Linear(4, 3), first=6, second=4, sides=(6, 4))


@pytest.mark.parametrize("sizes", [lambda net: [net.first, net.second], lambda net: list(net.sides)])
def test_parts_whose_sizes_are_attributes_shrink_apart(sizes):
    groups = found(halves(sizes))
    first, second = named(groups, "a[0:6]"), named(groups, "a[6:10]")
    assert first.frozen is second.frozen is None
    values = after({first: 5, second: 1})
    assert values["a", "out_features"] == 6 and values["b", "in_features"] == 5 and values["c", "in_features"] == 1
    named_sizes = {key: value for key, value in values.items() if not key[0]}
    assert named_sizes in ({("", "first"): 5, ("", "second"): 1}, {("", "sides"): (5, 1)})
    assert after({second: 2}).get(("", "sides"), (6, 2)) == (6, 2), "one entry of a tuple leaves the others"


def test_a_difference_of_attributes_follows_too():
    def forward(net, x):
        a, b = net.a(x).split([net.first, net.whole - net.first], dim=-1)
        return net.b(a) + net.c(b)

    net = Net(forward, a=nn.Linear(8, 10), b=nn.Linear(6, 3), c=nn.Linear(4, 3), first=6, whole=10)
    groups = found(net)
    values = after({named(groups, "a[0:6]"): 2, named(groups, "a[6:10]"): 3})
    assert values["", "first"] == 2 and values["", "whole"] == 5


def literals():
    reads = {"b": nn.Linear(6, 3)}
    return {
        "view": (lambda net, x: net.b(net.a(x).view(2, 5, 6)), reads),
        "split": (lambda net, x: sum(map(net.b, net.a(x).split(6, -1))), {"a": nn.Linear(8, 12), **reads}),
        "slice": (lambda net, x: net.b(net.a(x)[..., :6]), {"a": nn.Linear(8, 7), **reads}),
        "layer_norm": (lambda net, x: net.b(F.layer_norm(net.a(x), (6,))), reads),
        "a comparison in the forward": (lambda net, x: net.b(net.a(x).view(2, 5, int(net.width))), reads),
    }


@pytest.mark.parametrize("operator", literals())
def test_a_literal_freezes_its_channels_and_says_where_it_is(operator):
    how, layers = literals()[operator]
    groups = found(Net(how, **{"a": nn.Linear(8, 6), "width": 6, **layers}))
    expected = "view" if operator.startswith("a comparison") else operator
    frozen = [group.frozen for group in groups if group.name.startswith("a") and group.frozen]
    assert frozen and all("has its size as a literal in the forward at <model>:" + expected in text for text in frozen)
    assert not [group for group in groups.prunable() if group.name == "a" and group.frozen is None]


@pytest.mark.parametrize("literal", [True, False])
def test_a_sum_of_sizes_follows_an_attribute_and_freezes_for_a_literal(literal):
    def forward(net, x):
        joined = torch.cat([net.a(x), net.b(x)], -1)
        rows = 3 if literal else net.rows
        return net.d(net.c(joined.view(2, 5, rows, -1)).transpose(2, 3).relu().mean(-1))

    net = Net(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 4), c=nn.Linear(4, 3), d=nn.Linear(3, 3), rows=3)
    groups = found(net)
    rows = [group for group in groups if group.units == 2]
    if literal:
        assert rows == [] and named(groups, "a").units == 4 and not named(groups, "a").frozen, (
            "what is inside the rows may still go"
        )
    else:
        assert rows[0].frozen is None and after({rows[0]: 1})["", "rows"] == 2


class Config:
    """A plain object that several modules share."""

    def __init__(self):
        self.num_heads, self.head_dim, self.hidden = 4, 2, 8


class Configured(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Config()
        self.first, self.second = Layer(self.config), Layer(self.config)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.values, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        v = self.values(x).view(*x.shape[:2], self.config.num_heads, self.config.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(v, v, v).transpose(1, 2)
        return self.out(y.reshape(*x.shape[:2], self.config.num_heads * self.config.head_dim))


def test_layers_that_share_a_config_field_keep_the_same_share():
    groups = found(Configured())
    heads = [group for group in groups.prunable("whole") if group.kind == "head"]
    assert [group.name for group in heads] == ["first.values:heads", "second.values:heads"]
    assert heads[0].share == heads[1].share is not None and not any(group.frozen for group in heads)
    values = after({heads[0]: 3, heads[1]: 3})
    assert [value for (_, name), value in values.items() if name == "config.num_heads"] == [3]
    assert values["first.out", "in_features"] == values["second.out", "in_features"] == 6
