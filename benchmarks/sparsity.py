"""Sparsity: accuracy at 80, 90 and 95 % zeros by one shot, repair, SparseGPT and gradual pruning, beside torch's own.

    python -m benchmarks.sparsity                              # Fashion-MNIST, and CIFAR-10 where the checkpoint lies
    python -m benchmarks.sparsity --models fashion --seeds 2 --epochs 1

Every arm and seed is kept in --out as it is done, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from benchmarks.results import Finished, Log
from benchmarks.sparse.arms import Arm, arms, weights_per_nonzero
from benchmarks.sparse.page import Found, claims, section
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

OUT = Path("runs/bench-sparsity")


def main() -> None:
    """Run every arm for every seed, write docs/benchmarks/sparsity.md, and say which claims hold."""
    args = _arguments()
    training = Finetune(
        epochs=args.epochs,
        optimizer=Optimizer(name="sgd", lr=args.lr),
        schedule=OneCycle(),
        precision="bf16",
        keep="last",
    )
    progress = RichProgress(console=Console(), quiet=args.quiet)
    sections, made = [], []
    for name in args.models:
        found = _run(name, args, training, progress)
        if found:
            sections.append(section(TITLES[name], _said(name, args, training), found))
            made += claims(found)
    if not sections:
        raise SystemExit("nothing could be run")
    write("sparsity", "Sparsity: accuracy against zeros", "\n\n".join(sections), by="make bench-sparsity")
    missed = [claim for claim in made if claim.holds is False]
    print(f"{sum(claim.holds is True for claim in made)} of {len(made)} claims hold", flush=True)
    for claim in missed:
        print(f"missed: {claim.text}. Found: {claim.found}")


TITLES = {"fashion": "Fashion-MNIST, a residual network", "resnet20": "CIFAR-10, ResNet-20"}


def _run(name: str, args: argparse.Namespace, training: Finetune, progress: Progress) -> Found:
    log = Log(args.out / f"{name}.jsonl", {"model": name, "images": args.images, "test": args.test_images})
    found: dict[tuple[str, float | None], list[Finished]] = {}
    for seed, task in _tasks(name, args, progress):
        weights = checksum(task.model)
        for arm in arms(training, thorough=name == "fashion"):
            if args.only and not any(part in arm.family for part in args.only):
                continue
            settings = {"arm": str(arm.step), "seed": seed, "weights": weights}
            done = log.once(settings, lambda arm=arm, task=task, seed=seed: _finish(arm, task, seed, progress))
            found.setdefault((arm.family, arm.sparsity), []).append(done)
            label = "" if arm.sparsity is None else f" {100 * arm.sparsity:g} %"
            print(f"{name}, seed {seed}, {arm.family}{label}: {done.accuracy:.2f} %, {done.pruning:.1f} s", flush=True)
    return found


def _tasks(name: str, args: argparse.Namespace, progress: Progress) -> Iterator[tuple[int, Task]]:
    make: Callable[[int], Task | None] = lambda seed: (  # noqa: E731
        fashion_task(seed, args.images, args.test_images, args.original_epochs, progress)
        if name == "fashion"
        else cifar_task(seed, args.images, args.test_images)
    )
    for seed in range(_seeds(name, args)):
        task = make(seed)
        if task is None:
            print(f"{name}: no checkpoint lies in TERSOR_DATA; left out", flush=True)
            return
        yield seed, task


def _finish(arm: Arm, task: Task, seed: int, progress: Progress) -> Finished:
    begun = time.monotonic()
    model = arm.step.run(task.model, task, Context(seed=seed, progress=progress)).model
    seconds = time.monotonic() - begun
    right = evaluate(model, task, "test").values.astype(bool)
    return Finished(weights_per_nonzero(model), seconds, 0.0, right)


def _seeds(name: str, args: argparse.Namespace) -> int:
    return args.seeds if name == "fashion" else min(args.seeds, args.cifar_seeds)


def _said(name: str, args: argparse.Namespace, training: Finetune) -> str:
    original = (
        f"Each of {args.seeds} seeds trains its own original, for {args.original_epochs} epochs"
        if name == "fashion"
        else "One trained original; a seed draws calibration images and the order of training; "
        f"{_seeds(name, args)} of {args.seeds} seeds were run"
    )
    return (
        f"{original}. Where an arm trains, dense too, it is for {training.epochs} epochs by SGD with one cycle up to "
        f"{training.optimizer.lr:g}, and the last epoch counts. Repair is CorrectVariance. Test accuracy: the mean "
        "over seeds (lowest–highest); zeros of all weights; the median of seconds for pruning, repair and training. "
        "Nothing was chosen on the test set."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(TITLES), default=tuple(TITLES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cifar-seeds", type=int, default=3, help="of the seeds, how many on CIFAR-10 too")
    parser.add_argument("--epochs", type=int, default=2, help="of training, in every arm that trains")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate, in every arm that trains")
    parser.add_argument("--original-epochs", type=int, default=5, help="of the originals on Fashion-MNIST")
    parser.add_argument("--images", type=int, default=None, help="fewer training images, to try it out")
    parser.add_argument("--test-images", type=int, default=None, help="fewer test images, to try it out")
    parser.add_argument("--only", nargs="+", default=(), help="arms whose name holds one of these")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quiet", action="store_true", help="no bars")
    return parser.parse_args()


if __name__ == "__main__":
    main()
