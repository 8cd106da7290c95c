import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tersor.tensor.encodings import Bitmap, Gaps, NOfM, gaps, is_n_of_m, places, sizes, sizes_of, smallest
from tersor.tensor.masks import n_of_m

MAKERS = [np.asarray, torch.tensor]
sparse_arrays = arrays(
    np.float32,
    array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
    elements=st.sampled_from([0, 0, 0, 1.5, -2]),
)


def narrowest(largest):
    return next(np.dtype(t).itemsize for t in (np.uint8, np.uint16, np.uint32, np.uint64) if largest <= np.iinfo(t).max)


@pytest.mark.parametrize("shape", [(30, 500), (500, 30), (3, 70_000)])
@pytest.mark.parametrize("make", MAKERS)
def test_compressed_rows_columns_and_coordinates_take_what_scipy_stores_at_the_narrowest_index(make, shape):
    rng = np.random.default_rng(0)
    array = np.where(rng.random(shape) < 0.1, rng.random(shape), 0).astype(np.float32)
    found = sizes(make(array))
    for name, stored in (("csr", scipy.sparse.csr_array(array)), ("csc", scipy.sparse.csc_array(array))):
        other = shape[1] if name == "csr" else shape[0]
        expected = stored.data.nbytes + stored.indices.size * narrowest(other - 1)
        assert found[name] == expected + stored.indptr.size * narrowest(stored.nnz)
    assert found["coo"] == np.count_nonzero(array) * (4 + sum(narrowest(side - 1) for side in shape))
    assert found["dense"] == array.nbytes


@given(array=sparse_arrays, make=st.sampled_from(MAKERS))
def test_a_bitmap_decodes_to_the_array_and_takes_the_bytes_it_says(array, make):
    stored = Bitmap.encode(make(array))
    np.testing.assert_array_equal(np.asarray(stored.decode()), array)
    assert (
        stored.nbytes == sizes(make(array))["bitmap"] == np.packbits(array.ravel() != 0).nbytes + stored.values.nbytes
    )
    assert np.asarray(stored.bits).tolist() == np.packbits(array.ravel() != 0).tolist()


@given(array=sparse_arrays, make=st.sampled_from(MAKERS))
def test_gaps_decode_to_the_array_and_take_the_bytes_they_say(array, make):
    stored = Gaps.encode(make(array))
    np.testing.assert_array_equal(np.asarray(stored.decode()), array)
    found = sizes(make(array))
    assert ("gaps" in found) == (8 * np.count_nonzero(array) < array.size)
    assert found.get("gaps", stored.nbytes) == stored.nbytes


@pytest.mark.parametrize("density", [0.0005, 0.004, 0.03, 0.12])
@pytest.mark.parametrize("make", MAKERS)
def test_gaps_are_never_larger_than_coordinates_or_compressed_rows(make, density):
    rng = np.random.default_rng(0)
    array = np.where(rng.random((300, 2000)) < density, 1, 0).astype(np.float32)
    array[:, :700] = 0
    stored, found = Gaps.encode(make(array)), sizes(make(array))
    np.testing.assert_array_equal(np.asarray(stored.decode()), array)
    assert stored.nbytes == found["gaps"] == found[smallest(found)]


def test_a_gap_that_is_longer_than_a_step_takes_several():
    keep = np.zeros(800, bool)
    keep[[0, 1, 257, 799]] = True
    assert gaps(keep).tolist() == [0, 0, 255, 0, 255, 255, 31, 0]
    assert places(gaps(keep), (800,)).tolist() == keep.tolist()
    few = np.arange(200_000) == 150_000
    assert gaps(few).dtype == np.uint16 and places(gaps(few), (2, 100_000)).reshape(-1).tolist() == few.tolist()


@given(
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8), (5, 16), (1, 1), (7, 20)]), groups=st.integers(0, 5),
    rows=st.integers(0, 4), dtype=st.sampled_from([np.float16, np.float32, np.float64]), make=st.sampled_from(MAKERS),
)  # fmt: skip
def test_n_of_m_decodes_to_the_array_and_takes_the_bytes_it_says(pattern, groups, rows, dtype, make):
    n, m = pattern
    scores = np.random.default_rng(groups).standard_normal((rows, groups * m))
    array = np.where(n_of_m(scores, n, m), scores, 0).astype(dtype)
    array.reshape(-1)[:1] = 0  # a group may also have fewer than n
    if array.size == 0:
        return
    stored = NOfM.encode(make(array), n, m)
    np.testing.assert_array_equal(np.asarray(stored.decode()), array)
    assert stored.nbytes == sizes_of(array.shape, array.itemsize, np.count_nonzero(array), [pattern])[f"{n}:{m}"]


