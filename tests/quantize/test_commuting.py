import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from tersor.core.apply import apply
from tersor.core.edit import Mask
from tersor.core.errors import InputError
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan
from tersor.graph.trace import trace
from tersor.quantize.commuting import commuting, largest, rescale, scaled


class Through(nn.Module):
    """``first``, then any function of its result, then ``second``."""

    def __init__(self, first, between, second):
        super().__init__()
        self.first, self.between, self.second = first, between, second

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def conv(i=3, o=8, **fields):
    return nn.Conv2d(i, o, 3, padding=1, **fields)


def flat(size):
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 5))


def halves(x):
    a, b = x.chunk(2, 1)
    return torch.cat([b, a.relu()], 1)


def shuffled(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


IMAGE, ROWS = (2, 3, 6, 6), (3, 5, 7)
COMMUTE = {
    "nothing": (conv(), lambda x: x, conv(8, 4), IMAGE),
    "relu": (conv(bias=False), F.relu, conv(8, 4), IMAGE),
    "leaky relu, pooling": (conv(), lambda x: F.max_pool2d(F.leaky_relu(x, 0.1), 2), conv(8, 4), IMAGE),
    "prelu": (conv(), nn.PReLU(8), conv(8, 4), IMAGE),
    "average pooling, padding": (conv(), lambda x: F.pad(F.avg_pool2d(x, 3, 1, 1), (1, 1, 0, 2)), conv(8, 4), IMAGE),
    "dropout, upsampling": (conv(), lambda x: F.interpolate(F.dropout(x, 0, False), scale_factor=2), conv(8, 4), IMAGE),
    "depthwise": (conv(3, 6), F.relu, conv(6, 6, groups=6), IMAGE),
    "grouped on both sides": (conv(3, 6, groups=3), F.relu, conv(6, 8, groups=2), IMAGE),
    "transposed on both sides": (
        nn.ConvTranspose2d(3, 8, 3), F.relu, nn.ConvTranspose2d(8, 6, 3, groups=2), IMAGE,
    ),
    "grouped transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), F.relu, conv(6, 4), (2, 4, 5, 5)),
    "flatten": (conv(), lambda x: F.adaptive_avg_pool2d(x, 2), flat(32), IMAGE),
    "mean": (conv(), lambda x: x.mean((2, 3)), nn.Linear(8, 5), IMAGE),
    "channels shuffled": (conv(), shuffled, conv(8, 4, groups=2), IMAGE),
    "halves swapped": (conv(), halves, conv(8, 4), IMAGE),
    "a part of the channels": (conv(), lambda x: x[:, 2:6], conv(4, 4), IMAGE),
    "channels last": (conv(), lambda x: x.permute(0, 2, 3, 1), nn.Linear(8, 5), IMAGE),
    "linear": (nn.Linear(7, 8), F.relu, nn.Linear(8, 3), ROWS),
    "linear without bias, scaled": (nn.Linear(7, 8, bias=False), lambda x: 2 * x / 3, nn.Linear(8, 3), ROWS),
    "gate": (nn.Linear(7, 8), lambda x: x * torch.arange(5.0, 13).sigmoid(), nn.Linear(8, 3), ROWS),
    "the same twice": (nn.Linear(7, 8), lambda x: x + F.relu(x), nn.Linear(8, 3), ROWS),
    "layer norm": (nn.LayerNorm(7), lambda x: x, nn.Linear(7, 3), ROWS),
    "group norm": (nn.GroupNorm(3, 3), F.relu, conv(3, 4), IMAGE),
    "conv1d": (nn.Conv1d(5, 8, 3), F.relu, nn.Conv1d(8, 2, 1), ROWS),
}  # fmt: skip


def awake(model):
    """Fresh norms hide mistakes; float64 shows them."""
    torch.manual_seed(1)
    for value in model.parameters():
        nn.init.uniform_(value.data, -1, 1)
    return model.double().eval()


def wandered(model, x, pairs):
    """The model after a random factor wandered through every pair."""
    for pair in pairs:
        factor = torch.rand(pair.size, generator=torch.Generator().manual_seed(pair.size)) + 0.5
        model = apply(model, Plan("by hand", rescale(model, pair, factor)))
    return model


def found_in(model, *inputs):
    return commuting(model, trace(model, inputs))


@pytest.mark.parametrize("name", COMMUTE)
def test_a_factor_wanders_over_operators_that_commute_and_nothing_changes(name):
    first, between, second, shape = COMMUTE[name]
    model, x = awake(Through(first, between, second)), torch.randn(shape, dtype=torch.float64)
    pairs, _ = found_in(model, x)
    pair = next(pair for pair in pairs if "first" in pair.modules)
    assert [each.place.module.split(".")[0] for each in pair.readers] == ["second"]
    other = wandered(model, x, [pair])
    assert (other(x) - model(x)).abs().max() <= 1e-12 * model(x).abs().max()
    assert not torch.equal(other.first.weight, model.first.weight)


REFUSED = {
    "a ReLU6": (conv(), F.relu6, conv(8, 4), IMAGE, "clips at 6"),
    "a hard swish": (conv(), F.hardswish, conv(8, 4), IMAGE, "hardswish.* does not commute"),
    "a batch norm": (conv(), nn.BatchNorm2d(8), conv(8, 4), IMAGE, "fold batch norm first"),
    "a residual addition": (conv(3, 3), lambda x: x + torch.ones(2, 3, 6, 6), conv(3, 4), IMAGE, "another factor"),
    "a square": (nn.Linear(7, 8), lambda x: x * x, nn.Linear(8, 3), ROWS, "does not commute"),
    "a sum over channels": (conv(), lambda x: x.mean(1, keepdim=True), conv(1, 4), IMAGE, "mixes its channels"),
    "pooling over channels": (nn.Linear(7, 8), lambda x: F.max_pool1d(x, 2), nn.Linear(4, 3), ROWS, "mixes"),
    "rows beside": (nn.Linear(7, 8), lambda x: torch.cat([x, torch.ones(3, 1, 8)], 1), nn.Linear(8, 3), ROWS, "inputs"),
    "padding with ones": (conv(), lambda x: F.pad(x, (1, 1), value=1.0), conv(8, 4), IMAGE, "pads with 1"),
    "a divisor": (nn.Linear(7, 8), lambda x: 1 / x, nn.Linear(8, 3), ROWS, "does not commute"),
    "the model's output": (nn.Linear(7, 8), lambda x: x, nn.ReLU(), ROWS, "the model returns"),
    "weight norm": (weight_norm(nn.Linear(7, 8)), F.relu, nn.Linear(8, 3), ROWS, "WeightNorm"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_commute_refuses_and_is_named(name):
    first, between, second, shape, reason = REFUSED[name]
    model = awake(Through(first, between, second))
    pairs, skips = found_in(model, torch.randn(shape, dtype=torch.float64))
    assert not [pair for pair in pairs if "first" in pair.modules]
    said = [skip.reason for skip in skips if skip.place.startswith("first")]
    assert len(said) == 1
    assert re.search(reason, said[0])


class Attention(nn.Module):
    """Four query heads on two key-value heads, written with torch's kernel or by hand, behind a written-out norm."""

    def __init__(self, fused):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.out, self.up, self.gate, self.down = (nn.Linear(8, 8) for _ in range(4))
        self.fused = fused

    def forward(self, x):
        x = self.scale * (x / x.square().mean(-1, keepdim=True).sqrt())
        q, k, v = (part(x).unflatten(-1, (-1, 2)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (part.repeat_interleave(2, 1) for part in (k, v))
            y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).flatten(2)).softmax(-1)
        return self.down(self.up(y) * F.silu(self.gate(y))).sigmoid()


@pytest.mark.parametrize("fused", [True, False])
def test_values_of_attention_and_the_ungated_half_of_a_feed_forward_bear_factors(fused):
    model, x = awake(Attention(fused)), torch.randn(2, 5, 8, dtype=torch.float64)
    pairs, skips = found_in(model, x)
    readers = {str(pair.producer.place): [str(each.place) for each in pair.readers] for pair in pairs}
    assert readers == {
        "<model>:mul[0]": ["q.weight", "k.weight", "v.weight"],
        "v:linear[0]": ["out.weight"],
        "up:linear[0]": ["down.weight"],
    }
    assert {skip.place.split(":")[0] for skip in skips} == {"q", "k", "out", "gate", "down"}
    assert (wandered(model, x, pairs)(x) - model(x)).abs().max() < 1e-13


class Branching(nn.Module):
    """Two convolutions side by side, both read by three layers; one of them called twice where ``twice``."""

    def __init__(self, twice=False):
        super().__init__()
        self.a, self.b = conv(3, 4), conv(3, 2)
        self.c, self.d, self.e = conv(6, 3), conv(6, 3, groups=3), nn.Linear(6, 3)
        self.twice = twice

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x).relu()], 1)
        more = self.c(y + y).mean() if self.twice else 0
        return self.c(y).sigmoid() + self.d(y).sigmoid() + self.e(y.mean((2, 3)))[..., None, None].sigmoid() + more


