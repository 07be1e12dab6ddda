"""The sessions of one process of an engine: one per tenant."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from kvstore.blocks.spec import Namespace, Part
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.copier.base import Copier
from kvstore.errors import KVStoreError
from kvstore.telemetry import QuietLog

_log = logging.getLogger("kvstore.sessions")

_OPEN: Final = 64
"""Sessions that are open at a time; the one unused for longest ends when another begins."""
_KNOWN: Final = 4096
"""Tenants that are remembered, so that `clear` removes their blocks."""
_AGAIN: Final = 30.0
"""Seconds after which a tenant that was refused is tried again."""
REFUSED: Final = (KVStoreError, ValueError)
"""What `open` raises: the store refused it, or the tenant's name is no text and cannot be sent."""


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
        self._parts = parts
        self._copier = copier
        self._lock = threading.Lock()
        self._open: dict[str, Future[Session]] = {}  # the one unused for longest first
        self._kept: dict[str, float] = {}
        """Until when sessions should stay open (monotonic)."""
        self._refused: dict[str, float] = {}
        """When tenants that were refused may be tried again (monotonic)."""
        self._known: dict[str, None] = {}
        self._forgotten = False
        self._first: Session | None = None
        self._quiet = QuietLog(_log)
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="kvstore-open")

    def open(self, tenant: str) -> Session:
        """The session of `tenant`, opened now if it is not.

        Raises:
            REFUSED: there is none to be had now.
        """
        return self._future(tenant).result()

    def get(self, tenant: str) -> Session | None:
        """The session of `tenant`; None while it is being opened, or if it was refused."""
        future = self._future(tenant)
        if not future.done():
            return None
        return None if future.exception() else future.result()

    def refused(self, tenant: str) -> bool:
        """Whether there is no session for `tenant` to be had now."""
        future = self._future(tenant)
        return future.done() and future.exception() is not None

    def keep(self, tenant: str, seconds: float) -> None:
        """Leave the session of `tenant` open that long, for the sake of what it holds."""
        with self._lock:
            if tenant in self._open:
                until = time.monotonic() + seconds
                self._kept[tenant] = max(self._kept.get(tenant, 0.0), until)

    def _future(self, tenant: str) -> Future[Session]:
        now = time.monotonic()
        with self._lock:
            future = self._open.pop(tenant, None)
            if future is None or now >= self._refused.get(tenant, math.inf):
                self._refused.pop(tenant, None)
                future = self._opener.submit(self._connect, tenant)
            if len(self._open) >= _OPEN:
                self._kept = {name: end for name, end in self._kept.items() if end > now}
                oldest = min(self._open, key=lambda name: self._kept.get(name, 0.0))
                self._kept.pop(oldest, None)
                self._refused.pop(oldest, None)
                self._opener.submit(_end, self._open.pop(oldest))
            self._open[tenant] = future
            return future

    def _connect(self, tenant: str) -> Session:
        namespace = Namespace(self._namespace.model, tenant, self._namespace.block_tokens)
        try:
            session = Session.open(namespace, self._parts, self._config, copier=self._copier)
        except REFUSED as e:
            self._quiet.warning("refused", "no session for tenant %r: %s", tenant, e)
            with self._lock:
                if tenant in self._open:
                    self._refused[tenant] = time.monotonic() + _AGAIN
            raise
        with self._lock:
            if self._first is None:
                self._first, self._kept[tenant] = session, math.inf
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
            futures = list(self._open.values())
        for future in futures:
            _end(future)


def _end(future: Future[Session]) -> None:
    if not future.cancelled() and not future.exception():
        future.result().close()
