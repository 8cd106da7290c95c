"""Artifacts without their zeros: bit for bit what was saved, smaller by what the encodings say, damage refused."""

import copy
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tersor.core.apply import apply
from tersor.core.edit import Mask, Quantizer
from tersor.core.errors import ArtifactError, InputError
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan
from tersor.export import sparse_tensors
from tersor.export.artifact import _checksum, load_artifact, read_architecture, read_edits, save_artifact
from tersor.tensor.masks import keep_largest, n_of_m


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.dense = nn.Conv2d(3, 32, 3), nn.Linear(32, 64), nn.Linear(64, 5)

    def forward(self, x):
        return self.dense(torch.relu(self.fc(torch.relu(self.conv(x)).mean((2, 3)))))


INPUTS = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
SAVED = "tersor.bits."


def masked(model, sparsity=0.9):
    weights = {path: model.get_submodule(path).weight.detach().abs() for path in ("conv", "fc")}
    plan = Plan(
        "mask",
        tuple(
            Mask(TensorPlace(path, "weight"), keep_largest(weight, int(sparsity * weight.numel())))
            for path, weight in weights.items()
        ),
    )
    return apply(model, plan).eval(), (plan,)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_masked_weights_are_stored_under_their_mask_and_come_back_bit_for_bit(dtype, tmp_path):
    original = net(dtype)
    model, plans = masked(original)
    with torch.no_grad():
        model.fc.parametrizations.weight.original[:, 0] = -0.0
    plain = save_artifact(tmp_path / "plain", model, original=original, plans=plans)
    small = save_artifact(tmp_path / "small", model, original=original, plans=plans, encode="smallest")
    loaded = load_artifact(small, net(dtype))
    assert torch.equal(loaded(INPUTS.to(dtype)), model(INPUTS.to(dtype)))
    for path in ("conv", "fc", "dense"):
        ours, theirs = (m.get_submodule(path).weight.detach().flatten() for m in (loaded, model))
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), "the bits, signs of zero too"
    stored, itemsize = load_file(small / "model.safetensors"), torch.finfo(dtype).bits // 8
    assert stored["fc.parametrizations.weight.original"].shape == (2048 - 1843,)
    assert not any(name.startswith(SAVED) for name in stored), "the mask's own bits say where"
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (plain, small)]
    assert sizes[0] - sizes[1] == pytest.approx(itemsize * (1843 + int(0.9 * 864)), abs=100)
    assert read_architecture(plain)["version"] == 1 and read_architecture(small)["version"] == 2
    assert read_architecture(small)["encoded"]["fc.parametrizations.weight.original"]["kind"] == "masked"
    assert "encoded" not in read_architecture(plain) and len(read_edits(small)) == 2


@pytest.mark.parametrize(("kind", "keep"), [("bitmap", None), ("1:4", 1), ("2:4", 2)])
def test_zeros_without_a_mask_are_left_out_by_their_values(kind, keep, tmp_path):
    original = net()
    model = copy.deepcopy(original).eval()
    with torch.no_grad():
        weight = model.fc.weight
        stays = keep_largest(weight.abs(), 1500) if keep is None else n_of_m(weight.abs(), keep, 4)
        weight.masked_fill_(~stays, 0.0)
        if keep is None:
            weight[3] = -0.0
    small = save_artifact(tmp_path, model, original=original, plans=(), encode="smallest")
    said = read_architecture(small)["encoded"]
    assert said["fc.weight"]["kind"] in ({kind} if kind != "2:4" else {"bitmap", "2:4"}) and list(said) == ["fc.weight"]
    loaded = load_artifact(small, net())
    assert torch.equal(loaded.fc.weight.view(torch.int32), model.fc.weight.view(torch.int32))
    assert torch.equal(loaded(INPUTS), model(INPUTS))


@pytest.mark.parametrize("sparsity", [0.97, 0.9995])
def test_few_values_are_stored_with_the_gaps_between_them_and_their_mask_too(sparsity, tmp_path):
    original = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 200)).eval()
    count = int(sparsity * 40_000)
    keep = keep_largest(original[0].weight.detach().abs(), count)
    plan = Plan("mask", (Mask(TensorPlace("0", "weight"), keep),))
    model = apply(original, plan).eval()
    with torch.no_grad():
        for net_ in (original, model):
            net_[1].weight.masked_fill_(~keep_largest(net_[1].weight.abs(), count), 0.0)
    small = save_artifact(tmp_path, model, original=original, plans=(plan,), encode="smallest")
    said, stored = read_architecture(small), load_file(small / "model.safetensors")
    assert said["version"] == 5 and "0.parametrizations.weight.0.keep" not in said["packed"]
    kinds = {name: how["kind"] for name, how in said["encoded"].items()}
    weight, mask = "0.parametrizations.weight.original", "0.parametrizations.weight.0.keep"
    assert kinds == {"1.weight": "gaps", weight: "masked", mask: "places"}
    assert max(stored[mask].nbytes, stored[SAVED + "1.weight"].nbytes) < 0.31 * 40_000 / 8
    fresh = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 200))
    loaded, x = load_artifact(small, fresh), torch.randn(2, 200)
    assert torch.equal(loaded(x), model(x)) and torch.equal(loaded[0].parametrizations.weight[0].keep, keep)
    assert torch.equal(loaded[1].weight, model[1].weight)
    for name, match in ((mask, "does not fit"), (SAVED + "1.weight", "does not fit")):
        forge(small, shorten(name, 1), nothing)
        with pytest.raises(ArtifactError, match=match):
            load_artifact(small, fresh)


