"""Questions to an ONNX graph, and the few ways in which passes change one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

# Operators whose result has the operand's numbers, in another shape or order.
MOVES = {"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}

# Through these, too, ONNX Runtime carries integers: what they give lies on the operand's grid.
CARRY = MOVES | {"MaxPool", "Slice"}


def constants_of(graph: GraphProto) -> dict[str, TensorProto]:
    """name → initialiser."""
    return {tensor.name: tensor for tensor in graph.initializer}


def users_of(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """name → the nodes that read it; a graph output counts as one more reader."""
    found: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in dict.fromkeys(read_names(node)):
            found[name].append(node)
    for output in graph.output:
        found[output.name].append(NodeProto())
    return found


def read_names(node: NodeProto) -> Iterator[str]:
    """What the node reads, inside its subgraphs too."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs] if attribute.type in (5, 10) else []:
            for inner in graph.node:
                yield from read_names(inner)


def has_subgraph(node: NodeProto) -> bool:
    """Whether the node is a branch or a loop."""
    return any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute)


def shapes_of(graph: GraphProto) -> dict[str, list[int | None]]:
    """name → sizes, None where one is not fixed, as the exporter notes them; of initialisers too."""
    found: dict[str, list[int | None]] = {}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        if value.type.HasField("tensor_type"):
            dims = value.type.tensor_type.shape.dim
            found[value.name] = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
    return found | {tensor.name: list(tensor.dims) for tensor in graph.initializer}


def set_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Replace the graph's nodes."""
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """A node's attribute, or the default where it is not said."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


class Rewriter:
    """A graph that a pass rewrites: nodes are dropped, or others put in their places; ``finish`` writes them back."""

    def __init__(self, graph: GraphProto):
        self.graph = graph
        self.constants, self.users, self.shapes = constants_of(graph), users_of(graph), shapes_of(graph)
        self.producers = {output: node for node in graph.node for output in node.output}
        self.inserted: dict[int, list[NodeProto]] = {}
        self.gone: set[int] = set()
        self.renamed: dict[str, str] = {}
        self.outputs = {output.name for output in graph.output}
        self.taken = {*self.constants, *self.producers}
        self.count = 0

    def value(self, name: str) -> NDArray[Any] | None:
        """The array of an initialiser; None where ``name`` is none."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def sole_user(self, name: str, operator: str = "") -> NodeProto | None:
        """The only node that reads ``name``, if it is one of that operator (any, where none is said)."""
        readers = self.users.get(name, [])
        found = readers[0] if len(readers) == 1 and readers[0].op_type else None
        return found if found is not None and operator in ("", found.op_type) else None

    def producer(self, name: str, operator: str) -> NodeProto | None:
        """The node that makes ``name``, if it is one of that operator."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type == operator else None

    def name(self, base: str) -> str:
        """A name that nothing has."""
        while (name := f"{base}/{self.count}") in self.taken:
            self.count += 1
        self.taken.add(name)
        return name

    def constant(self, array: ArrayLike, base: str) -> str:
        """A new initialiser's name."""
        tensor = numpy_helper.from_array(np.asarray(array), self.name(base))
        self.graph.initializer.append(tensor)
        self.constants[tensor.name] = tensor
        return tensor.name

    def before(self, node: NodeProto, nodes: Iterable[NodeProto]) -> None:
        """Put ``nodes`` in front of ``node``, after those put there earlier."""
        self.inserted.setdefault(id(node), []).extend(nodes)

    def rename(self, old: str, new: str) -> None:
        """Let who reads ``old``, which is no output of the graph, read ``new``."""
        assert old not in self.outputs, "an output keeps its name"
        self.renamed[old] = new

    def drop(self, *nodes: NodeProto) -> None:
        """Take nodes out; what was put before them stays."""
        self.gone.update(id(node) for node in nodes)

    def finish(self) -> None:
        """Write the nodes back."""
        kept: list[NodeProto] = []
        for node in self.graph.node:
            kept += self.inserted.get(id(node), [])
            if id(node) not in self.gone:
                kept.append(node)
        for node in kept:
            for index, name in enumerate(node.input):
                while name in self.renamed:
                    name = self.renamed[name]
                node.input[index] = name
        set_nodes(self.graph, kept)
