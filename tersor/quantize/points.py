"""Where quantisers must stand so that ONNX Runtime computes in integers."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

import torch

from tersor.core.intercept import ATTENTION_SOFTMAX
from tersor.core.place import ActivationPlace
from tersor.core.plan import Skip
from tersor.graph.trace import Call, Graph, Ref
from tersor.quantize.weights import WEIGHTED

# The result lies on the operand's grid, and ONNX Runtime carries quantisation across: no quantiser is needed.
PASS = {
    "alias", "clone", "contiguous", "detach", "dropout", "flatten", "max_pool1d", "max_pool2d", "permute", "reshape",
    "slice", "squeeze", "t", "transpose", "unsafe_view", "unsqueeze", "view",
}  # fmt: skip
SAME = {"alias", "clone", "contiguous", "detach", "dropout"}  # in evaluation, the very same tensor
# The result lies on the operand's grid, but ONNX Runtime must see it quantised again: the same quantiser stands there.
MOVE = {
    "channel_shuffle", "chunk", "expand", "getitem", "pixel_shuffle", "pixel_unshuffle", "repeat", "roll", "select",
    "split", "split_with_sizes", "unbind", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
}  # fmt: skip
MULTIPLE = {"chunk", "split", "split_with_sizes", "unbind"}  # give several tensors; ``getitem`` takes one
# Integer kernels that take quantised operands and give a quantised result.
POOLS = {"adaptive_avg_pool2d", "avg_pool2d", "mean"}
LIGHT = POOLS | {"add", "cat", "hardsigmoid", "leaky_relu", "mul", "sigmoid"}
# x · gate(x): the operator → its gate. As modules they are split (``gates.py``).
MADE_OF = {"hardswish": "hardsigmoid", "silu": "sigmoid"}
# Products of activations, and how many of their arguments are factors.
PRODUCTS = {"matmul": 2, "bmm": 2, "scaled_dot_product_attention": 3}
# "conv2d_3.input": what that call's module is given, a value that cannot be intercepted where it is made.
INPUT = ".input"
NO_KERNEL = "no integer kernel: "  # how the reason of such a skip begins
SOFTMAX = ".softmax"  # "scaled_dot_product_attention_1.softmax": what softmax gives within that call


@dataclass
class Points:
    """The decision. ``values``: graph names to quantise, in order; ``shared``: value → the one whose quantiser it uses.

    ``weighted``: convolution and linear calls that run in integers, ``products``: products of activations that do,
    ``light``: other calls; ``source``: what each weighted call reads, as a name in ``values``; ``read``: every value
    that is quantised because a call reads it. ``absorbed``: activation functions that vanish into a quantiser.
    """

    values: dict[str, None] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    weighted: list[Call] = field(default_factory=list)
    products: list[Call] = field(default_factory=list)
    light: list[Call] = field(default_factory=list)
    source: dict[str, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    absorbed: set[str] = field(default_factory=set)

    def add_read(self, names: Iterable[str]) -> None:
        """Quantise these values, with one quantiser for all of them, because an integer kernel reads the first."""
        names = list(names)
        self.add(names)
        self.read.update(names)

    def add(self, names: Iterable[str]) -> None:
        """Quantise these values, with one quantiser for all of them."""
        names = list(names)
        for name in names:
            self.values[name] = None
            self.join(names[-1], name)

    def groups(self) -> list[tuple[str, ...]]:
        """The values that share one quantiser, each value in exactly one group."""
        found: dict[str, list[str]] = {}
        for name in self.values:
            found.setdefault(self._root(name), []).append(name)
        return [tuple(names) for names in found.values()]

    def _root(self, name: str) -> str:
        while name in self.shared:
            name = self.shared[name]
        return name

    def join(self, first: str, second: str) -> None:
        """Let both values share one quantiser."""
        a, b = self._root(first), self._root(second)
        if a != b:
            self.shared[b] = a


class Flow:
    """A graph with the questions that placing quantisers asks of it."""

    def __init__(self, graph: Graph):
        self.graph, self.calls, self.users = graph, graph.by_name(), graph.users()
        self.active = set(graph.inputs)  # what depends on the model's inputs, unlike what is made of parameters alone
        for call in graph.calls:
            if any(name in self.active for name in call.refs()):
                self.active.add(call.name)

    def source(self, name: str) -> str:
        """The value whose quantiser ``name`` needs: back over operators that quantisation is carried across."""
        return self._back(name, PASS)

    def origin(self, name: str) -> str:
        """The value on whose grid ``name`` lies: back over every operator that only moves values."""
        return self._back(name, PASS | MOVE)

    def _back(self, name: str, over: Container[str]) -> str:
        while name in self.calls and self.calls[name].operator in over:
            name = next(self.calls[name].refs())
        return name

    def factor_source(self, name: str) -> str:
        """``source`` of a product's factor: back over multiplication by a positive number too, which its scale takes
        up in the file."""
        while name in self.calls and (self.calls[name].operator in PASS or _scales(self.calls[name])):
            name = next(self.calls[name].refs())
        return name

    def factors(self, call: Call) -> list[str] | None:
        """The activations that a product multiplies; None where one is no activation of float32 in at least two axes.

        For attention that torch has as one operator: query, key, value, and what its softmax gives.
        """
        names = [name for name in call.args[: PRODUCTS[call.operator]] if name in self.active]
        if len(names) < PRODUCTS[call.operator] or call.dtype != torch.float32:
            return None
        if any(len(self.graph.shapes.get(name, ())) < 2 for name in names):
            return None
        return [*names, call.name + SOFTMAX] if call.operator == "scaled_dot_product_attention" else names

    def moved(self, name: str) -> list[str]:
        """``name`` (a source) and the sources before it, up to its origin: they share one quantiser."""
        found = [name]
        while name in self.calls and self.calls[name].operator in MOVE:
            name = self.source(next(self.calls[name].refs()))
            if name not in self.calls or self.calls[name].operator not in MULTIPLE:
                found.append(name)
        return found

    def result(self, call: Call) -> tuple[str, list[str]]:
        """The value to quantise after ``call``, and the activation functions that vanish into its quantiser.

        A sole following ReLU, or clamp from zero, is what an unsigned quantiser does anyway.
        """
        name = call.name
        while len(self.users.get(name, ())) == 1 and name not in self.graph.outputs:
            user = self.users[name][0]
            if clamps_from_zero(user):
                return user.name, [user.name]
            if user.operator not in SAME:
                break
            name = user.name
        return call.name, []

    def only_reader_is(self, name: str, reader: Call) -> bool:
        """Whether ``reader`` alone reads ``name``, directly or over operators that only move values."""
        if name in self.graph.outputs:
            return False
        return all(
            user is reader or (user.operator in PASS | MOVE and self.only_reader_is(user.name, reader))
            for user in self.users.get(name, ())
        )

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the value."""
        if name.endswith(SOFTMAX):
            query, key = (self.graph.shapes[ref] for ref in self.calls[name.removesuffix(SOFTMAX)].args[:2])
            return (*query[:-1], key[-2])
        name = self.calls[name.removesuffix(INPUT)].args[0] if name.endswith(INPUT) else name
        return self.graph.shapes.get(name)

    def is_whole_module(self, call: Call) -> bool:
        """Whether the call's module makes calls of this operator alone, so that its input is the call's operand."""
        return all(
            other.operator == call.operator and other.module == call.module
            for other in self.graph.calls
            if f"{other.module}.".startswith(f"{call.module}.") and other.name in self.active
        )

    def place(self, name: str) -> ActivationPlace:
        """Where the value is, in the model."""
        if name.endswith(INPUT):
            call = self.calls[name.removesuffix(INPUT)]
            return ActivationPlace(call.module, "input", call.ordinal)
        if name.endswith(SOFTMAX):
            call = self.calls[name.removesuffix(SOFTMAX)]
            return ActivationPlace(call.module, ATTENTION_SOFTMAX, call.ordinal)
        if name in self.graph.inputs:
            return ActivationPlace("", "input", list(self.graph.inputs).index(name))
        return self.calls[name].place

    def operands(self, call: Call) -> list[Ref] | None:
        """The activations that an elementwise, pooling or joining call reads; None where it reads anything else."""
        if call.operator in POOLS and not _is_spatial(call, self.graph):
            return None
        if call.operator == "add" and call.kwargs.get("alpha", 1) != 1:
            return None
        given = call.args[0] if call.operator == "cat" else call.args[: 2 if call.operator in ("add", "mul") else 1]
        names = [name for name in given if isinstance(name, Ref) and name in self.active]
        return names if len(names) == len(given) else None


