"""Graph passes that let ONNX Runtime find integer kernels in a quantised file. Each edits an ONNX model in place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tersor.export.onnx_graph import CARRY, MOVES, Rewriter, attribute, constants_of, set_nodes, users_of

_INT32 = 2**31 - 1


def fold_weight_quantizers(model: ModelProto) -> None:
    """QuantizeLinear of a constant becomes an integer initialiser; its DequantizeLinear stays.

    The integers are those of ``FakeQuantize``: round half to even in float32, clipped to the range in use.
    """
    graph = model.graph
    constants, users = constants_of(graph), users_of(graph)
    gone: set[int] = set()
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or not all(name in constants for name in node.input):
            continue
        integers = _quantize(node, constants)
        output, dead = node.output[0], [node]
        clip = users[output][0] if len(users[output]) == 1 else None
        if clip is not None and clip.op_type == "Clip" and all(name in constants for name in clip.input[1:]):
            low, high = (numpy_helper.to_array(constants[name]) for name in clip.input[1:3])
            integers = np.clip(integers, low, high)
            output, dead = clip.output[0], [node, clip]
        gone.update(id(n) for n in dead)
        graph.initializer.append(numpy_helper.from_array(integers, output))
    set_nodes(graph, [node for node in graph.node if id(node) not in gone])


def _quantize(node: NodeProto, constants: dict[str, TensorProto]) -> NDArray[np.generic]:
    x, scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shape = [-1 if d == axis % max(x.ndim, 1) else 1 for d in range(x.ndim)] if scale.ndim else []
    full = np.iinfo(zero.dtype)
    ratio = x.astype(np.float32) / scale.astype(np.float32).reshape(shape)
    return np.clip(np.rint(ratio) + zero.astype(np.float32).reshape(shape), full.min, full.max).astype(zero.dtype)


def scales_into_dequantizers(model: ModelProto) -> None:
    """Multiplication or division by a positive number, right after DequantizeLinear or after what only moves its
    numbers, becomes part of its scale: attention's 1 / √size, which would stand between the integers and their product.
    """
    graph = Rewriter(model.graph)
    for node in model.graph.node:
        factor = _factor(graph, node)
        if factor is None:
            continue
        reader, name = node, node.input[0]
        while (mover := graph.producers.get(name)) is not None and mover.op_type in MOVES:
            if graph.sole_user(name) is None:
                break
            reader, name = mover, mover.input[0]
        dequantize = graph.producer(name, "DequantizeLinear")
        scale = None if dequantize is None else graph.value(dequantize.input[1])
        if dequantize is None or scale is None or node.output[0] in graph.outputs:
            continue
        own = NodeProto.FromString(dequantize.SerializeToString())  # others may read the numbers as they were
        own.input[1] = graph.constant((scale * np.float32(factor)).astype(np.float32), "scale")
        own.output[0] = graph.name(name)
        graph.before(reader, [own])
        if reader is not node:
            reader.input[0] = own.output[0]
        graph.rename(node.output[0], own.output[0] if reader is node else node.input[0])
        graph.drop(node)
    graph.finish()


def _factor(graph: Rewriter, node: NodeProto) -> float | None:
    """The positive number that the node multiplies its first input by; None where it does not."""
    if node.op_type not in ("Mul", "Div"):
        return None
    number = graph.value(node.input[1])
    if number is None or number.size != 1 or number.ndim > len(graph.shapes.get(node.input[0], ())):
        return None
    value = float(number.reshape(()))
    return None if not value > 0 else value if node.op_type == "Mul" else 1 / value


@dataclass(frozen=True, eq=False)
class Linear:
    """A product with a weight [outputs, inputs], ``x`` [..., inputs] → ``result`` [..., outputs], as the exporter
    writes it: MatMul with the transposed weight and an Add, or Gemm. ``nodes``: those that make it."""

    x: str
    weight: str
    bias: str | None
    result: str
    nodes: tuple[NodeProto, ...]

    @property
    def name(self) -> str:
        """Its module's path."""
        return self.nodes[0].name


def linear_of(graph: Rewriter, node: NodeProto) -> Linear | None:
    """The linear layer whose product ``node`` is; None where it is none."""
    if node.op_type == "Gemm":
        plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
        if not plain or attribute(node, "transA", 0) or not attribute(node, "transB", 0):
            return None
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        return Linear(node.input[0], node.input[1], bias, node.output[0], (node,))
    transposed = graph.producer(node.input[1], "Transpose") if node.op_type == "MatMul" else None
    if transposed is None or list(attribute(transposed, "perm", [])) != [1, 0]:
        return None
    weight, add = transposed.input[0], graph.sole_user(node.output[0], "Add")
    if add is not None:
        bias = add.input[0] if add.input[1] == node.output[0] else add.input[1]
        value = graph.value(bias)
        if value is not None and value.ndim == 1:
            return Linear(node.input[0], weight, bias, add.output[0], (node, add))
    return Linear(node.input[0], weight, None, node.output[0], (node,))


def dequantized(graph: Rewriter, name: str) -> NodeProto | None:
    """The DequantizeLinear with one scale on whose grid ``name`` lies; None where it lies on none."""
    while (mover := graph.producers.get(name)) is not None and mover.op_type in CARRY:
        name = mover.input[0]
    node = graph.producer(name, "DequantizeLinear")
    scale = None if node is None else graph.value(node.input[1])
    return node if scale is not None and scale.ndim == 0 else None


