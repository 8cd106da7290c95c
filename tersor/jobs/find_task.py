"""From what a user types to a Task: a built-in name, a Python file, or package.module:function."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from tersor.core.errors import InputError, TersorError
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.files.open import from_pickle
from tersor.measure.behaviour.data import EvaluationData, NoModel
from tersor.run.folder import RunFolder
from tersor.zoo import BUILTIN
from tersor.zoo import load as load_builtin


def find_task(source: str | Path, progress: Progress | None = None) -> Task:
    """The task that ``source`` names, its ``source`` and ``name`` set.

    ``digits``: built in. ``task.py`` or ``task.py:function``: a Python file whose function (default ``task``) returns a
    Task, or EvaluationData of a task. ``package.module:function``: an importable one. Raises InputError that says what
    was looked for and found.
    """
    name = str(source)
    if name in BUILTIN:
        return load_builtin(name, progress=progress or Progress())
    path, _, function = name.partition(":")
    if not path.endswith(".py") and not function:
        raise InputError(
            "unknown task", where="TASK", got=repr(name),
            expected=f"a built-in one ({', '.join(BUILTIN)}), a Python file, or package.module:function",
            do=_of_weights(path),
        )  # fmt: skip
    task, source = made(name, "task", "tersor.Task")
    if isinstance(task, EvaluationData) and not isinstance(task.based.model, NoModel):
        task = task.based
    if not isinstance(task, Task):
        raise InputError(
            f"{function or 'task'}() returned no Task", where=source, got=type(task).__name__, expected="tersor.Task"
        )
    return found_as(task, name, source)


def _of_weights(path: str) -> str:
    """What to do with a file of weights where a task is asked for; "" for any other name."""
    do = from_pickle(path)
    return do and f"{do}; inspect, prune and quantize read it. Every other command needs a task that loads the weights"


def found_as(task: Task, name: str, source: str) -> Task:
    """The task with its absolute ``source``; one without a name is called after the file or module in ``name``."""
    path = name.partition(":")[0]
    stem = Path(path).stem if path.endswith(".py") else path.rpartition(".")[2]
    return dataclasses.replace(task, source=source, name=stem if task.name == "task" else task.name)


def absolute(name: str, default: str) -> str:
    """The name of a function (``file.py:function``, by default ``default``) as it means the same from every folder."""
    path, _, function = name.partition(":")
    return f"{Path(path).resolve()}:{function or default}" if path.endswith(".py") else name


def made(name: str, default: str, kind: str) -> tuple[Any, str]:
    """What a function gives, and its absolute name.

    ``name``: ``file.py:function`` (by default ``default``), or ``package.module:function``; ``kind``: what it should
    give, for errors. Raises InputError.
    """
    path, _, function = name.partition(":")
    if path.endswith(".py"):
        source, function = absolute(name, default), function or default
        return _call(_module_from_file(Path(path), function, kind), function, source, kind), source
    if not function:
        raise InputError(
            "not the name of a function", where=name, expected="file.py:function, or package.module:function"
        )
    return _call(_module_by_name(path, name), function, name, kind), name


def find_task_of(folder: RunFolder, progress: Progress) -> Task:
    """The task of a run, by the source that it was begun with."""
    source = folder.facts()["task"]["source"]
    if not source:
        raise InputError(
            "the run was begun from Python, with a task that has no file", where=str(folder.path),
            do="Call tersor.resume(out, task=…) or tersor.load_check(out, task=…) from Python",
        )  # fmt: skip
    return find_task(source, progress)


def _module_from_file(path: Path, function: str, kind: str) -> ModuleType:
    if not path.is_file():
        expected = f"a Python file with a function {function}() that returns a {kind.removeprefix('tersor.')}"
        raise InputError("no such file", where=str(path), expected=expected)
    name = f"tersor_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # data loader workers and dataclasses look their module up here
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except TersorError:
        raise
    except Exception as error:  # the user's file may raise anything
        raise InputError("the task's file cannot be imported", where=_line(error, path), got=_short(error)) from error
    finally:
        sys.path.pop(0)
    return module


def _module_by_name(module: str, source: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(module)
    except TersorError:
        raise
    except Exception as error:  # importing runs the user's code
        raise InputError("the task's module cannot be imported", where=source, got=_short(error)) from error
    finally:
        sys.path.pop(0)


def _call(module: ModuleType, function: str, source: str, kind: str) -> Any:
    maker: Callable[[], Any] | None = getattr(module, function, None)
    if not callable(maker):
        named = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(
            f"there is no function {function}()", where=source, got=f"functions {', '.join(named[:8]) or 'none'}",
            expected=f"def {function}() -> {kind}",
        )  # fmt: skip
    try:
        return maker()
    except TersorError:
        raise
    except Exception as error:  # the user's function may raise anything
        raise InputError(
            f"{function}() raised an error", where=_line(error, Path(module.__file__ or "")), got=_short(error)
        ) from error


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _line(error: BaseException, path: Path) -> str:
    """file:line of the innermost frame in ``path``."""
    found, frame = str(path), error.__traceback__
    while frame is not None:
        if Path(frame.tb_frame.f_code.co_filename).name == path.name:
            found = f"{path}:{frame.tb_lineno}"
        frame = frame.tb_next
    return found
