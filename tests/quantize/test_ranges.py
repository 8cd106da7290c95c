import pytest
import torch

from tersor.core.errors import InputError
from tersor.quantize.ranges import MeanSquaredError, MinMax, Percentile
from tersor.quantize.schemes import Int
from tersor.tensor.affine import choose_parameters, dequantize, quantize

U8, S4 = Int(8, "per_tensor", symmetric=False), Int(4)


def values():
    torch.manual_seed(0)
    rows = torch.randn(3, 2000)
    rows[0] = rows[0].relu()
    rows[1, 0] = 40.0
    return rows


def lost(rows, low, high, scheme):
    numbers = dict(quant_min=scheme.quant_min, quant_max=scheme.quant_max)
    scale, zero = choose_parameters(low[:, None], high[:, None], symmetric=scheme.symmetric, **numbers)
    return (dequantize(quantize(rows, scale, zero, **numbers), scale, zero) - rows).square().mean(dim=1)


def test_min_max_are_the_extremes_of_each_row():
    low, high = MinMax().bounds(values(), U8)
    assert torch.equal(low, values().amin(dim=1)) and torch.equal(high, values().amax(dim=1))


@pytest.mark.parametrize("percent", [99.0, 99.99, 100])
def test_percentiles_are_torchs_quantiles(percent):
    rows = values()
    low, high = Percentile(percent).bounds(rows, U8)
    share = percent / 100
    assert low[0] == 0 and high[0] == pytest.approx(torch.quantile(rows[0].double(), share).item(), rel=1e-6)
    both = torch.quantile(
        rows[1:].double(), torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.float64), dim=1
    )
    assert torch.allclose(low[1:].double(), both[0]) and torch.allclose(high[1:].double(), both[1])


@pytest.mark.parametrize("scheme", [U8, S4])
def test_the_search_loses_no_more_than_any_shrunk_range_of_a_plain_loop(scheme):
    rows = values()
    got = lost(rows, *MeanSquaredError(steps=15, smallest=0.2).bounds(rows, scheme), scheme)
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    every = torch.stack([lost(rows, a * low, a * high, scheme) for a in torch.linspace(1, 0.2, 15)])
    assert torch.allclose(got, every.min(dim=0).values)
    if scheme is S4:
        assert (got < 0.95 * every[0]).any()


def test_impossible_settings_are_refused():
    for make in (lambda: Percentile(40), lambda: MeanSquaredError(steps=1), lambda: MeanSquaredError(smallest=1.5)):
        with pytest.raises(InputError):
            make()
    with pytest.raises(InputError, match="Int.bits"):
        Int(1)
    with pytest.raises(InputError, match="granularity"):
        Int(8, "per_row")
    for wrong in (dict(group_size=1), dict(group_size=4.0), dict(group_size=4, granularity="per_tensor")):
        with pytest.raises(InputError, match="Int.group_size"):
            Int(4, **wrong)
    with pytest.raises(InputError, match="skip or refuse"):
        Int(4, group_size=4, indivisible="pad")


def test_a_group_that_does_not_divide_says_so_with_the_arithmetic_or_is_refused_with_sizes_that_fit():
    scheme = Int(4, group_size=64)
    assert scheme.check("fc1.weight", [300, 128]) == "" == Int(4).check("fc1.weight", [300, 100])
    assert "does not divide its 100 weights per output channel (100 = 1 · 64 + 36)" in scheme.check("fc1", [300, 100])
    assert scheme.check("up.weight", [64, 8, 2, 2], axis=1) == "" != scheme.check("conv.weight", [64, 8, 2, 2])
    with pytest.raises(InputError, match=r"fc1.weight \[300, 100\].*\(100 = 1 · 64 \+ 36\).*Use 50 or 100"):
        Int(4, group_size=64, indivisible="refuse").check("fc1.weight", [300, 100])


def test_schemes_know_their_integers():
    assert (Int(8).quant_min, Int(8).quant_max) == (-128, 127)
    assert (U8.quant_min, U8.quant_max, str(U8)) == (0, 255, "uint8 per tensor")
    assert (S4.quant_min, S4.quant_max) == (-8, 7)
    assert str(Int(4, group_size=128)) == "int4 groups of 128"
    assert Int(16, "per_tensor", symmetric=False).quant_max == 65535
