import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.tensor.packing import pack, packed_bytes, unpack

MAKERS = [np.asarray, torch.tensor]


def naive(row, bits):
    """One long integer, the first number lowest, as little-endian bytes."""
    stream = sum(int(q) << (bits * i) for i, q in enumerate(row))
    return list(stream.to_bytes(-(-len(row) * bits // 8), "little"))


@settings(deadline=None)
@given(
    bits=st.integers(2, 8), rows=st.integers(0, 3), n=st.integers(0, 40), seed=st.integers(0, 99), signed=st.booleans()
)
def test_every_width_packs_as_one_stream_of_bits_and_comes_back(bits, rows, n, seed, signed):
    offset = 2 ** (bits - 1) if signed else 0
    stored = np.random.default_rng(seed).integers(0, 2**bits, size=(rows, n))
    for make in MAKERS:
        q = make(stored - offset)
        packed = pack(q, bits, signed=signed)
        assert packed.shape == (rows, packed_bytes(n, bits)) and packed.dtype in (np.uint8, torch.uint8)
        assert packed.tolist() == [naive(row, bits) for row in stored]
        back = unpack(packed, bits, n, signed=signed)
        assert back.dtype in ((np.int8, torch.int8) if signed else (np.uint8, torch.uint8))
        assert back.tolist() == q.tolist()


@pytest.mark.parametrize("make", MAKERS)
def test_four_bits_are_low_nibble_then_high_nibble_of_each_group_as_matmul_n_bits_reads_them(make):
    q = make([[[-8, 7, 0, 1], [2, 3, -1, -2]]])  # [rows, groups, group_size]
    assert pack(q, 4, signed=True).tolist() == [[[0xF0, 0x98], [0xBA, 0x67]]]


@pytest.mark.parametrize("make", MAKERS)
def test_what_cannot_be_stored_or_was_damaged_is_refused(make):
    for wrong in ([8], [-9]):
        with pytest.raises(ValueError, match=r"for 4 bits: expected -8 to 7"):
            pack(make(wrong), 4, signed=True)
    with pytest.raises(ValueError, match="2 to 8 bits"):
        pack(make([1]), 9)
    packed = pack(make([1, 2, 3]), 3)
    with pytest.raises(ValueError, match=r"expected uint8 \[..., 3\]"):
        unpack(packed, 3, 8)
    packed[-1] |= 128
    with pytest.raises(ValueError, match="behind the last number"):
        unpack(packed, 3, 3)
