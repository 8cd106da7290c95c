"""Artifacts: what comes back is what was saved, and what is damaged is refused in one sentence."""

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from tersor.core.apply import apply
from tersor.core.edit import Attribute, Cut, Mask, Quantizer, Slice, Swap, Write
from tersor.core.errors import ArtifactError, InputError
from tersor.core.place import ActivationPlace, TensorPlace
from tersor.core.plan import Plan
from tersor.export.artifact import VERSIONS, _checksum, load_artifact, read_architecture, read_edits, save_artifact
from tersor.export.base import Base


class Net(nn.Module):
    """Two convolutions, the first without bias and with a norm; tied matrices; state of every kind."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3)
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight
        self.register_buffer("offset", torch.randn(4), persistent=False)
        self.register_buffer("seen", torch.tensor([True, False, True]))
        self.norm = nn.LayerNorm((4,))

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.conv2(x)).mean((2, 3)) + self.offset
        return self.norm(self.decode(torch.relu(self.encode(x))))


def kept(*indices):
    return torch.tensor(indices)


def every_kind_of_edit():
    """Cut conv1 to three channels, fold its norm into a bias, mask, quantise a weight and activations."""
    keep = kept(0, 2, 5)
    cuts = [Cut(TensorPlace("conv1", "weight"), 0, keep, "producer")]
    cuts += [
        Cut(TensorPlace("bn1", n), 0, keep, "bystander") for n in ("weight", "bias", "running_mean", "running_var")
    ]
    cuts += [Cut(TensorPlace("conv2", "weight"), 1, keep, "consumer")]
    prune = Plan(
        "prune", (Slice(tuple(cuts)), Attribute("conv1", "out_channels", 3), Attribute("conv2", "in_channels", 3))
    )
    fold = Plan(
        "fold",
        (
            Write(TensorPlace("conv1", "weight"), torch.randn(3, 1, 3, 3)),
            Write(TensorPlace("conv1", "bias"), torch.randn(3)),
            Swap("bn1", "Identity"),
            Attribute("norm", "normalized_shape", (4,)),
        ),
    )
    scale, zeros = torch.rand(4) / 50 + 0.01, torch.zeros(4, dtype=torch.int32)
    both = (TensorPlace("conv2", "weight"),)
    shared = (ActivationPlace("", "relu", 0), ActivationPlace("", "relu", 1))
    quantise = Plan(
        "quantise",
        (
            Mask(TensorPlace("encode", "weight"), torch.rand(4, 4) > 0.3),
            Mask(TensorPlace("encode", "weight"), torch.rand(4, 4) > 0.3),
            Quantizer(both, scale, zeros, -128, 127, axis=0),
            Quantizer(shared, torch.tensor(0.03), torch.tensor(3, dtype=torch.int32), 0, 255, learn=False),
            Quantizer(
                (TensorPlace("encode", "weight"),),
                scale[:, None] * torch.ones(2),
                zeros[:, None] * torch.ones(2),
                -8,
                7,
                axis=0,
                group_size=2,
            ),
        ),
    )
    return prune, fold, quantise


@pytest.fixture
def compressed():
    torch.manual_seed(0)
    original = Net().eval()
    plans = every_kind_of_edit()
    model = original
    for plan in plans:
        model = apply(model, plan)
    with torch.no_grad():
        for parameter in model.parameters():  # training went on after the edits
            parameter.add_(0.001)
    return original, model.eval(), plans


@pytest.fixture
def saved(compressed, tmp_path):
    original, model, plans = compressed
    return save_artifact(tmp_path / "model", model, original=original, plans=plans, extra={"note": [1, None]})


INPUTS = torch.randn(5, 1, 9, 9, generator=torch.Generator().manual_seed(1))


def test_a_model_after_every_kind_of_edit_comes_back_bit_for_bit(compressed, saved):
    _, model, _ = compressed
    fresh = Net()
    loaded = load_artifact(saved, fresh)
    assert torch.equal(loaded(INPUTS), model(INPUTS))
    assert {k: (v.dtype, v.shape) for k, v in loaded.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in model.state_dict().items()
    }
    assert fresh.conv1.out_channels == 6 and fresh.training, "the model given is untouched"
    assert not loaded.training and loaded.conv1.out_channels == 3 and loaded.norm.normalized_shape == (4,)
    assert loaded.decode.parametrizations.weight.original is loaded.encode.parametrizations.weight.original
    assert torch.equal(loaded.offset, model.offset) and torch.equal(loaded.seen, model.seen)


def test_loading_in_place_fills_the_model_given(compressed, saved):
    fresh = Net()
    assert load_artifact(saved, fresh, in_place=True) is fresh
    assert torch.equal(fresh(INPUTS), compressed[1](INPUTS))


def test_edits_read_back_can_be_saved_again(compressed, saved, tmp_path):
    original, model, plans = compressed
    edits = read_edits(saved)
    assert [type(edit) for edit in edits] == [type(edit) for plan in plans for edit in plan.edits]
    again = save_artifact(tmp_path / "again", model, original=original, plans=(Plan("earlier", edits),))
    assert torch.equal(load_artifact(again, Net())(INPUTS), model(INPUTS))


def test_tensors_are_stored_once_and_bits_as_bits(saved):
    stored = load_file(saved / "model.safetensors")
    architecture = read_architecture(saved)
    assert len([name for name in stored if name.endswith("code.parametrizations.weight.original")]) == 1
    mask = stored["encode.parametrizations.weight.0.keep"]
    assert mask.dtype == torch.uint8 and len(mask) == 2
    assert architecture["packed"]["encode.parametrizations.weight.0.keep"] == [4, 4]
    assert [name for name in stored if name.startswith("tersor.edits.")] == ["tersor.edits.0.0.0"]
    assert architecture["extra"] == {"note": [1, None]} and (saved / "card.md").read_text().startswith("# ")
    assert sorted(path.name for path in saved.iterdir()) == ["architecture.json", "card.md", "model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_kept(dtype, tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(dtype).eval()
    save_artifact(tmp_path, model, original=model, plans=())
    loaded = load_artifact(tmp_path, nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(dtype))
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(model.parameters(), loaded.parameters(), strict=True)
    )
    with pytest.raises(ArtifactError, match="is float32"):
        load_artifact(tmp_path, nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


def test_plain_extra_state_comes_back_and_other_is_refused(tmp_path):
    class Counting(nn.Linear):
        state = {"steps": 3}

        def get_extra_state(self):
            return self.state

        def set_extra_state(self, state):
            self.state = state

    model = Counting(2, 2)
    model.state = {"steps": 7}
    save_artifact(tmp_path, model, original=model, plans=())
    assert load_artifact(tmp_path, Counting(2, 2)).state == {"steps": 7}
    model.state = {"steps": {1, 2}}
    with pytest.raises(ArtifactError, match="_extra_state: .*without pickle"):
        save_artifact(tmp_path, model, original=model, plans=())


def test_buffers_made_late_come_back(tmp_path):
    class Caching(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("cache", None, persistent=False)

    model = Caching()
    model.cache = torch.arange(3)
    save_artifact(tmp_path, model, original=model, plans=())
    assert load_artifact(tmp_path, Caching()).cache.tolist() == [0, 1, 2]


def test_a_model_that_the_plans_do_not_lead_to_is_not_saved(compressed, tmp_path):
    original, model, plans = compressed
    for wrong, given_plans in [(model, plans[:2]), (copy.deepcopy(model).half(), plans)]:
        with pytest.raises(ArtifactError, match="nothing was saved"):
            save_artifact(tmp_path / "model", wrong, original=original, plans=given_plans)
    assert not (tmp_path / "model").exists()


def test_the_order_of_torch_save_is_refused_with_the_right_one(compressed, tmp_path):
    original, model, plans = compressed
    with pytest.raises(InputError, match="the folder comes first, then the model"):
        save_artifact(model, tmp_path, original=original, plans=plans)


def test_a_base_stands_in_for_the_original(compressed, tmp_path):
    original, model, plans = compressed
    save_artifact(tmp_path, model, original=Base.of(original, source="task.py"), plans=plans)
    assert torch.equal(load_artifact(tmp_path, Net())(INPUTS), model(INPUTS))
    assert read_architecture(tmp_path)["base"]["source"] == "task.py"


def test_another_model_is_refused_with_the_first_differences(saved):
    other = Net()
    other.conv2 = nn.Conv2d(6, 5, 3)
    other.more = nn.Linear(2, 2)
    with pytest.raises(ArtifactError) as caught:
        load_artifact(saved, other)
    message = str(caught.value)
    assert "more.weight is not in the original" in message and "and 1 more" in message
    assert caught.value.exit_code == 2


def test_the_compressed_model_is_no_original(compressed, saved):
    with pytest.raises(ArtifactError, match="not the artifact's original"):
        load_artifact(saved, compressed[1])


@pytest.mark.parametrize("name", ["architecture.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "one byte", "more"])
def test_a_damaged_file_is_refused(name, damage, saved):
    path = saved / name
    data = path.read_bytes()
    middle = len(data) // 2
    if damage == "missing":
        path.unlink()
    else:
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"empty": b"", "half": data[:middle], "one byte": flipped, "more": data + b" x"}[damage])
    with pytest.raises(ArtifactError, match=name if damage != "missing" else "no saved model|not there"):
        load_artifact(saved, Net())


def reseal(folder, architecture):
    """Write a changed architecture.json as an attacker would, its checksum right."""
    architecture = {key: value for key, value in architecture.items() if key != "checksum"}
    text = json.dumps(architecture | {"checksum": _checksum(architecture)})
    (folder / "architecture.json").write_text(text)


def test_another_version_and_foreign_json_are_refused(saved):
    architecture = read_architecture(saved)
    for change, match in [
        ({"version": max(VERSIONS) + 1}, "another version"),
        ({"format": "other"}, "no Tersor artifact"),
    ]:
        reseal(saved, architecture | change)
        with pytest.raises(ArtifactError, match=match):
            load_artifact(saved, Net())
    (saved / "architecture.json").write_text("[1, 2]")
    with pytest.raises(ArtifactError, match="no Tersor artifact"):
        load_artifact(saved, Net())
    (saved / "architecture.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="damaged"):
        load_artifact(saved, Net())


def rewrite_weights(folder, change):
    """Change the tensors as an attacker would, their hash right."""
    import hashlib

    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file(tensors, path)
    architecture = read_architecture(folder)
    architecture["weights"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    reseal(folder, architecture)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "norm.bias"}, "norm.bias is missing"),
        (lambda t: t | {"surplus": torch.zeros(1)}, "surplus has no place"),
        (lambda t: t | {"norm.bias": t["norm.bias"].double()}, "norm.bias is torch.float64"),
        (lambda t: t | {"norm.bias": torch.zeros(5)}, r"norm.bias is torch.float32 \[5\]"),
        (lambda t: t | {"seen": torch.zeros(9, dtype=torch.uint8)}, "do not fit its shape"),
        (lambda t: t | {"tersor.buffers.elsewhere.x": torch.zeros(1)}, "no such buffer"),
        (lambda t: t | {"tersor.buffers.offset": torch.zeros(4, dtype=torch.int64)}, "another type"),
        (lambda t: t | {"tersor.edits.0.0.0": torch.tensor([0, 2, -1], dtype=torch.int32)}, "not a list of indices"),
        (lambda t: t | {"tersor.edits.0.0.0": torch.tensor([0, 2, 99], dtype=torch.int32)}, "cannot keep"),
        (lambda t: t | {"tersor.edits.0.0.0": torch.tensor([[0.5]])}, "not a list of indices"),
        (lambda t: {k: v for k, v in t.items() if k != "tersor.edits.0.0.0"}, "cannot be"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, match, saved):
    rewrite_weights(saved, change)
    with pytest.raises(ArtifactError, match=match):
        load_artifact(saved, Net())


@pytest.mark.parametrize(
    "edit",
    [
        {"kind": "Execute", "code": "1"},
        {"kind": "Swap", "module": "conv1", "constructor": "os.system", "arguments": {"command": "true"}},
        {"kind": "Swap", "module": "../conv1", "constructor": "Identity", "arguments": {}},
        {"kind": "Attribute", "module": "", "name": "forward", "value": 1},
        {"kind": "Attribute", "module": "", "name": "__class__", "value": 1},
        {"kind": "Attribute", "module": "", "name": "brand_new", "value": 1},
        {"kind": "Write", "place": ["conv1", "weight"], "shape": [10**15], "dtype": "float32"},
        {"kind": "Write", "place": ["conv1", "weight"], "shape": [10**15, 0], "dtype": "float32"},
        {"kind": "Write", "place": ["conv1", "weight"], "shape": [6, 1, 3, 3], "dtype": "load"},
        {"kind": "Mask", "place": ["conv1", "weight"], "shape": [-1], "merge": True},
        {"kind": "Mask", "place": ["conv1"], "shape": [6], "merge": True},
        {"kind": "Quantizer", "places": [["", "relu", 0]], "shape": [], "quant_min": 9, "quant_max": 1, "axis": None,
         "learn": True},
        {"kind": "Quantizer", "places": [["conv1", "weight"]], "shape": [6], "quant_min": 0, "quant_max": 1,
         "axis": "0", "learn": True},
        {"kind": "Quantizer", "places": [["conv1", "weight"]], "shape": [6, 3], "quant_min": -8, "quant_max": 7,
         "axis": 0, "learn": True, "group_size": 0},
        "not an edit",
        None,
    ],
)  # fmt: skip
def test_hostile_edits_are_refused(edit, saved):
    architecture = read_architecture(saved)
    architecture["plans"].insert(0, {"method": "hostile", "edits": [edit]})
    reseal(saved, architecture)
    with pytest.raises(ArtifactError):
        load_artifact(saved, Net())


def places_in(value, path=()):
    """The path of every value inside nested JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places_in(item, (*path, key))


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.just(10**30), st.floats(), st.text(max_size=5), st.just([]),
    st.just({}), st.lists(st.integers(-2, 9), max_size=3), st.just({"__tuple__": 3}), st.just("../../etc/passwd"),
)  # fmt: skip


@settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_whatever_stands_in_architecture_json_loads_or_is_refused(data, compressed, saved):
    folder = saved
    if not (folder / "pristine.json").exists():
        (folder / "pristine.json").write_bytes((folder / "architecture.json").read_bytes())
    architecture = json.loads((folder / "pristine.json").read_text())
    path = data.draw(st.sampled_from([p for p in places_in(architecture) if p and p[0] != "checksum"]))
    holder = architecture
    for key in path[:-1]:
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[path[-1]] = data.draw(JUNK)
    else:
        del holder[path[-1]]
    reseal(folder, architecture)
    for read in (lambda: load_artifact(folder, Net()), lambda: read_edits(folder)):
        try:
            read()
        except ArtifactError as error:
            assert str(error) and len(str(error)) < 2000


def test_an_empty_bool_buffer_comes_back_and_a_hostile_shape_of_one_is_refused(tmp_path):
    model = nn.Linear(3, 3)
    model.register_buffer("pairs", torch.zeros(0, 5, dtype=torch.bool))
    save_artifact(tmp_path, model, original=model, plans=())
    assert load_artifact(tmp_path, model).pairs.shape == (0, 5)
    reseal(tmp_path, read_architecture(tmp_path) | {"packed": {"pairs": [0, 2**63]}})
    with pytest.raises(ArtifactError, match="bits do not fit"):
        load_artifact(tmp_path, model)
