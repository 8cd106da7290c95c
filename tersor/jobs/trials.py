"""What was tried and measured: verdicts, their order, and the lines of advice that measurements replace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tersor.core.measurement import Measurement
from tersor.hardware.advice import HALF_CHANNELS, WORTH, Family, Line
from tersor.jobs.candidates import INT8, SPARSE
from tersor.report.format import value_of

Verdict = Literal["faster", "faster, needs repair", "no difference shown", "slower", "not tried"]  # the best first
CHANNELS_INT8 = f"{HALF_CHANNELS}, {INT8}"
# What does what was tried, and nothing else; the others are parts of a recipe of your own.
_RECIPES = {INT8: "ptq", SPARSE: "sparse", CHANNELS_INT8: "fast"}


@dataclass(frozen=True)
class Trial:
    """A way to compress that was tried without training. ``measured``: its file's bytes (size_bytes), latency_ms,
    speedup, drop_points and validation metric; empty where it could not be tried, and ``why_not`` says why.
    ``expected``: its speed-up by roofline. ``verdict``: see ``verdict_of``. ``part``: see ``Candidate``.
    ``note``: what was passed over.
    """

    name: str
    family: Family
    measured: Mapping[str, Measurement]
    expected: Measurement | None
    verdict: Verdict
    why_not: str = ""
    part: str = ""
    note: str = ""

    @property
    def speedup(self) -> Measurement:
        """Against the original; only of what was tried."""
        return self.measured["speedup"]

    @property
    def drop(self) -> Measurement:
        """What it lost on validation data, before any repair; only of what was tried."""
        return self.measured["drop_points"]


def verdict_of(measured: Mapping[str, Measurement], max_drop: float) -> Verdict:
    """Faster or slower only where the whole interval of the speed-up says so; "needs repair" where more is lost."""
    if not measured:
        return "not tried"
    speed, drop = measured["speedup"], measured["drop_points"]
    if speed.low is not None and speed.low > 1:
        return "faster" if drop.value <= max_drop else "faster, needs repair"
    return "slower" if speed.high is not None and speed.high < 1 else "no difference shown"


def rank(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """By verdict, then by measured speed-up; where no difference in speed is shown, the smaller file first.

    What is faster by less than 15 % comes after what is so by more and needs repair.
    """

    def key(trial: Trial) -> tuple[float, float]:
        place = float(get_args(Verdict).index(trial.verdict))
        if not trial.measured:
            return place, 0.0
        if trial.verdict.startswith("faster") and trial.speedup.value < WORTH:
            place = 1.5
        equal = trial.verdict == "no difference shown"
        return place, trial.measured["size_bytes"].value if equal else -trial.speedup.value

    return tuple(sorted(trials, key=key))


def measured_lines(
    lines: Sequence[Line], trials: Sequence[Trial], task: str, max_drop: float = 1.0
) -> tuple[Line, ...]:
    """The lines of advice with those replaced of which trials say more; ``trials`` are ranked, ``task`` its source."""
    found = {line.topic: line for line in lines}
    known = {trial.name: trial for trial in trials if trial.measured}
    if not known:
        return tuple(found.values())
    found |= {line.topic: line for line in (_first(known), _gain(known))}
    if any(trial.family == "quantise" for trial in known.values()):
        found["bits"] = _bits(known)
    if SPARSE in known:
        found["structure"] = _structure({trial.name: trial for trial in trials})
    best = _winner(known)
    if task and best is not None and (best.part or best.name in _RECIPES):
        found["then"] = _then(known, best, task)
    unsure = [trial.name for trial in known.values() if _straddles(trial.drop, max_drop)]
    if unsure:
        few = next(iter(known.values())).drop.n
        reason = (
            f"whether {', '.join(unsure)} may lose more than {max_drop:g}, {few} do not tell: the interval holds it"
        )
        found["samples"] = Line("samples", "more of them: --samples", reason, "measured")
    return tuple(found.values())


def _straddles(drop: Measurement, most: float) -> bool:
    return drop.low is not None and drop.high is not None and drop.low <= most < drop.high


def _then(known: Mapping[str, Trial], best: Trial, task: str) -> Line:
    """The command that does what was measured to help: no recipe with a step that was not, or that is slower here."""
    recipe = _RECIPES.get(best.name)
    if recipe is not None:
        why = "calibrates, equalises and corrects; no training" if recipe == "ptq" else "trains what was lost back"
        return Line("then", f"tersor compress {task} --recipe {recipe} -o RUN", why + _more(known, best), "measured")
    trains = best.family != "quantise"
    part = f"the parts {best.part} and finetune" if trains else f"the part {best.part}"
    what = f"tersor compress {task} --recipe MINE.yaml -o RUN, where a step has {part}"
    why = "what was tried, in a recipe of your own; " + ("training repairs what it loses" if trains else "no training")
    if best.name == HALF_CHANNELS:
        both = known.get(CHANNELS_INT8)
        speed = "was not tried" if both is None else f"{told(both)}, and without int8 {best.speedup.value:.2f}×"
        why += f". Not --recipe fast, which ends in int8: {CHANNELS_INT8} {speed}"
    return Line("then", what, why + _more(known, best), "measured")


def _winner(known: Mapping[str, Trial]) -> Trial | None:
    best = next(iter(known.values()))
    return best if best.verdict.startswith("faster") else None


def _more(known: Mapping[str, Trial], best: Trial) -> str:
    """What a repair by training would buy beyond the best that needs none; empty where that is little."""
    others = [trial for trial in known.values() if trial.verdict == "faster, needs repair"]
    fastest = max(others, key=lambda trial: trial.speedup.value, default=best)
    if best.verdict != "faster" or fastest.speedup.value < WORTH * best.speedup.value:
        return ""
    recipe = _RECIPES.get(fastest.name)
    by = "" if recipe is None else f" (--recipe {recipe})"
    return f". Where training may repair it: {fastest.name}, {fastest.speedup.value:.2f}× as fast{by}"


def _first(known: Mapping[str, Trial]) -> Line:
    best = _winner(known)
    if best is None:
        smallest = min(known.values(), key=lambda trial: trial.measured["size_bytes"].value)
        size = value_of(smallest.measured["size_bytes"])
        reason = f"nothing that was tried is faster here; the smallest file is that of {smallest.name}, {size}"
        return Line("first", "nothing, for speed", reason, "measured")
    what = {"quantise": "quantise", "prune": "prune", "both": "prune, then quantise"}[best.family]
    return Line("first", f"{what}: {best.name}", f"{told(best)}: the best of {len(known)} tried", "measured")


def _bits(known: Mapping[str, Trial]) -> Line:
    kinds = [trial for trial in known.values() if trial.family == "quantise"]
    best = next((trial for trial in kinds if trial.verdict.startswith("faster")), None)
    reason = "; ".join(f"{trial.name} {told(trial)}" for trial in kinds)
    return Line("bits", best.name if best is not None else "as they are, for speed", reason, "measured")


def _structure(trials: Mapping[str, Trial]) -> Line:
    zeros, channels = trials[SPARSE], trials.get(HALF_CHANNELS)
    reason = f"{zeros.name} {told(zeros)}"
    if channels is None or not channels.measured:
        what = "single zeros" if zeros.verdict.startswith("faster") else "not single zeros, for speed"
        why = "" if channels is None else f"; {channels.name} could not be tried: {channels.why_not}"
        return Line("structure", what, reason + why, "measured")
    what = "whole channels, not single zeros"
    if zeros.verdict.startswith("faster") and zeros.speedup.value > channels.speedup.value:
        what = "single zeros"
    elif not channels.verdict.startswith("faster"):
        what = "neither, for speed"
    return Line("structure", what, f"{channels.name} {told(channels)}; {reason}", "measured")


def _gain(known: Mapping[str, Trial]) -> Line:
    best = max(known.values(), key=lambda trial: trial.speedup.value)
    expected = "" if best.expected is None else f"; the roofline had promised {best.expected.value:.1f}×"
    if not best.verdict.startswith("faster"):
        return Line("expected gain", "none shown", f"{best.name} {told(best)}{expected}", "measured")
    return Line("expected gain", f"about {best.speedup.value:.1f}×", f"{best.name} {told(best)}{expected}", "measured")


def told(trial: Trial) -> str:
    """ "2.1× (1.9–2.3) as fast, losing 0.4 points before repair"; what cannot be told of speed is said."""
    speed, drop = trial.speedup, trial.drop
    ends = "" if speed.low is None or speed.high is None else f" ({speed.low:.2f}–{speed.high:.2f})"
    fast = f"{speed.value:.2f}×{ends} as fast"
    if trial.verdict == "no difference shown":
        fast = f"shows no difference in speed{ends}"
    unit = "points" if drop.unit == "percentage points" else drop.unit
    lost = f"losing {drop.value:.2f} {unit}" if drop.value > 0 else f"gaining {-drop.value:.2f} {unit}"
    between = "" if drop.low is None or drop.high is None else f" ({drop.low:.1f} to {drop.high:.1f} lost)"
    return f"{fast}, {lost if drop.value else 'losing nothing'}{between} before repair"
