"""Networks drawn from blocks and their joins: whatever is removed, the rest computes what the masked network does."""

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tersor.core.task import Task
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.scores import Random


class Block(nn.Module):
    """Layers by name and a forward given as a function of (module, x)."""

    def __init__(self, how, **parts):
        super().__init__()
        self.how = how
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.how(self, x)


def conv(a, b, size=1, groups=1):
    return nn.Conv2d(a, b, size, padding=size // 2, groups=groups)


# Images [b, c, h, w]: each block keeps c. ----------------------------------------------------------------------------


def residual(c):
    return Block(
        lambda m, x: F.relu(x + m.b(m.norm(F.relu(m.a(x))))), a=conv(c, 6), norm=nn.BatchNorm2d(6), b=conv(6, c, 3)
    )


def grouped(c):
    return Block(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(c, 8), b=conv(8, 12, 3, groups=4), c=conv(12, c))


def depthwise(c):
    return Block(
        lambda m, x: x + m.b(F.relu(m.norm(m.a(x)))),
        a=conv(c, c, 3, c),
        norm=nn.InstanceNorm2d(c, affine=True),
        b=conv(c, c),
    )


def excited(c):
    return Block(
        lambda m, x: x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3))))))[:, :, None, None],
        down=nn.Linear(c, 4), up=nn.Linear(4, c),
    )  # fmt: skip


def concatenated(c):
    return Block(lambda m, x: m.c(torch.cat([m.a(x), x, m.b(x)], 1)), a=conv(c, 4), b=conv(c, 6, 3), c=conv(c + 10, c))


def dense(c):
    def forward(m, x):
        for layer in (m.a, m.b):
            x = torch.cat([x, F.relu(layer(x))], 1)
        return m.c(x)

    return Block(forward, a=conv(c, 4), b=conv(c + 4, 4), c=conv(c + 8, c))


def halved(c):
    """One half is worked on, then channels are shuffled."""

    def forward(m, x):
        kept, worked = x.chunk(2, 1)
        x = torch.cat([kept, F.relu(m.a(worked))], 1)
        b, channels, h, w = x.shape
        return x.view(b, 2, channels // 2, h, w).transpose(1, 2).reshape(b, channels, h, w)

    return Block(forward, a=conv(c // 2, c // 2, 3))


def normalised(c):
    return Block(lambda m, x: x + m.a(m.norm(x)), norm=nn.GroupNorm(2, c), a=conv(c, c))


def layered(c):
    """ConvNeXt's: depthwise, layer norm of channels, an MLP, a scale for each channel."""

    def forward(m, x):
        y = m.norm(m.depth(x).permute(0, 2, 3, 1))
        return x + (m.scale * m.down(F.gelu(m.up(y)))).permute(0, 3, 1, 2)

    return Block(
        forward, depth=conv(c, c, 3, c), norm=nn.LayerNorm(c), up=nn.Linear(c, 8), down=nn.Linear(8, c),
        scale=nn.Parameter(torch.rand(c) + 0.5),
    )  # fmt: skip


def standardised(c):
    """A convolution whose filters the forward brings to mean 0 and variance 1."""

    def forward(m, x):
        w = m.a.weight - m.a.weight.mean((1, 2, 3), keepdim=True)
        return x + F.conv2d(x, w / (w.square().mean((1, 2, 3), keepdim=True) + 1e-3).sqrt(), m.a.bias, padding=1)

    return Block(forward, a=conv(c, c, 3))


# Sequences [b, t, c] -------------------------------------------------------------------------------------------------


def perceptron(c):
    return Block(
        lambda m, x: x + m.b(F.gelu(m.a(m.norm(x)))), norm=nn.LayerNorm(c), a=nn.Linear(c, 12), b=nn.Linear(12, c)
    )


def gated(c):
    """Llama's MLP behind an RMS norm."""
    return Block(
        lambda m, x: x + m.down(F.silu(m.gate(y := m.norm(x))) * m.up(y)),
        norm=nn.RMSNorm(c), gate=nn.Linear(c, 12), up=nn.Linear(c, 12), down=nn.Linear(12, c),
    )  # fmt: skip


def halves_gated(c):
    return Block(
        lambda m, x: m.norm(x + m.b(F.glu(m.a(x), -1))), norm=nn.LayerNorm(c), a=nn.Linear(c, 16), b=nn.Linear(8, c)
    )


def attentive(c, pairs=4):
    """Attention of its own width; four query heads, as many or fewer key-value heads."""

    def forward(m, x):
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, -1, m.size).transpose(1, 2) for y in (m.q(x), m.k(x), m.v(x)))
        k, v = (y.repeat_interleave(m.times, 1) for y in (k, v))
        y = (q @ k.mT * m.scale).softmax(-1) @ v
        return x + m.out(y.transpose(1, 2).flatten(2))

    return Block(
        forward, q=nn.Linear(c, 16), k=nn.Linear(c, 4 * pairs), v=nn.Linear(c, 4 * pairs), out=nn.Linear(16, c),
        size=4, times=4 // pairs, scale=0.5,
    )  # fmt: skip


def shared_attentive(c):
    return attentive(c, 2)


def as_wide(c):
    """Attention as wide as its stream, queries, keys and values in one matrix."""

    def forward(m, x):
        b, t, width = x.shape
        q, k, v = m.qkv(x).reshape(b, t, 3, m.heads, width // m.heads).permute(2, 0, 3, 1, 4)
        return x + m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width))

    return Block(forward, qkv=nn.Linear(c, 3 * c), out=nn.Linear(c, c), heads=4)


