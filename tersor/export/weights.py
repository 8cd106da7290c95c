"""A model's tensors as one safetensors file: tied tensors once, bool tensors as bits; where asked, zeros left out and
rounded weights as integers, and back without guessing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tersor.core.errors import ArtifactError
from tersor.export import sparse_tensors
from tersor.export.sparse_tensors import BITS, Encoded

EDITS = "tersor.edits."
BUFFERS = "tersor.buffers."  # buffers that the state dict leaves out

Encode = Literal["dense", "smallest"]


@dataclass(frozen=True)
class Layout:
    """What the tensors file cannot say itself, plain JSON values.

    ``tied``: name → name of the tensor that it shares. ``packed``: name of a bool tensor → its shape (it is stored as
    uint8, eight values to a byte). ``extra``: name → what a module's ``get_extra_state`` gave. ``encoded``: name → how
    a tensor is stored that has zeros or is rounded (``sparse_tensors``).
    """

    tied: Mapping[str, str]
    packed: Mapping[str, list[int]]
    extra: Mapping[str, Any]
    encoded: Encoded = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The layout as plain JSON values."""
        said = {"tied": dict(self.tied), "packed": dict(self.packed), "extra_state": dict(self.extra)}
        return {**said, "encoded": {name: dict(how) for name, how in self.encoded.items()}} if self.encoded else said

    @classmethod
    def from_json(cls, data: Any) -> Layout:
        """The inverse of ``to_json``. Raises ArtifactError where the data are no layout."""
        try:
            tied = {str(name): str(other) for name, other in data["tied"].items()}
            packed = {str(name): [sparse_tensors.size(n) for n in shape] for name, shape in data["packed"].items()}
            return cls(tied, packed, dict(data["extra_state"]), sparse_tensors.read(data.get("encoded", {})))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            reason = repr(error)[:200]
            raise ArtifactError("the layout cannot be read", where="architecture.json", got=reason) from error


def model_tensors(model: nn.Module, encode: Encode = "dense") -> tuple[dict[str, Tensor], Layout]:
    """Every tensor that ``model`` needs to be what it is, by name, and the layout that goes with them.

    The state dict, and under ``tersor.buffers.`` the buffers that it leaves out. ``encode``: "smallest" lets zeros be
    left out, and rounded weights be integers, where that saves bytes. Raises ArtifactError for extra state that JSON
    cannot hold.
    """
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    for name, value in state.items():
        if name.startswith((EDITS, BUFFERS, BITS)):
            raise ArtifactError("a tensor has a reserved name", where=name, do="Rename the module 'tersor'")
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            extra[name] = _plain(name, value)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in state:
            tensors[BUFFERS + name] = buffer
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        if first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
    once = {name: tensor for name, tensor in tensors.items() if name not in tied}
    encoded = sparse_tensors.choose(model, once, tied) if encode == "smallest" else {}
    bools = {name: list(tensor.shape) for name, tensor in once.items() if tensor.dtype == torch.bool}
    packed = {name: shape for name, shape in bools.items() if name not in encoded}
    return once, Layout(tied, packed, extra, encoded)


def _plain(name: str, value: Any) -> Any:
    try:
        same = json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ArtifactError(
            "a module's extra state cannot be saved without pickle", where=name, got=type(value).__name__,
            expected="a tensor or plain JSON values", do="Let get_extra_state return one of those",
        )  # fmt: skip
    return value


def to_bytes(tensors: Mapping[str, Tensor], layout: Layout) -> bytes:
    """The safetensors file. Raises ArtifactError for a kind of tensor that it cannot hold (sparse, quantised)."""
    try:
        flat: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name in layout.encoded:
                flat |= sparse_tensors.encode(name, tensor, layout.encoded[name], tensors)
            else:
                flat[name] = _pack(tensor) if name in layout.packed else _owned(tensor)
        return safetensors.torch.save(flat)
    except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError, SafetensorError) as error:
        raise ArtifactError("the weights cannot be saved", where="model.safetensors", got=str(error)[:300]) from error


