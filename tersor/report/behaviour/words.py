"""What an evaluation calls its things, and its changes in words."""

from __future__ import annotations

from tersor.core.measurement import Measurement
from tersor.measure.behaviour.schema import Evaluation
from tersor.report.format import bare_of, both_of, human, scale_of, shorten, turned

NAME = 30


def metric_of(found: Evaluation) -> str:
    """What the task's metric is called."""
    return human(found.data.metric or "metric")


def row_of(found: Evaluation) -> str:
    """What was compared: a sample, or a position of one."""
    return "position" if found.data.kind == "tokens" else "sample"


def counted(n: int, thing: str) -> str:
    """ "1 sample", "2 samples"."""
    return f"{n:,} {thing if n == 1 else thing + 's'}"


def class_of(found: Evaluation, index: int) -> str:
    """A class's name, or its index."""
    names = found.data.class_names
    return shorten(names[index], NAME) if index < len(names) else str(index)


def proven(measured: Measurement) -> bool:
    """Whether the interval leaves zero out."""
    return measured.low is not None and measured.high is not None and (measured.low > 0 or measured.high < 0)


def _still(measured: Measurement) -> bool:
    """Whether nothing was measured but what sums of floats leave over."""
    return abs(measured.value) < 1e-9


def moved(name: str, worse: Measurement, *, worse_is_up: bool = False) -> str:
    """ "accuracy fell by 0.6 points [0.2, 0.9]"; ``worse`` is positive where things went wrong."""
    if _still(worse):
        return f"{name} changed by {bare_of(worse)}"
    up = (worse.value > 0) == worse_is_up
    size = worse if worse.value > 0 else turned(worse)
    return f"{name} {'rose' if up else 'fell'} by {bare_of(size)}"


def moved_or_chance(name: str, worse: Measurement, *, worse_is_up: bool = False) -> str:
    """``moved``, for a reader in a hurry: what the interval does not prove may be chance, and says so."""
    chance = "" if _still(worse) or proven(worse) else ", which may be chance"
    return moved(name, worse, worse_is_up=worse_is_up) + chance


def loss_words(found: Evaluation) -> str:
    """How the metric changed, and whether that may be chance; empty without targets."""
    if found.quality is None:
        return ""
    return moved_or_chance(metric_of(found), found.quality.drop, worse_is_up=not found.data.higher_is_better)


def agreement_words(found: Evaluation) -> str:
    """How often, or how far, the two say the same."""
    same = found.agreement.get("top_1")
    if same is not None:
        return f"the two give the same answer on {both_of(same)} of {counted(found.data.rows, row_of(found))}"
    apart = found.agreement.get("rms_difference")
    if apart is None:
        return f"{counted(found.data.rows, row_of(found))} were compared"
    return f"their outputs are {both_of(apart)} apart (root mean square) on {counted(found.data.rows, row_of(found))}"


def larger(measured: Measurement) -> str:
    """The largest loss that the interval leaves possible."""
    if measured.high is None:
        return "any"
    return scale_of(measured.high, measured.unit).full(max(0.0, measured.high))


def capital(text: str) -> str:
    """The text with a capital at its start."""
    return text[:1].upper() + text[1:]
