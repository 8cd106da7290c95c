"""Distillation: a student learns from a teacher, ``task.reference``, by the objectives of a training."""

from tersor.distill.attention import AttentionMaps
from tersor.distill.features import AttentionTransfer, Hints
from tersor.distill.relations import (
    Correlation,
    CorrelationCongruence,
    RelativeAngles,
    RelativeDistances,
    SimilarityPreserving,
)
from tersor.distill.response import DecoupledSoftTargets, Distill, MatchLogits, SoftTargets

__all__ = [
    "AttentionMaps",
    "AttentionTransfer",
    "Correlation",
    "CorrelationCongruence",
    "DecoupledSoftTargets",
    "Distill",
    "Hints",
    "MatchLogits",
    "RelativeAngles",
    "RelativeDistances",
    "SimilarityPreserving",
    "SoftTargets",
]
