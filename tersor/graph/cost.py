"""What a model costs as a function of what its groups keep: counted from the graph, without running anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor, nn

from tersor.core.place import TensorPlace, tensor_at
from tersor.graph.axis import positions, size_of
from tersor.graph.group import Group, Groups
from tersor.graph.trace import Call, Graph, Ref

Flags = NDArray[np.bool_]
Kept = Mapping[Group, Flags] | Flags
Dim = tuple[Ref, int]  # a dimension of a value
Product = tuple[Dim, ...]  # multiply-accumulates are the product of these sizes


@dataclass(frozen=True, eq=False)
class _Span:
    """The positions of a dimension that belong to group ``number``: ``positions[i]`` goes with unit ``units[i]``."""

    number: int
    positions: NDArray[np.int64]
    units: NDArray[np.int64]


class Cost:
    """Multiply-accumulates per sample, parameters and bytes of a model of which each group keeps some units.

    ``keep``: bool [units] for each group of which something goes, the others are whole; or one array, the units of all
    groups in order. The counts are those of the model after ``removal(keep)``: products of tensors only, as
    ``tersor.measure.macs`` has them (biases, norms and activations are left out). Bytes are those of the tensors that a
    checkpoint holds, without a file's header.
    """

    def __init__(self, whole: Groups, model: nn.Module, groups: Sequence[Group]):
        graph = whole.graph
        self.groups = tuple(groups)
        self._sizes = _Sizes(self.groups)
        self.batch = next((shape[0] for shape in graph.inputs.values() if shape), 1)
        values = _Values(whole, self.groups)
        self._macs = self._products(
            [[self._sizes.add(*values.dim(*dim)) for dim in product] for product in products(graph)]
        )
        tensors = list(_stored(model))
        spans = _spans_of_tensors(model, self.groups)
        self._parameters = self._products(
            [[self._sizes.add(size, spans.get((id(tensor), dim), ())) for dim, size in enumerate(tensor.shape)]
             for tensor, _ in tensors]
        )  # fmt: skip
        self._trained = np.array([trained for _, trained in tensors], dtype=bool)
        self._width = np.array([tensor.element_size() for tensor, _ in tensors], dtype=np.int64)

    def macs(self, keep: Kept) -> int:
        """Multiply-accumulates of one sample's forward pass."""
        return int(self._evaluate(self._macs, keep).sum()) // self.batch

    def parameters(self, keep: Kept) -> int:
        """How many parameters are left, tied ones counted once."""
        return int(self._evaluate(self._parameters, keep)[self._trained].sum())

    def bytes(self, keep: Kept) -> int:
        """Bytes of the parameters and buffers that are left."""
        return int((self._evaluate(self._parameters, keep) * self._width).sum())

    def flat(self, keep: Mapping[Group, Flags]) -> Flags:
        """What is kept as one array, the units of all groups in order."""
        flags = [keep[group] if group in keep else np.ones(group.units, dtype=bool) for group in self.groups]
        return np.concatenate([*flags, np.zeros(0, dtype=bool)])

    def _products(self, rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Numbers of sizes, filled up with that of the size 1."""
        width = max(map(len, rows), default=0)
        filled = [[*row, *[self._sizes.one] * (width - len(row))] for row in rows]
        return np.array(filled, dtype=np.int64).reshape(len(rows), width)

    def _evaluate(self, products_: NDArray[np.int64], keep: Kept) -> NDArray[np.int64]:
        flags = keep if isinstance(keep, np.ndarray) else self.flat(keep)
        return self._sizes.left(~flags)[products_].prod(axis=1)


class _Sizes:
    """The different sizes that occur, each once, and what is left of all of them at a time."""

    def __init__(self, groups: Sequence[Group]):
        self.groups = groups
        self.offsets = np.cumsum([0, *(group.units for group in groups)])
        self.numbers: dict[tuple[object, ...], int] = {}
        self.full: list[int] = []
        self.spans: list[tuple[_Span, ...]] = []
        self.one = self.add(1, ())
        self._matrix: csr_array | None = None

    def add(self, size: int, spans: Sequence[_Span]) -> int:
        """The number of this size; ``spans``: what of it belongs to groups."""
        key = size, *((span.number, span.positions.tobytes(), span.units.tobytes()) for span in spans)
        if key not in self.numbers:
            self.numbers[key] = len(self.full)
            self.full.append(size)
            self.spans.append(tuple(spans))
        return self.numbers[key]

    def left(self, gone: Flags) -> NDArray[np.int64]:
        """Every size, by number, when these units of all groups are gone."""
        if self._matrix is None:
            self._matrix = self._build()
        sizes = np.array(self.full, dtype=np.int64) - self._matrix @ gone.astype(np.int64)
        for number in self._crossed:
            removed = np.zeros(self.full[number], dtype=bool)
            for span in self.spans[number]:
                removed[span.positions[gone[self.offsets[span.number] + span.units]]] = True
            sizes[number] = self.full[number] - int(removed.sum())
        return sizes

    def _build(self) -> csr_array:
        """sizes × units: how many positions of a size each unit takes with it, where no position is owned twice."""
        self._crossed = [number for number, spans in enumerate(self.spans) if _overlap(self.full[number], spans)]
        single = set(range(len(self.full))) - set(self._crossed)
        entries = [(number, span) for number in sorted(single) for span in self.spans[number]]
        rows = [np.full(len(span.units), number) for number, span in entries]
        columns = [self.offsets[span.number] + span.units for _, span in entries]
        shape = len(self.full), int(self.offsets[-1])
        if not entries:
            return csr_array(shape, dtype=np.int64)
        row, column = np.concatenate(rows), np.concatenate(columns)
        return csr_array((np.ones(len(row), dtype=np.int64), (row, column)), shape=shape)


def _overlap(size: int, spans: Sequence[_Span]) -> bool:
    owned = np.zeros(size, dtype=np.int64)
    for span in spans:
        owned[span.positions] += 1
    return bool((owned > 1).any())


def _spans_of_tensors(model: nn.Module, groups: Sequence[Group]) -> dict[tuple[int, int], list[_Span]]:
    """(identity of a tensor, dimension) → what of it belongs to groups. A tied tensor's roles name it only once."""
    found: dict[tuple[int, int], list[_Span]] = {}
    for number, group in enumerate(groups):
        seen: set[tuple[TensorPlace, int]] = set()
        for axis in group.axes:
            if (axis.place, axis.dim) not in seen:
                seen.add((axis.place, axis.dim))
                key = id(tensor_at(model, axis.place)), axis.dim
                found.setdefault(key, []).append(_Span(number, axis.positions, axis.units))
    return found


def _stored(model: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """Each tensor of a checkpoint once, and whether it is a parameter."""
    seen: set[int] = set()
    for module in model.modules():
        entries: list[tuple[Tensor | None, bool]] = [(tensor, True) for tensor in module._parameters.values()]
        entries += [(b, False) for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set]
        for tensor, trained in entries:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor, trained


class _Values:
    """What of each dimension of a graph's values belongs to which group."""

    def __init__(self, whole: Groups, groups: Sequence[Group]):
        self.shapes, self.values = whole.graph.shapes, whole.values
        self.numbers = {group.leaf: number for number, group in enumerate(groups)}

    def dim(self, ref: Ref, dim: int) -> tuple[int, tuple[_Span, ...]]:
        """The size of a value's dimension, and what of it belongs to groups."""
        if ref not in self.values:
            return self.shapes[ref][dim], ()
        axis = self.values[ref][dim]
        spans = [
            _Span(self.numbers[leaf], where, units) for leaf, where, units in positions(axis) if leaf in self.numbers
        ]
        return size_of(axis), tuple(spans)


# Operators -----------------------------------------------------------------------------------------------------------


def products(graph: Graph) -> list[Product]:
    """Every product of tensors in the graph, as the dimensions whose sizes multiply to its multiply-accumulates."""
    return [item for call in graph.calls if call.operator in COUNTED for item in products_of(call, graph)]


def products_of(call: Call, graph: Graph) -> list[Product]:
    """The products of one call whose operator is ``COUNTED``, as ``products`` has them."""
    return _COUNTS[call.operator](call, graph)


def _all(ref: Ref, graph: Graph) -> Product:
    return tuple((ref, dim) for dim in range(len(graph.shapes[ref])))


def _convolution(call: Call, graph: Graph) -> list[Product]:
    """Every weight once for each place of the result (of the input, where the convolution is transposed)."""
    ref, weight = call.args[0] if "transpose" in call.operator else Ref(call.name), call.args[1]
    rows = _all(ref, graph)
    channel = len(rows) - len(graph.shapes[weight]) + 1
    return [(*rows[:channel], *rows[channel + 1 :], *_all(weight, graph))]


def _linear(call: Call, graph: Graph) -> list[Product]:
    return [(*_all(call.args[0], graph)[:-1], *_all(call.args[1], graph))]


def _matrix(first: int) -> Callable[[Call, Graph], list[Product]]:
    """Every number of the result is a sum over the last axis of argument ``first``."""

    def count(call: Call, graph: Graph) -> list[Product]:
        return [(*_all(Ref(call.name), graph), _all(call.args[first], graph)[-1])]

    return count


def _attention(call: Call, graph: Graph) -> list[Product]:
    """query [… , L, E], key [… , S, E], value [… , S, F]: scores, then their product with the values."""
    query, key, value = (_all(ref, graph) for ref in call.args[:3])
    return [(*query[:-1], key[-2], query[-1]), (*query[:-1], key[-2], value[-1])]


def _recurrent(call: Call, graph: Graph) -> list[Product]:
    """Every matrix once for each step; ``args``: input, states, parameters, …"""
    if not isinstance(call.args[2], list):  # a packed sequence, whose steps are not in its shape
        return []
    matrices = [ref for ref in call.args[2] if len(graph.shapes[ref]) == 2]
    return [(*_all(call.args[0], graph)[:-1], *_all(matrix, graph)) for matrix in matrices]


def _einsum(call: Call, graph: Graph) -> list[Product]:
    """Operands are multiplied from left to right; what only one of the two holds and nobody needs is summed before."""
    equation, operands = call.args[0].replace(" ", ""), call.args[1]
    inputs, _, output = equation.partition("->")
    named = [_letters(text, _all(ref, graph)) for text, ref in zip(inputs.split(","), operands, strict=True)]
    if "->" not in equation:
        plain = inputs.replace(",", "").replace(".", "")
        output = "".join(letter for letter in plain if plain.count(letter) == 1) + ("..." if "." in inputs else "")
    sizes = {name: dim for letters in reversed(named) for name, dim in letters.items()}
    dots = [name for name in sizes if name.startswith(".")]
    needed = {*output.replace(".", ""), *(dots if "." in output else ())}
    found, held = [], set(named[0])
    for number, letters in enumerate(named[1:], start=1):
        later = needed.union(*named[number + 1 :])
        summed = (held & set(letters)) - later
        shared = ((held | set(letters)) & later) | summed
        if summed:
            found.append(tuple(sizes[name] for name in sorted(shared)))
        held = (held | set(letters)) & later
    return found


def _letters(text: str, dims: Product) -> dict[str, Dim]:
    """The letters of one operand → its dimensions; those that the dots stand for are named from the right."""
    before, dots, after = text.partition("...")
    hidden = len(dims) - len(before) - len(after)
    names = [*before, *(f".{number}" for number in range(hidden, 0, -1) if dots), *after]
    return dict(zip(names, dims, strict=True))


_COUNTS: dict[str, Callable[[Call, Graph], list[Product]]] = {
    **{f"{kind}{n}d": _convolution for kind in ("conv", "conv_transpose") for n in (1, 2, 3)},
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), _matrix(0)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv", "addbmm"), _matrix(1)),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    "einsum": _einsum,
}

COUNTED = frozenset(_COUNTS)  # the operators that multiply tensors


def resolutions(graph: Graph, model: nn.Module, groups: Sequence[Group]) -> list[int]:
    """For each group: at how many positions (batch, height and width, tokens) its first producer makes channels."""
    users, refs = graph.users(), {id(tensor_at(model, place)): name for name, place in graph.tensors.items()}
    found = []
    for group in groups:
        axis = group.producers[0]
        ref, size = refs[id(tensor_at(model, axis.place))], graph.shapes
        made = next((call for call in _downstream(ref, users) if call.operator in _MAKES and call.shape), None)
        channels = axis.size
        if made is not None and "conv" in made.operator:
            channels = made.shape[len(made.shape) - len(size[made.args[1]]) + 1]  # type: ignore[index, arg-type]
        found.append(int(np.prod(made.shape)) // channels if made is not None else 1)  # type: ignore[arg-type]
    return found


_MAKES = {*_COUNTS, "embedding"} - {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def _downstream(ref: str, users: Mapping[str, list[Call]]) -> Iterator[Call]:
    """The calls that read a value, then the first reader of what the first of them gives, and so on."""
    while calls := users.get(ref):
        yield from calls
        ref = calls[0].name
