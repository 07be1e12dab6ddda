"""The sessions of one process of an engine: one per tenant."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal

from kvstore.blocks.spec import Namespace, Part
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.copier.base import Copier
from kvstore.errors import KVStoreError
from kvstore.telemetry import QuietLog

_log = logging.getLogger("kvstore.sessions")

_OPEN: Final = 256
"""Sessions that are open at a time; the one unused for longest ends when another begins. A process
may have two of a tenant, and a daemon has at most 1,024 open on one connection."""
_KNOWN: Final = 4096
"""Tenants that are remembered, so that `clear` removes their blocks."""
_AGAIN: Final = 30.0
"""Seconds after which a tenant that was refused is tried again."""
REFUSED: Final = (KVStoreError, ValueError)
"""What `open` raises: the store refused it, or the tenant's name is no text and cannot be sent."""


@dataclass(slots=True)
class _Tenant:
    session: Future[Session]
    kept: float = 0.0
    """Until when it should stay open (monotonic)."""
    again: float = math.inf
    """When, having been refused, it may be tried again (monotonic)."""


class Sessions:
    """Opens a session for each tenant when it comes up; thread-safe.

    The first one, the default tenant's, is opened at start, where a wrong configuration is an
    error, and stays. Others are opened and ended behind, since that can take longer than a
    scheduler may wait; one that is ended completes what it is doing. All share what is measured.
    """

    def __init__(
        self,
        config: Config,
        namespace: Namespace,
        parts: Sequence[Part],
        copier: Copier | None = None,
    ) -> None:
        self._config = config
        self._namespace = namespace
        self.block_tokens = namespace.block_tokens
        self._parts = parts
        self._copier = copier
        self._lock = threading.Lock()
        self._tenants: dict[str, _Tenant] = {}  # the one unused for longest first
        self._known: dict[str, None] = {}
        self._forgotten = False
        self._quiet = QuietLog(_log)
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="kvstore-open")
        self._others: dict[str, Sessions] = {}

    def at(self, address: str) -> Sessions:
        """The same with the daemon at another address; empty: these.

        Those stay until `close`: addresses come from settings, and from nowhere else.
        """
        if not address:
            return self
        with self._lock:
            other = self._others.get(address)
            if other is None:
                config = self._config.model_copy(update={"address": address})
                other = Sessions(config, self._namespace, self._parts, self._copier)
                self._others[address] = other
            return other

    def open(self, tenant: str) -> Session:
        """The session of `tenant`, opened now if it is not.

        Raises:
            REFUSED: there is none to be had now.
        """
        return self._tenant(tenant).session.result()

    def get(self, tenant: str) -> Session | Literal["opening", "refused"]:
        """The session of `tenant`, or why there is none now."""
        future = self._tenant(tenant).session
        if not future.done():
            return "opening"
        return "refused" if future.exception() else future.result()

    def keep(self, tenant: str, seconds: float) -> None:
        """Leave the session of `tenant` open that long, for the sake of what it holds."""
        with self._lock:
            if one := self._tenants.get(tenant):
                one.kept = max(one.kept, time.monotonic() + seconds)

    def _tenant(self, tenant: str) -> _Tenant:
        now = time.monotonic()
        with self._lock:
            one = self._tenants.pop(tenant, None)
            if one is None or now >= one.again:
                one = _Tenant(self._opener.submit(self._connect, tenant))
            if len(self._tenants) >= _OPEN:
                kept = {name: max(now, other.kept) for name, other in self._tenants.items()}
                self._opener.submit(_end, self._tenants.pop(min(kept, key=kept.__getitem__)))
            self._tenants[tenant] = one
            return one

    def _connect(self, tenant: str) -> Session:
        namespace = Namespace(self._namespace.model, tenant, self._namespace.block_tokens)
        try:
            session = Session.open(namespace, self._parts, self._config, copier=self._copier)
        except REFUSED as e:
            self._quiet.warning("refused", "no session for tenant %r: %s", tenant, e)
            with self._lock:
                if one := self._tenants.get(tenant):
                    one.again = time.monotonic() + _AGAIN
            raise
        with self._lock:
            if not self._known and (first := self._tenants.get(tenant)):
                first.kept = math.inf
            self._known.pop(tenant, None)
            self._known[tenant] = None
            if len(self._known) > _KNOWN:
                del self._known[next(iter(self._known))]
                self._forgotten = True
        return session

    def clear(self) -> bool:
        """Remove the blocks of all tenants seen here; whether that worked."""
        with self._lock:
            known = list(self._known)
        try:
            done = all(self.open(tenant).clear() >= 0 for tenant in known)
        except REFUSED:
            return False
        return done and not self._forgotten

    def close(self) -> None:
        """End all sessions."""
        self._opener.shutdown(cancel_futures=True)
        with self._lock:
            tenants, others = list(self._tenants.values()), list(self._others.values())
        for other in others:
            other.close()
        for one in tenants:
            _end(one)


def _end(one: _Tenant) -> None:
    if not one.session.cancelled() and not one.session.exception():
        one.session.result().close()
