"""Commands about devices: what fits where, the profiles, advice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.output import (
    DebugOption,
    FormatOption,
    JsonOption,
    Output,
    QuietOption,
    TaskArgument,
    ThreadsOption,
    show_reports,
)
from tersor.cli.values import parse_points, parse_sizes, parse_words

OnOption = Annotated[
    str, typer.Option("--on", help="this (the machine, measured once), profiles (phone,iot,…) or YAML files.")
]


def fits(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A task as for compress, an ONNX file, or a run.")],
    on: OnOption = "this",
    batch: Annotated[int, typer.Option(help="Samples in a pass.", min=1)] = 1,
    context: Annotated[
        int | None, typer.Option(help="Tokens in a decoder's key-value cache; default: as many as it can.", min=1)
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Of dimensions that an ONNX file leaves open: sequence=128,width=224.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for fits.json and its report.")] = None,
    formats: FormatOption = "html",
    layers: Annotated[bool, typer.Option("--layers", help="Also each layer under the roofline.")] = False,
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say whether a model fits on devices, about how fast it is there, and what would make it fit.

    Weights, activations at their peak and a decoder's key-value cache against the device's memory; latency by roofline,
    an estimate; at which bits and sparsity it would fit; what commonly goes wrong there.
    """
    from rich.text import Text

    from tersor.hardware.profile import find_profiles
    from tersor.jobs.fits import fits as job
    from tersor.report.hardware import fits_view, roofline_view

    output = Output(quiet=quiet, as_json=as_json)
    done = job(
        model, tuple(find_profiles(on)), batch=batch, context=context, sizes=parse_sizes(sizes, "--sizes"),
        threads=threads, out=out, formats=parse_words(formats), progress=output.progress,
    )  # fmt: skip
    found = done.to_json()
    output.json(found)
    output.show(fits_view(found))
    for device in found["devices"] if layers else ():
        output.show(Text(f"\n{device['title']}, layers:"), roofline_view(device))
    if out is not None:
        output.show(f"numbers: {out / 'fits.json'}")
        show_reports(output, out / "fits", formats)


def profiles(
    name: Annotated[str | None, typer.Argument(help="Print this profile (or this machine's: this) as YAML.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure this machine again.")] = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the devices that Tersor knows, or print one as YAML with the source of each figure.

    Copy the YAML for your own device: --on takes the file.
    """
    from tersor.hardware.profile import profiles as shipped
    from tersor.hardware.profile import read_profile, to_yaml
    from tersor.hardware.roofline import this_roofline
    from tersor.hardware.this import THIS, this_profile
    from tersor.report.hardware import profiles_view

    output = Output(quiet=False, as_json=as_json)
    if name is None:
        listed = [profile.model_dump(mode="json", exclude_none=True) for profile in shipped()]
        output.json(listed)
        output.show(profiles_view(listed))
        return
    if name == THIS:
        profile = this_profile(this_roofline(threads=threads, again=again, progress=output.progress))
    else:
        profile = read_profile(name)
    output.json(profile.model_dump(mode="json", exclude_none=True))
    if not as_json:
        sys.stdout.write(to_yaml(profile))


def advise(
    task: TaskArgument,
    on: Annotated[str, typer.Option("--on", help="this (tried and measured), a profile, or a YAML file.")] = "this",
    batch: Annotated[int, typer.Option(help="Samples in a pass.", min=1)] = 1,
    max_drop: Annotated[str, typer.Option(help="What may be lost before repair, in points, such as 1%.")] = "1%",
    samples: Annotated[int, typer.Option(help="Validation samples to judge by.", min=1)] = 1000,
    timing_seconds: Annotated[float, typer.Option(help="Seconds to time all candidates for.", min=0.05)] = 10.0,
    max_seconds: Annotated[float, typer.Option(help="Trying ends within so many seconds; 0: no limit.", min=0)] = 300.0,
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say how to compress a model for a device, each line with its reason.

    Which family first, bits, channels or zeros, alignment, expected gain. For this machine the candidates are tried
    without training, timed in turns, and ranked by what was measured; for a profile its figures speak.
    """
    from tersor.jobs.advise import advise as job
    from tersor.report.hardware import advice_view

    output = Output(quiet=quiet, as_json=as_json)
    done = job(
        task, on, batch=batch, seconds=timing_seconds, limit=samples, max_drop=parse_points(max_drop) or 0.0,
        threads=threads, max_seconds=max_seconds or None, progress=output.progress,
    )  # fmt: skip
    found = done.to_json()
    output.json(found)
    output.show(advice_view(found))
