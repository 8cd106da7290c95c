"""Layer by layer on calibration data: which layers come when, and what they read and give, pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from tersor.core.device import device_of
from tersor.core.errors import InputError, user_code
from tersor.core.intercept import end_passes
from tersor.core.loading import batches_of
from tersor.core.masked import Masked
from tersor.core.place import TensorPlace, aliases, module_at
from tersor.core.randomness import fixed_randomness, seeded
from tersor.core.step import derive_seed
from tersor.core.task import Arguments, Task
from tersor.observe.least_squares import (
    NormalEquations,
    as_rows,
    drawn_rows,
    equations_of,
    input_rows,
    is_conv1d,
    output_rows,
    tensor_of,
)

MOST = 12_288  # unknowns of one output: their normal equations take 1.2 GB
Indices = Mapping[tuple[TensorPlace, int], Tensor]
See = Callable[[str, Tensor, Tensor], None]  # path of a layer, its input, its output


@dataclass(frozen=True)
class Stage:
    """Layers that read one and the same tensor, in the order of their calls; ``calls``: of all of them in a forward."""

    paths: tuple[str, ...]
    calls: int


def stages_of(model: nn.Module, paths: Sequence[str], task: Task) -> list[Stage]:
    """The layers at ``paths`` in the order in which the forward calls them first; those never called are left out."""
    if not paths:
        return []
    example = task.demand_example()
    read: list[tuple[Tensor, list[str]]] = []
    calls: dict[str, int] = {}

    def see(path: str, x: Tensor, _: Tensor) -> None:
        calls[path] = calls.get(path, 0) + 1
        if calls[path] == 1:
            together = next((paths for other, paths in read if other is x), None)
            if together is None:
                read.append((x, [path]))
            else:
                together.append(path)

    with seeing(model, paths, see), torch.no_grad(), fixed_randomness(0):
        model(*send_to_device(example, device_of(model)))
    return [Stage(tuple(found), sum(calls[path] for path in found)) for _, found in read]


def calibration_arguments(model: nn.Module, task: Task, batches: int, seed: int, who: str) -> list[Arguments]:
    """The model's arguments for each of the first ``batches`` calibration batches, on its device.

    Raises InputError, naming ``who`` asks, where there is no calibration data.
    """
    if task.calibration is None:
        raise InputError("the task has no calibration data", where=who, do="Pass task.complete()")
    with seeded(seed, task.calibration):
        found = [
            task.inputs(send_to_device(batch, device_of(model)), model)
            for batch in islice(batches_of(task.calibration, "task.calibration"), batches)
        ]
    if not found:
        raise InputError("the loader is empty", where="task.calibration", got="no batch")
    return found


def unsolvable(model: nn.Module, path: str, *, inputs_first: bool = False) -> str | None:
    """Why the weights of the module at ``path`` cannot be solved for on what it reads; None where they can.

    ``inputs_first``: whether who asks can write weights stored as [inputs, outputs], as transformers' Conv1D has them.
    """
    layer = module_at(model, path)
    known = isinstance(layer, (_ConvNd, nn.Linear)) or (inputs_first and is_conv1d(layer))
    if not known or isinstance(layer, _ConvTransposeNd):
        return f"only convolutions and linear layers are reconstructed, not {type(layer).__name__}"
    reason = held_otherwise(model, path)
    if reason is not None:
        return reason
    unknowns = as_rows(layer, tensor_of(layer, "weight")).shape[2] + 1
    return f"{unknowns} weights of one output are more than {MOST}" if unknowns > MOST else None


def held_otherwise(model: nn.Module, path: str) -> str | None:
    """Why a layer's weight cannot be written for that layer; None for a parameter of its own, masked or not."""
    layer, place = module_at(model, path), TensorPlace(path, "weight")
    if not parametrize.is_parametrized(layer, "weight") and "weight" not in layer._parameters:
        return "its weight is no parameter but computed before each call"
    if parametrize.is_parametrized(layer, "weight"):
        entries = cast(nn.ModuleDict, layer.parametrizations)["weight"]
        others = [type(entry).__name__ for entry in entries if not isinstance(entry, Masked)]  # type: ignore[attr-defined]
        if others:
            return f"its weight is a {', '.join(others)} of what is stored"
    tied = [str(other) for other in aliases(model, place) if module_at(model, other.module) is not layer]
    return f"its weight is tied to {', '.join(tied)}" if tied else None


