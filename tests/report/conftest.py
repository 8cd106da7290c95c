"""A run on digits as run/ writes it: four steps, int8 at the end."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest

from tersor.core.measurement import Measurement
from tersor.core.record import Record
from tersor.measure.behaviour import schema as parts
from tersor.measure.behaviour.schema import Evaluation
from tersor.measure.benchmark_schema import Benchmark, BenchmarkModel, Comparison, Outliers, Timing
from tersor.report.html import render

INTEGERS = {
    "operators": {"QLinearConv": 8, "Conv": 1, "QGemm": 1, "QuantizeLinear": 1},
    "integer_share": {"integer": 9, "total": 10, "share": 0.9, "float_layers": ["stem"]},
    "top1_agreement": 0.997, "low": 0.98, "high": 0.999, "n": 287, "relative_error": 0.031,
}  # fmt: skip
BLOCKS = [("stem", 1, 64)] + [
    (f"blocks.{n}.conv{m}", 64 if n < 3 else 128, 64 if n < 2 else 128) for n in range(4) for m in (1, 2)
]


def layer_table(keep: float) -> tuple[dict[str, Any], ...]:
    """The layers of a small residual network of which ``keep`` of the channels are left."""
    layers: list[dict[str, Any]] = []
    for path, inputs, outputs in BLOCKS:
        width_in = inputs if inputs == 1 else int(inputs * keep)
        width = int(outputs * keep)
        weights = width * width_in * 9
        layers.append(
            {
                "path": path,
                "type": "Conv2d",
                "shape": [width, width_in, 3, 3],
                "parameters": weights,
                "nonzeros": weights,
                "macs": weights * 64,
            }
        )
    weights = 10 * int(128 * keep) + 10
    layers.append(
        {
            "path": "head",
            "type": "Linear",
            "shape": [10, int(128 * keep)],
            "parameters": weights,
            "nonzeros": weights,
            "macs": weights - 10,
        }
    )
    return tuple(layers)


def stage(
    accuracy: float, size: float, keep: float, b1: float, b32: float, speed: tuple[float, float]
) -> dict[str, Measurement]:
    """What is measured after one step."""
    table = layer_table(keep)
    weights, macs = sum(layer["parameters"] for layer in table), sum(layer["macs"] for layer in table)
    how = {"split": "test", "runtime": "onnxruntime"}
    timing = {"batch": 1, "threads": 2, "runtime": "onnxruntime"}
    found = {
        "accuracy": Measurement(accuracy, "fraction", accuracy - 0.012, min(1.0, accuracy + 0.008), 360, "cpu", how),
        "validation_accuracy": Measurement(accuracy + 0.004, "fraction", accuracy - 0.008, accuracy + 0.009, 287),
        "size_bytes": Measurement(size, "bytes"),
        "parameters": Measurement(weights, "parameters"),
        "nonzeros": Measurement(weights * 0.999, "parameters"),
        "macs": Measurement(macs, "MACs"),
        "peak_memory_bytes": Measurement(61e6 + size * 3, "bytes"),
        "agreement": Measurement(accuracy + 0.003, "fraction", accuracy - 0.01, min(1.0, accuracy + 0.01), 360),
        "drop_points": Measurement(
            100 * (0.989 - accuracy),
            "percentage points",
            100 * (0.989 - accuracy) - 0.9,
            100 * (0.989 - accuracy) + 0.9,
            360,
        ),
    }
    for batch, value, ratio in ((1, b1, speed[0]), (32, b32, speed[1])):
        timing = {**timing, "batch": batch}
        found[f"latency_ms_batch_{batch}"] = Measurement(value, "ms", value * 0.96, value * 1.06, 400, "cpu", timing)
        found[f"latency_ms_batch_{batch}_p95"] = Measurement(value * 1.3, "ms", None, None, 400)
        found[f"throughput_batch_{batch}"] = Measurement(1000 * batch / value, "samples/s", None, None, 400)
        found[f"speedup_batch_{batch}"] = Measurement(ratio, "×", ratio * 0.94, ratio * 1.06, 400)
    return found


def history(epochs: int, start: float, accuracy: float) -> tuple[dict[str, Any], ...]:
    """A training that went well."""
    return tuple(
        {"epoch": n, "loss": start * 0.72**n + 0.02, "validation": accuracy - 0.1 * 0.6**n, "lr": 1e-3, "seconds": 1.4}
        for n in range(1, epochs + 1)
    )


def build_records() -> list[Record]:
    """The records of the run, the baseline first."""
    skips = [
        {"place": f"blocks.{n}.add", "reason": "its channels are tied to the network's input by the residual addition"}
        for n in range(3)
    ]
    skips += [{"place": "head.bias", "reason": "the model's output keeps its 10 classes"}]
    prune = {
        "method": "PruneChannels",
        "edits": {"Slice": 7, "Attribute": 14},
        "lines": [["blocks.0.conv1", "64 → 32 channels"]],
        "skips": skips,
    }
    linear = [
        {"place": f"blocks.{n}.relu{m}", "reason": "its input is quantised already"} for n in range(4) for m in (1, 2)
    ]
    quantise = {
        "method": "Quantize",
        "edits": {"Quantizer": 38},
        "lines": [["stem", "int8 per channel"]],
        "skips": linear,
    }
    floats = {
        "onnx": {
            "operators": {"Conv": 9, "Gemm": 1, "Relu": 9},
            "relative_difference": 2.1e-6,
            "tolerance": 1e-4,
            "n": 287,
        }
    }
    integers = {"onnx": {**INTEGERS}}
    settings = {"sparsity": 0.5, "score": "taylor"}

    def record(
        number: int, name: str, title: str, found: dict[str, Measurement], seconds: float, **more: Any
    ) -> Record:
        return Record(
            number, name, title, settings if number else {}, found, 7 + number, seconds, **{"facts": floats, **more}
        )

    return [
        record(0, "baseline", "The original model", stage(0.989, 2_094_312, 1.0, 0.412, 5.31, (1.0, 1.0)), 9.1,
               layers=layer_table(1.0)),
        record(1, "prune", "Remove half of the channels", stage(0.944, 536_220, 0.5, 0.221, 2.05, (1.86, 2.59)), 14.2,
               plans=(prune,), facts={"verified": 3.1e-7, **floats}, layers=layer_table(0.5)),
        record(2, "recover", "Train what is left", stage(0.983, 536_220, 0.5, 0.220, 2.06, (1.87, 2.58)), 41.0,
               history=history(8, 0.9, 0.985), layers=layer_table(0.5)),
        record(3, "distill", "Learn from the original", stage(0.986, 536_220, 0.5, 0.222, 2.04, (1.86, 2.60)), 55.9,
               history=history(12, 2.1, 0.988), layers=layer_table(0.5)),
        record(4, "int8", "Train in eight bits", stage(0.986, 148_113, 0.5, 0.231, 1.12, (1.78, 4.74)), 38.3,
               plans=(quantise,), history=history(3, 0.4, 0.988), facts=integers, layers=layer_table(0.5)),
    ]  # fmt: skip


def build_step(record: Record) -> dict[str, Any]:
    """A record as it stands in the summary."""
    return {
        "number": record.number, "name": record.name, "title": record.title, "seconds": record.seconds,
        "measurements": {name: found.to_json() for name, found in record.measurements.items()},
        "facts": dict(record.facts), "skips": [skip for plan in record.plans for skip in plan["skips"]], "notes": [],
    }  # fmt: skip


def build_summary(records: list[Record]) -> dict[str, Any]:
    """The run's summary.json."""
    first, last = records[0].measurements, records[-1].measurements
    exact = {
        name: Measurement(first[source].value / last[source].value, "×")
        for name, source in (("size", "size_bytes"), ("parameters", "parameters"), ("macs", "macs"))
    }
    ratios = {
        "size": exact["size"], "latency_batch_1": last["speedup_batch_1"], "latency_batch_32": last["speedup_batch_32"],
        "parameters": exact["parameters"], "macs": exact["macs"], "accuracy_drop_points": last["drop_points"],
    }  # fmt: skip
    drop = last["drop_points"]
    budget = {
        "name": "max_drop",
        "limit": 1.0,
        "unit": "points",
        "value": drop.value,
        "low": drop.low,
        "high": drop.high,
        "met": True,
    }
    return {
        "schema": 1,
        "tersor": "0.1.0",
        "task": {
            "name": "digits", "source": "digits", "metric": "accuracy", "metric_unit": "fraction",
            "higher_is_better": True, "samples": {"train": 1150, "validation": 287, "test": 360},
            "notes": ["calibration batches are taken from train"],
        },
        "recipe": {
            "name": "balanced",
            "explanation": "Channels are removed and the rest trained, the original teaches, then int8 with training.",
            "steps": [{"name": r.name, "kind": r.name, "settings": dict(r.settings)} for r in records[1:]],
        },
        "verdict": {
            "status": "passed",
            "sentence": "14.1× smaller; 1.8× faster at batch 1; 4.7× faster at batch 32; accuracy 98.6 %, "
            "0.30 points lower than the original's.",
            "budgets": [budget],
        },
        "baseline": build_step(records[0]),
        "steps": [build_step(record) for record in records[1:]],
        "final": {**build_step(records[-1]), "files": {"onnx": "model.onnx", "artifact": "model"}},
        "ratios": {name: ratio.value for name, ratio in ratios.items()},
        "ratio_intervals": {name: ratio.to_json() for name, ratio in ratios.items()},
        "environment": {
            "python": "3.12.4", "platform": "Linux-6.1-x86_64", "cpu": "Intel(R) Xeon(R) (avx512_vnni, amx_int8)",
            "cores": "2", "threads": "2", "torch": "2.13.0", "onnxruntime": "1.31.0", "tersor": "0.1.0", "git": "",
        },
        "reproduce": {
            "command": "tersor compress digits -o runs/demo --recipe balanced", "seed": 0,
            "base_sha256": "9f86d081884c7d65" * 4,
        },
        "seconds": 158.5,
    }  # fmt: skip


