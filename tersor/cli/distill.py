"""The command that distils."""

from __future__ import annotations

from pathlib import Path
from shlex import join
from typing import Annotated

import typer

from tersor.cli.output import (
    DebugOption,
    JsonOption,
    MaxDropOption,
    MaxLatencyOption,
    MaxSizeOption,
    OutOption,
    Output,
    QuietOption,
    SecondsOption,
    SeedOption,
    TaskArgument,
    ThreadsOption,
    budgets_of,
    conclude,
    set_threads,
)
from tersor.cli.values import parse_share


def distill(
    task: TaskArgument,
    out: OutOption,
    student: Annotated[
        str | None, typer.Option(help="What builds the student: package.module:function, or file.py:function.")
    ] = None,
    drop_layers: Annotated[int | None, typer.Option(help="Or: every so many-th layer of the task's model.")] = None,
    prune: Annotated[
        str | None, typer.Option(help="Or: the task's model without this share of its channels, such as 50%.")
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="What gives a trained teacher, named as --student; repeatable. Default: the task's."),
    ] = None,
    loss: Annotated[str, typer.Option(help="distill, soft_targets, decoupled or match_logits.")] = "distill",
    temperature: Annotated[float | None, typer.Option(help="Of the soft targets. Default: 4.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the teacher; labels have 1 - alpha.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.", min=1)] = 10,
    lr: Annotated[float, typer.Option(help="Peak learning rate of SGD with momentum.")] = 0.05,
    cache: Annotated[Path | None, typer.Option(help="A folder to keep the teacher's answers in.")] = None,
    views: Annotated[int, typer.Option(help="Versions of each sample that the cache has.", min=1)] = 4,
    max_drop: MaxDropOption = None,
    max_size: MaxSizeOption = None,
    max_latency: MaxLatencyOption = None,
    seed: SeedOption = 0,
    timing_seconds: SecondsOption = 2.0,
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a student by a teacher, and prove the result.

    The student is measured, exported and reported beside the task's model, which is also the teacher unless --teacher
    says another. tersor resume goes on with a run that was stopped.
    """
    from tersor.distill.cache import TeacherCache
    from tersor.distill.teach import Teach
    from tersor.jobs.compress import told
    from tersor.jobs.distill import distill_student, objective_of
    from tersor.jobs.student import Student
    from tersor.run.measure_step import Timing
    from tersor.train.finetune import Finetune
    from tersor.train.optimizer import Optimizer

    set_threads(threads)
    output = Output(quiet=quiet, as_json=as_json)
    budgets, timing = budgets_of(max_drop, max_size, max_latency), Timing(timing_seconds, threads)
    training = Finetune(epochs, objective_of(loss, temperature, alpha), Optimizer(lr=lr))
    kept = None if cache is None else TeacherCache(str(cache.resolve()), views)
    options = {
        "student": student, "drop-layers": drop_layers, "prune": prune, "loss": loss, "temperature": temperature,
        "alpha": alpha, "epochs": epochs, "lr": lr, "cache": cache, "views": views if cache else None,
    }  # fmt: skip
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    command = ["tersor", "distill", task, "-o", str(out), *given, *(f"--teacher={name}" for name in teacher or ())]
    done = distill_student(
        task, Student(student, drop_layers, parse_share(prune, "--prune")), out, teachers=teacher or (),
        teach=Teach(training, kept), budgets=budgets, seed=seed, timing=timing, progress=output.progress,
        command=join(command) + told(budgets, seed, timing),
    )  # fmt: skip
    conclude(output, done.folder, done.summary)
