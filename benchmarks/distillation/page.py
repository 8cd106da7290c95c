"""The page of the distillation benchmark, and the claims that it checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks.claims import Claim, difference_cells, said_of, word
from benchmarks.distillation.arms import ALONE, CACHED, KD, REPLAYED, TRANSFORMER
from benchmarks.distillation.clock import BARE, LOOP, READ, Ratio
from benchmarks.results import FEWEST_SEEDS, Finished, over_images, over_seeds
from benchmarks.tables import table

Found = Mapping[str, Sequence[Finished]]
LIMITS = {(LOOP, BARE): 1.03, (READ, LOOP): 1.1}


def claims(found: Found, ratios: Sequence[Ratio]) -> list[Claim]:
    """What the benchmark is to show, as far as it was run."""
    made = [_above(found[one], found[other], one, other) for one, other in _pairs(found)]
    if found.get(CACHED) and found.get(REPLAYED):
        images, seeds = over_images(found[CACHED], found[REPLAYED]), over_seeds(found[CACHED], found[REPLAYED])
        holds = None if seeds is None else images.low <= 0 <= images.high or seeds.low <= 0 <= seeds.high
        text = "with the cache the student ends within noise of the run without it"
        made.append(Claim(text, f"{images.value:+.2f} points; {said_of(images, seeds)}", holds))
    for ratio in ratios:
        most = LIMITS.get((ratio.one, ratio.other))
        if most is not None:
            text = f"an epoch of {ratio.one} takes at most {most:g} times one of {ratio.other}"
            made.append(Claim(text, _times(ratio), ratio.estimate.value <= most))
    return made


def _pairs(found: Found) -> list[tuple[str, str]]:
    return [(one, ALONE) for one in (KD, TRANSFORMER) if found.get(one) and found.get(ALONE)]


def _above(one: Sequence[Finished], other: Sequence[Finished], name: str, beside: str) -> Claim:
    images, seeds = over_images(one, other), over_seeds(one, other)
    holds = None if seeds is None else images.low > 0 and seeds.low > 0
    text = f"{name}: above {beside}, by intervals that exclude zero"
    return Claim(text, f"{images.value:+.2f} points; {said_of(images, seeds)}", holds)


def page(said: str, found: Found, teachers: Mapping[str, Sequence[float]], ratios: Sequence[Ratio]) -> str:
    """Accuracies, differences, costs and claims."""
    lines = [said, _accuracies(found, teachers)]
    lines += [
        "Differences in points, pairs of the same seed (the same first weights), with 95 % intervals: over test "
        f"images, and, from {FEWEST_SEEDS} seeds on, Student's over seeds.",
        _differences(found),
    ]
    if ratios:
        rows = [[ratio.one, ratio.other, _times(ratio)] for ratio in ratios]
        lines += [
            "What an epoch costs: medians over rounds in which all take turns, with 95 % intervals.",
            table(["an epoch of", "beside", "times"], rows),
        ]
    lines.append("\n".join(f"* {word(c.holds)}: {c.text}. Found: {c.found}." for c in claims(found, ratios)))
    return "\n\n".join(lines)


def _accuracies(found: Found, teachers: Mapping[str, Sequence[float]]) -> str:
    rows = [[f"teacher: {name}", _range(values), ""] for name, values in teachers.items()]
    for name, arm in found.items():
        seconds = median(one.training for one in arm)
        rows.append([name, _range([one.accuracy for one in arm]), f"{seconds:.0f}"])
    return table(["", "accuracy, per cent (lowest–highest)", "seconds of training, median"], rows)


def _range(values: Sequence[float]) -> str:
    each = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.2f}{each}"


def _differences(found: Found) -> str:
    pairs = [(name, ALONE) for name in found if name != ALONE and found.get(ALONE)]
    pairs += [(name, KD) for name in found if name not in (ALONE, KD) and found.get(KD)]
    pairs += [(CACHED, REPLAYED)] if found.get(CACHED) and found.get(REPLAYED) else []
    rows = [[one, other, *difference_cells(found[one], found[other])] for one, other in pairs]
    return table(["", "minus", "points", "over images", "over seeds"], rows)


def _times(ratio: Ratio) -> str:
    value, low, high = ratio.estimate
    return f"{value:.3f} ({low:.3f}–{high:.3f})"
