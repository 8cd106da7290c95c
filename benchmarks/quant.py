"""Quantisation: speed and bytes of usual architectures, accuracy on Fashion-MNIST and CIFAR-10, peers beside both.

    python -m benchmarks.quant
    python -m benchmarks.quant --parts speed --seconds 5
    python -m benchmarks.quant --parts fashion --seeds 1 --epochs 1 --images 2000 --test-images 1000

Every arm and seed is kept in --out as it is done, so a run that was stopped goes on where it was; speed is measured
anew each time. Peers that are not installed (torchao, neural-compressor) are left out and named.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from benchmarks.claims import Claim
from benchmarks.distillation.tasks import transformer as trained_transformer
from benchmarks.quantization import arms, page, speed
from benchmarks.quantization.networks import NETWORKS
from benchmarks.results import Finished, Log
from benchmarks.sparse.tasks import cifar_task, fashion_task
from benchmarks.structured.training import checksum
from benchmarks.tables import write
from tersor.core.progress import Progress
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.measure.quality import evaluate
from tersor.report.progress import RichProgress
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer
from tersor.train.schedules import OneCycle

OUT = Path("runs/bench-quant")
PARTS = {
    "speed": "Speed and bytes",
    "fashion": "Fashion-MNIST, a residual network",
    "resnet20": "CIFAR-10, ResNet-20",
    "transformer": "Fashion-MNIST, a transformer",
}
PACKAGES = {"torchao": "torchao", "neural-compressor": "neural_compressor"}


def main() -> None:
    """Run the parts, write docs/benchmarks/quant.md, and say which claims hold."""
    args = _arguments()
    progress = RichProgress(console=Console(), quiet=args.quiet)
    sections, made = [], []
    for part in args.parts:
        text, claims = _speed(args) if part == "speed" else _accuracy(part, args, progress)
        sections.append(text)
        made += claims
    absent = [name for name, package in PACKAGES.items() if find_spec(package) is None]
    if absent:
        sections.append(f"Not installed and left out: {', '.join(absent)}.")
    write("quant", "Quantisation: speed, bytes and accuracy", "\n\n".join(sections), by="make bench-quant")
    print(f"{sum(claim.holds is True for claim in made)} of {len(made)} claims hold", flush=True)
    for claim in made:
        if claim.holds is False:
            print(f"missed: {claim.text}. Found: {claim.found}")


def _speed(args: argparse.Namespace) -> tuple[str, list[Claim]]:
    rows = []
    for name in args.networks:
        rows += (made := speed.timed(name, args.out / "files", args.seconds))
        print(speed.rows_table(made), flush=True)
    said = (
        "ONNX Runtime on two threads, batch 1, the files of a network taking turns; medians with 95 % intervals. "
        "Weights are drawn at random, statistics of norms set by three batches; post-training int8, "
        "ranges from the same 8 inputs for both. ONNX Runtime stores bf16 and computes in fp32; dynamic int8 takes no "
        "inputs to calibrate on, and is for networks of linear layers; tables of embeddings are int8 in all int8 files."
    )
    claims = speed.claims(rows)
    lines = [f"## {PARTS['speed']}", said, speed.rows_table(rows), "\n".join(map(page.said_claim, claims))]
    return "\n\n".join(lines), claims


def _accuracy(part: str, args: argparse.Namespace, progress: Progress) -> tuple[str, list[Claim]]:
    training = Finetune(
        epochs=args.epochs, optimizer=Optimizer("adamw", args.lr, weight_decay=0.0), schedule=OneCycle(), keep="last"
    )
    log = Log(args.out / f"{part}.jsonl", {"images": args.images, "test": args.test_images})
    found: dict[str, list[Finished]] = {}
    for seed, task in _tasks(part, args, progress):
        weights = checksum(task.model)
        for arm in _arms(part, training):
            if args.only and not any(text in arm.name for text in args.only):
                continue
            settings = {"arm": arm.name, "said": arm.said, "seed": seed, "weights": weights}
            run = partial(_finish, arm, task, seed, args.out, progress)
            done = log.once(settings, run)
            found.setdefault(arm.name, []).append(done)
            print(f"{part}, seed {seed}, {arm.name}: {done.accuracy:.2f} %, {done.pruning:.1f} s", flush=True)
    return page.section(PARTS[part], _said(part, training), found), page.claims(PARTS[part], found)


def _tasks(part: str, args: argparse.Namespace, progress: Progress) -> Iterable[tuple[int, Task]]:
    for seed in range(args.seeds if part != "transformer" else 1):
        if part == "resnet20":
            task = cifar_task(seed, args.images, args.test_images)
            if task is None:
                print("resnet20: no checkpoint lies in TERSOR_DATA; left out", flush=True)
                return
        else:
            task = fashion_task(seed, args.images, args.test_images, args.original_epochs, progress)
        if part == "transformer":
            model = trained_transformer(task, args.transformer_epochs, progress)
            task = Task(
                model=model, name="fashion", train=task.train, validation=task.validation, test=task.test,
                calibration=task.calibration, metric=task.metric, example_inputs=task.example_inputs,
            ).complete()  # fmt: skip
        yield seed, task


def _arms(part: str, training: Finetune) -> list[arms.Arm]:
    every = arms.transformer() if part == "transformer" else arms.convolutional(training)
    absent = [name for name, package in PACKAGES.items() if find_spec(package) is None]
    return [arm for arm in every if not any(name in arm.name for name in absent)]


def _finish(arm: arms.Arm, task: Task, seed: int, out: Path, progress: Progress) -> Finished:
    (out / "files").mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    made = arm.make(task, Context(seed=seed, progress=progress), out / "files" / f"{task.name}-{seed}.onnx")
    seconds = time.monotonic() - begun
    return Finished(1.0, seconds, 0.0, evaluate(made, task, "test").values.astype(bool))


def _said(part: str, training: Finetune) -> str:
    if part == "transformer":
        return "One trained transformer of four blocks; weights alone, a scale for each 32 inputs of an output."
    whose = "Each seed trains its own original" if part == "fashion" else "One trained original; a seed draws the order"
    return (
        f"{whose}. Whoever trains does so for {training.epochs} epochs by AdamW with one cycle up to "
        f"{training.optimizer.lr:g}, taught by the original, and the last epoch counts. int8 arms and QAT are "
        "evaluated by ONNX Runtime from their files, the others in PyTorch. Accuracy on the test set: the mean over "
        "seeds (lowest–highest); seconds are of the whole arm. Nothing was chosen on the test set."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=tuple(NETWORKS), help="of speed")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing for each network")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="of training, in every arm that trains")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate, in every arm that trains")
    parser.add_argument("--original-epochs", type=int, default=5, help="of the originals on Fashion-MNIST")
    parser.add_argument("--transformer-epochs", type=int, default=5, help="of the transformer on Fashion-MNIST")
    parser.add_argument("--images", type=int, default=None, help="fewer training images, to try it out")
    parser.add_argument("--test-images", type=int, default=None, help="fewer test images, to try it out")
    parser.add_argument("--only", nargs="+", default=(), help="arms whose name holds one of these")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quiet", action="store_true", help="no bars")
    return parser.parse_args()


if __name__ == "__main__":
    main()
