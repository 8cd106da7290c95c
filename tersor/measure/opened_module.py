"""PyTorch models in a measuring process: eager or compiled, in float32 or bfloat16, in either layout of images, on the
CPU or a CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor, nn

from tersor.core.errors import InputError, user_code
from tersor.core.in_type import in_type_of
from tersor.measure.opened import Call, Inputs, Opened, Opener, Spec

if TYPE_CHECKING:
    from typing_extensions import Self


@final
class OpenedModule(Opened):
    """A module with its inputs."""

    def __init__(self, module: nn.Module, inputs: Inputs, spec: Spec, where: str):
        self.device, self.dtype = torch.device(spec["device"]), getattr(torch, spec["dtype"] or "float32")
        self.cast = spec["dtype"] is not None
        self.images = torch.channels_last if spec.get("channels_last") else torch.contiguous_format
        self.inputs, self.where = inputs, where
        module = module.eval().to(device=self.device, dtype=self.dtype if self.cast else None)
        module = in_layout(module, self.images)
        self.module = module
        self.forward: Callable[..., Any] = _compiled(module) if spec["compiled"] else module

    def call(self, batch: int) -> Call:
        """Its inputs at a batch size; a run on a CUDA device ends when the device is done."""
        inputs = self.inputs.tiled(batch)
        args, kwargs = in_type_of(
            self.module,
            (
                tuple(map(self._tensor, inputs.args)),
                {name: self._tensor(array) for name, array in inputs.kwargs.items()},
            ),
        )
        forward, on_card = self.forward, self.device.type == "cuda"

        def run() -> Any:
            found = forward(*args, **kwargs)
            if on_card:
                torch.cuda.synchronize(self.device)
            return found

        def first() -> list[list[int]]:
            with user_code("the model cannot be run", where=f"{self.where}, batch {batch}"):
                return [list(tensor.shape) for tensor in tensors_in(run())]

        return Call(run, first)

    def device_bytes(self) -> int | None:
        """The peak of torch's allocator on a CUDA device."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def move(self) -> None:
        """Put the weights elsewhere in memory: where they lie can cost a few percent as long as they lie there."""
        for tensor in chain(self.module.parameters(), self.module.buffers()):
            tensor.data = tensor.data.clone()

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(array).to(self.device)
        tensor = tensor.to(self.dtype) if self.cast and tensor.is_floating_point() else tensor
        return tensor.contiguous(memory_format=self.images) if tensor.ndim == 4 else tensor


def _compiled(module: nn.Module) -> Callable[..., Any]:
    """The module compiled for each batch size; of the models of one class together, torch would run the ninth and
    later ones eagerly without a word."""
    from torch._dynamo import config  # seconds, which eager models need not wait for

    config.recompile_limit = config.accumulated_recompile_limit
    return torch.compile(module, dynamic=False)


def in_layout(module: nn.Module, images: torch.memory_format) -> nn.Module:
    """The module with its parameters and buffers of four axes laid out so, in place; the usual layout is no change."""
    if images != torch.contiguous_format:
        for tensor in chain(module.parameters(), module.buffers()):
            if tensor.ndim == 4:
                tensor.data = tensor.data.contiguous(memory_format=images)
    return module


def tensors_in(result: Any) -> Iterator[Tensor]:
    """The tensors in what a model returned."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):  # transformers' outputs too
        yield from tensors_in(list(result.values()))
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from tensors_in(part)


def open_module(spec: Spec, make: Callable[[], nn.Module], where: str) -> Opener:
    """Opens what ``make`` gives once, in eval mode without gradients; opening it again moves its weights in memory.

    Spec: inputs, compiled, dtype, device, threads, and channels_last where images lie so. Raises InputError for a
    device that is not there.
    """
    torch.set_num_threads(spec["threads"])
    torch.set_grad_enabled(False)
    device = torch.device(spec["device"])
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError("there is no such device", where=where, got=spec["device"], expected="cpu")
    inputs = Inputs.read(spec["inputs"])
    kept: list[OpenedModule] = []

    def opener() -> Opened:
        if kept:
            kept[0].move()
        else:
            kept.append(OpenedModule(make(), inputs, spec, where))
        return kept[0]

    return opener


def open_program(spec: Spec) -> Opener:
    """A module carried here as the graph that ``torch.export`` made of it. Spec: path, name, and ``open_module``'s."""
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (declares what quantised graphs call)

    return open_module(spec, lambda: _InferenceOnly(torch.export.load(spec["path"]).module()), spec["name"])


class _InferenceOnly(nn.Module):
    """An exported program's module, which refuses to be put in eval mode though it was exported in it."""

    def __init__(self, program: nn.Module):
        super().__init__()
        self.program = program

    def train(self, mode: bool = True) -> Self:
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.program(*args, **kwargs)
