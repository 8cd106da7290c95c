"""Between which layers a positive factor per channel may wander without changing what the model computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.edit import Write
from tersor.core.errors import InputError
from tersor.core.place import TensorPlace, aliases, module_at
from tersor.core.plan import Skip
from tersor.graph.trace import Call, Graph, Ref
from tersor.observe.layerwise import held_otherwise
from tersor.quantize.carry import Refused, Value, carried
from tersor.quantize.weights import (
    CONVOLUTIONS,
    TRANSPOSED,
    WEIGHTED,
    bias_place,
    groups,
    has_bias,
    stored,
    weight_place,
)

NORMS = {"batch_norm": (1, 2), "layer_norm": (2, 3), "group_norm": (2, 3), "rms_norm": (2, 3)}  # weight, bias
PRODUCTS = {"addmm": 2, "matmul": 1, "mm": 1}  # where the weight [in, out] is


@dataclass(frozen=True, eq=False)
class Touched:
    """A tensor, and of each element the number of the channel it belongs to.

    ``channels``: int64, broadcasts to the tensor's shape ([outputs, 1, 1, 1] of a weight's rows); -1: to none.
    """

    place: TensorPlace
    channels: Tensor


@dataclass(frozen=True, eq=False)
class Pair:
    """A call that makes channels, and every call that reads them, with operators between them that commute.

    With any positive factor f [size], ``weights`` and ``biases`` times f[channels] and ``readers`` divided by
    f[channels] leave the function as it is. ``biases``: what the producer adds, if it adds anything.
    """

    producer: Call
    size: int
    weights: tuple[Touched, ...]
    biases: tuple[Touched, ...]
    readers: tuple[Touched, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that hold what is touched, the producer's first."""
        return tuple(dict.fromkeys(each.place.module for each in (*self.weights, *self.biases, *self.readers)))


def commuting(model: nn.Module, graph: Graph) -> tuple[list[Pair], list[Skip]]:
    """Every pair in the captured graph, in its order, and why the other producers are none.

    Producers: convolutions, linear layers (``addmm`` and products with a stored matrix too), the affine part of norms,
    products with a stored vector on the last axis. Readers: convolutions and linear layers. Between them: ReLU, leaky
    ReLU and PReLU, pooling, means over positions, zero padding, whatever only moves values, products with what bears no
    factor, the values of attention. All readers must be reached so; a residual addition refuses, since its other
    operand bears another factor. Shared, tied, quantised or computed tensors refuse. Nothing is written.
    Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.1.1, equations 5 to 8.
    """
    pairs, skips = [], []
    users = graph.users()
    for call in graph.calls:
        try:
            pair = _produced(model, graph, call)
            if pair is not None:
                pairs.append(replace(pair, readers=_readers(model, graph, pair, users)))
        except Refused as refused:
            skips.append(Skip(str(call.place), str(refused)))
    return pairs, skips


def scaled(value: Tensor, channels: Tensor, factor: Tensor) -> Tensor:
    """``value`` times its channels' ``factor`` [size]; what belongs to no channel stays."""
    return value * torch.cat([factor, factor.new_ones(1)])[channels]


def largest(value: Tensor, channels: Tensor, size: int) -> Tensor:
    """max |value| of each channel: [size]; 0 where a channel has no element."""
    found = value.new_zeros(size + 1)
    index = torch.where(channels < 0, size, channels).expand(value.shape)
    return found.scatter_reduce(0, index.reshape(-1), value.abs().reshape(-1), "amax")[:size]


def rescale(model: nn.Module, pair: Pair, factor: Tensor) -> tuple[Write, ...]:
    """The Writes that multiply what the producer makes by ``factor`` [size] and divide its readers' weights by it.

    Computed in float64; written to what is stored, under a mask too. Raises InputError where a factor is not positive
    and finite.
    """
    if factor.shape != (pair.size,) or not bool((torch.isfinite(factor) & (factor > 0)).all()):
        raise InputError(
            "a factor is needed for each channel", where=str(pair.producer.place), got=f"{list(factor.shape)}, "
            f"from {float(factor.min()):g} to {float(factor.max()):g}", expected=f"{pair.size} positive numbers",
        )  # fmt: skip
    factor = factor.double()
    sides = [(each, factor) for each in (*pair.weights, *pair.biases)] + [(each, 1 / factor) for each in pair.readers]
    return tuple(Write(each.place, _product(stored(model, each.place), each.channels, by)) for each, by in sides)


