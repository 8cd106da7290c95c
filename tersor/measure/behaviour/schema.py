"""The schema of ``evaluation.json``: what a comparison of two models says, and what scripts and reports may rely on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from tersor.core.document import parse_document
from tersor.core.measurement import Measurement

VERSION = 1
Status = Literal["passed", "failed", "not enough data"]


class Section(BaseModel):
    """A part of an evaluation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class DataFacts(Section):
    """What the two were compared on."""

    name: str = Field(description="The task's name")
    source: str = Field(default="", description="Where it came from")
    kind: Literal["classes", "tokens", "numbers"] = Field(
        description="Class scores of samples, class scores of positions (tokens), or numbers"
    )
    samples: int = Field(ge=1, description="Test samples")
    rows: int = Field(ge=0, description="Predictions that were compared: samples, or positions that have a target")
    labelled: bool = Field(description="Whether there are targets")
    metric: str | None = Field(default=None, description="The task's metric; null without targets")
    metric_unit: str | None = Field(default=None, description="`fraction` is shown in percent")
    higher_is_better: bool = Field(default=True, description="Whether a larger metric is a better one")
    classes: int = Field(default=0, ge=0, description="How many classes; 0 for numbers")
    class_names: tuple[str, ...] = Field(default=(), description="Their names, where they are known")


class ModelFacts(Section):
    """One of the two models."""

    name: str = Field(description="What tables call it")
    source: str = Field(default="", description="File, folder or function")
    backend: str = Field(description="What ran it")


class Check(Section):
    """One limit of the gate."""

    name: str = Field(description="`max_drop`, `min_agreement`, `max_ece_increase` or `max_group_gap`")
    limit: float = Field(description="The limit, in the measurement's unit")
    measured: Measurement = Field(description="What is compared with it")
    status: Status = Field(description="By the interval: all of it keeps the limit, all of it breaks it, or neither")
    sentence: str = Field(description="The same for people, with what would settle it")


class Gate(Section):
    """Whether the compressed model may take the original's place."""

    status: Status | Literal["nothing asked"] = Field(
        description="`failed` where one check failed, else `not enough data` where one cannot be told"
    )
    sentence: str = Field(description="The verdict for people")
    application: str | None = Field(default=None, description="The preset that was asked for")
    explanation: str = Field(default="", description="Why that preset has its limit")
    checks: tuple[Check, ...] = Field(default=(), description="The limits, each with what was measured")


class McNemar(Section):
    """Whether as many samples turned wrong as turned right; null for metrics that are not right or wrong."""

    turned_wrong: int = Field(ge=0, description="Right with the original, wrong with the compressed model")
    turned_right: int = Field(ge=0, description="The other way round")
    p: float = Field(description="Exact, two-sided")
    p_mid: float = Field(description="Mid-p, which is less conservative")


class ClassQuality(Section):
    """One class: its recall before and after."""

    index: int = Field(ge=0, description="The class")
    name: str = Field(description="Its name, or its index")
    n: int = Field(ge=1, description="Samples of this class")
    original: Measurement = Field(description="Recall of the original")
    compressed: Measurement = Field(description="Recall of the compressed model")
    drop: Measurement = Field(description="Paired difference in points; positive is worse")
    p: float = Field(description="McNemar's mid-p of this class")
    p_adjusted: float = Field(description="After Holm's correction for the number of classes")


class Shift(Section):
    """One cell of the confusion matrices that changed."""

    actual: int = Field(ge=0, description="The class that it is")
    predicted: int = Field(ge=0, description="The class that was said")
    original: int = Field(ge=0, description="How often the original says so")
    compressed: int = Field(ge=0, description="How often the compressed model does")


