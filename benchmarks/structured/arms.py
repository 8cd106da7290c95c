"""How each tool brings a model down to a target on MACs: by its own means, on the same original."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version

import torch_pruning
from torch import nn

from tersor.core.step import Context
from tersor.core.task import Task
from tersor.measure.compute import macs
from tersor.prune.layerwise.reconstruct import PruneAndReconstruct
from tersor.prune.structured.amount import Keep, Scope
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.scores import ActivationWeighted, Score
from tersor.train.recalibrate import RecalibrateBatchNorm

TOLERANCE = 0.02  # of the target's MACs


@dataclass(frozen=True)
class Pruned:
    """A pruned model, how many times fewer MACs it needs, and the seconds that pruning took."""

    model: nn.Module
    ratio: float
    seconds: float


class Arm(ABC):
    """A tool with its settings; equal arms prune alike."""

    @abstractmethod
    def prune(self, task: Task, ratio: float) -> Pruned:
        """A copy of ``task.model`` with ``ratio`` times fewer MACs. Raises RuntimeError where it misses by over 2 %."""


@dataclass(frozen=True)
class TersorArm(Arm):
    """PruneChannels with its own target on MACs."""

    score: Score = field(default_factory=ActivationWeighted)
    scope: Scope = "global"
    max_sparsity: float = 0.9
    repair: bool = True  # readers solved for by least squares, then batch norm's statistics: no training

    def __str__(self) -> str:
        repair = "; PruneAndReconstruct, RecalibrateBatchNorm" if self.repair else ""
        return f"Tersor {version('tersor')}: PruneChannels, {self.score}, {self.scope}{repair}"

    def prune(self, task: Task, ratio: float) -> Pruned:
        begun = time.monotonic()
        method = PruneChannels(
            keep=Keep(macs=1 / ratio), score=self.score, scope=self.scope, max_sparsity=self.max_sparsity, multiple_of=1
        )
        step = PruneAndReconstruct(method) if self.repair else method
        model = step.run(task.model, task, Context()).model
        if self.repair:
            model = RecalibrateBatchNorm().run(model, task, Context()).model
        return _checked(model, task, ratio, time.monotonic() - begun)


@dataclass(frozen=True)
class TorchPruningArm(Arm):
    """The loop of Torch-Pruning's own benchmark (reproduce/main.py): small steps until the target is reached."""

    importance: Callable[[], torch_pruning.importance.Importance]
    name: str
    everywhere: bool = True  # all layers compete; else each loses the same fraction
    steps: int = 400
    batches: int = 2  # of gradients at each step, for an importance that reads them

    def __str__(self) -> str:
        scope = "global" if self.everywhere else "layer"
        return f"Torch-Pruning {version('torch-pruning')}: {self.name}, {scope}"

    def prune(self, task: Task, ratio: float) -> Pruned:
        begun = time.monotonic()
        model = copy.deepcopy(task.model).eval().requires_grad_(True)
        importance = self.importance()
        pruner = torch_pruning.pruner.GroupNormPruner(
            model, task.example_inputs[0], importance=importance, global_pruning=self.everywhere, pruning_ratio=1.0,
            iterative_steps=self.steps, ignored_layers=[module for module in model.modules() if _is_last(module)],
        )  # fmt: skip
        while _ratio(task, model) < ratio and pruner.current_step < self.steps:
            if isinstance(importance, torch_pruning.importance.GroupTaylorImportance):
                self._gradients(model, task)
            pruner.step()
        model.zero_grad(set_to_none=True)
        return _checked(model, task, ratio, time.monotonic() - begun)

    def _gradients(self, model: nn.Module, task: Task) -> None:
        model.zero_grad()
        for number, batch in enumerate(task.calibration):
            if number == self.batches:
                break
            task.loss_of(model, batch).backward()


def _is_last(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.out_features == 10


def _ratio(task: Task, model: nn.Module) -> float:
    return macs(task.model, task.example_inputs).value / macs(model, task.example_inputs).value


def _checked(model: nn.Module, task: Task, ratio: float, seconds: float) -> Pruned:
    got = _ratio(task, model)
    if abs(got / ratio - 1) > TOLERANCE:
        raise RuntimeError(f"{got:.3f} times fewer MACs instead of {ratio}: more than {TOLERANCE:.0%} off")
    return Pruned(model.requires_grad_(True).eval(), got, seconds)