def clamps_from_zero(call: Call) -> bool:
    """ReLU, ReLU6, or a clamp or hardtanh whose lower bound is 0."""
    if call.operator == "relu" or "relu6" in call.overload:
        return True
    if call.operator in ("clamp", "hardtanh", "clamp_min"):
        lower = call.args[1] if len(call.args) > 1 else call.kwargs.get("min", call.kwargs.get("min_val"))
        return lower is not None and not isinstance(lower, Ref) and lower == 0
    return False


def _scales(call: Call) -> bool:
    """Multiplication or division by a positive number."""
    if call.operator not in ("mul", "div") or len(call.args) != 2 or call.kwargs:
        return False
    return isinstance(call.args[1], (int, float)) and call.args[1] > 0


def upper_bound(call: Call) -> float | None:
    """Where a clamp or ReLU6 ends; None where it does not."""
    if "relu6" in call.overload:
        return 6.0
    if call.operator not in ("clamp", "hardtanh"):
        return None
    upper = call.args[2] if len(call.args) > 2 else call.kwargs.get("max", call.kwargs.get("max_val"))
    return float(upper) if isinstance(upper, (int, float)) else None


def _is_spatial(call: Call, graph: Graph) -> bool:
    """Whether a pooling call averages over the last two axes of a 4-d tensor and no others."""
    shape = graph.shapes.get(call.args[0], ())
    if len(shape) != 4:
        return False
    if call.operator != "mean":
        return True
    axes = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    return axes is not None and {axis % 4 for axis in axes} == {2, 3}


