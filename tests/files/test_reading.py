"""Reading and rewriting without a change: every kind of file, every type, damaged and hostile ones."""

import io
import json
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import save_file

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.files import weights
from tersor.files.open import expect_destination, is_weights, open_weights

SHAPES = [(3, 5), (7,), (), (0, 4), (2, 3, 4)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]


def tensors():
    generator = torch.manual_seed(0)
    return {
        f"{dtype}.{n}".removeprefix("torch."): (9 * torch.randn(shape, generator=generator)).to(dtype)
        for dtype in [*DTYPES, torch.uint8, torch.float8_e4m3fn]
        for n, shape in enumerate(SHAPES)
    }


def arrays():
    rng = np.random.default_rng(0)
    found = {
        f"{dtype}_{n}": (9 * rng.standard_normal(shape)).astype(dtype)
        for dtype in ("<f8", "<f4", ">f4", "<f2", ">f8", "<i4", "?", "<c8", "<c16", "<U3", "<g")
        for n, shape in enumerate(SHAPES)
    }
    return found | {"by columns": np.asfortranarray(rng.standard_normal((4, 6)))}


def unchanged(path, out):
    file = open_weights(path)
    file.rewrite(out, lambda entry: None, Progress())
    return file


def test_a_safetensors_file_that_is_rewritten_unchanged_is_the_same_file(tmp_path):
    save_file(tensors(), tmp_path / "a.safetensors", {"format": "pt", "note": "äöü"})
    file = unchanged(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert dict(file.metadata) == {"format": "pt", "note": "äöü"}
    assert {entry.name: entry.shape for entry in file.tensors} == {k: tuple(v.shape) for k, v in tensors().items()}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file_that_is_rewritten_unchanged_has_the_same_arrays_and_compression(tmp_path, save):
    save(tmp_path / "a.npz", **arrays())
    unchanged(tmp_path / "a.npz", tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as saved, np.load(tmp_path / "b.npz", allow_pickle=False) as found:
        assert list(found) == list(saved)
        for name, array in saved.items():
            assert found[name].dtype == array.dtype and found[name].tobytes("A") == array.tobytes("A")
            assert found[name].flags.f_contiguous == array.flags.f_contiguous
    kinds = [{i.compress_type for i in zipfile.ZipFile(tmp_path / f).infolist()} for f in ("a.npz", "b.npz")]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_of_a_zip_are_kept_too(tmp_path, compression):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        stream = io.BytesIO()
        np.save(stream, np.arange(6.0).reshape(2, 3))
        archive.writestr("w.npy", stream.getvalue())
    unchanged(tmp_path / "a.npz", tmp_path / "b.npz")
    assert zipfile.ZipFile(tmp_path / "b.npz").infolist()[0].compress_type == compression
    assert np.load(tmp_path / "b.npz")["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("granule", [1, 6])
def test_pieces_are_bounded_multiples_of_the_granule_and_together_the_tensor(tmp_path, monkeypatch, granule):
    monkeypatch.setattr(weights, "PIECE", 100)
    array = torch.randn(30, 6, generator=torch.manual_seed(0))
    save_file({"w": array, "other": torch.ones(3)}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", w=array.numpy(), big_endian=array.numpy().astype(">f4"))
    for name, tensor in (("a.safetensors", "w"), ("a.npz", "w"), ("a.npz", "big_endian")):
        file = open_weights(tmp_path / name)
        entry = next(entry for entry in file.tensors if entry.name == tensor)
        pieces = [piece.copy() for piece in file.pieces(entry, granule)]
        assert len(pieces) > 5 and all(p.nbytes <= 100 and len(p) % granule == 0 for p in pieces)
        assert np.concatenate(pieces).view(np.float32).tolist() == array.flatten().tolist()
    file = open_weights(tmp_path / "a.safetensors")
    entry = next(entry for entry in file.tensors if entry.name == "w")
    assert file.run_of(entry, 50, 4).view(np.float32).tolist() == array.flatten()[50:54].tolist()


def test_bfloat16_bits_are_the_numbers():
    numbers = np.array([0.0, 1.5, -2.0, 3.3895e38, np.inf], ml_dtypes.bfloat16)
    assert weights.FLOATS["BF16"].floats(numbers.view(np.uint16)).tolist() == numbers.astype(np.float32).tolist()


def sharded(folder, parts):
    folder.mkdir()
    names = [f"model-{n + 1:05}-of-{len(parts):05}.safetensors" for n in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    index = {
        "metadata": {"total_size": 123},
        "weight_map": {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder / "model.safetensors.index.json"


def test_a_sharded_checkpoint_is_rewritten_shard_by_shard_with_its_index(tmp_path):
    index = sharded(tmp_path / "in", [{"a": torch.ones(2, 3)}, {"b": torch.zeros(4), "c": torch.ones(1, 1)}])
    for source, out in ((index, tmp_path / "out"), (tmp_path / "in", tmp_path / "again")):
        file = unchanged(source, out)
        assert [entry.name for entry in file.tensors] == ["a", "b", "c"]
        for path in (tmp_path / "in").iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "in", "out"]
    with pytest.raises(InputError, match="new or empty"):
        unchanged(index, tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda index: index["weight_map"].update(a="../in/model-00001-of-00002.safetensors"), "in the index's folder"),
        (lambda index: index["weight_map"].update(a="/etc/passwd"), "in the index's folder"),
        (lambda index: index["weight_map"].update(a="missing.safetensors"), "no file missing"),
        (lambda index: index["weight_map"].update(a="model-00002-of-00002.safetensors"), "no tensor 'a' in"),
        (lambda index: index["weight_map"].update(d="model-00002-of-00002.safetensors"), "no tensor 'd' in"),
        (lambda index: index.update(weight_map=["a"]), "weight_map"),
        (lambda index: index["weight_map"].update(a=3), "weight_map"),
        (lambda index: index.update(metadata=3), "metadata"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, change, message):
    path = sharded(tmp_path / "in", [{"a": torch.ones(2, 3)}, {"b": torch.zeros(4)}])
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        open_weights(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    with pytest.raises(InputError, match="in two shards"):
        open_weights(sharded(tmp_path / "in", [{"a": torch.ones(2), "x": torch.ones(1)}, {"a": torch.ones(2)}]))


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(InputError, match="damaged"):
        open_weights(path)


def read_all(path):
    file = open_weights(path)
    return [piece.copy() for entry in file.tensors for piece in file.pieces(entry)]


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, kind):
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    if kind == "npz":
        np.savez_compressed(whole, a=np.ones((3, 4), np.float32), b=np.arange(5))
    else:
        save_file({"a": torch.ones(3, 4), "b": torch.arange(5)}, whole)
    data = whole.read_bytes()
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(InputError, match="damaged"):
            read_all(cut)
    cut.write_bytes(data + b"\0")
    if kind == "safetensors":
        with pytest.raises(InputError, match="89 bytes of data; expected 88"):
            read_all(cut)


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_file_with_any_bytes_changed_is_read_or_refused_and_nothing_else(tmp_path_factory, kind, data):
    path = tmp_path_factory.mktemp("bytes") / f"a.{kind}"
    if kind == "npz":
        np.savez_compressed(path, a=np.ones((3, 4), np.float32))
    else:
        save_file({"a": torch.ones(3, 4)}, path)
    raw = bytearray(path.read_bytes())
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=4)):
        raw[at] = value
    path.write_bytes(raw)
    try:
        read_all(path)
    except InputError as error:
        assert str(path) in str(error)


def test_a_member_whose_name_is_no_utf_8_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.ones((3, 4), np.float32))
    raw = bytearray(path.read_bytes())
    raw[7], raw[30] = 8, 128  # in the local header: "the name is UTF-8", and its first byte
    path.write_bytes(raw)
    with pytest.raises(InputError, match="damaged.*UnicodeDecodeError"):
        read_all(path)


def with_header(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header, message",
    [
        ({"a": tensor(dtype="F31")}, "dtype 'F31'"),
        ({"a": tensor(dtype=None)}, "dtype"),
        ({"a": tensor(shape=[-1])}, "shape"),
        ({"a": tensor(shape=[True])}, "shape"),
        ({"a": tensor(shape=[1.0])}, "shape"),
        ({"a": tensor(shape=[2**62, 2**62], offsets=[0, 4])}, "bytes 0 to 4"),
        ({"a": tensor(shape=[2**62] * 1000)}, "shape"),
        ({"a": tensor(shape=[2**70])}, "shape"),
        ({"a": tensor(offsets=[4, 0])}, "bytes 4 to 0"),
        ({"a": tensor(offsets=[0, 4, 8])}, "data_offsets"),
        ({"a": tensor(offsets=[4, 8])}, "begins at byte 4"),
        ({"a": tensor(), "b": tensor()}, "begins at byte 0"),
        ({"a": tensor(), "b": tensor(offsets=[2, 6])}, "begins at byte 2"),
        ({"a": tensor(dtype="F4", shape=[7], offsets=[0, 4])}, "F4"),
        ({"a": {"dtype": "F32"}}, "dtype, shape and data_offsets"),
        ({"a": 3}, "dtype, shape and data_offsets"),
        ({"a": tensor(), "__metadata__": {"n": 3}}, "__metadata__"),
        ({"a": tensor(), "__metadata__": []}, "__metadata__"),
        ({}, "4 bytes of data"),
        ([], "a list"),
        (b"\xff\xfe", "no JSON"),
        (b"{" * 200_000, "no JSON"),
        (b'{"a":' * 200_000, "no JSON"),
        (b"[1" + b"0" * 10_000 + b"]", "no JSON"),
        (b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": {}}', "stands there twice"),
        (b'{"\\ud800": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "surrogates not allowed"),
        (b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "__metadata__": {"b": "\\ud800"}}', "surrogates"),
    ],
)
def test_hostile_headers_are_refused_with_what_is_wrong(tmp_path, header, message):
    path = with_header(tmp_path / "a.safetensors", header, b"\0" * 4)
    with pytest.raises(InputError, match=message) as caught:
        open_weights(path)
    assert len(str(caught.value)) < 900


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.text(max_size=5) | st.sampled_from(["F32", "I64", "F4"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
described = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "F99"]) | json_values,
     "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
     "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3) | json_values}
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(header=st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), described | json_values, max_size=3))
def test_any_header_is_read_or_refused_as_the_reference_does_where_it_reads(tmp_path_factory, header):
    path = with_header(tmp_path_factory.mktemp("header") / "a.safetensors", header, bytes(16))
    try:
        read = {entry.name: entry for entry in open_weights(path).tensors}
    except InputError:
        return
    if not any(entry.dtype in ("F4", "BF16") or 0 in entry.shape for entry in read.values()):
        assert {name: array.shape for name, array in load_file(path).items()} == {n: e.shape for n, e in read.items()}


def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="header of 9,223,372,036,854,775,808 bytes"):
        open_weights(path)


def zip_of(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "members, message",
    [
        ([("a.npy", npy(np.array([{}, {}]), allow_pickle=True))], "pickled Python objects"),
        ([("a.npy", npy(np.ones(3))), ("a.npy", npy(np.ones(3)))], "stands there twice"),
        ([("a.txt", b"hello")], "arrays only"),
        ([("a.npy", b"hello")], "a.npy"),
        ([("a.npy", b"")], "a.npy"),
        ([("a.npy", npy(np.ones(3))[:-1])], "expected 152|Expected 152"),
        ([("a.npy", npy(np.ones(3)) + b"x")], "152"),
        ([("a.npy", npy(np.ones(3)).replace(b"(3,)", b"(-3)"))], "a.npy"),
        ([("a.npy", npy(np.ones(3)).replace(b"(3,)", b"3*99"))], "a.npy"),
        ([("a.npy", npy(np.ones(3)).replace(b"), }", b",   "))], "TokenError"),
        ([("a.npy", npy(np.ones(3)).replace(b"NUMPY\x01", b"NUMPY\x09"))], "version"),
        ([("a.npy", b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b"{}")], "header of 2,147,483,648"),
    ],
)
def test_hostile_zips_are_refused_with_what_is_wrong(tmp_path, members, message):
    with pytest.raises(InputError, match=message):
        read_all(zip_of(tmp_path / "a.npz", members))


def test_a_damaged_checksum_is_noticed_when_the_data_is_read(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(1000, np.float32))
    raw = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(raw.replace(np.float32(1).tobytes() * 4, np.float32(2).tobytes() * 4, 1))
    with pytest.raises(InputError, match="CRC"):
        read_all(tmp_path / "a.npz")


def test_a_failed_rewrite_leaves_nothing_behind_and_the_old_output_as_it_was(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    (tmp_path / "out.safetensors").write_text("old")

    def pieces():
        yield np.ones(1, np.uint32)
        raise RuntimeError("stop")

    def change(entry):
        return weights.Replacement((weights.Part(entry, pieces),))

    with pytest.raises(RuntimeError, match="stop"):
        open_weights(tmp_path / "a.safetensors").rewrite(tmp_path / "out.safetensors", change, Progress())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "out.safetensors"]
    assert (tmp_path / "out.safetensors").read_text() == "old"
    index = sharded(tmp_path / "in", [{"a": torch.ones(2, 3)}])
    with pytest.raises(RuntimeError, match="stop"):
        open_weights(index).rewrite(tmp_path / "out", change, Progress())
    assert not (tmp_path / "out").exists()


def test_the_output_is_never_the_input(tmp_path):
    source = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3)}, source)
    (tmp_path / "linked.safetensors").symlink_to(source)
    (tmp_path / "hard.safetensors").hardlink_to(source)
    index = sharded(tmp_path / "in", [{"a": torch.ones(2, 3)}])
    for read, out in (
        (source, source),
        (source, tmp_path / "in" / ".." / "a.safetensors"),
        (source, tmp_path / "linked.safetensors"),
        (source, tmp_path / "hard.safetensors"),
        (tmp_path / "linked.safetensors", source),
        (index, tmp_path / "in"),
        (index, tmp_path),
    ):
        with pytest.raises(InputError, match="never changed"):
            expect_destination(open_weights(read), out)
    for read, out, message in (
        (source, tmp_path / "a.npz", "input's kind"),
        (source, tmp_path / "none" / "a.safetensors", "does not exist"),
        (index, tmp_path / "out.safetensors", "is a folder"),
    ):
        with pytest.raises(InputError, match=message):
            expect_destination(open_weights(read), out)


def test_what_is_no_file_of_weights_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for path, message in (("a.bin", "by its name"), ("none.npz", "no such file"), ("empty", "not one file of weights")):
        with pytest.raises(InputError, match=message):
            open_weights(tmp_path / path)
    assert not is_weights("task.py") and not is_weights(tmp_path / "empty") and is_weights("a.npz")


def test_a_name_that_matches_nothing_is_an_error_with_the_nearest(tmp_path):
    save_file({"layers.0.weight": torch.ones(3, 3), "head.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    file = open_weights(tmp_path / "a.safetensors")
    assert [entry.name for entry in file.matching(["head*", "*0*"])] == ["head.weight", "layers.0.weight"]
    with pytest.raises(InputError, match=r"Nearest names: layers.0.weight"):
        file.matching(["layer.0.weight"])
