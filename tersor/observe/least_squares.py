"""Least squares for the weights of one layer: what it reads as rows, and normal equations that grow batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(eq=False)
class NormalEquations:
    """G = Σ x xᵀ and C = Σ x yᵀ over rows, float64, for each group of a convolution by itself (a linear layer is one).

    ``weight`` [groups, outputs, unknowns]: as it stands; the last unknown is the bias where ``bias`` is true.
    """

    weight: Tensor
    bias: bool
    G: Tensor = field(init=False)
    C: Tensor = field(init=False)
    total: float = 0.0
    rows: int = 0

    def __post_init__(self) -> None:
        groups, outputs, unknowns = self.weight.shape
        self.G = self.weight.new_zeros(groups, unknowns, unknowns)
        self.C = self.weight.new_zeros(groups, unknowns, outputs)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count rows in: x [groups, rows, unknowns without the bias], y [groups, rows, outputs]."""
        x, y = x.double(), y.double()
        if self.bias:
            x = F.pad(x, (0, 1), value=1.0)
        self.G += x.mT @ x
        self.C += x.mT @ y
        self.total += float(y.square().sum())
        self.rows += x.shape[1]

    def solve(self, ridge: float) -> Tensor:
        """argmin_W Σ ‖y − W x‖² + λ ‖W − W₀‖²: [groups, outputs, unknowns].

        λ is ``ridge`` times the mean of x² over rows and unknowns, times the rows; the bias goes free. Where that does
        not make the equations regular, the solution nearest to W₀.
        """
        unknowns = self.G.shape[1] - self.bias
        diagonal = self.G.diagonal(dim1=1, dim2=2)
        held = ridge * diagonal[:, :unknowns].mean(1, keepdim=True).expand(-1, unknowns)
        regular = self.G + torch.diag_embed(F.pad(held, (0, int(self.bias))))
        gradient = self.C - self.G @ self.weight.mT
        factor, failed = torch.linalg.cholesky_ex(regular)
        # A singular matrix may pass, with pivots that are rounding errors.
        pivots = factor.diagonal(dim1=1, dim2=2)
        if not bool(failed.any()) and bool((pivots.amin(1) > 1e-7 * pivots.amax(1)).all()):
            return self.weight + torch.cholesky_solve(gradient, factor).mT
        return self.weight + (torch.linalg.pinv(regular, hermitian=True) @ gradient).mT

    def moments(self) -> Tensor:
        """Mean of x xᵀ over rows, about the mean of x where there is a bias to take it up: [groups, inputs, inputs].

        Taking the mean away leaves rounding errors, which make the moments of inputs that hardly vary indefinite: as
        much as they may be in all is added to the diagonal, but where an input is always 0.
        """
        inputs = self.G.shape[1] - self.bias
        found = self.G[:, :inputs, :inputs] / self.rows
        if not self.bias:
            return found
        mean = self._mean
        centred = found - mean[:, :, None] * mean[:, None, :]
        sizes = found.diagonal(dim1=1, dim2=2)
        errors = 4 * inputs * torch.finfo(found.dtype).eps * sizes.amax(1, keepdim=True)
        return centred + torch.diag_embed(torch.where(sizes > 0, errors, 0.0))

    def with_weights(self, weight: Tensor) -> Tensor:
        """A solution of these weights [groups, outputs, inputs], with the bias that goes best with them."""
        if not self.bias:
            return weight
        y = self.C[:, -1] / self.rows
        bias = y - (weight @ self._mean[..., None])[..., 0]
        return torch.cat([weight, bias[..., None]], 2)

    @property
    def _mean(self) -> Tensor:
        return self.G[:, -1, :-1] / self.rows

    def error(self, weight: Tensor) -> float:
        """Σ ‖y − W x‖² / Σ ‖y‖² over the rows counted."""
        squares = self.total - 2 * float((weight.mT * self.C).sum()) + float((weight.mT * (self.G @ weight.mT)).sum())
        return max(0.0, squares) / self.total if self.total else 0.0


