"""The workload of an ONNX file, read from its graph.

Only where shapes hang on sizes that the graph computes, constants are computed, and weights beside the file opened.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from tersor.core.errors import ArtifactError, InputError
from tersor.measure.onnx_cpu import output_shapes
from tersor.measure.runnable import check_onnx
from tersor.measure.workload import Builder, Operation, Workload

Shape = tuple[int, ...]
_VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Cast", "CastLike"}
_STORED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}  # fused with what is around them
_ELEMENTWISE = {
    "Add", "Sub", "Mul", "Div", "Relu", "Clip", "BatchNormalization", "Gelu", "Sigmoid", "Tanh", "HardSwish",
    "HardSigmoid", "LeakyRelu", "Elu", "Selu", "Celu", "PRelu", "Softplus", "Neg", "Abs", "Exp", "Log", "Sqrt", "Pow",
    "Erf", "Reciprocal", "Round", "Floor", "Where", "Min", "Max", "Mish", "Swish", "QuickGelu", "FastGelu", "BiasGelu",
}  # fmt: skip
_PRODUCTS = ("Attention", "Conv", "Gemm", "GRU", "LSTM", "MatMul", "MoE", "RNN")  # parts of products' names
_INTEGER = {"QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul",
            "MatMulIntegerToFloat"}  # fmt: skip
_NARROW: dict[int, float] = {TensorProto.INT4: 4.0, TensorProto.UINT4: 4.0}


def onnx_workload(path: str | Path, *, batch: int = 1, sizes: Mapping[str, int] | None = None) -> Workload:
    """What one pass over ``batch`` samples computes and moves, from the file's graph, as ``workload`` has it.

    Buffers between QuantizeLinear and DequantizeLinear have 8 bits, and products of two such tensors are in integers,
    as ONNX Runtime fuses them. A free dimension other than the first has its size from ``sizes``, by its name in the
    file or as "input:1", the dimension's number behind the input's name. Raises ArtifactError for a file that is
    damaged, InputError where an input's shape is not known.
    """
    path = Path(path)
    check_onnx(path)
    proto = _with_shapes(onnx.load(path, load_external_data=False), path, batch, sizes or {})
    return _Reader(proto, path.stem).read(batch)


def _with_shapes(proto: ModelProto, path: Path, batch: int, sizes: Mapping[str, int]) -> ModelProto:
    """The model with the shape of every value that can be inferred."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    given = [value for value in proto.graph.input if value.name not in stored]
    opened = {}  # its name → an open dimension, each as often as it stands in the file
    for value in given:
        for number, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                opened[f"{value.name}:{number}"] = dim
    first = {dim.dim_param: batch for where, dim in opened.items() if where.endswith(":0") and dim.dim_param}
    _expect_sizes(sizes, {dim.dim_param or where for where, dim in opened.items()} | set(opened), path)
    for where, dim in opened.items():
        size = sizes.get(where, sizes.get(dim.dim_param, first.get(dim.dim_param)))
        if size is None and where.endswith(":0"):
            size = batch
        if size is None:
            name, _, last = where.rpartition(":")
            raise InputError(
                "the file leaves a dimension open", where=f"{path}, input {name}, dimension {last}",
                got=dim.dim_param or "no size", expected="a size for all dimensions but the first",
                do=f"Say --sizes {dim.dim_param or where}=128, say, or export it with fixed shapes",
            )  # fmt: skip
        dim.dim_value = size
    for value in [*proto.graph.value_info, *proto.graph.output]:  # what was inferred for a free batch is forgotten
        if any(not dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim):
            value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    return _with_constants(inferred, path) if _unknown(inferred) else inferred


def _expect_sizes(sizes: Mapping[str, int], known: set[str], path: Path) -> None:
    for name, size in sizes.items():
        if name not in known:
            raise InputError(
                "no such open dimension", where=f"--sizes {name}", got=str(path),
                expected=f"one of {', '.join(sorted(known))}" if known else "a file that leaves a dimension open",
            )  # fmt: skip
        if size < 1:
            raise InputError("not a size", where=f"--sizes {name}", got=size, expected="at least 1")


def _unknown(proto: ModelProto) -> bool:
    shapes = _shapes(proto)
    return any(name and name not in shapes for node in proto.graph.node for name in node.output[:1])


