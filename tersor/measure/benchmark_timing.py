"""From the seconds of calls to what a benchmark says of them: times with intervals, outliers, verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tersor.core.measurement import Measurement
from tersor.measure.benchmark_schema import Comparison, Outliers, Timing, Word
from tersor.measure.latency import Times, mean_call, median_call, medians, percentile
from tersor.tensor.statistics import Estimate, compare_pairs, quantile_interval

TOO_WIDE = 1.25  # an interval whose ends are farther apart does not show that two are alike
SLOWEST = 20  # outliers that are kept


def timing(model: str, batch: int, threads: int, seen: Mapping[str, Any], facts: Mapping[str, str]) -> Timing:
    """What a worker saw of one model at one batch size; ``facts``: its backend, precision and device."""
    times = np.array(seen["times"])
    conditions = {"batch": batch, "threads": threads, "backend": facts["backend"], "sittings": len(times)}

    def in_ms(estimate: Estimate) -> Measurement:
        return Measurement.of(estimate, "ms", times.size, scale=1e3, **conditions)

    return Timing(
        model=model, batch=batch, threads=threads, mean_ms=in_ms(mean_call(times)), p50_ms=in_ms(median_call(times)),
        p95_ms=in_ms(percentile(times, 0.95)), p99_ms=in_ms(percentile(times, 0.99)),
        throughput=_throughput(seen["windows"], batch, conditions),
        energy=_energy(seen["windows"], batch, {**conditions, "of": "everything that ran there"}),
        outliers=outliers(times), steady=float(np.mean(seen["steady"])),
        sittings_ms=tuple((1e3 * medians(times)).tolist()),
        percentiles_ms=tuple((1e3 * np.quantile(times, np.linspace(0, 1, 101))).tolist()),
        outputs=tuple(tuple(shape) for shape in seen["outputs"]),
    )  # fmt: skip


def outliers(times: Times) -> Outliers:
    """Calls beyond the third quartile of their sitting by thrice the distance of its quartiles (Tukey's far out)."""
    calls = times.reshape(len(times), -1)
    lower, upper = np.quantile(calls, [0.25, 0.75], axis=1, keepdims=True)
    slow = np.sort(calls[calls > upper + 3 * (upper - lower)])[::-1]
    return Outliers(count=len(slow), share=len(slow) / calls.size, slowest_ms=tuple((1e3 * slow[:SLOWEST]).tolist()))


def _throughput(windows: Sequence[Mapping[str, float]], batch: int, conditions: dict[str, Any]) -> Measurement | None:
    if not windows:
        return None
    rates = [batch * window["calls"] / window["seconds"] for window in windows]
    seconds = sum(window["seconds"] for window in windows)
    return Measurement.of(typical(rates), "samples/s", len(rates), **conditions, seconds=round(seconds, 3))


def _energy(windows: Sequence[Mapping[str, Any]], batch: int, conditions: dict[str, Any]) -> Measurement | None:
    if not windows or any(window["joules"] is None for window in windows):
        return None
    each = [window["joules"] / (batch * window["calls"]) for window in windows]
    return Measurement.of(typical(each), "J/sample", len(each), **conditions)


def typical(values: Sequence[float]) -> Estimate:
    """The median with its interval from order statistics."""
    return Estimate(float(np.median(values)), *quantile_interval(values, 0.5))


def comparison(base: str, model: str, batch: int, threads: int, seen: Mapping[str, Any]) -> Comparison:
    """Whether ``model`` is faster than ``base``, from what a worker saw of both in turns.

    The pairs are the medians of each sitting. Where 1 lies in the interval of their ratio and its ends are more than
    ``TOO_WIDE`` apart, the verdict is "too noisy to tell": a difference worth having may hide there.
    """
    before, after = (medians(np.array(seen[name]["times"])) for name in (base, model))
    test = compare_pairs(before, after)
    ratio = test.ratio
    wide = not math.isfinite(ratio.high) or ratio.low <= 0 or ratio.high > TOO_WIDE * ratio.low
    word: Word = "too noisy to tell" if test.verdict == "no difference shown" and wide else test.verdict
    n = len(seen[base]["times"])
    speedup = Measurement.of(ratio, "×", n, batch=batch, threads=threads, sittings=n)
    return Comparison(
        base=base, model=model, batch=batch, threads=threads, speedup=speedup, p=test.p, verdict=word,
        sentence=_sentence(word, str(test), speedup),
    )  # fmt: skip


def _sentence(word: Word, test: str, speedup: Measurement) -> str:
    if word in ("faster", "slower"):
        if not speedup.vague:
            return test
        assert speedup.low is not None and speedup.high is not None, "vague ones have both"
        ends = (speedup.low, speedup.high) if word == "faster" else (1 / speedup.high, 1 / speedup.low)
        return f"{word}, by {ends[0]:.3g}× to {ends[1]:.3g}×"
    if speedup.low is None or speedup.high is None:
        return word
    return f"{word} ({speedup.low:.3g}–{speedup.high:.3g}×)"
