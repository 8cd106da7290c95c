"""The main job: compress a task by a recipe into a run's folder, prove it, and report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import nn

from tersor.core.check_task import check_task
from tersor.core.errors import ArtifactError, InputError, TersorError
from tersor.core.plan import Plan
from tersor.core.progress import Progress
from tersor.core.record import Record
from tersor.core.task import Task
from tersor.export.artifact import load_artifact, read_edits, save_artifact
from tersor.graph.trace import trace
from tersor.jobs.find_task import find_task, find_task_of
from tersor.jobs.student import student_of_run, taught_of_run
from tersor.recipes.recipe import Recipe, read_recipe
from tersor.report.card import card
from tersor.report.schema import parse_summary
from tersor.report.write import write_report
from tersor.run.budgets import Budgets, choose, merge
from tersor.run.engine import run_steps, start_from, student_from
from tersor.run.environment import environment
from tersor.run.folder import RunFolder, whole_folder, write_json
from tersor.run.measure_step import Timing
from tersor.run.summary import summarise


@dataclass(frozen=True)
class Compressed:
    """What a run gave: the shipped ``model`` (a PyTorch module), its ``folder``, and the ``summary`` (summary.json)."""

    model: nn.Module
    folder: Path
    summary: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every budget was kept."""
        return bool(self.summary["verdict"]["status"] == "passed")


