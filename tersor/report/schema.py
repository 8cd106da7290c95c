"""The schema of ``summary.json``: what run/ writes, what the report reads, and what scripts may rely on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from tersor.core.document import parse_document
from tersor.core.measurement import Measurement

VERSION = 1
Status = Literal["passed", "missed", "failed"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class Samples(_Part):
    """How many samples each split holds."""

    train: int | None = Field(default=None, ge=0, description="Training samples; null where the loader does not know")
    validation: int | None = Field(default=None, ge=0, description="Validation samples: decisions are taken on these")
    test: int | None = Field(default=None, ge=0, description="Test samples: read once, for the report")


class TaskSummary(_Part):
    """The model and data that were compressed."""

    name: str = Field(description="The task's name")
    source: str = Field(
        default="", description="File, `package.module:function` or built-in name that the task came from"
    )
    metric: str = Field(description="Name of the metric; also its key in every `measurements`")
    metric_unit: str = Field(default="fraction", description="Unit of the metric; `fraction` is shown in percent")
    higher_is_better: bool = Field(default=True, description="Whether a larger metric is a better one")
    samples: Samples = Field(default=Samples(), description="Sizes of the splits")
    notes: tuple[str, ...] = Field(
        default=(), description="What was derived for the task, and anything else said about it"
    )


class RecipeStep(_Part):
    """One step as the recipe asked for it."""

    name: str = Field(description="The step's name in this recipe")
    kind: str = Field(default="", description="Which kind of step it is")
    title: str = Field(default="", description="What the step does, for people")
    settings: Mapping[str, JsonValue] = Field(default_factory=dict, description="The step's settings")


class RecipeSummary(_Part):
    """What was to be done."""

    name: str = Field(description="Name of the recipe, or the file that it came from")
    explanation: str = Field(default="", description="What the recipe says about itself")
    steps: tuple[RecipeStep, ...] = Field(default=(), description="The steps in order")


class Budget(_Part):
    """One limit that the run had to keep."""

    name: str = Field(description="`max_drop`, `max_size` …")
    limit: float = Field(description="The limit, in `unit`")
    unit: str = Field(description="Unit of limit, value and interval")
    value: float | None = Field(default=None, description="What was measured; null where nothing was")
    low: float | None = Field(default=None, description="Lower end of the 95 % interval")
    high: float | None = Field(default=None, description="Upper end of the 95 % interval")
    met: bool | None = Field(default=None, description="Whether the limit was kept; null where that is unknown")

    @property
    def measured(self) -> Measurement | None:
        """The value with its interval; None where nothing was measured."""
        return None if self.value is None else Measurement(self.value, self.unit, self.low, self.high)

    @property
    def outcome(self) -> str:
        """How it ended, in a word or two."""
        return "not measured" if self.value is None else {True: "kept", False: "missed", None: "unknown"}[self.met]


class Verdict(_Part):
    """Whether the run did what was asked."""

    status: Status = Field(description="`passed`; `missed`: a budget was not kept; `failed`: the run did not finish")
    sentence: str = Field(description="The verdict in one sentence, for people")
    budgets: tuple[Budget, ...] = Field(default=(), description="The limits, each with what was measured")


class Skipped(_Part):
    """A place that a step passed over."""

    place: str = Field(description="Module path, tensor or activation")
    reason: str = Field(description="Why")


class StepSummary(_Part):
    """The model after one step (`baseline`: before the first)."""

    number: int = Field(ge=0, description="0 is the baseline")
    name: str = Field(description="Short name, as in the folder `steps/NN-name`")
    title: str = Field(default="", description="What the step does, for people")
    seconds: float = Field(default=0.0, ge=0, description="How long the step took")
    measurements: Mapping[str, Measurement] = Field(default_factory=dict, description="Name → measurement, see below")
    facts: Mapping[str, JsonValue] = Field(default_factory=dict, description="What the step noted, see below")
    skips: tuple[Skipped, ...] = Field(default=(), description="What was passed over and why")
    notes: tuple[str, ...] = Field(default=(), description="Anything else said about the step")

    @property
    def label(self) -> str:
        """What a table calls the step."""
        return self.title or self.name


class FinalSummary(StepSummary):
    """The model that the run ends with, and where it lies."""

    files: Mapping[str, str] = Field(
        default_factory=dict, description="`onnx` and `artifact`: paths within the run's folder"
    )


class Reproduce(_Part):
    """How to get the same numbers again."""

    command: str = Field(default="", description="The command line")
    seed: int | None = Field(default=None, description="The run's seed")
    base_sha256: str | None = Field(default=None, description="Hash of the original's weights")


class Summary(_Part):
    """`summary.json`."""

    version: Literal[1] = Field(alias="schema", description="Version of this schema")
    tersor: str = Field(description="Version of Tersor that wrote the file")
    task: TaskSummary = Field(description="The model and data that were compressed")
    recipe: RecipeSummary = Field(description="What was to be done")
    verdict: Verdict = Field(description="Whether the run did what was asked")
    baseline: StepSummary | None = Field(default=None, description="The original; null where it was never measured")
    steps: tuple[StepSummary, ...] = Field(default=(), description="The model after each finished step, in order")
    final: FinalSummary | None = Field(
        default=None, description="What the run ends with; null where it did not get there"
    )
    ratios: Mapping[str, float] = Field(
        default_factory=dict,
        description="Baseline / final, so that larger is better: `size`, `latency_batch_1`, `latency_batch_32`, "
        "`parameters`, `macs`; and `accuracy_drop_points`, where smaller is better",
    )
    ratio_intervals: Mapping[str, Measurement] = Field(
        default_factory=dict, description="The same names with 95 % intervals, where there are any"
    )
    environment: Mapping[str, str] = Field(default_factory=dict, description="Machine and versions")
    reproduce: Reproduce = Field(default=Reproduce(), description="How to get the same numbers again")
    seconds: float = Field(default=0.0, ge=0, description="How long the whole run took")

    @property
    def stages(self) -> tuple[StepSummary, ...]:
        """The baseline, where there is one, and every step."""
        return ((self.baseline,) if self.baseline else ()) + self.steps

    def to_json(self) -> dict[str, Any]:
        """The summary as plain JSON values, keys as in the file."""
        return self.model_dump(mode="json", by_alias=True)


def parse_summary(data: Mapping[str, Any], where: str = "summary.json") -> Summary:
    """Validate a summary. Raises ArtifactError that names the path within the file and what was expected there."""
    return parse_document(Summary, data, VERSION, what="the summary", where=where, page="docs/summary-schema.md")
