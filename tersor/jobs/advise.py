"""How to compress a model for a device: tried briefly on this machine, or told from a device's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tersor.core.check_task import check_task
from tersor.core.errors import InputError
from tersor.core.measurement import Measurement
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.hardware.advice import Expected, Line, expectations, lines
from tersor.hardware.fits import fits_on
from tersor.hardware.profile import Profile
from tersor.hardware.roofline import roofline_of
from tersor.hardware.this import THIS
from tersor.jobs.candidates import candidates
from tersor.jobs.find_task import find_task
from tersor.jobs.fits import device_of, task_workload
from tersor.jobs.trials import Trial, measured_lines, rank
from tersor.jobs.try_out import Settings, try_out


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
    max_seconds: float | None = 300.0,
    progress: Progress | None = None,
) -> Advice:
    """Say how to compress a task's model for a device: which family first, bits, structure, alignment, expected gain.

    For "this" machine the candidates are tried, without training: each is exported to ONNX, timed in turns with the
    original for about ``seconds`` altogether, and its metric taken on ``limit`` validation samples (None: all), before
    any repair. They are ranked by what was measured: faster at a drop of at most ``max_drop`` (percentage points; in
    the metric's own unit where it is no fraction), then faster but to be repaired by training, then the others.

    ``max_seconds``: trying ends within so many (None: whenever it is done), after the task is loaded and the machine
    measured: fewer samples, less timing, and candidates that are not tried, each of which is said. It cannot end a
    single call into C, nor anything in another thread than the main one.

    For a profile nothing runs: the lines rest on its figures. Raises InputError and GraphError.
    """
    max_seconds = None if max_seconds == math.inf else max_seconds
    if max_seconds is not None and not max_seconds > 0:
        raise InputError("no time at all", where="--max-seconds", got=max_seconds, expected="seconds above 0")
    if batch < 1 or not 0 < seconds < math.inf or (limit is not None and limit < 1):
        raise InputError("nothing to try", where="advise", got=f"{batch=}, {seconds=}, {limit=}", expected="above 0")
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
    settings = Settings(batch, seconds, limit, max_drop, threads, math.inf if max_seconds is None else max_seconds)
    kept = {**asdict(settings), "max_seconds": max_seconds}
    advice = Advice(complete.name, profile.name, profile.title, batch, said, (), expected, {}, cautions, kept)
    if measured is None:
        return advice
    ways = candidates(complete.model, work, profile.alignment.multiple_of)
    original, trials = try_out(complete, ways, settings, expected, told)
    ranked = rank(trials)
    measured_now = measured_lines(said, ranked, complete.source, max_drop)
    return replace(advice, lines=measured_now, trials=ranked, original=original)
