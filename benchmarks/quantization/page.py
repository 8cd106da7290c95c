"""The page of the quantisation benchmark, and the claims that it checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks.claims import Claim, difference_cells, said_of, word
from benchmarks.quantization import arms
from benchmarks.results import Finished, over_images, over_seeds
from benchmarks.tables import table

Found = Mapping[str, Sequence[Finished]]
POINTS = {arms.PTQ: 0.3, arms.QAT: 0.1, arms.QAT4: 1.0}  # that may be lost


def claims(network: str, found: Found) -> list[Claim]:
    """What the arms of a network were to show."""
    made = []
    for name, most in POINTS.items():
        if found.get(name):
            images, seeds = over_images(found[arms.FP32], found[name]), over_seeds(found[arms.FP32], found[name])
            text = f"{network}, {name}: at most {most:g} points below fp32"
            made.append(Claim(text, f"{images.value:.2f} below; {said_of(images, seeds)}", images.value <= most))
    for bits in (4, 3):
        better, plain = f"weights {bits} bits, GPTQ", f"weights {bits} bits, nearest"
        if found.get(better) and found.get(plain):
            images, seeds = over_images(found[better], found[plain]), over_seeds(found[better], found[plain])
            text = f"{network}, {better}: not below rounding to the nearest"
            made.append(Claim(text, f"{images.value:+.2f} points; {said_of(images, seeds)}", images.value >= 0))
    return made


def section(network: str, said: str, found: Found) -> str:
    """Accuracies and their differences to fp32."""
    rows = []
    for name, arm in found.items():
        values = [one.accuracy for one in arm]
        each = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
        seconds = median(one.pruning for one in arm)
        cells = ["", "", ""] if name == arms.FP32 else difference_cells(arm, found[arms.FP32])
        rows.append([name, f"{sum(values) / len(values):.2f}{each}", *cells, f"{seconds:.0f}"])
    header = ["", "accuracy, per cent", "minus fp32", "over images", "over seeds", "seconds, median"]
    lines = [f"## {network}", said, table(header, rows)]
    lines.append("\n".join(said_claim(claim) for claim in claims(network, found)))
    return "\n\n".join(lines)


def said_claim(claim: Claim) -> str:
    return f"* {word(claim.holds)}: {claim.text}. Found: {claim.found}."
