"""What a client shows and trusts: its token, its certificate, and whose daemons it believes."""

from __future__ import annotations

import os
import pwd
import socket
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore.errors import ConfigError, StoreUnavailable

if TYPE_CHECKING:
    import ssl

    from kvstore.config import Config
    from kvstore.sections import PeersConfig, SessionConfig


_PEER: Final = struct.Struct("3i")


def client_token(config: Config) -> str:
    """The token to present: `KVSTORE_TOKEN`, else what `session.token_file` holds, else none.

    Raises:
        ConfigError: the file cannot be read or holds no token, or it cannot be sent.
    """
    return _token("KVSTORE_TOKEN", config.session.token_file, "session.token_file")


def peer_token(peers: PeersConfig) -> str:
    """The token for other daemons of the pool, as `client_token`: `KVSTORE_PEER_TOKEN` comes first.

    Raises:
        ConfigError: as `client_token`.
    """
    return _token("KVSTORE_PEER_TOKEN", peers.token_file, "peers.token_file")


def _token(variable: str, path: Path | None, key: str) -> str:
    token = os.environ.get(variable, "").strip()
    if token or path is None:
        return checked_token(token, variable)
    return read_token(path, key)


def read_token(path: Path, key: str) -> str:
    """The token that a file holds; `key` is what names the file.

    Raises:
        ConfigError: it cannot be read, or holds no token.
    """
    try:
        token = path.read_text().strip()
    except (OSError, ValueError) as e:
        reason = (isinstance(e, OSError) and e.strerror) or "it is no text"
        text = f"{key} {path}: {reason}; give a file that holds the token alone"
        raise ConfigError(text) from None
    if not token:
        raise ConfigError(f"{key} {path} is empty; put the token into it")
    return checked_token(token, f"{key} {path}")


def checked_token(token: str, source: str) -> str:
    """The token, if it can be sent. Errors do not show it, nor do those that they come from.

    Raises:
        ConfigError: it holds what no token may.
    """
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"{source} holds a space, a line break or characters beyond ASCII, which cannot be "
            "sent; give the token alone, `kvstore token new` makes one"
        )
    return token


def peer_of(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and main group at the other end of a unix socket. Raises OSError."""
    return _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))


def listener(path: Path, user: str | None = None) -> int | None:
    """The process that listens on a unix socket, if it is `trusted`; None: nobody."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
            pid, uid, _ = peer_of(probe)
        except OSError:
            return None
        return pid if trusted(uid, user) else None


def trusted(uid: int, user: str | None) -> bool:
    """Whether this process believes what user `uid` serves: itself, root, and `user` if given.

    Raises:
        ConfigError: there is no `user`, which is a name or a number.
    """
    if uid in (os.geteuid(), 0) or user is None:
        return uid in (os.geteuid(), 0)
    if user.isascii() and user.isdecimal():
        return uid == int(user)
    try:
        return uid == pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigError(
            f"session.daemon_user: there is no user {user!r}; give a name or number of a user"
        ) from None


def open_to_others(folder: Path, user: str | None = None) -> Path | None:
    """Where somebody who is not `trusted` could replace what lies on the way to `folder`, or in it.

    Raises:
        OSError: it is not there.
        ConfigError: as `trusted`.
    """
    for place in (folder, *folder.parents):
        found = place.stat()
        anybody = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
        if anybody or not trusted(found.st_uid, user):
            return place
    return None


def why_not(error: OSError, path: Path) -> str:
    """Why the socket at `path` cannot be used, in words for people."""
    if not isinstance(error, PermissionError):
        return error.strerror or str(error)
    for place in (path, *path.parents):
        with suppress(OSError):
            return (
                f"{place} belongs to user {place.stat().st_uid} and you are user {os.geteuid()}; "
                "have its daemon let sessions of a group in (server.group), or anybody with a token"
                " over TCP (server.tcp, server.grpc, server.tokens)"
            )
    return "permission denied"


def check_daemon(connection: socket.socket, path: Path, user: str | None) -> None:
    """Refuse a daemon of somebody else before a word is said to it. For a unix socket at `path`.

    Raises:
        StoreUnavailable: it runs as a user who is not `trusted`.
        ConfigError: as `trusted`.
    """
    _, uid, _ = peer_of(connection)
    if not trusted(uid, user):
        raise StoreUnavailable(
            f"the daemon at {path} runs as user {uid}, which is neither this process's "
            f"({os.geteuid()}) nor root: nothing was said to it. If it is to be trusted, set "
            f"session.daemon_user to {uid} (in a user namespace, all users from outside are 65534)"
        )


def client_context(
    settings: SessionConfig | PeersConfig, section: str = "session"
) -> ssl.SSLContext:
    """TLS for `tls://` addresses: 1.2 at least, the daemon's name and certificate are checked.

    Trusts `tls_ca` of that section, or what the system trusts; shows `tls_cert` if there is one.

    Raises:
        ConfigError: a file is missing or unusable; names it.
    """
    import ssl

    try:
        context = ssl.create_default_context(cafile=settings.tls_ca)
    except OSError as e:
        text = f"{section}.tls_ca {settings.tls_ca}: {tls_problem(e)}; give PEM certificates"
        raise ConfigError(text) from e
    certify(context, section, settings.tls_cert, settings.tls_key)
    return context


def certify(context: ssl.SSLContext, section: str, cert: Path | None, key: Path | None) -> None:
    """Have a context show a certificate, if there is one, and speak TLS of 1.2 at least.

    Raises:
        ConfigError: a file is missing or unusable; names it, of that `section`.
    """
    import ssl

    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if (cert is None) != (key is None):
        have, lack = ("tls_key", "tls_cert") if cert is None else ("tls_cert", "tls_key")
        raise ConfigError(f"{section}.{have} is set but {section}.{lack} is not; TLS needs both")
    if cert is not None:
        try:
            # Without the password argument an encrypted key would ask the terminal.
            context.load_cert_chain(cert, key, password=lambda: "")
        except OSError as e:
            raise ConfigError(
                f"{section}.tls_cert {cert} with {section}.tls_key {key}: {tls_problem(e)}; give a "
                "PEM chain and the key it belongs to, without a password"
            ) from e


def tls_problem(error: OSError) -> str:
    """What is wrong with a file of TLS."""
    reason: str | None = getattr(error, "reason", None)  # of OpenSSL
    return reason.replace("_", " ").lower() if reason else error.strerror or str(error)
