"""Weights in half precision in an ONNX file: stored so, and cast to float32 for the operators that read them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.errors import InputError
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


def has_floats(path: Path) -> bool:
    """Whether ``store_file_half`` finds a weight to round in the ONNX file."""
    return bool(_floats(onnx.load(path, load_external_data=False)))


def _floats(model: ModelProto) -> list[TensorProto]:
    return [each for each in model.graph.initializer if each.data_type == TensorProto.FLOAT and len(each.dims) > 1]


def store_file_half(path: Path, to: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the ONNX file at ``path`` to ``to`` with its float32 weights rounded to ``dtype`` and stored so.

    Meant are initialisers of two or more axes; one beyond what ``dtype`` reaches stays as it is. Operators compute as
    before, on the rounded weights. Returns ``to``. Raises InputError where there is no float32 weight.
    """
    model = onnx.load(path)
    found = _floats(model)
    if not found:
        raise InputError("the file has no float32 weights to round", where=str(path), got="integers or vectors alone")
    for tensor in found:
        value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        rounded = value.to(dtype).float()
        if torch.equal(rounded.isinf(), value.isinf()):
            tensor.CopyFrom(numpy_helper.from_array(rounded.numpy(), tensor.name))
    store_half(model, (dtype,))
    onnx.save(model, to)
    return to
