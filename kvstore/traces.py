"""Traces: which blocks requests asked for, and when; never what was in them.

JSON lines of one of these kinds, told by their fields:

- ours: `time` (seconds), `keys` (hex text or numbers), `tokens`, `tenant`;
- Mooncake's, LMBench's and Bailian's: `timestamp` (milliseconds; nanoseconds as text; seconds,
  beside a `chat_id`), `input_length`, `hash_ids`;
- LMCache's log of lookups: `timestamp` (seconds), `chunk_size`, `chunk_hashes` (hex text).

A block's key stands for all before it, too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any, Final, NamedTuple

_MOST_LINE: Final = 64 << 20
_MOST_KEY: Final = 1 << 64
_MOST_HEX: Final = 128


class TraceError(ValueError):
    """A trace cannot be read; says where."""


class Request(NamedTuple):
    """When it comes, in seconds since the first one, and its blocks, from the first one on."""

    at: float
    keys: tuple[bytes, ...]
    tokens: int
    tenant: str = ""


def read_trace(path: Path) -> list[Request]:
    """The requests of a trace.

    Raises:
        TraceError: a line is none of the known kinds, or time goes backwards; names the line.
        OSError: it cannot be read.
    """
    requests: list[Request] = []
    names: dict[object, bytes] = {}
    before = -math.inf
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(_MOST_LINE)
            if not line:
                break
            try:
                request = _request(line, names)
                if request.at < before:
                    raise ValueError(f"time goes backwards, from {before} s to {request.at} s")
            except (ValueError, TypeError, RecursionError) as e:
                raise TraceError(f"{path}:{number}: {e}") from None
            before = request.at
            requests.append(request)
    if not requests:
        raise TraceError(f"{path}:1: there are no requests")
    first = requests[0].at
    return [one._replace(at=one.at - first) for one in requests]


def _request(line: bytes, names: dict[object, bytes]) -> Request:
    if len(line) >= _MOST_LINE:
        raise ValueError(f"a line of more than {_MOST_LINE} bytes")
    said = json.loads(line)
    if not isinstance(said, dict):
        raise ValueError("no JSON object")
    if "hash_ids" in said:
        time, keys, tokens = "timestamp", "hash_ids", said.get("input_length", 0)
        # LMBench's are nanoseconds, as text.
        scale = 1e9 if isinstance(said.get(time), str) else 1.0 if "chat_id" in said else 1e3
    elif "chunk_hashes" in said:
        time, keys, tokens, scale = "timestamp", "chunk_hashes", said.get("chunk_size", 0), 1.0
        if type(tokens) is int and isinstance(said[keys], list):
            tokens *= len(said[keys])
    else:
        time, keys, tokens, scale = "time", "keys", said.get("tokens", 0), 1.0
    for field in (time, keys):
        if field not in said:
            raise ValueError(f"{field!r} is missing")
    at = float(said[time]) / scale
    if isinstance(said[time], bool) or not math.isfinite(at):
        raise ValueError(f"{time!r} is no time: {said[time]!r}")
    if type(tokens) is not int or not 0 <= tokens < 1 << 32:
        raise ValueError(f"no number of tokens: {tokens!r}")
    if not isinstance(said[keys], list):
        raise ValueError(f"{keys!r} is no list")
    tenant = said.get("tenant", "")
    if not isinstance(tenant, str):
        raise ValueError(f"'tenant' is no text: {tenant!r}")
    return Request(at, tuple(_key(one, names) for one in said[keys]), tokens, tenant)


def _key(said: Any, names: dict[object, bytes]) -> bytes:
    known = names.get(said) if type(said) in (int, str) else None
    if known is not None:
        return known
    if type(said) is int and 0 <= said < _MOST_KEY:
        key = hashlib.sha256(b"%d" % said).digest()
    elif isinstance(said, str) and 0 < len(said) <= _MOST_HEX:
        key = bytes.fromhex(said.removeprefix("0x"))
    else:
        raise ValueError(f"no key: {str(said)[:40]!r}; give hex text, or a number below 2**64")
    return names.setdefault(said, key)
