"""Tensors in the encoding of the fewest bytes: under their mask, by bitmap, gaps or n of m, or as integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.errors import ArtifactError
from tersor.core.masked import Masked
from tersor.export import packed_tensors
from tersor.export.packed_tensors import INTEGERS
from tersor.tensor.encodings import N_OF_M, Bitmap, Gaps, NOfM, gap_bytes, gaps, places, sizes, smallest

BITS = "tersor.bits."  # where values stand: of a bitmap, of gaps, or of n of m
PLACES, GAPS = "places", "gaps"
LEAST_SAVED = 512  # bytes; less is not worth the entry
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PATTERNS = {f"{n}:{m}": (n, m) for n, m in N_OF_M}
_BY_VALUE = ("bitmap", GAPS, *_PATTERNS)

Encoded = Mapping[str, Mapping[str, Any]]


def choose(model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> Encoded:
    """name → how it is best stored, for those of ``tensors`` that are not best stored as they are.

    ``{"kind": "masked", "shape", "mask"}``: the values where that mask is true, for a weight that only this mask sees,
    so that what it hides never shows; ``{"kind": "bitmap" | "gaps" | "1:4" | "2:4", "shape"}``: by the values
    themselves; ``{"kind": "places", "shape"}``: a mask of few ones by the gaps between them;
    ``{"kind": "integers", …}``: by what a quantiser makes of them (``packed_tensors``).
    ``tied``: name → name of the tensor that it is; such a one is never taken for masked.
    """
    shared = {*tied, *tied.values()}
    masks = {name: mask for name, mask in _masks(model).items() if not {name, mask} & shared}
    found: dict[str, packed_tensors.How] = {}
    rounded = packed_tensors.candidates(model, tensors, tied)
    for name, tensor in tensors.items():
        if tensor.is_complex() or not tensor.numel() or tensor.is_quantized:
            continue
        if tensor.dtype == torch.bool:
            bits = -(-tensor.numel() // 8)
            if int(tensor.sum()) < bits and bits - gap_bytes(tensor.cpu()) >= LEAST_SAVED:
                found[name] = {"kind": PLACES, "shape": list(tensor.shape)}
            continue
        bytes_ = {kind: count for kind, count in sizes(_words(tensor)).items() if kind in ("dense", *_BY_VALUE)}
        mask = masks.get(name)
        if mask is not None:
            bytes_["masked"] = int(tensors[mask].sum()) * tensor.element_size()
        how, bytes_[INTEGERS] = rounded.get(name, ({}, bytes_["dense"]))
        if GAPS in bytes_:  # which older readers do not know: only where it saves as much again
            bytes_[GAPS] += LEAST_SAVED
        kind = smallest(bytes_)
        if bytes_["dense"] - bytes_[kind] >= LEAST_SAVED:
            found[name] = {"kind": kind, "shape": list(tensor.shape), **({"mask": mask} if kind == "masked" else how)}
    return found


def _masks(model: nn.Module) -> dict[str, str]:
    """Name of a stored weight → name of the mask that is the first to see it; not of one that several masks see."""
    found: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, parametrize.ParametrizationList) and module.is_tensor:
            first = module[0]
            mask = f"{path}.0.keep" if isinstance(first, Masked) else ""
            found.setdefault(id(module.original), []).append((f"{path}.original", mask))
    return {name: mask for ((name, mask), *others) in found.values() if mask and not others}


def encode(name: str, tensor: Tensor, how: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is stored of one tensor: its values, one-dimensional, under its own name, and where they stand."""
    tensor = tensor.detach().cpu().contiguous()
    if how["kind"] == PLACES:
        return {name: gaps(tensor)}
    words = _words(tensor)
    match how["kind"]:
        case "masked":
            return {name: words[tensors[how["mask"]].cpu()].view(tensor.dtype)}
        case packed_tensors.INTEGERS:
            return {name: packed_tensors.encode(tensor, how, tensors)}
        case "bitmap":
            bitmap = Bitmap.encode(words)
            return {name: bitmap.values.view(tensor.dtype), BITS + name: bitmap.bits}
        case "gaps":
            steps = Gaps.encode(words)
            return {name: steps.values.view(tensor.dtype), BITS + name: steps.steps}
        case kind:
            of = NOfM.encode(words, *_PATTERNS[kind])
            return {name: of.values.reshape(-1).view(tensor.dtype), BITS + name: of.positions}


def in_order(encoded: Encoded) -> list[tuple[str, Mapping[str, Any]]]:
    """What is decoded first: masks, which others need, and integers last, which need zero points."""
    return sorted(encoded.items(), key=lambda entry: (entry[1]["kind"] != PLACES, entry[1]["kind"] == INTEGERS))


def decode(name: str, how: Mapping[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """The tensor; what says where its values stand is taken out of ``tensors``. Raises ArtifactError."""
    values, shape = tensors.get(name), tuple(how["shape"])
    if values is None or values.ndim != 1 or values.dtype == torch.bool or values.is_complex():
        raise ArtifactError("an encoded tensor's values are not there", where=name, expected="one dimension of numbers")
    try:
        if how["kind"] == PLACES:
            return places(values, shape)
        if how["kind"] == "masked":
            return _under_mask(values, tensors[how["mask"]], shape)
        if how["kind"] == INTEGERS:
            return packed_tensors.decode(values, how, tensors)
        bits = tensors.pop(BITS + name)
        if how["kind"] == "bitmap":
            return Bitmap(shape, bits, _words(values)).decode().view(values.dtype)
        if how["kind"] == GAPS:
            return Gaps(shape, bits, _words(values)).decode().view(values.dtype)
        return NOfM(shape, *_PATTERNS[how["kind"]], bits, _words(values)).decode().view(values.dtype)
    except (KeyError, ValueError, OverflowError, TypeError, RuntimeError, MemoryError) as error:
        got = f"no {error}" if isinstance(error, KeyError) else str(error)[:300]
        raise ArtifactError("an encoded tensor does not fit its shape", where=name, got=got) from error


def _under_mask(values: Tensor, keep: Tensor, shape: tuple[int, ...]) -> Tensor:
    if keep.dtype != torch.bool or tuple(keep.shape) != shape or len(values) != int(keep.sum()):
        raise ValueError(f"{len(values)} values for a mask {list(keep.shape)} with {int(keep.sum())} ones")
    found = torch.zeros(shape, dtype=values.dtype)
    found[keep] = values
    return found


def read(data: Any) -> Encoded:
    """The ``encoded`` of architecture.json, checked. Raises TypeError or ValueError."""
    found: dict[str, packed_tensors.How] = {}
    for name, how in dict(data).items():
        kind, shape = how["kind"], [size(n) for n in how["shape"]]
        if kind == INTEGERS:
            found[str(name)] = packed_tensors.read(how, shape)
            continue
        if kind not in ("masked", PLACES, *_BY_VALUE):
            raise ValueError(f"{kind!r} is no encoding")
        found[str(name)] = {"kind": kind, "shape": shape, **({"mask": str(how["mask"])} if kind == "masked" else {})}
    return found


def size(value: Any) -> int:
    """A dimension out of JSON. Raises ValueError where it is none."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value


def _words(tensor: Tensor) -> Tensor:
    """The same bytes as integers, of which only +0.0 is zero."""
    return tensor.detach().cpu().contiguous().view(_WORDS[tensor.element_size()])
