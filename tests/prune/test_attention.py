"""Whole heads and what is inside heads go from attention of many makes, and a wrong index never passes."""

import dataclasses

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Slice
from tersor.core.errors import VerificationError
from tersor.core.task import Task
from tersor.core.verify import verify_edits
from tersor.export.artifact import load_artifact, save_artifact
from tersor.export.onnx import export_onnx
from tersor.graph.groups import groups_of
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.scores import Random

WIDTH, HEADS, SIZE = 16, 4, 4


class Plain(nn.Module):
    """GPT-2's attention: one matrix for queries, keys and values; the stream is as wide as heads × size."""

    def __init__(self):
        super().__init__()
        self.heads, self.width, self.scale = HEADS, WIDTH, SIZE**-0.5
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in self.qkv(x).split(self.width, 2))
        y = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class ByItsSize(Plain):
    """Divides by the root of the size of heads as it is now."""

    def forward(self, x):
        self.scale = (x.shape[-1] // self.heads) ** -0.5
        return super().forward(x)


class Stacked(nn.Module):
    """ViT's attention in timm: [b, t, 3, heads, size], taken apart by unbind; norms of queries and keys."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, SIZE
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(y.transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim))


class Grouped(nn.Module):
    """Llama's attention: two query heads to a key-value head, turned by their position."""

    def __init__(self, config, bias=False):
        super().__init__()
        self.config, self.repeats = config, config.heads // config.pairs
        self.q, self.out = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)
        self.k, self.v = (nn.Linear(WIDTH, config.pairs * config.size, bias=bias) for _ in range(2))
        self.scale = config.size**-0.5
        angles = torch.arange(5)[:, None] / 100 ** (torch.arange(SIZE // 2) / 2)
        self.register_buffer("angles", torch.cat([angles, angles], -1))

    def forward(self, x):
        shape = (*x.shape[:2], -1, self.config.size)
        q, k, v = (y.view(shape).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        q, k = (y * self.angles.cos() + turned(y) * self.angles.sin() for y in (q, k))
        k, v = repeated(k, self.repeats), repeated(v, self.repeats)
        y = (q @ k.transpose(2, 3) * self.scale).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1).contiguous())


@dataclasses.dataclass
class Config:
    heads: int = HEADS
    pairs: int = 2
    size: int = SIZE


def turned(x):
    return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)


def repeated(x, times):
    """Every head ``times`` in a row."""
    b, heads, t, size = x.shape
    return x[:, :, None].expand(b, heads, times, t, size).reshape(b, heads * times, t, size)