@pytest.mark.parametrize("make", MAKERS)
def test_n_of_m_of_a_convolution_holds_along_its_input_channels(make):
    scores = np.random.default_rng(0).standard_normal((6, 8, 3, 2)).astype(np.float32)
    array = np.where(n_of_m(np.abs(scores), 2, 4, axis=1), scores, 0)
    stored = NOfM.encode(make(array), 2, 4)
    np.testing.assert_array_equal(np.asarray(stored.decode()), array)
    assert stored.nbytes == sizes(make(array))["2:4"] == array.nbytes // 2 + array.size // 2 * 2 // 8
    first = array[0, :4, 0, 0]
    np.testing.assert_array_equal(np.asarray(stored.values)[:2], first[first != 0])
    along_the_kernel = np.tile(np.array([1, 0, 0, 1], np.float32), (4, 8, 1))
    assert not is_n_of_m(make(along_the_kernel), 2, 4)


def test_n_of_four_adds_two_bits_for_each_value_that_is_kept():
    found = sizes_of((128, 128), 2, 128 * 64, [(2, 4)])
    assert found["2:4"] == found["bitmap"] == 128 * 64 * 2 + 128 * 64 * 2 // 8
    found = sizes_of((128, 128), 2, 128 * 32, [(1, 4)])
    assert found["1:4"] == 128 * 32 * 2 + 128 * 32 * 2 // 8 and smallest(found) == "1:4"


def test_the_encodings_of_bfloat16_keep_every_value():
    array = torch.randn(16, 32, generator=torch.manual_seed(0)).to(torch.bfloat16)
    array = array * n_of_m(array.abs(), 2, 4)
    assert torch.equal(Bitmap.encode(array).decode(), array)
    assert torch.equal(NOfM.encode(array, 2, 4).decode(), array)
    assert sizes(array)["dense"] == array.numel() * 2


def test_an_array_that_is_not_of_the_pattern_is_not_said_to_be():
    array = np.array([[1.0, 2.0, 0.0, 3.0]])
    assert not is_n_of_m(array, 2, 4) and "2:4" not in sizes(array)
    with pytest.raises(ValueError, match="not 2:4"):
        NOfM.encode(array, 2, 4)


def test_a_dense_array_is_smallest_dense():
    assert smallest(sizes(np.ones((8, 8), dtype=np.float32))) == "dense"


def test_damaged_encodings_are_refused():
    stored = Bitmap.encode(np.array([0.0, 1.0, 2.0]))
    for damaged in (
        Bitmap((3,), stored.bits, stored.values[:1]),
        Bitmap((30,), stored.bits, stored.values),
        Bitmap((3,), stored.bits | 1, stored.values),
        Bitmap((3,), stored.bits.astype(np.int16), stored.values),
    ):
        with pytest.raises(ValueError):
            damaged.decode()
    steps, values = np.array([1, 0, 0], np.uint8), np.array([1.0, 2.0])
    np.testing.assert_array_equal(Gaps((3,), steps, values).decode(), [0, 1, 2])
    for damaged in (
        Gaps((3,), steps, values[:1]), Gaps((4,), steps, values), Gaps((2,), steps, values),
        Gaps((2**40, 2**40), steps, values), Gaps((3,), steps[:-1], values), Gaps((3,), steps[:0], values),
        Gaps((255,), np.array([255], np.uint8), values[:0]),
        Gaps((3,), np.append(steps, 255).astype(np.uint8), values), Gaps((3,), steps.astype(np.int8), values),
        Gaps((3,), steps[None], values), Gaps((3,), steps, values[None]),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            damaged.decode()
    two_four = NOfM.encode(np.array([0.0, 1.0, 2.0, 0.0]), 2, 4)
    for damaged in (
        NOfM((4,), 2, 4, np.array([0b01010000], np.uint8), two_four.values),
        NOfM((8,), 2, 4, two_four.positions, two_four.values),
    ):
        with pytest.raises(ValueError):
            damaged.decode()
