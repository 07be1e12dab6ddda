"""Reaches a daemon over TCP: one connection for messages, others for blocks, maybe with TLS."""

from __future__ import annotations

import math
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from kvstore.config import Config
from kvstore.errors import ProtocolError, StoreUnavailable
from kvstore.forks import count, in_child
from kvstore.transport import protocol
from kvstore.transport.carrier import Connection, greet, refusal
from kvstore.transport.credentials import client_context, client_token
from kvstore.transport.protocol import Attach, Attached, Welcome
from kvstore.transport.sockets import (
    TlsWire,
    Wire,
    check_congestion,
    receive_frame,
    send_message,
    shut,
    tune,
)
from kvstore.transport.streams import StreamCarrier
from kvstore.values import split_host_port


def connect(
    config: Config,
    token: str | None = None,
    node: str = "",
    name: str | None = None,
    until: float = math.inf,
) -> Connection:
    """Connect to the daemon at `config.address` (tcp:// or tls://) and say hello.

    `token`: other than that of sessions. `node`: where this process is reached, if it is a daemon.
    `name`: that the certificate must show, if not that of the address. `until`: it has to answer by
    then (monotonic seconds), if that is sooner than it must anyway.

    Data connections follow when they are first needed: a process that only looks up has none.

    Raises:
        StoreUnavailable: nobody answers there in time, or the daemon refuses.
        ConfigError: a token or certificate cannot be read.
    """
    assert config.address is not None
    scheme, _, rest = config.address.partition("://")
    host, port = split_host_port(rest)
    context = client_context(config.session) if scheme == "tls" else None
    timeout, congestion = config.session.connect_timeout, config.session.congestion
    check_congestion("session.congestion", congestion)
    dialer = _Dialer(config.address, host, port, context, timeout, node, name or host, congestion)
    token = client_token(config) if token is None else token
    wire, welcome = dialer.greet(token, until)
    attach = partial(dialer.attach, welcome)
    carrier = StreamCarrier(attach, config.session.streams, welcome.lease_seconds)
    return Connection(wire, welcome, carrier)


class _Dialer(NamedTuple):
    """Makes connections to one daemon, each within `timeout` seconds; thread-safe."""

    address: str
    host: str
    port: int
    context: ssl.SSLContext | None
    timeout: float
    node: str
    name: str
    congestion: str | None

    def greet(self, token: str, until: float) -> tuple[Wire, Welcome]:
        """A connection for messages, and what the daemon answered."""
        deadline = min(until, time.monotonic() + self.timeout)
        with self._dialled(b"", deadline) as wire:
            left = deadline - time.monotonic()
            return wire, greet(wire, token, self.address, left, self.node)

    def attach(self, welcome: Welcome, deadline: float) -> Wire:
        """A connection for the blocks of the session that was welcomed.

        Raises:
            StoreUnavailable: as for `connect`.
        """
        deadline = min(deadline, time.monotonic() + self.timeout)
        with self._dialled(protocol.STREAM_MARK, deadline) as wire:
            attach = Attach(welcome.session, welcome.ticket)
            send_message(wire, attach, deadline - time.monotonic())
            reply = protocol.decode_reply(receive_frame(wire, deadline - time.monotonic()))
            if not isinstance(reply, Attached):
                raise StoreUnavailable(refusal(reply, self.address))
            return wire

    @contextmanager
    def _dialled(self, mark: bytes, deadline: float) -> Iterator[Wire]:
        """A connection, secured if it shall be; closed if what is done with it fails."""
        connection: socket.socket | None = None
        try:
            while connection is None:
                forks = count()
                left = max(0.001, deadline - time.monotonic())
                connection = socket.create_connection((self.host, self.port), left)
                in_child(connection, socket.socket.close)
                tune(connection, self.congestion)
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                if mark:
                    connection.sendall(mark)
                if self.context is not None:
                    connection = self.context.wrap_socket(connection, server_hostname=self.name)
                    in_child(connection, socket.socket.close)
                if count() != forks:  # A child has it too, and may never let go of it.
                    shut(connection)
                    connection.close()
                    connection = None
            yield TlsWire(connection) if isinstance(connection, ssl.SSLSocket) else Wire(connection)
        except BaseException as e:
            if connection is not None:
                shut(connection)
                connection.close()
            if isinstance(e, (OSError, ProtocolError)) and not isinstance(e, StoreUnavailable):
                raise StoreUnavailable(self._explain(e)) from e
            raise

    def _explain(self, error: Exception) -> str:
        what = f"no daemon answers at {self.address}: {error}"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"{what}; set session.tls_ca to the certificates to trust"
        if isinstance(error, ssl.SSLError):
            return f"{what}; does it speak TLS? Otherwise use tcp://"
        if self.context is None and not isinstance(error, (ConnectionRefusedError, TimeoutError)):
            return f"{what}; if it speaks TLS, use tls://"
        return what
