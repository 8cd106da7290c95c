"""Try ways to compress on this machine, each briefly, within a limit of time."""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from tersor.core.errors import InputError, TersorError
from tersor.core.measurement import Measurement
from tersor.core.plan import Plan
from tersor.core.progress import Progress
from tersor.core.step import Context, Pipeline, Result, Step
from tersor.core.task import Task
from tersor.core.time_limit import TimeUp, time_limit
from tersor.export.onnx import export_onnx
from tersor.hardware.advice import Expected
from tersor.jobs.candidates import Candidate
from tersor.jobs.trials import Trial, verdict_of
from tersor.measure.latency import compare_latency
from tersor.measure.latency_worker import SITTINGS
from tersor.measure.quality import Evaluation, evaluate, paired_drop, quality
from tersor.measure.session import OnnxRunnable
from tersor.measure.size import file_bytes
from tersor.quantize.fold import FoldBatchNorm
from tersor.report.format import duration

ORIGINAL = "original"
EVALUATING, TIMING = 0.3, 0.4  # shares of the limit that evaluations together, and timing, take at most
START = 15.0  # seconds that a fresh process may take to start on a machine in use
SHORTEST = 0.2  # seconds of timing, at least


@dataclass(frozen=True)
class Settings:
    """How ways are tried. ``batch``: samples in a timed pass; ``seconds``: of timing, all files together; ``limit``:
    validation samples; ``max_drop``: what may be lost; ``max_seconds``: all of it takes at most so long."""

    batch: int
    seconds: float
    limit: int | None
    max_drop: float
    threads: int | None
    max_seconds: float = math.inf


@dataclass
class _Clock:
    limit: float
    begun: float = field(default_factory=time.perf_counter)

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.begun

    @property
    def left(self) -> float:
        return self.limit - self.spent