def _share(value, low, high, unit="fraction", n=400):
    return Measurement(value, unit, low, high, n)


def _points(value, low, high, n=400):
    return _share(value, low, high, "percentage points", n)


def _model_calibration(ece):
    bins = parts.Bins(
        low=(0.4, 0.9), high=(0.5, 1.0), count=(100, 300), confidence=(0.45, 0.97), accuracy=(0.5, 0.9),
        accuracy_low=(0.4, 0.86), accuracy_high=(0.6, 0.93),
    )  # fmt: skip
    names = ("ece", "ece_debiased", "brier", "nll", "confidence")
    measured = {name: _share(ece, ece - 0.01, ece + 0.01, "probability") for name in names}
    return parts.ModelCalibration(
        measurements=measured, bins=bins, temperature=1.5, fitted_on="100 validation samples", scaled=measured,
        scaled_bins=bins,
    )  # fmt: skip


def _condition(name, severity, against=""):
    return parts.Condition(
        name=name, severity=severity, against=against, original=_share(0.9 - severity / 20, 0.6, 0.95),
        compressed=_share(0.8 - severity / 10, 0.5, 0.9), drop=_points(10 + severity, 5, 20),
        agreement=_share(0.8, 0.7, 0.9),
    )  # fmt: skip


def _group(name, excess):
    rates = {each: _share(0.5, 0.4, 0.6) for each in ("metric", "selection", "true_positive", "false_positive")}
    return parts.Group(
        name=name, n=200, original=rates, compressed=rates, drop=_points(2, 1, 3),
        excess=_points(excess, excess - 1, excess + 1), p=0.01, p_adjusted=0.02,
    )  # fmt: skip


