"""Run the steps of a recipe in a folder: run, save, export, verify, measure, record; then the next."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tersor.core.edit import Quantizer
from tersor.core.errors import ArtifactError, InputError, VerificationError
from tersor.core.plan import Plan
from tersor.core.progress import Progress
from tersor.core.record import Record
from tersor.core.step import Context, Step, derive_seed
from tersor.core.task import Task
from tersor.export.artifact import load_artifact, read_edits, save_artifact
from tersor.export.onnx import export_onnx
from tersor.export.verify import verify_onnx
from tersor.measure.quality import evaluate
from tersor.measure.session import OnnxRunnable
from tersor.run.environment import versions
from tersor.run.folder import RunFolder, read_json, whole_folder, write_json
from tersor.run.measure_step import SPLITS, Timing, measure_step, stored_evaluation

BASELINE = "baseline"


@dataclass(frozen=True)
class NamedStep:
    """A step of a recipe: ``name`` for its folder, ``title`` for people, ``settings`` as plain JSON for the record.

    ``step`` is None for the baseline alone: the model as it was brought, saved by ``start_from``.
    """

    name: str
    title: str
    step: Step | None
    settings: Mapping[str, Any] = field(default_factory=dict)


def start_from(folder: RunFolder, task: Task, progress: Progress) -> Task:
    """The task, its model set to the weights that the run started from (kept at the first call), completed.

    A task that trains or draws at random thus starts a resumed run from the same place.
    """
    path = folder.step(0, BASELINE)
    if not (path / "architecture.json").exists():
        if folder.records():
            raise ArtifactError(
                "the original model of the run is gone", where=str(path), expected="a saved model",
                do="Put the folder back, or compress again into another one",
            )  # fmt: skip
        with whole_folder(path) as part:
            save_artifact(part, task.model, original=task.model, plans=())
    task = dataclasses.replace(task, model=load_artifact(path, task.model).eval()).complete()
    for note in task.derived:
        progress.say(note)
    if folder.records():
        _expect_same_task(path, task, progress)
    return task


def _expect_same_task(baseline: Path, task: Task, progress: Progress) -> None:
    """Raise InputError where the task's code or data changed since the run measured its original model."""
    do = "Put the task back as it was, or compress again into another folder"
    try:
        verify_onnx(baseline / "model.onnx", task.model, task, quantized=False)
    except VerificationError as error:
        raise InputError(
            "the model's code changed since the run began", where="the task", got=error.got, do=do
        ) from None
    for split in SPLITS:
        now = evaluate(OnnxRunnable(baseline / "model.onnx"), task, split=split, progress=progress).values
        then = stored_evaluation(baseline, split).values
        if now.shape != then.shape or not np.allclose(now, then, rtol=1e-4, atol=1e-6):
            raise InputError(
                f"the {split} data changed since the run began", where=f"task.{split}",
                got=f"{len(now)} samples, mean {now.mean():.6g}",
                expected=f"{len(then)} samples, mean {then.mean():.6g}", do=do,
            )  # fmt: skip


def student_from(folder: RunFolder, student: nn.Module) -> nn.Module:
    """The student with the weights that it began with (kept at the first call)."""
    if not (folder.student / "architecture.json").exists():
        if folder.records():
            raise ArtifactError(
                "the student that the run began with is gone", where=str(folder.student), expected="a saved model",
                do="Put the folder back, or distil again into another one",
            )  # fmt: skip
        with whole_folder(folder.student) as part:
            save_artifact(part, student, original=student, plans=())
    return load_artifact(folder.student, student).eval()


