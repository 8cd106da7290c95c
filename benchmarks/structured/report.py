"""The page of the CIFAR-10 benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.structured.page import table, write
from benchmarks.structured.results import FEWEST_SEEDS, Finished, over_images, over_seeds
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
    setting: Setting, baseline: float, arms: Mapping[str, str], found: Mapping[tuple[str, float], Sequence[Finished]]
) -> None:
    """``baseline``: the original's accuracy in per cent. ``arms``: name → how it prunes and trains, the peer first.

    ``found``: (name, ratio) → an entry for each seed.
    """
    names = list(arms)
    ratios = sorted({ratio for _, ratio in found})
    rows = [_row(names, ratio, found) for ratio in ratios]
    header = ["fewer MACs", *names]
    header += [f"{name} − {names[0]}" for name in names[1:]]
    lines = [
        f"{setting.model}, trained to {baseline:.2f} %; pruned to the given ratio; then {setting.budget.epochs} epochs "
        f"of {setting.images:,} images in every arm, by one function: SGD with Nesterov momentum 0.9, one cycle up to "
        f"{setting.budget.lr}, weight decay {setting.budget.weight_decay}, batches of {setting.budget.batch}, mirrored "
        f"and moved by up to four pixels; the same order and augmentation for a seed. Seeds: {setting.seeds}. Test "
        "accuracy of the last epoch (mean over seeds, per cent); nothing was chosen on the test set.",
        table(header, rows),
        "Differences in points, paired by seed and image, with their 95 % interval over test images"
        + (" and, in brackets, over seeds." if setting.seeds >= FEWEST_SEEDS else ".")
        + " Beside each accuracy stands the ratio that was reached.",
        "\n".join(f"* {name}: {what}" for name, what in arms.items()),
    ]
    title = f"CIFAR-10, {setting.model}: pruned and trained on"
    write(f"structured-{setting.model}", title, "\n\n".join(lines), setting.source, setting.device)


def _row(names: Sequence[str], ratio: float, found: Mapping[tuple[str, float], Sequence[Finished]]) -> list[str]:
    cells = [f"{ratio:g}×"]
    for name in names:
        arm = found[name, ratio]
        each = ", ".join(f"{one.accuracy:.2f}" for one in arm)
        mean = sum(one.accuracy for one in arm) / len(arm)
        cells.append(f"{mean:.2f}" + (f" ({each})" if len(arm) > 1 else "") + f" at {arm[0].ratio:.2f}×")
    peer = found[names[0], ratio]
    for name in names[1:]:
        arm = found[name, ratio]
        seeds = over_seeds(arm, peer)
        also = f" [{seeds.low:+.2f} to {seeds.high:+.2f}]" if seeds else ""
        cells.append(_difference(over_images(arm, peer)) + also)
    return cells


def _difference(found: Estimate) -> str:
    return f"{found.value:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
