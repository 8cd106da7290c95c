"""Whether a model fits on devices: its workload, from a task, an ONNX file or a run, under each device's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.core.measurement import Measurement
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.hardware.fits import DeviceFits, fits_on, usual_bits
from tersor.hardware.profile import Profile, read_profile
from tersor.hardware.roofline import Roofline, roofline_of, this_roofline
from tersor.hardware.this import THIS, this_profile
from tersor.jobs.documents import expect_folder, leave
from tersor.jobs.find_task import find_task
from tersor.measure.graph_workload import workload
from tersor.measure.kv_cache import KeyValueCache, kv_cache
from tersor.measure.onnx_workload import onnx_workload
from tersor.measure.workload import Workload
from tersor.report.roofline import VERSION
from tersor.report.write import expect_formats


@dataclass(frozen=True)
class ModelFits:
    """A model's own figures (of one pass), and what is said of each device."""

    model: str
    batch: int
    totals: dict[str, Measurement]
    devices: tuple[DeviceFits, ...]
    rooflines: dict[str, Roofline]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema": VERSION, "tersor": version("tersor"), "model": self.model, "batch": self.batch,
            "totals": {name: value.to_json() for name, value in self.totals.items()},
            "devices": [device.to_json() for device in self.devices],
            "rooflines": {name: roofline.to_json() for name, roofline in self.rooflines.items()},
        }  # fmt: skip


def fits(
    model: Task | str | Path,
    on: Sequence[str | Path | Profile] = (THIS,),
    *,
    batch: int = 1,
    context: int | None = None,
    sizes: Mapping[str, int] | None = None,
    threads: int | None = None,
    out: str | Path | None = None,
    formats: Sequence[str] = ("html",),
    progress: Progress | None = None,
) -> ModelFits:
    """Say whether a model fits on each of the devices ``on``, about how fast it is there, and what would make it fit.

    ``model``: a Task or its name, an ONNX file, or a run's folder (its ONNX file). ``on``: profiles, their names, YAML
    files, or "this" machine, which is measured. ``batch``: samples in a pass. ``context``: tokens in a decoder's
    key-value cache; default: as many as it can. ``sizes``: of the dimensions that an ONNX file leaves open beside the
    first, by their names in the file ("input:1" where they have none). ``out``: a folder for fits.json and its report
    in ``formats``. Latencies are estimates by roofline. Raises InputError, ArtifactError, GraphError where the model's
    graph cannot be captured.
    """
    if batch < 1:
        raise InputError("a pass has at least one sample", where="--batch", got=batch)
    expect_formats(formats)
    if out is not None:
        expect_folder(Path(out))
    told = progress or Progress()
    devices = _devices(on, threads, told)
    work, cache = workload_of(model, batch, context, told, sizes)
    totals = {
        "macs": Measurement(work.macs / work.batch, "MACs", conditions={"per": "sample"}),
        "weights": Measurement(work.weight_bytes, "bytes"),
        "activations": Measurement(work.activation_peak(), "bytes", conditions={"counts": "buffers alive at once"}),
    }
    if cache is not None:
        bits = usual_bits(work)
        kept = cache.bytes(bits, work.batch)
        totals["cache"] = Measurement(kept, "bytes", conditions={"context": cache.context, "bits": bits})
    found = tuple(fits_on(work, profile, roofline=roof, cache=cache) for profile, roof in devices)
    rooflines = {profile.name: roof or roofline_of(profile) for profile, roof in devices}
    result = ModelFits(work.name, work.batch, totals, found, rooflines)
    if out is not None:
        leave(result.to_json(), Path(out), "fits", formats)
    return result


def _devices(
    on: Sequence[str | Path | Profile], threads: int | None, progress: Progress
) -> list[tuple[Profile, Roofline | None]]:
    """Each device once. Raises InputError for two of one name, whose answers nobody could tell apart."""
    found: dict[str, tuple[Profile, Roofline | None]] = {}
    for entry in on:
        profile, roofline = device_of(entry, threads, progress)
        if profile != found.setdefault(profile.name, (profile, roofline))[0]:
            raise InputError(
                "two devices have one name", where="--on", got=f"{profile.name!r}, the second from {entry}",
                do="Change name: in your file",
            )  # fmt: skip
    if not found:
        raise InputError("no device", where="--on", expected="profiles, or this")
    return list(found.values())


def device_of(source: str | Path | Profile, threads: int | None, progress: Progress) -> tuple[Profile, Roofline | None]:
    """A profile, and the roofline of this machine where that is meant."""
    if isinstance(source, Profile):
        return source, None
    if str(source) != THIS:
        return read_profile(source), None
    measured = this_roofline(threads=threads, progress=progress)
    return this_profile(measured), measured


def workload_of(
    model: Task | str | Path,
    batch: int,
    context: int | None,
    progress: Progress,
    sizes: Mapping[str, int] | None = None,
) -> tuple[Workload, KeyValueCache | None]:
    """The workload of what ``model`` names, and the key-value cache where it is a decoder."""
    path = None if isinstance(model, Task) else Path(model)
    if path is not None and (path / "run.json").is_file():
        path = path / "model.onnx"
    if path is not None and path.suffix.lower() == ".onnx":
        if context is not None:
            raise InputError(
                "a file does not say that it keeps keys and values", where="--context", got=context,
                do="Give the task instead of the file",
            )  # fmt: skip
        return onnx_workload(path, batch=batch, sizes=sizes), None
    if sizes:
        raise InputError(
            "only an ONNX file has open dimensions", where="--sizes", got=dict(sizes),
            do="A task's sizes are those of its example inputs",
        )  # fmt: skip
    task = model if isinstance(model, Task) else find_task(model, progress)
    cache = kv_cache(task.model, context)
    if context is not None and cache is None:
        raise InputError(
            "the model keeps no keys and values", where="--context", got=context,
            expected="a transformers decoder, whose configuration says how large they are",
        )  # fmt: skip
    return task_workload(task, batch), cache


def task_workload(task: Task, batch: int, model: nn.Module | None = None) -> Workload:
    """The workload of a task's model (or of ``model`` in its place) over ``batch`` samples like its example inputs."""
    example = task.example_inputs
    if example is None:
        loaders = (task.calibration, task.train, task.validation, task.test)  # any tells the inputs' shapes
        first = next((loader for loader in loaders if loader is not None), None)
        example = replace(task, calibration=first).complete(needs=()).example_inputs
    assert example is not None, "a completed task has example inputs"
    index = torch.arange(batch) % len(example[0])
    inputs = tuple(x[index] if x.ndim and len(x) == len(example[0]) else x for x in example)
    return workload(model or task.model, inputs, task.name)
