"""The header of a segment: what comes back, and what hostile bytes come to."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore._native import xxh3_64
from kvstore.tiers.base import InSegment
from kvstore.tiers.conformance import segment_of
from kvstore.tiers.segments.format import (
    LARGEST_HEADER,
    Block,
    Segment,
    decode,
    encode,
    path_of,
    shape,
    shape_of,
)

NAME: InSegment = segment_of(1, 8192)[5]  # type: ignore[assignment]
BLOCKS = tuple(Block(key, n, 1000 + n, n % 2) for n, key in enumerate(NAME.keys))
SEGMENT = Segment(NAME.namespace.digest, NAME.part.variant, 8192, BLOCKS)
DATA = encode(SEGMENT)
END = 88 + 16 * 80


def sealed(data: bytearray, end: int = END) -> bytes:
    """With a checksum that fits what was changed."""
    import numpy as np

    body = np.frombuffer(bytes(data[:end]), np.uint8)
    struct.pack_into("<Q", data, end, xxh3_64(body.ctypes.data, end))
    return bytes(data)


def test_a_header_says_what_was_said() -> None:
    assert decode(DATA) == SEGMENT
    assert decode(DATA + b"blocks") == SEGMENT
    assert SEGMENT.is_of(NAME)
    assert (len(DATA), shape_of(NAME)) == (4096, (4096, 8192, 4096 + 16 * 8192))
    assert shape(64, 100) == (8192, 4096, 8192 + 64 * 4096)
    assert LARGEST_HEADER == 86016
    key = NAME.keys[-1].hex()
    assert path_of(NAME) == (
        f"v1/{NAME.namespace.digest.hex()}/{key[:2]}/{key}-{NAME.part.variant.hex()}"
    )


def test_every_bit_that_means_something_counts() -> None:
    for at in range(END + 8):
        data = bytearray(DATA)
        data[at] ^= 1 << at % 8
        assert decode(bytes(data)) is None, at


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [
        (8, "I", 2),  # version
        (12, "I", 15), (12, "I", 0), (12, "I", 1 << 31),  # blocks
        (16, "Q", 8192), (16, "Q", 0), (24, "Q", 1 << 62),  # header, total
        (32, "Q", 0), (32, "Q", 4096), (32, "Q", 1 << 40),  # bytes of a block
        (88 + 32, "Q", 0), (88 + 32, "Q", 1 << 63), (88 + 40, "Q", 8191),  # offset, stored
        (88 + 72, "I", 1), (88 + 76, "I", 1),  # codec, zero
    ],
)  # fmt: skip
def test_values_that_do_not_fit_together_are_refused(at: int, form: str, value: Any) -> None:
    data = bytearray(DATA)
    struct.pack_into(f"<{form}", data, at, value)
    assert decode(sealed(data)) is None


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_hostile_headers_are_refused_or_consistent(data: st.DataObject) -> None:
    raw = bytearray(DATA)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, END - 1))
        raw[at : at + 8] = data.draw(st.binary(min_size=1, max_size=8))
    raw = raw[: data.draw(st.integers(END + 8, len(raw)))]
    found = decode(sealed(raw))
    if found is not None:
        assert len(found.blocks) == 16
        assert found.nbytes == 8192


@given(st.binary(max_size=8192))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_no_header(data: bytes) -> None:
    assert decode(data) is None
    assert decode(DATA[:16] + data) is None
