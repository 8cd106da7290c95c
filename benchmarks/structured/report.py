"""The page of the CIFAR-10 benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.results import FEWEST_SEEDS, Finished, over_images, over_seeds
from benchmarks.structured.page import table, write
from benchmarks.structured.training import Budget
from tersor.tensor.statistics import Estimate


@dataclass(frozen=True)
class Setting:
    """What the page says of how it was measured."""

    model: str
    images: int
    budget: Budget
    seeds: int
    device: str
    source: str


def write_page(
    setting: Setting, baseline: float, arms: Mapping[str, str], ours: Sequence[str],
    found: Mapping[tuple[str, float], Sequence[Finished]],
) -> None:  # fmt: skip
    """``baseline``: the original's accuracy in per cent. ``arms``: name → how it prunes and trains; ``ours``: of these.

    ``found``: (name, ratio) → an entry for each seed.
    """
    ratios = sorted({ratio for _, ratio in found})
    budget = setting.budget
    lines = [
        f"{setting.model}, trained to {baseline:.2f} %; pruned to the given ratio; then {budget.epochs} epochs of "
        f"{setting.images:,} images in every arm, by one function: SGD with Nesterov momentum 0.9, one cycle up to "
        f"{budget.lr}, weight decay {budget.weight_decay}, batches of {budget.batch}, mirrored and moved by up to four "
        f"pixels; the same order and augmentation for a seed. Seeds: {setting.seeds}. Test accuracy of the last epoch "
        "in per cent: the mean, each seed, the ratio that was reached. Nothing was chosen on the test set.",
        table(["fewer MACs", *arms], [_accuracies(list(arms), ratio, found) for ratio in ratios]),
        "Differences in points, paired by seed and image, with 95 % intervals: over test images (what other images "
        f"would have given for these networks), and, from {FEWEST_SEEDS} seeds on, Student's over seeds.",
        table(
            ["fewer MACs", "", "minus", "points", "over images", "over seeds"],
            [
                _difference(one, other, ratio, found)
                for ratio in ratios for one in ours for other in arms if other not in ours
            ],
        ),
        "\n".join(f"* {name}: {what}" for name, what in arms.items()),
    ]  # fmt: skip
    title = f"CIFAR-10, {setting.model}: pruned and trained on"
    write(f"structured-{setting.model}", title, "\n\n".join(lines), setting.source, setting.device)


def _accuracies(names: Sequence[str], ratio: float, found: Mapping[tuple[str, float], Sequence[Finished]]) -> list[str]:
    cells = [f"{ratio:g}×"]
    for name in names:
        arm = found[name, ratio]
        each = ", ".join(f"{one.accuracy:.2f}" for one in arm)
        mean = sum(one.accuracy for one in arm) / len(arm)
        cells.append(f"{mean:.2f}" + (f" ({each})" if len(arm) > 1 else "") + f" at {arm[0].ratio:.2f}×")
    return cells


def _difference(one: str, other: str, ratio: float, found: Mapping[tuple[str, float], Sequence[Finished]]) -> list[str]:
    pair = found[one, ratio], found[other, ratio]
    images, seeds = over_images(*pair), over_seeds(*pair)
    return [f"{ratio:g}×", one, other, f"{images.value:+.2f}", _range(images), _range(seeds) if seeds else ""]


def _range(found: Estimate) -> str:
    return f"{found.low:+.2f} to {found.high:+.2f}"
