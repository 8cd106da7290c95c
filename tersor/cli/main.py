"""The ``tersor`` command: thin commands over tersor.jobs."""

from __future__ import annotations

import sys
import traceback
import warnings
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.console import Console

from tersor.cli import benchmark, distill, evaluate, hardware, layers, weights
from tersor.cli.interrupt import insistent_interrupts
from tersor.cli.output import (
    EXIT_CODES,
    DebugOption,
    FormatOption,
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
    output_put_back,
    set_threads,
)
from tersor.cli.values import parse_words
from tersor.core.errors import TersorError
from tersor.recipes.built_in import BUILT_IN

RESUMABLE = ("compress", "resume", "distill")

app = typer.Typer(
    name="tersor", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None,
    help=f"Make a trained PyTorch model smaller and faster, and prove that it still behaves.\n\n{EXIT_CODES}",
)  # fmt: skip

RecipeOption = Annotated[
    str,
    typer.Option("--recipe", "-r", help=f"{', '.join(BUILT_IN)}, or a YAML file (see: tersor recipes)."),
]
RunArgument = Annotated[Path, typer.Argument(help="A run's folder, as tersor compress made it.")]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        sys.stdout.write(f"tersor {version('tersor')}\n")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command(epilog=EXIT_CODES)
def compress(
    task: TaskArgument,
    out: OutOption,
    recipe: RecipeOption = "balanced",
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
    """Compress a model by a recipe, and prove the result.

    Every step is verified and measured; the result is exported to ONNX and told in a report.
    """
    from tersor.jobs.compress import compress as job
    from tersor.run.measure_step import Timing

    set_threads(threads)
    output = Output(quiet=quiet, as_json=as_json)
    budgets = budgets_of(max_drop, max_size, max_latency)
    timing = Timing(timing_seconds, threads)
    done = job(task, recipe, out, budgets=budgets, seed=seed, timing=timing, progress=output.progress)
    conclude(output, done.folder, done.summary)


@app.command(epilog=EXIT_CODES)
def resume(
    run: RunArgument, quiet: QuietOption = False, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Go on with a run that was stopped at any moment.

    Finished steps and epochs are kept; the weights end as without the stop (same machine).
    """
    from tersor.jobs.compress import resume as job

    output = Output(quiet=quiet, as_json=as_json)
    done = job(run, progress=output.progress)
    conclude(output, done.folder, done.summary)


@app.command(epilog=EXIT_CODES)
def inspect(
    task: Annotated[str, typer.Argument(metavar="TASK|FILE", help="A task as for compress, or a file of weights.")],
    groups: Annotated[bool, typer.Option("--groups", help="Also list the channels that can only go together.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a model, or a file of weights, is made of; nothing is changed.

    Size, parameters, MACs, a table of layers, redundancy and natural sparsity of the weights. Of a file of weights
    (safetensors, a sharded checkpoint, .npz): tensors, zeros, magnitudes, bytes in the smallest encoding and zipped.
    """
    from tersor.files.open import is_weights

    if is_weights(task):
        weights.inspect_file(task, Output(quiet=quiet, as_json=as_json))
        return
    from tersor.jobs.inspect import inspect as job
    from tersor.report.terminal import inspection_view

    output = Output(quiet=quiet, as_json=as_json)
    found = job(task, groups=groups, progress=output.progress)
    output.json(found.to_json())
    output.show(inspection_view(found.to_json()))


@app.command(epilog=EXIT_CODES)
def plan(
    task: TaskArgument,
    recipe: RecipeOption = "balanced",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Dry run: show what each step of a recipe would do.

    What it would do to which layer, what it would skip and why, estimated time and memory.
    """
    from tersor.jobs.dry_run import dry_run
    from tersor.report.terminal import dry_run_view

    output = Output(quiet=quiet, as_json=as_json)
    steps = [step.to_json() for step in dry_run(task, recipe, progress=output.progress)]
    output.json(steps)
    output.show(dry_run_view(steps))


@app.command(epilog=EXIT_CODES)
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, of an evaluation or of a benchmark.")],
    formats: FormatOption = "html",
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Rebuild a report from its numbers.

    Of a run, with the evaluation and the benchmark that lie in its folder, and its model card; else of an evaluation or
    a benchmark alone.
    """
    from tersor.report.write import write_reports

    for path in write_reports(folder, parse_words(formats)):
        Output(quiet=quiet, as_json=False).show(str(path))


@app.command("load-check", epilog=EXIT_CODES)
def load_check(
    run: RunArgument, quiet: QuietOption = False, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Load what a run shipped, both ways, and compare.

    The artifact into the original architecture, the ONNX file into ONNX Runtime; both against the summary.
    """
    from tersor.jobs.load_check import load_check as job
    from tersor.report.onnx_facts import load_check_view
    from tersor.report.schema import parse_summary
    from tersor.run.folder import RunFolder, read_json

    output = Output(quiet=quiet, as_json=as_json)
    found = job(run, progress=output.progress)
    output.json(found)
    task = parse_summary(read_json(RunFolder.open(run).summary)).task
    output.show(load_check_view(found, task.metric, task.metric_unit))


@app.command(epilog=EXIT_CODES)
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this recipe with every setting spelled out.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the built-in recipes, or show one as YAML.

    The YAML has every setting spelled out: start your own recipe from it.
    """
    from tersor.recipes.recipe import read_recipe, to_yaml

    output = Output(quiet=False, as_json=as_json)
    if name is not None:
        recipe = read_recipe(name)
        output.json(recipe.to_json())
        if not as_json:
            sys.stdout.write(to_yaml(recipe))
        return
    found = [read_recipe(each) for each in BUILT_IN]
    output.json([recipe.to_json() for recipe in found])
    for recipe in found:
        steps = "\n".join(f"    {step.name}: {step.title}" for step in recipe.steps)
        output.show(f"{recipe.name}: {recipe.explanation}\n{steps}\n")
    output.show("tersor recipes NAME prints one with every setting, to start your own from.")


app.command(epilog=EXIT_CODES)(distill.distill)
app.command(epilog=EXIT_CODES)(weights.prune)
app.command(epilog=EXIT_CODES)(weights.quantize)
app.command(epilog=EXIT_CODES)(weights.dequantize)
app.command(epilog=EXIT_CODES)(layers.sensitivity)
app.command(epilog=evaluate.EXIT_CODES)(evaluate.evaluate)
app.command(epilog=EXIT_CODES)(benchmark.benchmark)
app.command(epilog=EXIT_CODES)(hardware.fits)
app.command(epilog=EXIT_CODES)(hardware.profiles)
app.command(epilog=EXIT_CODES)(hardware.advise)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; every error becomes one message and an exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    form = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        with output_put_back(), insistent_interrupts():
            app(args=given, prog_name="tersor", standalone_mode=True)
    except SystemExit as done:
        code = int(done.code or 0)
        return _fail(_interrupted(given), done, code, given) if code == 130 else code
    except TersorError as error:
        return _fail(str(error), error, error.exit_code, given)
    except KeyboardInterrupt as error:
        return _fail(_interrupted(given), error, 130, given)
    except Exception as error:  # the last door: a defect of ours, told in one line
        told = f"unexpected {type(error).__name__}: {error}. This is a defect of Tersor: report what --debug shows."
        return _fail(told, error, 1, given)
    finally:
        warnings.formatwarning = form
    return 0


def _interrupted(arguments: list[str]) -> str:
    kept = arguments and arguments[0] in RESUMABLE
    run = quote(str(_run_of(arguments))) if kept else ""
    return "interrupted" + (f"; finished steps and epochs are kept: tersor resume {run} goes on" if kept else "")


def _run_of(arguments: list[str]) -> Path | str:
    """The run's folder that a command was given, however it was written (-o X, --out=X); RUN where there is none."""
    command = typer.main.get_group(app).commands[arguments[0]]
    with command.make_context(arguments[0], arguments[1:], resilient_parsing=True) as context:
        return context.params.get("out") or context.params.get("run") or "RUN"


def _fail(message: str, error: BaseException, code: int, arguments: list[str]) -> int:
    if "--debug" in arguments:
        traceback.print_exception(error)
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"tersor: {message}", markup=False)
    return code


def entry() -> None:
    """The console script."""
    sys.exit(main())
