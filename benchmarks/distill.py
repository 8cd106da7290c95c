"""Distillation on Fashion-MNIST: a small student alone and taught, cached and not, and what an epoch costs.

    python -m benchmarks.distill
    python -m benchmarks.distill --seeds 1 --epochs 1 --images 2000 --test-images 1000 --teacher-epochs 1

Every arm and seed is kept in --out as it is done, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import nn

from benchmarks.distillation.arms import ARMS, TRANSFORMER, Arm, Teaching
from benchmarks.distillation.clock import Ratio, measure
from benchmarks.distillation.page import claims, page
from benchmarks.distillation.tasks import limited, student_of, teacher_task, transformer
from benchmarks.results import Finished, Log
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

OUT = Path("runs/bench-distill")


def main() -> None:
    """Run every arm for every seed, measure what an epoch costs, and write docs/benchmarks/distill.md."""
    args = _arguments()
    progress = RichProgress(console=Console(), quiet=args.quiet)
    tasks = [teacher_task(seed, args.teacher_epochs, progress) for seed in range(max(2, args.seeds))]
    chosen = [arm for arm in ARMS if not args.only or any(part in arm.name for part in args.only)]
    asked = any(arm.name == TRANSFORMER for arm in chosen)
    vit = transformer(tasks[0], args.transformer_epochs, progress) if asked else None
    tasks = [limited(task, args.images, args.test_images) for task in tasks]
    log = Log(args.out / "fashion.jsonl", {"images": args.images, "test": args.test_images})
    found: dict[str, list[Finished]] = {}
    for seed in range(args.seeds):
        others = tasks[(seed + 1) % len(tasks)].model
        teaching = Teaching(tasks[seed].model, others, vit, args.out / "answers" / str(seed))
        for arm in chosen:
            done = _once(log, arm, tasks[seed], teaching, seed, _training(args), progress)
            found.setdefault(arm.name, []).append(done)
            print(f"seed {seed}, {arm.name}: {done.accuracy:.2f} %, {done.training:.1f} s", flush=True)
    timed = replace(tasks[0], reference=tasks[0].model, model=student_of(0)).complete()
    ratios = measure(timed, args.out / "timing", args.timed_images, args.rounds) if args.rounds else ()
    models = {"residual network": [task.model for task in tasks]} | ({"transformer": [vit]} if vit else {})
    _write(args, found, models, tasks[0], ratios)


def _once(
    log: Log, arm: Arm, task: Task, teaching: Teaching, seed: int, training: Finetune, progress: Progress
) -> Finished:
    teacher = arm.task(task, teaching).reference
    assert teacher is not None, "every arm names its own, also the one that does not ask it"
    step = replace(training, objective=arm.objective)
    settings = {"arm": arm.name, "step": str(step), "seed": seed, "teacher": checksum(teacher)}
    return log.once(settings, lambda: _finish(arm, step, task, teaching, seed, progress))


def _finish(arm: Arm, step: Finetune, task: Task, teaching: Teaching, seed: int, progress: Progress) -> Finished:
    student = student_of(seed)
    mine = arm.task(replace(task, model=student), teaching).complete()
    begun = time.monotonic()
    trained = step.run(student, mine, Context(seed, None, progress)).model
    seconds = time.monotonic() - begun
    right = evaluate(trained, mine, "test").values.astype(bool)
    return Finished(_size(teaching.own) / _size(student), 0.0, seconds, right)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _training(args: argparse.Namespace) -> Finetune:
    return Finetune(args.epochs, optimizer=Optimizer(lr=args.lr), schedule=OneCycle(), precision="bf16", keep="last")


def _write(
    args: argparse.Namespace, found: dict[str, list[Finished]], models: dict[str, list[nn.Module]], task: Task,
    ratios: tuple[Ratio, ...],
) -> None:  # fmt: skip
    complete = task.complete()
    accuracy = {
        name: [100 * float(evaluate(model, complete, "test").values.mean()) for model in group]
        for name, group in models.items()
    }
    first, teacher = student_of(0), models["residual network"][0]
    also = f" and {_size(models['transformer'][0]):,} (a transformer, " if "transformer" in models else ""
    also += f"{args.transformer_epochs} epochs)" if also else ""
    said = (
        f"A student of {_size(first):,} parameters; teachers of {_size(teacher):,} (residual networks, one for each of "
        f"{args.seeds} seeds, {args.teacher_epochs} epochs){also}. "
        f"Every arm trains for {args.epochs} epochs on {args.images or 'all'} "
        f"images, in bf16, by SGD with one cycle up to {args.lr:g}, the last epoch counts, and losses have their "
        "default weights: nothing was chosen on the test set. Two teachers: the seed's own and the next one's. Two "
        "views: augmentation that comes again after two epochs, which the cache needs."
    )
    write(
        "distill", "Distillation: a student alone and taught", page(said, found, accuracy, ratios), "make bench-distill"
    )
    made = claims(found, ratios)
    print(f"{sum(claim.holds is True for claim in made)} of {len(made)} claims hold", flush=True)
    for claim in made:
        if claim.holds is False:
            print(f"missed: {claim.text}. Found: {claim.found}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4, help="of every student")
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate of every student")
    parser.add_argument("--teacher-epochs", type=int, default=5, help="of the residual teachers")
    parser.add_argument("--transformer-epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=30_000, help="that students are trained on, of 60,000")
    parser.add_argument("--test-images", type=int, default=None, help="fewer test images, to try it out")
    parser.add_argument("--only", nargs="+", default=(), help="arms whose name holds one of these")
    parser.add_argument("--rounds", type=int, default=15, help="of timing; 0: none")
    parser.add_argument("--timed-images", type=int, default=12_800, help="of one timed epoch")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quiet", action="store_true", help="no bars")
    return parser.parse_args()


if __name__ == "__main__":
    main()
