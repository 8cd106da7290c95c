"""Inputs as a page can show them: pictures as PNG inside the page, numbers as text."""

from __future__ import annotations

import base64
import binascii
import math
import struct
import zlib

from tersor.core.errors import ArtifactError
from tersor.measure.behaviour.schema import Shown

_KINDS = {1: 0, 3: 2}  # channels → PNG's colour type
_LARGEST = 1024  # pixels of a side
_NUMBERS = 12


def picture_uri(shown: Shown) -> str:
    """The picture as ``data:image/png;base64,…``; empty where the input is no picture.

    Raises ArtifactError where bytes and shape do not belong together.
    """
    if shown.kind != "picture" or shown.pixels is None:
        return ""
    return f"data:image/png;base64,{base64.b64encode(png(_pixels(shown), shown.shape)).decode()}"


def png(pixels: bytes, shape: tuple[int, ...]) -> bytes:
    """A PNG of uint8 ``pixels`` row by row, ``shape`` [height, width, channels] with one channel (grey) or three (RGB).

    Source: ISO/IEC 15948, "Portable Network Graphics", section 11; every row is stored with filter 0.
    """
    height, width, channels = shape
    stride = width * channels
    rows = b"".join(b"\0" + pixels[at : at + stride] for at in range(0, height * stride, stride))
    header = struct.pack(">IIBBBBB", width, height, 8, _KINDS[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def numbers_text(shown: Shown) -> str:
    """The first numbers of an input that is no picture."""
    told = ", ".join(f"{value:.4g}" for value in shown.numbers[:_NUMBERS])
    more = " …" if math.prod(shown.shape) > _NUMBERS else ""
    return f"{shown.kind}: {told}{more}"


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _pixels(shown: Shown) -> bytes:
    shape = shown.shape
    fits = len(shape) == 3 and shape[-1] in _KINDS and all(0 < side <= _LARGEST for side in shape)
    try:
        pixels = base64.b64decode(shown.pixels or "", validate=True)
    except binascii.Error:
        pixels = b""
    if not fits or len(pixels) != math.prod(shape):
        raise ArtifactError(
            "a picture's bytes do not fit its shape", where="evaluation.json, flips.worst",
            got=f"{len(pixels)} bytes for {list(shape)}", expected="[height, width, 1 or 3], one byte each",
        )  # fmt: skip
    return pixels
