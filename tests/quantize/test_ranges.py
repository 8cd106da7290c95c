import math
import time

import pytest
import torch

from tersor.core.errors import InputError
from tersor.core.place import ActivationPlace
from tersor.observe.watch import Statistics
from tersor.quantize.ranges import Entropy, MeanSquaredError, MinMax, MovingAverage, Percentile
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


def seen(*batches):
    statistics = Statistics(ActivationPlace("", "relu"))
    for batch in batches:
        statistics.see(torch.as_tensor(batch), torch.Generator())
    return statistics


def test_a_moving_average_follows_the_batches_extremes_and_takes_the_widest_of_places_that_share_a_grid():
    first, second = seen([-1.0, 2.0], [-3.0, 1.0], [0.0, 40.0]), seen([-0.5, 9.0])
    low, high = MovingAverage(0.9).seen([first], U8)
    assert low.item() == pytest.approx(0.9 * (0.9 * -1 + 0.1 * -3))
    assert high.item() == pytest.approx(0.9 * (0.9 * 2 + 0.1 * 1) + 4)
    assert [float(end) for end in MovingAverage().seen([first, second], U8)] == pytest.approx([low.item(), 9])
    scale, zero_point = MovingAverage().calibrated([first], U8)
    assert scale.item() == pytest.approx((high - low).item() / 255)
    assert zero_point.item() == round(float(-low / scale))
    assert torch.equal(torch.stack(MovingAverage().bounds(values(), S4)), torch.stack(MinMax().bounds(values(), S4)))


def naive_divergence(row, t, bins, scheme):
    """Kullback and Leibler of one row's histogram clipped at ``t``, by loops."""
    width = row.abs().max() / bins
    low, high = max(float(row.min()), -t), min(float(row.max()), t)
    numbers = dict(quant_min=scheme.quant_min, quant_max=scheme.quant_max, symmetric=scheme.symmetric)
    scale, _ = choose_parameters(torch.tensor(low), torch.tensor(high), **numbers)
    counts = [0] * bins
    for value in row[row != 0].abs().tolist():
        counts[min(int(value / width), bins - 1)] += 1
    kept, beyond = counts[: round(t / float(width))], sum(counts[round(t / float(width)) :])
    runs = {}
    for number, count in enumerate(kept):
        if count:
            runs.setdefault(round((number + 0.5) * float(width / scale)), []).append(number)
    p, q = list(map(float, kept)), [0.0] * len(kept)
    p[max(number for run in runs.values() for number in run)] += beyond
    for run in runs.values():
        for number in run:
            q[number] = sum(kept[other] for other in run) / len(run)
    return sum(a / sum(p) * math.log(a / sum(p) / (b / sum(counts))) for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("scheme", [U8, S4, Int(8)])
def test_entropy_takes_the_range_of_the_least_divergence_of_a_plain_loop(scheme):
    rows = values()
    entropy = Entropy(bins=128, candidates=20)
    low, high = entropy.bounds(rows, scheme)
    for row, a, b in zip(rows, low, high, strict=True):
        tried = [float(row.abs().max()) * n / 128 for n in entropy._tried(scheme)]
        divergences = [naive_divergence(row, t, 128, scheme) for t in tried]
        got = max(-float(a), float(b))
        chosen = min(range(len(tried)), key=lambda n: abs(tried[n] - got))
        assert tried[chosen] == pytest.approx(got, rel=1e-5)
        assert divergences[chosen] == pytest.approx(min(divergences), rel=1e-3, abs=1e-6)
    assert low[0] == 0


@pytest.mark.parametrize("scheme", [U8, S4, Int(8)])
def test_entropy_gives_a_lone_outlier_up(scheme):
    _, high = Entropy().bounds(values(), scheme)
    assert 2 < high[1] < 20 and 2 < high[2] <= values()[2].max()


@pytest.mark.parametrize("scheme", [U8, S4, Int(4, "per_tensor", symmetric=False)])
def test_entropy_keeps_values_that_lie_on_a_coarse_grid_of_their_own(scheme):
    torch.manual_seed(0)
    rows = torch.randint(0, 17, (1, 4000)) / 16
    assert Entropy().bounds(rows, scheme)[1] > 0.85


def test_entropy_of_nothing_but_zeros_is_their_own_range():
    assert [end.tolist() for end in Entropy().bounds(torch.zeros(2, 9), U8)] == [[0, 0], [0, 0]]


def test_impossible_settings_are_refused():
    wrong = [(Percentile, 40), (MeanSquaredError, 1), (MeanSquaredError, 9, 1.5), (MovingAverage, 1), (Entropy, 8)]
    for kind, *settings in wrong:
        with pytest.raises(InputError):
            kind(*settings)
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


@pytest.mark.parametrize("size", [2, 7, 16, 100])
def test_the_sizes_that_are_named_are_the_divisors_nearest_in_ratio(size):
    for row in (n for n in range(1, 150) if n % size):
        fitting = sorted((n for n in range(2, row + 1) if row % n == 0), key=lambda n: abs(math.log(n / size)))[:2]
        named = f"Use {' or '.join(map(str, sorted(fitting)))}, leave it out" if fitting else "Leave it out"
        with pytest.raises(InputError, match=f"{named}, or indivisible='skip'"):
            Int(4, group_size=size, indivisible="refuse").check("fc", (2, row))


def test_a_row_of_a_large_embedding_is_checked_at_once():
    began = time.process_time()
    with pytest.raises(InputError, match="Use 64 or 128"):
        Int(4, group_size=96, indivisible="refuse").check("embedding", (1, 151936 * 4096))
    assert time.process_time() - began < 1, "trying every number took 35 seconds"


def test_schemes_know_their_integers():
    assert (Int(8).quant_min, Int(8).quant_max) == (-128, 127)
    assert (U8.quant_min, U8.quant_max, str(U8)) == (0, 255, "uint8 per tensor")
    assert (S4.quant_min, S4.quant_max) == (-8, 7)
    assert str(Int(4, group_size=128)) == "int4 groups of 128"
    assert Int(16, "per_tensor", symmetric=False).quant_max == 65535
