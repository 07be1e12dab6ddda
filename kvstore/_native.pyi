"""Native core: block copies, XXH3 checksums, token-chain keys and the policy ``forecast``.

Addresses are plain integers (``array.ctypes.data``, ``tensor.data_ptr()``); the caller keeps the
memory alive and mapped during the call. Sizes are in bytes. Every argument is checked before any
memory is touched: a bad value, shape or dtype raises ``ValueError`` naming the argument, an object
of the wrong kind ``TypeError``. The functions release the GIL while they work on memory and may be
called from several threads at once, as long as no two calls write to the same bytes.

The instructions in use are chosen once, at import; the environment variable ``KVSTORE_CPU``
(a comma-separated list such as ``avx2,sha``, or ``portable``) limits the choice.
"""

import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def cpu_features() -> list[str]:
    """The optional instruction sets in use: any of ``avx2``, ``avx512``, ``sha``."""

def xxh3_64(address: int, nbytes: int) -> int:
    """XXH3 (64 bits, seed 0, default secret) of ``nbytes`` bytes at ``address``."""

def copy(dst: int, src: int, nbytes: int, threads: int = 1) -> None:
    """Copy ``nbytes`` bytes with non-temporal stores: the data does not displace the caches.

    Any alignment. The ranges must not overlap (``ValueError``). ``threads`` (1 to 256) share the
    work from 4 MiB on.
    """

def copy_blocks(
    to_slots: bool,
    segments: NDArray[np.int64],
    page_ids: NDArray[np.int64],
    slots: NDArray[np.uint64],
    page_tokens: int,
    elem_size: int,
    threads: int = 1,
    checksum: bool = False,
) -> list[int] | None:
    """Copy B blocks of P pages each between an engine's paged memory and slots.

    ``to_slots=True`` gathers memory into slots, ``False`` scatters slots into memory.

    ``page_ids``
        int64 ``(B, P)``, C-contiguous: page p of block b is page ``page_ids[b, p]`` of the
        memory. -1 skips the page, which only scattering allows; its memory is left as it is.
    ``slots``
        uint64 ``(B,)``: the address of each block's object.
    ``segments``
        int64 ``(S, 11)``, C-contiguous, one row per (layer, plane): ``mem_address, page_stride,
        token_stride, head_stride, channel_stride, slot_offset, slot_token_stride,
        slot_head_stride, slot_channel_stride, heads, channels``. Strides and offsets are in
        bytes; memory strides may be negative, slot strides and ``slot_offset`` may not.
    ``page_tokens``
        tokens in a page, 1 to 2**24.
    ``elem_size``
        bytes of an element: 1, 2, 4 or 8.
    ``threads``
        1 to 256; they take whole blocks, and only from 4 MiB in total on.

    Element (token t of page p, head h, channel c) is in memory at ``mem_address +
    page_ids[b, p] * page_stride + t * token_stride + h * head_stride + c * channel_stride`` and in
    the slot at ``slots[b] + slot_offset + (p * page_tokens + t) * slot_token_stride +
    h * slot_head_stride + c * slot_channel_stride``.

    With ``checksum=True`` returns B numbers: the XXH3 of each whole slot, from byte 0 to the end of
    the last segment (also if pages were skipped). The segments must then cover the slot without
    holes (``ValueError``). If they do so in memory runs that are multiples of 64 bytes and follow
    each other in the slot, the hash is computed while copying; otherwise in a second pass. Returns
    ``None`` without ``checksum``.

    The memory of the engine and the slots must not overlap, nor may two pages or slots that are
    written: neither is checked. The arrays are copied before the GIL is released.
    """

def e4_bytes(values: int) -> int:
    """Bytes of so many bfloat16 numbers, 1 to 2**31, as ``e4_encode`` writes them."""

def e4_encode(dst: int, src: int, values: int) -> tuple[int, int] | None:
    """Code ``values`` bfloat16 numbers at ``src`` into ``e4_bytes(values)`` bytes at ``dst``.

    Returns how many escapes there are, and the XXH3 of the numbers' bytes; None if there are too
    many, and what ``dst`` holds then is of no use. See docs/formats.md.
    """

def e4_decode(dst: int, src: int, values: int, escapes: int) -> int | None:
    """The reverse of ``e4_encode``; returns the XXH3 of what it has written to ``dst``.

    None where the escapes are not in order or not of these values. Whatever lies at ``src``,
    nothing beyond the sizes that follow from ``values`` is read or written.
    """

