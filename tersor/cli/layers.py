"""Commands that look at layers one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.output import DebugOption, JsonOption, Output, QuietOption
from tersor.cli.values import parse_points


def sensitivity(
    task: Annotated[
        str,
        typer.Argument(help="digits, fashion, a Python file with task() -> tersor.Task, or package.module:function."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for sensitivity.json and sensitivity.html.")],
    sparsity: Annotated[
        list[float] | None, typer.Option(help="A fraction to try, repeatable. Default: 0.5, 0.7, 0.8, 0.9, 0.95.")
    ] = None,
    pattern: Annotated[
        str, typer.Option(help="element, n:m along the inputs (2:4), or blocks rxc of outputs x inputs (4x1).")
    ] = "element",
    max_drop: Annotated[str, typer.Option(help="What one layer alone may cost of the metric, such as 1%.")] = "1%",
    overall: Annotated[
        float | None, typer.Option(help="A sparsity of all layers together, divided at the least predicted loss.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Validation samples to judge by.", min=1)] = 1024,
    seconds: Annotated[float | None, typer.Option(help="Stop measuring after this many seconds.", min=0.1)] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Prune one layer at a time, and say how much each bears; nothing is changed.

    By the size of weights, at several sparsities, on validation data; and which sparsity follows for each layer.
    """
    from tersor.jobs.prune_file import parse_pattern
    from tersor.jobs.sensitivity import sensitivity as job
    from tersor.measure.sensitivity import SPARSITIES, Probe
    from tersor.prune.sparse.prune import Prune
    from tersor.report.sensitivity import sensitivity_view

    output = Output(quiet=quiet, as_json=as_json)
    probe = Probe(tuple(sparsity or SPARSITIES), Prune(pattern=parse_pattern(pattern)), samples, seconds)
    done = job(
        task, out, probe=probe, max_drop=parse_points(max_drop) or 0.0, overall=overall, progress=output.progress
    )
    output.json(done.data)
    output.show(sensitivity_view(done.data))
    output.show(f"page: {out / 'sensitivity.html'}")
