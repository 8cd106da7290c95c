"""How much a unit of channels matters: one file for each score, and one for how coupled layers combine."""

from tersor.prune.structured.scores.activation import ActivationWeighted
from tersor.prune.structured.scores.batch_norm import BatchNormScale
from tersor.prune.structured.scores.coupling import by_unit, combined, members_of
from tersor.prune.structured.scores.fisher import Fisher
from tersor.prune.structured.scores.geometric_median import GeometricMedian
from tersor.prune.structured.scores.hessian import HessianDiagonal
from tersor.prune.structured.scores.magnitude import Magnitude
from tersor.prune.structured.scores.random import Random
from tersor.prune.structured.scores.score import Score
from tersor.prune.structured.scores.taylor import Taylor

__all__ = [
    "ActivationWeighted",
    "BatchNormScale",
    "Fisher",
    "GeometricMedian",
    "HessianDiagonal",
    "Magnitude",
    "Random",
    "Score",
    "Taylor",
    "by_unit",
    "combined",
    "members_of",
]
