"""How much a single weight matters: one file for each score."""

from tersor.prune.elements.magnitude import WeightMagnitude
from tersor.prune.elements.random import RandomWeights
from tersor.prune.elements.score import WeightScore

__all__ = ["RandomWeights", "WeightMagnitude", "WeightScore"]