def dequantized_weight(graph: Rewriter, name: str) -> NodeProto | None:
    """The DequantizeLinear of 8-bit integers, with one scale or one per output channel, that is this weight."""
    node = graph.producer(name, "DequantizeLinear")
    if node is None or any(given not in graph.constants for given in node.input):
        return None
    per_channel = len(graph.shapes[node.input[1]]) == 0 or attribute(node, "axis", 1) == 0
    return node if per_channel and len(graph.shapes[node.input[0]]) == 2 else None


def linears_to_gemm(model: ModelProto) -> None:
    """A linear layer of integers becomes Gemm on rows, between reshapes that cost nothing: its bias is then added in
    32-bit integers, and ONNX Runtime has the whole as one kernel (QGemm); MatMul and Add are several."""
    graph = Rewriter(model.graph)
    for node in model.graph.node:
        linear = linear_of(graph, node) if node.op_type == "MatMul" else None
        if linear is None or dequantized(graph, linear.x) is None or dequantized_weight(graph, linear.weight) is None:
            continue
        shape = graph.shapes.get(node.output[0], [])
        if len(shape) < 2 or shape[-1] is None or sum(size is None for size in shape) > 1:
            continue
        _write_gemm(graph, linear, [-1 if size is None else size for size in shape])
    graph.finish()


def _write_gemm(graph: Rewriter, linear: Linear, shape: list[int]) -> None:
    """``shape``: of the result, -1 for the size that is not fixed."""
    weight = graph.producers[linear.weight]
    inputs = graph.constants[weight.input[0]].dims[1]
    flat, rows, out = len(shape) == 2, graph.name(linear.x), graph.name(linear.result)
    nodes: list[NodeProto] = []
    quantized = graph.producer(linear.x, "DequantizeLinear")
    if flat:
        rows = linear.x
    elif quantized is not None:  # reshape the integers
        integers, rows_shape = graph.name(linear.x), graph.constant([-1, inputs], "shape")
        nodes.append(helper.make_node("Reshape", [quantized.input[0], rows_shape], [integers]))
        nodes.append(helper.make_node("DequantizeLinear", [integers, *quantized.input[1:]], [rows]))
    else:
        nodes.append(helper.make_node("Reshape", [linear.x, graph.constant([-1, inputs], "shape")], [rows]))
    last, result = linear.nodes[-1], linear.result
    quantize = graph.sole_user(result, "QuantizeLinear")
    bias = [] if linear.bias is None else [linear.bias]
    out = result if flat else out
    nodes.append(helper.make_node("Gemm", [rows, linear.weight, *bias], [out], name=linear.name, transB=1))
    if not flat and quantize is not None:  # reshape the integers
        last, result = quantize, quantize.output[0]
        small = graph.name(result)
        nodes.append(helper.make_node("QuantizeLinear", [out, *quantize.input[1:]], [small], name=quantize.name))
        out = small
    if not flat:
        nodes.append(helper.make_node("Reshape", [out, graph.constant(shape, "shape")], [result]))
    graph.before(last, nodes)
    graph.drop(*linear.nodes, last)


def integer_biases(model: ModelProto) -> None:
    """The bias of a Gemm of integers becomes 32-bit integers, on the grid of the products: round(bias / (scale of x ·
    scale of the weight)). ONNX Runtime has a Gemm whose result stays float as QGemm only with such a bias."""
    graph = Rewriter(model.graph)
    for node in model.graph.node:
        linear = linear_of(graph, node) if node.op_type == "Gemm" else None
        bias = None if linear is None or linear.bias is None else graph.value(linear.bias)
        if linear is None or bias is None or bias.dtype != np.float32:
            continue
        x, weight = dequantized(graph, linear.x), dequantized_weight(graph, linear.weight)
        steps = [None if each is None else graph.value(each.input[1]) for each in (x, weight)]
        if steps[0] is None or steps[1] is None:
            continue
        step = np.broadcast_to((steps[0] * steps[1]).astype(np.float32), bias.shape)
        integers = np.rint(bias.astype(np.float64) / step)
        if np.abs(integers).max(initial=0) > _INT32:
            continue
        given = [graph.constant(integers.astype(np.int32), "bias"), graph.constant(step, "scale")]
        node.input[2] = graph.name(linear.bias or "")
        graph.before(node, [helper.make_node("DequantizeLinear", given, [node.input[2]], axis=0)])
    graph.finish()


def keep_float(model: ModelProto) -> None:
    """Sum, of one tensor, between a layer whose weight is float and the QuantizeLinear of its result.

    ONNX Runtime rounds float weights by itself, with one scale, where activations before and behind are quantised
    (its WeightBiasQuantization): a layer that was left float because integers hurt there would not be.
    """
    graph = Rewriter(model.graph)
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or dequantized(graph, node.input[0]) is None:
            continue
        if graph.producer(node.input[1], "DequantizeLinear") is not None:
            continue
        name = node.output[0]
        while (reader := graph.sole_user(name)) is not None and reader.op_type in ("Relu", "Clip"):
            name = reader.output[0]
        if reader is not None and reader.op_type == "QuantizeLinear":
            reader.input[0] = graph.name(name)
            graph.before(reader, [helper.make_node("Sum", [name], [reader.input[0]])])
    graph.finish()


def own_int8(model: ModelProto) -> None:
    """Give every reader of an int8 initialiser (a weight's zero points) a copy of its own.

    Where a processor lacks VNNI, ONNX Runtime rewrites int8 weights and their zero points as uint8, each by its name,
    and refuses the file when a shared one comes by the second time.
    """
    graph = model.graph
    int8 = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT8}
    readers: Counter[str] = Counter()
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name not in int8:
                continue
            readers[name] += 1
            if readers[name] > 1:
                copied = graph.initializer.add()
                copied.CopyFrom(int8[name])
                copied.name = f"{name}.copy{readers[name]}"
                node.input[index] = copied.name
