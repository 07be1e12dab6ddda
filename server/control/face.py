"""The gRPC face: the orchestration API on a unix socket and, if configured, on host:port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from functools import partial
from types import SimpleNamespace
from typing import Any, Final

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvstore.api.convert import MAX_MESSAGE, SERVICE
from kvstore.errors import ConfigError, NoPackage, NotNow
from kvstore.files import make_way
from kvstore.server.access.grants import LOCAL, Grant
from kvstore.server.control.calls import SPARE_CALLS, Calls, Gate
from kvstore.server.control.events import EventVerbs
from kvstore.server.control.operations import Operations
from kvstore.server.control.prompts import PromptVerbs
from kvstore.server.control.rules import RuleVerbs
from kvstore.server.control.state import StateVerbs
from kvstore.server.control.write import WriteVerbs
from kvstore.server.listeners import bind, clear
from kvstore.server.loop import run
from kvstore.server.node import Node
from kvstore.store.pins import Pins
from kvstore.values import split_host_port

_GRACE_SECONDS: Final = 0.5
_HEALTH_SECONDS: Final = 0.1
_REVIVE_SECONDS: Final = 0.2
_MAX_CONNECTIONS: Final = 1024
_BROKEN: Final = ("1.84.", "1.85.")
"""Releases that malformed calls crash; pyproject.toml excludes them, engines may bring them."""

_log = logging.getLogger("kvstore.control")

_NO_NEWS: Final = ("ExecuteBatchError", "Failed sending error status", "Invalid encoding")


def check_grpc() -> None:
    """Raise NoPackage if this gRPC is known to be bad."""
    if grpc.__version__.startswith(_BROKEN):
        raise NoPackage(
            f"the API: grpcio {grpc.__version__} corrupts memory when malformed calls are "
            "cancelled, so anybody can crash it: pip install 'grpcio!=1.84.*,!=1.85.*'"
        )


def _is_news(record: logging.LogRecord) -> bool:
    """Whether to log what gRPC says.

    It logs each client that goes away during its answer with a traceback, headers that are no
    UTF-8 with their values, maybe of tokens, and what `ControlFace._revive` tells.
    """
    return not (
        isinstance(record.msg, UnicodeDecodeError)
        or str(record.msg).startswith(_NO_NEWS)
        or (record.exc_info and isinstance(record.exc_info[1], UnicodeDecodeError))
    )


if hasattr(cygrpc, "traceback"):  # By which gRPC also prints what it logs, past all filters.
    cygrpc.traceback = SimpleNamespace(print_exc=lambda: None)
for _name in ("grpc._cython.cygrpc", "asyncio"):
    logging.getLogger(_name).addFilter(_is_news)


class _Verbs(PromptVerbs, StateVerbs, EventVerbs, WriteVerbs, RuleVerbs):
    """What answers each verb of the API: the method of its name."""


class ControlFace:
    """The API, health and reflection, on the daemon's loop."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._path = node.config.control_socket
        self._operations = Operations()
        self._answers = partial(_Verbs, node, self._operations, Pins(node.store))
        self._health = health.aio.HealthServicer()
        self._servers: dict[str, grpc.aio.Server] = {}  # by address; the empty one is the socket's
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            ConfigError: the socket's path is too long, or the port cannot be had.
            NoPackage: this gRPC is known to be bad.
        """
        check_grpc()
        await self._set_health(serving=False)
        if self._node.config.server.grpc is not None:
            self._open(self._node.config.server.grpc)
        # A server of its own: whoever floods the port does not shut out the socket.
        self._open("")
        counters = self._node.store.counters
        for address, server in self._servers.items():
            await server.start()
            self._tasks.append(run("gRPC", partial(self._revive, address), counters, again=True))
        self._tasks.append(run("gRPC's health", self._look_after_health, counters, again=True))

    async def stop(self) -> None:
        """End; operations are cancelled, calls get half a second."""
        for task in self._tasks:
            task.cancel()
        await self._health.enter_graceful_shutdown()
        await self._operations.stop()
        await asyncio.gather(*(s.stop(_GRACE_SECONDS) for s in self._servers.values()))
        with contextlib.suppress(OSError):
            make_way(self._path)

    @property
    def addresses(self) -> list[str]:
        """Where it listens besides its socket."""
        return [f"grpc {address}" for address in self._servers if address]

    def _open(self, address: str) -> None:
        server = self._server(None if address else LOCAL)
        if address:
            address = self._listen(server, address)
        else:
            self._listen_locally(server)
        self._servers[address] = server

    async def _revive(self, address: str) -> None:
        """Start a server anew whenever gRPC's own loop has died.

        It does so of a single call with a method that is no UTF-8, from anybody.
        """
        loop = asyncio.get_running_loop()
        while True:
            ended = loop.create_task(self._servers[address].wait_for_termination())
            await asyncio.wait([ended])
            _log.warning("the gRPC server is started anew: %s", ended.exception())
            while True:
                try:
                    self._open(address)
                    break
                except ConfigError as e:
                    _log.warning("%s; it is tried again", e)
                    await asyncio.sleep(_REVIVE_SECONDS)
            await self._servers[address].start()

    def _server(self, trusted: Grant | None) -> grpc.aio.Server:
        options: list[tuple[str, Any]] = [
            ("grpc.so_reuseport", 0),
            # One byte more than is allowed: what is longer is refused before it is read, what has
            # just that length by us, with words.
            ("grpc.max_receive_message_length", MAX_MESSAGE + 1),
            ("grpc.max_allowed_incoming_connections", _MAX_CONNECTIONS),
            # What is compressed would be inflated, without bound, before its size is looked at.
            ("grpc.compression_enabled_algorithms_bitset", 1),
            ("grpc.per_message_decompression", 0),
            # Half a greeting ends soon, and a connection without calls after a while.
            ("grpc.server_handshake_timeout_ms", 5_000),
            ("grpc.max_connection_idle_ms", 60_000),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ]
        server = grpc.aio.server(
            interceptors=[Gate(self._node, trusted)],
            options=options,
            maximum_concurrent_rpcs=self._node.config.server.max_requests + SPARE_CALLS,
        )
        server.add_generic_rpc_handlers((Calls(self._answers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def _listen_locally(self, server: grpc.aio.Server) -> None:
        clear(self._path)
        mask = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{self._path}")
        except RuntimeError as e:
            raise ConfigError(f"cannot listen on {self._path}; choose another socket") from e
        finally:
            os.umask(mask)

    def _listen(self, server: grpc.aio.Server, address: str) -> str:
        """Open the port; returns the address with the port that it really is."""
        host, port = split_host_port(address)
        for probe in bind("server.grpc", address):  # gRPC would not say why it cannot be had
            probe.close()
        credentials = self._node.access.grpc_credentials()
        shown = f"[{host}]" if ":" in host else host
        try:
            if credentials is None:
                bound = server.add_insecure_port(f"{shown}:{port}")
            else:
                bound = server.add_secure_port(f"{shown}:{port}", credentials)
        except RuntimeError as e:
            why = str(e).partition(";")[0]
            raise NotNow(f"server.grpc: cannot listen on {address}: {why}; choose another") from e
        return f"{shown}:{bound}"

    async def _look_after_health(self) -> None:
        while True:
            await self._set_health(serving=self._node.ready and not self._node.draining)
            await asyncio.sleep(_HEALTH_SECONDS)

    async def _set_health(self, *, serving: bool) -> None:
        reply = health_pb2.HealthCheckResponse
        status = reply.SERVING if serving else reply.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)
