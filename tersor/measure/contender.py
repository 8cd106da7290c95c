"""What is timed, as the process that times it is told: how each model is opened, on which inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from safetensors.numpy import save_file
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.measurement import Measurement
from tersor.measure.onnx_cpu import CPU


@final
@dataclass(frozen=True, eq=False)
class Contender:
    """A model as a benchmark runs it.

    Args:
        name: what tables call it.
        spec: how the measuring process opens it, without inputs (``file_spec`` and the kinds of the worker).
        args, kwargs: a batch of samples, batch first, by position and by name.
        facts: source, backend, precision and device, for the result.
        size: bytes of the file, or of the weights in memory.
    """

    name: str
    spec: Mapping[str, Any]
    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    size: Measurement | None = None

    def stored(self, folder: Path) -> dict[str, Any]:
        """The whole spec, its inputs written into ``folder``."""
        return {**self.spec, "name": self.name, "inputs": store_inputs(self.args, folder, self.kwargs)}


def file_spec(path: Path, inputs: str = "", providers: Sequence[str] = (CPU,)) -> dict[str, Any]:
    """How an ONNX file is opened; ``inputs``: where ``store_inputs`` put them."""
    return {"kind": "onnx", "path": str(Path(path).absolute()), "inputs": inputs, "providers": list(providers)}


def store_inputs(args: Sequence[Tensor], folder: Path, kwargs: Mapping[str, Tensor] | None = None) -> str:
    """Write inputs into a new file of ``folder``, by position and by name, for another process; returns its path.

    Raises InputError for a type that NumPy does not have.
    """
    named = {**{str(number): value for number, value in enumerate(args)}, **(kwargs or {})}
    stored = Path(folder) / f"inputs-{len(list(folder.iterdir()))}.safetensors"
    try:
        save_file({name: value.detach().cpu().contiguous().numpy() for name, value in named.items()}, stored)
    except TypeError as error:
        raise InputError(
            "inputs cannot be stored", where="inputs", got=error, expected="float32, or integers"
        ) from None
    return str(stored)
