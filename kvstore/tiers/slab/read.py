"""Reading a slab's tables: for opening it, and for the offline tools."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from kvstore.errors import FormatError
from kvstore.tiers.slab.dictionary import Dictionary
from kvstore.tiers.slab.format import (
    HEADER_BYTES,
    RECORD,
    RECORD_BYTES,
    ChunkCheck,
    Header,
    RecordChecker,
    Rows,
)

SLAB_NAME: Final = "kvstore.slab"
TABLE_NAME: Final = "kvstore.table"


def read_header(path: Path) -> Header:
    """The header of a slab or a table.

    Raises:
        FormatError: see `Header.unpack`.
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        return Header.unpack(os.pread(file.fileno(), HEADER_BYTES, 0), path)


def read_headers(folder: Path) -> Header:
    """The header that slab and table have in common.

    Raises:
        FormatError: see `Header.unpack`; or the two do not belong together.
        OSError: one of them cannot be read.
    """
    header = read_header(folder / SLAB_NAME)
    if read_header(folder / TABLE_NAME) != header:
        raise FormatError(
            f"{folder / SLAB_NAME} and {TABLE_NAME} beside it do not belong together; nothing was "
            "changed. Put the right one back, or move both away to start with an empty slab"
        )
    return header


def read_dictionary(fd: int, header: Header) -> Dictionary:
    """The dictionary as it is in the file."""
    raw = os.pread(fd, header.dictionary_bytes, HEADER_BYTES)
    return Dictionary.parse(header, raw.ljust(header.dictionary_bytes, b"\0"))


def read_rows(fd: int, header: Header, number: int) -> Rows:
    """The records of one chunk; empty ones where the file ends early."""
    nbytes = header.slots_per_chunk * RECORD_BYTES
    raw = os.pread(fd, nbytes, header.record_offset(number * header.slots_per_chunk))
    return np.frombuffer(raw.ljust(nbytes, b"\0"), RECORD)


def scan(
    fd: int, header: Header, checker: RecordChecker, chunks: int
) -> Iterator[tuple[int, Rows, ChunkCheck]]:
    """Judge the records of the first `chunks` chunks, one chunk's table in memory at a time."""
    for number in range(chunks):
        rows = read_rows(fd, header, number)
        verdict = checker.check(number, rows)
        if verdict.live or verdict.bad:
            yield number, rows, verdict
