"""Models side by side on this machine: latency, throughput, load time, memory, bytes, energy; writes benchmark.json."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.core.task import Arguments, Task, first_batch
from tersor.jobs.contenders import Engines, Field, Model, find, simulated
from tersor.jobs.documents import expect_folder, leave
from tersor.jobs.find_data import Data, find_data
from tersor.jobs.find_task import absolute
from tersor.measure.behaviour.data import EvaluationData, NoModel
from tersor.measure.behaviour.schema import Skipped
from tersor.measure.benchmark import Conditions, measure_contenders
from tersor.measure.benchmark_schema import Benchmark
from tersor.measure.contender import Contender
from tersor.measure.made_up import fixed_batch, made_up_inputs
from tersor.report.write import expect_formats
from tersor.run.environment import environment
from tersor.zoo import BUILTIN

WORKER = "tersor.jobs.benchmark_worker"
SAMPLES = 32  # of the data; larger batches repeat them


def benchmark(
    *models: Model,
    data: Data | None = None,
    out: str | Path | None = None,
    conditions: Conditions = Conditions(),
    engines: Engines = Engines(),
    formats: Sequence[str] = ("html",),
    progress: Progress | None = None,
) -> Benchmark:
    """Measure models side by side, each in fresh processes; the first is what the others are compared with.

    ``models``: as for ``evaluate``: modules, ONNX files, folders of runs and artifacts, names of functions, "task".
    ``data``: whose inputs they are given, named as for ``evaluate``, or a Task with example_inputs; ONNX files alone
    do without, on random inputs of the shapes that the first of them declares. ``out``: a folder for benchmark.json
    and its report in ``formats`` (html, md, csv; json: the numbers alone).

    Raises InputError for unusable models and inputs, ArtifactError for damaged files, GraphError where a module cannot
    be exported, TersorError where a measuring process dies.
    """
    start, progress = time.perf_counter(), progress or Progress()
    expect_formats(formats)
    if not models:
        raise InputError("nothing to measure", where="benchmark", got="no model", expected="at least one")
    if out is not None:
        expect_folder(Path(out))
    task, name = _data(data, models, progress)
    found = find(models, task, data_named=bool(name), own_named=not isinstance(data, Task | EvaluationData))
    files = [each.file for each in found if each.file is not None]
    args, kwargs, said = _inputs(task, data is not None, files)
    with tempfile.TemporaryDirectory() as folder:
        field = Field(task, name, args, kwargs, Path(folder))
        lined_up = [one for each in found for one in field.contenders(each, engines)]
        contenders = [one for one in lined_up if isinstance(one, Contender)]
        conditions, skipped = _possible(conditions, contenders)
        skipped = (*(one for one in lined_up if isinstance(one, Skipped)), *skipped)
        measured = measure_contenders(contenders, conditions, worker=WORKER, progress=progress)
    asked = {"conditions": dataclasses.asdict(conditions), "engines": dataclasses.asdict(engines)}
    result = Benchmark(
        tersor=version("tersor"), inputs=said, models=measured.models, timings=measured.timings,
        comparisons=measured.comparisons, skipped=(*skipped, *measured.skipped),
        notes=(*simulated(found, engines), *measured.notes),
        settings=json.loads(json.dumps(asked)), environment=environment(), seconds=time.perf_counter() - start,
    )  # fmt: skip
    if out is not None:
        leave(result.to_json(), Path(out), "benchmark", formats)
    return result


def _data(data: Data | None, models: Sequence[Model], progress: Progress) -> tuple[Task, str]:
    """The task whose inputs are used, and the name by which another process finds it ("": none)."""
    if data is None:
        data = next((model for model in models if isinstance(model, str) and model in BUILTIN), None)
    if data is None:
        return Task(NoModel(), name="no data"), ""
    if isinstance(data, (str, Path)):
        name = absolute(str(data), "task")  # now: the task's own code may go to another folder
        return find_data(data, progress).based, name
    task = data if isinstance(data, Task) else find_data(data).based
    return task, task.source


def _inputs(task: Task, given: bool, files: Sequence[Path]) -> tuple[tuple[Tensor, ...], Mapping[str, Tensor], str]:
    """Positional and named inputs, batch first, and what they are."""
    if task.example_inputs is not None:
        return task.example_inputs, {}, f"the example inputs of {task.name}"
    loader, split = next(((each, name) for name in ("test", "validation", "calibration", "train")
                          if (each := getattr(task, name)) is not None), (None, ""))  # fmt: skip
    if loader is not None:
        args, kwargs = _tensors(task.inputs(first_batch(loader, split)), f"task.{split}, batch 0")
        return args, kwargs, f"samples of {task.name} ({split})"
    if given or not files:
        raise InputError(
            "there is nothing to give the models", where="data",
            got="no loader and no example inputs" if given else "no data",
            expected="a task with a test loader or example_inputs", do="Name it: --data task.py",
        )  # fmt: skip
    return made_up_inputs(files[0]), {}, f"random inputs of the shapes that {files[0].name} declares"


def _tensors(inputs: Arguments, where: str) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    args, kwargs = inputs
    kept = {name: value for name, value in kwargs.items() if value is not None}
    strange = [type(value).__name__ for value in (*args, *kept.values()) if not isinstance(value, Tensor)]
    if strange or not (args or kept):
        raise InputError(
            "inputs that cannot be carried to another process", where=where, got=", ".join(strange) or "none",
            expected="tensors, batch first", do="Pass inputs_of=lambda batch: ((…,), {}) to Task",
        )  # fmt: skip
    return tuple(_few(value) for value in args), {name: _few(value) for name, value in kept.items()}


def _few(value: Tensor) -> Tensor:
    return value[:SAMPLES].detach().cpu() if value.ndim else value


def _possible(conditions: Conditions, contenders: Sequence[Contender]) -> tuple[Conditions, tuple[Skipped, ...]]:
    """The conditions with the batch sizes that files of a fixed batch dimension can run."""
    fixed = {each.name: fixed_batch(Path(each.spec["path"])) for each in contenders if each.spec["kind"] == "onnx"}
    sizes = {name: size for name, size in fixed.items() if size is not None}
    if not sizes:
        return conditions, ()
    name, only = next(iter(sizes.items()))
    if set(sizes.values()) != {only}:
        raise InputError(
            "the files have different fixed batch dimensions", where=", ".join(sizes), got=sorted(set(sizes.values())),
            expected="one batch size that all can run", do="Export the models with a dynamic batch dimension",
        )  # fmt: skip
    why = f"{name} has a fixed batch dimension of {only}"
    skipped = [Skipped(what=f"batch {size}", why=why) for size in conditions.batch_sizes if size != only]
    return dataclasses.replace(conditions, batch_sizes=(only,)), tuple(skipped)
