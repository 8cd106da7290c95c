"""How much a unit of channels matters: one file for each score, and one for how coupled layers combine."""

from tersor.prune.scores.activation import ActivationWeighted
from tersor.prune.scores.batch_norm import BatchNormScale
from tersor.prune.scores.coupling import by_unit, combined, members_of
from tersor.prune.scores.fisher import Fisher
from tersor.prune.scores.geometric_median import GeometricMedian
from tersor.prune.scores.hessian import HessianDiagonal
from tersor.prune.scores.magnitude import Magnitude
from tersor.prune.scores.random import Random
from tersor.prune.scores.score import Score
from tersor.prune.scores.taylor import Taylor

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
