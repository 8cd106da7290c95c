"""Scaling by activations against a naive search, its factors through graphs, and what it saves in rounding."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Mask, Write
from tersor.core.errors import InputError
from tersor.core.place import ByName, TensorPlace
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.quantize.awq import ScaleByActivations
from tersor.quantize.schemes import Int
from tersor.quantize.weight_only import QuantizeWeights


def task_of(model, x, count=2):
    data = [(part, torch.arange(len(part)) % 2) for part in x.chunk(count)]
    return Task(model.eval(), data, data, data, calibration=data).complete()


def error(model, original, x):
    with torch.no_grad():
        expected = original(x)
        return float((model(x) - expected).square().sum() / expected.square().sum())


def uneven(rows, columns, seed=0):
    """Inputs some of which are much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * (1.3 * torch.randn(columns, generator=generator)).exp()


class Normed(nn.Module):
    """Two layers read what a norm gives; a third reads through a ReLU and a flattening."""

    def __init__(self):
        super().__init__()
        self.norm, self.left, self.right = nn.LayerNorm(12), nn.Linear(12, 8), nn.Linear(12, 8, bias=False)
        self.out = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(x)
        return self.out(F.relu(self.left(x)) + F.gelu(self.right(x)))


def normed():
    torch.manual_seed(0)
    model = Normed()
    with torch.no_grad():
        model.norm.weight.copy_((1.2 * torch.randn(12)).exp())
        model.norm.bias.normal_()
    x = torch.randn(200, 12)
    return model, x, task_of(model, x)


def test_the_power_is_that_of_a_naive_search_over_the_outputs_of_all_readers():
    model, x, task = normed()
    scheme = Int(3)
    with torch.no_grad():
        read = model.norm(x)
    size = read.abs().mean(0)
    errors = {}
    for number in range(11):
        s = size ** (number / 10)
        s /= s.log().mean().exp()
        errors[number / 10] = 0.0
        for layer in (model.left, model.right):
            scaled = nn.Sequential(copy.deepcopy(layer))
            with torch.no_grad():
                scaled[0].weight *= s
            rounded = QuantizeWeights(scheme).run(scaled, task_of(scaled, read)).model[0].weight
            with torch.no_grad():
                wanted = F.linear(read, layer.weight)
                lost = (F.linear(read / s, rounded) - wanted).square().sum()
                errors[number / 10] += float(lost / wanted.square().sum())
    best = min(errors, key=errors.get)
    assert 0 < best < 1
    plan = ScaleByActivations(scheme, steps=10).plan(model, task)
    assert plan.preserves and {str(edit.place) for edit in plan.edits} == {
        "norm.weight", "norm.bias", "left.weight", "right.weight"
    }  # fmt: skip
    ((place, line),) = plan.lines
    assert place == "norm:layer_norm[0]"
    assert line.startswith(f"α {best:.2f} for left, right: relative squared error ")
    before, after = map(float, line.split("error ")[1].split(" -> "))
    assert before == pytest.approx(errors[0.0], rel=0.01) and after == pytest.approx(errors[best], rel=0.01)
    s = size**best / (size**best).log().mean().exp()
    value = {str(edit.place): edit.value for edit in plan.edits}
    assert torch.allclose(value["left.weight"], model.left.weight * s, rtol=1e-4)
    assert torch.allclose(value["norm.bias"], model.norm.bias / s, rtol=1e-4)


def test_other_producers_are_skips_with_the_operator_that_does_not_commute():
    model, _, task = normed()
    plan = ScaleByActivations(Int(3)).plan(model, task)
    assert [skip.place for skip in plan.skips] == ["left:linear[0]", "right:linear[0]", "out:linear[0]"]
    assert "gelu" in plan.skips[1].reason and "returns" in plan.skips[2].reason


