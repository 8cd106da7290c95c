"""Load what a run shipped, both ways, and compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tersor.core.edit import Quantizer
from tersor.core.errors import ArtifactError, VerificationError
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.export.artifact import load_artifact, read_edits
from tersor.export.verify import verify_onnx
from tersor.jobs.find_task import find_task_of
from tersor.jobs.student import student_of_run, taught_of_run
from tersor.measure.quality import evaluate
from tersor.measure.session import OnnxRunnable
from tersor.run.engine import BASELINE
from tersor.run.folder import RunFolder, read_json


def load_check(out: str | Path, task: Task | None = None, *, progress: Progress | None = None) -> Mapping[str, Any]:
    """Load a run's artifact into the original architecture, and its ONNX file, and compare the two and the summary.

    Returns what was compared. Raises ArtifactError where something is missing or damaged, VerificationError where the
    two disagree or the test metric is not the one in the summary.
    """
    progress = progress or Progress()
    folder = RunFolder.open(Path(out))
    if not folder.summary.exists():
        raise ArtifactError("the run is not finished", where=str(out), do=f"tersor resume {out}")
    summary = read_json(folder.summary)
    facts = folder.facts()
    task = taught_of_run(facts, task or find_task_of(folder, progress))
    original = load_artifact(folder.step(0, BASELINE), task.model).eval()
    complete = _with_model(task, original)
    model = load_artifact(folder.final_model, student_of_run(facts, complete) or original).eval()
    quantized = any(isinstance(edit, Quantizer) for edit in read_edits(folder.final_model))
    found = dict(verify_onnx(folder.final_onnx, model, complete, quantized=quantized))
    again = evaluate(OnnxRunnable(folder.final_onnx), complete, split="test", progress=progress)
    metric = summary["task"]["metric"]
    told = summary["final"]["measurements"][metric]["value"]
    value = float(again.values.mean())
    if abs(value - told) > 1e-9:
        raise VerificationError(
            "the test metric is not the one in summary.json", where=str(folder.final_onnx), got=value, expected=told
        )
    return {**found, metric: value, "samples": again.n}


def _with_model(task: Task, model: Any) -> Task:
    return dataclasses.replace(task, model=model).complete()
