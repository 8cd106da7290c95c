"""Mean and variance of the output channels of layers, over calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from tersor.core.place import module_at
from tersor.core.task import Arguments
from tersor.observe.layerwise import expect_finite, pass_through

_CONSTANT = 1e-9  # variance / squared mean of a channel that varies by rounding only


@dataclass
class Moments:
    """Sums over all samples and positions of each channel: float64 [channels]."""

    count: int
    total: Tensor
    squares: Tensor

    @property
    def mean(self) -> Tensor:
        """E[y]: [channels]."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """E[y²] − E[y]²: [channels]; zero where only rounding varies."""
        square = self.squares / self.count
        found = square - self.mean.square()
        return torch.where(found > _CONSTANT * square, found, 0.0)

    def like(self, other: Moments, tolerance: float) -> bool:
        """Whether deviation and mean of every channel differ by no more than ``tolerance`` of the other's."""
        size = other.variance.sqrt()
        return self.mean_like(other, tolerance) and bool(
            ((self.variance.sqrt() - size).abs() <= tolerance * size).all()
        )

    def mean_like(self, other: Moments, tolerance: float) -> bool:
        """Whether the mean of every channel differs by no more than ``tolerance`` of the other's mean and deviation."""
        size = other.variance.sqrt() + other.mean.abs()
        return bool(((self.mean - other.mean).abs() <= tolerance * size).all())


def channel_moments(
    model: nn.Module, paths: Sequence[str], data: Sequence[Arguments], calls: int | None = None
) -> dict[str, Moments]:
    """path → moments of what the layer gives, over all its calls: convolutions, batch norms, what has channels last.

    ``calls``: of all layers in a forward, which then ends after the last. Raises InputError, naming the layer, where a
    value is not finite.
    """
    found: dict[str, Moments] = {}

    def see(path: str, _: Tensor, y: Tensor) -> None:
        rows = y.detach().movedim(_channel_axis(module_at(model, path), y), -1).flatten(0, -2).double()
        one = Moments(len(rows), rows.sum(0), rows.square().sum(0))
        old = found.get(path)
        found[path] = Moments(old.count + one.count, old.total + one.total, old.squares + one.squares) if old else one

    for number, arguments in enumerate(data):
        pass_through(model, paths, see, arguments, number, calls)
    for path, moments in found.items():
        expect_finite(path, moments.total, moments.squares)
    return found


def _channel_axis(layer: nn.Module, y: Tensor) -> int:
    if isinstance(layer, _BatchNorm):
        return 1
    return y.ndim - 1 - (len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0)