def decide(
    flow: Flow,
    weighted: Iterable[Call],
    barred: Container[str] = (),
    products: Iterable[Call] = (),
    light: Container[str] = LIGHT,
) -> Points:
    """Place the quantisers for ``weighted`` (the convolution and linear calls meant), ``products`` (the products of
    activations meant) and what lies between them.

    A weighted call's activation and its result are quantised; of a product the factors; an addition, elementwise
    product, concatenation or pooling is where all its operands are. ``barred``: values that cannot be intercepted; what
    needs them stays float. ``light``: the operators that may run in integers beside. The result of a linear layer on
    three and more axes stays float where no integer kernel reads it: ONNX Runtime's products give floats at no cost.
    """
    points = Points()
    for call in weighted:
        _place_weighted(flow, call, points, barred)
    for call in products:
        _place_product(flow, call, points, barred)
    for call in flow.graph.calls:
        if call.operator in light:
            _consider(flow, call, points, barred)
    _drop_unread_results(flow, points)
    order = {name: i for i, name in enumerate([*flow.graph.inputs, *flow.calls])}
    suffixed = [name for name in points.values if name.endswith((INPUT, SOFTMAX))]
    order |= {name: order[name.removesuffix(INPUT).removesuffix(SOFTMAX)] for name in suffixed}
    points.values = dict.fromkeys(sorted(points.values, key=order.__getitem__))
    return points


def _place_weighted(flow: Flow, call: Call, points: Points, barred: Container[str]) -> None:
    source, (result, absorbed) = flow.source(call.args[0]), flow.result(call)
    chain = [name for name in flow.moved(source) if name not in barred]
    if source in barred and flow.is_whole_module(call):
        source = call.name + INPUT
        chain = [source, *chain]
    if source in barred or result in barred or flow.origin(call.args[0]) not in flow.active:
        return
    points.weighted.append(call)
    points.source[call.name] = source
    points.add_read(chain)
    points.add([result])
    points.absorbed.update(absorbed)


def _place_product(flow: Flow, call: Call, points: Points, barred: Container[str]) -> None:
    chains = [flow.moved(flow.factor_source(name)) for name in flow.factors(call) or ()]
    if not chains or any(name in barred for chain in chains for name in chain):
        return
    points.products.append(call)
    for chain in chains:
        points.add_read(chain)


def _drop_unread_results(flow: Flow, points: Points) -> None:
    given = {flow.source(name) for name in flow.graph.outputs}
    for call in points.weighted:
        name, absorbed = flow.result(call)
        wide = call.operator == "linear" and len(call.shape or ()) > 2
        if wide and not absorbed and name not in points.read and name not in given:
            points.values.pop(name, None)


def _consider(flow: Flow, call: Call, points: Points, barred: Container[str]) -> None:
    """Let a light call run in integers where its operands are quantised."""
    names = flow.operands(call)
    if not names:
        return
    sources = [flow.source(name) for name in names]
    origins = [flow.origin(name) for name in names]
    result, absorbed = flow.result(call)
    missing = [origin for origin in origins if origin not in points.values]
    if (
        call.operator == "mul"
        and len(missing) == 1
        and len(set(origins)) == 2
        and _is_gate(flow, sources, origins, missing)
    ):
        missing = []  # a squeeze-and-excitation gate is small: quantising it costs nothing
    if missing or result in barred or any(name in barred for name in [*sources, *origins]):
        return
    points.light.append(call)
    for source in sources:
        points.add_read(flow.moved(source))
    points.add([result])
    points.absorbed.update(absorbed)
    if call.operator == "cat" and not absorbed:
        for origin in origins:
            if flow.only_reader_is(origin, call):  # its own finer grid would be lost in the result's anyway
                points.join(result, origin)


def _is_gate(flow: Flow, sources: list[str], origins: list[str], missing: list[str]) -> bool:
    sizes = {origin: math.prod(flow.graph.shapes[source]) for source, origin in zip(sources, origins, strict=True)}
    gate = sizes.pop(missing[0])
    return 8 * gate <= sum(sizes.values())


def float_calls(flow: Flow, points: Points) -> list[Skip]:
    """A Skip for every call on activations that stays in floating point, with the reason."""
    integer = {call.name for call in [*points.weighted, *points.products, *points.light]} | points.absorbed
    skips = []
    for call in flow.graph.calls:
        passing = call.operator in PASS | MOVE
        floating = call.dtype is None or call.dtype.is_floating_point  # None: several results, as recurrent layers have
        if call.name in integer or passing or not floating or call.name not in flow.active:
            continue
        if call.operator in WEIGHTED:
            continue  # said where it was decided
        if call.operator in PRODUCTS and flow.factors(call):
            reason = "stays float: left out by where, or one of its factors cannot be intercepted or is constant"
        elif call.operator in LIGHT and flow.operands(call):
            reason = "stays float: an operand of it is not quantised"
        else:
            reason = f"{NO_KERNEL}{call.operator}"
        skips.append(Skip(str(call.place), reason))
    return skips
