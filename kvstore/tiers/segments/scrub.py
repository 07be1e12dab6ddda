"""Looking at the folder of a files tier from outside, also while nodes use it: `kvstore fsck`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Final

from kvstore.errors import TierUnavailable
from kvstore.tiers.segments.format import (
    LARGEST_HEADER,
    MARKER,
    OWN,
    VERSION,
    decode,
    place_of,
    shape,
)  # fmt: skip
from kvstore.tiers.slab.direct import PIECE, Mover, open_direct, remedy
from kvstore.tiers.slab.fsck import FsckReport

_LEFT_SECONDS: Final = 3600.0
"""What is so old and not whole is nobody's any more."""


def is_ours(folder: Path) -> bool:
    """Whether it is the folder of a files tier."""
    return (folder / MARKER).is_file()


def fsck(
    folder: Path, *, repair: bool = False, progress: Callable[[int, int], None] | None = None
) -> FsckReport:
    """Verify every segment: header, name, and every block's bytes.

    `damaged` counts files: `header`, `name` (it is another one), `data_checksum`, `read_error`, and
    `leftover`, of puts that ended an hour ago and segments that others have deleted. With `repair`
    these are removed, and what has expired.

    Raises:
        TierUnavailable: the folder cannot be read.
    """
    damaged, mover = Counter[str](), Mover(PIECE)
    objects = nbytes = repaired = done = 0
    try:
        sizes = dict(_segments(folder))
        total = sum(sizes.values())
        for file, size in sizes.items():
            with suppress(FileNotFoundError):  # Its node has deleted it meanwhile.
                reason, blocks, whole = _verify(folder, file, mover)
                if reason:
                    file.stat()  # It may have gone while it was read.
                if repair and reason:
                    os.truncate(file, 0)
                    file.unlink()
                    repaired += reason != "expired"
                objects, nbytes = objects + blocks, nbytes + whole
                damaged[reason] += bool(reason) and reason != "expired"
            done += size
            if progress is not None:
                progress(done, total)
        for file in _leftovers(folder):
            damaged["leftover"] += 1
            if repair:
                file.unlink(missing_ok=True)
                repaired += 1
    except OSError as e:
        raise TierUnavailable(remedy(folder, e)) from e
    return FsckReport(str(folder), objects, nbytes, dict(+damaged), repaired, [], None)


def _segments(folder: Path) -> Iterator[tuple[Path, int]]:
    """All there are now, and the bytes of each file."""
    for file in (folder / f"v{VERSION}").rglob("*"):
        with suppress(FileNotFoundError):
            found = file.stat()
            if S_ISREG(found.st_mode):
                yield file, found.st_size


def _verify(folder: Path, file: Path, mover: Mover) -> tuple[str, int, int]:
    """What is wrong with a segment, and the blocks and their bytes that are whole."""
    good = 0
    with file.open("rb") as opened:
        segment = decode(opened.read(LARGEST_HEADER))
    if segment is None:
        return "header", 0, 0
    place = place_of(segment.digest, segment.blocks[-1].key, segment.variant)
    if folder / place != file:
        return "name", 0, 0
    if all(0 < block.expires <= time.time() for block in segment.blocks):
        return "expired", 0, 0
    header, stride, _ = shape(len(segment.blocks), segment.nbytes)
    fd, _ = open_direct(file, os.O_RDONLY)
    try:
        for number, block in enumerate(segment.blocks):
            at = header + number * stride
            good += mover.holds(fd, at, segment.nbytes, block.checksum)
    except OSError:
        return "read_error", good, good * segment.nbytes
    finally:
        os.close(fd)
    whole = good == len(segment.blocks)
    return "" if whole else "data_checksum", good, good * segment.nbytes


def _leftovers(folder: Path) -> Iterator[Path]:
    for file in (folder / OWN).glob("*/*"):
        with suppress(FileNotFoundError):
            found = file.stat()
            if found.st_nlink == 1 and found.st_mtime < time.time() - _LEFT_SECONDS:
                yield file
