"""Weights under a quantiser as its integers, packed; the model computes with equal numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.fake_quantize import FakeQuantize
from tersor.core.masked import Masked
from tersor.tensor.affine import dequantize, join_groups, quantize, split_groups
from tersor.tensor.packing import pack, packed_bytes, unpack

INTEGERS = "integers"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}

How = Mapping[str, Any]


def candidates(model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, tuple[How, int]]:
    """name → (how it is stored as integers, in how many bytes), for the weights of ``model`` that may be.

    ``{"kind": "integers", "shape", "dtype", "scale", "zero_point", "axis", "group_size", "quant_min", "quant_max"}``,
    ``"growth"`` where the step is learnt: it is scale · exp(growth); and ``"mask"`` where a mask stands before the
    quantiser: only what it lets through is stored. A weight that anything
    but the quantiser (or its mask) sees, tied or not, is none; and none whose rounded values would not come back equal.
    """
    found: dict[str, tuple[How, int]] = {}
    for original, lists in _by_original(model).items():
        name = next((name for name, _ in lists if name in tensors), None)
        if name is None or id(tensors[name]) != original:
            continue
        chains = {tuple(map(id, chain)) for _, chain in lists}
        others = {other for other, first in tied.items() if first == name}
        if len(chains) > 1 or not others <= {other for other, _ in lists}:
            continue
        how = _describe(name, lists[0][1], tensors, tied)
        if how is not None and _comes_back(tensors[name], how, lists[0][1], tensors):
            count = int(tensors[how["mask"]].sum()) if "mask" in how else tensors[name].numel()
            found[name] = (how, packed_bytes(count, _width(how)))
    return found


def _by_original(model: nn.Module) -> dict[int, list[tuple[str, list[nn.Module]]]]:
    """id of each parametrized tensor → (its name, what it goes through up to its first quantiser), at each place."""
    found: dict[int, list[tuple[str, list[nn.Module]]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, parametrize.ParametrizationList) and module.is_tensor:
            entries = list(module)
            upto = next((n for n, entry in enumerate(entries) if isinstance(entry, FakeQuantize)), len(entries))
            found.setdefault(id(module.original), []).append((f"{path}.original", entries[: upto + 1]))
    return found


def _describe(
    name: str, chain: list[nn.Module], tensors: Mapping[str, Tensor], tied: Mapping[str, str]
) -> dict[str, Any] | None:
    *before, quantizer = chain
    if tensors[name].dtype not in _DTYPES.values() or not tensors[name].numel():
        return None
    masked = len(before) == 1 and isinstance(before[0], Masked)
    if not isinstance(quantizer, FakeQuantize) or not (masked or not before):
        return None
    learnt = quantizer.log_growth is not None
    if {part.dtype for part in (quantizer.calibrated, quantizer.log_growth) if part is not None} != {torch.float32}:
        return None
    path = f"{name.removesuffix('.original')}.{len(before)}"
    how: dict[str, Any] = {
        "kind": INTEGERS, "shape": list(tensors[name].shape), "dtype": str(tensors[name].dtype).removeprefix("torch."),
        "scale": f"{path}.calibrated", "zero_point": f"{path}.zero_point",
        "axis": None if quantizer.axis is None else quantizer.axis % tensors[name].ndim,
        "group_size": quantizer.group_size, "quant_min": quantizer.quant_min, "quant_max": quantizer.quant_max,
    }  # fmt: skip
    if learnt:
        how["growth"] = f"{path}.log_growth"
    if masked:
        how["mask"] = f"{name.removesuffix('.original')}.0.keep"
    for role in {"scale", "zero_point", "growth", "mask"} & how.keys():
        how[role] = tied.get(how[role], how[role])
    return how if _width(how) <= 8 else None


@torch.no_grad()
def _comes_back(tensor: Tensor, how: How, chain: list[nn.Module], tensors: Mapping[str, Tensor]) -> bool:
    """Whether the model computes with equal numbers after the tensor was stored and read."""
    if not bool(tensor.isfinite().all()):
        return False
    read: Tensor = decode(encode(tensor, how, tensors), how, tensors).to(tensor.device)
    for entry in chain:
        tensor, read = entry(tensor), entry(read)
    return torch.equal(tensor, read)


@torch.no_grad()
def encode(tensor: Tensor, how: How, tensors: Mapping[str, Tensor]) -> Tensor:
    """The integers less ``quant_min``, in the order of the tensor, packed: uint8, one dimension."""
    tensor = tensor.detach().cpu()
    scale, zero_point = _grid(how, tensors)
    q = quantize(
        _runs(tensor.float(), how), scale, zero_point, quant_min=how["quant_min"], quant_max=how["quant_max"]
    )  # fmt: skip
    q = _joined(q, how) - how["quant_min"]
    q = q[tensors[how["mask"]].cpu()] if "mask" in how else q.reshape(-1)
    return pack(q, _width(how))


def decode(packed: Tensor, how: How, tensors: Mapping[str, Tensor]) -> Tensor:
    """x̂ = (q − zero_point) · scale, zero where the mask is. Raises ValueError or KeyError where it does not fit."""
    shape = tuple(how["shape"])
    scale, zero_point = _grid(how, tensors)
    count = math.prod(shape)
    if "mask" in how:
        keep = tensors[how["mask"]].cpu()
        if keep.dtype != torch.bool or tuple(keep.shape) != shape:
            raise ValueError(f"a mask {keep.dtype} {list(keep.shape)} for a shape {list(shape)}")
        count = int(keep.sum())
    stored = unpack(packed, _width(how), count).int() + how["quant_min"]
    if "mask" in how:
        q = _joined(zero_point.expand_as(_runs(keep, how)), how).contiguous()
        q[keep] = stored
    else:
        q = stored.reshape(shape)
    return _joined(dequantize(_runs(q, how), scale, zero_point), how).contiguous().to(_DTYPES[how["dtype"]])


def _grid(how: How, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each run, [runs, 1]."""
    scale, zero_point = tensors[how["scale"]].detach().cpu(), tensors[how["zero_point"]].detach().cpu()
    if "growth" in how:
        scale = scale * _growth(tensors[how["growth"]].detach().cpu(), scale).exp()
    shape = list(how["shape"])
    runs = 1
    if how["axis"] is not None:
        rows = shape[how["axis"]]
        runs = rows if how["group_size"] is None else math.prod(shape) // how["group_size"]
    types = (scale.dtype, zero_point.dtype)
    if types != (torch.float32, torch.int32) or not scale.numel() == zero_point.numel() == runs:
        got = f"scales {scale.dtype} {list(scale.shape)}, zero points {zero_point.dtype} {list(zero_point.shape)}"
        raise ValueError(f"{got} for {runs} runs of {shape}")
    return scale.reshape(-1, 1), zero_point.reshape(-1, 1)


