import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.errors import InputError
from tersor.core.task import Task
from tersor.distill.attention import AttentionMaps
from tersor.distill.cache import TeacherCache
from tersor.distill.features import AttentionTransfer, Hints
from tersor.distill.stored_answer import distance, encode
from tersor.train.finetune import Finetune
from tersor.train.taps import UNSEEN, Tap, sole, tapped
from tersor.train.teacher import run_teacher

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


class Attention(nn.Module):
    """Attention over [batch, length, width], spelt in one of three ways."""

    def __init__(self, heads, width, way, causal=False, groups=None):
        super().__init__()
        self.heads, self.way, self.causal, self.groups = heads, way, causal, groups or heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width * self.groups // heads)
        self.v = nn.Linear(width, width * self.groups // heads)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, mask):
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (self.groups, -1)).transpose(1, 2) for f in (self.k, self.v))
        if self.way == "fused":
            allowed = None if self.causal else mask[:, None, None].bool()
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                allowed,
                is_causal=self.causal,
                enable_gqa=self.groups < self.heads,
                dropout_p=0.1 * self.training,
            )
            return y.transpose(1, 2).flatten(2)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores + (1 - mask[:, None, None]) * torch.finfo(scores.dtype).min
        weights = self.softmax(scores) if self.way == "module" else scores.softmax(-1)
        return (F.dropout(weights, 0.1, self.training) @ v).transpose(1, 2).flatten(2)


class Transformer(nn.Module):
    def __init__(self, layers=2, heads=2, width=8, way="method", **fields):
        super().__init__()
        self.layers = nn.ModuleList(Attention(heads, width, way, **fields) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, x, attention_mask):
        for layer in self.layers:
            x = x + layer(x, attention_mask)
        return self.head(x)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch_of(width=8):
    return {"x": torch.randn(3, 5, width), "attention_mask": MASK, "labels": torch.zeros(3, 5, dtype=torch.long)}


