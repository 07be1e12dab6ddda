"""How much memory this process may still take: of the machine, and of its control groups."""

from __future__ import annotations

import itertools
import logging
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.errors import NotNow
from kvstore.values import format_size

_FILES: Final = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Of a control group, in the second version and in the first: what it may use, and what it uses."""

_LEAST: Final = 1 << 20
_OWN: Final = 64 << 20
"""Bytes that a daemon takes beside its arena, and a hundredth of that."""


_log = logging.getLogger("kvstore.daemon")


class Busy(NotNow):
    """Others have the room now: maybe clients of a daemon that has just ended, for a moment yet."""


class Room(NamedTuple):
    """`free` bytes of `limit`, which is that of `where`."""

    free: int
    limit: int
    where: str


def room(root: Path = Path("/")) -> Room:
    """The least that the machine and every control group around this process have left.

    Page cache counts as free. `root`: where `/proc` and `/sys` are.
    """
    memory = _counts(root / "proc/meminfo")
    rooms = [Room(memory["MemAvailable:"] << 10, memory["MemTotal:"] << 10, "this machine")]
    for folder, (name, usage) in itertools.product(_groups(root), _FILES):
        try:
            limit, used = int((folder / name).read_text()), int((folder / usage).read_text())
            stat = _counts(folder / "memory.stat")
        except (OSError, ValueError):  # not that version, no limit, or not for us to know
            continue
        prefix = "total_" if "total_cache" in stat else ""
        cache = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
        rooms.append(Room(max(0, limit - max(0, used - cache)), limit, f"{folder / name}"))
    return min(rooms)


def check_room(size: int, *, private: bool) -> int:
    """`size` in whole pages, if an arena of so many bytes fits, and what a daemon needs besides.

    If it is `private` to an engine, which may not have all it needs yet: at most half of what fits.

    Raises:
        NotNow: it does not; `Busy` where it would, were all of the memory free.
    """
    free, limit, where = room()
    fits = (free - _OWN) * 100 // 101 // (2 if private else 1)
    if size > fits and (not private or fits < _LEAST):
        raise (Busy if size <= (limit - _OWN) * 100 // 101 else NotNow)(
            f"memory.size is {format_size(size)}, but {format_size(free)} of the "
            f"{format_size(limit)} of {where} are free, "
            f"and a daemon needs {format_size(_OWN)} and a hundredth of its arena besides; "
            "use a smaller memory.size, or allow more memory"
        )
    if size > fits:
        asked, half = format_size(size), format_size(fits)
        _log.warning("memory.size is %s, but half of what %s has is %s", asked, where, half)
    return min(size, fits) // mmap.PAGESIZE * mmap.PAGESIZE


def _groups(root: Path) -> Iterator[Path]:
    """The folders of our control group and of those around it."""
    ours: dict[str, str] = {}
    try:
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                ours["cgroup2"] = path
            elif "memory" in controllers.split(","):
                ours["cgroup"] = path
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in mounts:
        mount, _, source = line.partition(" - ")
        kind, *_, options = source.split()
        if kind not in ours or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        _, _, _, top, point, *_ = mount.split()
        group = Path(ours[kind])
        # Where a container sees the paths of its host, our group is the mount itself.
        inside = group.relative_to(top) if group.is_relative_to(top) else Path()
        for each in (inside, *inside.parents):
            yield root / point.lstrip("/") / each


def _counts(path: Path) -> dict[str, int]:
    """The numbers of a file of names and numbers."""
    words = (line.split() for line in path.read_text().splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1}