def _growth(growth: Tensor, scale: Tensor) -> Tensor:
    if (growth.dtype, growth.shape) != (scale.dtype, scale.shape):
        got = f"{growth.dtype} {list(growth.shape)}"
        raise ValueError(f"a step's growth is {got}, the step {scale.dtype} {list(scale.shape)}")
    return growth


def _runs(tensor: Tensor, how: How) -> Tensor:
    """[runs, numbers that share a scale]."""
    if how["axis"] is None:
        return tensor.reshape(1, -1)
    size = how["group_size"] or tensor.numel() // tensor.shape[how["axis"]]
    return split_groups(tensor, size, how["axis"]).flatten(0, 1)


def _joined(runs: Tensor, how: How) -> Tensor:
    shape = tuple(how["shape"])
    return runs.reshape(shape) if how["axis"] is None else join_groups(runs, shape, how["axis"])


def _width(how: How) -> int:
    """Bits of an integer."""
    return max(2, (how["quant_max"] - how["quant_min"]).bit_length())


def read(how: Mapping[str, Any], shape: list[int]) -> How:
    """What architecture.json says of a weight, checked. Raises TypeError, KeyError or ValueError."""
    axis, size = how["axis"], how["group_size"]
    if not (axis is None or (type(axis) is int and 0 <= axis < len(shape))) or 0 in shape:
        raise ValueError(f"axis {axis!r} of {shape}")
    if not (size is None or (type(size) is int and size > 0 and axis is not None)):
        raise ValueError(f"groups of {size!r}")
    low, high = how["quant_min"], how["quant_max"]
    if type(low) is not int or type(high) is not int or not 0 < high - low < 256 or abs(low) > 256:
        raise ValueError(f"integers from {low!r} to {high!r}")
    if how["dtype"] not in _DTYPES:
        raise ValueError(f"{how['dtype']!r} is no type of weights")
    found = {
        "kind": INTEGERS, "shape": shape, "dtype": str(how["dtype"]), "scale": str(how["scale"]),
        "zero_point": str(how["zero_point"]), "axis": axis, "group_size": size, "quant_min": low, "quant_max": high,
    }  # fmt: skip
    return found | {role: str(how[role]) for role in ("growth", "mask") if role in how}
