"""Codecs that lose nothing: all bits come back, whatever they are; hostile frames harm nobody."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from kvstore._native import cpu_features, e4_bytes, e4_decode, e4_encode, xxh3_64
from kvstore.blocks.spec import Described, Group, Part
from kvstore.codecs import find
from kvstore.codecs.base import HEADER, coded_part, decode, encode, read_header

Values = np.ndarray[Any, np.dtype[np.uint16]]
GUARD = 256


def like_kv(count: int, seed: int = 0) -> Values:
    rng = np.random.default_rng(seed)
    found = rng.standard_normal(count) * np.exp(rng.standard_normal(64) / 2)[np.arange(count) % 64]
    return (found.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def with_some(count: int, *odd: int) -> Values:
    values = like_kv(count)
    values[:: max(1, count // 7)] = np.resize(np.array(odd, np.uint16), 8)[
        : len(values[:: max(1, count // 7)])
    ]
    return values


def there_and_back(values: Values, shift: int = 0) -> float | None:
    """The ratio, if they were coded; all bits come back, and nothing else is touched."""
    count, nbytes = len(values), e4_bytes(len(values))
    coded = np.full(GUARD + shift + nbytes + GUARD, 0xA5, np.uint8)
    at = coded.ctypes.data + GUARD + shift
    before = values.copy()
    told = e4_encode(at, values.ctypes.data, count)
    assert (values == before).all()
    assert (coded[: GUARD + shift] == 0xA5).all()
    assert (coded[GUARD + shift + nbytes :] == 0xA5).all()
    if told is None:
        return None
    escapes, checksum = told
    back = np.full(count + GUARD, 0x5A5A, np.uint16)
    assert e4_decode(back[GUARD // 2 :].ctypes.data, at, count, escapes) == checksum
    assert checksum == xxh3_64(values.ctypes.data, values.nbytes)
    assert (back[GUARD // 2 : GUARD // 2 + count] == values).all()
    assert (back[: GUARD // 2] == 0x5A5A).all()
    assert (back[GUARD // 2 + count :] == 0x5A5A).all()
    again = np.zeros(nbytes + GUARD, np.uint8)
    assert e4_encode(again.ctypes.data, values.ctypes.data, count) == told
    assert (again[:nbytes] == coded[GUARD + shift : GUARD + shift + nbytes]).all(), "one way alone"
    return values.nbytes / nbytes


@pytest.mark.parametrize("count", [1, 2, 31, 63, 64, 65, 127, 4095, 4096, 4097, 12345, 1 << 17])
@pytest.mark.parametrize("shift", [0, 8])
def test_all_bits_come_back(count: int, shift: int) -> None:
    assert there_and_back(like_kv(count), shift) is not None
    assert there_and_back(np.zeros(count, np.uint16), shift) is not None
    for odd in ((0x7F80, 0xFF80), (0x7FC0, 0xFFFF, 0x7F81), (0, 0x8000, 1), (0x7F7F, 0xFF7F)):
        there_and_back(with_some(count, *odd), shift)


def test_what_is_no_kv_is_left_as_it_is() -> None:
    noise = np.random.default_rng(1).integers(0, 1 << 16, 1 << 16).astype(np.uint16)
    assert there_and_back(noise) is None
    infinite = like_kv(1 << 16)
    infinite[::3] = 0x7F80
    assert there_and_back(infinite) is None


def test_a_few_infinities_take_no_room_from_the_others() -> None:
    values = like_kv(1 << 16)
    values[100::4096] = 0x7F80
    values[200::4096] = 0xFFFF
    assert (ratio := there_and_back(values)) is not None
    assert ratio > 1.32


@pytest.mark.parametrize("features", ["portable", "avx2", "avx2,avx512"])
def test_all_kernels_write_the_same(features: str) -> None:
    """The bytes in a shared tier are the same whatever machine has put them."""
    wanted = set(features.split(",")) - {"portable"}
    if not wanted <= set(cpu_features()):
        pytest.skip("this processor has them not")
    program = (
        "import numpy as np\n"
        "from kvstore._native import e4_bytes, e4_encode, e4_decode, xxh3_64\n"
        "v = np.random.default_rng(3).standard_normal(50001).astype(np.float32)\n"
        "v = (v.view(np.uint32) >> 16).astype(np.uint16); v[::900] = 0x7F80\n"
        "out = np.zeros(e4_bytes(len(v)), np.uint8); back = np.zeros_like(v)\n"
        "n, s = e4_encode(out.ctypes.data, v.ctypes.data, len(v))\n"
        "assert e4_decode(back.ctypes.data, out.ctypes.data, len(v), n) == s\n"
        "assert (back == v).all()\n"
        "print(n, s, xxh3_64(out.ctypes.data, out.nbytes))\n"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "KVSTORE_CPU": chosen},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for chosen in (features, "portable")
    ]
    assert told[0] == told[1]


TOKENS = 64
PART = Part(Group(layers=2, heads=2, channels=(64, 64), dtype="bfloat16"), Described("LPHNC"))


@pytest.mark.parametrize("name", ["e4", "zstd", "lz4"])
def test_hostile_frames(name: str) -> None:
    """Flipped, cut, lying: no other bytes than those that were coded come of it, nor more."""
    codec = find(name)
    part = coded_part(codec, PART, TOKENS)
    assert part is not None
    nbytes, room = PART.nbytes(TOKENS), part.nbytes(TOKENS)
    values = like_kv(nbytes // 2) & 0xFFE0
    good = np.zeros(room, np.uint8)
    checksum = encode(codec, PART, part, TOKENS, values.ctypes.data, good.ctypes.data)
    assert checksum == xxh3_64(values.ctypes.data, nbytes)
    header = read_header(good.ctypes.data)
    assert header is not None
    rng = random.Random(7)
    plain = np.empty(nbytes + GUARD, np.uint8)
    outcomes = set()
    for number in range(4000 if name == "e4" else 400):
        frame = good.copy()
        kind = number % 5
        if kind == 0:  # A bit of the header.
            frame[rng.randrange(HEADER)] ^= 1 << rng.randrange(8)
        elif kind == 1:  # A bit anywhere.
            frame[rng.randrange(room)] ^= 1 << rng.randrange(8)
        elif kind == 2:  # The end is missing.
            frame[rng.randrange(room) :] = 0
        elif kind == 3:  # A header that lies, and is whole.
            fields = list(struct.unpack_from("<4sBBHQQQQ16x", frame.tobytes()))
            fields[rng.randrange(4, 8)] = rng.choice(
                [0, 1, 2, 7, nbytes, room, 1 << 31, (1 << 64) - 1]
            )
            packed = np.frombuffer(struct.pack("<4sBBHQQQQ16x", *fields), np.uint8)
            frame[:56] = packed
            frame[56:64] = np.frombuffer(
                struct.pack("<Q", xxh3_64(frame.ctypes.data, 56)), np.uint8
            )
        else:  # Noise behind a good header.
            at = rng.randrange(HEADER, room - 64)
            frame[at : at + 64] = np.frombuffer(rng.randbytes(64), np.uint8)
        plain[:] = 0xC3
        told = decode(codec, room, frame.ctypes.data, plain.ctypes.data, nbytes)
        assert told in (None, checksum)
        if told is not None:
            assert plain[:nbytes].tobytes() == values.tobytes()
        assert (plain[nbytes:] == 0xC3).all()
        outcomes.add(told)
    assert outcomes == {None, checksum}
