"""The sessions of one process of the vLLM connector: one per tenant."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from vllm.logger import init_logger

from kvstore.config import Config
from kvstore.copier.base import Copier
from kvstore.errors import KVStoreError
from kvstore.session import Session
from kvstore.spec import Namespace, Part

_log = init_logger("vllm.kvstore")

_TENANTS: Final = 64
"""Tenants that one engine keeps sessions for; requests of more go without the store."""


class Sessions:
    """Opens a session for each tenant when it first comes up; thread-safe.

    The default tenant's is opened at start, where a wrong configuration is an error. Others are
    opened behind, since connecting can take longer than a scheduler may wait.
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
        self._open: dict[str, Future[Session]] = {}
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="kvstore-open")

    def open(self, tenant: str) -> Session:
        """The session of `tenant`, opened now if it is not.

        Raises:
            KVStoreError: the store refused it, or there are too many.
        """
        return self._future(tenant).result()

    def get(self, tenant: str) -> Session | None:
        """The session of `tenant`; None while it is being opened, or if it was refused."""
        future = self._future(tenant)
        if not future.done():
            return None
        return None if future.exception() else future.result()

    def refused(self, tenant: str) -> bool:
        """Whether there will be no session for `tenant`."""
        future = self._future(tenant)
        return future.done() and future.exception() is not None

    @property
    def opened(self) -> list[Session]:
        """All sessions that are open."""
        with self._lock:
            futures = list(self._open.values())
        return [f.result() for f in futures if f.done() and not f.exception()]

    def _future(self, tenant: str) -> Future[Session]:
        with self._lock:
            future = self._open.get(tenant)
            if future is not None:
                return future
            if len(self._open) >= _TENANTS:
                future = Future()
                future.set_exception(KVStoreError(f"more than {_TENANTS} tenants"))
                return future
            future = self._opener.submit(self._connect, tenant)
            self._open[tenant] = future
            return future

    def _connect(self, tenant: str) -> Session:
        namespace = Namespace(self._namespace.model, tenant, self._namespace.block_tokens)
        try:
            return Session.open(namespace, self._parts, self._config, copier=self._copier)
        except KVStoreError as e:
            _log.warning("no session for tenant %r: %s", tenant, e)
            raise

    def clear(self) -> bool:
        """Remove the blocks of all tenants seen here; whether that worked."""
        return all([session.clear() >= 0 for session in self.opened])

    def close(self) -> None:
        """End all sessions."""
        self._opener.shutdown(cancel_futures=True)
        for session in self.opened:
            session.close()
