"""Fashion-MNIST: accuracy against measured ONNX Runtime latency, from channels alone.

    python -m benchmarks.structured.latency --epochs 4 --sparsities 0.25 0.375 0.5 0.625 0.75

Each network that was trained is an ONNX file under runs/bench-structured/fashion and is not trained again.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.structured.latency_page import Row, write_page
from tersor.core.progress import Progress
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.export.onnx import export_onnx
from tersor.measure.compute import macs
from tersor.measure.latency import compare_latency
from tersor.measure.quality import evaluate, paired_drop, quality
from tersor.measure.session import OnnxRunnable
from tersor.prune.structured.channels import PruneChannels
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer
from tersor.zoo.batches import TensorBatches
from tersor.zoo.fashion import fashion

OUT = Path("runs/bench-structured/fashion")
BATCH = 32
SPARSITIES = (0.25, 0.375, 0.5, 0.625, 0.75)


@dataclass(frozen=True)
class Said(Progress):
    """Prints what is said, and no bars."""

    def say(self, text: str) -> None:
        print(text, flush=True)


def main() -> None:
    """Prune to each sparsity, train on, export, measure all files in turns; write the page and its plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES, help="of channels, in every layer")
    parser.add_argument("--epochs", type=int, default=4, help="of training after pruning; the original gets them too")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing")
    parser.add_argument("--train-samples", type=int, default=None, help="fewer images, to try it out")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    task = _first(fashion(progress=Said()).complete(), args.train_samples)
    training = Finetune(epochs=args.epochs, optimizer=Optimizer(name="sgd", lr=args.lr), precision="bf16", keep="last")
    recipe = f"epochs-{args.epochs}-lr-{args.lr:g}-images-{len(task.train.images)}-seed-{args.seed}"
    args.out.mkdir(parents=True, exist_ok=True)
    files = {"original": args.out / "original.onnx"}
    export_onnx(task.model, task.example_inputs, files["original"])
    counts = {"original": macs(task.model, task.example_inputs).value}
    for sparsity in (0.0, *args.sparsities):
        name = f"{sparsity:g} of channels removed" if sparsity else "original, trained on"
        files[name] = args.out / f"sparsity-{sparsity:g}-{recipe}.onnx"
        counts[name] = _trained(task, sparsity, training, args.seed, files[name])
    _measure(task, files, counts, args)


def _first(task: Task, count: int | None) -> Task:
    """The task with ``count`` training images (None: all)."""
    train = task.train
    assert isinstance(train, TensorBatches), "the built-in task's"
    images, targets = train.images[:count], train.targets[:count]
    return replace(task, train=TensorBatches(images, targets, train.batch_size, shuffle=True, augment=train.augment))


def _trained(task: Task, sparsity: float, training: Finetune, seed: int, path: Path) -> float:
    """Write the pruned network, trained on, to ``path`` unless it is there; its multiply-accumulates."""
    model = task.model
    if sparsity:
        model = PruneChannels(sparsity=sparsity).run(model, task, Context(seed=seed)).model
    count = macs(model, task.example_inputs).value
    if not path.is_file():
        result = training.run(model, task, Context(seed=seed, progress=Said()))
        export_onnx(result.model, task.example_inputs, path)
        print(f"{path.name}: {result.history[-1]['seconds']:.0f} s an epoch", flush=True)
    return count


def _measure(task: Task, files: dict[str, Path], counts: dict[str, float], args: argparse.Namespace) -> None:
    found = {name: evaluate(OnnxRunnable(path), task, split="test") for name, path in files.items()}
    images = task.example_inputs
    timed = compare_latency(files, images, batch_sizes=(BATCH,), seconds=args.seconds)
    rows = [
        Row(
            name,
            counts["original"] / counts[name],
            quality(evaluation, task),
            paired_drop(found["original"], evaluation, task),
            paired_drop(found["original, trained on"], evaluation, task),
            timed[name][f"latency_ms_batch_{BATCH}"],
            timed[name].get(f"speedup_batch_{BATCH}"),
        )
        for name, evaluation in found.items()
    ]
    write_page(rows, args.epochs, args.lr, BATCH)


if __name__ == "__main__":
    main()