def maps_of(model, batch):
    """Attention of each layer, computed by hand: [batch, heads, queries, keys]."""
    x, found = batch["x"], []
    for layer in model.layers:
        q = layer.q(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        k = layer.k(x).unflatten(-1, (layer.groups, -1)).transpose(1, 2)
        k = torch.stack([k[:, head * layer.groups // layer.heads] for head in range(layer.heads)], 1)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        hidden = torch.ones(5, 5).tril() if layer.causal else batch["attention_mask"][:, None, None]
        found.append(torch.softmax(scores.masked_fill(hidden == 0, -torch.inf), -1).detach())
        x = x + layer(x, batch["attention_mask"])
    return found


def task_of(student, teacher):
    return Task(student, reference=teacher)


@pytest.mark.parametrize(
    "fields", [{"way": "method"}, {"way": "module"}, {"way": "fused"}, {"way": "fused", "causal": True},
               {"way": "fused", "heads": 4, "groups": 2}],
)  # fmt: skip
def test_attention_is_seen_however_it_is_spelt(fields):
    model, batch = Transformer(layers=1, **fields).train(), batch_of()
    with tapped(model, [Tap("layers.0", "attention")]) as seen:
        model(batch["x"], batch["attention_mask"])
    (scores,) = sole(seen.values, "student").values()
    assert torch.allclose(torch.softmax(scores, -1), maps_of(model.eval(), batch)[0], atol=1e-6)
    assert scores.requires_grad and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_the_attention_of_torch_s_own_layers_is_seen_and_their_result_is_theirs(training):
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    x, padding = torch.randn(3, 5, 8), MASK == 0
    with torch.no_grad(), tapped(model, [Tap("", "attention")]) as seen:
        result = model(x, src_key_padding_mask=padding)
    plain = model.train()(x, src_key_padding_mask=padding)
    weights = model.self_attn(x, x, x, key_padding_mask=padding, average_attn_weights=False)[1]
    (scores,) = sole(seen.values, "student").values()
    assert torch.allclose(torch.softmax(scores, -1), weights, atol=1e-6)
    assert torch.allclose(result[~padding], plain[~padding], atol=1e-5)


def naive_kl(ours, theirs, heads):
    total = count = 0
    for a_s, a_t in zip(ours, theirs, strict=True):
        if heads == "mean":
            a_s, a_t = a_s.mean(1, keepdim=True), a_t.mean(1, keepdim=True)
        layer = rows = 0
        for b in range(3):
            for h in range(a_s.shape[1]):
                for q in range(int(MASK[b].sum())):
                    keys = range(int(MASK[b].sum()))
                    layer += sum(float(a_t[b, h, q, k] * (a_t[b, h, q, k] / a_s[b, h, q, k]).log()) for k in keys)
                    rows += 1
        total, count = total + layer / rows, count + 1
    return total / count


@pytest.mark.parametrize("heads", ["each", "mean"])
@pytest.mark.parametrize("ways", [("method", "fused"), ("fused", "method")])
def test_the_divergence_of_maps_is_minilm_s_without_padding(heads, ways):
    student, teacher = Transformer(way=ways[0]).eval(), Transformer(width=16, way=ways[1]).eval()
    teacher.embed = nn.Linear(8, 16)
    wide = Wide(teacher)
    batch = batch_of()
    objective = AttentionMaps({"layers.*": "inner.layers.*"}, heads=heads)
    got = objective(student, batch, task_of(student, wide))
    inner = {**batch, "x": teacher.embed(batch["x"])}
    assert got.item() == pytest.approx(naive_kl(maps_of(student, batch), maps_of(teacher, inner), heads), rel=1e-4)


class Wide(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, attention_mask):
        return self.inner(self.inner.embed(x), attention_mask)


def test_the_squared_error_is_of_scores_centred_over_the_keys_that_are_seen():
    student, teacher = Transformer(1, way="fused").eval(), Transformer(1, way="module").eval()
    batch = batch_of()
    total = rows = 0
    (a_s,), (a_t,) = maps_of(student, batch), maps_of(teacher, batch)
    for b in range(3):
        n = int(MASK[b].sum())
        z_s, z_t = (a[b, :, :n, :n].log() for a in (a_s, a_t))  # scores but for a constant in each row
        gap = (z_s - z_s.mean(-1, keepdim=True)) - (z_t - z_t.mean(-1, keepdim=True))
        total, rows = total + float(gap.square().mean(-1).sum()), rows + 2 * n
    got = AttentionMaps({"layers.0": "layers.0"}, loss="mse")(student, batch, task_of(student, teacher))
    assert got.item() == pytest.approx(total / rows, rel=1e-4)


@pytest.mark.parametrize("objective", [
    AttentionMaps({"layers.*": "layers.*"}), AttentionMaps({"layers.*": "layers.*"}, "mse"),
    AttentionMaps({"layers.*": "layers.*"}, heads="mean"), AttentionMaps({"layers.*": "layers.*"}, "mse", "mean"),
    Hints({"layers.*": "layers.*"}), Hints({"layers.*": "layers.*"}, "cosine"),
    AttentionTransfer({"layers.*": "layers.*"}),
])  # fmt: skip
@pytest.mark.parametrize("ways", [("fused", "fused"), ("method", "fused")])
def test_padding_changes_nothing_and_gradients_are_finite(objective, ways):
    student, teacher = Transformer(way=ways[0]).eval(), Transformer(way=ways[1]).eval()
    batch = batch_of()
    loss = objective(student, batch, task_of(student, teacher))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
    assert student.layers[0].q.weight.grad.abs().sum() > 0 and loss.item() > 1e-5
    spoiled = {**batch, "x": torch.where(MASK[..., None] == 1, batch["x"], 9.0)}
    assert objective(student, spoiled, task_of(student, teacher)).item() == pytest.approx(loss.item(), rel=1e-4)
    assert objective(student, batch, task_of(student, copy.deepcopy(student))).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("spread, expected", [("uniform", [1, 3, 5]), ("top", [3, 4, 5]), ("bottom", [0, 1, 2])])
def test_a_layer_map_is_uniform_or_of_the_top_or_the_bottom(spread, expected):
    student, teacher = Transformer(3).eval(), Transformer(6).eval()
    batch = batch_of()
    named = [Hints({f"layers.{i}": f"layers.{place}"}) for i, place in enumerate(expected)]
    one_by_one = [objective(student, batch, task_of(student, teacher)).item() for objective in named]
    got = Hints({"layers.*": "layers.*"}, spread=spread)(student, batch, task_of(student, teacher))
    assert got.item() == pytest.approx(sum(one_by_one) / 3, rel=1e-5)


def test_other_numbers_of_heads_are_an_error_that_says_what_to_do():
    student, teacher = Transformer(heads=2), Transformer(heads=4)
    with pytest.raises(InputError, match=r"student \[3, 2, 5, 5\], teacher \[3, 4, 5, 5\].*heads='mean'"):
        AttentionMaps({"layers.*": "layers.*"})(student, batch_of(), task_of(student, teacher))
    mean = AttentionMaps({"layers.*": "layers.*"}, heads="mean")(student, batch_of(), task_of(student, teacher))
    assert torch.isfinite(mean)


@pytest.mark.parametrize(
    ("path", "count", "do"),
    [
        ("head", "nothing passes", "hide it. Name a layer that is called once"),
        ("", "2 tensors pass", "one in each forward pass. Name the part that holds one attention"),
    ],
)
def test_a_layer_without_one_attention_is_an_error(path, count, do):
    model = Transformer()
    with pytest.raises(InputError, match=f"{count} this layer of the student.*{do}"):
        AttentionMaps({path: "layers.0"})(model, batch_of(), task_of(model, Transformer()))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert_s_attention_and_hidden_states_are_transformers_own(package, attention):
    transformers = package("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=20,
        attn_implementation=attention,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    tokens, mask = torch.randint(1, 40, (3, 5)), MASK
    taps = [Tap(f"bert.encoder.layer.{i}", what) for i in range(4) for what in ("output", "attention")]
    with torch.no_grad(), tapped(model, taps) as seen:
        model(input_ids=tokens, attention_mask=mask)
    values = sole(seen.values, "teacher")
    model.set_attn_implementation("eager")
    own = model(input_ids=tokens, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    for i in range(4):
        assert torch.allclose(values[Tap(f"bert.encoder.layer.{i}")], own.hidden_states[i + 1], atol=1e-5)
        scores = values[Tap(f"bert.encoder.layer.{i}", "attention")]
        assert torch.allclose(torch.softmax(scores, -1), own.attentions[i], atol=1e-5)
    small = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20
        )
    )
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": torch.zeros(3, dtype=torch.long)}
    task = Task(small, [batch], [batch], [batch], reference=model)
    layers = {"bert.encoder.layer.*": "bert.encoder.layer.*"}
    objective = Hints(layers) + AttentionMaps(layers)
    for companion in objective.companions():
        companion.begin(small, task)
    objective(small, batch, task).backward()
    assert small.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("way", ["method", "module", "fused"])
def test_attention_with_padding_is_kept_by_the_cache_and_a_changed_one_is_noticed(way, tmp_path):
    """Scores of keys that must not be seen are −∞ or float32's least number, neither of which fp16 holds."""

    class Padded(Transformer):
        def forward(self, x):
            return super().forward(x, MASK[torch.arange(len(x)) % 3])[:, 0]

    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(12, 5, 8), torch.randint(0, 3, (12,))), 6)
    student, teacher = Padded(way=way).eval(), Padded(way=way).eval().requires_grad_(False)
    task = Task(student, data, data, data, reference=teacher)
    objective = AttentionMaps({"layers.*": "layers.*"}, loss="mse")
    step = Finetune(3, objective, keep="last")
    plain = step.run(student, task)
    cached = step.run(student, TeacherCache(str(tmp_path), views=1).on(task))
    assert cached.facts["teacher"]["hits"] >= 24 and not cached.facts["teacher"]["notes"]
    for with_it, without in zip(cached.history, plain.history, strict=True):
        assert with_it["loss"] == pytest.approx(without["loss"], rel=2e-3)
    answer = run_teacher(teacher, ((data.dataset.tensors[0][:6],), {}), lambda y: y, [Tap("layers.0", "attention")])
    columns = {name: value[:2] for name, value in encode(answer, None).items()}  # of samples with padding alone
    scores = {name: value for name, value in columns.items() if "attention" in name}
    other = columns | {name: torch.where(value > UNSEEN, value * 1.05, value) for name, value in scores.items()}
    assert distance(columns, columns) == 0 and distance(other, columns) > 0.04
