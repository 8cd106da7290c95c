"""The command that compares a compressed model with its original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.output import (
    DebugOption,
    FormatOption,
    JsonOption,
    Output,
    QuietOption,
    ThreadsOption,
    set_threads,
    show_reports,
)
from tersor.cli.values import parse_points, parse_share, parse_words
from tersor.core.errors import InputError

EXIT_CODES = """
Exit codes: 0 within every limit (or none asked); 1 failed; 2 wrong usage or input; 3 a limit is broken; 4 not enough
data to tell; 130 interrupted.
"""
FAILED, UNTOLD = 3, 4
_MODEL = "task (the data's own model), a file .onnx, the folder of a run or an artifact, file.py:function"


def evaluate(
    original: Annotated[str, typer.Argument(help=f"The original: {_MODEL}.")],
    compressed: Annotated[str, typer.Argument(help="The compressed model, named alike.")],
    data: Annotated[
        str, typer.Option("--data", help="As TASK of compress; its function may return tersor.EvaluationData too.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for evaluation.json and its report.")
    ] = None,
    formats: FormatOption = "html",
    max_drop: Annotated[str | None, typer.Option(help="Largest loss of the metric in points, such as 1%.")] = None,
    min_agreement: Annotated[str | None, typer.Option(help="Smallest share of equal answers, such as 97%.")] = None,
    max_ece_increase: Annotated[
        float | None, typer.Option(help="Largest rise of the expected calibration error, such as 0.02.", min=0)
    ] = None,
    max_group_gap: Annotated[
        str | None, typer.Option(help="How much more than all others a group may lose, such as 2%.")
    ] = None,
    application: Annotated[
        str | None,
        typer.Option(help="Preset of --max-drop: safety 1, medical 2, classification 5, ranking 10, generative 15."),
    ] = None,
    severities: Annotated[str, typer.Option(help="Of corruptions, 1 to 5; none: no corruptions.")] = "1,3,5",
    budgets: Annotated[
        str, typer.Option(help="Of attacks, of pixels in [0, 1] or in 255ths; none: no attacks.")
    ] = "2/255,8/255",
    stress_samples: Annotated[int, typer.Option(help="Samples that are corrupted and attacked.", min=1)] = 500,
    stress_seconds: Annotated[float, typer.Option(help="About how long that may take.", min=0.1)] = 120.0,
    limit: Annotated[int | None, typer.Option(help="Only so many test samples.", min=1)] = None,
    shown: Annotated[int, typer.Option(help="Worst samples kept with their inputs.", min=0)] = 16,
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare a compressed model with its original, and hold it to limits.

    Two PyTorch models, two ONNX files or one of each, whoever made them: quality, agreement, flips, calibration,
    robustness, groups, data from elsewhere, each with its interval.
    """
    from tersor.jobs.evaluate import evaluate as job
    from tersor.measure.behaviour.gate import Limits
    from tersor.measure.behaviour.robustness import Stress
    from tersor.report.comparison import comparison_view, gate_line

    set_threads(threads)
    output = Output(quiet=quiet, as_json=as_json)
    limits = Limits(
        parse_points(max_drop), parse_share(min_agreement, "--min-agreement"), max_ece_increase,
        parse_points(max_group_gap, "--max-group-gap"), application,
    )  # fmt: skip
    tried, within = _integers(severities), _budgets(budgets)
    stress = Stress(stress_samples, tried, within, 10 if within else 0, stress_seconds) if tried or within else None
    done = job(
        original, compressed, data, out, limits=limits, stress=stress, shown=shown, limit=limit, threads=threads,
        formats=parse_words(formats), progress=output.progress,
    )  # fmt: skip
    found = done.to_json()
    output.json(found)
    output.show(comparison_view(found))
    if not output.as_json:
        output.console.print(gate_line(found))
    if out is not None:
        output.show(f"numbers: {out / 'evaluation.json'}")
        show_reports(output, out / "evaluation", formats)
    code = {"failed": FAILED, "not enough data": UNTOLD}.get(done.gate.status, 0)
    if code:
        raise typer.Exit(code)


def _integers(text: str) -> tuple[int, ...]:
    try:
        return () if text == "none" else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError("not severities", where="--severities", got=repr(text), expected="1,3,5, or none") from None


def _budgets(text: str) -> tuple[float, ...]:
    def number(part: str) -> float:
        above, slash, below = part.partition("/")
        return float(above) / float(below) if slash else float(above)

    try:
        return () if text == "none" else tuple(number(part) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        expected = "2/255,8/255, or none"
        raise InputError("not budgets", where="--budgets", got=repr(text), expected=expected) from None