def equations_of(layer: nn.Module) -> NormalEquations:
    """Empty normal equations for a convolution or a linear layer."""
    weight, bias = as_rows(layer, tensor_of(layer, "weight")).double(), layer.bias
    if isinstance(bias, Tensor):
        weight = torch.cat([weight, bias.detach().double().view(len(weight), -1, 1)], 2)
    return NormalEquations(weight, isinstance(bias, Tensor))


def written(layer: nn.Module, solution: Tensor) -> dict[str, Tensor]:
    """A solution as the layer's tensors: weight, and bias where it has one."""
    weight = tensor_of(layer, "weight")
    if layer.bias is None:
        return {"weight": as_weight(layer, solution).to(weight)}
    return {"weight": as_weight(layer, solution[..., :-1]).to(weight), "bias": solution[..., -1].flatten().to(weight)}


def as_rows(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor of the weight's shape as [groups, outputs, inputs · kernel]."""
    tensor = tensor.movedim(output_axis(layer), 0)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    return tensor.reshape(groups, len(tensor) // groups, -1)


def as_weight(layer: nn.Module, rows: Tensor) -> Tensor:
    """The inverse of ``as_rows``."""
    axis, shape = output_axis(layer), tensor_of(layer, "weight").shape
    return rows.reshape(shape[axis], *(n for d, n in enumerate(shape) if d != axis)).movedim(0, axis).contiguous()


def tensor_of(layer: nn.Module, name: str) -> Tensor:
    """A layer's weight or bias, as it reads it: detached."""
    value = getattr(layer, name)
    assert isinstance(value, Tensor), f"the {type(layer).__name__} has a {name}"
    return value.detach()


def output_axis(layer: nn.Module) -> int:
    """The axis of a layer's weight along which its outputs lie: 1 where the inputs come first."""
    return 1 if isinstance(layer, _ConvTransposeNd) or is_conv1d(layer) else 0


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D`` (GPT-2's): a linear layer whose weight is [inputs, outputs]."""
    return any(base.__name__ == "Conv1D" for base in type(layer).__mro__) and getattr(layer, "nf", None) is not None


def drawn_rows(layer: nn.Module, y: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Numbers of at most ``most`` of a layer's output positions (all samples and places in one row), increasing."""
    count = y.numel() // y.shape[_channel_axis(layer, y)]
    if count <= most:
        return torch.arange(count, device=y.device)
    return torch.randperm(count, generator=generator)[:most].sort().values.to(y.device)


def output_rows(layer: nn.Module, y: Tensor, rows: Tensor, channels: Tensor | None, groups: int) -> Tensor:
    """The outputs at ``rows``, of ``channels`` only: [groups, rows, outputs of a group]."""
    found = y.movedim(_channel_axis(layer, y), -1)
    found = found.reshape(-1, found.shape[-1])[rows]
    found = found if channels is None else found[:, channels.to(found.device)]
    return found.reshape(len(rows), groups, -1).transpose(0, 1)


def input_rows(layer: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """What the layer multiplies its weights with for the outputs at ``rows``: [groups, rows, unknowns]."""
    if not isinstance(layer, _ConvNd):
        return x.reshape(-1, x.shape[-1])[rows][None]
    return _patches(layer, x if x.ndim == layer.weight.ndim else x[None], rows)


def _patches(layer: _ConvNd, x: Tensor, rows: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    spatial = len(layer.kernel_size)
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    sizes = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, layer.stride, strict=True)]
    sample, *places = torch.unravel_index(rows, (len(x), *sizes))
    index = [sample.view(-1, *[1] * spatial)]
    for axis, place in enumerate(places):
        offsets = torch.arange(layer.kernel_size[axis], device=x.device) * layer.dilation[axis]
        shape = [len(rows), *[1] * spatial]
        shape[axis + 1] = len(offsets)
        index.append((place[:, None] * layer.stride[axis] + offsets).view(shape))
    found = x.movedim(1, -1)[tuple(index)].movedim(-1, 1)  # [rows, channels, kernel …]
    return found.reshape(len(rows), layer.groups, -1).transpose(0, 1)


def _channel_axis(layer: nn.Module, y: Tensor) -> int:
    return y.ndim - 1 - (len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0)