class Branches(nn.Module):
    """A convolution reads two others joined; a linear layer reads channels flattened; one is grouped."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.joined, self.grouped = nn.Conv2d(10, 8, 3), nn.Conv2d(8, 8, 1, groups=2, bias=False)
        self.fc = nn.Linear(8 * 9, 5)

    def forward(self, x):
        x = torch.cat([F.relu(self.a(x)), F.leaky_relu(self.b(x))], 1)
        x = F.max_pool2d(F.relu(self.grouped(F.relu(self.joined(x)))), 2)
        return self.fc(x.flatten(1))


def branches():
    torch.manual_seed(0)
    model = Branches()
    with torch.no_grad():
        for layer in (model.a, model.b, model.joined, model.grouped):
            layer.weight *= torch.randn(len(layer.weight)).exp()[:, None, None, None]
    x = torch.randn(40, 3, 8, 8)
    return model, x, task_of(model, x)


def test_convolutions_joins_groups_and_flattened_channels_keep_the_function():
    model, x, task = branches()
    result = ScaleByActivations(Int(3)).run(model, task)
    assert result.facts["verified"] < 1e-5 and error(result.model, model, x) < 1e-9
    moved = {str(edit.place) for edit in result.plans[0].edits if not torch.equal(edit.value, at(model, edit.place))}
    assert moved == {
        *(f"{name}.weight" for name in ("a", "b", "joined", "grouped", "fc")),
        "a.bias",
        "b.bias",
        "joined.bias",
    }


def at(model, place):
    return model.get_submodule(place.module).get_parameter(place.tensor)


@pytest.mark.parametrize("scheme", [Int(3), Int(4, group_size=2), Int(3, symmetric=False)], ids=str)
def test_the_error_after_is_that_of_the_rescaled_layer_on_what_it_then_reads(scheme):
    """Two pairs end in one layer: the second is searched with what the first has made of weights and inputs."""
    model, x, task = branches()
    result = ScaleByActivations(scheme, rows=10**6, where=~ByName("grouped")).run(model, task)
    said = {place.split(":")[0]: line for place, line in result.plans[0].lines}["b"]
    errors = []
    for net in (model, result.model):
        rounded = QuantizeWeights(scheme, where=ByName("joined")).run(net, task).model.joined
        with torch.no_grad():
            read = torch.cat([F.relu(net.a(x)), F.leaky_relu(net.b(x))], 1)
            wanted, got = (F.conv2d(read, layer.weight) for layer in (net.joined, rounded))
        errors.append(float((got - wanted).square().sum() / wanted.square().sum()))
    assert said.split(" for ")[1].startswith("joined:") and errors[1] < 0.9 * errors[0]
    assert float(said.split("-> ")[1]) == pytest.approx(errors[1], rel=0.02)


def test_masked_zeros_stay_and_channels_that_are_always_zero_are_left_alone():
    model, x, _ = normed()
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight *= torch.randn(8).exp()[:, None]
        model[0].bias[3] = -1e3  # behind the ReLU nothing is left of it
    keep = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) > 0.4
    masked = apply(model, Plan("mask", (Mask(TensorPlace("2", "weight"), keep),)))
    result = ScaleByActivations(Int(2)).run(masked, task_of(masked, x))
    assert [place for place, _ in result.plans[0].lines] == ["0:linear[0]"]
    new = result.model
    assert (new[2].weight[~keep] == 0).all() and torch.equal(new[0].weight[3], model[0].weight[3])
    assert error(new, masked, x) < 1e-9


class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x):
        return F.linear(F.relu(self.first(x)), self.second.weight, self.second.bias)


def test_what_is_passed_over_is_named():
    model, x, task = normed()
    plan = ScaleByActivations(Int(3), where=~ByName("right")).plan(model, task)
    assert not plan.edits and ("norm:layer_norm[0]", "where leaves out right") in {
        (skip.place, skip.reason) for skip in plan.skips
    }
    plan = ScaleByActivations(Int(3, group_size=5)).plan(model, task)
    assert "left.weight: group_size 5 does not divide its 12 weights" in plan.skips[-1].reason
    inside = Inside()
    plan = ScaleByActivations(Int(3)).plan(inside, task_of(inside, x))
    assert "the forward does not call second as a module" in {skip.reason for skip in plan.skips}
    same = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        same[2].weight.copy_(torch.randint(-7, 8, (4, 8)) / 7.0)
        same[2].weight[:, 0] = 1.0  # on its grid already
    plan = ScaleByActivations(Int(4)).plan(same, task_of(same, x))
    assert not plan.edits and plan.skips[-1].reason.startswith("no power of its activations lessens the error")


def test_bad_settings_and_models_are_named():
    model, x, task = normed()
    for settings, said in (
        ({"steps": 0}, "ScaleByActivations.steps: too few"), ({"rows": 0}, "ScaleByActivations.rows: too few"),
        ({"batches": 0}, "ScaleByActivations.batches: too few"), ({"scheme": Int(16)}, "too wide for weights"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            ScaleByActivations(**settings)
    quantised = QuantizeWeights(where=ByName("out")).run(model, task).model
    with pytest.raises(InputError, match=r"quantised already.*Put ScaleByActivations\(\) before"):
        ScaleByActivations().plan(quantised, task)
    broken = x.clone()
    broken[150, 2] = float("inf")
    with pytest.raises(InputError, match="left: a calibration batch makes a value that is not finite"):
        ScaleByActivations().plan(model, task_of(model, broken))


def test_a_llama_with_uneven_channels_loses_less_at_four_bits(package):
    transformers = package("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.mul_(torch.randn(parameter.shape).exp())
    tokens = torch.randint(50, (24, 16))
    task, scheme = task_of(model, tokens[:16]), Int(4, group_size=16)
    result = ScaleByActivations(scheme).run(model, task)
    readers = [line.split(" for ")[1].split(":")[0] for _, line in result.plans[0].lines]
    assert len(readers) == 4 * 2 + 1 and "lm_head" in readers
    assert (
        "model.layers.1.self_attn.q_proj, model.layers.1.self_attn.k_proj, model.layers.1.self_attn.v_proj" in readers
    )
    assert all(isinstance(edit, Write) for edit in result.plans[0].edits) and result.facts["verified"] < 1e-5
    layers = QuantizeWeights(scheme, where=~ByName("*embed*"))
    ours, plain = (layers.run(net, task).model for net in (result.model, model))
    with torch.no_grad():
        expected, ours, plain = (task.outputs(m, (tokens[16:], None)) for m in (model, ours, plain))
    assert (ours - expected).square().sum() < 0.8 * (plain - expected).square().sum()
