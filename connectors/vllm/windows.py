"""Groups of layers that look back only so far: what of them is stored, loaded and saved.

vLLM keeps the pages of such a group only as long as a token may still look back on them, and has a
null page in the place of each that is gone. So what continues a prompt behind a block needs a
group's last blocks before that, and no others; and pages may leave a request while it runs. The
state of a recurrent layer is such a group, too: it looks back on the last page (`states`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks.spec import Namespace
from kvstore.client.planner import MEMORY
from kvstore.connectors.common.requests import Asked, Found
from kvstore.connectors.common.sessions import Sessions
from kvstore.connectors.common.settings import Settings
from kvstore.connectors.common.transfers import page_rows
from kvstore.connectors.vllm.layout import Pages
from kvstore.transport.protocol import NOWHERE

_NULL: Final = 0
"""The number of vLLM's null page."""
_FRESH: Final = 0.25
"""Seconds that an answer of the store is good for a request that waits in the queue."""
_OPENING: Final = 1.0
"""Seconds that a request waits for the session of its tenant."""

Rows = tuple[NDArray[np.int64], ...]


class Windows:
    """What the scheduler knows of these groups. Used by one thread."""

    def __init__(
        self, settings: Settings, namespace: Namespace, groups: Sequence[Pages], ahead: int = 0
    ) -> None:
        """A prompt is continued `ahead` tokens before the end of its last block."""
        self._groups = groups
        self._size = namespace.block_tokens
        self._longest = max(group.window for group in groups) + ahead
        parts = [part for group in groups for part in group.all_stored()]
        self._sessions = Sessions(settings.config, namespace, parts)
        self._sessions.open(settings.tenant)
        self._saving: dict[int, tuple[str, int, Rows]] = {}
        """Saves under way: of which request, from which block on, and of which pages."""

    def fit(self, asked: Asked, found: Found) -> bool:
        """Of what was found, leave as much as there are windows for; False: ask again later."""
        if found.fitted:
            return True
        first, last = found.first, found.first + len(found.tiers)
        end = self._end(asked, first, last)
        if end is None:
            return False
        found.fitted, found.tiers = True, found.tiers[: end - first]
        return True

    def find(self, asked: Asked, start: int, usable: int) -> Found:
        """What there may be for a model that has no other groups, before it is made to fit."""
        now, first, found = time.monotonic(), start // self._size, asked.found
        if found is None or found.start != start or now - found.at > _FRESH:
            asked.extend_keys()
            found = asked.found = Found(start, first, (MEMORY,) * (usable - first), now)
        return found

    def _end(self, asked: Asked, first: int, last: int) -> int | None:
        """The last block, up to `last`, behind which the prompt can be continued; `first`: none.

        None: its tenant's session is being opened.
        """
        now, session = time.monotonic(), self._sessions.get(asked.namespace.tenant)
        asked.patience = asked.patience or now + _OPENING
        if session == "opening" and now < asked.patience:
            return None
        if isinstance(session, str) or last <= first:
            return first
        keys, end, run = asked.keys, first, 0
        found = session.lookup(
            keys[first:last],
            again=asked.answered,
            holes=True,
            position=first,
            before=keys[:first],
            source=asked.wishes.remote_kv_source or "",
        )
        asked.answered |= bool(found.tiers)
        for block, tier in enumerate(found.tiers, first):
            run = 0 if tier in NOWHERE.values() else run + 1
            if run >= block + 1 - max(first, self._oldest(block + 1)):
                end = block + 1
        return end

    def to_load(self, ids: Sequence[list[int]], start: int, first: int, last: int) -> Rows:
        """The pages, a row for each of the last blocks, that are to be loaded behind `start`."""
        groups = [self._rows(ids, group, first, last) for group in self._groups]
        for group, rows in zip(self._groups, groups, strict=True):
            rows.reshape(-1)[: start // group.page_tokens - first * rows.shape[1]] = -1
        needed = np.flatnonzero(np.any([(rows >= 0).any(axis=1) for rows in groups], axis=0))
        return tuple(rows[needed[0] if len(needed) else len(rows) :] for rows in groups)

    def to_save(self, ids: Sequence[list[int]], first: int, last: int) -> list[tuple[int, Rows]]:
        """What of these blocks is still there as a whole: from which block on, and its pages.

        Those that leave the request next are apart from those that what follows `last` looks back
        on, since either may be lost with a save that comes too late.
        """
        groups = [self._rows(ids, group, first, last) for group in self._groups]
        gone = np.flatnonzero(np.any([(rows < 0).any(axis=1) for rows in groups], axis=0))
        start = first + (int(gone[-1]) + 1 if len(gone) else 0)
        stays = min(max(start, self._oldest(last)), last)
        runs = [(start, stays), (stays, last)]
        return [
            (a, tuple(rows[a - first : b - first] for rows in groups)) for a, b in runs if a < b
        ]

    def _oldest(self, blocks: int) -> int:
        """The first block that is looked back on behind so many of them."""
        return max(0, blocks * self._size - self._longest + 1) // self._size

    def _rows(
        self, ids: Sequence[list[int]], group: Pages, first: int, last: int
    ) -> NDArray[np.int64]:
        pages = ids[group.number][: last * self._size // group.page_tokens]
        rows = page_rows(pages, group.page_tokens, self._size, first, last)
        rows[rows == _NULL] = -1
        return rows

    def saving(self, number: int, request: str, first: int, rows: Rows) -> None:
        """A save of these pages has begun."""
        self._saving[number] = request, first, rows

    def saved(self, number: int) -> None:
        """It has ended."""
        self._saving.pop(number, None)

    def taken(self, kv_cache_manager: Any) -> list[int]:
        """Saves whose pages vLLM has taken from their requests."""
        taken = []
        for number, (request, first, rows) in self._saving.items():
            ids = kv_cache_manager.get_block_ids(request)
            last = first + len(rows[0])
            now = [self._rows(ids, group, first, last) for group in self._groups]
            if not all(np.array_equal(a, b) for a, b in zip(now, rows, strict=True)):
                taken.append(number)
        return taken

    def clear(self) -> bool:
        """Remove what is stored; whether that worked."""
        return self._sessions.clear()

    def close(self) -> None:
        """End the sessions."""
        self._sessions.close()
