"""Reads the idx files of the MNIST family."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tersor.core.errors import InputError

UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor in an idx file, plain or gzipped. Raises InputError where the file is damaged or another kind.

    Format: two zero bytes, a type byte, the number of dimensions, each dimension as a big-endian 32-bit integer, data.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError("the file cannot be read", where=str(path), got=error, do="Fetch it again") from error
    if len(data) < 4 or data[:3] != bytes([0, 0, UNSIGNED_BYTE]) or len(data) < 4 + 4 * data[3]:
        raise InputError("not an idx file of bytes", where=str(path), got=data[:4].hex(" "), expected="00 00 08 …")
    header = 4 + 4 * data[3]
    shape = tuple(int(size) for size in np.frombuffer(data[4:header], ">u4"))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(data) != expected:
        raise InputError(
            "the file is truncated or too long", where=str(path), got=f"{len(data)} bytes",
            expected=f"{expected} bytes", do="Fetch it again",
        )  # fmt: skip
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy())
