"""A net for each kind of operator: half of the channels go, and what is left computes what the masked net does."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tersor.core.task import Task
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.scores import Random

torch.manual_seed(0)


class Net(nn.Module):
    """Attributes, parameters and layers by name; a forward given as a function of (module, *inputs)."""

    def __init__(self, how, **parts):
        super().__init__()
        self.how = how
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.how(self, *inputs)


def randomised(net, seed=0):
    """Every vector, slope and running statistic drawn anew: fresh ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if value.is_floating_point() and (value.ndim == 1 or bool((value == value.flatten()[0]).all())):
            drawn = torch.rand(value.shape, generator=generator)
            positive = name.endswith(("var", "bias", "weight_g", "original0"))  # so that few channels are dead
            value.data = drawn + 0.5 if positive else (drawn + 0.5) * (2 * (drawn > 0.5) - 1)
    return net.double().eval()


def pruned(net, *inputs, heads="whole", sparsity=0.5, output_of=None):
    """The shrunk net, verified in float64, after a training step; and its plan."""
    net = randomised(net)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    task = Task(net, example_inputs=inputs, output_of=output_of)
    before = copy.deepcopy(net.state_dict())
    result = PruneChannels(sparsity=sparsity, score=Random(), heads=heads).run(net, task)
    assert result.facts.get("verified", 0.0) < 1e-9
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    check_attributes(result.model)
    if output_of is None:
        same_outputs_shape(net(*inputs), result.model(*inputs))
    loss = sum(t.square().sum() for t in tensors(result.model.train()(*inputs)))
    loss.backward()
    result.model.eval()
    return result.model, result.plans[0]


def tensors(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def same_outputs_shape(expected, got):
    assert type(expected) is type(got)
    assert [t.shape for t in tensors(expected)] == [t.shape for t in tensors(got)]


def check_attributes(shrunk):
    """Sizes that modules remember are those of their tensors."""
    for path, module in shrunk.named_modules():
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            assert module.weight.shape[:2] == (module.in_channels, module.out_channels // module.groups), path
        elif isinstance(module, nn.modules.conv._ConvNd):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups), path
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features), path
        elif isinstance(module, nn.modules.batchnorm._NormBase) and module.weight is not None:
            assert len(module.weight) == module.num_features, path
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
            assert tuple(module.weight.shape) == tuple(module.normalized_shape), path
        elif isinstance(module, nn.GroupNorm):
            assert len(module.weight) == module.num_channels and module.num_channels % module.num_groups == 0, path
        elif isinstance(module, nn.Embedding):
            assert module.weight.shape == (module.num_embeddings, module.embedding_dim), path
        elif isinstance(module, nn.RNNBase):
            assert module.weight_hh_l0.shape[1] == module.hidden_size, path
            assert module.weight_ih_l0.shape[1] == module.input_size, path


def image(channels=3, size=8):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def series(width=6, length=5):
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(2))


