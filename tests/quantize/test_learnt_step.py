"""FakeQuantize against a naive autograd reference, and what an exported graph computes."""

import copy

import pytest
import torch
from torch import nn

from tersor.core.fake_quantize import FakeQuantize

CASES = {
    "signed weight per channel": ((6, 3, 3, 3), -128, 127, 0, 0.004),
    "per channel on axis 1": ((4, 5), -8, 7, 1, 0.1),
    "unsigned activation": ((2, 3, 4, 4), 0, 255, None, 0.005),
    "unsigned with zero point": ((2, 3, 4, 4), 0, 255, None, 0.01),
    "vector": ((50,), -8, 7, None, 0.1),
}
GROUPS = {"linear": ((6, 32), 0, 8), "convolution": ((4, 6, 3, 2), 0, 4), "axis 1": ((6, 4, 3, 2), 1, 12)}


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    shape, low, high, axis, step = CASES[name]
    channels = [] if axis is None else [shape[axis]]
    scale = step * (1 + torch.rand(channels))
    zero_point = torch.full(channels, 100 if name == "unsigned with zero point" else 0, dtype=torch.int32)
    x = torch.randn(shape, dtype=dtype)
    return FakeQuantize(scale, zero_point, low, high, axis=axis, learn=True), x


def straight_through(x, scale, zero_point, low, high, axis):
    """LSQ by autograd: round's gradient is one, the step's gradient is scaled by 1 / sqrt(n · q_max)."""
    per_scale = x.numel() / scale.numel()
    factor = 1 / (per_scale * high) ** 0.5
    scale = scale * factor + (scale - scale * factor).detach()
    if axis is not None:
        shape = [-1 if d == axis else 1 for d in range(x.ndim)]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    ratio = x / scale + zero_point
    rounded = ratio + (torch.round(ratio.detach() - zero_point) + zero_point - ratio).detach()
    clipped = torch.where(rounded < low, float(low), torch.where(rounded > high, float(high), rounded))
    return (clipped - zero_point) * scale


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_naive_reference(name):
    quantizer, x = make(name)
    x.requires_grad_()
    upstream = torch.randn(x.shape)
    got = quantizer(x)
    got_x, got_growth = torch.autograd.grad((got * upstream).sum(), [x, quantizer.log_growth])
    got_scale = got_growth / quantizer.scale.detach()  # d scale / d log_growth = scale
    x64, scale64 = x.detach().double().requires_grad_(), quantizer.scale.detach().double().requires_grad_()
    numbers = quantizer.zero_point.double(), quantizer.quant_min, quantizer.quant_max, quantizer.axis
    expected = straight_through(x64, scale64, *numbers)
    expected_x, expected_scale = torch.autograd.grad((expected * upstream.double()).sum(), [x64, scale64])
    assert torch.allclose(got.double(), expected, atol=1e-5)
    assert torch.equal(got_x.double(), expected_x) and 0 < (expected_x == 0).sum() < x.numel()
    assert torch.allclose(got_scale.double(), expected_scale, rtol=1e-3, atol=1e-4)


def test_the_results_of_operators_may_be_changed_in_place():
    quantizer, x = make("unsigned with zero point")
    x.requires_grad_()
    got = quantizer(x * 1)
    got += 1
    got.relu_()
    got.sum().backward()
    assert torch.isfinite(x.grad).all() and quantizer.log_growth.grad is not None


def test_bfloat16_stays_bfloat16_and_learns():
    quantizer, x = make("unsigned activation", torch.bfloat16)
    got = quantizer(x.requires_grad_())
    got.float().sum().backward()
    assert got.dtype == x.grad.dtype == torch.bfloat16 and torch.isfinite(quantizer.log_growth.grad)


def test_a_fixed_step_gets_no_gradient():
    quantizer = FakeQuantize(torch.tensor(0.1), torch.tensor(0), -8, 7, axis=None, learn=False)
    x = torch.randn(9, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None and list(quantizer.parameters()) == []


def test_copies_and_saved_states_give_the_same_values():
    quantizer, x = make("signed weight per channel")
    fresh, _ = make("signed weight per channel")
    with torch.no_grad():
        quantizer.log_growth.add_(1)
    assert not torch.equal(fresh(x), quantizer(x))
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x), quantizer(x)) and torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))


@pytest.mark.parametrize("name", ["signed weight per channel", "unsigned activation", "unsigned with zero point"])
def test_the_exported_pair_is_within_one_step_of_eager_and_equal_but_at_ties(name):
    quantizer, x = make(name)
    program = torch.export.export(nn.Sequential(quantizer), (x,), strict=False)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("quantize_per" in name for name in names) and any("dequantize_per" in name for name in names)
    difference = (program.module()(x) - quantizer(x)).abs().detach()
    step = quantizer.scale.detach().max()
    assert difference.max() <= 1.001 * step
    assert (difference > 1e-5).float().mean() < 0.01


def make_groups(name, zero_point=0):
    torch.manual_seed(0)
    shape, axis, size = GROUPS[name]
    x = torch.randn(shape)
    scale = 0.1 * (1 + torch.rand(shape[axis], x.numel() // shape[axis] // size))
    zero_point = torch.full(scale.shape, zero_point, dtype=torch.int32)
    low, high = (0, 15) if zero_point.any() else (-8, 7)
    return FakeQuantize(scale, zero_point, low, high, axis=axis, learn=True, group_size=size), x


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("zero_point", [0, 7])
def test_each_group_is_rounded_and_learns_as_a_tensor_of_its_own(name, zero_point):
    quantizer, x = make_groups(name, zero_point)
    axis, size = quantizer.axis, quantizer.group_size
    upstream = torch.randn(x.shape)
    x.requires_grad_()
    got = quantizer(x)
    got_x, got_growth = torch.autograd.grad((got * upstream).sum(), [x, quantizer.log_growth])
    for row, (channel, outgoing, value, slope) in enumerate(
        zip(*(tensor.unbind(axis) for tensor in (x.detach(), upstream, got, got_x)), strict=True)
    ):
        for group in range(quantizer.scale.shape[1]):
            run = slice(group * size, (group + 1) * size)
            alone = quantizer.scale[row, group].detach(), quantizer.zero_point[row, group]
            one = FakeQuantize(*alone, quantizer.quant_min, quantizer.quant_max, axis=None, learn=True)
            part = channel.flatten()[run].clone().requires_grad_()
            expected = one(part)
            (expected * outgoing.flatten()[run]).sum().backward()
            assert torch.equal(value.flatten()[run], expected) and torch.equal(slope.flatten()[run], part.grad)
            assert got_growth[row, group] == pytest.approx(float(one.log_growth.grad), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_exported_as_the_pair_too(name):
    quantizer, x = make_groups(name)
    program = torch.export.export(nn.Sequential(quantizer), (x,), strict=False)
    assert torch.allclose(program.module()(x), quantizer(x), atol=1e-5)
    assert f"group_size={quantizer.group_size}" in repr(quantizer)
