"""A trace that is made, for benchmarks and tests that have none that was recorded."""

from __future__ import annotations

import hashlib
import random
from functools import cache

from kvstore.traces import Request


def made_trace(count: int = 6000, seed: int = 0) -> list[Request]:
    """Chats of several turns over a few system prompts; of any seed always the same."""
    chance = random.Random(seed)
    fresh = iter(range(10**9))
    prompts = [tuple(next(fresh) for _ in range(chance.randint(1, 8))) for _ in range(20)]
    weights = [1 / (rank + 1) for rank in range(len(prompts))]
    chats: list[tuple[int, ...]] = []
    now = 0.0
    requests: list[Request] = []
    for _ in range(count):
        now += chance.expovariate(2.0)
        if chats and chance.random() < 0.7:
            at = max(0, len(chats) - 1 - int(chance.expovariate(1 / 200)))
            before = chats.pop(at)
        else:
            before = chance.choices(prompts, weights)[0]
        blocks = before + tuple(next(fresh) for _ in range(1 + int(chance.expovariate(0.3))))
        requests.append(Request(now, tuple(map(_key, blocks)), 512 * len(blocks)))
        if len(blocks) < 120:
            chats.append(blocks)
    return requests


@cache
def _key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()
