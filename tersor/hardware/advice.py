"""What a device's figures say about how to compress a model for it: expected gains, and a reason for each line."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tersor.core.measurement import Measurement
from tersor.hardware.fits import Numbers, fit, numbers_of, stored_as
from tersor.hardware.profile import Profile
from tersor.hardware.roofline import Roofline, layer_times, total_seconds
from tersor.measure.workload import Workload

Basis = Literal["measured", "roofline", "profile"]
Family = Literal["quantise", "prune", "both"]
HALF = 0.5  # share of channels kept that expectations are told for
WORTH = 1.15  # a gain below this is not worth a change
HALF_CHANNELS = "half of the channels"


@dataclass(frozen=True)
class Line:
    """One piece of advice: ``topic``, what to do, why, and what the reason rests on."""

    topic: str
    what: str
    reason: str
    basis: Basis


@dataclass(frozen=True)
class Expected:
    """A way to compress and its gain by the roofline, an estimate. ``speedup`` None: the device cannot run it.

    ``fits``: whether it then fits in the device's memory.
    """

    name: str
    family: Family
    speedup: Measurement | None
    fits: bool | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def expectations(workload: Workload, profile: Profile, roofline: Roofline) -> tuple[Expected, ...]:
    """Each way to compress, the largest expected gain first, ways that fit before ways that do not.

    A gain is the time by roofline of the model as it is (in the device's last kind of numbers, where it does not run as
    it is) over that of the compressed one: both are lower bounds, so that their ratio is an estimate and no bound.
    Zeros are among them where the device has a pattern for them.
    """
    kinds = numbers_of(workload, profile)
    before = _seconds(workload, roofline) or _seconds(stored_as(workload, kinds[-1]), roofline)
    found = []
    for numbers in kinds[1:]:
        found.append(_expected(numbers.name, "quantise", workload, numbers, before, profile, roofline))
    narrow = workload.narrowed(HALF)
    found.append(_expected(HALF_CHANNELS, "prune", narrow, kinds[0], before, profile, roofline))
    for numbers in kinds[1:]:
        name = f"{HALF_CHANNELS}, {numbers.name}"
        found.append(_expected(name, "both", narrow, numbers, before, profile, roofline))
    found += _zeros(workload, profile, roofline, before)
    return tuple(sorted(found, key=lambda each: (each.fits is not True, -_gain(each))))


def _gain(expected: Expected) -> float:
    return expected.speedup.value if expected.speedup is not None else 0.0


def _seconds(workload: Workload, roofline: Roofline) -> float | None:
    times = layer_times(workload, roofline)
    return None if times is None else total_seconds(times)


def _expected(
    name: str, family: Family, workload: Workload, numbers: Numbers, before: float | None, profile: Profile,
    roofline: Roofline,
) -> Expected:  # fmt: skip
    seconds = _seconds(stored_as(workload, numbers), roofline)
    row = fit(workload, numbers, profile, roofline, None)
    return Expected(name, family, _ratio(before, seconds, profile), row.fits)


def _ratio(before: float | None, after: float | None, profile: Profile) -> Measurement | None:
    if not before or not after:
        return None
    return Measurement(before / after, "×", device=profile.name, conditions={"estimate": "ratio of two rooflines"})


def _zeros(workload: Workload, profile: Profile, roofline: Roofline, before: float | None) -> list[Expected]:
    """Zeros in the device's own pattern: products that are compute-bound run faster by its speed-up."""
    sparsity, times = profile.sparsity, layer_times(workload, roofline)
    if sparsity.speedup is None or times is None:
        return []
    gain = sparsity.speedup.value
    after = sum(max(time.compute_seconds / gain, time.memory_seconds) for time in times)
    fits = fit(workload, numbers_of(workload, profile)[0], profile, roofline, None).fits
    return [Expected(f"{sparsity.pattern} zeros", "prune", _ratio(before, after, profile), fits)]


def lines(workload: Workload, profile: Profile, roofline: Roofline, expected: tuple[Expected, ...]) -> tuple[Line, ...]:
    """Advice from figures alone: what first, bits, structure, alignment, gain, where the time goes."""
    found = [_first(workload, profile, roofline, expected), _bits(profile, roofline, expected)]
    found += [_structure(profile, expected), _alignment(profile), _gain_line(expected)]
    runs = (stored_as(workload, numbers) for numbers in numbers_of(workload, profile))
    return (*found, *_where(next((each for each in runs if _seconds(each, roofline) is not None), workload), roofline))


