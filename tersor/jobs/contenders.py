"""From models, whatever they come as, to what a benchmark's fresh processes open: each model on each engine."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final, get_args

import onnxruntime
import torch
from torch import Tensor, nn

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError, type_and_message
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.in_type import in_type_of
from tersor.core.measurement import Measurement
from tersor.core.task import Task
from tersor.export.half import has_floats, store_file_half
from tersor.export.onnx import export_onnx, quiet_export
from tersor.jobs.find_model import OWN, find_model
from tersor.jobs.find_task import absolute
from tersor.measure.behaviour.schema import Skipped
from tersor.measure.contender import Contender, file_spec
from tersor.measure.onnx_cpu import CPU, checked_providers
from tersor.measure.opened_module import tensors_in
from tersor.measure.runnable import Runnable, check_onnx, file_name
from tersor.measure.session import OnnxRunnable
from tersor.measure.size import file_bytes, state_bytes

Engine = Literal["eager", "compile", "onnxruntime"]
Model = str | Path | nn.Module | Runnable
BFLOAT16, SHORT = "bfloat16", "@bf16"
STORED = "as stored"
_SAID = {"eager": "eager", "compile": "compiled"}


@final
@dataclasses.dataclass(frozen=True)
class Engines:
    """What models run on. ONNX files run on ONNX Runtime whatever is named.

    Args:
        names: for PyTorch models: "eager", "compile" (torch.compile), "onnxruntime" (exported first).
        providers: ONNX Runtime's execution providers, such as "cuda"; the CPU's takes what they leave.
        device: of PyTorch models, "cpu" or "cuda".
        bfloat16: also each model in bfloat16: PyTorch computes in it, an ONNX file only stores its weights so.
    """

    names: tuple[Engine, ...] = ("eager",)
    providers: tuple[str, ...] = ()
    device: str = "cpu"
    bfloat16: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.names or not set(self.names) <= set(get_args(Engine)):
            raise InputError("no such engine", where="Engines", got=self.names, expected=" or ".join(get_args(Engine)))
        if re.fullmatch(r"cpu|cuda(:\d+)?", self.device) is None:
            raise InputError("no such device", where="Engines", got=self.device, expected="cpu, cuda or cuda:1")
        object.__setattr__(self, "providers", checked_providers(self.providers))

    @property
    def runtime(self) -> str:
        """ONNX Runtime with its version and providers."""
        names = " and ".join(name.removesuffix("ExecutionProvider") for name in self.providers)
        return f"ONNX Runtime {onnxruntime.__version__} {names}"


@dataclasses.dataclass(frozen=True)
class Found:
    """A model as it was found: the file, or the module; ``named``: whether another process finds it by ``source``."""

    name: str
    source: str
    file: Path | None = None
    module: nn.Module | None = None
    named: bool = False


def find(models: Sequence[Model], task: Task, *, data_named: bool, own_named: bool) -> list[Found]:
    """The models, each under a name of its own: namesakes as they were typed. ONNX files are looked at, and opened in
    no process but a fresh one.

    ``data_named``: whether another process finds the data; ``own_named``: and their own model with them, which it does
    not where Python handed over a task that may have got another model since.
    Raises what ``find_model`` raises, and InputError for callables, which no other process could open.
    """
    found = [_found(source, task, data_named and (own_named or str(source) != OWN)) for source in models]
    named: list[Found] = []
    for source, one in zip(models, found, strict=True):
        namesakes = {each.source for each in found if each.name == one.name}
        name = str(source) if len(namesakes) > 1 and isinstance(source, (str, Path)) else one.name
        taken = {each.name for each in named}
        free = (said for number in range(1, len(models) + 1) if (said := _numbered(name, number)) not in taken)
        named.append(dataclasses.replace(one, name=next(free)))
    return named


def simulated(found: Sequence[Found], engines: Engines) -> tuple[str, ...]:
    """What to say of quantised models that run in PyTorch, whose times are not those of integers."""
    if set(engines.names) == {"onnxruntime"}:
        return ()
    names = [
        each.name for each in found
        if each.module is not None and any(isinstance(part, FakeQuantize) for part in each.module.modules())
    ]  # fmt: skip
    if not names:
        return ()
    return (
        f"{', '.join(names)}: PyTorch simulates integers in floating point, which takes longer than not to; "
        "in integers runs the exported file (a run's model.onnx, or --engine onnxruntime)",
    )


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"


def _found(source: Model, task: Task, data_named: bool) -> Found:
    if isinstance(source, (str, Path)) and Path(source).suffix.lower() == ".onnx":
        check_onnx(Path(source))
        return Found(file_name(Path(source)), str(source), file=Path(source))
    runnable = find_model(source, task)
    if isinstance(runnable.model, OnnxRunnable):
        return Found(runnable.name, runnable.source, file=runnable.model.path)
    if runnable.module is None:
        raise InputError(
            "a bare callable cannot be opened in a fresh process", where=runnable.name,
            got=type(runnable.model).__name__, expected="a module, an ONNX file, or the name of what gives one",
        )  # fmt: skip
    if not isinstance(source, (str, Path)):
        return Found(runnable.name, runnable.source, module=runnable.module)
    alone = ":" in str(source) or str(source).endswith(".py")
    return Found(runnable.name, absolute(str(source), "model"), module=runnable.module, named=alone or data_named)


@dataclasses.dataclass(frozen=True)
class Field:
    """What contenders are made with: a task, its data's name if any, one batch of inputs, a scratch folder."""

    task: Task
    data: str
    args: tuple[Tensor, ...]
    kwargs: Mapping[str, Tensor]
    folder: Path

    def contenders(self, found: Found, engines: Engines) -> Iterator[Contender | Skipped]:
        """The model on each engine; in bfloat16 where it has weights to round. Raises GraphError where it cannot be
        exported."""
        for precision in (STORED, BFLOAT16) if engines.bfloat16 else (STORED,):
            for engine in engines.names if found.file is None else ("onnxruntime",):
                suffix = f"@{engine}" if len(engines.names) > 1 and found.file is None else ""
                if engine != "onnxruntime":
                    yield self._module(found, engine, suffix, precision, engines)
                    continue
                file = found.file or self._exported(found)
                if precision == BFLOAT16 and not has_floats(file):
                    yield Skipped(what=f"{found.name}{suffix}{SHORT}", why="it has no float32 weights to round")
                else:
                    yield self._file(found, file, suffix, precision, engines)

    def _file(self, found: Found, file: Path, suffix: str, precision: str, engines: Engines) -> Contender:
        if precision == BFLOAT16:
            file = store_file_half(file, self.folder / f"{self._free()}.onnx", torch.bfloat16)
        facts = {"source": found.source, "backend": engines.runtime, "precision": precision, "device": "cpu"}
        if engines.providers != (CPU,):
            facts["device"] = engines.providers[0].removesuffix("ExecutionProvider").lower()
        spec = {**file_spec(file, "", engines.providers), "device": facts["device"]}
        return self._contender(found, suffix, precision, spec, facts, file_bytes(file))

    def _module(self, found: Found, engine: Engine, suffix: str, precision: str, engines: Engines) -> Contender:
        assert found.module is not None
        dtype = BFLOAT16 if precision == BFLOAT16 else None
        spec: dict[str, Any] = {"compiled": engine == "compile", "dtype": dtype, "device": engines.device}
        backend = f"PyTorch {torch.__version__} {_SAID[engine]}"
        if found.named:
            spec |= {"kind": "named", "model": found.source, "data": self.data}
        else:
            spec |= {"kind": "program", "path": str(self._program(found))}
            backend += ", exported graph"
        facts = {"source": found.source, "backend": backend, "precision": precision, "device": engines.device}
        return self._contender(found, suffix, precision, spec, facts, _size(found, dtype))

    def _contender(
        self, found: Found, suffix: str, precision: str, spec: Mapping[str, Any], facts: Mapping[str, str],
        size: Measurement,
    ) -> Contender:  # fmt: skip
        name = f"{found.name}{suffix}{'' if precision == STORED else SHORT}"
        return Contender(name, spec, self.args, self.kwargs, facts, size)

    def _exported(self, found: Found) -> Path:
        assert found.module is not None
        if self.kwargs:
            raise InputError(
                "inputs by name cannot be exported", where=found.name, got=sorted(self.kwargs),
                expected="inputs by position", do="Pass inputs_of=lambda batch: ((…,), {}) to Task",
            )  # fmt: skip
        output_of = self.task.output if self.data else None
        return export_onnx(found.module, self.args, self.folder / f"{self._free()}.onnx", output_of=output_of).path

    def _program(self, found: Found) -> Path:
        """The module as ``torch.export`` sees it, in a file: so it is carried to another process without pickle."""
        assert found.module is not None
        path = self.folder / f"{self._free()}.pt2"
        module = copy.deepcopy(found.module).cpu().eval().requires_grad_(False)
        # Plain tensors: the fresh process does not know the classes of outputs, transformers' for instance.
        module.register_forward_hook(lambda _, args, result: tuple(tensors_in(result)))
        batch = torch.export.Dim("batch")
        names = list(inspect.signature(module.forward).parameters)
        shapes: Any = tuple({0: batch} for _ in self.args)
        if self.kwargs:
            shapes = {name: {0: batch} for name in [*names[: len(self.args)], *self.kwargs]}
        try:
            three = tuple(map(_three, self.args)), {name: _three(value) for name, value in self.kwargs.items()}
            args, kwargs = in_type_of(module, three)
            with quiet_export(), torch.no_grad():
                torch.export.save(torch.export.export(module, args, kwargs, dynamic_shapes=shapes), path)
        except Exception as error:  # tracing runs the user's forward; an input may have no batch
            raise InputError(
                "the module cannot be carried to a fresh process", where=found.name,
                got=type_and_message(error).splitlines()[0],
                expected="a module that torch.export captures with a free batch dimension",
                do="Name the model instead (file.py:function, the folder of an artifact), with data that have a name",
            ) from error  # fmt: skip
        return path

    def _free(self) -> str:
        return f"model-{len(list(self.folder.iterdir()))}"


def _three(value: Tensor) -> Tensor:
    """Three samples: torch.export takes a size of one for a constant."""
    return value[:1].repeat(3, *[1] * (value.ndim - 1))


def _size(found: Found, dtype: str | None) -> Measurement:
    folder = Path(found.source)
    if dtype is None and found.named and folder.is_dir():
        model = folder / "model" if (folder / "run.json").is_file() else folder
        return file_bytes(model)
    assert found.module is not None
    module = found.module if dtype is None else copy.deepcopy(found.module).to(getattr(torch, dtype))
    return Measurement(state_bytes(module), "bytes", conditions={"where": "weights and buffers in memory"})
