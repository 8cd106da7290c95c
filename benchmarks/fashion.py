"""Fashion-MNIST: compress with `balanced`; the original gets the same extra epochs, so that the comparison is fair."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from tables import table, write

from tersor.core.measurement import Measurement
from tersor.core.step import Context
from tersor.export.onnx import export_onnx
from tersor.jobs.compress import Compressed, compress
from tersor.measure.quality import Evaluation, evaluate, paired_drop, quality
from tersor.measure.session import OnnxRunnable
from tersor.recipes.recipe import parts_of, read_recipe
from tersor.report.progress import RichProgress
from tersor.run.measure_step import stored_evaluation
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer
from tersor.zoo.fashion import fashion

OUT = Path("runs/bench-fashion")


def main() -> None:
    """Run and write docs/benchmarks/fashion.md."""
    progress = RichProgress(console=Console(), quiet=False)
    task = fashion(progress=progress)
    shutil.rmtree(OUT, ignore_errors=True)
    done = compress(task, "balanced", OUT, progress=progress)
    epochs = extra_epochs()
    complete = task.complete()
    longer = Finetune(epochs=epochs, optimizer=Optimizer(name="sgd", lr=0.05), precision="bf16")
    trained = longer.run(complete.model, complete, Context(seed=1, progress=progress)).model
    assert complete.example_inputs is not None
    export_onnx(trained, complete.example_inputs, OUT / "longer.onnx")
    extended = evaluate(OnnxRunnable(OUT / "longer.onnx"), complete, split="test")
    _write(done, extended, quality(extended, complete), paired_drop(extended, _final(done), complete), epochs)


def extra_epochs() -> int:
    """How many epochs the recipe trains."""
    steps = read_recipe("balanced").steps
    return sum(part.epochs for step in steps for part in parts_of(step.step) if isinstance(part, Finetune))


def _final(done: Compressed) -> Evaluation:
    final = done.summary["final"]
    return stored_evaluation(done.folder / "steps" / f"{final['number']:02d}-{final['name']}", "test")


def _write(
    done: Compressed, extended: Evaluation, quality_of_longer: Measurement, fair: Measurement, epochs: int
) -> None:
    summary = done.summary
    rows = [_row(summary["baseline"]), *[_row(step) for step in summary["steps"]]]
    longer = quality_of_longer
    rows.insert(1, ["original, trained on for the same extra epochs", _percent(longer.to_json()), "", "", "", "", ""])
    header = ["step", "accuracy", "ONNX file", "parameters", "MACs", "faster, batch 1", "faster, batch 32"]
    ratios = summary["ratios"]
    body = table(header, rows) + (
        f"\n\nFinal against the original: {ratios['size']:.1f}× smaller, "
        f"{ratios['latency_batch_32']:.2f}× faster at batch 32. "
        f"Against the original given the same {epochs} extra epochs, on the same {extended.n} test images: "
        f"{fair.value:.2f} points lower (95 % interval {fair.low:.2f} to {fair.high:.2f}); "
        f"against the original as it was: {ratios['accuracy_drop_points']:.2f} points lower."
    )
    write("fashion", "Fashion-MNIST: recipe `balanced` on a residual network", body)


def _percent(found: dict[str, Any]) -> str:
    return f"{100 * found['value']:.2f} % ({100 * found['low']:.2f}–{100 * found['high']:.2f})"


def _row(step: dict[str, Any]) -> list[str]:
    found = step["measurements"]

    def speed(batch: int) -> str:
        ratio = found.get(f"speedup_batch_{batch}")
        return f"{ratio['value']:.2f}× ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio and step["number"] else "1"

    return [
        step["title"], _percent(found["accuracy"]), f"{found['size_bytes']['value'] / 1e3:.0f} kB",
        f"{found['parameters']['value']:,.0f}", f"{found['macs']['value'] / 1e6:.1f} M", speed(1), speed(32),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