def try_out(
    task: Task, ways: Sequence[Candidate], settings: Settings, expected: Sequence[Expected], told: Progress
) -> tuple[dict[str, Measurement], tuple[Trial, ...]]:
    """The original's measurements, and a trial of each way in their order.

    What the limit leaves no time for is not tried, and says so. Raises InputError where there is none for the original.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(task, settings, Path(folder), told)
        work.begin(len(ways))
        for number, way in enumerate(told.track(ways, "try ways to compress", len(ways)), start=1):
            work.add(way, sum(other.step is not None for other in ways[number:]))
        measured = work.measured()
    promised = {each.name: each.speedup for each in expected}
    trials = tuple(
        Trial(
            way.name, way.family, measured.get(way.name, {}), promised.get(way.expected or ""),
            verdict_of(measured.get(way.name, {}), settings.max_drop), work.failed.get(way.name, ""),
            way.part, work.notes.get(way.name, ""),
        )
        for way in ways
    )  # fmt: skip
    return measured[ORIGINAL], trials


class _Work:
    """The original and what was made of it: files, evaluations, and why some were not made."""

    def __init__(self, task: Task, settings: Settings, folder: Path, told: Progress):
        self.task, self.settings, self.folder, self.told = task, settings, folder, told
        self.clock = _Clock(settings.max_seconds)
        self.files: dict[str, Path] = {}
        self.seen: dict[str, Evaluation] = {}
        self.failed: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.samples = settings.limit
        self.first = self.reserve = self.call = 0.0  # seconds: of the original, kept for timing, of a pass

    def begin(self, count: int) -> None:
        """Export and evaluate the original, which tells how long ``count`` ways will take."""
        most = self.settings.max_seconds
        try:
            with time_limit(most):
                self._see(ORIGINAL, self.task.model, EVALUATING * most / (count + 1))
        except TersorError as error:
            if self.clock.left > 0:
                raise
            raise InputError(
                "no time to try anything", where="--max-seconds", got=f"{most:g}", do="The original alone takes longer"
            ) from error
        original = self.seen[ORIGINAL]
        self.first, self.samples = self.clock.spent, original.n
        self.call = self.settings.batch * original.seconds / original.n
        need = self._need(self.settings.seconds, count + 1)
        self.reserve = min(need, TIMING * most)
        about = duration(min(count * self.first + need / 2, most))
        limit = "" if most == math.inf else f", at most {duration(most)}"
        self.told.say(f"{count} ways to try on {self.samples} samples: about {about}{limit}")

    def add(self, way: Candidate, after: int) -> None:
        """Make the file of a way and evaluate it, or note why not. ``after``: how many come after it, for which half
        of what is left is kept."""
        if way.step is None:
            self.failed[way.name] = way.why_not
            return
        left = (self.clock.left - self.reserve) / (2 if after else 1)
        if left < self.first / 2:
            self.failed[way.name] = self._no_time("was left")
            return
        self.told.say(f"trying {way.name}")
        end = self.clock.left - left
        try:
            with time_limit(left):
                result = made(self.task, way.step, self.told)
                self._see(way.name, result.model)
                self.notes[way.name] = _passed_over(result.plans)
        except TersorError as error:
            self.failed[way.name] = self._no_time("was enough") if self.clock.left <= end else str(error)

    def measured(self) -> dict[str, dict[str, Measurement]]:
        """name → bytes, validation metric, drop, latency and speed-up; the original's alone where time was up."""
        task, batch = self.task, self.settings.batch
        example = task.demand_example()
        metric = task.demand_metric()
        try:
            with time_limit(self.clock.left):
                times = compare_latency(
                    self.files, tuple(value[:1] for value in example), batch_sizes=(batch,),
                    threads=self.settings.threads, seconds=self._affordable(), progress=self.told,
                )  # fmt: skip
        except TimeUp:
            self.told.say("warning: the time was up before all files were timed: nothing is ranked by measurement")
            self.failed |= {name: self._no_time("was left to time it") for name in self.files}
            times = {ORIGINAL: {}}
        found: dict[str, dict[str, Measurement]] = {}
        for name, timed in times.items():
            found[name] = {
                "size_bytes": file_bytes(self.files[name]),
                f"validation_{metric.name}": quality(self.seen[name], task),
            }
            if timed:
                found[name]["latency_ms"] = timed[f"latency_ms_batch_{batch}"]
            if name != ORIGINAL:
                found[name]["speedup"] = timed[f"speedup_batch_{batch}"]
                found[name]["drop_points"] = paired_drop(self.seen[ORIGINAL], self.seen[name], task)
        return found

    def _see(self, name: str, model: nn.Module, seconds: float = math.inf) -> None:
        """Export a model and evaluate its file."""
        task, path = self.task, self.folder / f"{len(self.files)}.onnx"
        export_onnx(model, task.demand_example(), path, output_of=task.sole_output)
        runnable = OnnxRunnable(path, threads=self.settings.threads)
        self.seen[name] = evaluate(runnable, task, "validation", self.told, self.samples, seconds)
        self.files[name] = path

    def _need(self, seconds: float, files: int) -> float:
        """How long timing may take: warming up and the calls themselves, twice that on a machine in use."""
        return START + 2 * files * SITTINGS * (seconds / 15 + 2 * self.call) + 2 * seconds

    def _affordable(self) -> float:
        files = len(self.files)
        spare = self.clock.left - self._need(0.0, files)
        return max(SHORTEST, min(self.settings.seconds, spare / 2 / (1 + files * SITTINGS / 15)))

    def _no_time(self, what: str) -> str:
        return f"no time {what}: the limit is {duration(self.settings.max_seconds)} (--max-seconds)"


def made(task: Task, step: Step, told: Progress) -> Result:
    """What the step makes of the task's model. Raises TersorError where one of its parts finds nothing to do."""
    result = step.run(task.model, task, Context(progress=told))
    parts = step.steps if isinstance(step, Pipeline) else (step,)
    for part, plan in zip(parts, result.plans, strict=True):
        if not plan.edits and not isinstance(part, FoldBatchNorm):
            raise TersorError(f"{plan.method} finds nothing to do; {_passed_over([plan])}")
    return result


def _passed_over(plans: Sequence[Plan]) -> str:
    """How many places were skipped, and the commonest reason; empty where none was."""
    reasons = Counter(skip.reason for plan in plans for skip in plan.skips)
    if not reasons:
        return ""
    reason, count = reasons.most_common(1)[0]
    if reasons.total() == 1:
        return f"one place passed over: {reason}"
    return f"{reasons.total()} places passed over, {count} of them because: {reason}"
