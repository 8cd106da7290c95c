"""Quantisers whose scales stay close together: a penalty on their spread."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.quantize.standing import weight_quantizers
from tersor.train.objective import Forward, Objective


@final
@dataclass(frozen=True)
class ScaleSpread(Objective):
    """``strength`` · mean over weights of the variance of log s over the steps s of that weight.

    0 where all channels (or groups) of each weight share one step; scale-free, so that it does not pull steps up or
    down together. What is close together survives one scale for all, and does not let single channels run away. Add it
    to an objective: ``Distill() + ScaleSpread(0.1)``. Quantisers of a single step, and steps that are not learnt, have
    no part in it.

    Raises InputError for a strength that is negative or not finite, and where no weight has several learnt steps.
    """

    strength: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.strength < math.inf:
            raise InputError("must be a number from 0 on", where="ScaleSpread.strength", got=self.strength)

    def of(self, forward: Forward) -> Tensor:
        """The penalty of the steps as they stand: []. No pass through the model."""
        several = [
            quantizer.scale.log().var(correction=0)
            for _, quantizer in weight_quantizers(forward.student)
            if quantizer.log_growth is not None and quantizer.calibrated.numel() > 1
        ]
        if not several:
            raise InputError(
                "no weight has several learnt steps", where="ScaleSpread",
                expected="a model after Quantize(learn=True)",
                do="Quantise per channel, or in groups, before this training",
            )  # fmt: skip
        return self.strength * torch.stack(several).mean()
