"""The format of a slab and its table: the header, and where everything lies. No I/O here.

`docs/formats.md` describes every field. Integers are little-endian. Nothing read from the file is
used before its checksum and its bounds are checked, and nothing in it can execute.
"""

from __future__ import annotations

import secrets
import struct
import time
from pathlib import Path
from typing import Final

import msgspec

from kvstore.codecs.base import checksum
from kvstore.errors import ConfigError, FormatError
from kvstore.memory.slots import ALIGNMENT, align

MAGIC: Final = b"KVSLAB\r\n"
VERSION: Final = 2
HEADER_BYTES: Final = ALIGNMENT
"""The first page of both files; the dictionary follows it in the table, the data in the slab."""

RECORD_BYTES: Final = 128
RESERVE: Final = 1 << 16
"""Bytes of the capacity left to the lock file and to the file system's own map of the files."""

_SLOTS_PER_CHUNK: Final = 4096
_SMALL_SLOT: Final = 1 << 15
_MAX_DICTIONARY: Final = 1 << 21
_STORE_ID_BYTES: Final = 16
_HEADER: Final = struct.Struct(f"<8sI4x{_STORE_ID_BYTES}s9Q")
_U64: Final = struct.Struct("<Q")


class Header(msgspec.Struct, frozen=True):
    """Where everything lies; written once, when the slab is made, and equal in both files.

    Sizes and offsets are bytes, `created` is in Unix seconds. `capacity` is the one the slab was
    made for; the one in force is a setting. A slot has `min_slot` bytes at least. The table has
    rows for `table_chunks` chunks from `table_offset` on; the data starts at `data_offset` in the
    slab.
    """

    store_id: bytes
    capacity: int
    chunk: int
    min_slot: int
    slots_per_chunk: int
    dictionary_bytes: int
    table_offset: int
    table_chunks: int
    data_offset: int
    created: int

    @classmethod
    def plan(cls, capacity: int, chunk: int) -> Header:
        """The layout of a new slab that stays within `capacity` bytes.

        Raises:
            ConfigError: not even one chunk fits.
        """
        # Small slots for small objects, but records of no more than 0.4 % of the data.
        least = max(chunk // _SLOTS_PER_CHUNK, min(chunk // 1024, _SMALL_SLOT))
        min_slot = max(ALIGNMENT, align(least))
        slots_per_chunk = chunk // min_slot
        dictionary_bytes = min(_MAX_DICTIONARY, max(1 << 16, align(capacity // 64)))
        chunks = max(0, capacity - RESERVE) // chunk
        row = slots_per_chunk * RECORD_BYTES
        # Room for the capacity to grow up to fourfold, for at most 0.4 % of it.
        table_chunks = chunks + min(3 * chunks, capacity // 256 // row)
        header = cls(
            store_id=secrets.token_bytes(_STORE_ID_BYTES),
            capacity=capacity,
            chunk=chunk,
            min_slot=min_slot,
            slots_per_chunk=slots_per_chunk,
            dictionary_bytes=dictionary_bytes,
            table_offset=HEADER_BYTES + dictionary_bytes,
            table_chunks=table_chunks,
            data_offset=HEADER_BYTES,
            created=int(time.time()),
        )
        header.chunks_within(capacity)
        return header

    def chunks_within(self, capacity: int) -> int:
        """Chunks that `capacity` bytes of disk and the table have room for.

        Raises:
            ConfigError: not even one.
        """
        chunks = self.chunks_wanted(capacity)
        if chunks < 1:
            least = self.table_bytes + self.data_offset + self.chunk + RESERVE
            raise ConfigError(
                f"size is {capacity} bytes; with chunks of {self.chunk} bytes the slab needs "
                f"at least {least}: raise size, or lower chunk and start a new slab"
            )
        return min(chunks, self.table_chunks)

    def chunks_wanted(self, capacity: int) -> int:
        """Chunks that `capacity` bytes of disk have room for."""
        return max(0, capacity - RESERVE - self.table_bytes - self.data_offset) // self.chunk

    @property
    def table_bytes(self) -> int:
        """Size of the table file."""
        return align(self.table_offset + self.table_chunks * self.slots_per_chunk * RECORD_BYTES)

    def slab_bytes(self, chunks: int) -> int:
        """Size of a slab file with all of `chunks` chunks in use."""
        return self.data_offset + chunks * self.chunk

    def chunks_in_file(self, file_bytes: int) -> int:
        """Chunks that a slab file of this size holds at least in part."""
        chunks = -(-max(0, file_bytes - self.data_offset) // self.chunk)
        return min(chunks, self.table_chunks)

    def index(self, offset: int, slot_bytes: int) -> int:
        """The number of the record of the slot at `offset` in the data area."""
        number, inside = divmod(offset, self.chunk)
        return number * self.slots_per_chunk + inside // slot_bytes

    def slot_offset(self, index: int, slot_bytes: int) -> int:
        """Where in the data area the slot of record `index` lies."""
        number, position = divmod(index, self.slots_per_chunk)
        return number * self.chunk + position * slot_bytes

    def record_offset(self, index: int) -> int:
        """Where record `index` lies in the table file."""
        return self.table_offset + index * RECORD_BYTES

    def pack(self) -> bytes:
        """The header page."""
        body = _HEADER.pack(MAGIC, VERSION, *msgspec.structs.astuple(self))
        body = body.ljust(HEADER_BYTES - _U64.size, b"\0")
        return body + _U64.pack(checksum(body))

    @classmethod
    def unpack(cls, raw: bytes, path: Path) -> Header:
        """The header in a header page.

        Raises:
            FormatError: not a slab, of another version, or damaged; the message says which, and
                what to do.
        """
        if raw[: len(MAGIC)] != MAGIC:
            raise FormatError(
                f"{path} is no slab of kvstore, or its first bytes are damaged; nothing was "
                "changed. Run `kvstore fsck`, move the file away, or set path to another "
                "folder"
            )
        damaged = FormatError(
            f"the header of {path} is damaged; nothing was changed. Run `kvstore fsck --repair`, "
            "or move the file away to start with an empty slab"
        )
        if len(raw) != HEADER_BYTES:
            raise damaged
        _, version, *fields = _HEADER.unpack_from(raw)
        if version != VERSION:
            raise FormatError(
                f"{path} has format version {version}; this kvstore reads {VERSION} alone. Use "
                "the kvstore that wrote it, or move the file away to start with an empty slab"
            )
        body, stored = raw[: -_U64.size], _U64.unpack(raw[-_U64.size :])[0]
        header = cls(*fields)
        if checksum(body) != stored or not header._possible():
            raise damaged
        return header

    def _possible(self) -> bool:
        """Whether the values fit together; a checksum alone does not say who wrote them."""
        return (
            self.chunk >= ALIGNMENT
            and self.chunk % ALIGNMENT == 0
            and ALIGNMENT <= self.min_slot <= self.chunk
            and self.min_slot % ALIGNMENT == 0
            and self.slots_per_chunk == self.chunk // self.min_slot <= _SLOTS_PER_CHUNK
            and 2 * ALIGNMENT <= self.dictionary_bytes <= _MAX_DICTIONARY
            and self.dictionary_bytes % (2 * _U64.size) == 0
            and self.table_offset == HEADER_BYTES + self.dictionary_bytes
            and 1 <= self.table_chunks < 1 << 40
            and self.data_offset == HEADER_BYTES
        )
