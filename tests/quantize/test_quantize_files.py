"""Files that are quantised, against a naive reference in memory; and what hostile ones say of themselves."""

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tersor
from tersor.core.errors import InputError, TersorError
from tersor.files import weights
from tersor.files.open import open_weights
from tersor.prune.files.prune import PruneFile
from tersor.quantize.files import restored, rounding
from tersor.quantize.files.quantize import QuantizeFile
from tersor.quantize.files.restored import RestoredFile
from tersor.quantize.ranges import MeanSquaredError
from tersor.quantize.schemes import Int

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def model(dtype=torch.float32):
    generator = torch.manual_seed(0)
    shapes = {"b.weight": (7, 12), "a.weight": (5, 6, 2, 2), "c.weight": (12, 24), "bias": (9,)}
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    found["c.weight"][3] = 0
    return found | {"ids": torch.arange(3)}


@pytest.fixture
def small_pieces(monkeypatch):
    """Every tensor is larger than a piece, and a piece larger than a view."""
    for module, name in ((weights, "PIECE"), (rounding, "PIECE"), (rounding, "VIEW"), (restored, "VIEW")):
        monkeypatch.setattr(module, name, 30 if name == "VIEW" else 200)


def naive(tensor, scheme):
    """Number by number, in Python: what each becomes. Float32 as the file, rounding halves to even as Python does."""
    rows = tensor.float().reshape(len(tensor), -1).tolist()
    found = []
    for row in rows:
        size = scheme.group_size or len(row)
        for start in range(0, len(row), size):
            run = row[start : start + size]
            low, high = min(*run, 0), max(*run, 0)
            if scheme.symmetric:
                scale, zero = max(-low, high) / (2 ** (scheme.bits - 1) - 1), 0
                least = -(2 ** (scheme.bits - 1))
            else:
                scale, least = (high - low) / (2**scheme.bits - 1), 0
                scale = scale or 1e-8
                zero = min(max(round(-low / scale), 0), 2**scheme.bits - 1)
            scale = max(scale, 1e-8)
            for x in run:
                q = min(max(round(x / scale) + zero, least), least + 2**scheme.bits - 1)
                found.append((q - zero) * scale)
    return torch.tensor(found, dtype=torch.float64).reshape(tensor.shape)


SCHEMES = [Int(8), Int(4, group_size=4), Int(3), Int(3, group_size=6, symmetric=False), Int(2, symmetric=False), Int(7)]


@pytest.mark.parametrize("pieces", ["large", "small"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_read_back_is_each_number_rounded(tmp_path, request, dtype, scheme, pieces):
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    tensors, source, out = model(dtype), tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, source, {"format": "pt"})
    before = source.read_bytes()
    done = QuantizeFile(scheme).run(source, out)
    found = tersor.load_weights(out)
    assert found.keys() == tensors.keys() and source.read_bytes() == before
    for row in done.tensors:
        tensor, expected = tensors[row.name], naive(tensors[row.name], scheme)
        step = expected.abs().max()
        assert found[row.name].dtype == dtype and found[row.name].shape == tensor.shape
        # The last bit of a quotient decides where x lies in the middle between two integers: those may part.
        close = torch.isclose(found[row.name].double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6 * float(step))
        assert close.double().mean() > 0.98
        lost = (found[row.name].double() - tensor.double()).square().sum() / tensor.double().square().sum()
        assert row.error == pytest.approx(float(lost), rel=0.05, abs=1e-5)
    assert all(bits(found[name]) == bits(tensors[name]) for name in ("bias", "ids"))
    assert {skip.place for skip in done.skips} == {"bias", "ids"}
    assert not found["c.weight"][3].any(), "zeros stay zero"


def test_the_file_holds_packed_integers_scales_and_what_says_so_and_is_as_small_as_it_tells(tmp_path):
    save_file(model(), tmp_path / "a.safetensors", {"format": "pt"})
    done = QuantizeFile(Int(4, group_size=12, symmetric=False)).run(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    )
    stored = load_file(tmp_path / "b.safetensors")
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items() if name.startswith("c.")}
    assert shapes == {
        "c.weight.packed": ((12, 12), torch.uint8), "c.weight.scale": ((12, 2), torch.float32),
        "c.weight.zero_point": ((12, 2), torch.uint8),
    }  # fmt: skip
    low, high = stored["c.weight.packed"] & 15, stored["c.weight.packed"] >> 4
    q = torch.stack([low, high], -1).reshape(12, 2, 12).float()
    x = (q - stored["c.weight.zero_point"][..., None].float()) * stored["c.weight.scale"][..., None]
    assert torch.equal(tersor.load_weights(tmp_path / "b.safetensors")["c.weight"], x.reshape(12, 24))
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        said = file.metadata()
    assert said["format"] == "pt" and json.loads(said["tersor.packed.c.weight"]) == {
        "version": 1, "dtype": "F32", "shape": [12, 24], "bits": 4, "symmetric": False, "group_size": 12,
    }  # fmt: skip
    row = next(row for row in done.tensors if row.name == "c.weight")
    assert (row.dense_bytes, row.stored_bytes, row.stored) == (1152, 144 + 96 + 24, "uint4 groups of 12")
    assert done.stored_bytes == sum(t.nbytes for n, t in stored.items() if n not in ("bias", "ids"))


