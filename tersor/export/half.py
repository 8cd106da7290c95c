"""Weights in half precision in an ONNX file: stored so, and cast to float32 for the operators that read them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.widened import HALVES, Widened

_ONNX = dict(zip(HALVES, (TensorProto.FLOAT16, TensorProto.BFLOAT16), strict=True))


def widen(model: nn.Module) -> set[torch.dtype]:
    """Make every weight that is stored in half precision a plain float32 one, in place; the types that there were."""
    found = set()
    for chain in model.modules():
        if isinstance(chain, parametrize.ParametrizationList) and any(isinstance(entry, Widened) for entry in chain):
            stored = chain.get_parameter("original")
            if stored.dtype in HALVES:  # tied weights come once for each place
                found.add(stored.dtype)
                stored.data = stored.data.float()
            for number in reversed([number for number, entry in enumerate(chain) if isinstance(entry, Widened)]):
                chain.pop(number)
            if not len(chain):
                chain.append(nn.Identity())
    return found


def store_half(model: ModelProto, dtypes: Collection[torch.dtype]) -> None:
    """Store each float32 initialiser of two or more axes that a type of ``dtypes`` holds exactly in that type.

    A Cast gives float32 back, which the runtime folds when it loads the file: the outputs are the same, bit for bit.
    """
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        half = next((value.to(dtype) for dtype in HALVES if dtype in dtypes and _exact(value, dtype)), None)
        if half is None:
            continue
        name, tensor.name = tensor.name, f"{tensor.name}.half"
        tensor.ClearField("float_data")
        tensor.data_type = _ONNX[half.dtype]
        tensor.raw_data = half.contiguous().view(torch.uint8).numpy().tobytes()
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _exact(value: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(value.to(dtype).float(), value)