class Relative(nn.Module):
    """T5's attention: no scale, a learnt bias for each head and distance; heads × size is a width of its own."""

    def __init__(self):
        super().__init__()
        self.n_heads, self.d_kv, self.inner = 4, 6, 24
        self.q, self.k, self.v = (nn.Linear(WIDTH, self.inner, bias=False) for _ in range(3))
        self.o, self.bias = nn.Linear(self.inner, WIDTH, bias=False), nn.Embedding(9, self.n_heads)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (y.view(b, -1, self.n_heads, self.d_kv).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        distance = torch.arange(t)[None] - torch.arange(t)[:, None]
        scores = torch.matmul(q, k.transpose(3, 2)) + self.bias(distance + 4).permute(2, 0, 1).unsqueeze(0)
        y = torch.matmul(scores.softmax(-1), v)
        return self.o(y.transpose(1, 2).contiguous().view(b, -1, self.inner))


class Torchs(nn.Module):
    """torch's own; with or without its weights."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.attention = weights, nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.weights)[0]


class Block(nn.Module):
    """Attention and an MLP behind layer norms, in a residual stream."""

    def __init__(self, attention):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.table = nn.Linear(6, WIDTH), nn.Parameter(torch.randn(1, 5, WIDTH))
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x) + self.table)))


class Crossed(nn.Module):
    """A decoder layer: queries of one stream, keys and values of another of its own width."""

    def __init__(self):
        super().__init__()
        self.heads, self.left, self.right = HEADS, nn.Linear(6, WIDTH), nn.Linear(5, 12)
        self.q, self.kv, self.out = nn.Linear(WIDTH, 16), nn.Linear(12, 32), nn.Linear(16, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x, y):
        x, y = self.left(x), self.right(y).relu()
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in self.kv(y).chunk(2, -1))
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.norm(x + self.out(z)))


def encoder(first, **more):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True, norm_first=first, **more)
    return Model(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def series(width=6, length=5, seed=1):
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MODELS = {
    "by hand": lambda: Model(Block(Plain()), Block(Plain())),
    "stacked": lambda: Model(Block(Stacked()), Block(Stacked())),
    "grouped queries and rotary": lambda: (lambda c: Model(Block(Grouped(c)), Block(Grouped(c, True))))(Config()),
    "relative positions": lambda: Model(Block(Relative()), Block(Relative())),
    "nn.MultiheadAttention": lambda: Model(Block(Torchs(False)), Block(Torchs(False))),
    "nn.TransformerEncoder, norms first": lambda: encoder(True, activation="gelu"),
    "nn.TransformerEncoder, norms last": lambda: encoder(False),
    "crossed": Crossed,
}
# name → (attribute, what it must be with half of the heads, what with half of every head); None: as it was
AFTER = {
    "by hand": {"blocks.0.attention.heads": (2, 4), "blocks.0.attention.width": (8, 8)},
    "stacked": {"blocks.0.attention.num_heads": (2, 4), "blocks.1.attention.head_dim": (4, 2)},
    "grouped queries and rotary": {"blocks.0.attention.config.size": (4, 2), "blocks.1.attention.repeats": (2, 2)},
    "relative positions": {
        "blocks.0.attention.n_heads": (2, 4), "blocks.0.attention.d_kv": (6, 3), "blocks.1.attention.inner": (12, 12),
    },
    "nn.MultiheadAttention": {
        "blocks.0.attention.attention.num_heads": (2, 4),
        "blocks.1.attention.attention.embed_dim": (8, 8),
    },
    "nn.TransformerEncoder, norms first": {
        "blocks.0.layers.0.self_attn.num_heads": (2, 4), "blocks.0.layers.1.self_attn.embed_dim": (8, 8),
        "blocks.0.layers.1.linear1.out_features": (12, 12),
    },
    "nn.TransformerEncoder, norms last": {"blocks.0.layers.0.self_attn.num_heads": (2, 4)},
    "crossed": {"heads": (2, 4), "kv.out_features": (16, 16), "q.out_features": (8, 8)},
}  # fmt: skip


def made(name, seed=0):
    """The model of that name, and its task."""
    return prepared(MODELS[name], seed)


def prepared(factory, seed=0):
    """The model with every vector drawn anew, in float64, and its task."""
    torch.manual_seed(seed)
    net = factory()
    generator = torch.Generator().manual_seed(seed)
    for value in net.parameters():
        if value.ndim == 1:
            value.data = torch.rand(value.shape, generator=generator) + 0.5
        else:
            value.data *= 2
    net = net.double().eval()
    inputs = (series(), series(5, 7, 2)) if isinstance(net, Crossed) else (series(),)
    return net, Task(net, example_inputs=inputs)


def at(model, path):
    *modules, name = path.split(".")
    for module in modules:
        model = getattr(model, module)
    return getattr(model, name)


@pytest.mark.parametrize("heads", ["whole", "inside"])
@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_heads_go_or_half_of_every_head(name, heads):
    net, task = made(name)
    result = PruneChannels(sparsity=0.5, score=Random(), heads=heads).run(net, task)
    assert result.facts["verified"] < 1e-9
    sizes = [sum(p.numel() for p in model.parameters()) for model in (net, result.model)]
    assert sizes[1] < 0.42 * sizes[0], result.plans[0]
    skipped = {skip.place for skip in result.plans[0].skips}
    assert skipped == {"head"}, result.plans[0]
    for path, expected in AFTER[name].items():
        assert at(result.model, path) == expected[heads == "inside"], path
    result.model.train()(*task.example_inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in result.model.parameters())


@pytest.mark.parametrize("heads", ["whole", "inside"])
def test_query_heads_go_with_the_key_value_head_that_they_read(heads):
    net, task = made("grouped queries and rotary")
    groups = groups_of(net, task.example_inputs).prunable(heads)
    group = next(group for group in groups if group.name.startswith("blocks.0.attention.q") and group.frozen is None)
    units = {str(axis): axis.units.tolist() for axis in group.axes if axis.place.module.startswith("blocks.0")}
    query, key = units["blocks.0.attention.q.weight[0]"], units["blocks.0.attention.k.weight[0]"]
    if heads == "whole":
        assert group.kind == "head" and group.units == 2
        assert query == units["blocks.0.attention.out.weight[1]"] == [0] * 8 + [1] * 8
        assert key == units["blocks.0.attention.v.weight[0]"] == [0] * 4 + [1] * 4
    else:
        assert group.kind == "inside" and group.units == 2, "rotated halves go in pairs"
        assert query == [0, 1, 0, 1] * 4 and key == [0, 1, 0, 1] * 2
        assert "blocks.0.attention.v.weight[0]" not in units, "values are no part of the product of queries and keys"


def test_a_config_that_layers_share_ties_what_is_inside_their_heads():
    net, task = made("grouped queries and rotary")
    groups = [group for group in groups_of(net, task.example_inputs).prunable("inside") if group.kind == "inside"]
    assert [group.name.split(".")[1:4:2] for group in groups] == [[n, f"{m}:inside"] for n in "01" for m in "qv"]
    assert len({group.share for group in groups}) == 1 and groups[0].share is not None


@pytest.mark.parametrize("attention", [lambda: Torchs(True), lambda: ByItsSize()])
def test_a_scale_that_the_forward_computes_from_the_size_of_heads_keeps_what_is_inside(attention):
    net, task = prepared(lambda: Model(Block(attention())))
    whole = PruneChannels(sparsity=0.5, score=Random()).run(net, task)
    assert whole.facts["verified"] < 1e-9 and {skip.place for skip in whole.plans[0].skips} == {"head"}
    inside = PruneChannels(sparsity=0.5, score=Random(), heads="inside").run(net, task)
    reasons = {skip.place: skip.reason for skip in inside.plans[0].skips}
    assert inside.facts["verified"] < 1e-9 and "the forward computes with its size" in reasons["stem"]
    assert inside.model.blocks[0].up.out_features == 12


def wrong(net, plan, cut):
    """The plan with the last removed index of a cut in place of the kept one that is nearest (a bias of keys, which
    changes nothing, comes before that of values)."""
    removal, *rest = plan.edits
    assert isinstance(removal, Slice)
    size = at(net, str(cut.place)).shape[cut.dim]
    gone = max(set(range(size)) - set(cut.keep.tolist()))
    keep = cut.keep.clone()
    keep[(keep - gone).abs().argmin()] = gone
    cuts = tuple(dataclasses.replace(c, keep=keep.sort().values) if c is cut else c for c in removal.cuts)
    return dataclasses.replace(plan, edits=(Slice(cuts), *rest))


@pytest.mark.parametrize("name", ["by hand", "grouped queries and rotary", "crossed"])
@pytest.mark.parametrize("heads", ["whole", "inside"])
def test_every_wrong_index_is_caught(name, heads):
    net, task = made(name)
    plan = PruneChannels(sparsity=0.5, score=Random(), heads=heads).plan(net, task)
    assert plan.reference is not None, "layer norms need the masked graph"
    assert verify_edits(net, apply(net, plan), plan, task) < 1e-9
    cuts = plan.edits[0].cuts
    assert {cut.role for cut in cuts} == {"producer", "consumer", "bystander"}
    assert {"norm.weight", "stem.weight"} & {str(cut.place) for cut in cuts} or name == "crossed"
    unseen = []
    for cut in cuts:
        tampered = wrong(net, plan, cut)
        try:
            verify_edits(net, apply(net, tampered), tampered, task, tolerance=1e-9)
        except VerificationError:
            continue
        unseen.append(f"{cut.place}[{cut.dim}]")
    assert unseen == []


@pytest.mark.parametrize("name", ["stacked", "grouped queries and rotary", "nn.MultiheadAttention"])
def test_an_artifact_rebuilds_the_pruned_transformer_from_a_fresh_original(name, tmp_path):
    net, task = made(name)
    result = PruneChannels(sparsity=0.5, score=Random(), heads="inside").run(net, task)
    save_artifact(tmp_path / "saved", result.model, original=net, plans=result.plans)
    fresh, _ = made(name, seed=1)
    loaded = load_artifact(tmp_path / "saved", fresh)
    assert torch.equal(loaded(*task.example_inputs), result.model(*task.example_inputs))
    for path, (_, expected) in AFTER[name].items():
        assert at(loaded, path) == expected
    assert all(at(fresh, path) == at(net, path) for path in AFTER[name]), "the fresh original stays as it is"


@pytest.mark.parametrize("heads", ["whole", "inside"])
def test_the_exported_file_agrees(heads, tmp_path):
    net, task = made("grouped queries and rotary")
    shrunk = PruneChannels(sparsity=0.5, score=Random(), heads=heads).run(net, task).model.float()
    inputs = tuple(x.float() for x in task.example_inputs)
    file = export_onnx(shrunk, inputs, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {file.inputs[0]: inputs[0].numpy()})
    expected = shrunk(*inputs).detach().numpy()
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
