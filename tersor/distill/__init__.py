"""Distillation: a student learns from a teacher, ``task.reference``, by the objectives of a training."""

from tersor.distill.ahead import Ahead
from tersor.distill.attention import AttentionMaps
from tersor.distill.cache import TeacherCache
from tersor.distill.features import AttentionTransfer, Hints
from tersor.distill.relations import (
    Correlation,
    CorrelationCongruence,
    RelativeAngles,
    RelativeDistances,
    SimilarityPreserving,
)
from tersor.distill.response import DecoupledSoftTargets, Distill, MatchLogits, SoftTargets
from tersor.distill.scaling import scaled, scaled_config
from tersor.distill.students import drop_layers
from tersor.distill.teach import Teach
from tersor.distill.teachers import Teacher, Teachers

__all__ = [
    "Ahead",
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
    "Teach",
    "Teacher",
    "TeacherCache",
    "Teachers",
    "drop_layers",
    "scaled",
    "scaled_config",
]