class Quality(Section):
    """The task's metric of both models on the same samples."""

    original: Measurement = Field(description="The original's metric")
    compressed: Measurement = Field(description="The compressed model's")
    drop: Measurement = Field(description="Paired difference, positive is worse; in points for fractions")
    mcnemar: McNemar | None = Field(default=None, description="Where each sample is right or wrong")
    more: Mapping[str, Measurement] = Field(
        default_factory=dict, description="`original_perplexity`, `original_rmse` … and the same of `compressed`"
    )
    per_class: tuple[ClassQuality, ...] = Field(default=(), description="The classes that occur")
    confusion: Mapping[str, tuple[tuple[int, ...], ...]] = Field(
        default_factory=dict, description="`original`, `compressed`: counts [actual][predicted], up to 100 classes"
    )
    shifts: tuple[Shift, ...] = Field(default=(), description="The cells that changed most, largest change first")


class Shown(Section):
    """An input, so that it can be drawn: a picture's bytes, or numbers."""

    kind: Literal["picture", "tokens", "numbers"] = Field(description="What it is")
    shape: tuple[int, ...] = Field(description="Of `pixels` [height, width, channels], or of the whole input")
    pixels: str | None = Field(default=None, description="uint8 in base64, row by row")
    numbers: tuple[float, ...] = Field(default=(), description="The first 64 of tokens or numbers")


class Answer(Section):
    """What a model said of one sample."""

    predicted: int = Field(ge=0, description="The class")
    confidence: float = Field(description="Its probability")
    likelihood: float | None = Field(default=None, description="The probability of the actual class")


class Flip(Section):
    """A sample on which the models part."""

    sample: int = Field(ge=0, description="Its number in the test data, from 0")
    severity: float = Field(description="How much worse: see docs/evaluate.md")
    actual: int | None = Field(default=None, description="The class that it is")
    original: Answer | None = Field(default=None, description="What the original says; null for tokens and numbers")
    compressed: Answer | None = Field(default=None, description="What the compressed model says")
    input: Shown | None = Field(default=None, description="The input")


class Flips(Section):
    """Which answers changed."""

    measurements: Mapping[str, Measurement] = Field(
        default_factory=dict,
        description="`turned_wrong`, `turned_right`, `both_right`, `both_wrong`, `changed`: fractions of the rows",
    )
    worst: tuple[Flip, ...] = Field(default=(), description="The worst first")


class Bins(Section):
    """A reliability diagram; one entry for each bin that has samples."""

    low: tuple[float, ...] = Field(description="Lower edges")
    high: tuple[float, ...] = Field(description="Upper edges")
    count: tuple[int, ...] = Field(description="Samples in the bin")
    confidence: tuple[float, ...] = Field(description="Mean confidence")
    accuracy: tuple[float, ...] = Field(description="Fraction that is right")
    accuracy_low: tuple[float, ...] = Field(description="Lower end of its 95 % interval")
    accuracy_high: tuple[float, ...] = Field(description="Upper end of its 95 % interval")


class ModelCalibration(Section):
    """How far one model's confidence can be believed."""

    measurements: Mapping[str, Measurement] = Field(
        description="`ece`, `ece_equal_mass`, `ece_debiased`, `mce`, `brier`, `nll`, `confidence`"
    )
    bins: Bins = Field(description="Reliability diagram, bins of equal width")
    temperature: float | None = Field(default=None, description="By which the logits are divided; null: not fitted")
    fitted_on: str = Field(default="", description="What the temperature was fitted on")
    scaled: Mapping[str, Measurement] = Field(
        default_factory=dict, description="The same measurements after temperature scaling"
    )
    scaled_bins: Bins | None = Field(default=None, description="The diagram after temperature scaling")


class Calibration(Section):
    """Both models' calibration."""

    original: ModelCalibration = Field(description="The original's")
    compressed: ModelCalibration = Field(description="The compressed model's")
    ece_increase: Measurement = Field(description="ECE of the compressed model minus the original's, on the same rows")


class Condition(Section):
    """Both models on changed inputs."""

    name: str = Field(description="The corruption or the attack")
    severity: float = Field(description="1 to 5; of an attack its budget in pixels of [0, 1]")
    against: str = Field(default="", description="Of an attack: whose gradients made the inputs")
    original: Measurement | None = Field(default=None, description="The original's metric; null without targets")
    compressed: Measurement | None = Field(default=None, description="The compressed model's")
    drop: Measurement | None = Field(default=None, description="Paired difference; positive is worse")
    agreement: Measurement | None = Field(default=None, description="Rows of which both say the same")


