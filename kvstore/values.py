"""Sizes, addresses and names as people write them. Loads nothing heavy."""

from __future__ import annotations

import re
from typing import Final

_UNITS: Final = (
    {"": 1, "B": 1}
    | {f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)}
    | {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}
)
_SIZE: Final = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*\Z")
_MAX_BYTES: Final = 1 << 60


def parse_size(value: object) -> int:
    """Bytes from `10GiB`, `1.5 GB`, `4096` …

    Raises:
        ValueError: no number, an ambiguous or unknown unit, or beyond all bounds; with the remedy.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{value!r} is no size; write it like 10GiB")
    nbytes = value if isinstance(value, int) else _size_of(value)
    if nbytes < 0:
        raise ValueError(f"{value} is negative; write a size like 10GiB")
    if nbytes > _MAX_BYTES:
        raise ValueError(f"{value!r:.60} is more than 1048576TiB; write a size like 10GiB")
    return nbytes


def _size_of(value: str) -> int:
    match = _SIZE.match(value)
    if match is None:
        raise ValueError(f"{value!r:.60} is no size; write it like 10GiB")
    number, unit = match.groups()
    if unit not in _UNITS:
        hint = f"{number}GiB"
        if len(unit) == 2 and unit[1] == "b":
            hint = f"{number}{unit[0].upper()}B or {number}{unit[0].upper()}iB ('b' means bits)"
        raise ValueError(
            f"{value!r:.60} has the unknown unit {unit!r}; use {hint} (units: "
            f"{', '.join(u for u in _UNITS if u)})"
        )
    return int(float(number) * _UNITS[unit]) if "." in number else int(number) * _UNITS[unit]


def format_size(nbytes: float) -> str:
    """`nbytes` for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"


def lasting(seconds: float) -> str:
    """A time span for people."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{seconds:.3g} s"


_ADDRESS: Final = re.compile(
    r"(?:([\w-]{1,63}(?:\.[\w-]{1,63})*\.?)|\[([0-9a-f:.]+(?:%\w+)?)\]):([0-9]{1,5})", re.A | re.I
)


def split_host_port(value: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`.

    Raises:
        ValueError: it is neither, with the remedy.
    """
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match[3]) > 65535:
        raise ValueError(
            f"{value!r:.200} is no address; write host:port, e.g. 127.0.0.1:7420 or [::1]:7420"
        )
    return match[1] or match[2], int(match[3])


def checked_text(value: str) -> str:
    """`value`, if a file's name and a message can hold it.

    Raises:
        ValueError: it has a NUL, or bytes that are no UTF-8.
    """
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{value!r:.60} holds bytes that are no text; write it in UTF-8")
    return value