def _product(value: Tensor, channels: Tensor, factor: Tensor) -> Tensor:
    return scaled(value.double(), channels.to(value.device), factor.to(value.device)).to(value.dtype)


def _produced(model: nn.Module, graph: Graph, call: Call) -> Pair | None:
    """What makes the channels that ``call`` gives, readers left open; None where it makes none. Raises Refused."""
    if call.operator in NORMS:
        return _norm(model, graph, call)
    if call.operator == "mul":
        return _vector(model, graph, call)
    matrix = _matrix(graph, call)
    if call.operator not in WEIGHTED and matrix is None:
        return None
    place = matrix or weight_place(model, graph, call)
    _expect_own(model, graph, call, place)
    assert place is not None, "what is computed is refused"
    channels = _rows(call, tuple(stored(model, place).shape))
    size = int(channels.max()) + 1
    return Pair(call, size, (Touched(place, channels),), _bias(model, graph, call, size), ())


def _matrix(graph: Graph, call: Call) -> TensorPlace | None:
    """The stored matrix [in, out] that a product reads; None where it is no such product."""
    name = call.args[PRODUCTS[call.operator]] if call.operator in PRODUCTS else None
    return graph.tensors.get(name) if len(graph.shapes.get(name, ())) == 2 else None  # type: ignore[arg-type]


