"""summary.json: the numbers of a run in a stable shape (docs/summary-schema.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

from tersor.core.measurement import Measurement
from tersor.core.record import Record
from tersor.core.task import Task
from tersor.run.budgets import Budgets, validation_drop

SCHEMA = 1


def summarise(
    task: Task, facts: Mapping[str, Any], records: Sequence[Record], shipped: Record, budgets: Budgets
) -> dict[str, Any]:
    """The whole summary as plain JSON values."""
    metric = task.demand_metric()
    baseline = records[0]
    intervals = _ratios(baseline, shipped)
    checked = budgets.check(shipped)
    return {
        "schema": SCHEMA,
        "tersor": facts["environment"]["tersor"],
        "task": {
            "name": task.name,
            "source": task.source,
            "metric": metric.name,
            "metric_unit": metric.unit,
            "higher_is_better": metric.higher_is_better,
            "samples": _samples(task, baseline, metric.name),
            "notes": [*task.derived, *facts["notes"]],
        },
        "recipe": facts["recipe"],
        "verdict": {
            "status": "passed" if all(line["met"] for line in checked) else "missed",
            "sentence": _sentence(task, records, shipped, intervals, budgets),
            "budgets": checked,
        },
        "baseline": _step(baseline),
        "steps": [_step(record) for record in records[1:]],
        "final": {**_step(shipped), "files": {"onnx": "model.onnx", "artifact": "model"}},
        "ratios": {name: ratio.value for name, ratio in intervals.items()},
        "ratio_intervals": {name: ratio.to_json() for name, ratio in intervals.items()},
        "environment": facts["environment"],
        "reproduce": {"command": facts["command"], "seed": facts["seed"], "base_sha256": facts["base_sha256"]},
        "seconds": round(sum(record.seconds for record in records), 1),
    }


def _samples(task: Task, baseline: Record, metric: str) -> dict[str, int | None]:
    dataset = getattr(task.train, "dataset", None)
    return {
        "train": len(dataset) if isinstance(dataset, Sized) else None,
        "validation": baseline.measurements[f"validation_{metric}"].n,
        "test": baseline.measurements[metric].n,
    }


def _step(record: Record) -> dict[str, Any]:
    skips = [skip for plan in record.plans for skip in plan["skips"]]
    return {
        "number": record.number,
        "name": record.name,
        "title": record.title,
        "seconds": record.seconds,
        "measurements": {name: found.to_json() for name, found in record.measurements.items()},
        "facts": dict(record.facts),
        "skips": skips,
        "notes": _notes(record),
    }


def _notes(record: Record) -> list[str]:
    """What a reader should be told about a step's numbers."""
    notes = []
    for batch in (1, 32):
        speedup = record.measurements.get(f"speedup_batch_{batch}")
        if speedup is not None and record.number and speedup.high is not None and speedup.high < 1.0:
            notes.append(f"slower than the original at batch {batch}: {speedup.value:.2f}× its speed")
    return notes


def _exact_ratio(baseline: Record, shipped: Record, name: str) -> Measurement:
    return Measurement(baseline.measurements[name].value / max(shipped.measurements[name].value, 1e-12), "×")


def _ratios(baseline: Record, shipped: Record) -> dict[str, Measurement]:
    return {
        "size": _exact_ratio(baseline, shipped, "size_bytes"),
        "latency_batch_1": shipped.measurements["speedup_batch_1"],
        "latency_batch_32": shipped.measurements["speedup_batch_32"],
        "parameters": _exact_ratio(baseline, shipped, "parameters"),
        "macs": _exact_ratio(baseline, shipped, "macs"),
        "accuracy_drop_points": shipped.measurements["drop_points"],
    }


def _sentence(
    task: Task,
    records: Sequence[Record],
    shipped: Record,
    ratios: Mapping[str, Measurement],
    budgets: Budgets,
) -> str:
    metric = task.demand_metric()
    checked = budgets.check(shipped)
    measured = shipped.measurements[metric.name]
    drop = ratios["accuracy_drop_points"]
    percent = metric.unit == "fraction"
    value = f"{100 * measured.value:.1f} %" if percent else f"{measured.value:.4g}"
    fell = (drop.value > 0) == metric.higher_is_better
    change = f"{abs(drop.value):.2f} {'points' if percent else drop.unit} {'lower' if fell else 'higher'}"
    change += f" than the original's{_around(drop)}"
    if abs(drop.value) < 5e-3:
        change = "equal to the original's"
    parts = [
        f"{ratios['size'].value:.1f}× smaller",
        *(_speed(ratios[f"latency_batch_{batch}"], batch) for batch in (1, 32)),
        f"{metric.name.replace('_', ' ')} {value}, {change}",
    ]
    sentence = "; ".join(parts) + "."
    if not checked:
        sentence += " No budget was set."
    missed = [line for line in checked if not line["met"]]
    if missed:
        told = ", ".join(f"{m['name']} is {m['value']:.4g} {m['unit']}, allowed {m['limit']:.4g}" for m in missed)
        sentence += f" Budget missed: {told}."
    if budgets.max_drop is not None and validation_drop(records[0], shipped, metric) > budgets.max_drop:
        sentence += f" No step keeps max_drop on validation; {shipped.name!r} lost least there."
    elif shipped.number != records[-1].number:
        sentence += f" The step {records[-1].name!r} does not keep the budgets; {shipped.name!r} is shipped instead."
    return sentence


def _around(drop: Measurement) -> str:
    """The interval of a change, counted in the direction in which it went; empty without one."""
    if drop.low is None or drop.high is None:
        return ""
    low, high = (drop.low, drop.high) if drop.value > 0 else (-drop.high, -drop.low)
    return f" ({low:.2f} to {high:.2f})".replace("-", "−")


def _speed(ratio: Measurement, batch: int) -> str:
    if ratio.low is not None and ratio.high is not None and ratio.low <= 1.0 <= ratio.high:
        return f"no faster at batch {batch} (no difference shown)"
    word = "faster" if ratio.value >= 1 else "slower"
    ends = (ratio.value, ratio.low or ratio.value, ratio.high or ratio.value)
    if ratio.vague:
        return f"{ends[1]:.1f}× to {ends[2]:.1f}× the speed at batch {batch} (the machine was too noisy to say closer)"
    factor, low, high = ends if ratio.value >= 1 else (1 / ends[0], 1 / ends[2], 1 / ends[1])
    digits = 1 if factor >= 1.1 else 2  # "1.0× slower" would say nothing
    return f"{factor:.{digits}f}× {word} at batch {batch} ({low:.{digits}f}–{high:.{digits}f})"