def conv(a, b, size=3, **more):
    return nn.Conv2d(a, b, size, padding=size // 2, **more)


def between(middle, **parts):
    """An image net: a (3 → 8), whatever ``middle`` makes of it, then b of the mean over positions."""
    parts = {"a": conv(3, 8), "b": nn.Linear(8, 3), **parts}
    return Net(lambda net, x: net.b(middle(net, net.a(x)).relu().flatten(2).mean(2)), **parts), (image(),)


def flat(middle, width=8, **parts):
    """A sequence net: a (6 → 8), whatever ``middle`` makes of it, then b."""
    parts = {"a": nn.Linear(6, 8), "b": nn.Linear(width, 3), **parts}
    return Net(lambda net, x: net.b(middle(net, net.a(x))), **parts), (series(),)


def spatial(number, kind):
    """Plain, grouped, depthwise and transposed convolutions over one to three axes."""
    layer = getattr(nn, f"{kind}{number}d")
    plain = getattr(nn, f"Conv{number}d")
    net = nn.Sequential(
        plain(3, 8, 1), nn.ReLU(), layer(8, 12, 3, groups=4), nn.ReLU(), plain(12, 8, 1), nn.ReLU(),
        layer(8, 16, 2, groups=8), nn.ReLU(), layer(16, 8, 2), nn.ReLU(), nn.Flatten(2),
        Net(lambda net, x: net.head(x.mean(2)), head=nn.Linear(8, 3)),
    )  # fmt: skip
    return net, (torch.randn(2, 3, *[6] * number),)


class Standardised(nn.Conv2d):
    """Weight standardisation: every filter has mean 0 and variance 1."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        return F.conv2d(x, w, self.bias, padding=self.padding)


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[:, :, None, None]


def shuffle(x, groups):
    batch, channels, *rest = x.shape
    return x.view(batch, groups, channels // groups, *rest).transpose(1, 2).reshape(batch, channels, *rest)


def windows(net, x):
    """Attention-free window partition: [b, c, h, w] → windows of 4 × 4 → mixed → back."""
    x = x.permute(0, 2, 3, 1)
    b, h, w, c = x.shape
    x = x.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
    x = net.mix(net.norm(x)).view(b, h // 4, w // 4, 4, 4, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)
    return x.permute(0, 3, 1, 2)


def turn(x):
    """Rotates the halves of a head against each other."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], -1)


def weave(x):
    """Rotates even against odd channels of a head."""
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class Rotary(nn.Module):
    """Attention whose queries and keys are turned by their position."""

    def __init__(self, interleaved):
        super().__init__()
        self.heads, self.size, self.interleaved = 2, 4, interleaved
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        angles = torch.arange(5)[:, None] / 100 ** (torch.arange(2) / 2)
        angles = angles.repeat_interleave(2, 1) if interleaved else torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x):
        q, k, v = (y.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        other = weave if self.interleaved else turn
        q, k = (y * self.cos + other(y) * self.sin for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Biased(nn.Module):
    """Attention with a table of relative positions, a value for each head."""

    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.out = 4, nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(9, 4))
        self.register_buffer("index", torch.arange(5)[:, None] - torch.arange(5)[None] + 4)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))


