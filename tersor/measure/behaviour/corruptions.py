"""Common corruptions of pictures at five severities, and of other inputs that are real numbers.

Source: Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
arXiv:1903.12261, section 4; the strengths are those of its code: CIFAR-10-C's up to 64 pixels, else ImageNet-C's. We
work on tensors: kernels are cut at four deviations, motion blur has one direction; JPEG and weather are not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

SEVERITIES = (1, 2, 3, 4, 5)
SMALL = 64  # pixels of the shorter side up to which a picture is corrupted like CIFAR-10's
Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
_Strengths = tuple[float, float, float, float, float]


def _strength(pictures: Tensor, severity: int, small: _Strengths, large: _Strengths) -> float:
    return (small if min(pictures.shape[-2:]) <= SMALL else large)[severity - 1]


def _normal(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


def gaussian_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """x + σ·normal. Pictures [n, c, h, w] in [0, 1], as in all that follow."""
    c = _strength(x, severity, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38))
    return x + c * _normal(x, generator)


def shot_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Poisson(c·x) / c: the noise of counting light."""
    c = _strength(x, severity, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3))
    return torch.poisson(c * x, generator=generator) / c


def impulse_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A fraction c of the values is set to 0 or 1."""
    c = _strength(x, severity, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27))
    drawn = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    return torch.where(drawn < c / 2, torch.zeros_like(x), torch.where(drawn < c, torch.ones_like(x), x))


def speckle_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """x + x·σ·normal."""
    c = _strength(x, severity, (0.06, 0.10, 0.12, 0.16, 0.20), (0.15, 0.20, 0.35, 0.45, 0.60))
    return x + c * x * _normal(x, generator)


def gaussian_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Blurred by a Gaussian of σ pixels."""
    return _blurred(x, _strength(x, severity, (0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)))


def defocus_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Blurred by a disc of radius r pixels whose edge is smoothed."""
    radius = _strength(x, severity, (0.3, 0.4, 0.5, 1.0, 1.5), (3, 4, 6, 8, 10))
    smooth = _strength(x, severity, (0.4, 0.5, 0.6, 0.2, 0.1), (0.1, 0.5, 0.5, 0.5, 0.5))
    reach = math.ceil(radius) + 2
    at = torch.arange(-reach, reach + 1, dtype=x.dtype)
    disc = (at[:, None].square() + at.square() <= radius**2).to(x.dtype)
    kernel = _blurred(disc[None, None], smooth)[0, 0]
    return _filtered(x, kernel / kernel.sum())


def motion_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Blurred along a line of slope one, the more the nearer: weights fall like a Gaussian."""
    reach = int(_strength(x, severity, (6, 6, 6, 8, 9), (10, 15, 15, 15, 20)))
    sigma = _strength(x, severity, (1, 1.5, 2, 2, 2.5), (3, 5, 8, 12, 15))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=x.dtype) / sigma).square())
    weights[:reach] = 0  # motion leaves a trail on one side
    return _filtered(x, torch.diag(weights / weights.sum()))


def brightness(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The value of HSV is raised by c; hue and saturation stay."""
    c = _strength(x, severity, (0.05, 0.10, 0.15, 0.20, 0.30), (0.1, 0.2, 0.3, 0.4, 0.5))
    value = x.amax(dim=1, keepdim=True)
    raised = (value + c).clamp(0, 1)
    return torch.where(value > 0, x * (raised / value.clamp(min=1e-12)), raised)


def contrast(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """(x − mean)·c + mean, the mean taken over each colour of each picture."""
    c = _strength(x, severity, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05))
    mean = x.mean(dim=(-2, -1), keepdim=True)
    return (x - mean) * c + mean


def pixelate(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Shrunk to a fraction c of its sides by averaging, and enlarged by repeating."""
    c = _strength(x, severity, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25))
    height, width = x.shape[-2:]
    small = F.interpolate(x, (max(1, int(height * c)), max(1, int(width * c))), mode="area")
    return F.interpolate(small, (height, width), mode="nearest-exact")


PICTURES: Mapping[str, Corruption] = MappingProxyType(
    {
        function.__name__: function
        for function in (
            gaussian_noise, shot_noise, impulse_noise, speckle_noise, gaussian_blur, defocus_blur, motion_blur,
            brightness, contrast, pixelate,
        )
    }
)  # fmt: skip


def noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """x + σ·normal; inputs [n, …] scaled so that each feature reaches from 0 to 1."""
    return x + (0.02, 0.05, 0.10, 0.15, 0.25)[severity - 1] * _normal(x, generator)


def dropped_values(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A fraction of the values is replaced by the middle of what the feature reaches, as if they were missing."""
    c = (0.02, 0.05, 0.10, 0.20, 0.30)[severity - 1]
    drawn = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    return torch.where(drawn < c, torch.full_like(x, 0.5), x)


NUMBERS: Mapping[str, Corruption] = MappingProxyType({"noise": noise, "dropped_values": dropped_values})


def _blurred(x: Tensor, sigma: float) -> Tensor:
    reach = max(1, math.ceil(4 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=x.dtype) / sigma).square())
    weights = weights / weights.sum()
    return _filtered(_filtered(x, weights[:, None]), weights[None, :])


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel correlated with one kernel [odd, odd]; beyond its edge a picture goes on as it ends."""
    channels, (height, width) = x.shape[1], kernel.shape
    padded = F.pad(x, (width // 2, width // 2, height // 2, height // 2), mode="replicate")
    return F.conv2d(padded, kernel.expand(channels, 1, height, width).contiguous(), groups=channels)
