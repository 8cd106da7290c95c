"""Size: parameters, non-zeros, bytes in each encoding and bytes on disk."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.errors import ArtifactError
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.intercept import CHILD, Intercept
from tersor.core.measurement import Measurement
from tersor.core.place import TensorPlace
from tersor.tensor import encodings


def effective_weights(model: nn.Module) -> Iterator[tuple[TensorPlace, Tensor]]:
    """Each parameter of the model once, by the value that its forward uses: masked, quantised, detached.

    A parametrized tensor counts once, whatever its parametrization is made of; masks, scales, zero points and the
    quantisers of activations are no parameters of the model. Tied weights appear under their first place.
    """
    seen: set[tuple[int, ...]] = set()
    for path, module in own_modules(model):
        for name, stored in own_parameters(module).items():
            identity = tuple(map(id, stored))
            if identity not in seen:
                seen.add(identity)
                with torch.no_grad():
                    yield TensorPlace(path, name), getattr(module, name).detach()


def own_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that the user wrote, with their paths, not what masks and quantisers put in. Shared ones once."""
    for name, child in module.named_modules(prefix=path):
        inserted = isinstance(child, (FakeQuantize, Intercept)) or bool(
            {"parametrizations", CHILD} & set(name.split("."))
        )
        if not inserted:
            yield name, child


def own_parameters(module: nn.Module) -> dict[str, tuple[nn.Parameter, ...]]:
    """name of each parameter that the module itself holds → what stores it (several for some parametrizations)."""
    found: dict[str, tuple[nn.Parameter, ...]] = {
        name: (stored,) for name, stored in module._parameters.items() if stored is not None
    }
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        for name, entries in lists.items():
            stored = tuple(value for value in entries._parameters.values() if value is not None)
            if stored:  # a parametrized buffer is none
                found[name] = stored
    return found


def parameters(model: nn.Module) -> Measurement:
    """How many parameters the model has, tied ones counted once."""
    return Measurement(sum(tensor.numel() for _, tensor in effective_weights(model)), "parameters")


def state_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers in memory, shared ones once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def nonzeros(model: nn.Module) -> Measurement:
    """How many parameters are not zero as the forward uses them (masked away, or rounded to zero, is zero)."""
    count = sum(int(torch.count_nonzero(tensor)) for _, tensor in effective_weights(model))
    return Measurement(count, "parameters")


def storage(model: nn.Module) -> tuple[dict[str, Any], ...]:
    """What each parameter takes in each encoding, by the value that the forward uses: a row for each.

    Keys: path, tensor, shape, parameters, zeros, bytes (encoding → bytes as really stored, see
    ``tersor.tensor.encodings``: dense, bitmap, csr, csc, coo, gaps where few are not zero, 1:4 and 2:4 where they
    hold), smallest (the name of the best), zip_bytes (what deflate, a zip's algorithm, makes of the
    dense one: to be read, it is unpacked again).
    """
    return tuple(
        {"path": place.module, "tensor": place.tensor, **_stored(tensor.cpu().contiguous())}
        for place, tensor in effective_weights(model)
        if tensor.numel() > 0
    )


def _stored(tensor: Tensor) -> dict[str, Any]:
    found = encodings.sizes(tensor)
    return {
        "shape": list(tensor.shape),
        "parameters": tensor.numel(),
        "zeros": tensor.numel() - int(torch.count_nonzero(tensor)),
        "bytes": found,
        "smallest": encodings.smallest(found),
        "zip_bytes": len(zlib.compress(tensor.reshape(-1).view(torch.uint8).numpy(), 6)),
    }


def storage_total(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Bytes of all ``storage`` rows together: dense, smallest (each tensor in its own best encoding), zip, and bitmap,
    csr, csc and coo throughout."""
    found = {name: sum(row["bytes"].get(name, row["bytes"]["dense"]) for row in rows) for name in _EVERYWHERE}
    found["smallest"] = sum(row["bytes"][row["smallest"]] for row in rows)
    found["zip"] = sum(row["zip_bytes"] for row in rows)
    return found


_EVERYWHERE = ("dense", "bitmap", "csr", "csc", "coo")


def file_bytes(path: Path) -> Measurement:
    """Bytes on disk of a file or of everything in a folder; of an ONNX file with the data files that it points to.

    Raises ArtifactError where there is nothing, or the ONNX file cannot be read or lacks a data file.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    elif path.is_file():
        files = [path, *(_external_files(path) if path.suffix == ".onnx" else [])]
    else:
        raise ArtifactError("no such file or folder", where=str(path), do="Export the model first")
    return Measurement(sum(file.stat().st_size for file in files), "bytes", conditions={"files": len(files)})


def _external_files(path: Path) -> list[Path]:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ArtifactError(
            "the ONNX file is damaged", where=str(path), got=error, do="Export the model again"
        ) from error
    names = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }  # fmt: skip
    files = [path.parent / name for name in sorted(names)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ArtifactError(
            "data files of the ONNX file are missing", where=str(path), got=missing, do="Keep them beside the file"
        )
    return files