def _rows(call: Call, shape: tuple[int, ...]) -> Tensor:
    """The output channel of each element of a weight, broadcasting to its ``shape``."""
    if call.operator in PRODUCTS:
        return torch.arange(shape[1])[None]
    ones = [1] * (len(shape) - 2)
    if call.operator not in TRANSPOSED:
        return torch.arange(shape[0]).view(-1, 1, *ones)
    number = groups(call)
    columns = torch.arange(number * shape[1]).view(number, 1, shape[1])
    return columns.expand(-1, shape[0] // number, -1).reshape(shape[0], shape[1], *ones)


def _columns(call: Call, shape: tuple[int, ...], read: Tensor) -> Tensor:
    """The channel that each element of a weight is multiplied with, where ``read`` [inputs] are those of the input."""
    ones = [1] * (len(shape) - 2)
    if call.operator in PRODUCTS or call.operator in TRANSPOSED:
        return read.view(-1, 1, *ones)
    number = groups(call)
    if number == 1:
        return read.view(1, -1, *ones)
    rows = read.view(number, 1, -1).expand(-1, shape[0] // number, -1)
    return rows.reshape(shape[0], shape[1], *ones)


def _bias(model: nn.Module, graph: Graph, call: Call, size: int) -> tuple[Touched, ...]:
    if call.operator == "addmm":
        place = graph.tensors.get(call.args[0])
    elif call.operator in PRODUCTS or not has_bias(call):
        return ()
    else:
        place = bias_place(graph, call)
    _expect_own(model, graph, call, place)
    assert place is not None, "what is computed is refused"
    return (Touched(place, torch.arange(size)),)


def _norm(model: nn.Module, graph: Graph, call: Call) -> Pair:
    found = []
    for position in NORMS[call.operator]:
        name = call.args[position] if len(call.args) > position else None
        place = graph.tensors.get(name) if isinstance(name, Ref) else None
        if name is not None:
            _expect_own(model, graph, call, place)
        found.append(place)
    weight, bias = found
    if weight is None:
        raise Refused("no weight and bias that could bear a factor")
    shape = graph.shapes[call.args[NORMS[call.operator][0]]]
    if len(shape) != 1:
        raise Refused(f"its weight has {len(shape)} axes")
    channels = torch.arange(shape[0])
    biases = () if bias is None else (Touched(bias, channels),)
    return Pair(call, shape[0], (Touched(weight, channels),), biases, ())


def _vector(model: nn.Module, graph: Graph, call: Call) -> Pair | None:
    """A product with a stored vector along the last axis, as a norm written out makes it; None for other products."""
    stored_ones = [name for name in call.args[:2] if isinstance(name, Ref) and name in graph.tensors]
    if len(stored_ones) != 1 or call.shape is None:
        return None
    shape = graph.shapes[stored_ones[0]]
    if len(shape) != 1 or len(call.shape) < 2 or shape[0] != call.shape[-1]:
        return None
    place = graph.tensors[stored_ones[0]]
    _expect_own(model, graph, call, place)
    return Pair(call, shape[0], (Touched(place, torch.arange(shape[0])),), (), ())


def _made(call: Call, size: int) -> Tensor:
    """The channels of ``call``'s result, with one axis for each of its."""
    assert call.shape is not None, "producers give one tensor"
    axis = 1 if call.operator in CONVOLUTIONS | TRANSPOSED | {"batch_norm", "group_norm"} else len(call.shape) - 1
    if axis >= len(call.shape) or call.shape[axis] != size:
        raise Refused(f"its result {list(call.shape)} has no axis of {size} channels where they ought to be")
    return torch.arange(size).view([-1 if d == axis else 1 for d in range(len(call.shape))])


def _readers(model: nn.Module, graph: Graph, pair: Pair, users: dict[str, list[Call]]) -> tuple[Touched, ...]:
    """Every weight that reads the pair's channels. Raises Refused where anything else reads one of them."""
    producer = pair.producer
    values: dict[str, Value] = {producer.name: _made(producer, pair.size)}
    readers: list[Touched] = []
    order = {call.name: number for number, call in enumerate(graph.calls)}
    waiting = {order[user.name] for user in users.get(producer.name, ())}
    while waiting:
        call = graph.calls[min(waiting)]
        waiting.remove(order[call.name])
        reader = _reader(model, graph, call, values)
        if reader is not None:
            readers.append(reader)
            continue
        values[call.name] = carried(call, values, graph.shapes)
        waiting |= {order[user.name] for user in users.get(call.name, ())}
    if any(name in values for name in graph.outputs):
        raise Refused("the model returns its channels")
    if not readers:
        raise Refused("no weight reads its channels")
    return tuple(readers)


def _reader(model: nn.Module, graph: Graph, call: Call, values: Mapping[str, Value]) -> Touched | None:
    """The weight with which ``call`` reads channels; None where the call is no convolution and no linear layer."""
    matrix = _matrix(graph, call)
    if matrix is None and call.operator not in WEIGHTED:
        return None
    name = call.args[PRODUCTS[call.operator] - 1 if matrix else 0]
    if name not in values or any(ref in values for ref in call.refs() if ref != name):
        raise Refused(f"{call.place} reads its channels otherwise than as its input")
    place = matrix or weight_place(model, graph, call)
    _expect_own(model, graph, call, place)
    assert place is not None, "what is computed is refused"
    value = values[name]
    axis = 1 if call.operator in CONVOLUTIONS | TRANSPOSED else len(graph.shapes[name]) - 1
    if not isinstance(value, Tensor) or value.numel() != value.shape[axis]:
        raise Refused(f"its channels are not the inputs of {call.place}")
    read = value.flatten().expand(graph.shapes[name][axis])
    return Touched(place, _columns(call, tuple(stored(model, place).shape), read))


def _expect_own(model: nn.Module, graph: Graph, call: Call, place: TensorPlace | None) -> None:
    """Raise Refused unless ``place`` is a parameter that nothing but ``call`` reads and that may be written."""
    if place is None:
        raise Refused(f"a weight or bias of {call.place} is computed, not a parameter")
    if place.tensor == "weight" and (reason := held_otherwise(model, place.module)) is not None:
        raise Refused(f"{place}: {reason}")
    if place.tensor != "weight" and parametrize.is_parametrized(module_at(model, place.module), place.tensor):
        raise Refused(f"{place} is computed from what is stored")
    names = {name for name, found in graph.tensors.items() if found == place}
    direct = sum(not names.isdisjoint(other.refs()) for other in graph.calls)
    alike = sum(other.operator == call.operator and other.module == call.module for other in graph.calls)
    if direct > 1 or (not direct and alike > 1) or len(aliases(model, place)) > 1:
        raise Refused(f"{place} is shared with other calls")
