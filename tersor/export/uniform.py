"""Graph pass: masks that hide nothing go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from tersor.export.onnx_graph import Rewriter, attribute

# Operators that give the numbers of their first input, some of them, or its largest or smallest.
_KEEP = {
    "Expand", "Flatten", "Identity", "ReduceMax", "ReduceMin", "Reshape", "Slice", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
}  # fmt: skip
_COMPUTE: dict[str, Callable[..., Any]] = {"And": np.logical_and, "Not": np.logical_not, "Or": np.logical_or}


def drop_uniform_masks(model: ModelProto) -> None:
    """Where whose condition is the same everywhere becomes the side that it takes, and an Add of zeros everywhere its
    other operand. Models make a mask of ones as large as the batch where the user gives none; a runtime cannot see
    through it, and it costs passes over every score of attention."""
    graph = Rewriter(model.graph)
    shapes = _named_shapes(model.graph)
    uniform: dict[str, NDArray[Any]] = {}
    for name, tensor in graph.constants.items():
        value = numpy_helper.to_array(tensor)
        if value.size and value.dtype.kind in "bf" and (value == value.flat[0]).all():
            uniform[name] = value.flat[0]
    for node in model.graph.node:
        value = _uniform(node, uniform)
        if value is not None:
            uniform[node.output[0]] = value
            continue
        kept = _kept(node, uniform)
        if kept is None or node.output[0] in graph.outputs:
            continue
        if shapes.get(kept) == shapes.get(node.output[0]) is not None:
            graph.rename(node.output[0], kept)
            graph.drop(node)
    graph.finish()


def _uniform(node: NodeProto, uniform: dict[str, Any]) -> Any:
    """The value that every number of the node's result has; None where they may differ."""
    if node.op_type in _KEEP:
        return uniform.get(node.input[0])
    given = [uniform.get(name) for name in node.input]
    if any(value is None for value in given):
        return None
    if node.op_type in _COMPUTE:
        return np.asarray(_COMPUTE[node.op_type](*given))[()]
    if node.op_type == "Cast":
        return np.asarray(given[0]).astype(helper.tensor_dtype_to_np_dtype(attribute(node, "to", 0)))[()]
    return (given[1] if given[0] else given[2]) if node.op_type == "Where" else None


def _kept(node: NodeProto, uniform: dict[str, Any]) -> str | None:
    """Which of its inputs the node gives unchanged, broadcast at most; None where it does not."""
    if node.op_type == "Where" and node.input[0] in uniform:
        return node.input[1] if uniform[node.input[0]] else node.input[2]
    if node.op_type == "Add":
        for name, other in (node.input, reversed(node.input)):
            if uniform.get(name) == 0:
                return str(other)
    return None


def _named_shapes(graph: GraphProto) -> dict[str, list[int | str]]:
    """name → sizes, a size that is not fixed by its name; values with a size that has neither are left out."""
    found: dict[str, list[int | str]] = {}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") or d.dim_param for d in dims):
            found[value.name] = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims]
    return found
