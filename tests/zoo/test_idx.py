import gzip
import struct

import pytest
import torch

from tersor.core.errors import InputError
from tersor.zoo.idx import read_idx


def idx(tensor):
    return struct.pack(f">BBBB{tensor.ndim}I", 0, 0, 8, tensor.ndim, *tensor.shape) + tensor.numpy().tobytes()


@pytest.mark.parametrize("shape", [(5,), (3, 4, 2)])
@pytest.mark.parametrize("packed", [False, True])
def test_reads_plain_and_gzipped_files(tmp_path, shape, packed):
    torch.manual_seed(0)
    tensor = torch.randint(256, shape, dtype=torch.uint8)
    path = tmp_path / ("file.gz" if packed else "file")
    path.write_bytes(gzip.compress(idx(tensor)) if packed else idx(tensor))
    assert torch.equal(read_idx(path), tensor)


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("file", lambda data: data[:-1], "truncated or too long. Got 23 bytes; expected 24 bytes"),
        ("file", lambda data: data + b"x", "truncated or too long"),
        ("file", lambda data: b"\x89PNG" + data, "not an idx file"),
        ("file", lambda data: data[:6], "not an idx file"),
        ("file", lambda data: b"", "not an idx file"),
        ("file.gz", lambda data: data, "cannot be read"),
        ("file.gz", lambda data: gzip.compress(data)[:-4], "cannot be read"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, name, change, says):
    path = tmp_path / name
    path.write_bytes(change(idx(torch.zeros(3, 4, dtype=torch.uint8))))
    with pytest.raises(InputError, match=says) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
