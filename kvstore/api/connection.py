"""Where a daemon's API is reached, with what credentials, and what its errors become."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, Help
from grpc_status import rpc_status

from kvstore.api.convert import MAX_REPLY, SERVICE
from kvstore.api.errors import RequestRefused
from kvstore.config import Config
from kvstore.errors import AccessDenied, ConfigError, KVStoreError, StoreUnavailable
from kvstore.sources import load_config
from kvstore.transport.credentials import (
    checked_token,
    client_context,
    client_token,
    listener,
    open_to_others,
    trusted,
    why_not,
)
from kvstore.values import checked_text, split_host_port

_SUFFIX: Final = ".control"
_FORMS: Final = "unix:///path/to/socket of the daemon, or host:port ([v6]:port) of its gRPC API"
_NOBODY: Final = (
    "nobody listens there; start one with `kvstore serve`, or name another by its address "
    "(--address, KVSTORE_ADDRESS)"
)

OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.max_receive_message_length", MAX_REPLY),
    ("grpc.enable_http_proxy", 0),  # Not for this traffic, whatever the environment says.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


_first = 0
"""The process that has set gRPC up: this one, or one that it was forked from."""


@dataclass(slots=True)
class Target:
    """A daemon's API: for people, for gRPC, and what to present there."""

    shown: str
    address: str
    credentials: grpc.ChannelCredentials | None
    metadata: tuple[tuple[str, str], ...] = field(repr=False)
    socket: Path | None = None
    user: str | None = None

    def check(self) -> None:
        """Before each call: raises StoreUnavailable if it must not be made."""
        refuse_child()
        if self.socket is None:
            return
        try:
            folder = self.socket.parent.resolve(strict=True)
            strange = not trusted(self.socket.stat().st_uid, self.user)
            place = self.socket if strange else open_to_others(folder, self.user)
            if place is None and not os.access(self.socket, os.W_OK):
                raise PermissionError
        except OSError as e:
            why = _NOBODY if isinstance(e, FileNotFoundError) else why_not(e, self.socket)
            raise StoreUnavailable(f"no daemon answers at {self.shown}: {why}") from None
        if place is not None:
            raise StoreUnavailable(
                f"{place} belongs to another user or is open to others, who could take the place "
                f"of the daemon at {self.shown}: nothing was said to it; move its socket, or set "
                "session.daemon_user to the user who is to be trusted"
            )


def inherited() -> bool:
    """Whether a process that this one was forked from has set gRPC up: then it is not touched."""
    return _first not in (0, os.getpid())


def refuse_child() -> None:
    """Raise StoreUnavailable if `inherited`."""
    global _first
    if inherited():
        raise StoreUnavailable(
            "this process was forked from one that had used an Orchestrator, and gRPC does not "
            "survive that; start processes by spawn or forkserver, or fork before the first"
        )
    _first = os.getpid()


def target(
    address: str | None, config: Config | None, token: str | None, timeout: float = 10.0
) -> Target:
    """Where and how to call.

    Args:
        address: unix:///path of the session socket, host:port, or grpc://host:port (never TLS) or
            grpcs://host:port (always). None: the socket that is configured, or the private daemon
            that runs. One of those is asked to serve its API first, for `timeout` seconds at most.
        config: gives the socket, the token's file and TLS (`session.*`); loaded if None.
        token: to present, instead of the configured one.

    Raises:
        ConfigError: the address or a file is unusable, or several private daemons run.
        StoreUnavailable: a private daemon does not answer, or this process cannot use gRPC.
    """
    refuse_child()
    settings = load_config() if config is None else config
    token = client_token(settings) if token is None else checked_token(token, "token")
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    if address is None or address.startswith("unix://"):
        path = settings.control_socket if address is None else _control_socket(address)
        if listener(path, settings.session.daemon_user) is None:
            path = _of_private(path, settings, address or settings.address, timeout)
        shown = str(path).removesuffix(_SUFFIX)
        return Target(shown, f"unix:{path}", None, metadata, path, settings.session.daemon_user)
    scheme, separator, rest = address.rpartition("://")
    try:
        if separator and scheme not in ("grpc", "grpcs"):
            raise ValueError
        split_host_port(rest)
    except ValueError as e:
        form = f"unix://{address}" if address.startswith("/") else _FORMS
        raise ConfigError(f"address {address!r}: write {form}") from e
    session = settings.session
    configured = session.tls_ca is not None or session.tls_cert is not None
    secure = scheme == "grpcs" or (not separator and configured)
    return Target(rest, rest, _credentials(settings) if secure else None, metadata)


def _of_private(path: Path, config: Config, address: str | None, timeout: float) -> Path:
    """The API of a private daemon, if that is what there is, else `path`."""
    from kvstore.client.embedded import open_control, private_daemons

    found = [path.with_name(path.name.removesuffix(_SUFFIX))]
    if address is None:
        found = private_daemons(config.run_dir)
    if len(found) > 1:
        raise ConfigError(
            "several private stores are here; choose one by its address: "
            + ", ".join(f"unix://{one} (process {listener(one)})" for one in found)
        )
    return open_control(found[0], timeout) if found and listener(found[0]) else path


def _control_socket(address: str) -> Path:
    try:
        path = Path(checked_text(address.removeprefix("unix://")))
    except ValueError as e:
        raise ConfigError(f"address: {e}") from e
    if not path.is_absolute():
        raise ConfigError(f"address {address!r}: write {_FORMS}")
    return path if path.name.endswith(_SUFFIX) else path.with_name(path.name + _SUFFIX)


def _credentials(config: Config) -> grpc.ChannelCredentials:
    client_context(config.session)  # Tells what is wrong with the files; gRPC does not.
    session = config.session
    files = (session.tls_ca, session.tls_key, session.tls_cert)
    return grpc.ssl_channel_credentials(*(file.read_bytes() if file else None for file in files))


def translated(error: Any, to: Target, timeout: float | None) -> KVStoreError:
    """What a failed call, of either kind of channel, becomes."""
    shown = to.shown
    code: grpc.StatusCode = error.code()
    message: str = error.details() or ""
    within = f" within {timeout:g} s" if timeout is not None else ""
    match code:
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return StoreUnavailable(f"no daemon answers at {shown}{within}")
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return StoreUnavailable(f"no daemon answers at {shown}: {_plainly(message, to)}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return StoreUnavailable(f"{shown} does not speak {SERVICE}; is it another release?")
    status = rpc_status.from_call(error)
    reason = field = ""
    for detail in () if status is None else status.details:
        info, bad, help_ = ErrorInfo(), BadRequest(), Help()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad):
            field = bad.field_violations[0].field
        elif detail.Unpack(help_):
            message += "; " + help_.links[0].description
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return AccessDenied(message)
    return RequestRefused(message or code.name, reason, field)


def _plainly(message: str, to: Target) -> str:
    """gRPC's words about a connection that failed, as people need them."""
    if message.endswith(("Connection refused", "No such file or directory")):
        return _NOBODY
    if to.socket is None and to.credentials is None and "closed" in message:
        return f"{message}; if it speaks TLS, set session.tls_ca"
    return message
