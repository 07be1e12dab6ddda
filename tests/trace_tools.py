"""Traces in files, and what is found in them by a few plain lines."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from kvstore.traces import Request


def write_trace(trace: Sequence[Request], path: Path) -> Path:
    """As the daemon writes one."""
    lines = (
        {"time": one.at, "keys": [key.hex() for key in one.keys], "tokens": one.tokens}
        for one in trace
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def plain_lru(trace: Sequence[Request], size: int) -> float:
    here: OrderedDict[bytes, None] = OrderedDict()
    found = asked = 0
    for request in trace:
        hit = next((n for n, k in enumerate(request.keys) if k not in here), len(request.keys))
        found, asked = found + hit, asked + len(request.keys)
        known = [key for key in request.keys if key in here]
        fresh = [key for key in request.keys if key not in here]
        for key in (*reversed(known), *reversed(fresh)):  # What is saved is the last to go.
            here.pop(key, None)
            here[key] = None
        while len(here) > size:
            here.popitem(last=False)
    return found / asked


def plain_clairvoyant(trace: Sequence[Request], size: int) -> float:
    here: dict[bytes, tuple[int, int]] = {}
    found = asked = 0
    for now, request in enumerate(trace):
        hit = next((n for n, k in enumerate(request.keys) if k not in here), len(request.keys))
        found, asked = found + hit, asked + len(request.keys)
        for depth, key in enumerate(request.keys):
            later = (n for n in range(now + 1, len(trace)) if key in trace[n].keys)
            here[key] = next(later, len(trace)), depth
        for key in sorted(here, key=here.__getitem__)[size:]:
            del here[key]
    return found / asked
