import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.core.edit import (
    Attribute,
    Cut,
    Mask,
    Precision,
    Quantizer,
    Slice,
    Swap,
    Write,
    edit_from_json,
    edit_to_json,
)
from tersor.core.errors import ArtifactError
from tersor.core.place import ActivationPlace, TensorPlace

names = st.text("abc.0_ é", max_size=8)
tensor_places = st.builds(TensorPlace, names, names)
activation_places = st.builds(ActivationPlace, names, names, st.integers(0, 5))
shapes = st.lists(st.integers(1, 4), max_size=3)
keeps = st.sets(st.integers(0, 500), min_size=1, max_size=6).map(lambda found: torch.tensor(sorted(found)))
plain = st.none() | st.booleans() | st.integers(-99, 99) | st.floats(-9, 9) | st.text(max_size=5)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])

masks = st.builds(lambda p, s, m: Mask(p, torch.ones(s, dtype=torch.bool), m), tensor_places, shapes, st.booleans())
writes = st.builds(lambda p, s, d: Write(p, torch.zeros(s, dtype=d)), tensor_places, shapes, dtypes)


def quantizer(places, channels, low, high, axis, learn, group_size):
    shape = [] if axis is None else [channels] if group_size is None else [channels, 2]
    return Quantizer(tuple(places), torch.ones(shape), torch.zeros(shape), low, high, axis, learn, group_size)


quantizers = st.builds(
    quantizer, st.lists(tensor_places | activation_places, min_size=1, max_size=3), st.integers(1, 4),
    st.integers(-128, 0), st.integers(1, 255), st.none() | st.integers(0, 3), st.booleans(), st.none() | st.just(32),
)  # fmt: skip
precisions = st.builds(Precision, tensor_places, st.sampled_from([torch.float16, torch.bfloat16]))
cuts = st.builds(Cut, tensor_places, st.integers(0, 3), keeps, st.sampled_from(["producer", "consumer", "bystander"]))
slices = st.lists(cuts, min_size=1, max_size=4).map(lambda found: Slice(tuple(found)))
swaps = st.builds(Swap, names, names, st.dictionaries(names, plain, max_size=2))
attributes = st.builds(Attribute, names, names, plain | st.lists(plain, max_size=3))


def through_json(edit):
    tensors = {}
    text = json.dumps(edit_to_json(edit, "plan0.edit3", tensors))
    assert all(name.startswith("plan0.edit3") for name in tensors)
    return edit_from_json(json.loads(text), tensors), tensors


@settings(max_examples=150, deadline=None)
@given(st.one_of(masks, writes, quantizers, precisions, slices, swaps, attributes))
def test_every_edit_comes_back_as_the_same_structure(edit):
    back, _ = through_json(edit)
    assert type(back) is type(edit)
    match edit:
        case Mask():
            assert (back.place, back.keep.shape, back.merge) == (edit.place, edit.keep.shape, edit.merge)
            assert back.keep.dtype == torch.bool
        case Write():
            assert (back.place, back.value.shape, back.value.dtype) == (edit.place, edit.value.shape, edit.value.dtype)
        case Quantizer():
            for name in ("places", "quant_min", "quant_max", "axis", "learn", "group_size"):
                assert getattr(back, name) == getattr(edit, name)
            assert back.scale.shape == back.zero_point.shape == edit.scale.shape
        case Precision():
            assert (back.place, back.dtype) == (edit.place, edit.dtype)
        case Slice():
            assert len(back.cuts) == len(edit.cuts)
            for a, b in zip(back.cuts, edit.cuts, strict=True):
                assert (a.place, a.dim, a.role) == (b.place, b.dim, b.role)
                assert torch.equal(a.keep, b.keep) and a.keep.dtype == torch.int64
        case Swap():
            assert (back.module, back.constructor, dict(back.arguments)) == (
                edit.module, edit.constructor, dict(edit.arguments),
            )  # fmt: skip
        case Attribute():
            assert (back.module, back.name, back.value) == (edit.module, edit.name, edit.value)


def test_cuts_that_share_their_indices_store_them_once():
    kept, other = torch.tensor([1, 2]), torch.tensor([0, 5])
    cut = [Cut(TensorPlace(name, "weight"), 0, kept, "producer") for name in "abc"]
    back, tensors = through_json(Slice((*cut, Cut(TensorPlace("d", "weight"), 1, other, "consumer"))))
    assert len(tensors) == 2 and [tuple(cut.keep.tolist()) for cut in back.cuts] == [(1, 2)] * 3 + [(0, 5)]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "Explode"},
        {"kind": "Mask", "place": ["a"], "shape": [1], "merge": True},
        {"kind": "Write", "place": ["a", "b"], "shape": [1], "dtype": "floof"},
        {"kind": "Write", "place": ["a", "b"], "shape": "x", "dtype": "float32"},
        {"kind": "Slice", "cuts": [[["a", "weight"], 0, "missing", "producer"]]},
        {"kind": "Slice", "cuts": [[["a", "weight"], 0]]},
        {"kind": "Mask", "place": ["a", "b"], "shape": [-1], "merge": True},
        {"kind": "Quantizer", "places": [["a", "b"]], "shape": [1]},
        {"kind": "Precision", "place": ["a", "b"], "dtype": "load"},
    ],
)
def test_damaged_json_is_an_artifact_error(data):
    with pytest.raises(ArtifactError, match="architecture.json: an edit cannot be read"):
        edit_from_json(data, {})