def test_every_reader_is_found_and_each_half_of_a_concatenation_is_a_pair():
    model, x = awake(Branching()), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    pairs, _ = found_in(model, x)
    assert [pair.modules for pair in pairs] == [("a", "c", "d", "e"), ("b", "c", "d", "e")]
    assert pairs[1].readers[0].channels.flatten().tolist() == [-1, -1, -1, -1, 0, 1]
    assert (wandered(model, x, pairs)(x) - model(x)).abs().max() < 1e-13


def test_a_weight_that_another_call_reads_too_refuses():
    pairs, skips = found_in(awake(Branching(twice=True)), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert not pairs and "c.weight is shared" in skips[0].reason


def test_tied_weights_refuse():
    model = awake(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))
    model[2].weight = model[0].weight
    pairs, skips = found_in(model, torch.randn(2, 6, dtype=torch.float64))
    assert not pairs and "tied" in skips[0].reason


def test_masked_weights_bear_factors_and_keep_their_zeros():
    model, x = awake(nn.Sequential(conv(), nn.ReLU(), conv(8, 4))), torch.randn(IMAGE, dtype=torch.float64)
    keep = torch.rand(model[0].weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    model = apply(model, Plan("by hand", (Mask(TensorPlace("0", "weight"), keep),)))
    pairs, _ = found_in(model, x)
    other = wandered(model, x, pairs)
    assert len(pairs) == 1 and bool((other[0].weight[~keep] == 0).all())
    assert (other(x) - model(x)).abs().max() < 1e-13


def test_the_largest_weight_of_each_channel_is_that_of_a_loop():
    value, channels = torch.randn(4, 6, 2), torch.tensor([0, 2, -1, 0, 1, 2]).view(1, 6, 1)
    expected = [max(abs(float(value[:, i].abs().max())) for i in range(6) if channels[0, i] == c) for c in range(3)]
    assert torch.allclose(largest(value, channels, 4), torch.tensor([*expected, 0.0]))


def test_what_belongs_to_no_channel_is_not_scaled():
    got = scaled(torch.ones(2, 3), torch.tensor([[0, -1, 1]]), torch.tensor([2.0, 3.0]))
    assert got.tolist() == [[2.0, 1.0, 3.0]] * 2


def test_a_factor_that_is_not_positive_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3))
    (pair,), _ = found_in(model, torch.randn(2, 3))
    for factor in ([1.0, 0.0], [1.0, float("nan")], [1.0, -1.0], [1.0]):
        with pytest.raises(InputError, match="expected|Expected 2 positive"):
            rescale(model, pair, torch.tensor(factor))
