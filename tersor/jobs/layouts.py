"""In which layout of images a PyTorch model is faster on this machine: channels first (NCHW) or last (NHWC)."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError, VerificationError, user_code
from tersor.core.eval_mode import eval_mode
from tersor.core.measurement import Measurement
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.core.verify import TOLERANCE, relative_difference
from tersor.jobs.benchmark import WORKER
from tersor.jobs.contenders import Engines, Field, Found
from tersor.measure.benchmark import Conditions, Measured, measure_contenders
from tersor.measure.benchmark_schema import Comparison, Word
from tersor.measure.contender import Contender
from tersor.measure.opened_module import in_layout

FIRST, LAST = "channels first", "channels last"


@final
@dataclasses.dataclass(frozen=True)
class Layout:
    """What was measured at one batch size: the median call in either layout, how many times faster channels-last is
    (below 1: slower), whether that is shown, and what to do in one sentence."""

    batch: int
    channels_first: Measurement
    channels_last: Measurement
    speedup: Measurement
    verdict: Word
    advice: str


def layouts(
    model: nn.Module,
    example_inputs: Sequence[Tensor],
    *,
    conditions: Conditions = Conditions(window=0, starts=0),
    progress: Progress | None = None,
) -> tuple[Layout, ...]:
    """Time ``model`` in PyTorch (eager, float32, CPU) in both layouts of images, in turns in a fresh process.

    The same weights and inputs [batch, channels, height, width], once with channels apart in memory, as PyTorch makes
    them, and once side by side (``torch.channels_last``); inputs lie so beforehand. Gives a Layout for each batch size
    and number of threads of ``conditions``. The model given is not changed. This is of PyTorch only: ONNX Runtime
    lays out its numbers itself, and files stay NCHW.

    Raises InputError where the model has no convolution of images, or cannot run channels-last (``view`` of what lies
    otherwise); VerificationError where it then gives something else.
    """
    inputs = tuple(example_inputs)
    _expect_images(model, inputs)
    _expect_the_same(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        field = Field(Task(model, name="layouts"), "", inputs, {}, Path(folder))
        first = next(iter(field.contenders(Found(FIRST, "", module=model), Engines())))
        assert isinstance(first, Contender), "only files without float weights are skipped"
        last = dataclasses.replace(first, name=LAST, spec={**first.spec, "channels_last": True})
        measured = measure_contenders((first, last), conditions, worker=WORKER, progress=progress or Progress())
    return tuple(_layout(measured, each) for each in measured.comparisons)


def _layout(measured: Measured, found: Comparison) -> Layout:
    first, last = (
        next(each.p50_ms for each in measured.timings
             if (each.model, each.batch, each.threads) == (name, found.batch, found.threads))
        for name in (FIRST, LAST)
    )  # fmt: skip
    return Layout(found.batch, first, last, found.speedup, found.verdict, advice(found))


def advice(found: Comparison) -> str:
    """What to do after a comparison of channels-last with channels-first."""
    where = f"at batch {found.batch}, {found.threads} {'thread' if found.threads == 1 else 'threads'}"
    if found.verdict == "faster":
        return (
            f"channels-last is {found.sentence} {where}: model.to(memory_format=torch.channels_last), and "
            "images.to(memory_format=torch.channels_last)"
        )
    if found.verdict == "slower":
        return f"leave the model as it is: channels-last is {found.sentence} {where}"
    return f"leave the model as it is: channels-last against it, {found.sentence} {where}"


def _expect_images(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    images = any(value.ndim == 4 and value.is_floating_point() for value in inputs)
    if not images or not any(parameter.ndim == 4 for parameter in model.parameters()):
        raise InputError(
            "the layout of images is no matter here", where=type(model).__name__,
            got=f"inputs {[list(value.shape) for value in inputs]}, "
            f"{sum(parameter.ndim == 4 for parameter in model.parameters())} weights of convolutions over images",
            expected="an input [batch, channels, height, width] and convolutions",
        )  # fmt: skip


def _expect_the_same(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Both layouts must run, and give the same."""
    usual = copy.deepcopy(model).cpu()
    other = in_layout(copy.deepcopy(usual), torch.channels_last)
    args = [value.detach().cpu() for value in inputs]
    images = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in args]
    task = Task(model, name="layouts")
    with torch.no_grad(), eval_mode(usual), eval_mode(other):
        with user_code("the model cannot be run", where=type(model).__name__):
            expected = task.output(usual(*args))
        with user_code(
            "the model cannot be run channels-last", where=type(model).__name__,
            do="Where it says view, write reshape or flatten",
        ):  # fmt: skip
            got = task.output(other(*images))
    difference = relative_difference(got, expected)
    if not difference <= TOLERANCE:
        raise VerificationError(
            "the model gives something else channels-last", where=type(model).__name__,
            got=f"relative difference {difference:.3g}", expected=f"at most {TOLERANCE:g}",
            do="Leave it as it is: somewhere it reads its numbers in the order of memory",
        )  # fmt: skip