def compress(
    task: Task | str | Path,
    recipe: str | Path | Mapping[str, Any] = "balanced",
    out: str | Path = "runs/compressed",
    *,
    budgets: Budgets | None = None,
    seed: int = 0,
    timing: Timing | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Compress ``task``'s model by ``recipe`` in the new folder ``out``.

    ``budgets``: limits that the result is held to; those left None are the recipe's. Nothing is raised where one is
    missed: look at ``passed``. Raises InputError for unusable input, before anything is written;
    VerificationError, TrainingError or GraphError where a step fails, with what was finished kept for ``resume``.
    """
    timing = timing or Timing()
    found = found_for(task, out, progress or Progress())
    asked = Asked(read_recipe(recipe), budgets or Budgets(), seed, timing)
    command = _command(found, recipe, out, asked)
    return begin(found, Path(out), asked, {"command": command}, progress or Progress())


@dataclass(frozen=True)
class Asked:
    """What a run was asked for: ``recipe``, ``budgets`` (beside the recipe's own), ``seed``, ``timing``."""

    recipe: Recipe
    budgets: Budgets
    seed: int
    timing: Timing


def found_for(task: Task | str | Path, out: str | Path, progress: Progress) -> Task:
    """The task, when it is sure that this is one process and that ``out`` is free."""
    _expect_alone()
    RunFolder(Path(out)).expect_free()
    return find_task(task, progress) if isinstance(task, (str, Path)) else task


def _expect_alone() -> None:
    processes = os.environ.get("WORLD_SIZE", "")
    if processes not in ("", "0", "1"):
        raise InputError(
            "a run is of one process", where="WORLD_SIZE, as accelerate launch and torchrun set it", got=processes,
            expected="1", do="For several processes launch a script of your own, with Teach(…).run(student, task)",
        )  # fmt: skip


def begin(
    found: Task, out: Path, asked: Asked, more_facts: Mapping[str, Any], progress: Progress,
    student: nn.Module | None = None,
) -> Compressed:  # fmt: skip
    """Check everything, write run.json with ``more_facts`` in the new folder ``out``, and run.

    ``student``: what the first step is given, where that is not the task's model.
    """
    complete = found.complete()
    notes = list(check_task(complete))
    assert complete.example_inputs is not None and complete.metric is not None
    for model in filter(None, (complete.model, student)):
        trace(model, complete.example_inputs)  # a model without a graph is refused before anything is written
    merged, more = merge(asked.budgets, asked.recipe.budgets, complete.metric)
    for note in (*notes, *more):
        progress.say(note)
    facts = {
        "recipe": asked.recipe.to_json(),
        "task": {"name": found.name, "source": found.source},
        "seed": asked.seed,
        "budgets": dataclasses.asdict(merged),
        "timing": dataclasses.asdict(asked.timing),
        "notes": [*notes, *more],
        "base_sha256": state_hash(found.model),
        "environment": environment(),
        **more_facts,
    }
    return _work(RunFolder.create(out, facts), found, asked.recipe, progress, student)


def resume(out: str | Path, task: Task | None = None, *, progress: Progress | None = None) -> Compressed:
    """Go on with a run that was stopped at any moment; a finished run is only reported again.

    It goes on with as many threads as it began with, since the last digits of weights depend on that. ``task``: needed
    where the run was begun from Python with a Task of no known source.
    """
    _expect_alone()
    progress = progress or Progress()
    folder = RunFolder.open(Path(out))
    facts = folder.facts()
    began, now = int(facts["environment"]["threads"]), torch.get_num_threads()
    torch.set_num_threads(began)
    try:
        if environment() != facts["environment"]:
            _note_another_machine(folder, facts, progress)
        recipe = read_recipe(_recipe_data(facts["recipe"]))
        found = taught_of_run(facts, task or find_task_of(folder, progress))
        return _work(folder, found, recipe, progress, student_of_run(facts, found.complete()))
    finally:
        torch.set_num_threads(now)


def _note_another_machine(folder: RunFolder, facts: dict[str, Any], progress: Progress) -> None:
    """Keep in run.json, and so in the report, that a part of the run was computed elsewhere."""
    here, there = environment(), facts["environment"]
    changed = [f"{key} {there.get(key)} → {here[key]}" for key in here if here[key] != there.get(key)]
    note = f"resumed where something differs from the start ({'; '.join(changed)}): last digits may differ"
    if note not in facts["notes"]:
        progress.say(f"warning: {note}")
        write_json(folder.description, {**facts, "notes": [*facts["notes"], note]})


def _work(folder: RunFolder, task: Task, recipe: Recipe, progress: Progress, student: nn.Module | None) -> Compressed:
    facts = folder.facts()
    try:
        with folder.lock():
            task = start_from(folder, task, progress)
            first = None if student is None else student_from(folder, student)
            timing = Timing(**facts["timing"])
            records = run_steps(
                folder, task, recipe.steps, seed=facts["seed"], timing=timing, progress=progress, student=first
            )
            return _finish(folder, task, facts, records, first or task.model)
    except FileNotFoundError as error:
        raise ArtifactError(
            "a file of the run is missing", where=str(error.filename or folder.path),
            do="Put it back, or compress again into another folder",
        ) from error  # fmt: skip
    except OSError as error:
        raise TersorError(
            "a file could not be written", where=str(error.filename or folder.path), got=error.strerror or error,
            do=f"Finished steps are kept: make room, then tersor resume {folder.path}",
        ) from error  # fmt: skip


def _finish(
    folder: RunFolder, task: Task, facts: Mapping[str, Any], records: list[Record], base: nn.Module
) -> Compressed:
    budgets = Budgets(**facts["budgets"])
    shipped = choose(records, budgets, task.demand_metric())
    source = folder.step(shipped.number, shipped.name)
    parsed = parse_summary(summarise(task, facts, records, shipped, budgets))
    summary = parsed.to_json()
    model, edits = load_artifact(source, base).eval(), Plan(folder.path.name, read_edits(source))
    with whole_folder(folder.final_model) as part:
        save_artifact(part, model, original=base, plans=(edits,), card=card(parsed), encode="smallest")
    beside = folder.path / ".model.onnx.part"
    shutil.copyfile(source / "model.onnx", beside)
    beside.replace(folder.final_onnx)
    write_json(folder.summary, summary)
    write_report(folder.path)
    return Compressed(load_artifact(folder.final_model, base).eval(), folder.path, summary)


def _recipe_data(kept: Mapping[str, Any]) -> dict[str, Any]:
    """run.json's recipe as read_recipe takes it: resumed runs use the settings they began with."""
    steps = [{"name": s["name"], "title": s["title"], "parts": s["settings"]["parts"]} for s in kept["steps"]]
    return {"name": kept["name"], "explanation": kept["explanation"], "steps": steps}


def _command(task: Task, recipe: str | Path | Mapping[str, Any], out: str | Path, asked: Asked) -> str:
    """The command that does the same again."""
    if not task.source or isinstance(recipe, Mapping):
        return "tersor.compress(task, recipe=…) from Python"
    options = told(asked.budgets, asked.seed, asked.timing)
    return f"tersor compress {quote(task.source)} -o {quote(str(out))} --recipe {quote(str(recipe))}{options}"


def told(budgets: Budgets, seed: int, timing: Timing) -> str:
    """Budgets, seed and timing as options of the command line, where they are not the usual ones."""
    units, limits = {"max_drop": "", "max_size": "", "max_latency": "ms"}, dataclasses.asdict(budgets)
    options = {
        **{name: f"{value:g}{units[name]}" for name, value in limits.items() if value is not None},
        **({"seed": seed} if seed else {}),
        **({"timing_seconds": timing.seconds} if timing.seconds != Timing().seconds else {}),
        **({"threads": timing.threads} if timing.threads else {}),
    }
    return "".join(f" --{name.replace('_', '-')} {value}" for name, value in options.items())


def state_hash(model: nn.Module) -> str:
    """sha256 over the names and bytes of a model's state."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