def build_evaluation(name="cat", **changes):
    """An evaluation with every part in it; ``name``: of classes, groups and models."""
    shown = parts.Shown(kind="picture", shape=(2, 2, 3), pixels=base64.b64encode(bytes(range(12))).decode())
    says = parts.Answer(predicted=1, confidence=0.93, likelihood=0.04)
    right = parts.Answer(predicted=0, confidence=0.81, likelihood=0.81)
    flip = parts.Flip(sample=17, severity=0.77, actual=0, original=right, compressed=says, input=shown)
    drop = _points(1.5, 0.5, 2.5)
    checks = (
        parts.Check(name="max_drop", limit=1.0, measured=drop, status="not enough data", sentence="…"),
        parts.Check(name="min_agreement", limit=0.97, measured=_share(0.93, 0.91, 0.95), status="failed", sentence="…"),
    )
    classes = tuple(
        parts.ClassQuality(
            index=at, name=each, n=200, original=_share(0.9, 0.8, 0.95), compressed=_share(0.8, 0.7, 0.9),
            drop=_points(10 * at, 10 * at - 5, 10 * at + 5), p=0.5, p_adjusted=0.01 if at else 1.0,
        )
        for at, each in enumerate((name, "dog", "cow"))
    )  # fmt: skip
    table = ((90, 5, 5), (5, 90, 5), (5, 5, 90))
    moved = ((80, 15, 5), (5, 90, 5), (5, 5, 90))
    whole = parts.Evaluation(
        tersor="0.1.0",
        data=parts.DataFacts(
            name="animals", kind="classes", samples=400, rows=400, labelled=True, metric="accuracy",
            metric_unit="fraction", classes=3, class_names=(name, "dog", "cow"),
        ),
        original=parts.ModelFacts(name=f"big {name}", source="big.onnx", backend="ONNX Runtime"),
        compressed=parts.ModelFacts(name="small", source="small.onnx", backend="ONNX Runtime"),
        gate=parts.Gate(status="failed", sentence="failed: …", checks=checks),
        quality=parts.Quality(
            original=_share(0.9, 0.87, 0.93), compressed=_share(0.885, 0.85, 0.91), drop=drop,
            mcnemar=parts.McNemar(turned_wrong=13, turned_right=7, p=0.26, p_mid=0.19), per_class=classes,
            confusion={"original": table, "compressed": moved},
            shifts=(parts.Shift(actual=0, predicted=1, original=5, compressed=15),),
        ),
        agreement={"top_1": _share(0.93, 0.91, 0.95), "divergence": _share(0.03, 0.02, 0.04, "nats")},
        flips=parts.Flips(
            measurements={
                each: _share(value, 0, 1)
                for each, value in {
                    "both_right": 0.86, "turned_wrong": 0.0325, "turned_right": 0.0175, "both_wrong": 0.09
                }.items()
            },
            worst=(flip,),
        ),
        calibration=parts.Calibration(
            original=_model_calibration(0.02), compressed=_model_calibration(0.05),
            ece_increase=_share(0.03, 0.01, 0.05, "probability"),
        ),
        robustness=parts.Robustness(
            samples=100, scale="pixels in [0, 1]", clean=_condition("clean", 0),
            corruptions=tuple(_condition(kind, severity) for kind in ("blur", name) for severity in (1, 5)),
            mean=_condition("mean", 0), attacks=(_condition("pgd", 8 / 255, f"big {name}"),),
        ),
        fairness=(
            parts.Attribute(name="sex", missing=3, groups=(_group(name, 3.0), _group("m", -3.0)),
                            original={"accuracy_gap": _share(0.1, 0.05, 0.15)},
                            compressed={"accuracy_gap": _share(0.2, 0.15, 0.25)}),
        ),
        outside={"original_auroc": _share(0.9, 0.8, 1.0, "AUROC"), "auroc_drop": _share(0.1, 0.05, 0.15, "AUROC")},
        skipped=(parts.Skipped(what="attacks on small", why="an ONNX file gives no gradients"),),
        notes=("12 samples are few",),
    )  # fmt: skip
    return whole.model_copy(update=changes)


