"""Sizes remember where they come from while a model is captured, and nothing of that stays afterwards."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.errors import GraphError
from tersor.graph.sizes import Book, Computed, Dim, Held, Size, function_key, source_of, watched
from tersor.graph.trace import trace

HEADS, WIDTH = Held("", "heads"), Held("", "width")


def sizes():
    book = Book()
    return Size(4, HEADS, book), Size(12, WIDTH, book), book


@pytest.mark.parametrize(
    "compute, value, source",
    [
        (lambda h, w: h + 3, 7, Computed("+", HEADS, 3)),
        (lambda h, w: 3 + h, 7, Computed("+", 3, HEADS)),
        (lambda h, w: w - h, 8, Computed("-", WIDTH, HEADS)),
        (lambda h, w: 20 - h, 16, Computed("-", 20, HEADS)),
        (lambda h, w: h * w, 48, Computed("*", HEADS, WIDTH)),
        (lambda h, w: 2 * h, 8, Computed("*", 2, HEADS)),
        (lambda h, w: w // h, 3, Computed("//", WIDTH, HEADS)),
        (lambda h, w: 24 // w, 2, Computed("//", 24, WIDTH)),
        (lambda h, w: -h, -4, Computed("-", 0, HEADS)),
        (lambda h, w: (w // h) * h + 1, 13, Computed("+", Computed("*", Computed("//", WIDTH, HEADS), HEADS), 1)),
        (lambda h, w: math.prod([h, 2, w]), 96, Computed("*", Computed("*", Computed("*", 1, HEADS), 2), WIDTH)),
        (lambda h, w: sum([h, w]), 16, Computed("+", Computed("+", 0, HEADS), WIDTH)),
    ],
)
def test_arithmetic_keeps_what_a_size_is_computed_from(compute, value, source):
    heads, width, book = sizes()
    result = compute(heads, width)
    assert isinstance(result, Size) and int(result) == value
    # a product that starts at one and a sum that starts at zero say the same without them
    assert source_of(result) in (source, _without_neutral(source))
    assert result.book is book


def _without_neutral(source):
    if not isinstance(source, Computed):
        return source
    left, right = _without_neutral(source.left), _without_neutral(source.right)
    return right if (source.operation, left) in {("*", 1), ("+", 0)} else Computed(source.operation, left, right)


@pytest.mark.parametrize("compute", [lambda h: h % 3, lambda h: h**2, int, lambda h: max(int(h), 2), lambda h: h | 1])
def test_other_arithmetic_gives_plain_integers_which_count_as_literals(compute):
    result = compute(sizes()[0])
    assert not isinstance(result, Size) and source_of(result) == int(result)


def test_floats_and_booleans_are_no_sizes():
    heads, _, _ = sizes()
    assert (heads * 0.5, heads / 8, heads**-0.5) == (2.0, 0.5, 0.5)
    assert not isinstance(heads * True, Size) and not isinstance(0.5 * heads, Size)


def test_sizes_that_are_found_equal_are_remembered_and_unequal_or_literal_ones_are_not():
    heads, width, book = sizes()
    assert heads == 4 and heads != width and width == width and hash(heads) == hash(4)
    assert book.equal == []
    assert heads == Size(4, Held("", "other"), book) and not (heads != width // Size(3, Held("", "third"), book))
    assert book.equal == [
        (HEADS, Held("", "other")), (HEADS, Computed("//", WIDTH, Held("", "third"))),
    ]  # fmt: skip


def test_copies_of_a_size_are_plain_integers():
    heads, _, _ = sizes()
    assert type(copy.deepcopy(heads)) is int and type(copy.deepcopy([heads])[0]) is int
    function, arguments = heads.__reduce__()
    assert function(*arguments) == 4


@dataclasses.dataclass
class Config:
    heads: int = 2
    sides: tuple = (3, 5)
    name: str = "small"


class Holder(nn.Module):
    """Attributes of every kind; what the forward sees of them is kept in ``seen``."""

    def __init__(self, fails=False):
        super().__init__()
        self.heads, self.sides, self.several = 2, (4, 6), [7, 8]
        self.flag, self.one, self.mixed, self.rate = True, 1, (1, "a"), 0.5
        self.config, self.fails, self.layer = Config(), fails, nn.Linear(3, 5)

    def forward(self, x):
        found = (self.heads, self.sides, self.several, self.config.heads, self.config.sides, self.layer.out_features)
        SEEN[:] = [x.shape, x.size(1), x.numel(), self.layer.weight.shape[0], self.layer(x).shape[1], *found]
        if self.fails:
            raise RuntimeError("the forward fails")
        return x


SEEN: list = []


def plain(net):
    every = [vars(net), vars(net.config), vars(net.layer)]
    return [{name: _typed(value) for name, value in holder.items() if name[0] != "_"} for holder in every]


def _typed(value):
    return [type(value), *map(type, value), *value] if isinstance(value, (tuple, list)) else (type(value), value)


def test_the_forward_sees_attributes_and_shapes_with_their_sources():
    net = Holder()
    with watched(net) as book:
        net(torch.zeros(2, 3))
    shape, size, numel, weight, made, heads, sides, several, deep, deep_sides, features = SEEN
    assert [source_of(n) for n in shape] == [Dim(None, 0, 0), Dim(None, 0, 1)] and source_of(size) == Dim(None, 0, 1)
    assert int(numel) == 6
    assert source_of(numel) == Computed("*", Dim(None, 0, 1), Computed("*", Dim(None, 0, 0), 1))
    assert source_of(weight) == Dim(None, "layer.weight", 0)
    assert source_of(made) == Dim(function_key(F.linear, 1), 0, 1) and book.shapes[function_key(F.linear, 1), 0] == (
        2,
        5,
    )
    assert source_of(heads) == HEADS and source_of(features) == Held("layer", "out_features")
    assert type(sides) is tuple and [source_of(n) for n in sides] == [Held("", "sides", 0), Held("", "sides", 1)]
    assert type(several) is list and source_of(several[1]) == Held("", "several", 1)
    assert source_of(deep) == Held("", "config.heads") and source_of(deep_sides[1]) == Held("", "config.sides", 1)
    assert not any(isinstance(value, Size) for value in (net.flag, net.one, net.mixed[0]))


@pytest.mark.parametrize("fails", [False, True])
def test_attributes_are_put_back_after_a_capture_and_after_an_error(fails):
    net = Holder(fails)
    before, lists, has = plain(net), net.several, F.has_torch_function
    if fails:
        with pytest.raises(GraphError, match="the forward fails"):
            trace(net, (torch.zeros(2, 3),))
    else:
        trace(net, (torch.zeros(2, 3),))
    assert plain(net) == before and net.several is lists
    assert F.has_torch_function is has
    assert not net._forward_pre_hooks and not net._forward_hooks
    assert type(torch.zeros(3).shape[0]) is int


def test_what_is_inside_multi_head_attention_is_seen():
    net = nn.MultiheadAttention(8, 2, batch_first=True)
    with watched(net) as book:
        net(*[torch.randn(3, 5, 8)] * 3)
    assert not [name for name in book.calls if "multi_head_attention_forward" in name]
    views = [args for name, (args, _) in book.calls.items() if name.endswith(".view")]
    heads = [source_of(size) for args in views for size in args[1:] if isinstance(size, Size) and size == 2]
    assert any("num_heads" in str(source) for source in heads)
    widths = [source_of(size) for args in views for size in args[1:] if isinstance(size, Size) and size == 4]
    assert any(isinstance(source, Computed) and source.operation == "//" for source in widths)


def test_a_comparison_in_the_forward_is_written_into_the_book():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.width, self.layer = 3, nn.Linear(3, 5)

        def forward(self, x):
            assert x.shape[-1] == self.width
            return self.layer(x)

    with watched(net := Net()) as book:
        net(torch.zeros(2, 3))
    assert (Dim(None, 0, 1), Held("", "width")) in book.equal or (Held("", "width"), Dim(None, 0, 1)) in book.equal


def test_calls_are_counted_as_export_counts_them():
    class Net(nn.Module):
        def forward(self, x):
            return (x.relu() + x).relu().view(x.shape[0], -1)

    graph = trace(Net(), (torch.zeros(2, 3, 4),))
    names = [call.function.split()[0] for call in graph.calls]
    assert [name for name in names if name.startswith("relu")] == ["relu_1", "relu_2"]
    view = next(call for call in graph.calls if call.operator == "view")
    assert view.said is not None and source_of(view.said[0][1]) == Dim(None, 0, 0)
