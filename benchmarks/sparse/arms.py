"""What is compared: every way of getting zeros into the same network, as steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import prune as peer

from tersor.core.step import Context, Pipeline, Result, Step
from tersor.core.task import Task
from tersor.prune.layerwise.correct_variance import CorrectVariance
from tersor.prune.layerwise.sparsegpt import SparseGPT
from tersor.prune.sparse.gradual import prune_gradually
from tersor.prune.sparse.patterns import NM, Block
from tersor.prune.sparse.prune import Prune
from tersor.prune.sparse.scopes import ErdosRenyi, Global
from tersor.train.finetune import Finetune

SPARSITIES = (0.8, 0.9, 0.95)
BATCHES = 4  # of calibration
REPAIR = CorrectVariance(batches=BATCHES)
DENSE = "dense, trained on"
RECOVERED = "SparseGPT, global, then trained"


@dataclass(frozen=True)
class Nothing(Step):
    """The original."""

    def run(self, model: nn.Module, task: Task, context: Context | None = None) -> Result:
        return Result(copy.deepcopy(model).eval())


@dataclass(frozen=True)
class TorchPrune(Step):
    """The peer: torch.nn.utils.prune, by magnitude, on the same layers."""

    sparsity: float
    everywhere: bool

    def run(self, model: nn.Module, task: Task, context: Context | None = None) -> Result:
        pruned = copy.deepcopy(model).eval()
        layers = [(layer, "weight") for layer in pruned.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        if self.everywhere:
            peer.global_unstructured(layers, peer.L1Unstructured, amount=self.sparsity)
        for layer, name in layers:
            if not self.everywhere:
                peer.l1_unstructured(layer, name, self.sparsity)
            peer.remove(layer, name)
        return Result(pruned)


@dataclass(frozen=True)
class Arm:
    """``family``: a row of the table; ``sparsity``: its column (None: the family has only one)."""

    family: str
    sparsity: float | None
    step: Step
    trains: bool = False


Make = Callable[[float, Finetune], Step]

WITHOUT_TRAINING: Mapping[str, Make] = {
    "torch.nn.utils.prune, layer": lambda s, _: TorchPrune(s, everywhere=False),
    "torch.nn.utils.prune, global": lambda s, _: TorchPrune(s, everywhere=True),
    "one shot, layer": lambda s, _: Prune(s),
    "one shot, global": lambda s, _: Prune(s, scope=Global()),
    "one shot + repair, layer": lambda s, _: Pipeline((Prune(s), REPAIR)),
    "one shot + repair, global": lambda s, _: Pipeline((Prune(s, scope=Global()), REPAIR)),
    "one shot + repair, Erdős–Rényi": lambda s, _: Pipeline((Prune(s, scope=ErdosRenyi()), REPAIR)),
    "SparseGPT + repair, layer": lambda s, _: Pipeline((SparseGPT(s, batches=BATCHES), REPAIR)),
    "SparseGPT + repair, global": lambda s, _: Pipeline((SparseGPT(s, scope=Global(), batches=BATCHES), REPAIR)),
    "SparseGPT, global": lambda s, _: SparseGPT(s, scope=Global(), batches=BATCHES),
}
TRAINED: Mapping[str, Make] = {
    "gradual, global": lambda s, training: prune_gradually(s, training=training, prune=Prune(scope=Global())),
    RECOVERED: lambda s, training: Pipeline((SparseGPT(s, scope=Global(), batches=BATCHES), training)),
    "one shot + repair, global, then trained": lambda s, training: Pipeline(
        (Prune(s, scope=Global()), REPAIR, training)
    ),
}
PATTERNS: Mapping[str, tuple[float | None, bool, Make]] = {
    "2:4, one shot + repair": (None, False, lambda s, _: Pipeline((Prune(pattern=NM()), REPAIR))),
    "2:4, SparseGPT + repair": (None, False, lambda s, _: Pipeline((SparseGPT(pattern=NM(), batches=BATCHES), REPAIR))),
    "2:4, SparseGPT, then trained": (None, True, lambda s, t: Pipeline((SparseGPT(pattern=NM(), batches=BATCHES), t))),
    "4×1 blocks, one shot + repair, global": (
        0.8, False, lambda s, _: Pipeline((Prune(s, pattern=Block(4, 1), scope=Global()), REPAIR))
    ),
    "4×1 blocks, gradual, global": (
        0.8, True,
        lambda s, t: prune_gradually(s, training=t, prune=Prune(pattern=Block(4, 1), scope=Global())),
    ),
}  # fmt: skip


def arms(training: Finetune, thorough: bool) -> list[Arm]:
    """Every arm; ``thorough``: trained ones at all sparsities, else at 90 % and what the claims need."""
    found = [Arm("original", None, Nothing()), Arm(DENSE, None, training, trains=True)]
    found += [Arm(name, s, make(s, training)) for name, make in WITHOUT_TRAINING.items() for s in SPARSITIES]
    for name, make in TRAINED.items():
        at = SPARSITIES if thorough and name == "gradual, global" else (0.9,)
        if thorough or name != "one shot + repair, global, then trained":
            found += [Arm(name, s, make(s, training), trains=True) for s in at]
    for name, (sparsity, trains, make) in PATTERNS.items():
        if thorough or not trains:
            found.append(Arm(name, sparsity, make(sparsity or 0.0, training), trains))
    return found


def weights_per_nonzero(model: nn.Module) -> float:
    """How many times fewer weights of two or more axes are left."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return sum(weight.numel() for weight in weights) / sum(int(torch.count_nonzero(weight)) for weight in weights)