def run_steps(
    folder: RunFolder, task: Task, steps: Sequence[NamedStep],
    *, seed: int, timing: Timing, progress: Progress, student: nn.Module | None = None,
) -> list[Record]:  # fmt: skip
    """Run what is not recorded yet, in order; returns the records of all, the baseline first.

    ``task`` comes from ``start_from``, ``student`` from ``student_from``: what the first step is given, where that is
    another model than the task's, with which everything is compared. Each step is given the model as the step before
    saved it, so that a resumed run and an uninterrupted one compute the same.
    """
    records = folder.records()
    everything = [NamedStep(BASELINE, "The original model", None), *steps]
    if [(r.number, r.name) for r in records] != [(n, s.name) for n, s in enumerate(everything[: len(records)])]:
        raise ArtifactError(
            "the records are not those of the run's steps", where=str(folder.path / "records.jsonl"),
            got=", ".join(r.name for r in records), expected=", ".join(s.name for s in everything),
            do="It was changed by hand: put it back, or compress again into another folder",
        )  # fmt: skip
    for number, named in enumerate(everything):
        if number < len(records):
            progress.say(f"{named.name}: done before")
            continue
        progress.say(f"{number}/{len(steps)} {named.name}: {named.title}")
        previous = folder.step(number - 1, everything[number - 1].name) if number else None
        base = task.model if student is None or number == 0 else student
        if number == 1 and student is not None:
            previous = folder.student
        record = _run_one(folder, task, base, number, named, previous, seed=seed, timing=timing, progress=progress)
        folder.append(record)
        records.append(record)
    return records


def _run_one(
    folder: RunFolder, task: Task, base: nn.Module, number: int, named: NamedStep, previous: Path | None,
    *, seed: int, timing: Timing, progress: Progress,
) -> Record:  # fmt: skip
    path = folder.step(number, named.name)
    step_seed = derive_seed(seed, number)
    if previous is not None and not (path / "step.json").exists():
        _transform(task, base, path, named, previous, Context(step_seed, _work(folder, path), progress))
    measured = time.monotonic()
    if not (path / "onnx.json").exists() or not (path / "model.onnx").exists():
        _export(task, base, path)
    model = load_artifact(path, base).eval()
    found, layers = measure_step(model, path, folder.step(0, BASELINE), task, timing, progress)
    step = read_json(path / "step.json") if previous is not None else {}
    _tidy(folder, path)
    return Record(
        number=number, name=named.name, title=named.title, settings=named.settings, measurements=found, seed=step_seed,
        seconds=round(step.get("seconds", 0.0) + time.monotonic() - measured, 3),
        plans=tuple(step.get("plans", ())), history=tuple(step.get("history", ())),
        facts={**step.get("facts", {}), "onnx": read_json(path / "onnx.json")},
        layers=tuple(layers), versions=versions(),
    )  # fmt: skip


def _transform(task: Task, base: nn.Module, path: Path, named: NamedStep, previous: Path, context: Context) -> None:
    """Run the step itself and save what it made, the whole folder at once."""
    begun = time.monotonic()
    model = load_artifact(previous, base).eval()
    assert context.folder is not None and named.step is not None
    context.folder.mkdir(parents=True, exist_ok=True)
    result = named.step.run(model, task, context)
    earlier = Plan("earlier steps", read_edits(previous))
    plans = [plan.summary() for plan in result.plans]
    with whole_folder(path) as part:
        save_artifact(part, result.model, original=base, plans=(earlier, *result.plans))
        write_json(part / "plan.json", {"plans": plans})
        write_json(
            part / "step.json",
            {
                "seconds": time.monotonic() - begun,
                "plans": plans,
                "history": [dict(entry) for entry in result.history],
                "facts": dict(result.facts),
            },
        )


def _export(task: Task, base: nn.Module, path: Path) -> None:
    """Write and verify ``model.onnx``; what the verification found goes to ``onnx.json``."""
    model = load_artifact(path, base).eval()
    quantized = any(isinstance(edit, Quantizer) for edit in read_edits(path))
    export_onnx(model, task.demand_example(), path / "model.onnx", output_of=task.output)
    write_json(path / "onnx.json", dict(verify_onnx(path / "model.onnx", model, task, quantized=quantized)))


def _work(folder: RunFolder, path: Path) -> Path:
    return folder.path / "work" / path.name


def _tidy(folder: RunFolder, path: Path) -> None:
    """Keep the logs of a finished step, drop its checkpoints."""
    work = _work(folder, path)
    for log in sorted(work.rglob("tensorboard")):
        target = folder.path / "tensorboard" / path.name / log.parent.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(log, target)
    shutil.rmtree(folder.path / "work", ignore_errors=True)