def _with_constants(proto: ModelProto, path: Path) -> ModelProto:
    """The model with the shapes that ONNX Runtime knows once it has computed what is constant, its own operators too.

    What is padded to whole windows, for instance, hangs on sizes that the graph computes.
    """
    graph, known = proto.graph, _shapes(proto)
    missing = {name for node in graph.node for name in node.output if name and name not in known}
    given = len(graph.output)
    graph.output.extend(ValueInfoProto(name=name) for name in sorted(missing - {value.name for value in graph.output}))
    try:
        shapes = output_shapes(proto.SerializeToString(), weights=path.parent)
    except (ArtifactError, ValueError):  # ValueError: over 2 GB; what stays unknown is said
        shapes = {}
    del graph.output[given:]
    graph.value_info.extend(_described(name, *found) for name, found in shapes.items() if name in missing)
    return proto


def _described(name: str, kind: str, shape: Shape) -> ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, TensorProto.DataType.Value(kind.upper()), shape)


def _shapes(proto: ModelProto) -> dict[str, Shape]:
    found: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    for value in [*proto.graph.input, *proto.graph.value_info, *proto.graph.output]:
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            found.setdefault(value.name, tuple(dim.dim_value for dim in tensor.shape.dim))
    return found


def _bits(kind: int) -> float:
    if kind in _NARROW:
        return _NARROW[kind]
    try:
        return 8.0 * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    except KeyError:
        return 32.0


class _Reader:
    """Reads the nodes of a graph in their order."""

    def __init__(self, proto: ModelProto, name: str):
        self.proto, self.name, graph = proto, name, proto.graph
        self.shapes = _shapes(proto)
        values: list[ValueInfoProto] = [*graph.input, *graph.value_info, *graph.output]
        self.kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        self.stored: dict[str, str] = {tensor.name: tensor.name for tensor in graph.initializer}
        readers: Counter[str] = Counter(value.name for value in graph.output)
        for node in graph.node:
            readers.update(name for name in node.input if name)
        self.builder = Builder(readers)
        self.weights: dict[str, int] = {}
        for tensor in graph.initializer:
            self.weights[tensor.name] = math.prod(tensor.dims)
            if (bits := _bits(tensor.data_type)) != 32:
                self.builder.bits[tensor.name] = bits
        self.integer = {tensor.name for tensor in graph.initializer if _bits(tensor.data_type) <= 8}
        self.given = [value.name for value in graph.input if value.name not in self.stored]
        self.missing: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()

    def read(self, batch: int) -> Workload:
        """The workload of the whole graph."""
        graph = self.proto.graph
        given = self.given
        for value in given:
            self.builder.give(value, math.prod(self.shapes.get(value, ())), _bits(self.kinds[value]))
        for node in graph.node:
            self._node(node)
        notes = tuple(
            f"{count} × {operator}: its result's shape is not known, so that it is not counted"
            for operator, count in self.missing.items()
        )
        notes += tuple(
            f"{count} × {operator}: what it multiplies is not counted" for operator, count in self.uncounted.items()
        )
        notes += tuple(
            f"{count} × {name}: what it runs inside is not counted" for name, count in self._nested().items()
        )
        taken = [value.name for value in graph.output]
        return self.builder.workload(self.name, batch, self.weights, given, taken, notes)

    def _nested(self) -> Counter[str]:
        """Operators that run a graph of their own: If, Loop, Scan, and the file's own functions."""
        functions = {(each.domain, each.name) for each in self.proto.functions}
        bodies = {AttributeProto.GRAPH, AttributeProto.GRAPHS}
        return Counter(
            node.op_type for node in self.proto.graph.node
            if (node.domain, node.op_type) in functions or any(each.type in bodies for each in node.attribute)
        )  # fmt: skip

    def _node(self, node: NodeProto) -> None:
        reads = tuple(name for name in node.input if name and self.builder.knows(name))
        held = tuple(dict.fromkeys(self.stored[name] for name in node.input if name in self.stored))
        if not reads:  # constants, and what is computed of them, when the file is loaded
            for name in node.output:
                self.stored[name] = held[0] if held and node.op_type in _STORED | _VIEWS | {"Transpose"} else ""
            self.stored = {name: source for name, source in self.stored.items() if source}
            return
        if node.op_type in _STORED and reads[0] not in self.given:
            quantised = node.op_type != "DequantizeLinear"
            self.builder.alias(node.output[0], reads[0], 8.0 if quantised else None)
            if quantised or reads[0] in self.integer:
                self.integer.update(node.output[:1])
            return
        if node.op_type in _VIEWS:
            self.builder.alias(node.output[0], reads[0])
            if reads[0] in self.integer:
                self.integer.update(node.output[:1])
            return
        if node.op_type in _STORED - {"DequantizeLinear"}:
            self.integer.update(node.output[:1])
        self._operation(node, reads, {name: self.weights[name] for name in held})

    def _operation(self, node: NodeProto, reads: tuple[str, ...], weights: dict[str, int]) -> None:
        shape = self.shapes.get(node.output[0])
        if shape is None:
            self.missing[node.op_type] += 1
            shape = ()
        elements = math.prod(shape)
        if node.op_type == "Gather":  # only the rows that are looked up are read
            weights = {name: min(count, elements) for name, count in weights.items()}
        layer = node.name.partition(":")[0] or node.output[0]
        macs = _macs(node, self.shapes)
        if shape and not macs and _multiplies(node):
            self.uncounted[node.op_type] += 1
        operation = Operation(
            layer, self._operator(node), macs, weights, reads, (), compute=self._compute(node) if macs else "float"
        )
        bits = 8.0 if node.op_type in _STORED else _bits(self.kinds.get(node.output[0], TensorProto.FLOAT))
        if node.op_type in _ELEMENTWISE:
            self.builder.elementwise(operation, node.output[0], elements, bits)
        else:
            results = {name: (math.prod(self.shapes.get(name, ())), bits) for name in node.output if name}
            self.builder.run(operation, results)

    def _operator(self, node: NodeProto) -> str:
        weight = self.shapes.get(node.input[1], ()) if node.op_type == "Conv" else ()
        deep = len(weight) > 2 and weight[1] == 1 and weight[0] > 1
        return "depthwise Conv" if deep else node.op_type

    def _compute(self, node: NodeProto) -> str:
        if node.op_type in _INTEGER:
            return "int8"
        factors = [name for name in node.input[:2] if name]
        held = [self.stored.get(name, name) in self.integer or name in self.integer for name in factors]
        return "int8" if all(held) and len(held) == 2 else "float"


