"""Artifacts with rounded weights as integers: equal when they compute, as small as the integers, damage refused."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tersor
from tersor.core.apply import apply
from tersor.core.edit import Mask, Quantizer, Write
from tersor.core.errors import ArtifactError
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan
from tersor.export.artifact import _checksum, load_artifact, read_architecture, save_artifact
from tersor.export.base import Base
from tersor.quantize.schemes import Int
from tersor.tensor.affine import choose_parameters, fake_quantize, split_groups
from tersor.tensor.masks import keep_largest
from tersor.zoo.batches import TensorBatches
from tersor.zoo.residual import ResidualNet


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 32, 3), nn.ConvTranspose2d(32, 16, 3)
        self.fc, self.dense = nn.Linear(16, 96), nn.Linear(96, 5)

    def forward(self, x):
        return self.dense(torch.relu(self.fc(torch.relu(self.up(torch.relu(self.conv(x)))).mean((2, 3)))))


INPUTS = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
FC = "fc.parametrizations.weight"


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def quantizer(model, path, bits=4, axis=0, group_size=None, symmetric=True, learn=False):
    """The edit, its range from the smallest to the largest weight."""
    weight = model.get_submodule(path).weight.detach().float()
    row = weight.numel() // (1 if axis is None else weight.shape[axis])
    runs = weight.reshape(1, -1) if axis is None else split_groups(weight, group_size or row, axis).flatten(0, 1)
    scheme = Int(bits, symmetric=symmetric)
    low, high = runs.aminmax(dim=1)
    ends = {"quant_min": scheme.quant_min, "quant_max": scheme.quant_max}
    scale, zero_point = choose_parameters(low, high, symmetric=symmetric, **ends)
    shape = () if axis is None else (-1,) if group_size is None else (weight.shape[axis], -1)
    return Quantizer(
        (TensorPlace(path, "weight"),), scale.reshape(shape), zero_point.reshape(shape), scheme.quant_min,
        scheme.quant_max, axis=axis, group_size=group_size, learn=learn,
    )  # fmt: skip


def saved(folder, model, plan):
    edited = apply(model, plan).eval()
    save_artifact(folder, edited, original=model, plans=(plan,), encode="smallest")
    return edited, load_artifact(folder, net(next(model.parameters()).dtype))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
@pytest.mark.parametrize(
    ("path", "axis", "group_size"),
    [("conv", 0, None), ("conv", 0, 9), ("conv", None, None), ("up", 1, None), ("up", 1, 36), ("fc", 0, 8),
     ("fc", 1, 32)],
)  # fmt: skip
def test_the_model_computes_with_the_same_numbers_and_the_file_holds_packed_integers(
    tmp_path, path, axis, group_size, bits, symmetric
):
    model = net()
    edit = quantizer(model, path, bits, axis, group_size, symmetric)
    edited, loaded = saved(tmp_path, model, Plan("quantise", (edit,)))
    place = edited.get_submodule(path)
    assert torch.equal(loaded.get_submodule(path).weight, place.weight) and torch.equal(loaded(INPUTS), edited(INPUTS))
    name = f"{path}.parametrizations.weight.original"
    stored = load_file(tmp_path / "model.safetensors")[name]
    assert stored.dtype == torch.uint8 and stored.shape == (-(-place.weight.numel() * bits // 8),)
    assert read_architecture(tmp_path)["version"] == 3
    again, plan = load_artifact(tmp_path, net()), Plan("quantise", (edit,))
    save_artifact(tmp_path / "again", again, original=net(), plans=(plan,), encode="smallest")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_values_on_the_grid_come_back_bit_for_bit(tmp_path):
    """As methods that choose integers write them: no −0.0, which integers do not have."""
    model = net()
    edit = quantizer(model, "fc", 4, 0, 8)
    weight = split_groups(model.fc.weight.detach(), 8)
    value = fake_quantize(weight, edit.scale[..., None], edit.zero_point[..., None], quant_min=-8, quant_max=7)
    value = value.reshape(model.fc.weight.shape) + 0.0
    plan = Plan("write", (Write(TensorPlace("fc", "weight"), value), edit))
    edited, loaded = saved(tmp_path, model, plan)
    for ours, theirs in ((loaded.fc.weight, edited.fc.weight), (loaded.fc.parametrizations.weight.original, value)):
        assert torch.equal(ours.detach().view(torch.int32), theirs.detach().view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_integers_too(tmp_path, dtype):
    model = net(dtype)
    with torch.no_grad():
        model.conv.weight.abs_()  # integers from 0 to 255, the largest of which are no bfloat16
    for bits, path in ((4, "fc"), (8, "conv")):
        plan = Plan("quantise", (quantizer(model, path, bits, symmetric=False),))
        edited, loaded = saved(tmp_path / str(bits), model, plan)
        assert torch.equal(loaded.get_submodule(path).weight, edited.get_submodule(path).weight)
        kinds = [how["kind"] for how in read_architecture(tmp_path / str(bits)).get("encoded", {}).values()]
        assert "integers" in kinds


def test_under_a_mask_only_what_it_lets_through_is_stored(tmp_path):
    model = net()
    mask = Mask(TensorPlace("fc", "weight"), keep_largest(model.fc.weight.detach().abs(), 1200))
    for symmetric in (True, False):
        plan = Plan("sparse, then quantised", (mask, quantizer(model, "fc", 4, 0, 8, symmetric)))
        edited, loaded = saved(tmp_path / str(symmetric), model, plan)
        stored = load_file(tmp_path / str(symmetric) / "model.safetensors")[f"{FC}.original"]
        assert stored.shape == ((1536 - 1200) // 2,) and stored.dtype == torch.uint8
        assert torch.equal(loaded.fc.weight, edited.fc.weight) and torch.equal(loaded(INPUTS), edited(INPUTS))
        assert not loaded.fc.weight[~mask.keep].any() and loaded.fc.weight.count_nonzero() > 200
    plan = Plan("quantised, then sparse", (quantizer(model, "fc"), mask))
    edited, loaded = saved(tmp_path / "other", model, plan)
    assert torch.equal(loaded.fc.weight, edited.fc.weight)
    assert load_file(tmp_path / "other" / "model.safetensors")[f"{FC}.original"].shape == (768,)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head, self.other = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False), nn.Linear(32, 40)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x)) + self.other(self.embed(x))


def test_tied_weights_are_stored_once_where_the_quantiser_stands_on_all_of_them(tmp_path):
    model, x = Tied(), torch.arange(40)
    edit = quantizer(model, "embed", 8)
    plan = Plan("quantise", (edit,))
    edited = apply(model, plan).eval()
    save_artifact(tmp_path / "all", edited, original=model, plans=(plan,), encode="smallest")
    assert [how["kind"] for how in read_architecture(tmp_path / "all")["encoded"].values()] == ["integers"]
    loaded = load_artifact(tmp_path / "all", Tied())
    assert torch.equal(loaded(x), edited(x)) and loaded.embed.parametrizations.weight.original is not None
    model.other.weight = model.embed.weight
    fresh = Tied()
    fresh.other.weight = fresh.embed.weight
    edited = apply(model, plan).eval()
    lists = edited.other.parametrizations.weight
    lists.append(nn.Identity())
    del lists[0]  # what sees the weight here is no quantiser
    save_artifact(tmp_path / "some", edited, original=Base.of(model), plans=(plan,), encode="smallest")
    assert "encoded" not in read_architecture(tmp_path / "some")


@pytest.mark.parametrize("group_size", [None, 8])
def test_integers_in_learnt_steps_come_back_in_the_steps_that_training_left(tmp_path, group_size):
    model = net()
    plan = Plan("quantise", (quantizer(model, "fc", 4, 0, group_size, learn=True),))
    edited = apply(model, plan).eval()
    with torch.no_grad():
        growth = edited.fc.parametrizations.weight[0].log_growth
        growth += 0.3 * torch.randn(growth.shape, generator=torch.manual_seed(0))
    save_artifact(tmp_path, edited, original=model, plans=(plan,), encode="smallest")
    loaded = load_artifact(tmp_path, net())
    assert read_architecture(tmp_path)["version"] == 4, "who does not know of learnt steps would take the wrong ones"
    assert torch.equal(loaded.fc.weight, edited.fc.weight) and torch.equal(loaded(INPUTS), edited(INPUTS))
    assert torch.equal(loaded.fc.parametrizations.weight[0].log_growth, growth)
    assert load_file(tmp_path / "model.safetensors")[f"{FC}.original"].shape == (96 * 16 // 2,)
    loaded.fc.weight.sum().backward()
    assert loaded.fc.parametrizations.weight[0].log_growth.grad is not None
    name = f"{FC}.0.log_growth"
    for tensors, said in (
        (lambda t: t.pop(name), nothing), (lambda t: t.update({name: torch.zeros(3)}), nothing),
        (nothing, put(growth="nowhere")), (nothing, put(growth="conv.bias")), (nothing, put(growth=3)),
    ):  # fmt: skip
        save_artifact(tmp_path, edited, original=model, plans=(plan,), encode="smallest")
        forge(tmp_path, tensors, said)
        with pytest.raises(ArtifactError, match="does not fit"):
            load_artifact(tmp_path, net())


def test_a_network_after_quantisation_aware_training_takes_a_quarter_of_the_bytes(tmp_path):
    torch.manual_seed(0)
    model = ResidualNet((16, 32, 64), 2, 1, 10).eval()
    batches = TensorBatches(torch.rand(32, 1, 8, 8), torch.arange(32) % 10, 16)
    task = tersor.Task(model, batches, batches, batches).complete()
    companion = tersor.FreezeScales(start=0.5)
    steps = (tersor.FoldBatchNorm(), tersor.Quantize(), tersor.Finetune(epochs=2, companion=companion))
    result = tersor.Pipeline(steps).run(model, task)
    growths = [value for name, value in result.model.named_parameters() if name.endswith("log_growth")]
    assert any(value.any() for value in growths)
    tersor.save(tmp_path / "fp32", model, original=model, plans=())
    tersor.save(tmp_path / "int8", result.model, original=model, plans=result.plans, encode="smallest")
    loaded = tersor.load(tmp_path / "int8", model=model)
    with torch.no_grad():
        assert torch.equal(loaded(batches.images), result.model(batches.images))
    fp32, int8 = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("fp32", "int8"))
    assert fp32 > 3.5 * int8


def test_what_is_not_finite_or_too_wide_or_saves_too_little_stays_as_it_is(tmp_path):
    model = net()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = torch.inf
    few = quantizer(model, "dense", 4, None)
    broken = Quantizer((TensorPlace("conv", "weight"),), torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), -8, 7,
                       learn=False)  # fmt: skip
    wide = Quantizer((TensorPlace("up", "weight"),), torch.tensor(1e-5), torch.tensor(0, dtype=torch.int32), -(2**15),
                     2**15 - 1, learn=False)  # fmt: skip
    plan = Plan("quantise", (broken, wide, few))
    edited, loaded = saved(tmp_path, model, plan)
    assert list(read_architecture(tmp_path)["encoded"]) == ["dense.parametrizations.weight.original"]
    assert torch.equal(
        loaded(INPUTS),
        edited(INPUTS),
    ) or bool(edited(INPUTS).isnan().any())


def test_methods_that_quantise_weights_alone_give_small_artifacts(tmp_path):
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    x = torch.randn(8, 64, generator=torch.manual_seed(0))
    task = tersor.Task(model=model, example_inputs=(x,))
    plan = tersor.QuantizeWeights(Int(4, group_size=32)).plan(model, task)
    edited = apply(model, plan).eval()
    tersor.save(tmp_path / "small", edited, original=model, plans=(plan,), encode="smallest")
    tersor.save(tmp_path / "dense", edited, original=model, plans=(plan,))
    assert torch.equal(tersor.load(tmp_path / "small", model=model)(x), edited(x))
    small, dense = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "dense"))
    assert dense - small >= 2 * 64 * 128 * 7 // 2, "of 8 half-bytes 7, and zero points without their zeros"


def forge(folder, change_tensors, change_said):
    """Change tensors and what is said of the weight as an attacker would, every hash right."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change_tensors(tensors)
    save_file(tensors, path)
    said = read_architecture(folder)
    change_said(said["encoded"][f"{FC}.original"])
    said["weights"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "architecture.json").write_text(json.dumps(said | {"checksum": _checksum(said)}))


