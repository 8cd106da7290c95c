"""The demo's task over five folds: train on each, compress with `balanced`, pool the paired differences."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from rich.console import Console
from tables import table, write

from tersor.jobs.compress import Compressed, compress
from tersor.measure.quality import Evaluation, paired_drop
from tersor.report.progress import RichProgress
from tersor.run.measure_step import stored_evaluation
from tersor.zoo.digits import digits

FOLDS = 5


def main() -> None:
    """Run the folds and write docs/benchmarks/digits.md."""
    progress = RichProgress(console=Console(), quiet=False)
    rows, originals, finals = [], [], []
    for fold in range(FOLDS):
        out = Path("runs/bench-digits") / f"fold{fold}"
        shutil.rmtree(out, ignore_errors=True)
        done = compress(digits(fold=fold, progress=progress), "balanced", out, progress=progress)
        rows.append(_row(str(fold), done))
        final = done.summary["final"]
        originals.append(stored_evaluation(out / "steps" / "00-baseline", "test"))
        finals.append(stored_evaluation(out / "steps" / f"{final['number']:02d}-{final['name']}", "test"))
    drop = paired_drop(_pooled(originals), _pooled(finals), digits().complete())
    body = table(
        ["fold", "original", "compressed", "points lower", "smaller", "faster, batch 1", "faster, batch 32"], rows
    )
    body += (
        f"\n\nPooled over the five folds ({drop.n} held-out images): the compressed model is "
        f"{drop.value:.2f} points lower "
        f"(95 % interval {drop.low:.2f} to {drop.high:.2f}); mean over folds "
        f"{np.mean([float(row[3].split()[0]) for row in rows]):.2f} points."
    )
    write("digits", "digits: recipe `balanced` over five folds", body)


def _pooled(parts: list[Evaluation]) -> Evaluation:
    values = np.concatenate([part.values for part in parts])
    return Evaluation(values, None, len(values), 0.0)


def _row(fold: str, done: Compressed) -> list[str]:
    summary = done.summary
    ratios, intervals = summary["ratios"], summary["ratio_intervals"]

    def accuracy(step: str) -> str:
        found = summary[step]["measurements"]["accuracy"]
        return f"{100 * found['value']:.2f} % ({100 * found['low']:.1f}–{100 * found['high']:.1f})"

    def speed(batch: int) -> str:
        found = intervals[f"latency_batch_{batch}"]
        return f"{found['value']:.2f}× ({found['low']:.2f}–{found['high']:.2f})"

    drop = intervals["accuracy_drop_points"]
    lower = f"{drop['value']:.2f} ({drop['low']:.2f} to {drop['high']:.2f})"
    return [fold, accuracy("baseline"), accuracy("final"), lower, f"{ratios['size']:.1f}×", speed(1), speed(32)]


if __name__ == "__main__":
    main()
