"""Graph pass: integers that fit four bits are stored in four."""

from __future__ import annotations

from onnx import ModelProto, TensorProto, helper, numpy_helper

from tersor.export.onnx_graph import Rewriter

_NARROW = {TensorProto.INT8: (TensorProto.INT4, -8, 7), TensorProto.UINT8: (TensorProto.UINT4, 0, 15)}
_FEWEST = 256  # values; below, the Cast takes more than it saves
_OPSET = 21  # the first whose Cast knows integers of four bits


def narrow_integers(model: ModelProto) -> None:
    """Store 8-bit weights whose integers all fit four bits two to a byte, behind a Cast to 8 bits.

    ONNX Runtime casts them once, when it loads the file, and runs the kernels that it would run anyway: half the bytes,
    the same numbers, the same speed. Nothing is done to a file of an opset that knows no such integers.
    """
    if next(entry.version for entry in model.opset_import if entry.domain == "") < _OPSET:
        return
    graph = Rewriter(model.graph)
    for tensor in model.graph.initializer:
        readers = graph.users.get(tensor.name, [])
        if tensor.data_type not in _NARROW or len(tensor.dims) < 2 or not readers:
            continue
        kind, low, high = _NARROW[tensor.data_type]
        integers = numpy_helper.to_array(tensor)
        if integers.size < _FEWEST or integers.min() < low or integers.max() > high:
            continue
        if any(reader.domain for reader in readers):  # MatMulNBits packs its own bytes
            continue
        stored = graph.name("four")
        graph.before(readers[0], [helper.make_node("Cast", [stored], [tensor.name], to=tensor.data_type)])
        tensor.CopyFrom(numpy_helper.from_array(integers.astype(helper.tensor_dtype_to_np_dtype(kind)), stored))
    graph.finish()
