"""A gate: limits compared with intervals, so that the answer is pass, fail, or not enough data to tell."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from scipy import stats

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.measurement import Measurement
from tersor.measure.behaviour.schema import (
    Attribute,
    Calibration,
    Check,
    Gate,
    Quality,
    Status,
)

_NORMAL = float(stats.norm.ppf(0.975))


@dataclass(frozen=True)
class Application:
    """A kind of application: how many points of the metric may go, and why not more."""

    max_drop: float
    explanation: str


APPLICATIONS = {
    "safety": Application(1.0, "a wrong answer can hurt somebody: brakes, alarms, machines near people"),
    "medical": Application(2.0, "a clinician looks at the answer, and a missed case still costs dearly"),
    "classification": Application(5.0, "ordinary sorting and tagging, where a wrong answer costs little and is seen"),
    "ranking": Application(10.0, "several answers are shown, and the right one only has to be among the first"),
    "generative": Application(15.0, "there is no single right answer; watch agreement and perplexity as well"),
}


@final
@dataclass(frozen=True)
class Limits:
    """What the compressed model is held to; None: not held to that.

    Args:
        max_drop: largest loss of the metric, in percentage points (in the metric's own unit where it is no fraction).
        min_agreement: smallest fraction of rows to which both models give the same class.
        max_ece_increase: largest rise of the expected calibration error, in [0, 1].
        max_group_gap: how much more than all others any group may lose, in points.
        application: a preset of ``APPLICATIONS``, which gives ``max_drop`` where none is given.

    Raises InputError for an unknown application and limits that cannot be.
    """

    max_drop: float | None = None
    min_agreement: float | None = None
    max_ece_increase: float | None = None
    max_group_gap: float | None = None
    application: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.application is not None and self.application not in APPLICATIONS:
            known = ", ".join(f"{name} ({preset.max_drop:g} points)" for name, preset in APPLICATIONS.items())
            raise InputError("unknown application", where="Limits", got=repr(self.application), expected=known)
        for name, value in self.asked.items():
            if not math.isfinite(value) or value < 0 or (name == "min_agreement" and value > 1):
                share = name == "min_agreement"
                raise InputError(
                    "unusable limit", where=f"Limits.{name}", got=value,
                    expected="a fraction in [0, 1]" if share else "a number from 0",
                    do=f"{value:g} % is {value / 100:g}" if share and 1 < value <= 100 else "",
                )  # fmt: skip

    @property
    def asked(self) -> dict[str, float]:
        """The limits that are set, those of the preset among them."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[:4]}
        if own["max_drop"] is None and self.application in APPLICATIONS:
            own["max_drop"] = APPLICATIONS[self.application].max_drop
        return {name: value for name, value in own.items() if value is not None}


def gate(
    limits: Limits,
    *,
    quality: Quality | None,
    agreement: Measurement | None,
    calibration: Calibration | None,
    attributes: Sequence[Attribute],
) -> Gate:
    """Hold what was measured to the limits. Raises InputError where the data do not tell what a limit is on."""
    _expect_points(limits, quality)
    found = {
        "max_drop": None if quality is None else quality.drop,
        "min_agreement": agreement,
        "max_ece_increase": None if calibration is None else calibration.ece_increase,
        "max_group_gap": _largest_gap(attributes),
    }
    checks = []
    for name, limit in limits.asked.items():
        measured = found[name]
        if measured is None:
            raise InputError(
                "the limit is on something that these data do not tell", where=f"--{name.replace('_', '-')}",
                got=_ABSENT[name], do="Leave the limit out, or bring the data",
            )  # fmt: skip
        checks.append(_check(name, limit, measured))
    preset = APPLICATIONS.get(limits.application or "")
    explanation = "" if preset is None else f"{limits.application}: {preset.explanation}"
    status, sentence = _verdict(checks)
    return Gate(
        status=status, sentence=sentence, application=limits.application, explanation=explanation, checks=tuple(checks)
    )


def _expect_points(limits: Limits, quality: Quality | None) -> None:
    """A preset's points are percentage points: they say nothing of a metric in a unit of its own."""
    if limits.application is None or limits.max_drop is not None or quality is None:
        return
    if quality.drop.unit != "percentage points":
        raise InputError(
            "a preset is in percentage points", where=f"--application {limits.application}",
            got=f"a metric in {quality.drop.unit}", do="Give --max-drop in the metric's own unit",
        )  # fmt: skip


_ABSENT = {
    "max_drop": "batches without targets",
    "min_agreement": "outputs that are no class scores",
    "max_ece_increase": "no class scores with targets",
    "max_group_gap": "no sensitive attribute whose groups can be compared, or no targets",
}
_WORDS = {
    "max_drop": "loss of the metric",
    "min_agreement": "agreement",
    "max_ece_increase": "rise of the calibration error",
    "max_group_gap": "largest excess loss of a group",
}


def _largest_gap(attributes: Sequence[Attribute]) -> Measurement | None:
    """The largest excess of any group.

    All groups must keep it: the upper end is the highest of theirs at 95 %. To say that one breaks it, the lower ends
    are widened for the number of groups (Bonferroni), and the highest is taken.
    """
    found = [(attribute.name, group) for attribute in attributes for group in attribute.groups]
    if not found:
        return None
    name, worst = max(found, key=lambda one: one[1].excess.value)
    factor = float(stats.norm.ppf(1 - 0.025 / len(found))) / _NORMAL
    lows = [g.excess.value - factor * (g.excess.value - g.excess.low) for _, g in found if g.excess.low is not None]
    highs = [group.excess.high for _, group in found]
    told = [high for high in highs if high is not None]
    low, high = max(lows) if lows else None, max(told) if len(told) == len(highs) else None
    people = max(sum(group.n for group in each.groups) for each in attributes)
    conditions = {"group": f"{name}: {worst.name}", "groups": len(found)}
    return Measurement(worst.excess.value, worst.excess.unit, low, high, people, conditions=conditions)


def _check(name: str, limit: float, measured: Measurement) -> Check:
    status = judge(measured, limit, at_most=name.startswith("max"))
    unit = {"fraction": "", "probability": "", "percentage points": " points"}.get(measured.unit, f" {measured.unit}")
    low = "−∞" if measured.low is None else f"{measured.low:.4g}"
    high = "∞" if measured.high is None else f"{measured.high:.4g}"
    bound, word = ("at most", "allowed") if name.startswith("max") else ("at least", "asked")
    group = f" ({measured.conditions['group']})" if "group" in measured.conditions else ""
    said = f"{_WORDS[name]}{group} {measured.value:.4g} [{low}, {high}]{unit}, {bound} {limit:g}{unit} {word}"
    needed = samples_to_tell(measured, limit) if status == "not enough data" else None
    if needed is not None:
        said += f"; about {needed:,} samples would tell (there are {measured.n:,})"
    return Check(name=name, limit=limit, measured=measured, status=status, sentence=said)


def judge(measured: Measurement, limit: float, *, at_most: bool) -> Status:
    """By the interval: passed where all of it keeps the limit, failed where all breaks it, else not enough data."""
    low = -math.inf if measured.low is None else measured.low
    high = math.inf if measured.high is None else measured.high
    if not at_most:
        low, high, limit = -high, -low, -limit
    if high <= limit:
        return "passed"
    return "failed" if low > limit else "not enough data"


def samples_to_tell(measured: Measurement, limit: float) -> int | None:
    """About how many samples would settle it (two digits, upwards): an interval falls with the root of their number."""
    if measured.n is None or measured.low is None or measured.high is None or measured.value == limit:
        return None
    reach = (measured.high if measured.value < limit else measured.low) - measured.value
    needed = max(1.0, measured.n * (reach / (limit - measured.value)) ** 2)
    if needed >= 1e9:
        return None
    step = 10 ** max(0, math.floor(math.log10(needed)) - 1)
    return math.ceil(needed / step) * step


def _verdict(checks: Sequence[Check]) -> tuple[Status | Literal["nothing asked"], str]:
    if not checks:
        return "nothing asked", "no limit was asked for"
    by_status = {status: [each for each in checks if each.status == status] for status in ("failed", "not enough data")}
    for status, word in (("failed", "failed"), ("not enough data", "not enough data to tell")):
        if found := by_status[status]:
            return status, f"{word}: " + "; ".join(each.sentence for each in found)  # type: ignore[return-value]
    return "passed", "passed: " + "; ".join(each.sentence for each in checks)
