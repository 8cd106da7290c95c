import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.tensor.affine import choose_parameters, dequantize, fake_quantize, join_groups, quantize, split_groups

MAKERS = [np.asarray, torch.tensor]
SCHEMES = [(-128, 127, True), (0, 255, False), (0, 255, True), (-8, 7, True), (-128, 127, False)]


@pytest.mark.parametrize("make", MAKERS)
def test_halves_round_to_even(make):
    x = make([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, make(1.0), make(0), quant_min=-128, quant_max=127).tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize("make", MAKERS)
def test_range_ends_are_exact_and_beyond_them_is_clamped(make):
    scale, zero_point = choose_parameters(make(-1.0), make(3.0), quant_min=0, quant_max=255, symmetric=False)
    q = quantize(make([-1.0, 0.0, 3.0, 99.0, -99.0]), scale, zero_point, quant_min=0, quant_max=255)
    assert q.tolist() == [0, int(zero_point), 255, 255, 0]


@pytest.mark.parametrize("make", MAKERS)
def test_symmetric_weights_use_absmax_over_127(make):
    scale, zero_point = choose_parameters(
        make([-2.54, -1.0]), make([1.0, 1.27]), quant_min=-128, quant_max=127, symmetric=True
    )
    assert scale.tolist() == pytest.approx([0.02, 0.01])
    assert zero_point.tolist() == [0, 0]
    assert quantize(make([-2.54, 1.27]), scale, zero_point, quant_min=-128, quant_max=127).tolist() == [-127, 127]


@pytest.mark.parametrize("make", MAKERS)
def test_a_range_above_zero_keeps_zero_point_zero(make):
    scale, zero_point = choose_parameters(make(0.5), make(2.55), quant_min=0, quant_max=255, symmetric=False)
    assert float(scale) == pytest.approx(0.01) and int(zero_point) == 0


def test_an_empty_range_still_has_a_positive_scale():
    for symmetric in (True, False):
        scale, _ = choose_parameters(torch.zeros(2), torch.zeros(2), quant_min=-128, quant_max=127, symmetric=symmetric)
        assert (scale > 0).all() and torch.isfinite(1 / scale).all()


@pytest.mark.parametrize("bounds", [(float("nan"), 1.0), (0.0, float("inf")), (1.0, 0.0)])
def test_impossible_ranges_are_refused(bounds):
    with pytest.raises(ValueError, match="finite bounds"):
        choose_parameters(np.asarray(bounds[0]), np.asarray(bounds[1]), quant_min=0, quant_max=255, symmetric=False)


@given(
    low=st.floats(-1e4, 1e4), width=st.floats(0, 1e4), scheme=st.sampled_from(SCHEMES),
    fractions=st.lists(st.floats(0, 1), min_size=1, max_size=8),
)  # fmt: skip
def test_inside_the_range_the_error_is_at_most_half_a_step_and_zero_is_exact(low, width, scheme, fractions):
    quant_min, quant_max, symmetric = scheme
    high = low + width
    scale, zero_point = choose_parameters(
        np.asarray(low), np.asarray(high), quant_min=quant_min, quant_max=quant_max, symmetric=symmetric
    )
    x = np.asarray([low + f * width for f in fractions] + [0.0])
    q = quantize(x, scale, zero_point, quant_min=quant_min, quant_max=quant_max)
    back = dequantize(q, scale, zero_point)
    assert back[-1] == 0.0
    # The rounded zero point may push the ends out by half a step more.
    assert np.abs(back - x).max() <= float(scale) * 1.0001 + 1e-12


def test_numpy_and_torch_agree():
    x = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    arguments = dict(quant_min=0, quant_max=255)
    ours = choose_parameters(low, high, symmetric=False, **arguments)
    theirs = choose_parameters(torch.tensor(low), torch.tensor(high), symmetric=False, **arguments)
    assert np.array_equal(ours[1], theirs[1].numpy())
    assert np.array_equal(quantize(x, *ours, **arguments), quantize(torch.tensor(x), *theirs, **arguments).numpy())


@pytest.mark.parametrize("make", MAKERS)
def test_fake_quantisation_is_quantising_and_back_in_the_inputs_own_type(make):
    x = make(np.linspace(-3, 3, 41).astype(np.float32))
    scale, zero_point = make(np.float32(0.3)), make(np.int32(4))
    got = fake_quantize(x, scale, zero_point, quant_min=0, quant_max=15)
    q = np.clip(np.round(np.asarray(x) / np.float32(0.3)) + 4, 0, 15)
    assert got.dtype == x.dtype and np.array_equal(np.asarray(got), ((q - 4) * np.float32(0.3)).astype(np.float32))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_gradient_passes_straight_through_up_to_the_very_ends_and_not_beyond(channels):
    scale, zero_point = torch.full((channels, 1), 0.1), torch.full((channels, 1), 3, dtype=torch.int32)
    low, high = (torch.tensor(end, dtype=torch.int32) * torch.tensor(0.1) for end in (-3, 12))
    x = torch.stack([low, high, low - 0.01, high + 0.01, low / 3, torch.tensor(0.0)]).repeat(channels, 1)
    x.requires_grad_()
    got = fake_quantize(x, scale, zero_point, quant_min=0, quant_max=15)
    plain = fake_quantize(x.detach(), scale, zero_point, quant_min=0, quant_max=15)
    assert torch.equal(got, plain) and not plain.requires_grad
    assert torch.equal(got[:, :2], x.detach()[:, :2])  # the ends are on the grid
    upstream = torch.randn(x.shape)
    (slope,) = torch.autograd.grad((got * upstream).sum(), [x])
    assert torch.equal(slope, upstream * torch.tensor([1.0, 1, 0, 0, 1, 1]))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(
    "make", [np.float16, *(lambda x, d=d: torch.tensor(x, dtype=d) for d in (torch.half, torch.bfloat16))]
)
def test_half_precision_is_rounded_as_its_float32_is(make, bits):
    x = make(np.linspace(-3, 5, 5001, dtype=np.float32))
    wide = x.astype(np.float32) if isinstance(x, np.ndarray) else x.float()
    ends = {"quant_min": 0, "quant_max": 2**bits - 1}
    for as_floats in (lambda end: wide[end], lambda end: x[end]):  # the scale in float32, and in half precision
        scale, zero_point = choose_parameters(as_floats(0), as_floats(-1), symmetric=False, **ends)
        assert scale.dtype == as_floats(0).dtype
        got, expected = (quantize(values, scale, zero_point, **ends) for values in (x, wide))
        assert got.tolist() == expected.tolist() and int(got.max()) == 2**bits - 1


@pytest.mark.parametrize("make", [np.float16, lambda x: torch.tensor(x, dtype=torch.half)])
def test_integers_beyond_the_largest_float16_come_back_in_it(make):
    ends = {"quant_min": 0, "quant_max": 65535}
    scale, zero_point = choose_parameters(make(0.0), make(5.0), symmetric=False, **ends)
    q = quantize(make([0.0, 2.5, 5.0]), scale, zero_point, **ends)
    assert dequantize(q, scale, zero_point).tolist() == pytest.approx([0, 2.5, 5], rel=2e-3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_ranges_as_wide_or_as_narrow_as_the_type_have_a_scale(dtype):
    most, least = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
    for symmetric, low in ((False, 0), (True, -128)):
        ends = {"quant_min": low, "quant_max": low + 255, "symmetric": symmetric}
        scale, _ = choose_parameters(dtype(-most), dtype(most), **ends)
        assert float(scale) == pytest.approx(2 * float(most) / (254 if symmetric else 255), rel=1e-3)
        scale, _ = choose_parameters(dtype(0), least, **ends)
        assert 0 < scale and np.isfinite(1 / scale)


def test_numpy_is_fake_quantised_where_torch_was_never_loaded():
    code = (
        "import sys, numpy as np; from tersor.tensor.affine import fake_quantize; x = np.float32([0.3, 9]); "
        "got = fake_quantize(x, np.float32(0.5), np.int32(0), quant_min=-8, quant_max=7); "
        "print(got, 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "[0.5 3.5] False\n"


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("shape", "axis", "size"), [((3, 8), 0, 4), ((2, 3, 2, 2), 0, 6), ((4, 3, 2), 1, 2), ((4, 3, 2), -1, 6)]
)
def test_groups_are_runs_of_each_row_and_join_to_what_was_split(make, shape, axis, size):
    x = make(np.arange(np.prod(shape)).reshape(shape))
    groups = split_groups(x, size, axis)
    for row, runs in zip(np.moveaxis(np.asarray(x), axis, 0), groups.tolist(), strict=True):
        flat = row.reshape(-1).tolist()
        assert runs == [flat[start : start + size] for start in range(0, len(flat), size)]
    assert np.array_equal(join_groups(groups, shape, axis), x)
    with pytest.raises(ValueError, match="group_size 5 does not divide the"):
        split_groups(x, 5, axis)
