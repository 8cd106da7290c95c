"""Outputs against plain loops, gradients against finite differences."""

import numpy as np
import pytest

from tersor.tiny import Conv2D, Flatten, Linear, ReLU, Sequential, Tensor
from tersor.tiny.losses import cross_entropy, distillation


def in_double(layer):
    for p in layer.parameters():
        p.data = p.data.astype(np.float64)
        if p.ndim == 1:
            p.data += np.random.default_rng(7).standard_normal(p.shape)
    return layer


def slope(function, array, step=1e-6):
    """∂function/∂array by central differences."""
    found = np.zeros_like(array)
    for i in np.ndindex(*array.shape):
        kept = array[i]
        array[i] = kept + step
        above = function()
        array[i] = kept - step
        found[i] = (above - function()) / (2 * step)
        array[i] = kept
    return found


RNG = np.random.default_rng(3)
MODELS = {
    "linear": (lambda: Linear(5, 3, rng=RNG), (4, 5)),
    "linear without bias": (lambda: Linear(5, 3, bias=False, rng=RNG), (4, 5)),
    "linear on three axes": (lambda: Linear(5, 3, rng=RNG), (2, 4, 5)),
    "convolution": (lambda: Conv2D(2, 3, 3, rng=RNG), (2, 2, 5, 6)),
    "strided, padded": (lambda: Conv2D(2, 3, (3, 2), stride=2, padding=1, rng=RNG), (2, 2, 6, 5)),
    "stride that leaves some over": (lambda: Conv2D(1, 2, 2, stride=3, rng=RNG), (2, 1, 7, 6)),
    "all": (
        lambda: Sequential(Conv2D(1, 3, 3, rng=RNG), ReLU(), Flatten(), Sequential([Linear(12, 4, rng=RNG), ReLU()])),
        (3, 1, 4, 4),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_finite_differences(name):
    make, shape = MODELS[name]
    model = in_double(make())
    rng = np.random.default_rng(5)
    x = rng.standard_normal(shape)
    weights = rng.standard_normal(model(x).shape)  # so that every output counts differently

    def loss():
        return float(np.sum(weights * model(x)))

    loss()
    to_input = model.backward(weights)
    gradients = [p.grad for p in model.parameters()]
    assert np.allclose(to_input, slope(loss, x), atol=1e-6)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient.shape == p.shape
        assert np.allclose(gradient, slope(loss, p.data), atol=1e-6)


@pytest.mark.parametrize("stride, padding", [(1, 0), (2, 1), (3, 2)])
def test_a_convolution_is_the_product_of_each_window_with_each_filter(stride, padding):
    conv = Conv2D(2, 3, (2, 3), stride=stride, padding=padding)
    conv.bias.data[:] = [1, 2, 3]
    x = np.random.default_rng(0).standard_normal((2, 2, 5, 7))
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    y = conv(x)
    rows, columns = (padded.shape[2] - 2) // stride + 1, (padded.shape[3] - 3) // stride + 1
    assert y.shape == (2, 3, rows, columns)
    for n, f, i, j in np.ndindex(*y.shape):
        window = padded[n, :, i * stride : i * stride + 2, j * stride : j * stride + 3]
        assert y[n, f, i, j] == pytest.approx(float(np.sum(window * conv.weight.data[f])) + f + 1, abs=1e-5)


@pytest.mark.parametrize("labels", [np.array([0, 2, 1]), np.array([[0.2, 0.3, 0.5], [1, 0, 0], [0, 0.5, 0.5]])])
def test_gradients_of_losses_are_those_of_finite_differences(labels):
    rng = np.random.default_rng(1)
    z, teacher = rng.standard_normal((3, 3)), 3 * rng.standard_normal((3, 3))
    losses = [lambda: cross_entropy(z, labels), *(
        lambda t=t, a=a: distillation(z, teacher, labels, t, a) for t in (1.0, 4.0) for a in (0.0, 0.7, 1.0)
    )]  # fmt: skip
    for loss in losses:
        assert np.allclose(loss()[1], slope(lambda loss=loss: loss()[0], z), atol=1e-6)


def test_a_tensor_in_gives_a_tensor_out():
    model = Sequential([Linear(3, 2), ReLU()])
    x = np.ones((4, 3), np.float32)
    assert isinstance(model(Tensor(x)), Tensor) and isinstance(model.forward(x), np.ndarray)
    assert np.array_equal(model(Tensor(x)).data, model(x))
    assert [p.shape for p in model.parameters()] == [(3, 2), (2,)]


def test_numpys_seed_decides_the_first_weights():
    np.random.seed(4)
    first = Linear(6, 5).weight.data
    np.random.seed(4)
    assert np.array_equal(first, Linear(6, 5).weight.data)
    assert Linear(400, 400, rng=np.random.default_rng(0)).weight.data.std() == pytest.approx((2 / 400) ** 0.5, rel=0.02)


def test_a_layer_or_a_weight_in_two_places_computes_but_cannot_be_trained():
    relu, x, one, two = ReLU(), np.ones((2, 3), np.float32), Linear(3, 3), Linear(3, 3)
    two.weight = one.weight
    inside = Sequential(Sequential(Linear(3, 3), relu), Linear(3, 3), relu)
    for model in (Sequential(Linear(3, 3), relu, Linear(3, 3), relu), Sequential(one, two), inside):
        with pytest.raises(ValueError, match="stands in two places"):
            model.backward(model(x))


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\[3, 2\] was given x \[4, 5\]"):
        Linear(3, 2)(np.ones((4, 5)))
    with pytest.raises(ValueError, match=r"was given x \[1, 2, 8, 8\]"):
        Conv2D(3, 2, 3)(np.ones((1, 2, 8, 8)))
