"""What can be run on a task's batches, whoever made it: a PyTorch module or an ONNX file, under a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, final

import onnx
import torch
from google.protobuf.message import DecodeError, Message
from torch import Tensor, nn

from tersor.core.errors import ArtifactError, InputError
from tersor.core.eval_mode import eval_mode
from tersor.core.in_type import in_type_of
from tersor.core.task import Arguments, Batch, Task
from tersor.measure.onnx_cpu import in_order
from tersor.measure.session import OnnxRunnable

Change = Callable[[tuple[Any, ...], Mapping[str, Any]], Arguments]
# Operators that ONNX Runtime's CPU build knows beside ONNX's own.
_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training", "com.microsoft", "com.microsoft.nchwc",
            "com.ms.internal.nhwc", "org.pytorch.aten"}  # fmt: skip


@final
@dataclass(frozen=True, eq=False)
class Runnable:
    """A model under a name: ``model`` is a module, an ``OnnxRunnable`` or any callable that takes the task's inputs.

    ``source``: where it came from (a file, a folder, a function), for reports.
    """

    name: str
    model: nn.Module | OnnxRunnable | Callable[..., Any]
    source: str = ""

    @property
    def module(self) -> nn.Module | None:
        """The PyTorch module, which has gradients; None for files and other callables."""
        return self.model if isinstance(self.model, nn.Module) else None

    @property
    def backend(self) -> str:
        """What runs it, with its version."""
        if isinstance(self.model, OnnxRunnable):
            return self.model.backend
        return f"PyTorch {torch.__version__}" if self.module is not None else "Python"

    @property
    def device(self) -> torch.device:
        """Where its parameters lie; files run on the CPU."""
        parameters = iter(()) if self.module is None else self.module.parameters()
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The classes' names where the model carries them (transformers' ``config.id2label``), else None."""
        named = getattr(getattr(self.module, "config", None), "id2label", None)
        if not isinstance(named, Mapping) or sorted(named) != list(range(len(named))):
            return None
        names = tuple(str(named[index]) for index in range(len(named)))
        return None if names == tuple(f"LABEL_{index}" for index in range(len(named))) else names

    def outputs(self, task: Task, batch: Batch, change: Change | None = None) -> Tensor:
        """The tensor that matters for a batch, on the CPU."""
        return outputs_of(self.model, task, on_device(batch, self.device), change).cpu()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """In eval mode, without gradients; each module's own flag is put back."""
        with torch.no_grad():
            if self.module is None:
                yield
            else:
                with eval_mode(self.module):
                    yield


def file_name(path: Path) -> str:
    """What tables call an ONNX file: its stem, or its folder where it is called model.onnx like all others."""
    return path.resolve().parent.name if path.stem == "model" else path.stem


def open_onnx(path: str | Path, name: str = "", *, threads: int | None = None) -> Runnable:
    """The ONNX file at ``path`` as a runnable, after a look at what it asks for.

    Raises ArtifactError where it is missing, damaged, or reads data outside its own folder; InputError where it has
    operators that ONNX Runtime does not bring along.
    """
    path = Path(path)
    check_onnx(path)
    return Runnable(name or file_name(path), OnnxRunnable(path, threads=threads), str(path))


def check_onnx(path: Path) -> None:
    """Refuse a file before it is run: no ONNX, weights that lie outside its folder, operators of unknown domains.

    Raises ArtifactError, for operators InputError. Only the file itself is read, none of the data that it points to.
    """
    if not path.is_file():
        raise ArtifactError("no such ONNX file", where=str(path), do="Export the model first")
    try:
        proto = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, RuntimeError) as error:
        raise _damaged(path, str(error)) from error
    if not proto.graph.node and not proto.graph.output:
        raise _damaged(path, "no graph")
    for tensor in _tensors(proto):
        _expect_inside(path, tensor)
    own = {(function.domain, function.name) for function in proto.functions}
    nodes = [*_nodes(proto.graph.node), *(node for function in proto.functions for node in _nodes(function.node))]
    custom = sorted(
        {
            f"{node.domain}::{node.op_type}"
            for node in nodes
            if node.domain not in _DOMAINS and (node.domain, node.op_type) not in own
        }
    )
    if custom:
        raise InputError(
            "the file has custom operators, which ONNX Runtime does not bring along", where=str(path),
            got=", ".join(custom[:4]), expected="operators of ONNX and of com.microsoft",
            do="Export the model with standard operators only",
        )  # fmt: skip


def _damaged(path: Path, got: str) -> ArtifactError:
    return ArtifactError(
        "this is no ONNX file", where=str(path), got=" ".join(got.split())[:120] or "what cannot be decoded",
        expected="an ONNX model", do="The file is damaged or cut short: export it again, or copy it again",
    )  # fmt: skip


def _nodes(nodes: Any) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _nodes(graph.node)


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor in a message, wherever ONNX allows for one: graphs, functions, attributes, sparse weights."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in value if isinstance(value, Iterable) else (value,):
            if isinstance(part, onnx.TensorProto):
                yield part
            else:
                yield from _tensors(part)


def _expect_inside(path: Path, tensor: onnx.TensorProto) -> None:
    """Weights beside the file may lie in its own folder, or below it, and nowhere else."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    pure, folder = PurePosixPath(location.replace("\\", "/")), path.parent.resolve()
    outside = not location or pure.is_absolute() or not (folder / pure).resolve().is_relative_to(folder)
    if outside:
        raise ArtifactError(
            "the file reads weights outside its own folder", where=f"{path}, tensor {tensor.name}",
            got=repr(location)[:120], expected="the name of a file beside it",
            do="Do not run files that you do not trust",
        )  # fmt: skip


def outputs_of(model: Callable[..., Any], task: Task, batch: Batch, change: Change | None = None) -> Tensor:
    """The tensor that matters in what a module, an ``OnnxRunnable`` or a callable gives for a batch.

    ``change``: the model's arguments → those that it is given instead.
    """
    args, kwargs = task.inputs(batch, model)
    if change is not None:
        args, kwargs = change(args, kwargs)
    if not isinstance(model, OnnxRunnable):
        own: Arguments = tuple(map(_copied, args)), {name: _copied(value) for name, value in kwargs.items()}
        if isinstance(model, nn.Module):
            own = in_type_of(model, own)
        return task.output(model(*own[0], **own[1]))
    return model.output(task, *in_order(model.input_names, args, kwargs, str(model.path)))


def _copied(value: Any) -> Any:
    """A tensor of its own: a model may write into its inputs, which the next one is given too."""
    return value.clone() if isinstance(value, Tensor) else value


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; itself on the CPU."""
    if device.type == "cpu":
        return batch
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)
