"""XXH3 and SHA-256 chains of the native core against independent implementations."""

import array
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from kvstore import _native

LARGE = [4096, 4097, 65_535, 65_536, 1_048_577]


@pytest.fixture(scope="module")
def data() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (1 << 20) + 64, dtype=np.uint8)


def reference(data: NDArray[np.uint8]) -> int:
    return xxhash.xxh3_64_intdigest(data.tobytes())


def test_every_short_length(data: NDArray[np.uint8]) -> None:
    for size in range(1101):
        assert _native.xxh3_64(data.ctypes.data, size) == reference(data[:size]), size


@pytest.mark.parametrize("size", LARGE)
def test_large(data: NDArray[np.uint8], size: int) -> None:
    assert _native.xxh3_64(data.ctypes.data, size) == reference(data[:size])


@pytest.mark.parametrize("offset", [1, 7, 8, 31, 33, 63])
def test_unaligned(data: NDArray[np.uint8], offset: int) -> None:
    for size in (3, 100, 239, 240, 241, 5000):
        part = data[offset : offset + size]
        assert _native.xxh3_64(part.ctypes.data, size) == reference(part)


def test_golden_xxh3() -> None:
    """Values of the reference implementation, independent of any package."""
    assert _native.xxh3_64(0, 0) == 0x2D06800538D394C2


def test_stream_of_every_length(data: NDArray[np.uint8]) -> None:
    assert _native.Xxh3Stream().digest() == reference(data[:0])
    for size in range(1, 2400, 7):
        stream = _native.Xxh3Stream()
        whole = size // 64 * 64
        stream.update(data.ctypes.data, whole)
        stream.update(data.ctypes.data + whole, size - whole)
        assert stream.digest() == reference(data[:size]), size


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("offset", [0, 32, 5])
def test_stream_of_random_pieces(data: NDArray[np.uint8], seed: int, offset: int) -> None:
    rng = np.random.default_rng(seed)
    target = np.zeros_like(data)
    shift = (-target.ctypes.data) % 64 + offset
    stream = _native.Xxh3Stream()
    size = 0
    for count in rng.integers(0, 40, 12):
        nbytes = 64 * int(count)
        if rng.integers(2):
            stream.update(data.ctypes.data + size, nbytes)
            target[shift + size : shift + size + nbytes] = data[size : size + nbytes]
        else:
            stream.update(data.ctypes.data + size, nbytes, target.ctypes.data + shift + size)
        size += nbytes
        assert stream.digest() == reference(data[:size])
    ragged = int(rng.integers(1, 64))
    stream.update(data.ctypes.data + size, ragged, target.ctypes.data + shift + size)
    size += ragged
    assert stream.digest() == reference(data[:size])
    assert np.array_equal(target[shift : shift + size], data[:size])
    assert not target[:shift].any()
    assert not target[shift + size :].any()


def test_stream_refuses_data_after_a_ragged_piece(data: NDArray[np.uint8]) -> None:
    stream = _native.Xxh3Stream()
    stream.update(data.ctypes.data, 70)
    stream.update(data.ctypes.data, 0)
    with pytest.raises(ValueError, match="nbytes"):
        stream.update(data.ctypes.data, 64)
    with pytest.raises(ValueError, match="nbytes"):
        stream.update(data.ctypes.data, 64, data.ctypes.data + 64)
    assert stream.digest() == reference(data[:70])


def test_bad_arguments(data: NDArray[np.uint8]) -> None:
    at = data.ctypes.data
    stream = _native.Xxh3Stream()
    with pytest.raises(ValueError, match="nbytes"):
        _native.xxh3_64(at, -1)
    with pytest.raises(ValueError, match="address"):
        _native.xxh3_64(0, 1)
    with pytest.raises(ValueError, match="address"):
        _native.xxh3_64(-8, 1)
    with pytest.raises(ValueError, match="src"):
        stream.update(0, 64)
    with pytest.raises(ValueError, match="dst"):
        stream.update(at, 64, -8)
    with pytest.raises(ValueError, match="overlap"):
        stream.update(at, 64, at + 63)
    assert stream.digest() == reference(data[:0])


