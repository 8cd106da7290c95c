"""Weights rounded to the nearest: against loops, in every kind of layer, and what is passed over and why."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tersor.core.apply import apply
from tersor.core.edit import Mask, Quantizer
from tersor.core.errors import InputError
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.place import ByName, ByType, TensorPlace
from tersor.core.plan import Plan
from tersor.core.step import Pipeline
from tersor.core.task import Task
from tersor.quantize.ranges import MeanSquaredError
from tersor.quantize.schemes import Int
from tersor.quantize.weight_only import QuantizeWeights, quantizer, rounded, spread


def task_of(model, inputs):
    """A task whose data nobody reads."""
    data = [(inputs, torch.arange(len(inputs)) % 2)]
    return Task(model.eval(), data, data, data).complete()


def naive(weight, axis, scheme):
    """One number after the other; every run has the scale of its largest."""
    rows = weight.detach().movedim(axis, 0).flatten(1).double()
    if scheme.granularity == "per_tensor":
        rows = rows.reshape(1, -1)
    size = scheme.group_size or rows.shape[1]
    new = torch.empty_like(rows)
    for row, start in itertools.product(range(len(rows)), range(0, rows.shape[1], size)):
        run = rows[row, start : start + size]
        levels = 2**scheme.bits - 1
        if scheme.symmetric:
            s, z, low, high = float(run.abs().max()) / (levels // 2), 0, -(levels // 2) - 1, levels // 2
        else:
            low, high = 0, levels
            s = (max(float(run.max()), 0.0) - min(float(run.min()), 0.0)) / levels
            z = round(-min(float(run.min()), 0.0) / s)
        for j, w in enumerate(run.tolist()):
            new[row, start + j] = (min(max(round(w / s) + z, low), high) - z) * s
    moved = weight.movedim(axis, 0)
    return new.reshape(moved.shape).movedim(0, axis).float()


def conv1d(package):
    package("transformers")
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 8)  # outputs, inputs


LAYERS = {
    "linear": lambda _: (nn.Linear(8, 6), 0),
    "convolution": lambda _: (nn.Conv2d(4, 6, 2, groups=2), 0),
    "transposed": lambda _: (nn.ConvTranspose2d(4, 3, 2), 1),
    "embedding": lambda _: (nn.Embedding(5, 8), 0),
    "conv1d": lambda package: (conv1d(package), 1),
}
SCHEMES = [Int(8), Int(4), Int(3, symmetric=False), Int(4, "per_tensor"), Int(4, group_size=4), Int(2, group_size=8)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_each_kind_of_layer_is_rounded_as_loops_round_it(kind, scheme, package):
    torch.manual_seed(0)
    layer, axis = LAYERS[kind](package)
    nn.init.normal_(layer.weight)
    model = nn.Sequential(layer)
    plan = QuantizeWeights(scheme).plan(model, task_of(model, torch.randn(2, 8)))
    (edit,) = plan.edits
    assert isinstance(edit, Quantizer) and not edit.learn and not plan.skips
    new = apply(model, plan)[0]
    assert torch.allclose(new.weight, naive(layer.weight, axis, scheme), atol=1e-6)
    assert torch.equal(new.parametrizations["weight"].original, layer.weight), "what is stored beneath stays"
    error = (new.weight - layer.weight).detach().square().sum() / layer.weight.detach().square().sum()
    assert plan.lines == (
        ("0.weight", f"{scheme}, {edit.scale.numel()} scales, relative squared error {float(error):.3g}"),
    )


@given(
    st.integers(2, 8), st.booleans(), st.sampled_from([(None, 0), (2, 0), (6, 0), (None, 1), (4, 1)]),
    st.integers(0, 10_000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_rounding_again_changes_no_bit_and_every_number_is_an_integer_times_its_scale(bits, symmetric, grid, seed):
    group_size, axis = grid
    value = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(seed))
    scheme = Int(bits, symmetric=symmetric, group_size=group_size)
    if axis == 1 and group_size == 4:
        value = value.reshape(4, 3, 2)
    edit = quantizer(TensorPlace("", "weight"), value, axis, scheme, MeanSquaredError(steps=5))
    new = rounded(edit, value)
    assert torch.equal(rounded(edit, new), new)
    scale, zero_point = spread(edit, value.shape)
    q = torch.round(new / scale) + zero_point
    assert torch.equal((q - zero_point) * scale, new)
    assert int(q.min()) >= scheme.quant_min and int(q.max()) <= scheme.quant_max


def test_groups_that_do_not_divide_are_skipped_with_the_arithmetic_or_refused():
    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 2))
    task = task_of(model, torch.randn(2, 10))
    plan = QuantizeWeights(Int(4, group_size=4)).plan(model, task)
    assert [place.module for edit in plan.edits for place in edit.places] == ["1"]
    (skip,) = plan.skips
    assert skip.place == "0.weight" and "4 does not divide its 10 weights" in skip.reason
    with pytest.raises(InputError, match=r"0\.weight \[4, 10\].*10 = 2 · 4 \+ 2"):
        QuantizeWeights(Int(4, group_size=4, indivisible="refuse")).plan(model, task)


def test_masked_zeros_stay_zero_on_every_grid():
    model = nn.Sequential(nn.Linear(8, 6))
    nn.init.uniform_(model[0].weight, 1, 2)  # an asymmetric range that zero lies outside of
    keep = torch.arange(48).reshape(6, 8) % 4 < 2
    masked = apply(model, Plan("2:4", (Mask(TensorPlace("0", "weight"), keep),)))
    for scheme in SCHEMES:
        new = QuantizeWeights(scheme).run(masked, task_of(masked, torch.randn(2, 8))).model
        assert (new[0].weight[~keep] == 0).all() and (new[0].weight[keep] != 0).all()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.position = nn.Parameter(torch.randn(3, 4))
        self.normed, self.norm = weight_norm(nn.Linear(4, 4)), nn.LayerNorm(4)

    def forward(self, tokens):
        return self.head(self.norm(self.normed(self.embedding(tokens) + self.position)).mean(1))


def test_tied_weights_are_rounded_once_and_only_where_all_of_their_layers_are_meant():
    model = Tied()
    task = task_of(model, torch.randint(7, (2, 3)))
    plan = QuantizeWeights().plan(model, task)
    assert [place for place, _ in plan.lines] == ["embedding.weight, head.weight"] and len(plan.edits) == 1
    assert {skip.place: skip.reason for skip in plan.skips} == {
        "position": "stays float: not the weight of a known layer, but of a Tied, [3, 4]",
        "normed.weight": "it is computed by _WeightNorm from what is stored",
    }
    new = apply(model, plan)
    assert torch.equal(new.head.weight, new.embedding.weight) and not torch.equal(new.head.weight, model.head.weight)
    assert new.head.parametrizations["weight"].original is new.embedding.parametrizations["weight"].original
    assert new.head.parametrizations["weight"][0] is new.embedding.parametrizations["weight"][0]
    plan = QuantizeWeights(where=ByType("Linear")).plan(model, task)
    assert not plan.edits
    assert ("head.weight", "it is tied to embedding.weight, which where leaves out") in {
        (skip.place, skip.reason) for skip in plan.skips
    }


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.head = nn.Linear(10, 2)

    def forward(self, x):
        x, _ = self.lstm(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_recurrent_layers_and_attention_compute_with_the_rounded_weights():
    torch.manual_seed(0)
    model, x = Recurrent(), torch.randn(4, 7, 6)
    task = task_of(model, x)
    result = QuantizeWeights(Int(4)).run(model, task)
    (plan,) = result.plans
    assert len(plan.edits) == 2 * 2 * 2 + 3 and not plan.skips
    by_hand = Recurrent().eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if value.ndim == 2:
            state[name] = naive(value, 0, Int(4))
    by_hand.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(result.model(x), by_hand(x), atol=1e-5)
        assert not torch.allclose(result.model(x), model(x), atol=1e-3)


def test_what_is_quantised_already_is_skipped_and_where_that_is_all_refused():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
    task = task_of(model, torch.randn(2, 8))
    mixed = Pipeline((QuantizeWeights(Int(4), where=ByName("0")), QuantizeWeights(Int(8)))).run(model, task)
    assert [(skip.place, skip.reason) for skip in mixed.plans[1].skips] == [("0.weight", "quantised already")]
    assert [type(entry) for entry in mixed.model[0].parametrizations["weight"]] == [FakeQuantize]
    assert mixed.model[0].weight.unique().numel() <= 6 * 16
    with pytest.raises(
        InputError, match=r"0\.weight: the model is quantised already. Got 2 quantised weights.*leave this one out"
    ):
        QuantizeWeights().plan(mixed.model, task)


def test_bad_input_is_named():
    model = nn.Sequential(nn.Linear(4, 3))
    task = task_of(model, torch.randn(2, 4))
    with torch.no_grad():
        model[0].weight[1, 2] = float("nan")
    with pytest.raises(InputError, match=r"0\.weight: a weight that is not finite has no range. Got 1 NaN and 0 inf"):
        QuantizeWeights().plan(model, task)
    with pytest.raises(InputError, match="QuantizeWeights.scheme: too wide for weights"):
        QuantizeWeights(Int(16))


def test_a_row_of_zeros_stays_one_and_half_precision_is_kept():
    model = nn.Sequential(nn.Linear(16, 3)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight[1] = 0
    plan = QuantizeWeights(Int(8)).plan(model, task_of(model, torch.randn(2, 16, dtype=torch.bfloat16)))
    weight = apply(model, plan)[0].weight
    assert weight.dtype == torch.bfloat16 and (weight[1] == 0).all()
    assert torch.equal(rounded(plan.edits[0], weight.detach()), weight)
    assert (weight - model[0].weight).abs().max() <= model[0].weight.abs().max() / 127


def language_model(name):
    import transformers

    torch.manual_seed(0)
    if name == "bert":
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=16, num_labels=3,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("name, weights", [("bert", 3 + 2 * 6 + 2), ("gpt2", 2 + 2 * 4), ("llama", 1 + 2 * 7 + 1)])
def test_transformers_are_rounded_in_every_layer_and_stay_near_at_eight_bits(name, weights, package):
    package("transformers")
    model, tokens = language_model(name).eval(), torch.randint(50, (2, 9))
    task = task_of(model, tokens)
    errors = []
    for scheme in (Int(8, group_size=16), Int(4, group_size=16), Int(3)):
        result = QuantizeWeights(scheme).run(model, task)
        assert len(result.plans[0].edits) == weights and not result.plans[0].skips
        with torch.no_grad():
            expected, got = task.outputs(model, (tokens, None)), task.outputs(result.model, (tokens, None))
        errors.append(float((got - expected).square().sum() / expected.square().sum()))
    assert errors[0] < 1e-3 and errors == sorted(errors)
