"""GPTQ against a naive second-order rounding, on its grids, under masks, and on real data against the nearest."""

import copy
import itertools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Mask, Quantizer, Write
from tersor.core.errors import InputError
from tersor.core.place import ByName, TensorPlace, module_at
from tersor.core.plan import Plan
from tersor.core.step import Pipeline
from tersor.core.task import Task
from tersor.export.artifact import load_artifact, save_artifact
from tersor.observe.hessian import inverse_factor
from tersor.quantize.gptq import GPTQ, round_columns
from tersor.quantize.ranges import MinMax
from tersor.quantize.schemes import Int
from tersor.quantize.weight_only import QuantizeWeights, rounded, spread


def correlated(rows, columns, seed=0):
    """Rows whose columns hang together: a quarter as many causes, and noise."""
    generator = torch.Generator().manual_seed(seed)
    causes = -(-columns // 4)
    mixed = torch.randn(rows, causes, generator=generator) @ torch.randn(causes, columns, generator=generator)
    return (mixed + 0.3 * torch.randn(rows, columns, generator=generator)).double()


def naive(W, H, scale, zero_point, keep, low, high):
    """Optimal brain quantisation of one weight after the other, with an inverse of its own for each column."""
    W = W.clone()
    for row, j in itertools.product(range(len(W)), range(W.shape[1])):
        s, z = float(scale[row, j]), int(zero_point[row, j])
        new = (min(max(round(float(W[row, j]) / s) + z, low), high) - z) * s if keep[row, j] else 0.0
        inverse = torch.linalg.inv(H[j:, j:])
        W[row, j:] -= (W[row, j] - new) / inverse[0, 0] * inverse[0]
        W[row, j] = new
    return W


@pytest.mark.parametrize("block", [1, 3, 16])
def test_the_integers_are_those_of_a_naive_second_order_rounding(block):
    x, W = correlated(60, 7), torch.randn(5, 7, dtype=torch.float64)
    H = x.T @ x / 60
    generator = torch.Generator().manual_seed(2)
    scale = 0.1 + torch.rand(5, 7, generator=generator).double()
    zero_point = torch.randint(0, 7, (5, 7), generator=generator, dtype=torch.int32)
    keep = torch.rand(5, 7, generator=generator) > 0.2
    U = inverse_factor(H[None], 0.0, "damping")
    q = round_columns(W[None], U, scale[None], zero_point[None], keep[None], (0, 7), block=block)[0]
    assert q.dtype == torch.int32 and int(q.min()) >= 0 and int(q.max()) <= 7
    assert torch.allclose((q - zero_point) * scale, naive(W, H, scale, zero_point, keep, 0, 7), atol=1e-9)


def task_of(model, x, count=1):
    data = [(part, torch.arange(len(part)) % 2) for part in x.chunk(count)]
    return Task(model.eval(), data, data, data, calibration=data).complete()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "scheme", [Int(3), Int(4, "per_tensor"), Int(3, symmetric=False), Int(3, group_size=4)], ids=str
)
def test_a_layer_is_rounded_in_the_order_asked_for_on_the_grid_of_its_weights(scheme, act_order):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5, bias=False))
    x = correlated(300, 8).float() * torch.linspace(0.2, 3, 8)
    plan = GPTQ(scheme, MinMax(), act_order=act_order, damping=1e-3).plan(model, task_of(model, x))
    write, grid = plan.edits
    assert isinstance(write, Write) and isinstance(grid, Quantizer) and not grid.learn
    nearest = QuantizeWeights(scheme).plan(model, task_of(model, x)).edits[0]
    assert torch.allclose(grid.scale, nearest.scale) and torch.equal(grid.zero_point, nearest.zero_point)
    H = (x.T @ x).double() / 300
    H += 1e-3 * H.diagonal().mean() * torch.eye(8)
    order = H.diagonal().argsort(descending=True) if act_order else torch.arange(8)
    scale, zero_point = (part[:, order] for part in spread(grid, (5, 8)))
    W = model[0].weight.detach().double()[:, order]
    keep = torch.ones(5, 8, dtype=torch.bool)
    expected = naive(W, H[order][:, order], scale, zero_point, keep, grid.quant_min, grid.quant_max)
    assert torch.allclose(write.value[:, order].double(), expected, atol=1e-6)


