"""Prefill in one engine, decode in another: what the schedulers of both say and wait for.

The blocks of a request with `do_remote_decode` are announced with its first step, and saved as it
is computed. One with `do_remote_prefill` waits, outside the batch, until what is announced of its
prompt has come.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from kvstore.blocks.keys import partial_key, prompt_extras
from kvstore.client.session import Announced, Lookup
from kvstore.connectors.common.requests import Asked
from kvstore.connectors.common.sessions import Sessions
from kvstore.connectors.common.stats import Stats
from kvstore.telemetry import QuietLog

Result = TypeVar("Result")

_log = logging.getLogger("kvstore.handoffs")

_WAITING: Final = 64
"""Requests that the store is asked for at a time; others wait for their turn to ask."""
_ROUND: Final = 1.0
"""Seconds of one question; whoever is gone by then asks no other."""
_PAUSE: Final = 0.02
"""Seconds until a store is asked again that has too many who wait."""
_FETCHED: Final = 3.0
"""Seconds without anything new while another node is asked for what it should have."""
_TAIL_FETCHED: Final = 0.3
"""The same where only the tail is missing, which comes right behind the others or not at all."""
_ASKED_AGAIN: Final = 0.1
"""Seconds until it is asked again."""


@dataclass(slots=True)
class HandOff:
    """What one request has announced, or waits for.

    `tail` is the key of the block with its prompt's last token (empty: that is not handed on), of
    which it `lacks` some tokens. It is `partial` as long as there may be an object of such a block.
    """

    announced: Future[Announced] | None = None
    waiting: Future[tuple[str, bool]] | None = None
    over: threading.Event = field(default_factory=threading.Event)
    tail: bytes = b""
    lacks: int = 0
    partial: bool = False
    came: bool = False
    """All has come, and the tail."""
    decoder: str = ""
    """Where its blocks go; empty: to this engine's own store."""


