"""The page of the sparsity benchmark, and the claims that it checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks.claims import Claim, difference_cells, said_of, word
from benchmarks.results import FEWEST_SEEDS, Finished, over_images, over_seeds
from benchmarks.sparse.arms import DENSE, RECOVERED, SPARSITIES
from benchmarks.tables import table

Found = Mapping[tuple[str, float | None], Sequence[Finished]]
POINTS = 1.0  # that recovery may leave below dense
PAIRS = [
    *((f"one shot + repair, {scope}", f"one shot, {scope}") for scope in ("layer", "global")),
    *((f"SparseGPT + repair, {scope}", f"one shot + repair, {scope}") for scope in ("layer", "global")),
    ("SparseGPT, global", "SparseGPT + repair, global"), ("one shot, layer", "torch.nn.utils.prune, layer"),
    ("one shot, global", "torch.nn.utils.prune, global"),
]  # fmt: skip


def claims(found: Found) -> list[Claim]:
    """Both claims of the benchmark, at every sparsity where they can be made."""
    made = []
    pair = found.get((DENSE, None)), found.get((RECOVERED, 0.9))
    if pair[0] and pair[1]:
        images, seeds = over_images(*pair), over_seeds(*pair)
        text = f"90 % zeros, {RECOVERED}: at most {POINTS:g} point below dense given the same extra epochs"
        made.append(Claim(text, f"{images.value:.2f} points below; {said_of(images, seeds)}", images.value <= POINTS))
    for repaired, plain in PAIRS[:2]:
        for sparsity in SPARSITIES:
            pair = found.get((repaired, sparsity)), found.get((plain, sparsity))
            if pair[0] and pair[1]:
                images, seeds = over_images(*pair), over_seeds(*pair)
                text = f"{100 * sparsity:g} % zeros, {repaired}: above {plain}, by intervals that exclude zero"
                holds = None if seeds is None else images.low > 0 and seeds.low > 0
                made.append(Claim(text, f"{images.value:+.2f} points; {said_of(images, seeds)}", holds))
    return made


def section(title: str, said: str, found: Found) -> str:
    """Accuracies, differences and claims of one network."""
    lines = [
        f"## {title}", said, _accuracies(found),
        "Differences in points, pairs of the same seed, with 95 % intervals: over test images (what other images would "
        f"have given for these networks) and, from {FEWEST_SEEDS} seeds on, Student's over seeds.",
        _differences(found),
        "\n".join(f"* {word(claim.holds)}: {claim.text}. Found: {claim.found}." for claim in claims(found)),
    ]  # fmt: skip
    return "\n\n".join(lines)


def _accuracies(found: Found) -> str:
    families = list(dict.fromkeys(family for family, _ in found))
    rows = []
    for family in families:
        alone = found.get((family, None))
        cells = [_cell(alone), "", ""] if alone else [_cell(found.get((family, s))) for s in SPARSITIES]
        rows.append([family, *cells])
    return table(["accuracy, per cent", *(f"{100 * s:g} % zeros" for s in SPARSITIES)], rows)


def _cell(arm: Sequence[Finished] | None) -> str:
    if not arm:
        return ""
    mean = sum(one.accuracy for one in arm) / len(arm)
    seconds = median(one.pruning for one in arm)
    zeros = 100 * (1 - 1 / arm[0].ratio)
    each = f" ({min(o.accuracy for o in arm):.2f}–{max(o.accuracy for o in arm):.2f})" if len(arm) > 1 else ""
    return f"{mean:.2f}{each}; {zeros:.1f} % zeros, {seconds:.0f} s"


def _differences(found: Found) -> str:
    rows = [
        [f"{100 * s:g} %", one, other, *difference_cells(found[one, s], found[other, s])]
        for s in SPARSITIES for one, other in PAIRS if found.get((one, s)) and found.get((other, s))
    ]  # fmt: skip
    dense = found.get((DENSE, None))
    trained = [(key, arm) for key, arm in found.items() if "trained" in key[0] or "gradual" in key[0]]
    for (family, sparsity), arm in trained:
        if dense and family != DENSE:
            label = "" if sparsity is None else f"{100 * sparsity:g} %"
            rows.append([label, family, DENSE, *difference_cells(arm, dense)])
    return table(["zeros", "", "minus", "points", "over images", "over seeds"], rows)
