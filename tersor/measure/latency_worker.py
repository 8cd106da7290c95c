"""The fresh process of ``compare_latency``: time ONNX files in turns, on one shared pool of threads."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from safetensors.numpy import load_file

from tersor.measure.fresh_process import Tick, serve
from tersor.measure.onnx_cpu import Feed, feed_of, open_session, run_session, share_threads, tiled

BLOCK_SECONDS = 0.01  # a file's turn lasts about this long, or one call
SITTINGS, FEWEST_SITTINGS = 9, 6  # a median has a 95 % interval from 6 on; with 9 it does not hang on the extremes
STEADY = 0.05  # warm-up ends when two windows of calls differ by less than this


@dataclass(frozen=True)
class Runner:
    """A file's session with its inputs of one batch size."""

    session: onnxruntime.InferenceSession
    feed: Feed

    def time(self, calls: int) -> list[float]:
        """Seconds of each of ``calls`` calls, one after another."""
        run, feed, clock = self.session.run, self.feed, time.perf_counter
        seconds = []
        for _ in range(calls):
            start = clock()
            run(None, feed)
            seconds.append(clock() - start)
        return seconds


@dataclass(frozen=True)
class Schedule:
    """How one batch size is timed: ``rounds`` of turns in each of ``sittings``; calls in a turn by file.

    The first ``dropped`` calls of a turn find caches full of another file's weights and are not counted; calls that
    are long enough not to notice are all counted.
    """

    sittings: int
    rounds: int
    calls: dict[str, int]
    dropped: dict[str, int]

    @classmethod
    def of(cls, typical: dict[str, float], seconds: float) -> Schedule:
        """A schedule of about ``seconds``, from the seconds of a typical call of each file."""
        calls = {name: max(1, math.ceil(BLOCK_SECONDS / call)) for name, call in typical.items()}
        dropped = {name: 1 if count >= 4 else 0 for name, count in calls.items()}
        turns = sum((calls[name] + dropped[name]) * typical[name] for name in typical)
        sittings = SITTINGS if SITTINGS * turns <= 2 * seconds else FEWEST_SITTINGS
        return cls(sittings, max(1, round(seconds / sittings / turns)), calls, dropped)


def measure(request: dict[str, Any], tick: Tick) -> dict[str, dict[str, list[list[list[float]]]]]:
    """batch size → file name → [sittings, rounds, calls] seconds.

    Request: files, inputs, batch_sizes, threads, seconds. Each sitting opens the files afresh, since where a session's
    memory happens to lie can cost or save a few percent as long as it lives.
    """
    share_threads(request["threads"])
    stored = load_file(request["inputs"])
    arrays = tuple(stored[str(number)] for number in range(len(stored)))
    schedules: dict[int, Schedule] = {}
    found: dict[str, dict[str, Any]] = {
        str(batch): {name: [] for name in request["files"]} for batch in request["batch_sizes"]
    }
    for sitting in range(SITTINGS):
        due = [b for b in request["batch_sizes"] if b not in schedules or sitting < schedules[b].sittings]
        order = list(request["files"].items())[:: -1 if sitting % 2 else 1] if due else []
        sessions = {name: open_session(Path(path), shared_pool=True) for name, path in order}
        for batch in due:
            runners = {name: _runner(sessions[name], arrays, batch, path) for name, path in order}
            typical = {name: warm_up(runner.time, request["seconds"] / 30) for name, runner in runners.items()}
            schedule = schedules.setdefault(batch, Schedule.of(typical, request["seconds"]))
            for name, blocks in _in_turns(runners, schedule).items():
                found[str(batch)][name].append(blocks)
            tick()
        for _ in range(len(request["batch_sizes"]) - len(due)):
            tick()  # a slow file's batch sizes are done after fewer sittings
    return found


def _runner(session: onnxruntime.InferenceSession, arrays: tuple[Any, ...], batch: int, path: str) -> Runner:
    feed = feed_of(session, tiled(arrays, batch), path)
    run_session(session, feed, path)
    return Runner(session, feed)


def _in_turns(runners: dict[str, Runner], schedule: Schedule) -> dict[str, list[list[float]]]:
    """file name → [rounds, calls] seconds."""
    blocks: dict[str, list[list[float]]] = {name: [] for name in runners}
    gc.disable()
    try:
        for _ in range(schedule.rounds):
            for name, runner in runners.items():
                dropped = schedule.dropped[name]
                blocks[name].append(runner.time(dropped + schedule.calls[name])[dropped:])
    finally:
        gc.enable()
    return blocks


def warm_up(time_calls: Callable[[int], list[float]], seconds: float) -> float:
    """Call until two windows of calls in a row take alike, or ``seconds`` have passed; seconds of a typical call."""
    start = time.perf_counter()
    before = time_calls(1)[0]
    size = max(1, min(50, math.ceil(BLOCK_SECONDS / max(before, 1e-9))))
    while time.perf_counter() - start <= seconds:
        now = float(np.median(time_calls(size)))
        if abs(now - before) <= STEADY * before:
            return max(now, 1e-9)
        before = now
    return max(before, 1e-9)


if __name__ == "__main__":
    serve(measure)