class _Enough(BaseException):
    """Ends a forward pass of which nothing more is needed. No Exception: a forward that catches those lets it pass."""


def pass_through(
    model: nn.Module, paths: Iterable[str], see: See, arguments: Arguments, number: int, calls: int | None = None
) -> None:
    """A forward pass without gradients in which ``see`` is told each call of the layers; ended after ``calls`` calls.

    ``number``: of the calibration batch, for the InputError where the model does not run on it.
    """
    left = [calls]

    def count(path: str, x: Tensor, y: Tensor) -> None:
        see(path, x, y)
        if left[0] is not None:
            left[0] -= 1
            if left[0] == 0:
                raise _Enough

    args, kwargs = arguments
    with user_code("the model does not run on this batch", where=f"task.calibration, batch {number}"):
        try:
            with seeing(model, paths, count), torch.no_grad():
                model(*args, **kwargs)
        except _Enough:
            end_passes(model)


@contextmanager
def seeing(model: nn.Module, paths: Iterable[str], see: See) -> Iterator[None]:
    """Within, ``see(path, input, output)`` is called after each call of these layers."""
    handles = [
        module_at(model, path).register_forward_hook(
            lambda _, args, kwargs, y, path=path: see(path, args[0] if args else kwargs["input"], y), with_kwargs=True
        )
        for path in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def expect_finite(path: str, *sums: Tensor) -> None:
    """Raise InputError, naming the layer, where sums over calibration data are not finite."""
    if not all(bool(torch.isfinite(value).all()) for value in sums):
        raise InputError(
            "a calibration batch makes a value that is not finite", where=path, expected="finite numbers",
            do="Look for NaN or overflow in the calibration data",
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pair:
    """The model given, and the one changed so far; both in eval mode and not the user's own.

    ``kept``: (tensor, dimension) → which indices of the original's are left. ``rows``: at most so many output positions
    of each batch and layer are counted, drawn at random from ``seed``.
    """

    original: nn.Module
    changed: nn.Module
    kept: Indices
    rows: int
    seed: int

    def equations(self, stage: Stage, data: Sequence[Arguments]) -> dict[str, NormalEquations]:
        """What the layers of ``stage`` must satisfy on ``data``: x as the changed model reads it, y the original's."""
        found = {path: equations_of(module_at(self.changed, path)) for path in stage.paths}
        for number, arguments in enumerate(data):
            for path, x, y in self.drawn(stage, arguments, number):
                found[path].add(x, y)
        for path, equations in found.items():
            expect_finite(path, equations.G, equations.C)
        return found

    def drawn(self, stage: Stage, arguments: Arguments, number: int) -> list[tuple[str, Tensor, Tensor]]:
        """For each call of the layers in one batch (path, x, y): what the changed model reads there [groups, rows,
        unknowns], and the original's outputs that are left [groups, rows, outputs]."""
        targets = self._targets(stage, arguments, number)
        calls = {path: iter(values) for path, values in targets.items()}
        found: list[tuple[str, Tensor, Tensor]] = []

        def read(path: str, x: Tensor, _: Tensor) -> None:
            rows, y = next(calls[path])
            found.append((path, input_rows(module_at(self.changed, path), x, rows), y))

        pass_through(self.changed, stage.paths, read, arguments, number, sum(map(len, targets.values())))
        return found

    def _targets(self, stage: Stage, arguments: Arguments, number: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """path → for each call (numbers of the rows drawn, the original's outputs there that are left)."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, number))
        found: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in stage.paths}

        def keep(path: str, _: Tensor, y: Tensor) -> None:
            layer = module_at(self.original, path)
            rows = drawn_rows(layer, y, self.rows, generator)
            channels = self.kept.get((TensorPlace(path, "weight"), 0))
            changed = module_at(self.changed, path)
            groups = len(as_rows(changed, tensor_of(changed, "weight")))
            found[path].append((rows, output_rows(layer, y, rows, channels, groups)))

        pass_through(self.original, stage.paths, keep, arguments, number, stage.calls)
        return found
