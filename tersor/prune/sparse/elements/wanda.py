"""Score by a weight times what it is multiplied with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.place import TensorPlace, aliases, module_at
from tersor.core.task import Task
from tersor.prune.sparse.elements.score import WeightScore
from tersor.prune.structured.scores.activation import root_mean_squares, weighted


@final
@dataclass(frozen=True)
class Wanda(WeightScore):
    """|w| · ‖x‖, ‖x‖ being the root mean square of the input that the weight is multiplied with.

    Over ``batches`` calibration batches and all positions, without gradients, in eval mode. The paper compares the
    weights of one output with each other: that is ``Prune(score=Wanda(), pattern=Element(per_row=True))``. It takes
    the Euclidean norm over all tokens; the mean in its place changes no order within a layer, and lets layers be
    compared.

    Raises InputError for batches < 1, no calibration data, an input that is not finite, and a weight of what is no
    convolution or linear layer, or is never called as a module.
    Source: Sun et al. 2024 (arXiv 2306.11695), equation 1.
    """

    batches: int = 8

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batches < 1:
            raise InputError("at least one batch is needed", where="Wanda.batches", got=self.batches)

    def elements(self, model: nn.Module, task: Task, places: Sequence[TensorPlace]) -> list[Tensor]:
        """In the weight's shape and dtype."""
        layers = [_layers(model, place) for place in places]
        sizes = root_mean_squares(
            model, sorted({path for paths in layers for path in paths}), task, self.batches, "Wanda"
        )
        seen = [next((path for path in paths if path in sizes), None) for paths in layers]
        for place, path in zip(places, seen, strict=True):
            if path is None:
                raise InputError(
                    "nobody's inputs can be seen who reads this weight", where=str(place),
                    got=f"a {type(module_at(model, place.module)).__name__}",
                    expected="a convolution or linear layer that the forward calls as a module",
                    do='Leave it out with where= (ByType("Linear") | ByType("Conv2d"), say), or take WeightMagnitude',
                )  # fmt: skip
        return [weighted(module_at(model, path), sizes[path]) for path in seen if path is not None]


def _layers(model: nn.Module, place: TensorPlace) -> list[str]:
    """The convolutions and linear layers that read the weight; a tied one's others may be embeddings."""
    found = [alias.module for alias in aliases(model, place) if alias.tensor == "weight"]
    return [path for path in found if isinstance(module_at(model, path), (_ConvNd, nn.Linear))]
