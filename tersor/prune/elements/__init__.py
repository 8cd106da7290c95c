"""How much a single weight matters: one file for each score."""

from tersor.prune.elements.fisher import WeightFisher
from tersor.prune.elements.magnitude import WeightMagnitude
from tersor.prune.elements.magnitude_average import MagnitudeAverage
from tersor.prune.elements.movement import Movement
from tersor.prune.elements.random import RandomWeights
from tersor.prune.elements.score import GatheredScore, WeightScore
from tersor.prune.elements.taylor import WeightTaylor
from tersor.prune.elements.wanda import Wanda

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
