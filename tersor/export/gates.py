"""Graph pass: hard sigmoid in integers."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, helper

from tersor.export.integers import dequantized
from tersor.export.onnx_graph import Rewriter, attribute


def requantized_gates(model: ModelProto) -> None:
    """HardSigmoid between integers becomes an addition that changes the grid, which ONNX Runtime has in integers.

    clip(α·x + β, 0, 1) in steps of s from zero on is x + β/α in steps of s/α: rounding is the same, and the integers'
    ends clip. So where β/s is one of the integers and 0 and 1 are at or beyond their ends, the QuantizeLinear gets the
    sum's grid, and the DequantizeLinear behind it keeps the gate's.
    """
    graph = Rewriter(model.graph)
    for node in model.graph.node:
        quantize = graph.sole_user(node.output[0], "QuantizeLinear") if node.op_type == "HardSigmoid" else None
        x = None if quantize is None else dequantized(graph, node.input[0])
        if quantize is None or x is None or len(x.input) < 3:
            continue
        kind = graph.constants[quantize.input[2]].data_type
        grid = _grid_of_sum(graph, node, quantize)
        if grid is None or kind != graph.constants[x.input[2]].data_type:
            continue
        scale, zero, shift = (graph.constant(value, name) for value, name in zip(grid, _NAMES, strict=True))
        offset, total = graph.name(node.input[0]), graph.name(node.output[0])
        nodes = [
            helper.make_node("DequantizeLinear", [shift, scale, zero], [offset]),
            helper.make_node("Add", [node.input[0], offset], [total]),
        ]
        graph.before(node, nodes)
        graph.drop(node)
        quantize.input[:] = [total, scale, zero]
    graph.finish()


_NAMES = ("scale", "zero", "shift")


def _grid_of_sum(
    graph: Rewriter, node: NodeProto, quantize: NodeProto
) -> tuple[np.float32, np.generic, np.generic] | None:
    """(scale, zero point) on which x + β/α has the gate's integers, and the integer that is β/α there; None where there
    is no such grid."""
    scale, zero = (graph.value(name) for name in quantize.input[1:3])
    alpha, beta = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
    if scale is None or zero is None or scale.ndim or zero.dtype.itemsize != 1 or alpha <= 0:
        return None
    full, step = np.iinfo(zero.dtype), float(scale)
    shift = int(zero) + beta / step
    if int(zero) != full.min or (full.max - full.min) * step > 1 or not shift.is_integer() or shift > full.max:
        return None
    return np.float32(step / alpha), zero.dtype.type(zero), zero.dtype.type(shift)