class Net(nn.Module):
    """Convolutions plain, grouped and depthwise, a layer that is called twice, two that read one tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, (3, 1), groups=2)
        self.twice = nn.Conv2d(8, 8, 1)
        self.left, self.right, self.fc = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.depthwise(F.relu(self.stem(x))))
        x = F.relu(self.grouped(x))
        x = self.twice(F.relu(self.twice(x))).mean((2, 3))
        return self.fc(F.relu(self.left(x)) * self.right(x))


LAYERS = ["stem", "depthwise", "grouped", "twice", "left", "right", "fc"]


def net():
    torch.manual_seed(0)
    model, mix = Net(), torch.randn(4, 4)
    x = torch.einsum("bc...,cd->bd...", torch.randn(96, 4, 7, 7), mix)
    return model, task_of(model, x, 3)


def output_error(model, original, x):
    with torch.no_grad():
        expected = original(x)
        return float((model(x) - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("scheme", [Int(4), Int(3, symmetric=False), Int(4, "per_tensor")], ids=str)
def test_every_layer_lies_on_its_grid_bit_for_bit_and_the_outputs_are_nearer_than_by_rounding(scheme):
    model, task = net()
    before = copy.deepcopy(model.state_dict())
    result = GPTQ(scheme).run(model, task)
    (plan,) = result.plans
    assert [path for path, _ in plan.lines] == LAYERS and not plan.skips
    for write, grid in zip(written(plan), grids(plan), strict=True):
        layer = module_at(result.model, write.place.module)
        assert torch.equal(rounded(grid, write.value), write.value) and torch.equal(layer.weight, write.value)
    x = task.test[0][0]
    nearest = QuantizeWeights(scheme).run(model, task).model
    assert output_error(result.model, model, x) < 0.5 * output_error(nearest, model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def written(plan):
    return [edit for edit in plan.edits if isinstance(edit, Write) and edit.place.tensor == "weight"]


def grids(plan):
    return [edit for edit in plan.edits if isinstance(edit, Quantizer)]


def test_a_line_says_the_error_of_the_outputs_on_the_calibration_data():
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(24, 16)), correlated(512, 24).float()
    result = GPTQ(Int(3)).run(model, task_of(model, x))
    text = result.plans[0].lines[0][1]
    assert text.startswith("int3 per channel, 16 scales, relative squared error of outputs ")
    assert float(text.split("outputs ")[1]) == pytest.approx(output_error(result.model, model, x), rel=0.01)


def test_the_second_layer_mends_the_first_layer_s_error():
    """Its inputs are the rounded first layer's, its targets the float model's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    x = correlated(400, 12).float()
    task = task_of(model, x)
    result = GPTQ(Int(3)).run(model, task).model
    by_itself = copy.deepcopy(result)
    by_itself[2] = GPTQ(Int(3), where=ByName("2")).run(model, task).model[2]
    assert output_error(result, model, x) < 0.7 * output_error(by_itself, model, x)


def test_weights_that_a_mask_holds_at_zero_stay_zero_and_the_others_take_over():
    model, task = net()
    keep = {path: torch.rand(module_at(model, path).weight.shape) > 0.5 for path in ("stem", "grouped", "fc")}
    masks = tuple(Mask(TensorPlace(path, "weight"), mask) for path, mask in keep.items())
    sparse = apply(model, Plan("half", masks))
    result = GPTQ(Int(3, symmetric=False)).run(sparse, task)
    for path, mask in keep.items():
        assert (module_at(result.model, path).weight[~mask] == 0).all(), path
    x = task.test[0][0]
    nearest = QuantizeWeights(Int(3, symmetric=False)).run(sparse, task).model
    assert output_error(result.model, sparse, x) < 0.5 * output_error(nearest, sparse, x)


def test_what_cannot_be_rounded_so_is_a_skip_and_rounding_to_nearest_takes_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 10), nn.Linear(10, 6), nn.Flatten(), nn.Linear(30, 2))
    task = task_of(model, torch.randint(9, (40, 5)))
    step = GPTQ(Int(4, group_size=5), where=~ByName("4"))
    plan = step.plan(model, task)
    assert {skip.place: skip.reason.split(":")[0].split(" (")[0] for skip in plan.skips} == {
        "0.weight": "only convolutions and linear layers are reconstructed, not Embedding",
        "1.weight": "group_size 5 does not divide its 8 weights per output channel",
    }
    assert [edit.place.module for edit in written(plan)] == ["2"]
    rest = Pipeline((step, QuantizeWeights(Int(8)))).run(model, task)
    assert [place for place, _ in rest.plans[1].lines] == ["0.weight", "1.weight", "4.weight"]
    assert [skip.reason for skip in rest.plans[1].skips] == ["quantised already"]
    with pytest.raises(InputError, match=r"quantised already. Got 4 quantised weights"):
        GPTQ().plan(rest.model, task)


def test_an_unused_layer_is_a_skip_and_inputs_that_are_always_zero_are_borne():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    model[1].spare = nn.Linear(3, 3)
    x = correlated(64, 8).float()
    x[:, 3] = 0
    plan = GPTQ(Int(4), damping=0.0).plan(model, task_of(model, x))
    assert [(skip.place, skip.reason) for skip in plan.skips] == [
        ("1.spare", "the forward does not call it as a module")
    ]
    assert all(torch.isfinite(edit.value).all() for edit in written(plan))


