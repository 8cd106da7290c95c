"""From what a user types to a model that runs: a file, a folder, or the name of a function."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tersor.core.errors import InputError
from tersor.core.task import Task
from tersor.export.artifact import ARCHITECTURE, load_artifact
from tersor.jobs.find_task import find_task, made
from tersor.jobs.student import student_of_run
from tersor.measure.behaviour.data import NoModel
from tersor.measure.runnable import Runnable, open_onnx
from tersor.run.engine import BASELINE
from tersor.run.folder import RunFolder
from tersor.zoo import BUILTIN

OWN = "task"  # the name of the task's own model
_EXPECTED = (
    f"{OWN} (the task's own model), a file .onnx, the folder of a run or of an artifact, a built-in task "
    f"({', '.join(BUILTIN)}), file.py:function or package.module:function"
)


def find_model(source: str | Path | nn.Module | Runnable, task: Task, *, threads: int | None = None) -> Runnable:
    """The model that ``source`` names, in eval mode where it is used.

    ``task``: the task's own model. ``model.onnx``: a file, whoever wrote it. A folder: an artifact, whose architecture
    is the task's, or a run, of which it is the final model (PyTorch; its file is RUN/model.onnx). ``file.py:function``
    or ``package.module:function`` (default ``model``): gives a module, or a Task, whose model it is. A built-in task's
    name: its model. Raises InputError and ArtifactError.
    """
    if isinstance(source, Runnable):
        return source
    if isinstance(source, nn.Module):
        return Runnable(type(source).__name__, source)
    if not isinstance(source, (str, Path)):
        raise InputError(
            "not a model", where="find_model", got=type(source).__name__, expected=_EXPECTED,
            do="Name a callable of your own: tersor.measure.runnable.Runnable(name, callable)",
        )  # fmt: skip
    name, path = str(source), Path(source)
    if name == OWN:
        return Runnable(task.name, _own(task), task.source)
    if path.suffix.lower() == ".onnx":
        return open_onnx(path, threads=threads)
    if (path / "run.json").is_file():
        return Runnable(path.resolve().name, _of_run(path, task), name)
    if (path / ARCHITECTURE).is_file():
        return Runnable(path.resolve().name, load_artifact(path, _own(task)), name)
    if name in BUILTIN:
        return Runnable(name, find_task(name).model, name)
    if name.partition(":")[0].endswith(".py") or ":" in name:
        return _made(name)
    got = "no such file or folder" if not path.exists() else "neither a run nor an artifact nor an ONNX file"
    raise InputError("not a model", where=name, got=got, expected=_EXPECTED)


def _own(task: Task) -> nn.Module:
    if isinstance(task.model, NoModel):
        raise InputError(
            "the data bring no model", where=task.source or "--data", expected="tersor.Task(model=…)",
            do="Return a Task with the original model, whose architecture artifacts are loaded into",
        )  # fmt: skip
    return task.model


def _of_run(path: Path, task: Task) -> nn.Module:
    folder = RunFolder.open(path)
    baseline = folder.step(0, BASELINE)
    original = load_artifact(baseline, _own(task)) if (baseline / ARCHITECTURE).is_file() else _own(task)
    facts = folder.facts()
    student = None if facts.get("student") is None else student_of_run(facts, task.complete())
    return load_artifact(folder.final_model, student or original)


def _made(name: str) -> Runnable:
    found, source = made(name, "model", "torch.nn.Module")
    if isinstance(found, Runnable):
        return found
    model = found.model if isinstance(found, Task) else found
    if not isinstance(model, nn.Module):
        raise InputError(
            "the function gave no model", where=source, got=type(found).__name__,
            expected="torch.nn.Module, tersor.Task or a Runnable",
        )  # fmt: skip
    return Runnable(name.rpartition(":")[2] if ":" in name else Path(name).stem, model, source)
