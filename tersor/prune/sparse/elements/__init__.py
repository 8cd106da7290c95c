"""How much a single weight matters: one file for each score."""

from tersor.prune.sparse.elements.fisher import WeightFisher
from tersor.prune.sparse.elements.magnitude import WeightMagnitude
from tersor.prune.sparse.elements.magnitude_average import MagnitudeAverage
from tersor.prune.sparse.elements.movement import Movement
from tersor.prune.sparse.elements.random import RandomWeights
from tersor.prune.sparse.elements.score import GatheredScore, WeightScore
from tersor.prune.sparse.elements.taylor import WeightTaylor
from tersor.prune.sparse.elements.wanda import Wanda

__all__ = [
    "GatheredScore",
    "MagnitudeAverage",
    "Movement",
    "RandomWeights",
    "Wanda",
    "WeightFisher",
    "WeightMagnitude",
    "WeightScore",
    "WeightTaylor",
]