def mixed(c):
    """Positions are mixed by a linear layer over them."""
    return Block(lambda m, x: x + m.tokens(m.norm(x).mT).mT, norm=nn.LayerNorm(c), tokens=nn.Linear(5, 5))


def returning(c):
    return Block(
        lambda m, x: x + m.a(m.layer(x)[0]), layer=nn.GRU(c, 4, batch_first=True, bidirectional=True), a=nn.Linear(8, c)
    )


IMAGES = (residual, grouped, depthwise, excited, concatenated, dense, halved, normalised, layered, standardised)
SEQUENCES = (perceptron, gated, halves_gated, attentive, shared_attentive, as_wide, mixed, returning)
JOINS = ("chain", "sum", "cat", "product", "skip")


class Network(nn.Module):
    """A directed graph: each node joins what two earlier nodes gave and puts a block on it."""

    def __init__(self, images, nodes):
        super().__init__()
        self.images, c = images, 8
        self.stem = conv(3, c, 3) if images else nn.Linear(6, c)
        self.nodes = [(join, other) for _, join, other in nodes]
        self.blocks = nn.ModuleList(make(c) for make, _, _ in nodes)
        doubles = [join == "cat" for _, join, _ in nodes]
        self.narrow = nn.ModuleList(
            (conv(2 * c, c) if images else nn.Linear(2 * c, c)) if d else nn.Identity() for d in doubles
        )
        self.head = nn.Linear(c, 3)

    def forward(self, x):
        made = [self.stem(x)]
        for block, narrow, (join, other) in zip(self.blocks, self.narrow, self.nodes, strict=True):
            last, earlier = made[-1], made[other % len(made)]
            if join == "sum":
                last = last + earlier
            elif join == "product":
                last = last * torch.tanh(earlier)
            elif join == "cat":
                last = narrow(torch.cat([earlier, last], 1 if self.images else -1))
            made.append(block(last) + earlier if join == "skip" else block(last))
        return self.head(made[-1].flatten(2).mean(2) if self.images else made[-1].mean(1))


def randomised(net, seed):
    """Every vector and running statistic drawn anew: fresh ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if value.is_floating_point() and value.ndim == 1:
            drawn = torch.rand(value.shape, generator=generator)
            value.data = drawn + 0.5 if name.endswith(("var", "bias")) else (drawn + 0.5) * (2 * (drawn > 0.5) - 1)
    return net.double().eval()


def check(images, nodes, sparsity, heads, seed):
    torch.manual_seed(seed)
    net = randomised(Network(images, nodes), seed)
    x = torch.randn((2, 3, 4, 4) if images else (2, 5, 6), dtype=torch.float64)
    result = PruneChannels(sparsity=sparsity, score=Random(seed), heads=heads).run(net, Task(net, example_inputs=(x,)))
    assert result.facts["verified"] < 1e-9
    skipped = {skip.place: skip.reason for skip in result.plans[0].skips}
    event(f"{len(skipped) - 1} groups stay")
    assert "reaches the model's output" in skipped.pop("head")
    assert not [reason for reason in skipped.values() if "fails without it" in reason or "literal" in reason], skipped
    assert sum(map(torch.numel, result.model.parameters())) < sum(map(torch.numel, net.parameters()))
    result.model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in result.model.parameters())


def nodes_of(blocks):
    node = st.tuples(st.sampled_from(blocks), st.sampled_from(JOINS), st.integers(0, 5))
    return st.lists(node, min_size=1, max_size=4)


EXAMPLES = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
RATIOS = st.sampled_from([0.25, 0.5, 0.75])


@EXAMPLES
@given(nodes_of(IMAGES), RATIOS, st.integers(0, 9))
def test_any_graph_of_image_blocks_shrinks_exactly(nodes, sparsity, seed):
    check(True, nodes, sparsity, "whole", seed)


@EXAMPLES
@given(nodes_of(SEQUENCES), RATIOS, st.sampled_from(["whole", "inside"]), st.integers(0, 9))
def test_any_graph_of_sequence_blocks_shrinks_exactly(nodes, sparsity, heads, seed):
    check(False, nodes, sparsity, heads, seed)