def nothing(_):
    pass


def put(**fields):
    return lambda said: said.update(fields)


@pytest.mark.parametrize(
    ("tensors", "said", "match"),
    [
        (lambda t: t.update({f"{FC}.original": t[f"{FC}.original"][:-1].clone()}), nothing, "expected uint8"),
        (lambda t: t.update({f"{FC}.original": t[f"{FC}.original"].float()}), nothing, "expected uint8"),
        (lambda t: t.pop(f"{FC}.original"), nothing, "values are not there"),
        (lambda t: t.pop(f"{FC}.1.calibrated"), nothing, "does not fit"),
        (lambda t: t.update({f"{FC}.1.calibrated": torch.ones(3)}), nothing, "scales"),
        (lambda t: t.update({f"{FC}.1.zero_point": torch.ones(96, 2)}), nothing, "are not there"),
        (nothing, put(shape=[16, 96]), "does not fit"), (nothing, put(shape=[2**40, 2**40]), "does not fit"),
        (nothing, put(shape=[0, 16]), "layout cannot"), (nothing, put(shape=[-1]), "layout cannot"),
        (nothing, put(axis=2), "layout cannot"), (nothing, put(axis=-1), "layout cannot"),
        (nothing, put(axis="0"), "layout cannot"), (nothing, put(axis=True), "layout cannot"),
        (nothing, put(axis=None), "layout cannot"), (nothing, put(axis=None, group_size=None), "does not fit"),
        (nothing, put(group_size=7), "does not fit"), (nothing, put(group_size=0), "layout cannot"),
        (nothing, put(quant_min=7), "layout cannot"), (nothing, put(quant_max=2**40), "layout cannot"),
        (nothing, put(quant_min=-(2**40), quant_max=-(2**40) + 3), "layout cannot"),
        (nothing, put(quant_min=-1, quant_max=0), "expected uint8"), (nothing, put(dtype="int8"), "layout cannot"),
        (nothing, put(dtype="float16"), "do not fit the model"), (nothing, put(scale="nowhere"), "does not fit"),
        (nothing, put(scale=f"{FC}.0.keep"), "does not fit"), (nothing, put(mask="conv.weight"), "mask torch.float32"),
        (nothing, put(mask=3), "does not fit"), (nothing, lambda said: said.pop("mask"), "expected uint8"),
        (nothing, lambda said: said.pop("axis"), "layout cannot"), (nothing, put(kind="bitmap"), "does not fit"),
    ],
)  # fmt: skip
def test_damaged_and_hostile_integers_are_refused(tmp_path, tensors, said, match):
    model = net()
    mask = Mask(TensorPlace("fc", "weight"), keep_largest(model.fc.weight.detach().abs(), 500))
    saved(tmp_path, model, Plan("sparse, then quantised", (mask, quantizer(model, "fc", 4, 0, 8))))
    forge(tmp_path, tensors, said)
    with pytest.raises(ArtifactError, match=match):
        load_artifact(tmp_path, net())
