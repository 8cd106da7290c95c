"""Run calibration batches through a copy of a model and keep what passed at chosen activations."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError, user_code
from tersor.core.intercept import intercept_at
from tersor.core.loading import batches_of
from tersor.core.place import ActivationPlace
from tersor.core.progress import Progress
from tersor.core.task import Task

SAMPLE_PER_BATCH = 8192


@dataclass
class Statistics:
    """What was seen at one place: exact ``low`` and ``high`` over all values, and a bounded random ``sample``.

    ``lows``, ``highs``: the extremes of each call; ``shape``: of the last result.
    """

    place: ActivationPlace
    lows: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    parts: list[Tensor] = field(default_factory=list)

    def see(self, x: Tensor, generator: torch.Generator) -> None:
        """Take in one result. Raises InputError, naming the place, where it holds a NaN or an infinity."""
        low, high = (float(bound) for bound in torch.aminmax(x.detach().float()))
        if not (torch.isfinite(torch.tensor([low, high])).all()):
            raise InputError(
                "a calibration batch makes a value that is not finite", where=str(self.place),
                got=f"values from {low:g} to {high:g} in call {self.calls + 1}", expected="finite numbers",
                do="Look for NaN or overflow in the calibration data",
            )  # fmt: skip
        self.lows.append(low)
        self.highs.append(high)
        self.shape = tuple(x.shape)
        flat = x.detach().reshape(-1)
        if flat.numel() > SAMPLE_PER_BATCH:
            chosen = torch.randint(flat.numel(), (SAMPLE_PER_BATCH,), generator=generator)
            flat = flat[chosen.to(flat.device)]
        self.parts.append(flat.float().cpu())

    @property
    def calls(self) -> int:
        """How often the place was hit."""
        return len(self.lows)

    @property
    def low(self) -> float:
        """The smallest value of all."""
        return min(self.lows, default=float("inf"))

    @property
    def high(self) -> float:
        """The largest value of all."""
        return max(self.highs, default=float("-inf"))

    @property
    def sample(self) -> Tensor:
        """At most ``SAMPLE_PER_BATCH`` values of each call, drawn at random, and both extremes: float32 [n]."""
        return torch.cat([*self.parts, torch.tensor([self.low, self.high])])


class _Tap(nn.Module):
    """Hands what passes to its statistics and lets it pass unchanged."""

    def __init__(self, statistics: Statistics, generator: torch.Generator):
        super().__init__()
        self.statistics, self.generator = statistics, generator

    def forward(self, x: Tensor) -> Tensor:
        self.statistics.see(x, self.generator)
        return x


class Watcher:
    """A copy of ``model`` in eval mode whose ``places`` are watched; the model given gets no hooks at all.

    ``statistics``: place → what passed there. ``counts``: (module, operator) → calls in the last forward pass.
    """

    def __init__(self, model: nn.Module, places: Iterable[ActivationPlace], *, seed: int = 0):
        self.model = copy.deepcopy(model).eval()
        generator = torch.Generator().manual_seed(seed)
        self.statistics = {place: Statistics(place) for place in places}
        for place, statistics in self.statistics.items():
            intercept_at(self.model, place.module).add(place.operator, place.ordinal, _Tap(statistics, generator))

    def run(self, *args: Any, **kwargs: Any) -> None:
        """One forward pass without gradients, arguments moved to the model's device."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        with torch.no_grad():
            self.model(*_moved(args, device), **_moved(kwargs, device))

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """(module, operator) → how many of these calls the last forward pass made, for every watched module."""
        found: dict[tuple[str, str], int] = {}
        for place in self.statistics:
            for operator, count in intercept_at(self.model, place.module).counts.items():
                found[place.module, operator] = count
        return found


def watch(
    model: nn.Module,
    places: Iterable[ActivationPlace],
    task: Task,
    *,
    batches: int,
    progress: Progress | None = None,
) -> Mapping[ActivationPlace, Statistics]:
    """What passes at ``places`` over the first ``batches`` calibration batches of ``task``, in eval mode.

    A copy of the model runs; the model and the random state are left as they were, also after an error. Raises
    InputError where the calibration loader is missing or empty, or where a value is not finite.
    """
    watcher = Watcher(model, places)
    if task.calibration is None:
        raise InputError(
            "the task has no calibration data", where=f"task {task.name!r}", do="Call task.complete() first"
        )
    ran = 0
    with torch.random.fork_rng(devices=[]):
        for batch in (progress or Progress()).track(_first(task.calibration, batches), "calibrating", batches):
            with user_code("the model does not run on this batch", where=f"task.calibration, batch {ran}"):
                args, kwargs = task.inputs(batch)
                watcher.run(*args, **kwargs)
            ran += 1
    if ran == 0:
        raise InputError("the loader is empty", where="task.calibration", got="no batch", expected="at least one batch")
    return watcher.statistics


def _first(loader: Iterable[Any], batches: int) -> Iterable[Any]:
    for number, batch in enumerate(batches_of(loader, "task.calibration")):
        yield batch
        if number + 1 == batches:  # asked after the batch, so that none is drawn in vain
            return


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if type(value) in (tuple, list) else value
