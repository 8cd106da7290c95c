"""Measurements of rows, whose intervals know that the positions of one sample hang together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.core.measurement import Measurement
from tersor.measure.behaviour.collect import Collected
from tersor.measure.quality import MEAN
from tersor.tensor.statistics import Estimate, bootstrap_interval, is_binary, mean_interval, wilson

Floats = NDArray[np.float64]


def mean_of(values: NDArray[Any], found: Collected, unit: str = "fraction", **conditions: Any) -> Measurement:
    """The mean of values [rows]: Wilson's interval of zeros and ones, else ``mean_interval``; of tokens by sample.

    Positions that are all alike bound as much as their samples do. One row that is no 0 or 1 bounds nothing.
    """
    values = np.asarray(values, np.float64)
    binary = is_binary(values)
    if found.kind == "tokens" and not (binary and np.ptp(values) == 0):
        return by_sample(values, found, unit, **conditions)
    rows = len(np.unique(found.sample)) if found.kind == "tokens" else len(values)
    if binary:
        ends, how = wilson(int(values.mean() * rows), rows), "Wilson"
    elif rows > 1:
        ends, how = mean_interval(values), MEAN
    else:
        ends, how = (-np.inf, np.inf), "none: one sample"
    return Measurement.of((float(values.mean()), *ends), unit, len(values), interval=how, **conditions)


def by_sample(
    values: Floats,
    found: Collected,
    unit: str,
    transform: Callable[[Any], Any] = lambda mean: mean,
    **conditions: Any,
) -> Measurement:
    """``transform`` of the mean of values [rows], by the bootstrap of whole samples (positions hang together)."""
    totals = np.bincount(found.sample, values, minlength=found.n)
    counts = np.bincount(found.sample, minlength=found.n).astype(np.float64)
    totals, counts = totals[counts > 0], counts[counts > 0]
    return resampled(
        lambda at: transform(totals[at].sum(axis=-1) / counts[at].sum(axis=-1)), len(totals), unit, len(values),
        interval="bootstrap of samples", **conditions,
    )  # fmt: skip


def resampled(
    statistic: Callable[[NDArray[np.int64]], Any], samples: int, unit: str, n: int | None = None, **conditions: Any
) -> Measurement:
    """A statistic of sample numbers [..., samples] → [...], with its bootstrap interval over samples.

    One sample, or samples that all give the same, bound nothing.
    """
    value = float(statistic(np.arange(samples)))
    ends = (-np.inf, np.inf)
    if samples > 1:

        def of(numbers: Any, axis: int = -1) -> Any:
            return statistic(np.moveaxis(numbers, axis, -1).astype(np.int64))

        ends = bootstrap_interval(np.arange(samples), of)
        ends = (-np.inf, np.inf) if ends[0] == ends[1] else ends
    conditions.setdefault("interval", "bootstrap")
    return Measurement.of(Estimate(value, *ends), unit, samples if n is None else n, **conditions)
