"""Codecs that lose nothing.

`e4` stores a bfloat16 number in 12 bits: sign and fraction as they are, and the exponent as its
distance from the largest one near it, as neighbours in a KV cache are of similar size. `zstd` and
`lz4` compress planes of equal bytes of all numbers; they take far more time, for slow links.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from kvstore._native import e4_bytes, e4_decode, e4_encode, xxh3_64
from kvstore.codecs.base import Body
from kvstore.memory.bounce import memory_at


class E4:
    """See above."""

    name: Final = "e4"
    number: Final = 1

    def room(self, nbytes: int, dtype: str) -> int | None:
        """See `Codec.room`."""
        return e4_bytes(nbytes // 2) if dtype == "bfloat16" else None

    def encode(self, src: int, nbytes: int, width: int, dst: int, room: int) -> Body | None:
        """See `Codec.encode`."""
        coded = e4_encode(dst, src, nbytes // width) if e4_bytes(nbytes // width) <= room else None
        return None if coded is None else Body(e4_bytes(nbytes // width), *coded)

    def decode(self, src: int, body: Body, dst: int, nbytes: int) -> int | None:
        """See `Codec.decode`."""
        if nbytes % 2 or body.nbytes != e4_bytes(nbytes // 2) or body.extra > nbytes:
            return None
        try:
            return e4_decode(dst, src, nbytes // 2, body.extra)
        except ValueError:  # More escapes than there can be.
            return None


class Planes:
    """Compresses planes of equal bytes of all numbers, by a library.

    Args:
        name, number: as in `Codec`.
        share: of the plain bytes that coded ones may take, of bfloat16 and of other numbers.
        compress: the bytes given.
        inflate: the bytes given, to so many at most; raises where they are more, or damaged.
    """

    def __init__(
        self,
        name: str,
        number: int,
        share: tuple[float, float],
        compress: Callable[[Any], bytes],
        inflate: Callable[[Any, int], bytes],
    ) -> None:
        self.name, self.number = name, number
        self._share, self._compress, self._inflate = share, compress, inflate

    def room(self, nbytes: int, dtype: str) -> int | None:
        """See `Codec.room`."""
        return int(self._share[dtype != "bfloat16"] * nbytes)

    def encode(self, src: int, nbytes: int, width: int, dst: int, room: int) -> Body | None:
        """See `Codec.encode`."""
        plain = np.frombuffer(memory_at(src, nbytes), f"<u{width}")
        planes = np.empty((width, len(plain)), np.uint8)
        for number, plane in enumerate(planes):
            np.copyto(plane, plain >> (8 * number), casting="unsafe")
        coded = self._compress(planes.data)
        if len(coded) > room:
            return None
        memory_at(dst, len(coded))[:] = coded
        return Body(len(coded), width, xxh3_64(src, nbytes))

    def decode(self, src: int, body: Body, dst: int, nbytes: int) -> int | None:
        """See `Codec.decode`."""
        try:
            planes = self._inflate(memory_at(src, body.nbytes), nbytes)
        except Exception:  # noqa: BLE001 - whatever the library says of damage
            return None
        width = body.extra
        if len(planes) != nbytes or width not in (1, 2, 4) or nbytes % width:
            return None
        plain = np.frombuffer(memory_at(dst, nbytes), f"<u{width}")
        plain[:] = 0
        for number, plane in enumerate(np.frombuffer(planes, np.uint8).reshape(width, -1)):
            plain |= plane.astype(plain.dtype) << (8 * number)
        return xxh3_64(dst, nbytes)


def zstd() -> Planes:
    """Zstandard at its fastest ordinary level."""
    import zstandard

    def compress(data: Any) -> bytes:  # A context belongs to one thread at a time.
        return zstandard.ZstdCompressor(level=1).compress(data)

    def inflate(data: Any, nbytes: int) -> bytes:
        if zstandard.frame_content_size(data) != nbytes:
            raise ValueError("not so many bytes")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=nbytes)

    return Planes("zstd", 2, (0.72, 0.85), compress, inflate)


def lz4() -> Planes:
    """LZ4: faster, for less."""
    import lz4.block

    def compress(data: Any) -> bytes:
        return lz4.block.compress(data, store_size=False)  # type: ignore[no-any-return]

    def inflate(data: Any, nbytes: int) -> bytes:
        return lz4.block.decompress(data, uncompressed_size=nbytes)  # type: ignore[no-any-return]

    return Planes("lz4", 3, (0.88, 0.9), compress, inflate)
