"""Score by where training moves a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from tersor.prune.sparse.elements.score import GatheredScore


@final
@dataclass(frozen=True)
class Movement(GatheredScore):
    """− Σ over steps of w · ∂L/∂w: large where training pushes the weight away from zero, negative where towards it.

    The gradient is that of the masked weight, passed straight through to those at zero too, so that they may come back:
    give ``Prune`` ``regrow=True``. Meant for the fine-tuning of a model pretrained on other data; where a network is
    trained further on data that it fits, little moves.

    Source: Sanh et al. 2020 (arXiv 2005.07683), section 3 and equation 3, without the learning rate of the scores; hard
    top-v masks.
    """

    @property
    def reads_gradients(self) -> bool:
        """Yes."""
        return True

    def gather(self, gathered: Tensor, weight: Tensor, gradient: Tensor) -> None:
        """gathered − w · ∂L/∂w."""
        gathered.addcmul_(weight.to(gathered.dtype), gradient.to(gathered.dtype), value=-1)