def call_copies(
    function_address: int,
    dst: NDArray[np.uint64],
    src: NDArray[np.uint64],
    sizes: NDArray[np.uint64],
    stream: int,
) -> tuple[int, int]:
    """Call ``int (*)(uint64_t dst, uint64_t src, size_t n, void* stream)`` for each copy in turn.

    ``dst``, ``src`` (addresses) and ``sizes`` (bytes) are uint64 ``(N,)``, C-contiguous, and must
    not change during the call. Ends at the first call that does not return 0. Returns how many
    did, and what the last call returned. The function must be safe to call without the GIL.
    """

def chain_keys(
    parent: bytes, tokens: NDArray[np.uint32] | array.array[int] | memoryview, block_tokens: int
) -> bytes:
    """The chained SHA-256 keys of all whole blocks of ``tokens``, 32 bytes each, concatenated.

    ``key[i] = SHA-256(key[i-1] || tokens of block i as little-endian uint32)`` with ``key[-1] =
    parent`` (32 bytes). ``tokens`` is a one-dimensional C-contiguous array or buffer of uint32;
    those after the last whole block of ``block_tokens`` (1 to 2**24) are ignored. ``tokens`` must
    not change during the call.
    """

def pack_u32(values: list[int]) -> bytes:
    """The values as native unsigned 32-bit integers, joined.

    Raises ``OverflowError`` for a value below 0 or above 2**32 - 1, ``TypeError`` for one that is
    no ``int``. Holds the GIL: about 5 ns a value.
    """

def stream_block(
    to_slots: bool,
    segments: NDArray[np.int64],
    page_ids: NDArray[np.int64],
    page_tokens: int,
    elem_size: int,
) -> BlockStream | None:
    """One block, whose pages ``page_ids`` (1, P) names, to go through a buffer smaller than it.

    Arguments as for ``copy_blocks``; the memory must stay while the stream is in use. None where
    the block's bytes do not follow each other in whole lines of 64 bytes, or a page is -1.
    """

class BlockStream:
    """See ``stream_block``. Only one thread at a time may use an object."""

    def next(self, capacity: int) -> int:
        """Bytes of the next piece in a buffer of ``capacity`` (64 KiB at least); 0 at the end."""

    def take(self, buffer: int) -> None:
        """Copy that piece between the pages and the address ``buffer``, and hash it. Once each."""

    def digest(self) -> int:
        """The XXH3 of the block, once all pieces have been taken."""

class Xxh3Stream:
    """XXH3 of data that comes in pieces. Only one thread at a time may use an object.

    Every piece but the last must be a multiple of 64 bytes: once a piece was not, further
    non-empty pieces raise ``ValueError``.
    """

    def __init__(self) -> None: ...
    def update(self, src: int, nbytes: int, dst: int = 0) -> None:
        """Add a piece to the hash, and copy it to ``dst`` in the same pass (0: nowhere).

        The ranges must not overlap. Uses non-temporal stores if ``dst`` is a multiple of 64.
        """

    def digest(self) -> int:
        """The hash of all pieces so far, equal to ``xxh3_64`` of their concatenation."""

class Asked:
    """What requests ask for; see ``kvstore.memory.habits``. Numbers are packed float64.

    The first ``uses``, the number of ``turns`` and the first numbers of ``fresh`` blocks make the
    classes, ``edges`` (seconds) the ages.
    """

    seen: bytes
    """How much was used at each age of each class; then how much was not, and is forgotten."""
    worth: bytes
    """Of each age of each class."""

    def __init__(
        self, uses: Sequence[int], turns: int, fresh: Sequence[int], edges: Sequence[float]
    ) -> None: ...
    def __len__(self) -> int: ...
    def __contains__(self, key: bytes) -> bool: ...
    def ask(self, keys: Iterable[bytes], parent: bytes, now: float) -> Iterator[None]:
        """A request asks for these blocks, its whole prompt, or what comes after ``parent``.

        Each step deals with some of them.
        """

    def waited(self, now: float) -> bytes:
        """How much was not used by each age of each class: it is forgotten, or waits still."""

    def find(self, key: bytes) -> tuple[int, float] | None:
        """The class of a block, and when it was asked for; None: nobody remembers it."""

class Forecast:
    """See ``kvstore.memory.forecast``. Of nodes, ``owner``, ``mark`` and ``after`` are used."""

    def __init__(self, asked: Asked) -> None: ...
    def __len__(self) -> int: ...
    def add(self, node: Any, older_than: Any = None) -> None: ...
    def touch(self, node: Any) -> None: ...
    def renew(self, node: Any) -> None: ...
    def cool(self, node: Any) -> None: ...
    def remove(self, node: Any, *, evicted: bool = False) -> None: ...
    def victims(self, newcomer: Any, now: float) -> Iterator[Any]:
        """Nodes, best victim first, until others are asked for; see ``Lru.candidates``."""

    def outweighs(self, newcomer: Any, victim: Any, now: float) -> bool: ...