def overwritten(net, x):
    """The first half of the channels set to zero, in place."""
    y = x.clone()
    y[..., : y.shape[-1] // 2] = 0.0
    return y


def recurrent(kind, **more):
    layer = getattr(nn, kind)(8, 8, batch_first=True, **more)
    width = 16 if more.get("bidirectional") else 8
    return flat(lambda net, x: net.layer(x)[0], width, layer=layer)


def tokens():
    return torch.arange(10).view(2, 5) % 7


OPERATORS = {
    **{
        f"{kind} {n}d": lambda n=n, kind=kind: spatial(n, kind)
        for n in (1, 2, 3) for kind in ("Conv", "ConvTranspose")
    },
    "linear": lambda: flat(lambda net, x: F.gelu(x)),
    "matmul with a parameter": lambda: flat(
        lambda net, x: x @ net.w @ net.v + net.c, w=nn.Parameter(torch.randn(8, 4)), v=nn.Parameter(torch.randn(4, 8)),
        c=nn.Parameter(torch.randn(8)),
    ),
    "bmm": lambda: flat(lambda net, x: torch.bmm(torch.bmm(x, x.transpose(1, 2)), net.c(x)), c=nn.Linear(8, 8)),
    "baddbmm": lambda: flat(lambda net, x: torch.baddbmm(net.c(x), torch.bmm(x, x.mT), x), c=nn.Linear(8, 8)),
    "einsum": lambda: flat(
        lambda net, x: torch.einsum("btc,cd,d->btd", x, net.w, net.s), w=nn.Parameter(torch.randn(8, 8)),
        s=nn.Parameter(torch.randn(8)),
    ),
    "einsum of activations": lambda: flat(
        lambda net, x: torch.einsum("bts,bsd->btd", torch.einsum("btc,bsc->bts", x, x), net.c(x)), c=nn.Linear(8, 8)
    ),
    "einsum of heads": lambda: flat(
        lambda net, x: net.o(
            torch.einsum(
                "b h i j, b j h d -> b i h d",
                torch.einsum("bihd,bjhd->bhij", *(f(x).unflatten(-1, (net.h, -1)) for f in (net.q, net.k))).softmax(-1),
                net.v(x).unflatten(-1, (net.h, -1)),
            ).flatten(2)
        ),
        h=2, q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8), o=nn.Linear(8, 8),
    ),
    "low-rank weight": lambda: flat(
        lambda net, x: F.linear(x, net.v @ net.w), w=nn.Parameter(torch.randn(4, 8)), v=nn.Parameter(torch.randn(8, 4))
    ),
    "weights made of activations": lambda: between(
        lambda net, x: F.conv2d(
            x.reshape(1, -1, 8, 8), net.k(x.mean((2, 3))).reshape(-1, 1, 3, 3), groups=x.shape[0] * x.shape[1],
            padding=1,
        ).view_as(x),
        k=nn.Linear(8, 72),
    ),
    "space to depth": lambda: between(
        lambda net, x: net.c(torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)), c=conv(32, 8)
    ),
    "overwritten range": lambda: flat(overwritten),
    "folded patches": lambda: between(
        lambda net, x: F.fold(net.c(F.unfold(x, 2, stride=2).mT).mT, (8, 8), 2, stride=2), c=nn.Linear(32, 32)
    ),
    "gram matrix": lambda: flat(lambda net, x: (x.mT @ x).flatten(1)[:, None], 64),
    "global response norm": lambda: between(
        lambda net, x: x + net.g * x * (y := x.norm(dim=(2, 3), keepdim=True)) / (y.mean(1, keepdim=True) + 1e-6),
        g=nn.Parameter(torch.ones(1, 8, 1, 1)),
    ),
    "statistics of everything": lambda: flat(lambda net, x: (x - x.mean()) / x.std() + x / x.abs().max()),
    "hidden states of lstms": lambda: flat(
        lambda net, x: net.l(x)[1][0].transpose(0, 1).flatten(1)[:, None], 32,
        l=nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True),
    ),
    "einsum with dots": lambda: flat(
        lambda net, x: torch.einsum("...c,...c->...", x, net.c(x))[..., None] * x, c=nn.Linear(8, 8)
    ),
    "outer product with itself": lambda: flat(lambda net, x: (x[..., None] * x[..., None, :]).flatten(2), 64),
    "batch norm": lambda: between(lambda net, x: net.n(x), n=nn.BatchNorm2d(8)),
    "layer norm": lambda: flat(lambda net, x: net.n(x), n=nn.LayerNorm(8)),
    "layer norm of images": lambda: between(
        lambda net, x: F.layer_norm(x.permute(0, 2, 3, 1), net.n.normalized_shape, net.n.weight).permute(0, 3, 1, 2),
        n=nn.LayerNorm(8, bias=False),
    ),
    "layer norm over two axes": lambda: flat(lambda net, x: net.n(x), n=nn.LayerNorm((5, 8))),
    "group norm": lambda: between(lambda net, x: net.n(x), n=nn.GroupNorm(2, 8)),
    "group norm of one group": lambda: between(lambda net, x: net.n(x), n=nn.GroupNorm(1, 8)),
    "instance norm": lambda: between(lambda net, x: net.n(x), n=nn.InstanceNorm2d(8, affine=True)),
    "norms without scales": lambda: between(
        lambda net, x: net.l(net.n(net.i(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        i=nn.InstanceNorm2d(8), n=nn.BatchNorm2d(8, affine=False), l=nn.LayerNorm(8, elementwise_affine=False),
    ),
    "RMS norm": lambda: flat(lambda net, x: net.n(x), n=nn.RMSNorm(8)),
    "RMS norm by hand": lambda: flat(
        lambda net, x: net.s * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), s=nn.Parameter(torch.ones(8))
    ),
    "layer norm by hand": lambda: flat(
        lambda net, x: net.s * (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt(),
        s=nn.Parameter(torch.ones(8)),
    ),
    "cat": lambda: between(lambda net, x: net.d(torch.cat([x, net.c(x), x.tanh()], 1)), c=conv(8, 4), d=conv(20, 8)),
    "stack": lambda: between(lambda net, x: torch.stack([x, net.c(x)], 0).amax(0), c=conv(8, 8)),
    "stack as channels": lambda: between(
        lambda net, x: torch.stack([x, net.c(x)], 2).flatten(1, 2), c=conv(8, 8), b=nn.Linear(16, 3)
    ),
    "chunk": lambda: between(lambda net, x: (lambda a, b: a * b.sigmoid())(*x.chunk(2, 1)), b=nn.Linear(4, 3)),
    "split by attributes": lambda: between(
        lambda net, x: net.c(x.split([net.first, net.second], 1)[1]), first=2, second=6, c=conv(6, 8)
    ),
    "split by a share": lambda: between(lambda net, x: sum(x.split(x.shape[1] // 4, 1)), b=nn.Linear(2, 3)),
    "tensor_split": lambda: between(lambda net, x: torch.cat(x.tensor_split(2, 1)[::-1], 1)),
    "slice": lambda: between(lambda net, x: x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :], b=nn.Linear(4, 3)),
    "slice with a step": lambda: between(lambda net, x: x[:, ::2] * x[:, 1::2], b=nn.Linear(4, 3)),
    "narrow": lambda: between(lambda net, x: x.narrow(1, 0, net.k), k=4, b=nn.Linear(4, 3)),
    "select of another axis": lambda: flat(lambda net, x: x[:, 0] + x[:, -1]),
    "index of another axis": lambda: flat(
        lambda net, x: x[:, [0, 2, 4]] + x[:, net.order], order=torch.tensor([1, 0, 3])
    ),
    "gather along another axis": lambda: flat(
        lambda net, x: x.gather(1, torch.zeros_like(x[:, :2], dtype=torch.int64) + net.one), one=1
    ),
    "flatten": lambda: (
        Net(lambda net, x: net.b(F.adaptive_avg_pool2d(net.a(x), 2).flatten(1)), a=conv(3, 8), b=nn.Linear(32, 3)),
        (image(),),
    ),
    "reshape of channels last": lambda: (
        Net(lambda net, x: net.b(F.adaptive_avg_pool2d(net.a(x), 2).permute(0, 2, 3, 1).reshape(x.shape[0], -1)),
            a=conv(3, 8), b=nn.Linear(32, 3)),
        (image(),),
    ),
    "unflatten": lambda: flat(lambda net, x: x.unflatten(-1, (net.k, -1)).softmax(-3).flatten(-2), k=2),
    "permute": lambda: between(lambda net, x: net.c(x.permute(2, 3, 0, 1)).permute(2, 3, 0, 1), c=nn.Linear(8, 8)),
    "movedim and transpose": lambda: between(
        lambda net, x: net.c(x.movedim(1, -1)).transpose(1, 3), c=nn.Linear(8, 8)
    ),
    "expand": lambda: between(
        lambda net, x: x + net.s.expand(x.shape[0], -1, 8, 8), s=nn.Parameter(torch.randn(1, 8, 1, 1))
    ),
    "expand as": lambda: between(lambda net, x: x * x.mean((2, 3), keepdim=True).expand_as(x)),
    "repeat": lambda: between(lambda net, x: x.repeat(1, 2, 1, 1), b=nn.Linear(16, 3)),
    "repeat_interleave": lambda: between(lambda net, x: x.repeat_interleave(2, 1), b=nn.Linear(16, 3)),
    "pooling": lambda: between(
        lambda net, x: F.max_pool2d(x, 3, 2, 1) + F.avg_pool2d(x, 2)
        + F.adaptive_max_pool2d(x, 4) + F.lp_pool2d(x, 2, 2)
    ),
    "interpolate": lambda: between(
        lambda net, x: x + F.interpolate(F.interpolate(x, scale_factor=0.5), size=(8, 8), mode="bilinear")
    ),
    "pad of positions": lambda: between(lambda net, x: F.pad(F.pad(x, (1, 1, 2, 0)), (1, 1, 1, 1), mode="reflect")),
    "pad of channels": lambda: between(lambda net, x: F.pad(x, (0, 0, 0, 0, 2, 3)), b=nn.Linear(13, 3)),
    "roll": lambda: between(lambda net, x: x.roll((2, 1), (2, 3))),
    "pixel shuffle": lambda: between(lambda net, x: F.pixel_shuffle(x, 2), b=nn.Linear(2, 3)),
    "pixel unshuffle": lambda: between(lambda net, x: F.pixel_unshuffle(x, 2), b=nn.Linear(32, 3)),
    "channel shuffle": lambda: between(lambda net, x: F.channel_shuffle(x, 2)),
    "channel shuffle by hand": lambda: between(lambda net, x: shuffle(x, 4)),
    "softmax over positions": lambda: between(lambda net, x: x * x.flatten(2).softmax(-1).view_as(x)),
    "glu": lambda: between(lambda net, x: F.glu(x, 1), b=nn.Linear(4, 3)),
    "prelu": lambda: between(lambda net, x: net.p(x), p=nn.PReLU(8)),
    "attention": lambda: flat(
        lambda net, x: F.scaled_dot_product_attention(*(f(x)[:, None] for f in (net.q, net.k, net.v)))[:, 0],
        q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8),
    ),
    "rotary by halves": lambda: flat(lambda net, x: net.m(x), m=Rotary(False)),
    "rotary interleaved": lambda: flat(lambda net, x: net.m(x), m=Rotary(True)),
    "embedding": lambda: (
        Net(lambda net, x: net.b(net.a(net.e(x))), e=nn.Embedding(7, 8), a=nn.Linear(8, 8), b=nn.Linear(8, 3)),
        (tokens(),),
    ),
    "lstm": lambda: recurrent("LSTM"),
    "gru": lambda: recurrent("GRU"),
    "rnn": lambda: recurrent("RNN", bias=False),
    "lstm, two layers, both directions": lambda: recurrent("LSTM", num_layers=2, bidirectional=True),
    "gru, two layers, both directions": lambda: recurrent("GRU", num_layers=2, bidirectional=True),
    "sums over positions": lambda: between(
        lambda net, x: (x.sum((2, 3)) + x.amax((2, 3)) + x.mean((2, 3)) + x.std((2, 3)) + x.norm(dim=(2, 3)))[..., None]
    ),
    "max over positions": lambda: between(lambda net, x: x.max(3).values.max(2)[0][..., None]),
    "sum over channels": lambda: between(lambda net, x: x * x.sum(1, keepdim=True)),
    "mean over channels": lambda: between(
        lambda net, x: torch.cat([x, x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1), b=nn.Linear(10, 3)
    ),
    "normalised over channels": lambda: between(lambda net, x: F.normalize(x, dim=1)),
    "squeeze and excite": lambda: between(lambda net, x: net.s(x), s=Gate(8)),
    "window partition": lambda: between(windows, norm=nn.LayerNorm(8), mix=nn.Linear(8, 8)),
    "unfolded patches": lambda: between(lambda net, x: net.c(F.unfold(x, 2, stride=2).mT).mT, c=nn.Linear(32, 8)),
    "weight standardisation": lambda: between(lambda net, x: net.c(x.relu()), c=Standardised(8, 8, 3, padding=1)),
    "spectral norm": lambda: between(lambda net, x: net.c(x), c=parametrizations.spectral_norm(conv(8, 8))),
    "weight norm": lambda: between(lambda net, x: net.c(x), c=parametrizations.weight_norm(conv(8, 8))),
    "class token": lambda: flat(
        lambda net, x: torch.cat([net.token.expand(x.shape[0], -1, -1), x], 1)[:, 0] + x.mean(1),
        token=nn.Parameter(torch.randn(1, 1, 8)),
    ),
    "position table": lambda: flat(
        lambda net, x: x + net.table[:, : x.shape[1]], table=nn.Parameter(torch.randn(1, 9, 8))
    ),
    "layer scale": lambda: flat(lambda net, x: x + net.s * net.c(x), s=nn.Parameter(torch.ones(8)), c=nn.Linear(8, 8)),
    "relative position table": lambda: flat(lambda net, x: net.m(x), m=Biased()),
    "where and masks": lambda: flat(lambda net, x: torch.where(x > 0, x, net.s * x).masked_fill(x < -2, -2.0),
                                    s=nn.Parameter(torch.randn(8))),
}  # fmt: skip


OUTPUT = "reaches the model's output"


def size(net):
    return sum(parameter.numel() for parameter in net.parameters())


def skipped(plan):
    """What stays for another reason than that it is the model's output."""
    return [(skip.place, skip.reason) for skip in plan.skips if not skip.reason.endswith(OUTPUT)]


@pytest.mark.parametrize("name", ["einsum of heads", "rotary by halves", "rotary interleaved"])
def test_half_of_every_head_goes_and_their_number_stays(name):
    torch.manual_seed(0)
    net, inputs = OPERATORS[name]()
    before = size(net)
    shrunk, plan = pruned(net, *inputs, heads="inside")
    assert skipped(plan) == [] and size(shrunk) < 0.7 * before


@pytest.mark.parametrize("name", OPERATORS)
def test_half_of_the_channels_go_and_nothing_else_changes(name):
    torch.manual_seed(0)
    net, inputs = OPERATORS[name]()
    before = size(net)
    shrunk, plan = pruned(net, *inputs)
    assert skipped(plan) == []
    assert size(shrunk) < 0.7 * before


def test_tied_weights_stay_tied():
    """An embedding that is the output's matrix too: its features go, its entries do not."""

    def forward(net, x):
        return F.linear(net.c(net.e(x)), net.e.weight)

    net, plan = pruned(Net(forward, e=nn.Embedding(7, 8), c=nn.Linear(8, 8)), tokens())
    assert net.e.weight.shape == (7, 4) and net.c.weight.shape == (4, 4) and len(list(net.parameters())) == 3
    assert skipped(plan) == [("e", "7 channels are frozen: is looked up by index at e:embedding[0]")]


def test_layers_that_share_their_weight_stay_shared():
    net = Net(
        lambda net, x: net.b(net.d(F.relu(net.c(net.a(x))))), a=nn.Linear(6, 8), c=nn.Linear(8, 8), d=nn.Linear(8, 8)
    )
    net.b, net.d.weight = nn.Linear(8, 3), net.c.weight
    shrunk, plan = pruned(net, series())
    assert shrunk.d.weight is shrunk.c.weight and shrunk.c.weight.shape == (4, 4) and not skipped(plan)


def test_a_module_that_is_called_twice_shrinks_once():
    net = Net(
        lambda net, x: net.b(net.c(F.relu(net.c(net.a(x))))), a=nn.Linear(6, 8), c=nn.Linear(8, 8), b=nn.Linear(8, 3)
    )
    shrunk, plan = pruned(net, series())
    assert shrunk.c.weight.shape == (4, 4) and not skipped(plan)


def test_several_inputs_and_outputs():
    def forward(net, x, y):
        x, y = F.relu(net.a(x)), F.relu(net.c(y))
        return net.b(x + y), [net.d(x), {"mean": net.d(y).mean()}]

    net = Net(forward, a=nn.Linear(6, 8), c=nn.Linear(4, 8), b=nn.Linear(8, 3), d=nn.Linear(8, 2))
    every = lambda result: torch.cat([t.flatten() for t in tensors(result)])  # noqa: E731
    shrunk, plan = pruned(net, series(), series(4), output_of=every)
    assert shrunk.a.weight.shape == (4, 6) and shrunk.c.weight.shape == (4, 4) and not skipped(plan)
    assert shrunk.d.weight.shape == (2, 4) and shrunk.b.weight.shape == (3, 4)


def test_outputs_in_a_dictionary_stay_whole_and_keep_their_names():
    def forward(net, x):
        x = F.relu(net.a(x))
        return {"boxes": net.c(x).sigmoid(), "logits": net.b(x), "features": net.d(x)}

    net = Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 3), c=nn.Linear(8, 4), d=nn.Linear(8, 5))
    every = lambda result: torch.cat([result[key].flatten() for key in ("boxes", "logits", "features")])  # noqa: E731
    shrunk, plan = pruned(net, series(), output_of=every)
    assert {key: value.shape[-1] for key, value in shrunk(series().double()).items()} == {
        "boxes": 4, "logits": 3, "features": 5,
    }  # fmt: skip
    assert shrunk.a.weight.shape == (4, 6) and not skipped(plan)


def test_a_normalisation_of_the_output_freezes_what_it_normalises():
    net = Net(lambda net, x: net.n(net.b(F.relu(net.a(x)))), a=nn.Linear(6, 8), b=nn.Linear(8, 8), n=nn.LayerNorm(8))
    shrunk, plan = pruned(net, series())
    assert shrunk.a.weight.shape == (4, 6) and shrunk.n.normalized_shape == (8,)
    assert [skip.place for skip in plan.skips] == ["b"] and plan.skips[0].reason.endswith(OUTPUT)


@pytest.mark.parametrize(
    "middle, reason",
    [
        (lambda x: x[..., [1, 0, 3]], "is read by position at <model>:index"),
        (lambda x: x[..., 2:] * x[..., :6], "literal in the forward at <model>:slice"),
        (lambda x: x.select(-1, 1)[..., None] * x, "is read by position at <model>:select"),
        (lambda x: x * x.softmax(-1), "is run along by <model>:softmax"),
        (lambda x: x.cumsum(-1), "is run along by <model>:cumsum"),
        (lambda x: x.sort(-1).values, "an operator without a rule"),
        (lambda x: torch.fft.rfft(x, dim=-1).abs(), "an operator without a rule"),
        (lambda x: F.pad(x, (1, 1), mode="reflect"), "is cropped or mirrored by <model>:"),
        (lambda x: x.unfold(-1, 2, 2).amax(-1), "is cut into windows by <model>:unfold"),
        (lambda x: x * x.argmax(-1, keepdim=True), "is searched by <model>:argmax"),
        (lambda x: F.max_pool1d(x, 2), "is height or width for <model>:max_pool1d"),
    ],
)  # fmt: skip
def test_what_cannot_shrink_says_why(middle, reason):
    width = middle(torch.zeros(2, 5, 8)).shape[-1]
    net = Net(lambda net, x: net.b(middle(net.a(x))), a=nn.Linear(6, 8), b=nn.Linear(width, 3))
    shrunk, plan = pruned(net, series())
    assert shrunk.a.weight.shape == (8, 6)
    assert skipped(plan) and all(place.startswith("a") and reason in got for place, got in skipped(plan))


def test_what_comes_after_a_position_that_is_read_may_go():
    net = Net(lambda net, x: net.b(x := net.a(x)) * x[..., 2:3], a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    shrunk, plan = pruned(net, series())
    assert shrunk.a.weight.shape == (6, 6) and torch.equal(shrunk.a.weight[:3], net.a.weight[:3])
