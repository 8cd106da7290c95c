"""Graph pass: linear layers whose activations are rounded on a grid of their own in each run."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from tersor.export.integers import Linear, dequantized_weight, linear_of
from tersor.export.onnx_graph import MOVES, Rewriter


def dynamic_products(model: ModelProto) -> None:
    """A linear layer that reads DynamicQuantizeLinear and DequantizeLinear, moved at most, and an int8 weight becomes
    MatMulInteger, scaled afterwards: what ONNX Runtime fuses into one kernel."""
    graph = Rewriter(model.graph)
    for node in model.graph.node:
        linear = linear_of(graph, node) if node.op_type in ("Gemm", "MatMul") else None
        weight = None if linear is None else dequantized_weight(graph, linear.weight)
        if linear is None or weight is None or graph.value(weight.input[0]).dtype != np.int8:  # type: ignore[union-attr]
            continue
        moves = _moves(graph, linear.x)
        if moves is not None:
            graph.before(linear.nodes[-1], _integers(graph, linear, weight, *moves))
            graph.drop(*linear.nodes)
    graph.finish()


def _moves(graph: Rewriter, name: str) -> tuple[NodeProto, list[NodeProto]] | None:
    """The DequantizeLinear of dynamic integers before ``name``, and what moves its numbers, in order; None where there
    is none."""
    movers: list[NodeProto] = []
    while (mover := graph.producers.get(name)) is not None and mover.op_type in MOVES:
        movers.insert(0, mover)
        name = mover.input[0]
    node = graph.producer(name, "DequantizeLinear")
    dynamic = node is not None and graph.producer(node.input[0], "DynamicQuantizeLinear") is not None
    return (node, movers) if node is not None and dynamic else None


def _integers(
    graph: Rewriter, linear: Linear, weight: NodeProto, dequantize: NodeProto, movers: list[NodeProto]
) -> list[NodeProto]:
    integers, scale, zero = dequantize.input
    nodes: list[NodeProto] = []
    for mover in movers:
        moved = NodeProto.FromString(mover.SerializeToString())
        moved.input[0], moved.output[0] = integers, graph.name(mover.output[0])
        nodes.append(moved)
        integers = moved.output[0]
    values, steps, offsets = (graph.value(name) for name in weight.input)
    assert values is not None and steps is not None and offsets is not None, "a constant weight"
    columns = graph.constant(np.ascontiguousarray(values.T), linear.weight)
    products, floats, result = graph.name("products"), graph.name("floats"), graph.name("result")
    both = graph.name("scale")
    nodes += [
        helper.make_node(
            "MatMulInteger", [integers, columns, zero, graph.constant(offsets, "zero")], [products], name=linear.name
        ),
        helper.make_node("Cast", [products], [floats], to=TensorProto.FLOAT),
        helper.make_node("Mul", [scale, graph.constant(steps, "scale")], [both]),
    ]
    if linear.bias is None:
        return [*nodes, helper.make_node("Mul", [floats, both], [linear.result])]
    nodes.append(helper.make_node("Mul", [floats, both], [result]))
    return [*nodes, helper.make_node("Add", [result, linear.bias], [linear.result])]