def test_what_other_things_see_too_is_not_taken_for_masked(tmp_path):
    original = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    original[1].weight = original[0].weight
    place = TensorPlace("0", "weight")
    plan = Plan("mask", (Mask(place, torch.rand(40, 40) > 0.9),))
    model = apply(original, plan).eval()
    small = save_artifact(tmp_path / "tied", model, original=original, plans=(plan,), encode="smallest")
    assert "encoded" not in read_architecture(small)
    fresh = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    fresh[1].weight = fresh[0].weight
    loaded, x = load_artifact(small, fresh), torch.randn(2, 40)
    assert torch.equal(loaded(x), model(x))
    original = nn.Sequential(nn.Linear(40, 40))
    quantizer = Quantizer((place,), torch.tensor(0.01), torch.tensor(3, dtype=torch.int32), -128, 127)
    plan = Plan("quantise, then mask", (quantizer, Mask(place, torch.rand(40, 40) > 0.9)))
    model = apply(original, plan).eval()
    small = save_artifact(tmp_path / "quantised", model, original=original, plans=(plan,), encode="smallest")
    said = read_architecture(small)["encoded"]
    assert [how["kind"] for how in said.values()] == ["integers"], "the quantiser sees the weight before the mask does"
    loaded = load_artifact(small, nn.Sequential(nn.Linear(40, 40))).eval()
    assert torch.equal(loaded(x), model(x)) and torch.equal(loaded[0].weight == 0, model[0].weight == 0)


def test_the_gaps_of_a_mask_of_many_ones_are_not_looked_for(monkeypatch):
    def looked_for(mask):
        raise AssertionError("they take eight bytes of memory for each one, and more than a bit in the file")

    monkeypatch.setattr(sparse_tensors, "gap_bytes", looked_for)
    keep = torch.ones(100, 100, dtype=torch.bool)
    assert sparse_tensors.choose(nn.Identity(), {"keep": keep}, {}) == {}


def test_small_tensors_and_those_without_zeros_are_stored_as_they_are(tmp_path):
    original = net()
    with torch.no_grad():
        original.dense.bias.zero_()
    small = save_artifact(tmp_path, original, original=original, plans=(), encode="smallest")
    assert read_architecture(small)["version"] == 1
    with pytest.raises(InputError, match="unknown encoding"):
        save_artifact(tmp_path, original, original=original, plans=(), encode="tiny")


def forge(folder, change_tensors, change_said):
    """Change tensors and ``encoded`` as an attacker would, every hash right."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change_tensors(tensors)
    save_file(tensors, path)
    said = read_architecture(folder)
    change_said(said["encoded"])
    said["weights"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "architecture.json").write_text(json.dumps(said | {"checksum": _checksum(said)}))


def nothing(_):
    pass


def put(name, **fields):
    return lambda said: said[name].update(fields)


def shorten(name, by):
    return lambda tensors: tensors.update({name: tensors[name][:-by].clone()})


def bomb(tensors):
    """200 kB that say 6.5 billion zeros."""
    tensors.pop(SAVED + CONV)
    tensors[CONV] = torch.tensor([65535] * 10**5 + [0], dtype=torch.uint16)


FC, KEEP = "fc.parametrizations.weight.original", "fc.parametrizations.weight.0.keep"
CONV = "conv.weight"


@pytest.mark.parametrize(
    ("tensors", "said", "match"),
    [
        (shorten(FC, 1), nothing, "204 values for a mask"), (nothing, put(FC, mask="conv.bias"), "does not fit"),
        (nothing, put(FC, mask="nowhere"), "does not fit"), (nothing, put(FC, shape=[32, 64]), "does not fit"),
        (nothing, put(FC, kind="zip"), "layout cannot"), (nothing, put(FC, shape=[-1]), "layout cannot be read"),
        (nothing, put(CONV, shape=[2**62, 2**62]), "does not fit"), (nothing, put(CONV, shape=[2**40]), "does not fit"),
        (nothing, put(CONV, kind="2:4"), "does not fit"), (shorten(SAVED + CONV, 1), nothing, "does not fit"),
        (shorten(CONV, 1), nothing, "does not fit"), (lambda t: t.pop(SAVED + CONV), nothing, "does not fit"),
        (lambda t: t.pop(CONV), nothing, "values are not there"),
        (lambda t: t[SAVED + CONV].zero_(), nothing, "does not fit"), (nothing, lambda said: said.pop(CONV), "fit"),
        (nothing, lambda said: said.update({"fc.bias": {"kind": "bitmap", "shape": [64]}}), "does not fit"),
        (nothing, put(CONV, kind="1:4", shape=[96, 9]), "does not fit"),
        (nothing, put(CONV, shape=[0, 2**63]), "does not fit"),
        (nothing, put(CONV, kind="1:4", shape=[]), "does not fit"),
        (bomb, put(CONV, kind="places", shape=[65535 * 10**5]), "at most 268,"),
    ],
)  # fmt: skip
def test_damaged_and_hostile_encodings_are_refused(tensors, said, match, tmp_path):
    original = net()
    with torch.no_grad():
        weight = original.conv.weight
        weight.masked_fill_(~keep_largest(weight.abs(), 700), 0.0)
    keep = keep_largest(original.fc.weight.detach().abs(), 1843)
    plan = Plan("mask", (Mask(TensorPlace("fc", "weight"), keep),))
    small = save_artifact(tmp_path, apply(original, plan), original=original, plans=(plan,), encode="smallest")
    load_artifact(small, net())
    forge(small, tensors, said)
    with pytest.raises(ArtifactError, match=match):
        load_artifact(small, net())
