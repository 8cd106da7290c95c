"""Graph passes for files whose weights alone are integers. Each edits an ONNX model in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from tersor.export.integers import Linear, dequantized, linear_of
from tersor.export.onnx_graph import MOVES, Rewriter, attribute
from tersor.tensor.packing import pack

MICROSOFT = "com.microsoft"
_BLOCKS = (256, 128, 64, 32, 16)  # the runs of inputs with a scale of their own that MatMulNBits knows
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_FLOAT, _INT8 = 1, 4  # MatMulNBits' accuracy_level: activations stay float32, or are rounded to int8, block by block


@dataclass(frozen=True, eq=False)
class Grid:
    """A weight as integers [rows, groups, size], with scale and zero point [rows, groups]."""

    integers: NDArray[Any]
    scale: NDArray[np.float32]
    zero_point: NDArray[Any]

    @property
    def bits(self) -> int:
        """4 where its integers fit, else 8."""
        low, high = int(self.integers.min(initial=0)), int(self.integers.max(initial=0))
        four = (-8, 7) if self.integers.dtype == np.int8 else (0, 15)
        return 4 if four[0] <= low and high <= four[1] and (self.zero_point <= four[1]).all() else 8

    def stored(self, bits: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """(integers, zero points) without a sign, as they are stored: signed ones are moved up by 2^(bits − 1)."""
        up = 2 ** (bits - 1) if self.integers.dtype == np.int8 else 0
        moved = [(array.astype(np.int16) + up).astype(np.uint8) for array in (self.integers, self.zero_point)]
        return moved[0], moved[1]


def grid_of(graph: Rewriter, name: str) -> Grid | None:
    """The grid of a weight [rows, inputs] that is constant integers behind DequantizeLinear; None of any other.

    It has one scale for all, for each row or, then reshaped, for each group of a row.
    """
    reshape = graph.producer(name, "Reshape")
    shape = None if reshape is None else graph.value(reshape.input[1])
    node = graph.producer(name if reshape is None else reshape.input[0], "DequantizeLinear")
    if node is None or (reshape is not None and (shape is None or len(shape) != 2)):
        return None
    given = _constants(graph, node)
    if given is None:
        return None
    integers, scale, zero_point = given
    if integers.ndim != 2 or integers.dtype.itemsize > 1 or (scale.ndim and attribute(node, "axis", 1) != 0):
        return None
    rows = len(integers) if shape is None else int(shape[0])
    if rows < 1 or len(integers) % rows:
        return None
    runs, groups = (len(integers),), (rows, len(integers) // rows)
    return Grid(
        integers.reshape(*groups, -1),
        np.broadcast_to(scale, runs).reshape(groups).astype(np.float32),
        np.broadcast_to(zero_point, runs).reshape(groups),
    )


def _constants(graph: Rewriter, node: NodeProto) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None:
    """(integers, scale, zero point) of a DequantizeLinear where all three are constants."""
    found = [graph.value(name) for name in node.input]
    return (found[0], found[1], found[2]) if len(found) == 3 and all(value is not None for value in found) else None  # type: ignore[return-value]


def fold_constant_moves(model: ModelProto) -> None:
    """Reshape of an initialiser, and Cast of one to integers, becomes an initialiser: the exporter leaves the large
    ones. Weights whose groups have scales of their own are reshaped before they are rounded; zero points are cast, of
    which a table of embeddings has one for each row."""
    graph = Rewriter(model.graph)
    for node in model.graph.node:
        value = None if node.output[0] in graph.outputs else _moved(graph, node)
        if value is not None:
            folded = graph.constant(value, node.output[0])
            graph.constants[node.output[0]] = graph.constants[folded]  # a further Reshape may follow
            graph.rename(node.output[0], folded)
            graph.drop(node)
    graph.finish()


def _moved(graph: Rewriter, node: NodeProto) -> NDArray[Any] | None:
    """What Reshape, or Cast to integers, makes of a constant; None of anything else."""
    value = graph.value(node.input[0]) if node.op_type in ("Reshape", "Cast") else None
    if value is None:
        return None
    if node.op_type == "Cast":
        kind = helper.tensor_dtype_to_np_dtype(attribute(node, "to", TensorProto.FLOAT))
        return value.astype(kind) if kind.kind in "iu" and value.dtype.kind in "iu" else None
    shape = graph.value(node.input[1])
    return None if shape is None or not (shape != 0).all() else value.reshape([int(size) for size in shape])


def products_of_few_bits(model: ModelProto) -> None:
    """A linear layer of float activations whose weight alone is integers becomes MatMulNBits: 4 or 8 bits a weight, in
    blocks of 16 to 256 inputs. So does one with scales for groups, which has no other kernel; activations that are
    rounded already are not rounded again there. Where no block divides the groups, the layer stays as it is."""
    graph = Rewriter(model.graph)
    for node in model.graph.node:
        linear = linear_of(graph, node) if node.op_type in ("Gemm", "MatMul") else None
        grid = None if linear is None else grid_of(graph, linear.weight)
        if linear is None or grid is None:
            continue
        rows, groups, size = grid.integers.shape
        rounded = dequantized(graph, linear.x) is not None
        if groups == 1 and rounded:
            continue  # all integers: a kernel of its own
        fitting = [block for block in _BLOCKS if (block <= max(size, _BLOCKS[-1]) if groups == 1 else not size % block)]
        if fitting:
            graph.before(linear.nodes[-1], [_few_bits(graph, linear, grid, fitting[0], _FLOAT if rounded else _INT8)])
            graph.drop(*linear.nodes)
            _import_microsoft(model)
    graph.finish()


def _few_bits(graph: Rewriter, linear: Linear, grid: Grid, block: int, accuracy: int) -> NodeProto:
    rows, groups, size = grid.integers.shape
    inputs, bits = groups * size, grid.bits
    blocks = -(-inputs // block)
    integers, zeros = grid.stored(bits)
    repeated = blocks if groups == 1 else blocks // groups  # a group may be several blocks
    scale, zeros = np.repeat(grid.scale, repeated, axis=1), np.repeat(zeros, repeated, axis=1)
    padded = np.repeat(zeros[:, -1:], blocks * block, axis=1)
    padded[:, :inputs] = integers.reshape(rows, inputs)
    packed = pack(padded.reshape(rows, blocks, block), bits)
    plain = bool((zeros == 2 ** (bits - 1)).all())  # what the kernel takes where none is given
    given = [
        linear.x,
        graph.constant(packed, linear.weight),
        graph.constant(scale, "scale"),
        "" if plain else graph.constant(pack(zeros, bits), "zero"),
        "",
        linear.bias or "",
    ]
    while not given[-1]:
        given.pop()
    return helper.make_node(
        "MatMulNBits", given, [linear.result], name=linear.name, domain=MICROSOFT,
        K=inputs, N=rows, bits=bits, block_size=block, accuracy_level=accuracy,
    )  # fmt: skip


def look_up_integers(model: ModelProto) -> None:
    """Of an embedding whose table is integers the rows that are looked up become floats, not the whole table."""
    graph = Rewriter(model.graph)
    for node in model.graph.node:
        if node.op_type != "Gather" or attribute(node, "axis", 0) or node.input[1] not in graph.shapes:
            continue
        grid, rank = grid_of(graph, node.input[0]), len(graph.shapes[node.input[1]])
        if grid is None:
            continue
        nodes: list[NodeProto] = []
        floats = _gather(graph, nodes, grid.integers, node.input[1])
        if grid.zero_point.any():
            zeros = _gather(graph, nodes, grid.zero_point[..., None], node.input[1])
            floats = _append(graph, nodes, "Sub", [floats, zeros])
        scale = _gather(graph, nodes, grid.scale[..., None], node.input[1])
        product = _append(graph, nodes, "Mul", [floats, scale])
        shape = graph.constant(np.array([0] * rank + [grid.integers[0].size]), "shape")
        nodes.append(helper.make_node("Reshape", [product, shape], list(node.output)))
        graph.before(node, nodes)
        graph.drop(node)
    graph.finish()


def _gather(graph: Rewriter, nodes: list[NodeProto], table: NDArray[Any], indices: str) -> str:
    """The rows of the table that are looked up, as floats."""
    name = _append(graph, nodes, "Gather", [graph.constant(table, "table"), indices])
    return name if table.dtype == np.float32 else _append(graph, nodes, "Cast", [name], to=TensorProto.FLOAT)


def _append(graph: Rewriter, nodes: list[NodeProto], operator: str, given: Sequence[str], **said: Any) -> str:
    nodes.append(helper.make_node(operator, given, [graph.name(operator)], **said))
    return nodes[-1].output[0]


def weights_of_float_layers(model: ModelProto) -> None:
    """DequantizeLinear of a weight whose layer computes in float becomes Cast, Sub and Mul, which ONNX Runtime computes
    once when it loads the file; DequantizeLinear it would compute in each run, and keep its convolutions from their own
    layout."""
    graph = Rewriter(model.graph)
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or _feeds_integers(graph, node.output[0]):
            continue
        given = _constants(graph, node)
        if given is None:
            continue
        integers, scale, zero = given
        axis = attribute(node, "axis", 1)
        along = [-1 if d == axis % integers.ndim else 1 for d in range(integers.ndim)] if scale.ndim else []
        nodes: list[NodeProto] = []
        floats = _append(graph, nodes, "Cast", [node.input[0]], to=TensorProto.FLOAT)
        if zero.any():
            zeros = graph.constant(zero.astype(np.float32).reshape(along), "zero")
            floats = _append(graph, nodes, "Sub", [floats, zeros])
        steps = graph.constant(scale.astype(np.float32).reshape(along), "scale")
        nodes.append(helper.make_node("Mul", [floats, steps], list(node.output)))
        graph.before(node, nodes)
        graph.drop(node)
    graph.finish()


def _feeds_integers(graph: Rewriter, name: str) -> bool:
    """Whether a layer reads the weight, moved at most, together with integers."""
    for reader in graph.users.get(name, []):
        if reader.op_type in MOVES and _feeds_integers(graph, reader.output[0]):
            return True
        if reader.op_type in _PRODUCTS and dequantized(graph, reader.input[0]) is not None:
            return True
    return False


def _import_microsoft(model: ModelProto) -> None:
    if all(entry.domain != MICROSOFT for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
