"""The fresh process of ``compare_latency`` and of benchmarks: time models in turns, on one shared pool of threads."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tersor.measure.energy import Meter, find_meter
from tersor.measure.fresh_process import Tick, serve
from tersor.measure.onnx_cpu import share_threads
from tersor.measure.opened import FILES, Call, Kinds

BLOCK_SECONDS = 0.01  # a model's turn lasts about this long, or one call
# Even, since who is opened second runs some 0.2 % faster: each is it as often. A median has a 95 % interval from 6 on.
SITTINGS, FEWEST_SITTINGS = 10, 6
STEADY = 0.05  # warm-up ends when two windows of calls differ by less than this


def time_calls(run: Callable[[], Any], calls: int) -> list[float]:
    """Seconds of each of ``calls`` calls, one after another."""
    clock = time.perf_counter
    seconds = []
    for _ in range(calls):
        start = clock()
        run()
        seconds.append(clock() - start)
    return seconds


@dataclass(frozen=True)
class Schedule:
    """How one batch size is timed: ``rounds`` of turns in each of ``sittings``; calls in a turn by model.

    The first ``dropped`` calls of a turn find caches full of another model's weights and are not counted; calls that
    are long enough not to notice are all counted.
    """

    sittings: int
    rounds: int
    calls: dict[str, int]
    dropped: dict[str, int]

    @classmethod
    def of(cls, typical: dict[str, float], seconds: float) -> Schedule:
        """A schedule of about ``seconds``, from the seconds of a typical call of each model."""
        calls = {name: max(1, math.ceil(BLOCK_SECONDS / call)) for name, call in typical.items()}
        dropped = {name: 1 if count >= 4 else 0 for name, count in calls.items()}
        turns = sum((calls[name] + dropped[name]) * typical[name] for name in typical)
        sittings = SITTINGS if SITTINGS * turns <= 2 * seconds else FEWEST_SITTINGS
        return cls(sittings, max(1, round(seconds / sittings / turns)), calls, dropped)


@dataclass(frozen=True)
class Sitting:
    """How turns and windows are taken: ``pause`` seconds before each turn, ``window`` seconds of calls at the end.

    ``meters``: name → what counts the energy of that model's windows.
    """

    pause: float
    window: float
    meters: Mapping[str, Meter | None]

    def in_turns(self, calls: dict[str, Call], schedule: Schedule) -> dict[str, list[list[float]]]:
        """name → [rounds, calls] seconds. Every other round goes back: nobody always runs after the same one."""
        blocks: dict[str, list[list[float]]] = {name: [] for name in calls}
        gc.disable()
        try:
            for number in range(schedule.rounds):
                for name, call in list(calls.items())[:: -1 if number % 2 else 1]:
                    self.rest()
                    dropped = schedule.dropped[name]
                    blocks[name].append(time_calls(call.run, dropped + schedule.calls[name])[dropped:])
        finally:
            gc.enable()
        return blocks

    def busy(self, call: Call, meter: Meter | None) -> dict[str, float | None]:
        """calls, seconds and joules of calls one after another for a window."""
        self.rest()
        run, clock, calls = call.run, time.perf_counter, 0
        if meter is not None:
            meter.start()
        start = now = clock()
        while now - start < self.window:
            run()
            calls, now = calls + 1, clock()
        return {"calls": calls, "seconds": now - start, "joules": None if meter is None else meter.joules()}

    def rest(self) -> None:
        """Let threads of the model that ran last, which spin for a while, go to sleep."""
        if self.pause > 0:
            time.sleep(self.pause)


def measure(request: dict[str, Any], tick: Tick, kinds: Kinds = FILES) -> dict[str, dict[str, dict[str, Any]]]:
    """batch size → name → times [sittings, rounds, calls] in seconds, windows [sittings], steady [sittings], outputs.

    Request: models (name → spec), batch_sizes, threads, seconds, and if wanted window (seconds) and pause. Each
    sitting opens the models afresh, since where a model's memory happens to lie can cost or save a few percent as long
    as it lives.
    """
    share_threads(request["threads"])
    openers = {name: kinds[spec["kind"]](spec) for name, spec in request["models"].items()}
    window = request.get("window", 0.0)
    meters = {name: find_meter(spec.get("device", "cpu"))[0] if window else None
              for name, spec in request["models"].items()}  # fmt: skip
    schedules: dict[int, Schedule] = {}
    found: dict[str, dict[str, Any]] = {
        str(batch): {name: {"times": [], "windows": [], "steady": [], "outputs": []} for name in openers}
        for batch in request["batch_sizes"]
    }
    for sitting in range(SITTINGS):
        due = [b for b in request["batch_sizes"] if b not in schedules or sitting < schedules[b].sittings]
        order = list(openers.items())[:: -1 if sitting % 2 else 1] if due else []
        opened = {name: opener() for name, opener in order}
        for batch in due:
            calls = {name: model.call(batch) for name, model in opened.items()}
            for name, call in calls.items():
                found[str(batch)][name]["outputs"] = call.first()
            warm = {
                name: warm_up(partial(time_calls, call.run), request["seconds"] / 15) for name, call in calls.items()
            }
            typical = {name: each.typical for name, each in warm.items()}
            schedule = schedules.setdefault(batch, Schedule.of(typical, request["seconds"]))
            sat = Sitting(request.get("pause", 0.0), window / schedule.sittings, meters)
            _sit(sat, schedule, calls, found[str(batch)])
            for name, each in warm.items():
                found[str(batch)][name]["steady"].append(each.steady)
            tick()
        for _ in range(len(request["batch_sizes"]) - len(due)):
            tick()  # a slow model's batch sizes are done after fewer sittings
    return found


def _sit(sitting: Sitting, schedule: Schedule, calls: dict[str, Call], found: dict[str, Any]) -> None:
    for name, blocks in sitting.in_turns(calls, schedule).items():
        found[name]["times"].append(blocks)
    for name, call in calls.items() if sitting.window else ():
        found[name]["windows"].append(sitting.busy(call, sitting.meters[name]))


@dataclass(frozen=True)
class Warm:
    """Seconds of a typical call after warm-up, and whether calls had become alike."""

    typical: float
    steady: bool


def warm_up(timed: Callable[[int], list[float]], seconds: float) -> Warm:
    """Call until two windows of calls in a row take alike, or ``seconds`` have passed."""
    start = time.perf_counter()
    before = timed(1)[0]
    size = max(1, min(50, math.ceil(BLOCK_SECONDS / max(before, 1e-9))))
    while time.perf_counter() - start <= seconds:
        now = float(np.median(timed(size)))
        if abs(now - before) <= STEADY * before:
            return Warm(max(now, 1e-9), True)
        before = now
    return Warm(max(before, 1e-9), False)


if __name__ == "__main__":
    serve(measure)
