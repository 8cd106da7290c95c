import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.tensor.affine import choose_parameters, dequantize, quantize

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