def chain(parent: bytes, tokens: NDArray[np.uint32], block: int) -> bytes:
    keys = []
    for i in range(len(tokens) // block):
        words = tokens[i * block : (i + 1) * block].astype("<u4").tobytes()
        parent = hashlib.sha256(parent + words).digest()
        keys.append(parent)
    return b"".join(keys)


@pytest.mark.parametrize("block", [1, 5, 6, 7, 8, 16, 21, 22, 23, 64, 256])
def test_chain_keys(block: int) -> None:
    tokens = np.random.default_rng(block).integers(0, 2**32, 700, dtype=np.uint32)
    parent = bytes(range(32))
    for count in (0, block - 1, block, 3 * block + block // 2, 700):
        part = tokens[:count]
        assert _native.chain_keys(parent, part, block) == chain(parent, part, block)


def test_golden_chain() -> None:
    # SHA-256 of 32 zero bytes and the words 1 and 2.
    keys = _native.chain_keys(bytes(32), np.array([1, 2, 3], dtype=np.uint32), 2)
    assert keys.hex() == "e7ca17d6581d126af7e0c8574cdd8987ed93319969b54a5e2a272d585a38f3ea"


def test_chain_keys_of_buffers() -> None:
    tokens = np.arange(64, dtype=np.uint32)
    expected = chain(bytes(32), tokens, 16)
    frozen = tokens.copy()
    frozen.flags.writeable = False
    assert _native.chain_keys(bytes(32), frozen, 16) == expected
    assert _native.chain_keys(bytes(32), array.array("I", range(64)), 16) == expected
    assert _native.chain_keys(bytes(32), memoryview(tokens), 16) == expected


def test_chain_keys_bad_arguments() -> None:
    tokens = np.arange(64, dtype=np.uint32)
    with pytest.raises(ValueError, match="parent"):
        _native.chain_keys(bytes(31), tokens, 16)
    for block in (0, -1, 2**40):
        with pytest.raises(ValueError, match="block_tokens"):
            _native.chain_keys(bytes(32), tokens, block)
    for bad in (tokens.astype(np.int64), tokens[::2], tokens.reshape(8, 8)):
        with pytest.raises(ValueError, match="tokens"):
            _native.chain_keys(bytes(32), bad, 16)


def test_features_are_limited_by_the_environment() -> None:
    script = "from kvstore import _native; print(*_native.cpu_features())"
    for listed in ("portable", "avx2", "avx2,sha"):
        shown = subprocess.run(
            [sys.executable, "-P", "-c", script],
            env=os.environ | {"KVSTORE_CPU": listed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        assert set(shown) == set(listed.split(",")) & set(_native.cpu_features())


@pytest.mark.parametrize("cpu", ["portable", "avx2", "avx512", "sha"])
def test_dispatch(cpu: str) -> None:
    """The hashes on one instruction path only."""
    if cpu != "portable" and cpu not in _native.cpu_features():
        pytest.skip(f"no {cpu} here")
    chosen = ("-k", "not dispatch and not environment")
    subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, *chosen],
        env=os.environ | {"KVSTORE_CPU": cpu},
        check=True,
        timeout=120,
    )


def test_pack_u32() -> None:
    values = [0, 1, 255, 256, 2**31, 2**32 - 1] * 20
    assert _native.pack_u32(values) == np.array(values, dtype=np.uint32).tobytes()
    assert _native.pack_u32([]) == b""
    for bad, error in ((-1, OverflowError), (2**32, OverflowError), (2**70, OverflowError)):
        with pytest.raises(error):
            _native.pack_u32([1, bad])
    for wrong in ("1", 1.0, None):
        with pytest.raises(TypeError):
            _native.pack_u32([1, wrong])  # type: ignore[list-item]
