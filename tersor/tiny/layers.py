"""Layers small enough to read: each computes its output, and the gradients of its weights by hand.

A model is a ``Sequential`` of layers. ``model(x)`` takes an array and gives one, or takes a ``Tensor`` and gives one.
``model.backward(g)`` takes ∂loss/∂output, leaves ∂loss/∂w in each parameter's ``grad`` and gives ∂loss/∂input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[Any]


class Tensor:
    """An array, ``data``, and after a backward pass its gradient, ``grad``, of the same shape."""

    def __init__(self, data: Any) -> None:
        self.data: Array = np.array(data)
        self.grad: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ``data``."""
        return self.data.shape

    @property
    def ndim(self) -> int:
        """How many axes ``data`` has."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """How many numbers ``data`` holds."""
        return self.data.size

    def __repr__(self) -> str:
        return f"Tensor({self.data!r})"


def as_array(values: Any) -> Array:
    """The array in a Tensor, or what NumPy makes of anything else."""
    return values.data if isinstance(values, Tensor) else np.asarray(values)


class Layer(ABC):
    """What every layer can do; ``layers`` are the layers inside it, if any."""

    layers: Sequence[Layer] = ()

    def forward(self, x: Any) -> Any:
        """The output for a batch ``x``: a Tensor for a Tensor, an array for an array."""
        return Tensor(self.compute(x.data)) if isinstance(x, Tensor) else self.compute(np.asarray(x))

    def __call__(self, x: Any) -> Any:
        return self.forward(x)

    def parameters(self) -> list[Tensor]:
        """Every Tensor of this layer and of those inside it, in order; one that several layers share, once."""
        own = [value for value in vars(self).values() if isinstance(value, Tensor)]
        found = own + [parameter for layer in self.layers for parameter in layer.parameters()]
        return list({id(parameter): parameter for parameter in found}.values())

    @abstractmethod
    def compute(self, x: Array) -> Array:
        """The output, as an array; what the backward pass needs is remembered."""

    @abstractmethod
    def backward(self, gradient: Array) -> Array:
        """∂loss/∂input from ∂loss/∂output of the last ``compute``; sets ``grad`` of the parameters."""


class Linear(Layer):
    """y = x · W + b. ``weight`` [in, out], as in the course (torch has [out, in]); ``bias`` [out] or None; x [.., in].

    Weights start as N(0, 2 / in) (He et al. 2015, arXiv 1502.01852), biases as zero. Without ``rng`` NumPy's global
    generator is used, so that ``np.random.seed`` works. In the classic the gradient came from its autograd module; here
    it is written out.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, rng: np.random.Generator | None = None
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.weight = Tensor(_initial((in_features, out_features), in_features, rng))
        self.bias = Tensor(np.zeros(out_features, np.float32)) if bias else None

    @property
    def weights(self) -> Tensor:
        """``weight`` under the name that the course's early modules use."""
        return self.weight

    @weights.setter
    def weights(self, value: Tensor) -> None:
        self.weight = value

    def compute(self, x: Array) -> Array:
        """y [.., out]."""
        if x.shape[-1] != self.weight.shape[0]:
            raise ValueError(f"a Linear with weight {list(self.weight.shape)} was given x {list(x.shape)}")
        self._x = x
        y = x @ self.weight.data
        return y if self.bias is None else y + self.bias.data

    def backward(self, gradient: Array) -> Array:
        """∂W = xᵀ · g, ∂b = Σ g over the batch, ∂x = g · Wᵀ."""
        x, g = self._x.reshape(-1, self._x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        self.weight.grad = x.T @ g
        if self.bias is not None:
            self.bias.grad = g.sum(axis=0)
        return gradient @ self.weight.data.T


class Conv2D(Layer):
    """Cross-correlation. ``weight`` [out, in, h, w]; ``bias`` [out] or None; x [batch, in, height, width].

    Each output is the product of a window of x with a filter, so that one matrix product over all windows does it;
    the classic looped over them in Python. Weights start as a Linear's with in · h · w inputs.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], stride: int = 1,
        padding: int = 0, bias: bool = True, rng: np.random.Generator | None = None,
    ) -> None:  # fmt: skip
        h, w = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = (h, w), stride, padding
        self.weight = Tensor(_initial((out_channels, in_channels, h, w), in_channels * h * w, rng))
        self.bias = Tensor(np.zeros(out_channels, np.float32)) if bias else None

    def compute(self, x: Array) -> Array:
        """y [batch, out, (height + 2·padding − h) / stride + 1, the same of the width]."""
        if x.ndim != 4 or x.shape[1] != self.weight.shape[1]:
            raise ValueError(f"a Conv2D with weight {list(self.weight.shape)} was given x {list(x.shape)}")
        p, s = self.padding, self.stride
        padded = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
        windows = sliding_window_view(padded, self.weight.shape[2:], axis=(2, 3))[:, :, ::s, ::s]
        self._windows, self._padded_shape = windows, padded.shape  # windows [batch, in, rows, columns, h, w]
        y = np.moveaxis(np.tensordot(windows, self.weight.data, axes=((1, 4, 5), (1, 2, 3))), -1, 1)
        return y if self.bias is None else y + self.bias.data[:, None, None]

    def backward(self, gradient: Array) -> Array:
        """∂W sums g · window; ∂x gives each g back to its window, times the filter."""
        self.weight.grad = np.tensordot(gradient, self._windows, axes=((0, 2, 3), (0, 2, 3)))
        if self.bias is not None:
            self.bias.grad = gradient.sum(axis=(0, 2, 3))
        rows, columns = gradient.shape[2:]
        s, p = self.stride, self.padding
        back: Array = np.zeros(self._padded_shape, gradient.dtype)
        for i, j in np.ndindex(*self.weight.shape[2:]):
            through = np.tensordot(gradient, self.weight.data[:, :, i, j], axes=((1,), (0,)))
            back[:, :, i : i + s * rows : s, j : j + s * columns : s] += np.moveaxis(through, -1, 1)
        return back[:, :, p : back.shape[2] - p, p : back.shape[3] - p]


class ReLU(Layer):
    """y = max(x, 0)."""

    def compute(self, x: Array) -> Array:
        """y, shaped like x."""
        self._positive = x > 0
        return x * self._positive

    def backward(self, gradient: Array) -> Array:
        """g where x was positive, else 0."""
        return gradient * self._positive


class Flatten(Layer):
    """[batch, ..] to [batch, all the rest], between convolutions and a Linear."""

    def compute(self, x: Array) -> Array:
        """y [batch, n]."""
        self._shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, gradient: Array) -> Array:
        """g in the shape of x."""
        return gradient.reshape(self._shape)


class Sequential(Layer):
    """Layers one after the other: ``Sequential(a, b)`` or ``Sequential([a, b])``; both of the course's ways work."""

    def __init__(self, *layers: Any) -> None:
        self.layers: list[Layer] = list(layers[0] if len(layers) == 1 and isinstance(layers[0], list) else layers)

    def compute(self, x: Array) -> Array:
        """The last layer's output."""
        for layer in self.layers:
            x = layer.compute(x)
        return x

    def backward(self, gradient: Array) -> Array:
        """Through the layers, last to first. Raises ValueError where one layer, or its weight, stands in two places."""
        own = [id(part) for layer in self.layers for part in (*walk(layer), *layer.parameters())]
        if len(set(own)) < len(own):
            raise ValueError("a layer or weight stands in two places, and remembers one pass only: train copies of it")
        for layer in reversed(self.layers):
            gradient = layer.backward(gradient)
        return gradient


def walk(model: Layer) -> Iterator[Layer]:
    """The layers of ``model`` that have no layers inside, in the order in which they run; the course's own too."""
    inside = getattr(model, "layers", ())
    if not inside:
        yield model
    for layer in inside:
        yield from walk(layer)


def weighted(model: Layer) -> list[Linear | Conv2D]:
    """The layers with weights, in the order in which they run."""
    return [layer for layer in walk(model) if isinstance(layer, (Linear, Conv2D))]


def _initial(shape: tuple[int, ...], inputs: int, rng: np.random.Generator | None) -> Array:
    normal = np.random.standard_normal(shape) if rng is None else rng.standard_normal(shape)
    return (normal * np.sqrt(2 / inputs)).astype(np.float32)
