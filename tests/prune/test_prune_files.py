"""Files that are pruned, against a naive reference in memory."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.files import weights
from tersor.jobs.prune_file import prune_file
from tersor.prune.files import removal as file_removal
from tersor.prune.files.prune import PruneFile
from tersor.prune.sparse.patterns import NM, Block, Rows

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def naive_zeros(scores, k):
    """Of all scores, in the order of the file, the k smallest; Python's sort keeps equals in order."""
    return set(sorted(range(len(scores)), key=lambda i: scores[i])[:k])


def in_order(path):
    """The names in a safetensors file by position."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return sorted((n for n in header if n != "__metadata__"), key=lambda n: (header[n]["data_offsets"], n))


@pytest.fixture
def small_pieces(monkeypatch):
    """Every tensor is larger than a piece, and a piece larger than a view."""
    monkeypatch.setattr(weights, "PIECE", 96)
    monkeypatch.setattr(file_removal, "PIECE", 96)
    monkeypatch.setattr(file_removal, "_VIEW", 7)
    for name, value in {"_SHARE": 2, "_FEWEST_CLUSTERS": 3, "_CLUSTER": 3, "_SHORT_CLUSTER": 2}.items():
        monkeypatch.setattr(file_removal, name, value)


def model(dtype, seed=0, ties=True):
    generator = torch.manual_seed(seed)
    found = {}
    for name, shape in {"b.weight": (8, 12), "a.weight": (4, 8, 3, 3), "c.weight": (12, 4)}.items():
        values = torch.randn(shape, generator=generator)
        found[name] = ((values * 4).round() / 4 if ties else values).to(dtype)
    return found


@pytest.mark.parametrize("pieces", ["large", "small"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_exactly_the_smallest_go_of_equals_the_earlier_and_what_stays_keeps_its_bits(
    tmp_path, request, dtype, scope, pieces
):
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = {**model(dtype), "a.bias": torch.randn(8).to(dtype), "ids": torch.arange(6).reshape(2, 3)}
    save_file(tensors, source, {"format": "pt"})
    before = source.read_bytes()
    done = PruneFile(0.7, scope).run(source, out)
    found = load_file(out)
    names = [name for name in in_order(source) if name.endswith(".weight")]
    parts = [[name] for name in names] if scope == "layer" else [names]
    for part in parts:
        scores = [abs(w) for name in part for w in tensors[name].double().flatten().tolist()]
        gone = naive_zeros(scores, int(0.7 * len(scores) + 1e-9))
        expected = torch.cat([tensors[name].flatten() for name in part])
        expected[list(gone)] = 0
        assert bits(torch.cat([found[name].flatten() for name in part])) == bits(expected)
    assert all(bits(found[name]) == bits(tensors[name]) for name in ("a.bias", "ids"))
    assert source.read_bytes() == before and len(out.read_bytes()) == len(before)
    assert out.read_bytes()[:200] == before[:200], "header and metadata stay"
    assert {row.name: row.zeros for row in done.tensors} == {name: int((found[name] == 0).sum()) for name in names}
    assert [skip.place for skip in done.skips] == ["ids", "a.bias"] or {s.place for s in done.skips} == {
        "ids",
        "a.bias",
    }


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), sparsity=st.floats(0, 0.999), data=st.data(),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=5, max_size=5),
)  # fmt: skip
def test_a_global_threshold_over_mixed_types_hits_the_total_exactly(tmp_path_factory, sizes, sparsity, data, dtypes):
    folder = tmp_path_factory.mktemp("mixed")
    numbers = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 2.0**-24, -3.0, 60000.0])
    tensors = {
        f"t{n}": torch.tensor(data.draw(st.lists(numbers, min_size=size, max_size=size))).to(dtype).reshape(1, -1)
        for n, (size, dtype) in enumerate(zip(sizes, dtypes, strict=False))
    }
    save_file(tensors, folder / "a.safetensors")
    done = PruneFile(sparsity, "global", allow_empty=True).run(folder / "a.safetensors", folder / "b.safetensors")
    found = load_file(folder / "b.safetensors")
    names = in_order(folder / "a.safetensors")
    scores = [abs(w) for name in names for w in tensors[name].double().flatten().tolist()]
    gone = naive_zeros(scores, int(sparsity * len(scores) + 1e-9))
    at = 0
    for name in names:
        expected = tensors[name].flatten().clone()
        expected[[i - at for i in gone if at <= i < at + expected.numel()]] = 0
        assert bits(found[name]) == bits(expected)
        at += expected.numel()
    assert done.zeros == sum(int((tensor == 0).sum()) for tensor in found.values())


@pytest.mark.parametrize("pieces", ["large", "small"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_two_of_four_runs_along_the_inputs_of_linear_layers_and_convolutions(tmp_path, request, dtype, pieces):
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    tensors = model(dtype) | {"odd": torch.ones(3, 10).to(dtype), "flat": torch.ones(8).to(dtype)}
    save_file(tensors, tmp_path / "a.safetensors")
    done = PruneFile(pattern=NM(2, 4), where=("*",)).run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    found = load_file(tmp_path / "b.safetensors")
    for name in model(dtype):
        for out in range(len(tensors[name])):
            lines = tensors[name][out].reshape(tensors[name].shape[1], -1).T.double().abs().tolist()
            kept = found[name][out].reshape(tensors[name].shape[1], -1).T.tolist()
            for line, now in zip(lines, kept, strict=True):
                for start in range(0, len(line), 4):
                    gone = naive_zeros(line[start : start + 4], 2)
                    for i in range(4):
                        assert abs(now[start + i]) == (0 if i in gone else line[start + i])
    reasons = {skip.place: skip.reason for skip in done.skips}
    assert "10 = 2 × 4 + 2" in reasons["odd"] and "[8]" in reasons["flat"]
    assert {row.target for row in done.tensors} == {0.5}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pieces", ["large", "small"])
def test_blocks_go_as_one_by_their_mean(tmp_path, request, dtype, scope, pieces):
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    tensors = model(dtype)
    save_file(tensors, tmp_path / "a.safetensors")
    PruneFile(0.5, scope, Block(4, 2)).run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    found = load_file(tmp_path / "b.safetensors")
    names = in_order(tmp_path / "a.safetensors")
    means = {n: tensors[n].double().abs().unflatten(1, (-1, 2)).unflatten(0, (-1, 4)).mean((1, 3)) for n in names}
    for part in [[name] for name in names] if scope == "layer" else [names]:
        scores = torch.cat([means[name].flatten() for name in part]).tolist()
        gone, at = naive_zeros(scores, len(scores) // 2), 0
        for name in part:
            size = means[name].numel()
            keep = torch.tensor([at + i not in gone for i in range(size)]).reshape(means[name].shape)
            keep = keep.repeat_interleave(4, 0).repeat_interleave(2, 1)
            assert bits(found[name]) == bits(tensors[name].where(keep, 0))
            at += size


def test_npz_and_safetensors_lose_the_same_weights(tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in model(torch.float32).items()}
    arrays = {name: arrays[name] for name in sorted(arrays)}
    np.savez_compressed(tmp_path / "a.npz", **arrays, ids=np.arange(4))
    save_file({name: torch.tensor(array) for name, array in arrays.items()}, tmp_path / "a.safetensors")
    for settings_ in (PruneFile(0.6), PruneFile(0.6, "global"), PruneFile(pattern=NM(1, 4))):
        settings_.run(tmp_path / "a.npz", tmp_path / "b.npz")
        settings_.run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
        pruned = load_file(tmp_path / "b.safetensors")
        with np.load(tmp_path / "b.npz") as found:
            assert found["ids"].tolist() == [0, 1, 2, 3]
            assert all(found[name].tobytes() == pruned[name].numpy().tobytes() for name in arrays)


def test_arrays_stored_by_columns_or_the_other_way_round_are_pruned_where_the_pattern_allows(tmp_path):
    array = np.random.default_rng(0).standard_normal((4, 8))
    np.savez(tmp_path / "a.npz", columns=np.asfortranarray(array), big=array.astype(">f8"))
    PruneFile(0.5).run(tmp_path / "a.npz", tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as found:
        expected = np.where(np.abs(array) > np.sort(np.abs(array), axis=None)[15], array, 0)
        assert found["columns"].tolist() == found["big"].tolist() == expected.tolist()
        assert found["columns"].flags.f_contiguous and found["big"].dtype == ">f8"
    done = PruneFile(pattern=NM(2, 4)).run(tmp_path / "a.npz", tmp_path / "b.npz")
    assert [skip.place for skip in done.skips] == ["columns"] and "ascontiguousarray" in done.skips[0].reason


def test_a_sharded_checkpoint_loses_what_one_file_would(tmp_path):
    tensors = model(torch.bfloat16)
    (tmp_path / "in").mkdir()
    shards = {"a.weight": "x-1.safetensors", "b.weight": "x-1.safetensors", "c.weight": "x-2.safetensors"}
    for shard in ("x-1.safetensors", "x-2.safetensors"):
        save_file({n: tensors[n] for n, s in shards.items() if s == shard}, tmp_path / "in" / shard, {"format": "pt"})
    (tmp_path / "in" / "x.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    save_file(tensors, tmp_path / "a.safetensors")
    done = PruneFile(0.8, "global").run(tmp_path / "in", tmp_path / "out")
    PruneFile(0.8, "global").run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    found = load_file(tmp_path / "out" / "x-1.safetensors") | load_file(tmp_path / "out" / "x-2.safetensors")
    expected = load_file(tmp_path / "b.safetensors")
    assert all(bits(found[name]) == bits(expected[name]) for name in tensors)
    assert done.zeros == sum(int((tensor == 0).sum()) for tensor in found.values())
    assert (tmp_path / "out" / "x.safetensors.index.json").exists()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("pattern", [PruneFile.pattern, NM(2, 4), Block(2, 2)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_that_are_not_finite_are_counted_and_refused_by_name(tmp_path, small_pieces, dtype, pattern, scope):
    tensors = model(dtype)
    tensors["c.weight"].view(-1)[[3, 40]] = float("nan")
    tensors["c.weight"].view(-1)[30] = -float("inf")
    save_file(tensors, tmp_path / "a.safetensors")
    settings_ = PruneFile(pattern=pattern) if isinstance(pattern, NM) else PruneFile(0.5, scope, pattern)
    with pytest.raises(InputError, match=r"c.weight: .*2 NaN and 1 infinite of 48"):
        settings_.run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    PruneFile(0.5, where=("a*", "b*")).run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


class Said(Progress):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.mark.parametrize("pattern", [PruneFile.pattern, Block(2, 2)])
def test_a_tensor_that_would_be_emptied_is_refused_unless_asked_and_then_warned_about(tmp_path, pattern):
    tensors = {"large": torch.ones(10, 10), "small": torch.full((2, 4), 1e-3), "zero": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"1 of 3 tensors would lose every weight.*small F32 \[2, 4\]"):
        PruneFile(0.5, "global", pattern).run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
    said = Said()
    done = PruneFile(0.5, "global", pattern, allow_empty=True).run(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", said
    )
    assert done.zeros == 56 and set(said.lines) == {"warning: nothing is left of small F32 [2, 4]"}


def test_a_tensor_emptied_by_ties_alone_is_refused_too(tmp_path):
    save_file({"a": torch.ones(1, 4), "b": torch.ones(1, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"would lose every weight.*a F32 \[1, 4\]"):
        PruneFile(0.5, "global").run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_names_choose_tensors_and_sparsities(tmp_path):
    tensors = {"enc.0.weight": torch.randn(10, 10), "enc.0.bias": torch.randn(10), "head.weight": torch.randn(10, 10)}
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, source)

    def zeros(settings_):
        return {row.name: row.zeros for row in settings_.run(source, out).tensors}

    assert zeros(PruneFile(0.5)) == {"enc.0.weight": 50, "head.weight": 50}
    assert zeros(PruneFile(0.5, where=("enc*",))) == {"enc.0.weight": 50, "enc.0.bias": 5}
    assert zeros(PruneFile({"enc*": 0.3, "*": 0.9})) == {"enc.0.weight": 30, "head.weight": 90}
    done = PruneFile({"enc*": 0.3}).run(source, out)
    assert {skip.place: skip.reason for skip in done.skips}["head.weight"] == "no sparsity is given for its name"
    assert [row.name for row in prune_file(source, out, 0.5, where="enc*").tensors] == ["enc.0.bias", "enc.0.weight"]
    for settings_ in (PruneFile(0.5, where=("encoder*",)), PruneFile({"encoder*": 0.5})):
        with pytest.raises(InputError, match="Nearest names: enc.0"):
            settings_.run(source, out)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PruneFile(), "no sparsity"),
        (lambda: PruneFile(1.0), "0 <= sparsity < 1"),
        (lambda: PruneFile(-0.1), "0 <= sparsity < 1"),
        (lambda: PruneFile(float("nan")), "0 <= sparsity < 1"),
        (lambda: PruneFile({"a": 2}), "a: out of range"),
        (lambda: PruneFile({"a": 0.5}, "global"), "need scope layer"),
        (lambda: PruneFile(0.5, "model"), "layer or global"),
        (lambda: PruneFile(0.6, pattern=NM(2, 4)), "its own sparsity in every group, 0.5"),
        (lambda: PruneFile(pattern=NM(2, 4), scope="global"), "Leave sparsity and scope out"),
        (lambda: PruneFile(0.5, pattern=Rows()), "for models only"),
        (lambda: PruneFile("0.9"), "PruneFile.sparsity: wrong type"),
        (lambda: PruneFile({"a": "0.9"}), r"PruneFile.sparsity\['a'\]: wrong type"),
        (lambda: PruneFile(0.5, where="*.weight"), "PruneFile.where: wrong type"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_file_in_which_nothing_can_be_pruned_is_refused(tmp_path):
    save_file(
        {"ids": torch.ones(2, 2).int(), "bias": torch.ones(3), "none": torch.ones(0, 3)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(InputError, match=r"no tensor can be pruned.*I32 is copied"):
        PruneFile(0.5).run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="never changed"):
        PruneFile(0.5).run(tmp_path / "a.safetensors", tmp_path / "a.safetensors")


def test_groups_too_large_for_an_encoding_are_pruned_all_the_same(tmp_path):
    save_file({"w": torch.randn(4, 512)}, tmp_path / "a.safetensors")
    done = PruneFile(pattern=NM(2, 512)).run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert done.zeros == 4 * 510 and done.tensors[0].encoding in ("csr", "coo")


def test_the_result_says_what_a_dense_file_takes_and_what_the_smallest_encoding_would(tmp_path):
    save_file({"w": torch.randn(100, 100), "n": torch.randn(8, 8)}, tmp_path / "a.safetensors")
    done = PruneFile(0.9).run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    row = next(row for row in done.tensors if row.name == "w")
    assert (row.dense_bytes, row.encoding, row.smallest_bytes) == (40_000, "csr", 1000 * 4 + 1000 * 1 + 101 * 2)
    told = json.loads(json.dumps(done.to_json()))
    assert told["zeros"] == 9000 + 57 and told["sparsity"] == pytest.approx(9057 / 10_064)


@pytest.mark.parametrize("settings_", [PruneFile(0.5, "global"), PruneFile(0.5), PruneFile(pattern=NM(2, 4))])
def test_a_tensor_many_times_larger_than_a_piece_takes_no_more_memory(tmp_path, settings_):
    import tracemalloc

    source, rows = tmp_path / "a.safetensors", 12_000
    header = json.dumps({"w": {"dtype": "F32", "shape": [rows, 4096], "data_offsets": [0, rows * 4096 * 4]}}).encode()
    with open(source, "wb") as file:  # a hole of 187 MiB, and numbers behind it
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek((rows - 1000) * 4096 * 4, 1)
        file.write(np.random.default_rng(0).standard_normal(1000 * 4096, dtype=np.float32))
    tracemalloc.start()
    done = settings_.run(source, tmp_path / "b.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 90 * 2**20 < rows * 4096 * 4 / 2, f"{peak / 2**20:.0f} MiB"
    assert done.zeros == (rows - 1000) * 4096 + (1000 * 4096 // 2 if isinstance(settings_.pattern, NM) else 0)