@pytest.fixture(scope="session")
def evaluation() -> Callable[..., Evaluation]:
    """Makes an evaluation with every part in it: of the name of its classes, groups and models, and what changes."""
    return build_evaluation


def build_benchmark(energy: float | None = None) -> Benchmark:
    """Two models at two batch sizes: a clear difference at 1, noise at 32."""

    def timing(model: str, batch: int, value: float) -> Timing:
        times = {"p50_ms": 1.0, "mean_ms": 1.2, "p95_ms": 1.5, "p99_ms": 2.0}
        return Timing(
            model=model, batch=batch, threads=1, throughput=Measurement(1000 * batch / value, "samples/s"),
            energy=None if energy is None else Measurement(energy, "J"),
            outliers=Outliers(count=10, share=0.1, slowest_ms=(90.0, 80.0)), steady=1.0, sittings_ms=(value,) * 5,
            percentiles_ms=tuple(value * (0.8 + at / 100) for at in range(101)),
            **{n: Measurement(value * by, "ms", 0.9 * value * by, 1.1 * value * by, 100) for n, by in times.items()},
        )  # fmt: skip

    def comparison(batch: int, speed: Measurement, verdict: str, sentence: str) -> Comparison:
        return Comparison(
            base="big", model="small", batch=batch, threads=1, speedup=speed, p=0.01, verdict=verdict, sentence=sentence
        )

    return Benchmark(
        tersor="0.1.0", inputs="samples of animals",
        models=tuple(
            BenchmarkModel(
                name=name, backend="ONNX Runtime", precision="as stored", size_bytes=Measurement(size, "bytes")
            )
            for name, size in (("big", 4e6), ("small", 1e6))
        ),
        timings=tuple(timing(m, b, v * b) for m, v in (("big", 8.0), ("small", 4.0)) for b in (1, 32)),
        comparisons=(
            comparison(1, Measurement(2.0, "×", 1.8, 2.2), "faster", "faster by 2.0× (1.8–2.2)"),
            comparison(32, Measurement(2.0, "×", 0.8, 4.0), "too noisy to tell", "too noisy to tell"),
        ),
        notes=("the machine is noisy",),
    )  # fmt: skip