class HandOffs:
    """Requests that two engines share. Used by the scheduler's thread.

    `patience` seconds may pass without anything new from the other engine. `decoders` are the
    daemons that requests of this engine may name.
    """

    def __init__(
        self, sessions: Sessions, stats: Stats, patience: float, *,
        decoders: Sequence[str], tenant: str,
    ) -> None:  # fmt: skip
        self._sessions = sessions
        self._stats = stats
        self._patience = patience
        self._decoders = decoders
        self._quiet = QuietLog(_log)
        for address in decoders:  # The first request that names it is not to wait for it.
            sessions.at(address).get(tenant)
        self._threads = ThreadPoolExecutor(_WAITING, thread_name_prefix="kvstore-handoff")
        self._announcer = ThreadPoolExecutor(1, thread_name_prefix="kvstore-announce")
        """In a thread: no step waits for a store that hangs."""

    def begin(self, asked: Asked, own: HandOff, prompt_tokens: int, *, again: int | None) -> None:
        """A request has come, of whose prompt the last tokens, `again` of them, are computed again
        wherever it goes on; None: a block that is not whole cannot be handed on.

        No address counts because a request says so.
        """
        decoder = asked.wishes.remote_decoder
        if decoder in self._decoders and asked.wishes.do_remote_decode:
            own.decoder = decoder or ""
        elif decoder is not None:
            self._stats.handed("refused")
            words = "remote_decoder %.200r is not among the decoders set (%s): not saved there"
            self._quiet.warning("decoder", words, decoder, ", ".join(self._decoders) or "none")
        size, wishes = asked.namespace.block_tokens, asked.wishes
        start = (prompt_tokens - 1) // size * size
        shared = wishes.do_remote_decode or wishes.do_remote_prefill
        if again is not None and shared and prompt_tokens - start > again:
            own.lacks = start + size - prompt_tokens
            own.partial = own.lacks > 0
            whole = asked.extend_keys()[start // size : prompt_tokens // size]
            [own.tail] = whole or [tail_key(asked, start, prompt_tokens)]

    def announce(self, asked: Asked, own: HandOff, prompt_tokens: int, first: int = 0) -> None:
        """The first step of a request: all blocks of its prompt are to come, from `first` on."""
        if not asked.wishes.do_remote_decode or own.announced is not None:
            return
        session = self._sessions.at(own.decoder).get(asked.namespace.tenant)
        if not isinstance(session, str):
            whole = prompt_tokens // asked.namespace.block_tokens
            keys = asked.extend_keys()[first:whole] + [own.tail] * own.partial
            own.announced = _submit(self._announcer, session.announce, keys)

    def waits(self, asked: Asked, own: HandOff, first: int, usable: int) -> bool:
        """Whether blocks `first` to `usable` are still to come from the other engine."""
        if not asked.wishes.do_remote_prefill:
            return False
        if own.waiting is None:
            session = self._sessions.get(asked.namespace.tenant)
            if isinstance(session, str):
                return False  # Whoever looks the blocks up waits for it.
            keys, tail = asked.extend_keys(), [own.tail] if own.tail else []
            promised = -(-asked.wishes.remote_num_tokens // asked.namespace.block_tokens)
            source = asked.wishes.remote_kv_source or ""
            look = partial(
                session.lookup, keys[first:usable] + tail, timeout=_ROUND, again=True, holes=True,
                wait=_ROUND, position=first, before=keys[:first], source=source,
            )  # fmt: skip
            expected = min(promised, usable + len(tail)) - first if source else 0
            own.waiting = _submit(
                self._threads, self._wait, look, usable - first, expected, own.over
            )
        if not own.waiting.done():
            return True
        if not own.over.is_set():
            own.over.set()
            failed = own.waiting.exception() is not None
            outcome, own.came = ("unavailable", False) if failed else own.waiting.result()
            self._stats.handed(outcome)
        return False

    def _wait(
        self, look: Callable[[], Lookup], whole: int, expected: int, over: threading.Event
    ) -> tuple[str, bool]:
        """Until all blocks have come, one is known to be missing, or nothing happens any more.

        `whole` of them are, besides those there may be a tail; the answer's second half tells
        whether that is there, too. Another node may have `expected` of them a moment later.
        """
        most, since = 0, time.monotonic()
        while not over.is_set():
            asked = time.monotonic()
            found = look()
            if found.reason is None:
                return "came", True
            if not found.tiers:
                return "unavailable", False
            if found.blocks > most:
                most, since = found.blocks, asked
            pause = _PAUSE
            if found.tiers[found.blocks : found.blocks + 1] != ("pending",):
                longest = _FETCHED if found.blocks < whole else _TAIL_FETCHED
                if found.blocks >= expected or asked - since > longest:
                    return "came" if found.blocks >= whole else "missing", False
                pause = _ASKED_AGAIN
            elif found.idle > self._patience:
                return "stalled", False
            over.wait(pause - (time.monotonic() - asked))
        return "ended", False

    def taken(self, asked: Asked, own: HandOff) -> None:
        """A request needs its tail no more: nor does anybody."""
        session = self._sessions.get(asked.namespace.tenant) if own.partial else ""
        if asked.wishes.do_remote_prefill and not isinstance(session, str):
            own.partial = False
            _submit(self._announcer, session.remove, [own.tail])

    def end(self, own: HandOff) -> None:
        """Nothing more comes of this request, and it waits for nothing."""
        own.over.set()
        if own.announced is not None:
            own.announced.add_done_callback(_release)

    def close(self) -> None:
        """Wait for nothing any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._announcer.shutdown(wait=False, cancel_futures=True)


def _submit(
    threads: ThreadPoolExecutor, call: Callable[..., Result], *given: object
) -> Future[Result]:
    """What will come of a call; without a thread to be had, that: it ends no scheduler."""
    try:
        return threads.submit(call, *given)
    except RuntimeError as e:
        none = Future[Result]()
        none.set_exception(e)
        return none


def _release(announced: Future[Announced]) -> None:
    if not announced.cancelled() and announced.exception() is None:
        announced.result().release()


def tail_key(asked: Asked, start: int, end: int) -> bytes:
    """The key of tokens `start` to `end` of a prompt, a block but for some at its end."""
    keys, number = asked.extend_keys(), start // asked.namespace.block_tokens
    extras = prompt_extras(
        asked.namespace.block_tokens, range(number, number + 1), **asked.extras
    ).get(0, [])
    parent = keys[number - 1] if number else None
    return partial_key(asked.namespace, asked.tokens[start:end], extras=extras, parent=parent)