class Robustness(Section):
    """Both models on corrupted and attacked inputs."""

    samples: int = Field(ge=1, description="How many test samples it was measured on")
    scale: str = Field(description="What 0 and 1 mean to corruptions and budgets")
    clean: Condition = Field(description="The same samples unchanged")
    corruptions: tuple[Condition, ...] = Field(default=(), description="Each at each severity")
    mean: Condition | None = Field(default=None, description="Each sample's mean over all of them")
    attacks: tuple[Condition, ...] = Field(default=(), description="FGSM and PGD at each budget")


class Group(Section):
    """One group of a sensitive attribute."""

    name: str = Field(description="The group")
    n: int = Field(ge=1, description="Its samples")
    original: Mapping[str, Measurement] = Field(
        description="`metric`, and with two classes `selection`, `true_positive`, `false_positive`"
    )
    compressed: Mapping[str, Measurement] = Field(description="The same of the compressed model")
    drop: Measurement = Field(description="What the group loses; positive is worse")
    excess: Measurement = Field(description="What it loses beyond what all others lose")
    p: float = Field(description="Of no excess")
    p_adjusted: float = Field(description="After Holm's correction for the number of groups")


class Attribute(Section):
    """A sensitive attribute and its groups."""

    name: str = Field(description="The attribute")
    missing: int = Field(ge=0, description="Samples without a value, left out")
    groups: tuple[Group, ...] = Field(default=(), description="The groups")
    original: Mapping[str, Measurement] = Field(
        default_factory=dict,
        description="`accuracy_gap`; with a favourable class `demographic_parity`, `disparate_impact`, "
        "`equalised_odds`",
    )
    compressed: Mapping[str, Measurement] = Field(default_factory=dict, description="The same of the compressed model")
    note: str = Field(default="", description="Why there is nothing, or what is left out")


class Skipped(Section):
    """What was not measured."""

    what: str = Field(description="The part")
    why: str = Field(description="The reason")


class Evaluation(Section):
    """`evaluation.json`."""

    version: Literal[1] = Field(default=1, alias="schema", description="Version of this schema")
    tersor: str = Field(description="Version of Tersor that wrote the file")
    data: DataFacts = Field(description="What the two were compared on")
    original: ModelFacts = Field(description="The original")
    compressed: ModelFacts = Field(description="The compressed model")
    gate: Gate = Field(description="The verdict")
    quality: Quality | None = Field(default=None, description="The metric; null without targets")
    agreement: Mapping[str, Measurement] = Field(description="How alike the two answer")
    flips: Flips = Field(description="Which answers changed")
    calibration: Calibration | None = Field(default=None, description="Null without class scores and targets")
    robustness: Robustness | None = Field(default=None, description="Null where it was not asked for or cannot be")
    fairness: tuple[Attribute, ...] = Field(default=(), description="One entry for each sensitive attribute")
    outside: Mapping[str, Measurement] = Field(default_factory=dict, description="On data from elsewhere")
    skipped: tuple[Skipped, ...] = Field(default=(), description="What was not measured, and why")
    notes: tuple[str, ...] = Field(default=(), description="What else a reader should know")
    settings: Mapping[str, JsonValue] = Field(default_factory=dict, description="What the evaluation was asked for")
    environment: Mapping[str, str] = Field(default_factory=dict, description="Machine and versions")
    seconds: float = Field(default=0.0, ge=0, description="How long it took")

    def to_json(self) -> dict[str, Any]:
        """The evaluation as plain JSON values, keys as in the file."""
        return self.model_dump(mode="json", by_alias=True)


def parse_evaluation(data: Mapping[str, Any], where: str = "evaluation.json") -> Evaluation:
    """Validate an evaluation. Raises ArtifactError that names the path within the file and what was expected there."""
    return parse_document(Evaluation, data, VERSION, what="the evaluation", where=where, page="docs/evaluate.md")
