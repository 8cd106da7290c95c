"""Commands on files of weights: no model class, no task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.output import DebugOption, JsonOption, Output, QuietOption

SourceArgument = Annotated[
    Path, typer.Argument(help="NAME.safetensors, NAME.npz, or a sharded checkpoint (its folder or *.index.json).")
]


def prune(
    source: SourceArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The new file; of a sharded checkpoint a new folder.")],
    sparsity: Annotated[
        list[str] | None,
        typer.Option(help="Fraction of zeros, such as 0.9; or 'GLOB=0.9', repeatable: the first that matches counts."),
    ] = None,
    scope: Annotated[
        str, typer.Option(help="layer: of each tensor; global: of all together, one threshold.")
    ] = "layer",
    pattern: Annotated[
        str, typer.Option(help="element, n:m along the inputs (2:4), or blocks rxc of outputs x inputs (4x1).")
    ] = "element",
    where: Annotated[
        list[str] | None,
        typer.Option(help="'NAME GLOB' of tensors, repeatable. Default: those of two or more axes."),
    ] = None,
    allow_empty: Annotated[bool, typer.Option("--allow-empty", help="A tensor may lose every weight.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Set the smallest weights of a file to zero; the model's class is not needed.

    Names, shapes, types, metadata and every other weight stay as they are. Counts are exact, also for one threshold
    over a file larger than memory.
    """
    from tersor.jobs.prune_file import prune_file
    from tersor.report.weights import pruned_view

    output = Output(quiet=quiet, as_json=as_json)
    done = prune_file(
        source, out, sparsity, scope=scope, pattern=pattern, where=where or (), allow_empty=allow_empty,
        progress=output.progress,
    )  # fmt: skip
    output.json(done.to_json())
    output.show(pruned_view(done.to_json()))


def inspect_file(source: str, output: Output) -> None:
    """What ``tersor inspect`` shows of a file of weights."""
    from tersor.jobs.prune_file import inspect_file as job
    from tersor.report.weights import weights_view

    found = job(source, output.progress).to_json()
    output.json(found)
    output.show(weights_view(found))