def test_each_tensor_begins_on_a_multiple_of_its_numbers_size(tmp_path):
    save_file(model(torch.bfloat16), tmp_path / "a.safetensors")
    QuantizeFile(Int(3)).run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    raw = (tmp_path / "b.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    sizes = {"F32": 4, "BF16": 2, "I64": 8, "U8": 1}
    assert length % 8 == 0
    for name, said in header.items():
        if name != "__metadata__":
            assert said["data_offsets"][0] % sizes[said["dtype"]] == 0


def test_dequantising_writes_the_numbers_under_their_first_names_shapes_and_types(tmp_path):
    for kind in ("safetensors", "npz"):
        tensors = model()
        source, packed, out = (tmp_path / f"{name}.{kind}" for name in "abc")
        if kind == "npz":
            np.savez_compressed(source, **{name: tensor.numpy() for name, tensor in tensors.items()})
        else:
            save_file(tensors, source, {"format": "pt"})
        QuantizeFile(Int(5, group_size=6)).run(source, packed)
        assert set(tersor.dequantize_file(packed, out)) == {"a.weight", "b.weight", "c.weight"}
        assert [*open_weights(out).metadata] == ([] if kind == "npz" else ["format"])
        found = {n: torch.from_numpy(a) for n, a in np.load(out).items()} if kind == "npz" else load_file(out)
        expected = tersor.load_weights(packed)
        assert found.keys() == tensors.keys()
        assert all(bits(found[name]) == bits(expected[name]) for name in tensors)
        with pytest.raises(InputError, match="no tensor of the file is stored as integers"):
            tersor.dequantize_file(out, tmp_path / f"d.{kind}")


def test_npz_stores_what_safetensors_stores(tmp_path):
    tensors = model()
    np.savez(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    save_file(tensors, tmp_path / "a.safetensors")
    for scheme in (Int(4), Int(3, symmetric=False, group_size=4)):
        for kind in ("npz", "safetensors"):
            QuantizeFile(scheme).run(tmp_path / f"a.{kind}", tmp_path / f"b.{kind}")
        with np.load(tmp_path / "b.npz") as found:
            stored = load_file(tmp_path / "b.safetensors")
            assert {*found} == {*stored, "__metadata__"}
            assert all(found[name].tolist() == stored[name].tolist() for name in stored)
    with pytest.raises(InputError, match="NumPy has no such type"):
        QuantizeFile(None, dtype="bfloat16").run(tmp_path / "a.npz", tmp_path / "c.npz")
    assert not (tmp_path / "c.npz").exists()


def test_an_npz_array_that_is_called_metadata_but_is_none_stays_an_array(tmp_path):
    for array in (np.ones(3, np.uint8), np.ones(3), np.frombuffer(b'{"a": 1}', np.uint8)):
        np.savez(tmp_path / "a.npz", **{"__metadata__": array, "w": np.ones((2, 2))})
        assert [entry.name for entry in open_weights(tmp_path / "a.npz").tensors] == ["__metadata__", "w"]
    with pytest.raises(InputError, match="one name.*__metadata__"):
        QuantizeFile().run(tmp_path / "a.npz", tmp_path / "b.npz")


def shards(folder, tensors, homes):
    folder.mkdir()
    for shard in set(homes.values()):
        save_file({n: tensors[n] for n, s in homes.items() if s == shard}, folder / shard, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": homes}
    (folder / "x.safetensors.index.json").write_text(json.dumps(index))


def test_a_sharded_checkpoint_keeps_each_tensor_in_its_shard_and_its_index_right(tmp_path):
    tensors = model(torch.bfloat16)
    homes = {name: f"x-{1 + (name > 'b')}.safetensors" for name in tensors}
    shards(tmp_path / "in", tensors, homes)
    save_file(tensors, tmp_path / "a.safetensors")
    done = QuantizeFile(Int(4, group_size=6), dtype="float16").run(tmp_path / "in", tmp_path / "out")
    QuantizeFile(Int(4, group_size=6), dtype="float16").run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    found, expected = tersor.load_weights(tmp_path / "out"), tersor.load_weights(tmp_path / "b.safetensors")
    assert all(bits(found[name]) == bits(expected[name]) for name in tensors)
    index = json.loads((tmp_path / "out" / "x.safetensors.index.json").read_text())
    stored = {shard: load_file(tmp_path / "out" / shard) for shard in set(homes.values())}
    assert index["weight_map"] == {name: shard for shard, each in stored.items() for name in each}
    assert index["metadata"]["total_size"] == sum(t.nbytes for each in stored.values() for t in each.values())
    assert index["weight_map"]["c.weight.packed"] == homes["c.weight"]
    assert all(row.error > 0 for row in done.tensors if row.name != "bias")
    tersor.dequantize_file(tmp_path / "out", tmp_path / "back")
    assert tersor.load_weights(tmp_path / "back").keys() == tensors.keys()
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted([*stored, "x.safetensors.index.json"])


def test_a_name_that_another_shard_has_is_refused(tmp_path):
    tensors = {"w": torch.ones(2, 2), "w.scale": torch.ones(3)}
    shards(tmp_path / "in", tensors, {"w": "x-1.safetensors", "w.scale": "x-2.safetensors"})
    with pytest.raises(InputError, match="one name.*w.scale"):
        QuantizeFile().run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("source", FLOATS)
def test_a_cast_is_pytorchs_and_what_is_not_finite_stays_so(tmp_path, small_pieces, source, dtype):
    tensors = {**model(source), "odd": torch.tensor([math.inf, -math.inf, math.nan, -0.0, 1e-7]).to(source)}
    save_file(tensors, tmp_path / "a.safetensors")
    narrow = getattr(torch, dtype)
    if source == narrow:
        with pytest.raises(InputError, match=f"no tensor can be cast.*is {dtype} already"):
            QuantizeFile(None, dtype=dtype).run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
        return
    done = QuantizeFile(None, dtype=dtype).run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    found = load_file(tmp_path / "b.safetensors")
    for name, tensor in tensors.items():
        expected = tensor.float().to(narrow) if tensor.is_floating_point() else tensor
        assert torch.equal(found[name].nan_to_num(7), expected.nan_to_num(7)) and found[name].dtype == expected.dtype
    assert [skip.place for skip in done.skips] == ["ids"]
    assert all(0 <= row.error < 1e-4 for row in done.tensors if row.name != "odd")


def test_a_cast_that_would_make_numbers_infinite_is_refused_with_their_count(tmp_path):
    save_file({"w": torch.tensor([65504.0, 65519.9, 65520.0, -1e9, math.inf])}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"w: .*infinite. Got 2 beyond 65504.*bfloat16"):
        QuantizeFile(None, dtype="float16").run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_names_choose_tensors_and_bits_and_the_rest_may_be_cast(tmp_path):
    save_file(model(), tmp_path / "a.safetensors")
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"

    def stored(settings_):
        done = settings_.run(source, out)
        return {row.name: row.stored for row in done.tensors}, {skip.place: skip.reason for skip in done.skips}

    rows, skips = stored(QuantizeFile({"c*": None, "b.*": Int(3), "*": Int(4, group_size=8)}, dtype="float16"))
    assert rows == {"a.weight": "int4 groups of 8", "b.weight": "int3 per channel", "c.weight": "F16", "bias": "F16"}
    assert skips["c.weight"] == "stays in floating point, by its name; cast to float16"
    assert "ids" in skips and "cast" not in skips["ids"]
    rows, skips = stored(QuantizeFile(Int(4, group_size=8)))
    assert [*rows] == ["c.weight", "a.weight"] or {*rows} == {"c.weight", "a.weight"}
    assert "12 = 1 · 8 + 4" in skips["b.weight"]
    rows, skips = stored(QuantizeFile(Int(4, group_size=3), where=("bias", "b*")))
    assert rows == {"bias": "int4 groups of 3", "b.weight": "int4 groups of 3"} and not skips
    assert tersor.load_weights(out)["bias"].shape == (9,)
    with pytest.raises(InputError, match="Nearest names: c.weight"):
        stored(QuantizeFile({"d.weight": Int(4)}))
    with pytest.raises(InputError, match="Use 6 or 12"):
        stored(QuantizeFile(Int(4, group_size=8, indivisible="refuse")))


def test_the_range_that_searches_loses_less_at_few_bits(tmp_path):
    save_file({"w": torch.randn(64, 256, generator=torch.manual_seed(0))}, tmp_path / "a.safetensors")
    errors = [
        QuantizeFile(Int(3), **options).run(tmp_path / "a.safetensors", tmp_path / "b.safetensors").tensors[0].error
        for options in ({}, {"range": MeanSquaredError()})
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_that_are_not_finite_are_counted_and_refused_by_name(tmp_path, small_pieces, dtype):
    tensors = model(dtype)
    tensors["c.weight"].view(-1)[[3, 40]] = math.nan
    tensors["c.weight"].view(-1)[30] = -math.inf
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"c.weight: .*cannot be quantised. Got 2 NaN and 1 infinite of 288"):
        QuantizeFile().run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    QuantizeFile(where=("a*", "b.*")).run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    save_file({"w": torch.full((2, 2), 1e300, dtype=torch.float64)}, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match="w: numbers beyond float32"):
        QuantizeFile().run(tmp_path / "c.safetensors", tmp_path / "d.safetensors")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: QuantizeFile(None), "nothing to do"),
        (lambda: QuantizeFile({"a": None}), "nothing to do"),
        (lambda: QuantizeFile(dtype="int8"), "float16 or bfloat16"),
        (lambda: QuantizeFile(Int(16)), "2 to 8 bits"),
        (lambda: QuantizeFile({"a": Int(8, "per_tensor")}), "a: files store 2 to 8 bits"),
        (lambda: tersor.quantize_file("a", "b", 4, range="minmax"), "unknown range.*min_max or mean_squared_error"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_what_cannot_be_quantised_is_said_with_the_reason(tmp_path):
    np.savez(
        tmp_path / "a.npz", columns=np.asfortranarray(np.ones((2, 3))), one=np.float32(1), none=np.ones((0, 3)),
        ids=np.ones((2, 2), int), long=np.ones((1, 2**22 + 1), np.float16),
    )  # fmt: skip
    with pytest.raises(InputError, match="no tensor can be quantised") as caught:
        QuantizeFile(where=("*",)).run(tmp_path / "a.npz", tmp_path / "b.npz")
    assert "ascontiguousarray" in str(caught.value) and "a single number" in str(caught.value)
    with pytest.raises(InputError, match="a row of 4,194,305 numbers"):
        QuantizeFile(where=("long",)).run(tmp_path / "a.npz", tmp_path / "b.npz")
    columns = tersor.load_weights(tmp_path / "a.npz")["columns"]
    assert columns.shape == (2, 3) and columns.is_contiguous()


def test_what_is_quantised_is_not_quantised_or_pruned_again(tmp_path):
    save_file(model(), tmp_path / "a.safetensors")
    QuantizeFile(Int(4, group_size=2)).run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for again in (QuantizeFile(), QuantizeFile(None, dtype="float16"), PruneFile(0.5)):
        with pytest.raises(InputError, match="quantised already.*3 tensors, such as"):
            again.run(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    for doomed in (QuantizeFile(), PruneFile(0.5)):
        with pytest.raises(InputError, match="never changed"):
            doomed.run(tmp_path / "a.safetensors", tmp_path / "a.safetensors")


def test_one_pattern_of_names_is_not_its_letters(tmp_path):
    save_file({name: torch.randn(4, 32) for name in ("enc.w", "dec.w")}, tmp_path / "a.safetensors")
    done = tersor.quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 8, where="enc*")
    assert [row.name for row in done.tensors] == ["enc.w"]


def test_inspecting_shows_the_numbers_that_the_integers_stand_for_and_the_bytes_that_they_take(tmp_path):
    save_file(
        {"w": torch.randn(32, 64, generator=torch.manual_seed(0)), "b": torch.ones(3)}, tmp_path / "a.safetensors"
    )
    tersor.quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 4, group_size=16)
    told = tersor.inspect_file(tmp_path / "b.safetensors")
    dense = tersor.inspect_file(tmp_path / "a.safetensors")
    found, before = ({each.name: each for each in facts.tensors}["w"] for facts in (told, dense))
    assert (found.stored, found.stored_bytes, found.dense_bytes) == ("int4 groups of 16", 1024 + 512, 8192)
    assert found.smallest == "int4 groups of 16" and (found.dtype, found.shape) == ("F32", (32, 64))
    assert found.mean_magnitude == pytest.approx(before.mean_magnitude, rel=0.02) and found.zeros > 0.03
    assert found.zip_bytes < 2000 and told.to_json()["totals"]["stored_bytes"] == 1536 + 12
    assert told.metadata == {} and (before.stored, before.stored_bytes) == ("dense", 8192)


def quantised(tmp_path, scheme=None):
    save_file({"w": torch.randn(4, 6, generator=torch.manual_seed(0))}, tmp_path / "a.safetensors")
    QuantizeFile(scheme or Int(3, group_size=3, symmetric=False)).run(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    )
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        return load_file(tmp_path / "b.safetensors"), json.loads(file.metadata()["tersor.packed.w"])


def put(**fields):
    return lambda tensors, said: said.update(fields)


@pytest.mark.parametrize(
    "change, message",
    [
        (put(version=2), "expected version 1"), (put(more=1), "expected version 1"), (put(bits=9), "impossible width"),
        (put(bits=True), "impossible width"), (put(bits=16), "16 bits"), (put(bits=6), "expected w.packed"),
        (put(group_size=4), "does not divide"), (put(group_size=2), "expected w.scale"), (put(group_size=-3), "groups"),
        (put(group_size="3"), "impossible groups"), (put(group_size=None), "expected w.scale"),
        (put(symmetric=1), "symmetric"), (put(dtype="U8"), "no tensor of numbers"), (put(dtype=[1]), "TypeError"),
        (put(shape=[]), "single number"), (put(shape=[4, 0]), "no tensor"), (put(shape=[4, -6]), "no tensor"),
        (put(shape=[2**40, 2**40]), "a row of"), (put(shape=[2**62, 2]), "does not divide"),
        (put(shape=[3, 8]), "divide"), (put(shape=[8, 3]), "expected w.packed"), (put(shape=None), "no tensor"),
        (put(shape=[4.0, 6]), "no tensor"),
        (lambda t, _: t.pop("w.packed"), "no w.packed"), (lambda t, _: t.pop("w.zero_point"), "no w.zero_point"),
        (lambda t, _: t.update(w=torch.ones(2)), "as integers and as numbers"),
        (lambda t, _: t.update({"w.scale": t["w.scale"].double()}), "expected w.scale F32"),
        (lambda t, _: t["w.scale"].fill_(math.nan), "not positive numbers"),
        (lambda t, _: t["w.scale"].fill_(-1), "not positive numbers"),
        (lambda t, _: t["w.scale"].fill_(math.inf), "not positive numbers"),
        (lambda t, _: t["w.packed"].fill_(255), "behind the last number"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_hold_what_it_says_is_refused(tmp_path, change, message):
    tensors, said = quantised(tmp_path)
    change(tensors, said)
    path = tmp_path / "forged.safetensors"
    save_file(tensors, path, {"tersor.packed.w": json.dumps(said)})
    with pytest.raises(InputError, match=message) as caught:
        tersor.load_weights(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 900
    for attempt in (tersor.inspect_file, lambda file: tersor.dequantize_file(file, tmp_path / "o.safetensors")):
        with pytest.raises(InputError, match=message):
            attempt(path)
    assert not (tmp_path / "o.safetensors").exists()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_the_metadata_says_the_file_is_read_or_refused_and_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("said")
    tensors, said = quantised(folder)
    likely = {
        "version": st.just(1), "dtype": st.sampled_from(["F32", "BF16", "F16", "F64"]), "bits": st.integers(1, 9),
        "shape": st.lists(st.integers(0, 24), max_size=3), "symmetric": st.booleans(),
        "group_size": st.none() | st.integers(-1, 25),
    }  # fmt: skip
    for key in data.draw(st.sets(st.sampled_from([*likely, "other"]), max_size=3)):
        said[key] = data.draw(likely.get(key, json_values) | json_values)
    text = data.draw(st.just(json.dumps(said)) | st.text(max_size=30) | json_values.map(json.dumps))
    save_file(tensors, folder / "c.safetensors", {"tersor.packed.w": text})
    try:
        found = tersor.load_weights(folder / "c.safetensors")["w"]
    except InputError as error:
        assert str(folder) in str(error)
    else:
        assert found.numel() == 24 and bool(found.isfinite().all())


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_bytes_changed_or_cut_off_are_read_or_refused(tmp_path_factory, kind, data):
    folder = tmp_path_factory.mktemp("bytes")
    array = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    if kind == "npz":
        np.savez_compressed(folder / "a.npz", w=array)
    else:
        save_file({"w": torch.from_numpy(array)}, folder / "a.safetensors")
    source, path = folder / f"a.{kind}", folder / f"b.{kind}"
    QuantizeFile(Int(4, group_size=4)).run(source, path)
    for target, read in ((path, tersor.load_weights), (source, lambda file: QuantizeFile().run(file, path))):
        raw = bytearray(target.read_bytes())
        for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=4)):
            raw[at] = value
        target.write_bytes(raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))])
        try:
            read(target)
        except TersorError as error:
            assert re.search(re.escape(str(folder)), str(error))


@pytest.mark.parametrize("settings_", [QuantizeFile(Int(4, group_size=64)), QuantizeFile(None, dtype="bfloat16")])
def test_a_tensor_many_times_larger_than_a_piece_takes_no_more_memory(tmp_path, settings_):
    import tracemalloc

    source, rows = tmp_path / "a.safetensors", 12_000
    header = json.dumps({"w": {"dtype": "F32", "shape": [rows, 4096], "data_offsets": [0, rows * 4096 * 4]}}).encode()
    with open(source, "wb") as file:  # a hole of 187 MiB
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * 4096 * 4)
    tracemalloc.start()
    settings_.run(source, tmp_path / "b.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 90 * 2**20, f"{peak / 2**20:.0f} MiB"
    packed = RestoredFile(open_weights(tmp_path / "b.safetensors"))
    tracemalloc.start()
    longest = max(piece.nbytes for entry in packed.tensors for piece in packed.pieces(entry))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert longest <= weights.PIECE and peak < 90 * 2**20


def test_four_bits_in_groups_are_what_onnx_runtime_multiplies_with(tmp_path):
    """MatMulNBits reads w.packed and w.scale as they are: an independent reader of the format."""
    import onnx
    import onnxruntime

    generator = torch.manual_seed(0)
    weight, x = torch.randn(24, 64, generator=generator), torch.randn(5, 64, generator=generator)
    save_file({"w": weight}, tmp_path / "a.safetensors")
    QuantizeFile(Int(4, group_size=16)).run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    stored = load_file(tmp_path / "b.safetensors")
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "B", "scales"], ["y"], domain="com.microsoft", K=64, N=24, bits=4, block_size=16
    )
    tensors = [
        onnx.numpy_helper.from_array(stored["w.packed"].reshape(24, 4, 8).numpy(), "B"),
        onnx.numpy_helper.from_array(stored["w.scale"].numpy().reshape(-1), "scales"),
    ]
    value, float32 = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph([node], "g", [value("x", float32, [5, 64])], [value("y", float32, [5, 24])], tensors)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    session = onnxruntime.InferenceSession(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    (y,) = session.run(None, {"x": x.numpy()})
    expected = x @ tersor.load_weights(tmp_path / "b.safetensors")["w"].T
    assert torch.allclose(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, x @ weight.T, rtol=1e-2, atol=1e-2)