def _first(workload: Workload, profile: Profile, roofline: Roofline, expected: tuple[Expected, ...]) -> Line:
    as_is = fit(workload, numbers_of(workload, profile)[0], profile, roofline, None)
    single = [each for each in expected if each.family != "both" and each.speedup is not None]
    best = next(iter(single), None)
    if best is None:
        return Line("first", "another device", f"{profile.name} runs the model in no numbers at all", "profile")
    what = {"quantise": f"quantise: {best.name}", "prune": f"prune: {best.name}"}[best.family]
    said = f"about {_gain(best):.1f}× by roofline"
    if as_is.fits is None:
        return Line("first", what, f"{as_is.reason}; nothing else runs at all", "profile")
    if not as_is.fits:
        then = "fits then" if best.fits else "does not fit even then: tersor fits says what does"
        return Line("first", what, f"as it is {as_is.reason}; {then}, {said}", "roofline")
    if _gain(best) < WORTH:
        return Line("first", "nothing", f"the best single change is expected to give {_gain(best):.2f}×", "roofline")
    return Line("first", what, f"{said}, the most of single changes", "roofline")


def _bits(profile: Profile, roofline: Roofline, expected: tuple[Expected, ...]) -> Line:
    kinds = [each for each in expected if each.family == "quantise" and each.speedup is not None]
    told = ", ".join(f"{each.name} {_gain(each):.1f}×" for each in kinds)
    useful = [each for each in kinds if _gain(each) >= WORTH]
    if not useful:
        return Line("bits", "as they are, for speed", f"by roofline {told or 'no narrower numbers run'}", "roofline")
    best = max(useful, key=_gain)
    peaks = ", ".join(f"{name} {peak.value / 1e9:,.3g} GOPS" for name, peak in roofline.peaks.items())
    return Line("bits", best.name, f"by roofline {told}; peaks: {peaks}. {profile.integers}", "roofline")


def _structure(profile: Profile, expected: tuple[Expected, ...]) -> Line:
    zeros = next((each for each in expected if each.name.endswith(" zeros")), None)
    if zeros is None or zeros.speedup is None:
        return Line("structure", "whole channels, not single zeros", profile.sparsity.source, "profile")
    if _gain(zeros) < WORTH:
        reason = f"{profile.sparsity.pattern} zeros give {_gain(zeros):.2f}× here: layers wait for memory"
        return Line("structure", "whole channels, not single zeros", reason, "roofline")
    reason = f"about {_gain(zeros):.1f}× by roofline at no narrower layers; {profile.sparsity.source}"
    return Line("structure", f"{profile.sparsity.pattern} zeros, or whole channels", reason, "roofline")


def _alignment(profile: Profile) -> Line:
    if profile.alignment.multiple_of == 1:
        return Line("alignment", "none needed", profile.alignment.source, "profile")
    what = f"keep channels in multiples of {profile.alignment.multiple_of}"
    return Line("alignment", what, profile.alignment.source, "profile")


def _gain_line(expected: tuple[Expected, ...]) -> Line:
    told = [each for each in expected if each.speedup is not None]
    if not told:
        return Line("expected gain", "none", "nothing that is known here runs there", "roofline")
    best = max(told, key=_gain)
    return Line(
        "expected gain", f"up to about {_gain(best):.1f}×", f"{best.name}, by roofline; an estimate", "roofline"
    )


def _where(workload: Workload, roofline: Roofline) -> list[Line]:
    times = layer_times(workload, roofline)
    if times is None:
        return []
    total = total_seconds(times) or 1.0
    waits = sum(time.seconds for time in times if time.bound == "memory") / total
    slow = sorted(times, key=lambda time: -time.seconds)[:3]
    told = ", ".join(
        f"{time.cost.path or time.cost.operator} {100 * time.seconds / total:.0f} % ({time.bound})" for time in slow
    )
    what = "arithmetic decides: fewer operations" if waits < 0.5 else "memory decides: fewer bytes"
    return [Line("bound", what, f"{100 * waits:.0f} % of the time in layers that wait for memory; {told}", "roofline")]
