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
MIN_ROUNDS, MAX_ROUNDS = 7, 200  # a median has a 95 % interval from 6 rounds on
TICKS = 10  # progress, for each batch size
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


def measure(request: dict[str, Any], tick: Tick) -> dict[str, dict[str, list[list[float]]]]:
    """batch size → file name → [rounds, calls] seconds. Request: files, inputs, batch_sizes, threads, seconds."""
    share_threads(request["threads"])
    stored = load_file(request["inputs"])
    arrays = tuple(stored[str(number)] for number in range(len(stored)))
    sessions = {name: open_session(Path(path), shared_pool=True) for name, path in request["files"].items()}
    found = {}
    for batch in request["batch_sizes"]:
        runners = {}
        for name, session in sessions.items():
            feed = feed_of(session, tiled(arrays, batch), request["files"][name])
            run_session(session, feed, request["files"][name])
            runners[name] = Runner(session, feed)
        found[str(batch)] = _in_turns(runners, request["seconds"], tick)
    return found


def _in_turns(runners: dict[str, Runner], seconds: float, tick: Tick) -> dict[str, list[list[float]]]:
    typical = {name: warm_up(runner.time, seconds / 4) for name, runner in runners.items()}
    calls = {name: max(1, math.ceil(BLOCK_SECONDS / call)) for name, call in typical.items()}
    # The first call of a turn finds caches full of the other file's weights; short calls can afford to drop it.
    dropped = {name: 1 if count >= 4 else 0 for name, count in calls.items()}
    turn = sum((calls[name] + dropped[name]) * typical[name] for name in runners)
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(seconds / turn)))
    blocks: dict[str, list[list[float]]] = {name: [] for name in runners}
    gc.disable()
    try:
        for number in range(rounds):
            for name, runner in runners.items():
                blocks[name].append(runner.time(calls[name] + dropped[name])[dropped[name] :])
            for _ in range((number + 1) * TICKS // rounds - number * TICKS // rounds):
                tick()
    finally:
        gc.enable()
    return blocks


def warm_up(time_calls: Callable[[int], list[float]], seconds: float) -> float:
    """Call until two windows of calls in a row take alike, or ``seconds`` have passed; seconds of a typical call."""
    start = time.perf_counter()
    window = time_calls(2)
    size = max(1, min(50, math.ceil(BLOCK_SECONDS / max(window[-1], 1e-9))))
    before = float(np.median(time_calls(size)))
    while True:
        now = float(np.median(time_calls(size)))
        if abs(now - before) <= STEADY * before or time.perf_counter() - start > seconds:
            return max(now, 1e-9)
        before = now


if __name__ == "__main__":
    serve(measure)