def _macs(node: NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Multiply-accumulates of a node; 0 where it multiplies no tensors or its shapes are not known."""
    result = math.prod(shapes.get(node.output[0], (0,)))
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    at = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}.get(node.op_type, 1)
    first, second = (shapes.get(node.input[index], ()) if len(node.input) > index else () for index in (0, at))
    if node.op_type in {"Conv", "ConvInteger", "QLinearConv", "FusedConv", "NhwcConv", "NhwcFusedConv"}:
        return result * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if node.op_type in {"Gemm", "MatMul", "MatMulNBits", "FusedGemm", "FusedMatMul", *_INTEGER} and first:
        return result * (first[-2] if attributes.get("transA") else first[-1])
    if node.op_type == "Einsum":
        return _einsum(attributes["equation"].decode(), [shapes.get(name) for name in node.input])
    if node.op_type in {"LSTM", "GRU", "RNN"} and first:
        recurrent = shapes.get(node.input[2], ())
        return math.prod(first[:2]) * (math.prod(second) + math.prod(recurrent))
    return 0


def _multiplies(node: NodeProto) -> bool:
    """Whether a node is a product of tensors, known or not."""
    return len(node.input) > 1 if node.op_type == "Einsum" else any(word in node.op_type for word in _PRODUCTS)


def _einsum(equation: str, shapes: Sequence[Shape | None]) -> int:
    """Multiply-accumulates of a product in Einstein's notation: one for each value of all indices together.

    0 where there is one factor, or the shape of one is not known.

    >>> _einsum("...ij,jk->...ik", [(2, 3, 4), (4, 5)])
    120
    """
    terms, sizes = equation.replace(" ", "").partition("->")[0].split(","), dict[str, int]()
    known = [shape for shape in shapes if shape is not None]
    if not 1 < len(terms) == len(known):
        return 0
    for term, shape in zip(terms, known, strict=True):
        before, _, after = term.partition("...")
        dots = [f".{number}" for number in range(len(shape) - len(before) - len(after), 0, -1)]
        for index, size in zip([*before, *dots, *after], shape, strict=False):
            sizes[index] = max(size, sizes.get(index, 1))
    return math.prod(sizes.values())