@pytest.fixture(scope="session")
def benchmark_numbers() -> Callable[..., Benchmark]:
    """Makes a benchmark; ``energy``: Joules a sample, where they were measured."""
    return build_benchmark


@pytest.fixture
def fits_numbers() -> dict[str, Any]:
    """What fits.json says of a model that does not fit on one device."""

    def layer(path: str, intensity: float, bound: str, share: float) -> dict[str, Any]:
        return {
            "path": path, "operator": "Conv", "macs": 1e6, "intensity": intensity, "ridge": 20.0, "bound": bound,
            "ms": 3 * share, "share": share, "advice": "fewer channels",
        }  # fmt: skip

    row = {
        "numbers": "as it is", "weights": Measurement(4e6, "bytes").to_json(), "fits": False, "memory_bound": 0.25,
        "activations": Measurement(1e6, "bytes").to_json(), "latency": Measurement(3.0, "ms").to_json(),
        "reason": "2.0× its memory",
    }  # fmt: skip
    device = {
        "profile": "chip", "title": "Small chip (one core)", "fits": [row], "cautions": ["clocks fall"], "notes": [],
        "ways": [{"numbers": "int8", "keep_channels": 0.5, "weight_sparsity": 0.75}],
        "layers": [layer("fc", 2.0, "memory", 0.25), layer("conv", 100.0, "compute", 0.75)],
    }  # fmt: skip
    speed = Measurement(1e9, "bytes/s").to_json()
    roof = {
        "peaks": {"fp32": Measurement(2e10, "operations/s").to_json()},
        "bandwidths": [{"working_set_bytes": None, **speed}],
    }
    return {
        "schema": 1, "tersor": "0.1.0", "model": "net", "batch": 1, "devices": [device], "rooflines": {"chip": roof},
        "totals": {"macs": Measurement(2e6, "MACs").to_json()},
    }  # fmt: skip


@pytest.fixture
def records() -> list[Record]:
    """The records of a finished run."""
    return build_records()


@pytest.fixture
def summary(records: list[Record]) -> dict[str, Any]:
    """The summary of a finished run."""
    return build_summary(records)


@pytest.fixture(scope="session")
def report() -> str:
    """The report of the finished run, rendered once for every test that only reads it."""
    records = build_records()
    return render(build_summary(records), records)
