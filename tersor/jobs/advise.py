"""How to compress a model for a device: tried briefly on this machine, or told from a device's figures."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tersor.core.check_task import check_task
from tersor.core.errors import TersorError
from tersor.core.measurement import Measurement
from tersor.core.progress import Progress
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.export.onnx import export_onnx
from tersor.hardware.advice import Expected, Line, expectations, lines
from tersor.hardware.fits import fits_on
from tersor.hardware.profile import Profile
from tersor.hardware.roofline import roofline_of
from tersor.hardware.this import THIS
from tersor.jobs.candidates import Candidate, candidates
from tersor.jobs.find_task import find_task
from tersor.jobs.fits import device_of, task_workload
from tersor.jobs.trials import Trial, measured_lines, rank, verdict_of
from tersor.measure.latency import compare_latency
from tersor.measure.quality import Evaluation, evaluate, paired_drop, quality
from tersor.measure.session import OnnxRunnable
from tersor.measure.size import file_bytes

ORIGINAL = "original"


@dataclass(frozen=True)
class Advice:
    """What to do for a device, each line with its reason; what was tried (this machine alone), best first; what the
    device's figures promise; what commonly goes wrong there."""

    model: str
    device: str
    title: str
    batch: int
    lines: tuple[Line, ...]
    trials: tuple[Trial, ...]
    expected: tuple[Expected, ...]
    original: Mapping[str, Measurement]
    cautions: tuple[str, ...]
    settings: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def advise(
    task: Task | str | Path,
    on: str | Path | Profile = THIS,
    *,
    batch: int = 1,
    seconds: float = 10.0,
    limit: int | None = 1000,
    max_drop: float = 1.0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Advice:
    """Say how to compress a task's model for a device: which family first, bits, structure, alignment, expected gain.

    For "this" machine the candidates are tried, without training: each is exported to ONNX, timed in turns with the
    original for about ``seconds`` altogether, and its metric taken on ``limit`` validation samples (None: all), before
    any repair. They are ranked by what was measured: faster at a drop of at most ``max_drop`` (percentage points; in
    the metric's own unit where it is no fraction), then faster but to be repaired by training, then the others. For a
    profile nothing runs: the lines rest on its figures. Raises InputError and GraphError.
    """
    told = progress or Progress()
    profile, measured = device_of(on, threads, told)
    found = find_task(task, told) if isinstance(task, (str, Path)) else task
    complete = found.complete() if measured is not None else found.complete(needs=())
    if measured is not None:
        check_task(complete)
    work = task_workload(complete, batch)
    roofline = measured or roofline_of(profile)
    expected = expectations(work, profile, roofline)
    said = lines(work, profile, roofline, expected)
    cautions = fits_on(work, profile, roofline=measured).cautions
    settings = {"batch": batch, "seconds": seconds, "limit": limit, "max_drop": max_drop, "threads": threads}
    advice = Advice(
        complete.name, profile.name, profile.title, batch, said, (), expected, {}, cautions, settings
    )  # fmt: skip
    if measured is None:
        return advice
    original, trials = _tried(complete, candidates(complete.model, work, profile.alignment.multiple_of), settings,
                              expected, told)  # fmt: skip
    ranked = rank(trials)
    return replace(advice, lines=measured_lines(said, ranked, complete.source), trials=ranked, original=original)


def _tried(
    task: Task, ways: Sequence[Candidate], settings: Mapping[str, Any], expected: Sequence[Expected], told: Progress
) -> tuple[dict[str, Measurement], tuple[Trial, ...]]:
    """The original's measurements, and a trial of each candidate in their order."""
    assert task.example_inputs is not None
    promised = {each.name: each.speedup for each in expected}
    with tempfile.TemporaryDirectory() as folder:
        files = {ORIGINAL: Path(folder) / "original.onnx"}
        export_onnx(task.model, task.example_inputs, files[ORIGINAL], output_of=task.sole_output)
        failed: dict[str, str] = {}
        for number, way in enumerate(ways):
            if way.step is None:
                failed[way.name] = way.why_not
                continue
            told.say(f"trying {way.name}")
            try:
                files[way.name] = _made(task, way, Path(folder) / f"{number}.onnx", told)
            except TersorError as error:
                failed[way.name] = str(error)
        measured = _measured(task, files, settings, told)
    trials = tuple(
        Trial(
            way.name, way.family, measured.get(way.name, {}), promised.get(way.expected or ""),
            verdict_of(measured.get(way.name, {}), settings["max_drop"]), failed.get(way.name, ""),
        )
        for way in ways
    )  # fmt: skip
    return measured[ORIGINAL], trials


def _made(task: Task, way: Candidate, path: Path, told: Progress) -> Path:
    assert way.step is not None and task.example_inputs is not None
    result = way.step.run(task.model, task, Context(progress=told))
    if not any(plan.edits for plan in result.plans):
        raise TersorError("nothing of the model can be changed in this way", where=way.name)
    export_onnx(result.model, task.example_inputs, path, output_of=task.sole_output)
    return path


def _measured(
    task: Task, files: Mapping[str, Path], settings: Mapping[str, Any], told: Progress
) -> dict[str, dict[str, Measurement]]:
    """name → bytes, latency, speed-up, validation metric and drop of each file."""
    assert task.example_inputs is not None and task.metric is not None
    batch = settings["batch"]
    timed = compare_latency(
        files, tuple(value[:1] for value in task.example_inputs), batch_sizes=(batch,), threads=settings["threads"],
        seconds=settings["seconds"], progress=told,
    )  # fmt: skip
    found: dict[str, dict[str, Measurement]] = {}
    before: Evaluation | None = None
    for name, path in files.items():
        seen = evaluate(OnnxRunnable(path, threads=settings["threads"]), task, "validation", told, settings["limit"])
        before = before or seen
        found[name] = {
            "latency_ms": timed[name][f"latency_ms_batch_{batch}"],
            "size_bytes": file_bytes(path),
            f"validation_{task.metric.name}": quality(seen, task),
        }
        if name != ORIGINAL:
            found[name]["speedup"] = timed[name][f"speedup_batch_{batch}"]
            found[name]["drop_points"] = paired_drop(before, seen, task)
    return found