def _owned(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _pack(tensor: Tensor) -> Tensor:
    bits = tensor.detach().cpu().reshape(-1).numpy()
    return torch.from_numpy(np.packbits(bits))


def from_bytes(data: bytes, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a safetensors file, bits unpacked and tied names filled in. Raises ArtifactError."""
    try:
        stored = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
        raise ArtifactError("the weights cannot be read", where="model.safetensors", got=str(error)[:300]) from error
    tensors = dict(stored)
    for name, shape in layout.packed.items():
        tensors[name] = _unpack(name, stored.get(name), shape)
    for name, how in sparse_tensors.in_order(layout.encoded):
        tensors[name] = sparse_tensors.decode(name, how, tensors)
    for name, other in layout.tied.items():
        if other not in stored or name in stored:
            raise ArtifactError("a tied tensor has no original", where="architecture.json", got=f"{name} -> {other}")
        tensors[name] = tensors[other]
    return tensors


def _unpack(name: str, stored: Tensor | None, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    try:
        if stored is None or stored.dtype != torch.uint8 or stored.shape != ((count + 7) // 8,):
            raise ValueError("not as many bits")
        return torch.from_numpy(np.unpackbits(stored.numpy(), count=count).astype(np.bool_)).reshape(shape)
    except (ValueError, TypeError, RuntimeError) as error:  # a side beyond 64 bits, next to one of 0
        raise ArtifactError("a mask's bits do not fit its shape", where=name, expected=str(shape)[:200]) from error


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Write ``tensors`` into ``model``: its very state, no name, shape or type more or less. Raises ArtifactError."""
    state = {name: value for name, value in tensors.items() if not name.startswith((EDITS, BUFFERS))}
    _expect_same(model, state, layout)
    try:
        own = model.state_dict()  # its metadata says the version that a module's own loading asks for (MNASNet)
        own.update({**state, **layout.extra})
        model.load_state_dict(own, strict=True)
    except Exception as error:  # a module's own loading hooks may raise anything
        reason = str(error)[:300]
        raise ArtifactError("the weights do not fit the model", where="model.safetensors", got=reason) from error
    for name, value in tensors.items():
        if name.startswith(BUFFERS):
            _set_buffer(model, name.removeprefix(BUFFERS), value)


def _expect_same(model: nn.Module, state: Mapping[str, Tensor], layout: Layout) -> None:
    expected = model.state_dict()
    given = [*state, *layout.extra]
    differences = [f"{name} is missing" for name in expected if name not in state and name not in layout.extra]
    differences += [f"{name} has no place in the model" for name in given if name not in expected]
    for name, value in state.items():
        own = expected.get(name)
        if isinstance(own, Tensor) and (own.dtype, own.shape) != (value.dtype, value.shape):
            differences.append(f"{name} is {value.dtype} {list(value.shape)} instead of {own.dtype} {list(own.shape)}")
        elif own is not None and not isinstance(own, Tensor):
            differences.append(f"{name} is a tensor")
    if differences:
        raise ArtifactError(
            "the weights do not fit the model that the edits give", where="model.safetensors",
            got="; ".join(differences[:3]) + (f" and {len(differences) - 3} more" if len(differences) > 3 else ""),
            do="The artifact is damaged or its files come from different runs: save it again",
        )  # fmt: skip


def _set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    if module is None or last not in module._buffers:
        raise ArtifactError("the model has no such buffer", where=name)
    own = module._buffers[last]
    if own is None:
        module._buffers[last] = value
        return
    if own.dtype != value.dtype:
        raise ArtifactError("a buffer has another type", where=name, got=value.dtype, expected=own.dtype)
    # Copied where possible: whoever shares the buffer sees it. A cache may have grown, or be an expanded view.
    if own.shape == value.shape and own.is_contiguous():
        own.copy_(value)
    else:
        module._buffers[last] = value.to(own.device)
