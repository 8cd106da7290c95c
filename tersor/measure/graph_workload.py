"""The workload of a PyTorch model, read from its captured graph; nothing is run."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor, nn

from tersor.core.place import tensor_at
from tersor.graph.cost import COUNTED, products_of
from tersor.graph.trace import Call, Graph, trace
from tersor.measure.workload import Builder, Operation, Workload

_VIEWS = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
    "numpy_T", "movedim", "swapaxes", "expand", "expand_as", "select", "slice", "narrow", "split", "split_with_sizes",
    "chunk", "unbind", "tensor_split", "getitem", "detach", "alias", "dropout", "feature_dropout", "contiguous", "to",
    "lift_fresh_copy", "identity", "broadcast_to", "diagonal", "real",
}  # fmt: skip
_ELEMENTWISE = {
    "add", "sub", "mul", "div", "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "batch_norm", "gelu",
    "silu", "mish", "sigmoid", "tanh", "hardswish", "hardsigmoid", "leaky_relu", "elu", "selu", "celu", "prelu",
    "softplus", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "pow", "square", "erf", "reciprocal", "round", "floor",
    "masked_fill", "where", "log_sigmoid", "softsign", "minimum", "maximum", "rsub", "logical_not", "sin", "cos",
}  # fmt: skip
_REORDERED = {"permute", "transpose", "t", "numpy_T", "movedim", "swapaxes", "expand", "expand_as", "broadcast_to"}
_NOTHING = {"assert_tensor_metadata", "sym_size", "_assert_async", "lift"}


def workload(model: nn.Module, example_inputs: tuple[Tensor, ...], name: str = "") -> Workload:
    """What one pass over ``example_inputs`` (batch first) computes and moves, from the model's graph.

    A batch norm, activation function or addition that follows a product belongs to it, as runtimes fuse them; other
    elementwise operators overwrite an input that nobody reads afterwards. Views move nothing. Attention keeps its
    scores [batch, heads, queries, keys] while it runs. Quantisers count as elementwise. Raises GraphError where the
    graph cannot be captured.
    """
    graph = trace(model, example_inputs)
    reader = _Reader(graph, model)
    batch = len(example_inputs[0]) if example_inputs and example_inputs[0].ndim else 1
    for call in graph.calls:
        reader.call(call)
    return reader.builder.workload(name or type(model).__name__, batch, reader.weights, graph.inputs, graph.outputs)


class _Reader:
    """Reads the calls of a graph in their order."""

    def __init__(self, graph: Graph, model: nn.Module):
        self.graph = graph
        readers: Counter[str] = Counter(graph.outputs)
        for call in graph.calls:
            readers.update(call.refs())
        self.builder = Builder(readers)
        self.constant: dict[str, frozenset[str]] = {name: frozenset() for name in graph.constants}
        self.weights: dict[str, int] = {}
        self.reordered: set[str] = set()  # views that are not in the order of their buffer: a clone of them copies
        stored: dict[int, str] = {}  # identity of a tensor → its first name: tied weights are one
        for name, place in graph.tensors.items():
            tensor = tensor_at(model, place)
            first = stored.setdefault(id(tensor), str(place))
            self.constant[name] = frozenset((first,))
            self.weights[first] = tensor.numel()
            if tensor.element_size() != 4:
                self.builder.bits[first] = 8.0 * tensor.element_size()
        values = {node.name: node.meta.get("val") for node in graph.program.graph.nodes if node.name in graph.inputs}
        for name, shape in graph.inputs.items():
            self.builder.give(name, math.prod(shape), _bits(getattr(values[name], "dtype", None)))

    def call(self, call: Call) -> None:
        """Add what the call does."""
        if call.operator in _NOTHING:
            return
        refs = list(call.refs())
        reads = tuple(ref for ref in refs if self.builder.knows(ref))
        weights = frozenset(name for ref in refs for name in self.constant.get(ref, ()))
        if not reads:  # computed of weights and constants alone: done once, when the model is loaded
            self.constant[call.name] = weights
            return
        if call.operator in _VIEWS or (call.operator == "clone" and reads[0] not in self.reordered):
            self.builder.alias(call.name, reads[0])
            if call.operator in _REORDERED or (call.operator != "clone" and reads[0] in self.reordered):
                self.reordered.add(call.name)
            return
        operation = self._operation(call, reads, {name: self.weights[name] for name in weights})
        elements, bits = math.prod(call.shape or ()), _bits(call.dtype)
        if call.operator in _ELEMENTWISE or call.operator.startswith("fake_quantize"):
            self.builder.elementwise(operation, call.name, elements, bits)
        else:
            self.builder.run(operation, {call.name: (elements, bits)})

    def _operation(self, call: Call, reads: tuple[str, ...], weights: dict[str, int]) -> Operation:
        shapes, operator, scratch = self.graph.shapes, call.operator, 0
        macs = 0
        if operator in COUNTED:
            macs = sum(math.prod(shapes[ref][dim] for ref, dim in product) for product in products_of(call, self.graph))
        if operator == "embedding":  # only the rows that are looked up are read
            weights = {name: min(count, math.prod(call.shape or ())) for name, count in weights.items()}
        if operator == "scaled_dot_product_attention":
            query, key = shapes[call.args[0]], shapes[call.args[1]]
            scratch = math.prod(query[:-1]) * key[-2]
        if operator.startswith("conv") and "transpose" not in operator:
            weight = shapes.get(call.args[1], ())
            if len(weight) > 2 and weight[1] == 1 and weight[0] > 1:
                operator = f"depthwise {operator}"
        return Operation(call.module or call.name, operator, macs, weights, reads, (), scratch)


def _bits(dtype: torch.dtype | None) -> float:
    return 8.0 * dtype.itemsize if dtype is not None else 32.0