@pytest.mark.parametrize("spread", [0.0, 1e-8, 1e-7, 1e-6])
def test_inputs_that_hardly_vary_are_borne(spread):
    """Without its mean such an input is rounding errors: a network whose last layers see next to nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 4))
    x = torch.rand(300) + spread * torch.randn(24, 3) @ torch.randn(3, 300)
    x[:, 200:] = 0
    task = task_of(model, x)
    rounded = GPTQ(Int(8)).run(model, task).model
    with torch.no_grad():
        assert (rounded(x) - model(x)).abs().max() < 1e-4, "the bias takes up what is constant"


def test_bad_settings_and_data_are_named():
    model, task = net()
    for settings, said in (
        ({"batches": 0}, "GPTQ.batches: too few"), ({"rows": 0}, "GPTQ.rows: too few"),
        ({"damping": -1.0}, "GPTQ.damping: out of range"), ({"scheme": Int(16)}, "GPTQ.scheme: too wide"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            GPTQ(**settings)
    x = torch.ones(8, 4, 7, 7)
    x[4, 0, 0, 0] = float("nan")  # in the second batch
    with pytest.raises(InputError, match="stem: a calibration batch makes a value that is not finite"):
        GPTQ().plan(model, task_of(model, x, 2))
    twins = nn.Sequential(nn.Linear(4, 2, bias=False))
    with pytest.raises(InputError, match=r"GPTQ\.damping, at 0: .*hang together linearly"):
        GPTQ(damping=0.0).plan(twins, task_of(twins, torch.ones(50, 4)))


@pytest.fixture(scope="module")
def classifier():
    """(model, task, error): a small network trained on handwritten digits, rows of pixels as channels of sequences."""
    digits = load_digits()
    x, y = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(4):
        for part in torch.randperm(1200).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    train, test = [(x[a : a + 100], y[a : a + 100]) for a in range(0, 400, 100)], [(x[1200:], y[1200:])]
    return model.eval(), Task(model.eval(), train, test, test, calibration=train).complete(), x[1200:]


@pytest.mark.parametrize("bits", [4, 3])
def test_on_digits_the_layers_and_the_outputs_lose_less_than_by_rounding_to_nearest(classifier, bits):
    model, task, held_out = classifier
    nearest = QuantizeWeights(Int(bits)).run(model, task).model
    ours = GPTQ(Int(bits)).run(model, task).model
    assert output_error(ours, model, held_out) < 0.5 * output_error(nearest, model, held_out)
    for path in ("2", "5", "7"):  # each layer by itself, reading what the float model gives it
        alone = GPTQ(Int(bits), where=ByName(path)).run(model, task).model
        plain = QuantizeWeights(Int(bits), where=ByName(path)).run(model, task).model
        stop = int(path) + 1
        errors = [output_error(net[:stop], model[:stop], held_out) for net in (alone, plain)]
        assert errors[0] < 0.7 * errors[1], path


def language_model(name):
    import transformers

    torch.manual_seed(0)
    if name == "bert":
        config = transformers.BertConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=16, num_labels=3,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config).eval()
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    ).eval()


@pytest.mark.parametrize("name, layers", [("bert", 2 * 6 + 2), ("gpt2", 2 * 4)])
def test_transformers_are_rounded_layer_by_layer(name, layers, package):
    package("transformers")
    model = language_model(name)
    tokens = torch.randint(60, (32, 16), generator=torch.Generator().manual_seed(1))
    held_out = torch.randint(60, (8, 16), generator=torch.Generator().manual_seed(2))
    task, scheme = task_of(model, tokens, 2), Int(3, group_size=16)
    where = ~ByName("*embeddings*") & ~ByName("*.wte") & ~ByName("*.wpe") & ~ByName("lm_head")
    result = GPTQ(scheme, where=where).run(model, task)
    assert len(written(result.plans[0])) == len(grids(result.plans[0])) == layers and not result.plans[0].skips
    nearest = QuantizeWeights(scheme, where=where).run(model, task).model
    with torch.no_grad():
        expected, ours, plain = (task.outputs(m, (held_out, None)) for m in (model, result.model, nearest))
    assert (ours - expected).square().sum() < 0.8 * (plain - expected).square().sum()


@pytest.mark.parametrize("encode", ["dense", "smallest"])
def test_what_was_rounded_is_saved_and_loaded_to_the_last_bit(encode, tmp_path):
    model, task = net()
    keep = torch.rand(module_at(model, "grouped").weight.shape) > 0.5
    mask = Plan("half", (Mask(TensorPlace("grouped", "weight"), keep),))
    result = GPTQ(Int(3, group_size=3)).run(apply(model, mask), task)
    assert result.plans[0].skips and len(grids(result.plans[0])) == 4  # layers of 36, 9, 12 and 6 inputs; not of 8
    save_artifact(tmp_path / "saved", result.model, original=model, plans=(mask, *result.plans), encode=encode)
    loaded = load_artifact(tmp_path / "saved", Net())
    x = task.test[0][0]
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))
    for path in LAYERS:
        assert torch.equal(module_at(loaded, path).weight, module_at(result.model, path).weight)
