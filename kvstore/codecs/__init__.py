"""How objects are coded in a tier, by name."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Final

from kvstore.blocks.spec import MAX_OBJECT_BYTES
from kvstore.errors import missing

if TYPE_CHECKING:
    from kvstore.codecs.base import Codec

RAW: Final = "raw"
"""The bytes as they are."""
AUTO: Final = "auto"
"""`e4` where it brings bytes sooner than `raw`, as measured."""
# In the order of their numbers, from 1 on.
_BUILT_IN: Final = {
    "e4": "kvstore.codecs.lossless:E4",
    "zstd": "kvstore.codecs.lossless:zstd",
    "lz4": "kvstore.codecs.lossless:lz4",
}
CODECS: Final = (RAW, *_BUILT_IN)


@cache
def find(name: str) -> Codec:
    """The codec of that name, one of `CODECS` but for `raw`.

    Raises:
        ConfigError: its package is not there; says what to do.
    """
    module, _, function = _BUILT_IN[name].partition(":")
    try:
        codec: Codec = getattr(import_module(module), function)()
    except ImportError as e:
        raise missing(f"codec {name}", name, e) from e
    return codec


def frame_checksum(address: int, nbytes: int) -> int | None:
    """The checksum that stands for the frame in this memory, if it is whole; to look for damage."""
    from kvstore.codecs.base import decode, read_header
    from kvstore.memory.bounce import Bounce

    header = read_header(address)
    if header is None or not 0 < header.nbytes <= MAX_OBJECT_BYTES:
        return None
    names = dict(enumerate(_BUILT_IN, 1))
    if header.codec not in names:
        return None
    plain = Bounce(header.nbytes)
    return decode(find(names[header.codec]), nbytes, address, plain.address, header.nbytes)
