"""What an ONNX file says of its inputs, read without running it: shapes to make inputs up from, a fixed batch."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import TensorProto, ValueInfoProto
from torch import Tensor

from tersor.core.errors import InputError

_FLOATS: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64, TensorProto.FLOAT16: torch.float16,
}  # fmt: skip
_INTEGERS: dict[int, torch.dtype] = {
    TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32, TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8, TensorProto.BOOL: torch.bool,
}  # fmt: skip
LARGEST = 2**28  # elements of one sample: a file may declare anything


def fixed_batch(path: Path) -> int | None:
    """The first dimension of the file's first input where it is a number; None where it is free."""
    inputs = _inputs(path)
    shape = _shape(inputs[0]) if inputs else []
    return shape[0] if shape else None


def made_up_inputs(path: Path, seed: int = 0) -> tuple[Tensor, ...]:
    """One sample for each input of the file: normal random numbers, ones for integers (a valid index, a full mask).

    Raises InputError where a size other than the batch is free, and for types without such numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(_made_up(value, path, generator) for value in _inputs(path))


def _made_up(value: ValueInfoProto, path: Path, generator: torch.Generator) -> Tensor:
    where, kind = f"{path}, input {value.name}", value.type.tensor_type.elem_type
    shape = [size if size is not None or number else 1 for number, size in enumerate(_shape(value))]
    known = value.type.tensor_type.HasField("shape")
    if not known or any(size is None for size in shape):
        raise InputError(
            "the file leaves a size free that is not the batch", where=where,
            got=[size if size is not None else "free" for size in shape] if known else "no shape",
            expected="numbers after the first dimension",
            do="Say what the models are given: --data task.py",
        )  # fmt: skip
    sizes = [size for size in shape if size is not None]
    count = 1
    for size in sizes:
        count *= size
    if count > LARGEST or kind not in {**_FLOATS, **_INTEGERS}:
        raise InputError(
            "no inputs can be made up for this", where=where, got=f"{TensorProto.DataType.Name(kind)} {sizes}",
            expected=f"floats, integers or booleans, at most {LARGEST:,} of them", do="Name data: --data task.py",
        )  # fmt: skip
    if kind in _FLOATS:
        return torch.randn(sizes, generator=generator).to(_FLOATS[kind])
    return torch.ones(sizes, dtype=_INTEGERS[kind])


def _inputs(path: Path) -> list[ValueInfoProto]:
    """The inputs that have no weight as their default."""
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def _shape(value: ValueInfoProto) -> list[int | None]:
    return [size.dim_value if size.dim_value > 0 else None for size in value.type.tensor_type.shape.dim]
