"""Commands that look at layers one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.cli.output import DebugOption, JsonOption, Output, QuietOption, ThreadsOption, set_threads
from tersor.cli.values import parse_bytes, parse_milliseconds, parse_points, parse_share
from tersor.core.errors import InputError


def sensitivity(
    task: Annotated[
        str,
        typer.Argument(help="digits, fashion, a Python file with task() -> tersor.Task, or package.module:function."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for sensitivity.json and sensitivity.html.")],
    sparsity: Annotated[
        list[str] | None, typer.Option(help="A share to try, repeatable. Default: 50%, 70%, 80%, 90%, 95% (0.5 …).")
    ] = None,
    pattern: Annotated[
        str, typer.Option(help="element, n:m along the inputs (2:4), or blocks rxc of outputs x inputs (4x1).")
    ] = "element",
    max_drop: Annotated[str, typer.Option(help="What one layer alone may cost of the metric, such as 1%.")] = "1%",
    overall: Annotated[
        str | None, typer.Option(help="A sparsity of all layers together (90%), divided at the least predicted loss.")
    ] = None,
    bits: Annotated[
        list[int] | None, typer.Option(help="Quantise instead of prune: a width to try, repeatable (8, 4, 3, 2).")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="With --bits: bytes of all weights together, such as 40KB, at the least loss.")
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option(help="With --bits: time of all kernels together at batch 1, such as 2ms.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Validation samples to judge by.", min=1)] = 1024,
    seconds: Annotated[float | None, typer.Option(help="Stop measuring after this many seconds.", min=0.1)] = None,
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Prune (or quantise) one layer at a time, and say how much each bears; nothing is changed.

    By the size of weights, at several sparsities, on validation data; and which sparsity follows for each layer. With
    --bits: at several widths; and which layers stay float, and how many bits the others get.
    """
    from tersor.report.sensitivity import sensitivity_view

    set_threads(threads)
    output = Output(quiet=quiet, as_json=as_json)
    drop = parse_points(max_drop) or 0.0
    given: dict[str, Any] = {"--max-size": max_size, "--max-latency": max_latency}
    if bits:
        given = {"--sparsity": sparsity, "--overall": overall, "--pattern": None if pattern == "element" else pattern}
    useless = [name for name, value in given.items() if value is not None]
    if useless:
        raise InputError(
            "says nothing here", where=", ".join(useless),
            expected="--max-size or --max-latency with --bits, or --sparsity, --pattern and --overall without",
            do="Leave one out",
        )  # fmt: skip
    if bits:
        done: Any = _quantised(task, out, tuple(bits), (max_size, max_latency), drop, samples, seconds, threads, output)
    else:
        tried = tuple(parse_share(each, "--sparsity") or 0.0 for each in sparsity or ())
        total = parse_share(overall, "--overall")
        done = _pruned(task, out, tried, pattern, total, drop, samples, seconds, output)
    output.json(done.data)
    output.show(sensitivity_view(done.data))
    for layer, reason in done.data["within"].get("kept_float", {}).items():
        output.show(f"{layer} stays float: {reason}")
    output.show(f"page: {out / 'sensitivity.html'}")


def _quantised(
    task: str, out: Path, bits: tuple[int, ...], budgets: tuple[str | None, str | None], drop: float, samples: int,
    seconds: float | None, threads: int | None, output: Output,
) -> Any:  # fmt: skip
    from tersor.jobs.bit_sensitivity import bit_sensitivity
    from tersor.measure.bit_sensitivity import BitProbe

    probe = BitProbe(bits, samples=samples, seconds=seconds)
    size, latency = parse_bytes(budgets[0]), parse_milliseconds(budgets[1])
    return bit_sensitivity(
        task, out, probe=probe, max_drop=drop, max_size=size, max_latency=latency, threads=threads,
        progress=output.progress,
    )  # fmt: skip


def _pruned(
    task: str, out: Path, sparsities: tuple[float, ...], pattern: str, overall: float | None, drop: float,
    samples: int, seconds: float | None, output: Output,
) -> Any:  # fmt: skip
    from tersor.jobs.prune_file import parse_pattern
    from tersor.jobs.sensitivity import sensitivity as job
    from tersor.measure.sensitivity import SPARSITIES, Probe
    from tersor.prune.sparse.prune import Prune

    probe = Probe(sparsities or SPARSITIES, Prune(pattern=parse_pattern(pattern)), samples, seconds)
    return job(task, out, probe=probe, max_drop=drop, overall=overall, progress=output.progress)
