"""Commands on files of weights: no model class, no task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.output import DebugOption, JsonOption, Output, QuietOption

SourceArgument = Annotated[
    Path, typer.Argument(help="NAME.safetensors, NAME.npz, or a sharded checkpoint (its folder or *.index.json).")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="The new file; of a sharded checkpoint a new folder.")]
WhereOption = Annotated[
    list[str] | None, typer.Option(help="'NAME GLOB' of tensors, repeatable. Default: those of two or more axes.")
]


def prune(
    source: SourceArgument,
    out: OutOption,
    sparsity: Annotated[
        list[str] | None,
        typer.Option(help="Share of zeros, 0.9 or 90%; or 'GLOB=90%', repeatable: the first that matches counts."),
    ] = None,
    scope: Annotated[
        str, typer.Option(help="layer: of each tensor; global: of all together, one threshold.")
    ] = "layer",
    pattern: Annotated[
        str, typer.Option(help="element, n:m along the inputs (2:4), or blocks rxc of outputs x inputs (4x1).")
    ] = "element",
    where: WhereOption = None,
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


def quantize(
    source: SourceArgument,
    out: OutOption,
    bits: Annotated[
        list[str] | None,
        typer.Option(help="2 to 8; or 'GLOB=4', repeatable: the first that matches counts; 'GLOB=none' stays float."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="One scale for each run of so many numbers of a row. Default: one for each row.")
    ] = None,
    affine: Annotated[
        bool, typer.Option("--affine", help="With zero points: for weights that lie more to one side of zero.")
    ] = False,
    range_: Annotated[
        str, typer.Option("--range", help="min_max, or mean_squared_error: searches what to clip, much slower.")
    ] = "min_max",
    dtype: Annotated[
        str | None, typer.Option(help="float16 or bfloat16: everything else in floating point is cast to it.")
    ] = None,
    where: WhereOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Store the weights of a file as packed integers, or cast them; the model's class is not needed.

    Rounding to nearest. tersor.load_weights reads the result in Python; tersor dequantize writes it out as numbers.
    """
    from tersor.jobs.quantize_file import quantize_file
    from tersor.report.weights import quantized_view

    output = Output(quiet=quiet, as_json=as_json)
    done = quantize_file(
        source, out, bits or None, group_size=group_size, symmetric=not affine, range=range_, dtype=dtype,
        where=where or (), progress=output.progress,
    )  # fmt: skip
    output.json(done.to_json())
    output.show(quantized_view(done.to_json()))


def dequantize(
    source: SourceArgument,
    out: OutOption,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write out the numbers that a quantised file of weights stands for.

    Under their first names, shapes and types, so that any program reads them.
    """
    from tersor.jobs.quantize_file import dequantize_file

    output = Output(quiet=quiet, as_json=as_json)
    names = dequantize_file(source, out, output.progress)
    output.json({"source": str(source), "out": str(out), "tensors": list(names)})
    output.show(f"{len(names)} tensors are numbers again: {out}")


def inspect_file(source: str, output: Output) -> None:
    """What ``tersor inspect`` shows of a file of weights."""
    from tersor.jobs.prune_file import inspect_file as job
    from tersor.report.weights import weights_view

    found = job(source, output.progress).to_json()
    output.json(found)
    output.show(weights_view(found))
