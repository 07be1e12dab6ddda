"""Reaches a daemon over TCP: one connection for messages, others for blocks, maybe with TLS."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, NamedTuple

from kvstore.client.channel import Channel, our_hello
from kvstore.config import Config, split_host_port
from kvstore.errors import ProtocolError, StoreUnavailable
from kvstore.forks import count, in_child
from kvstore.transport import protocol
from kvstore.transport.credentials import client_context, client_token
from kvstore.transport.line import Line, PlainLine, TlsLine
from kvstore.transport.protocol import Attach, Attached, Failure, Welcome
from kvstore.transport.streams import StreamCarrier
from kvstore.transport.wire import PlainWire, TlsWire, Wire, receive_frame, send_message, shut, tune

_MAX_WELCOME: Final = 64 << 10


def connect(config: Config) -> Channel:
    """Connect to the daemon at `config.address` (tcp:// or tls://) and say hello.

    Data connections follow when they are first needed: a process that only looks up has none.

    Raises:
        StoreUnavailable: nobody answers there in time, or the daemon refuses.
        ConfigError: a token or certificate cannot be read.
    """
    assert config.address is not None
    scheme, _, rest = config.address.partition("://")
    host, port = split_host_port(rest)
    context = client_context(config) if scheme == "tls" else None
    dialer = _Dialer(config.address, host, port, context, config.session.connect_timeout)
    line, welcome = dialer.greet(client_token(config))
    attach = partial(dialer.attach, welcome)
    return Channel(
        line, welcome, StreamCarrier(attach, config.session.streams, welcome.lease_seconds)
    )


class _Dialer(NamedTuple):
    """Makes connections to one daemon, each within `timeout` seconds; thread-safe."""

    address: str
    host: str
    port: int
    context: ssl.SSLContext | None
    timeout: float

    def greet(self, token: str) -> tuple[Line, Welcome]:
        """A connection for messages, and what the daemon answered."""
        deadline = time.monotonic() + self.timeout
        with self._dialled(b"", deadline) as connection:
            wire = _wire(connection)
            wire.limit(deadline - time.monotonic())
            send_message(wire, our_hello(token))
            reply = protocol.decode_reply(receive_frame(wire, _MAX_WELCOME))
            if not isinstance(reply, Welcome):
                raise StoreUnavailable(self._refusal(reply))
        if isinstance(connection, ssl.SSLSocket):
            return TlsLine(connection), reply
        return PlainLine(connection), reply

    def attach(self, welcome: Welcome, deadline: float) -> Wire:
        """A connection for the blocks of the session that was welcomed.

        Raises:
            StoreUnavailable: as for `connect`.
        """
        deadline = min(deadline, time.monotonic() + self.timeout)
        with self._dialled(protocol.STREAM_MARK, deadline) as connection:
            wire = _wire(connection)
            wire.limit(deadline - time.monotonic())
            send_message(wire, Attach(welcome.session, welcome.ticket))
            reply = protocol.decode_stream_reply(receive_frame(wire))
            if not isinstance(reply, Attached):
                raise StoreUnavailable(self._refusal(reply))
        return wire

    @contextmanager
    def _dialled(self, mark: bytes, deadline: float) -> Iterator[socket.socket]:
        """A connection, secured if it shall be; closed if what is done with it fails."""
        connection: socket.socket | None = None
        try:
            while connection is None:
                forks = count()
                connection = socket.create_connection((self.host, self.port), self.timeout)
                in_child(connection, socket.socket.close)
                tune(connection)
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                if mark:
                    connection.sendall(mark)
                if self.context is not None:
                    connection = self.context.wrap_socket(connection, server_hostname=self.host)
                    in_child(connection, socket.socket.close)
                if count() != forks:  # A child has it too, and may never let go of it.
                    shut(connection)
                    connection.close()
                    connection = None
            yield connection
        except BaseException as e:
            if connection is not None:
                shut(connection)
                connection.close()
            if isinstance(e, (OSError, ProtocolError)) and not isinstance(e, StoreUnavailable):
                raise StoreUnavailable(self._explain(e)) from e
            raise

    def _refusal(self, reply: object) -> str:
        if isinstance(reply, Failure):
            return f"the daemon at {self.address} refused: {reply.reason}"
        return f"the daemon at {self.address} did not answer the greeting"

    def _explain(self, error: Exception) -> str:
        what = f"no daemon answers at {self.address}: {error}"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"{what}; set session.tls_ca to the certificates to trust"
        if isinstance(error, ssl.SSLError):
            return f"{what}; does it speak TLS? Otherwise use tcp://"
        if self.context is None and not isinstance(error, (ConnectionRefusedError, TimeoutError)):
            return f"{what}; if it speaks TLS, use tls://"
        return what


def _wire(connection: socket.socket) -> Wire:
    if isinstance(connection, ssl.SSLSocket):
        return TlsWire(connection)
    return PlainWire(connection)
