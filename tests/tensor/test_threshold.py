import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.tensor import threshold as module
from tersor.tensor.masks import keep_largest
from tersor.tensor.threshold import Threshold, find_threshold, smallest

CEILING = {np.uint16: 0x7C00, np.uint32: 0x7F80_0000, np.uint64: 0x7FF0_0000_0000_0000}


class Counted:
    """Pieces of an array of keys, and how often they were asked for."""

    def __init__(self, keys, size):
        self.keys, self.size, self.passes = keys, size, 0

    def __call__(self):
        self.passes += 1
        return (self.keys[i : i + self.size] for i in range(0, len(self.keys), self.size))


def removed(pieces, threshold):
    found = []
    for keys in pieces():
        mask, threshold = smallest(keys, threshold)
        found.append(mask)
    return np.concatenate(found), threshold


keys_of = {
    dtype: st.one_of(st.integers(0, ceiling - 1), st.integers(0, 3), st.integers(ceiling - 3, ceiling - 1))
    for dtype, ceiling in CEILING.items()
}


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(list(CEILING)), size=st.integers(1, 20), data=st.data())
def test_the_k_smallest_are_those_of_a_stable_sort_whatever_the_sample_says(dtype, size, data):
    keys = np.array(data.draw(st.lists(keys_of[dtype], min_size=1, max_size=60)), dtype)
    k = data.draw(st.integers(0, len(keys)))
    sample = np.array(data.draw(st.lists(keys_of[dtype], max_size=9)), dtype)[:, None]
    pieces = Counted(keys, size)
    mask, rest = removed(pieces, find_threshold(pieces, k, len(keys), ceiling=CEILING[dtype], sample=sample))
    expected = np.zeros(len(keys), bool)
    expected[np.argsort(keys, kind="stable")[:k]] = True
    assert mask.tolist() == expected.tolist()
    assert rest.ties == 0


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.999])
def test_one_pass_is_enough_where_the_sample_is_fair(sparsity):
    weights = np.random.default_rng(0).standard_normal(2**20, dtype=np.float32)
    keys = weights.view(np.uint32) & np.uint32(0x7FFF_FFFF)
    pieces = Counted(keys, 50_000)
    k = int(sparsity * len(keys))
    sample = keys.reshape(-1, 256)[::8]
    most_bins = module._MOST_BINS
    found = find_threshold(pieces, k, 16 * most_bins, ceiling=CEILING[np.uint32], sample=None)
    assert pieces.passes == 2  # 22 of 31 bits, then the rest
    pieces.passes = 0
    assert find_threshold(pieces, k, len(keys), ceiling=CEILING[np.uint32], sample=sample) == found
    assert pieces.passes <= 2
    mask, _ = removed(pieces, found)
    assert (~mask).tolist() == keep_largest(np.abs(weights), k).tolist()


def test_a_sample_from_the_wrong_place_costs_passes_and_nothing_else():
    keys = np.arange(100_000, dtype=np.uint32)
    for wrong in (np.zeros((5, 5), np.uint32), np.full((5, 5), 99_999, np.uint32)):
        assert find_threshold(lambda: [keys], 777, len(keys), ceiling=2**31, sample=wrong) == Threshold(776, 1)


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="not as many"):
        find_threshold(lambda: [np.arange(3, dtype=np.uint16)], 4, 4, ceiling=100)
    with pytest.raises(ValueError, match="not as many"):
        find_threshold(lambda: [np.arange(3, dtype=np.uint16)], -1, 3, ceiling=100)


def test_half_precision_with_thousands_of_ties_is_exact():
    keys = np.random.default_rng(1).standard_normal(200_000).astype(np.float16).view(np.uint16) & np.uint16(0x7FFF)
    pieces = Counted(keys, 7_777)
    found = find_threshold(pieces, 123_457, len(keys), ceiling=CEILING[np.uint16], sample=keys.reshape(-1, 100)[::10])
    mask, _ = removed(pieces, found)
    assert mask.sum() == 123_457 and keys[mask].max() <= keys[~mask].min()
