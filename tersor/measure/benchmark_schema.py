"""The schema of ``benchmark.json``: what a benchmark says, and what scripts and reports may rely on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, JsonValue

from tersor.core.document import parse_document
from tersor.core.measurement import Measurement
from tersor.measure.behaviour.schema import Section, Skipped

VERSION = 1
Word = Literal["faster", "slower", "no difference shown", "too noisy to tell"]


class BenchmarkModel(Section):
    """A model as it was run, and what does not hang on batch size and threads."""

    name: str = Field(description="What tables call it")
    source: str = Field(default="", description="File, folder or function")
    backend: str = Field(description="What ran it: PyTorch eager or compiled, ONNX Runtime with its providers")
    precision: str = Field(description="`as stored`, or `bfloat16`")
    device: str = Field(default="cpu", description="What it ran on")
    size_bytes: Measurement | None = Field(default=None, description="Bytes on disk; in memory where it has no file")
    load_ms: Measurement | None = Field(
        default=None, description="From the name to a model that can run, in fresh processes; null where not measured"
    )
    first_call_ms: Measurement | None = Field(default=None, description="The first call, with whatever it compiles")
    peak_memory_bytes: Measurement | None = Field(
        default=None, description="What opening and running it adds to a fresh process, at the peak"
    )
    device_memory_bytes: Measurement | None = Field(
        default=None, description="Peak of the CUDA allocator; null on the CPU"
    )


class Outliers(Section):
    """Calls far slower than those of the same sitting (beyond the third quartile by thrice the quartiles' distance).

    They are counted in every other number too.
    """

    count: int = Field(ge=0, description="How many calls")
    share: float = Field(ge=0, le=1, description="Of all timed calls")
    slowest_ms: tuple[float, ...] = Field(default=(), description="The slowest of them, at most 20")


class Timing(Section):
    """One model at one batch size and number of threads."""

    model: str = Field(description="The model's name")
    batch: int = Field(ge=1, description="Samples in a call")
    threads: int = Field(ge=1, description="Threads within an operator")
    mean_ms: Measurement = Field(description="Mean time of a call")
    p50_ms: Measurement = Field(description="Median time of a call")
    p95_ms: Measurement = Field(description="95 % of the calls are faster")
    p99_ms: Measurement = Field(description="99 % of the calls are faster")
    throughput: Measurement | None = Field(
        default=None, description="Samples a second, calls one after another for a set time; null where not asked for"
    )
    energy: Measurement | None = Field(default=None, description="Joules a sample; null where no meter can be read")
    outliers: Outliers = Field(description="Calls that took unusually long")
    steady: float = Field(ge=0, le=1, description="Share of sittings whose warm-up ended because calls were alike")
    sittings_ms: tuple[float, ...] = Field(description="Median call of each sitting, in the order they were taken")
    percentiles_ms: tuple[float, ...] = Field(description="Percentiles 0 to 100 of all calls: the distribution")
    outputs: tuple[tuple[int, ...], ...] = Field(default=(), description="Shapes of the outputs")


class Comparison(Section):
    """Two models at one batch size and number of threads."""

    base: str = Field(description="The model that the other is compared with")
    model: str = Field(description="The other")
    batch: int = Field(ge=1, description="Samples in a call")
    threads: int = Field(ge=1, description="Threads within an operator")
    speedup: Measurement = Field(description="Time of `base` / time of `model`, paired by sitting; above 1 is faster")
    p: float = Field(ge=0, le=1, description="Of no difference, by the sign test over sittings")
    verdict: Word = Field(description="Of `model`")
    sentence: str = Field(description="The verdict with its numbers")


class Benchmark(Section):
    """`benchmark.json`."""

    version: Literal[1] = Field(default=1, alias="schema", description="Version of this schema")
    tersor: str = Field(description="Version of Tersor that wrote the file")
    inputs: str = Field(description="What the models were given")
    models: tuple[BenchmarkModel, ...] = Field(description="The models; the first is the one to compare with")
    timings: tuple[Timing, ...] = Field(description="Each model at each batch size and number of threads")
    comparisons: tuple[Comparison, ...] = Field(default=(), description="Each pair of models, likewise")
    skipped: tuple[Skipped, ...] = Field(default=(), description="What was not measured, and why")
    notes: tuple[str, ...] = Field(default=(), description="What else a reader should know")
    settings: Mapping[str, JsonValue] = Field(default_factory=dict, description="What was asked for")
    environment: Mapping[str, str] = Field(default_factory=dict, description="Machine and versions")
    seconds: float = Field(default=0.0, ge=0, description="How long it took")

    def to_json(self) -> dict[str, Any]:
        """The benchmark as plain JSON values, keys as in the file."""
        return self.model_dump(mode="json", by_alias=True)

    def timing(self, model: str, batch: int, threads: int | None = None) -> Timing:
        """The timing of a model (``threads`` None: the first that was measured). Raises KeyError."""
        for each in self.timings:
            if each.model == model and each.batch == batch and threads in (None, each.threads):
                return each
        raise KeyError(f"{model}, batch {batch}, threads {threads}")


def parse_benchmark(data: Mapping[str, Any], where: str = "benchmark.json") -> Benchmark:
    """Validate a benchmark. Raises ArtifactError that names the path within the file and what was expected there."""
    return parse_document(Benchmark, data, VERSION, what="the benchmark", where=where, page="docs/benchmark.md")
