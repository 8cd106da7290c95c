"""The command that measures models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.cli.output import DebugOption, FormatOption, JsonOption, Output, QuietOption, show_reports
from tersor.cli.values import parse_counts, parse_words

_MODEL = "A file .onnx, the folder of a run or an artifact, file.py:function, or task (the data's own model)"


def benchmark(
    models: Annotated[
        list[str], typer.Argument(metavar="A B …", help=f"{_MODEL}. The others are compared with the first.")
    ],
    data: Annotated[
        str | None, typer.Option("--data", help="Whose inputs they are given, as for evaluate; ONNX files do without.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for benchmark.json and its report.")] = None,
    formats: FormatOption = "html",
    batch_sizes: Annotated[str, typer.Option("--batch", help="Samples in a call, such as 1,32.")] = "1,32",
    threads: Annotated[
        str | None, typer.Option(help="Threads within an operator, such as 1,4; default: the physical cores.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Seconds to time each batch size for.", min=0.05)] = 2.0,
    window: Annotated[float, typer.Option(help="Seconds to count throughput for; 0: not at all.", min=0)] = 1.0,
    starts: Annotated[
        int, typer.Option(help="Fresh processes for load time and memory; 0: none; 6 for intervals.", min=0)
    ] = 6,
    engines: Annotated[
        str, typer.Option("--engine", help="For PyTorch models: eager, compile, onnxruntime, or several.")
    ] = "eager",
    providers: Annotated[str | None, typer.Option(help="Of ONNX Runtime, such as cuda; default: the CPU's.")] = None,
    device: Annotated[str, typer.Option(help="Of PyTorch models: cpu or cuda.")] = "cpu",
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Measure each model in bfloat16 too.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure models side by side on this machine.

    Latency (mean, p50, p95, p99) in turns, throughput, load time, peak memory, bytes and energy, in fresh processes,
    each with its interval; and whether one is faster than the other.
    """
    from tersor.jobs.benchmark import benchmark as job
    from tersor.jobs.contenders import Engines
    from tersor.measure.benchmark import Conditions
    from tersor.report.benchmarks import benchmark_view, verdict_lines

    output = Output(quiet=quiet, as_json=as_json)
    sizes = parse_counts(batch_sizes, "--batch")
    counts = () if threads is None else parse_counts(threads, "--threads")
    conditions = Conditions(sizes, counts, seconds, window, starts)
    named: Any = parse_words(engines)
    asked = Engines(named, () if providers is None else parse_words(providers), device, bfloat16)
    found = job(
        *models, data=data, out=out, conditions=conditions, engines=asked, formats=parse_words(formats),
        progress=output.progress,
    ).to_json()  # fmt: skip
    output.json(found)
    output.show(benchmark_view(found))
    if not as_json:
        output.console.print(verdict_lines(found))
    if out is not None:
        output.show(f"numbers: {out / 'benchmark.json'}")
        show_reports(output, out / "benchmark", formats)
