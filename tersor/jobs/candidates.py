"""The ways to compress that advice tries on this machine: each as a Step, where it suits the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tersor.core.step import Pipeline, Step
from tersor.hardware.advice import HALF_CHANNELS, Family
from tersor.measure.workload import Workload
from tersor.prune.sparse.prune import Prune
from tersor.prune.structured.channels import PruneChannels
from tersor.quantize.dynamic import QuantizeDynamically
from tersor.quantize.fold import FoldBatchNorm
from tersor.quantize.quantize import Quantize
from tersor.quantize.schemes import Int
from tersor.quantize.weight_only import QuantizeWeights

GROUPS = (128, 64, 32)
ZEROS = 0.8  # the sparsity at which single zeros are tried
INT8, DYNAMIC, LOW, SPARSE = "int8", "dynamic int8", "int4 weights", "single zeros, 80 %"


@dataclass(frozen=True)
class Candidate:
    """A way to compress. ``step``: what does it, without training; ``why_not``: given instead where it does not suit.

    ``expected``: the name of its expectation by roofline, where there is one. ``part``: what does it in a recipe, where
    no recipe that comes along does.
    """

    name: str
    family: Family
    step: Step | None
    expected: str | None = None
    why_not: str = ""
    part: str = ""


def candidates(model: nn.Module, workload: Workload, multiple_of: int) -> tuple[Candidate, ...]:
    """What is tried: int8 by calibration, channels, both, dynamic int8 and 4-bit weights where linear layers matter.

    Single zeros too, which say what a dense runtime makes of them. ``multiple_of``: what kept channels are rounded up
    to.
    """
    linear = share_of_linear(workload)
    integers = (FoldBatchNorm(), Quantize(learn=False)) if _has_batch_norms(model) else (Quantize(learn=False),)
    channels = PruneChannels(sparsity=0.5, multiple_of=multiple_of)
    few = f"linear layers make {100 * linear:.0f} % of the multiplications"
    group = _group(model)
    dynamic: Step | None = QuantizeDynamically() if linear > 0.3 else None
    low: Step | None = QuantizeWeights(Int(4, group_size=group)) if group and linear > 0.3 else None
    return (
        Candidate(INT8, "quantise", Pipeline(integers), "int8"),
        Candidate(
            HALF_CHANNELS,
            "prune",
            channels,
            HALF_CHANNELS,
            part=f"prune_channels: {{sparsity: {channels.sparsity}, multiple_of: {multiple_of}}}",
        ),
        Candidate(f"{HALF_CHANNELS}, int8", "both", Pipeline((channels, *integers)), f"{HALF_CHANNELS}, int8"),
        Candidate(DYNAMIC, "quantise", dynamic, why_not="" if dynamic else few, part="quantize_dynamically"),
        Candidate(
            LOW,
            "quantise",
            low,
            "int4 weights",
            "" if low else few if linear <= 0.3 else "no group divides its rows",
            part=f"quantize_weights: {{scheme: {{bits: 4, group_size: {group}}}}}",
        ),
        Candidate(SPARSE, "prune", Prune(sparsity=ZEROS)),
    )


def share_of_linear(workload: Workload) -> float:
    """The share of multiply-accumulates that linear layers make."""
    linear = sum(op.macs for op in workload.operations if op.operator in {"linear", "addmm", "mm", "addmv"})
    return linear / workload.macs if workload.macs else 0.0


def _has_batch_norms(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _group(model: nn.Module) -> int | None:
    """The largest group size that divides the rows of at least half of the linear weights."""
    rows = [(module.in_features, module.weight.numel()) for module in model.modules() if isinstance(module, nn.Linear)]
    total = sum(count for _, count in rows)
    return next((g for g in GROUPS if 2 * sum(n for width, n in rows if width % g == 0) >= total > 0), None)
